//! Which variables the program reads, and what they mean.

use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use crate::support::{KEYWORDS, PROGRAM, RDS, Run, UNSET, admin, changed, demo, vars, with};
use tokio_postgres::Config;
use tokio_postgres::config::{
    ChannelBinding, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs,
};

/// Variables for a run that needs neither TLS nor a server: it reads the settings, and nobody listens on the port.
const NOWHERE: [(&str, &str); 3] = [
    ("PG.HOST", "127.0.0.1"),
    ("PG.PORT", "1"),
    ("PG.PASSWORD", "nobody's secret"),
];

fn nowhere(change: &[(&str, &str)]) -> Run {
    demo(&changed(vars(NOWHERE), change))
}

/// The line that logs the settings, without the level.
#[track_caller]
fn logged(run: &Run) -> &str {
    let line = run
        .output
        .lines()
        .find_map(|line| Some(line.split_once("] Settings ")?.1));
    line.unwrap_or_else(|| panic!("no settings in:\n{}", run.output))
}

#[test]
fn every_keyword_is_understood() {
    let mut expected = Config::new();
    expected
        .user("u")
        .password("p")
        .dbname("d")
        .options("-c geqo=off")
        .application_name("a")
        .ssl_mode(SslMode::Disable)
        .ssl_negotiation(SslNegotiation::Postgres)
        .host("localhost")
        .hostaddr("127.0.0.1".parse().unwrap())
        .port(1)
        .connect_timeout(Duration::from_secs(2))
        .tcp_user_timeout(Duration::from_secs(3))
        .keepalives(false)
        .keepalives_idle(Duration::from_secs(4))
        .keepalives_interval(Duration::from_secs(5))
        .keepalives_retries(6)
        .target_session_attrs(TargetSessionAttrs::ReadWrite)
        .channel_binding(ChannelBinding::Disable)
        .load_balance_hosts(LoadBalanceHosts::Random);
    let settings = format!("{{ pg: {expected:?}, db_ca_cert: None }}");
    for prefix in ["PG.", "PG__", "pg.", "Pg__"] {
        for upper in [true, false] {
            let name = |keyword: &str| match upper {
                true => format!("{prefix}{}", keyword.to_uppercase()),
                false => format!("{prefix}{keyword}"),
            };
            let run = demo(&vars(
                KEYWORDS.map(|(keyword, value)| (name(keyword), value)),
            ));
            assert_eq!(logged(&run), settings);
            run.failed(&["connecting to localhost:1", "Connection refused"]);
        }
    }
}

#[test]
fn lists_are_as_tokio_postgres_has_them() {
    let mut expected = Config::new();
    expected.user("u").ssl_mode(SslMode::Disable);
    for (host, addr, port) in [
        ("a", "127.0.0.1", 1),
        ("b", "127.0.0.2", 5432),
        ("/c", "::1", 3),
    ] {
        expected
            .host(host)
            .hostaddr(addr.parse().unwrap())
            .port(port);
    }
    let run = demo(&vars([
        ("PG.HOST", "a,b,/c"),
        ("PG.HOSTADDR", "127.0.0.1,127.0.0.2,::1"),
        ("PG.PORT", "1,,3"),
        ("PG.USER", "u"),
    ]));
    assert_eq!(
        logged(&run),
        format!("{{ pg: {expected:?}, db_ca_cert: None }}")
    );
    // The error has all hosts, because tokio-postgres does not say which of them has failed.
    run.failed(&["connecting to", "\"a\"", "\"b\"", "\"/c\""]);
    demo(&vars([("PG.HOST", "a,b"), ("PG.PORT", "1,2,3")])).failed(&["invalid number of ports"]);
}

#[test]
fn one_setting_given_twice_is_refused() {
    for (one, other) in [
        ("PG.HOST", "PG__HOST"),
        ("PG.PORT", "pg.port"),
        ("PG.PASSWORD", "PG__PASSWORD"),
        ("PG.USER", "Pg__user"),
        ("DB_CA_CERT", "db_ca_cert"),
    ] {
        for values in [["1", "2"], ["1", "1"]] {
            nowhere(&[(one, values[0]), (other, values[1])]).failed(&[
                one,
                other,
                "set the same option",
            ]);
        }
    }
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let ca = ("DB_CA_CERT", "ca-certificates/global-bundle.pem");
    for mode in ["disable", "allow", "prefer", "verify-ca"] {
        nowhere(&[ca, ("PG.SSLMODE", mode)]).failed(&["DB_CA_CERT", "PG.SSLMODE"]);
    }
    for (name, value) in [
        ("PG.SSLMODE", "require"),
        ("PG.SSLMODE", "verify-full"),
        ("PG.SSLNEGOTIATION", "direct"),
    ] {
        nowhere(&[(name, value)]).failed(&[name, "DB_CA_CERT"]);
    }
}

#[test]
fn a_value_that_seems_to_hold_a_secret_is_refused_and_not_shown() {
    let refused = |name: &str, value: &str, why: &str| {
        let run = nowhere(&[("PG.HOST", UNSET), (name, value)]);
        run.failed(&[&format!("{name} must {why}")]);
        assert!(!run.output.contains("hunter2"), "{}", run.output);
    };
    for name in ["DB_CA_CERT", "PG.USER", "PG.DBNAME", "PG__HOST", "pg.host"] {
        let url = "postgres://postgres:hunter2@localhost/postgres";
        refused(name, url, "not be a URL");
        for pairs in [
            "host=localhost password=hunter2",
            "Server=x;Password=hunter2",
        ] {
            refused(name, pairs, "not be a connection string");
        }
    }
    for host in [
        "postgres:hunter2@localhost",
        "hunter2=",
        "localhost hunter2",
        "localhost\thunter2",
        "localhost\nhunter2",
    ] {
        refused("PG.HOST", host, "be a host name");
    }
    let key = "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n";
    for pem in [key.to_owned(), key.replace('\n', " "), format!("# {key}")] {
        refused("DB_CA_CERT", &pem, "be a path, not PEM text");
    }
    // A password may be any of these.
    for value in ["://@ =", "password=", key] {
        nowhere(&[("PG.PASSWORD", value)]).failed(&["Connection refused"]);
    }
}

#[test]
fn a_password_in_a_variable_that_takes_other_values_is_not_shown() {
    let text = [
        "user",
        "dbname",
        "options",
        "application_name",
        "host",
        "password",
    ];
    let keywords = KEYWORDS.map(|(keyword, _)| keyword).into_iter();
    for keyword in keywords.filter(|keyword| !text.contains(keyword)) {
        for name in [
            format!("PG.{}", keyword.to_uppercase()),
            format!("PG.X{keyword}"),
        ] {
            let run = nowhere(&[("PG.PORT", UNSET), (&name, "hunter2")]);
            assert!(
                run.error().to_lowercase().contains(keyword),
                "{}",
                run.output
            );
            assert!(!run.output.contains("hunter2"), "{}", run.output);
        }
    }
}

#[test]
fn nothing_else_in_the_environment_matters() {
    let mut all = with(
        &RDS,
        &[
            ("PG", "x"),
            ("PG[0]", "x"),
            ("PG[", "x"),
            ("DB_CA_CERT.X", "x"),
            ("DB_CA_CERT[0]", "x"),
            ("A.B", "x"),
            ("A", "x"),
            ("PGHOST", "x"),
            ("PG_PORT", "x"),
            ("HOST", "x"),
            ("DB_CA", "x"),
        ],
    );
    let not_utf_8 = std::ffi::OsStr::from_bytes(b"caf\xe9");
    all.extend([
        (not_utf_8.into(), "x".into()),
        ("FOREIGN".into(), not_utf_8.into()),
    ]);
    for _ in 0..10 {
        demo(&all).succeeded();
    }
}

#[test]
fn any_password_survives() {
    let mut admin = admin(&RDS);
    admin
        .batch_execute("CREATE ROLE any_password LOGIN")
        .unwrap();
    let long = "0123456789".repeat(300);
    for password in [
        r"it's a \ 'test' %41 = x",
        r#" "double" and 'single' "#,
        r"back\slash\\es\",
        "postgres://user:password@host/db?sslmode=disable",
        "a=b c='d' host=elsewhere",
        "100%25 $HOME `id` #!&;|<>",
        "Grüße, 世界, 🐘",
        "tab\tand\nnew line",
        "true",
        "12345.0",
        &long,
    ] {
        let quoted = password.replace('\'', "''");
        admin
            .batch_execute(&format!("ALTER ROLE any_password PASSWORD '{quoted}'"))
            .unwrap();
        for name in ["PG.PASSWORD", "PG__PASSWORD"] {
            let change = [
                ("PG.USER", "any_password"),
                ("PG.PASSWORD", UNSET),
                (name, password),
            ];
            demo(&with(&RDS, &change)).succeeded();
        }
    }
}

#[test]
fn any_name_survives() {
    for name in [r#"a "b" 'c' \d"#, "größe", "x=y z", "UPPER"] {
        let quoted = name.replace('"', "\"\"");
        let mut admin = admin(&RDS);
        admin
            .batch_execute(&format!(
                "CREATE ROLE \"{quoted}\" LOGIN PASSWORD 'of odd names'"
            ))
            .unwrap();
        admin
            .batch_execute(&format!("CREATE DATABASE \"{quoted}\""))
            .unwrap();
        let run = demo(&with(
            &RDS,
            &[
                ("PG.USER", name),
                ("PG.DBNAME", name),
                ("PG.PASSWORD", "of odd names"),
            ],
        ));
        assert_eq!(run.code, Some(0), "{}", run.output);
        assert!(
            run.output.contains(&format!("catalog_name: {name:?}")),
            "{}",
            run.output
        );
    }
}

#[test]
fn an_unknown_keyword_is_named() {
    for (name, keyword) in [
        ("PG.PASWORD", "unknown option `pasword`"),
        ("PG__PASWORD", "unknown option `pasword`"),
        ("pg.ssl-mode", "pg.ssl-mode must be PG.<KEYWORD>"),
        ("PG.", "PG. must be PG.<KEYWORD>"),
        ("PG__", "PG__ must be PG.<KEYWORD>"),
        ("PG.HOST X", "PG.HOST X must be PG.<KEYWORD>"),
        ("PG.postgres://", "PG.postgres:// must be PG.<KEYWORD>"),
        ("PG.USER[0]", "PG.USER[0] must be PG.<KEYWORD>"),
        ("PG.A.B", "PG.A.B must be PG.<KEYWORD>"),
        ("PG__A__B", "unknown option `a__b`"),
    ] {
        let run = nowhere(&[(name, "a secret in the wrong place")]);
        run.failed(&["reading settings from the environment", keyword]);
        assert!(!run.output.contains("secret"), "{}", run.output);
    }
}

#[test]
fn a_name_with_a_dot_or_bracket_too_many_is_refused_each_time() {
    for name in ["PG.PASSWORD.X", "PG__PASSWORD.X", "PG.PASSWORD[0]"] {
        for _ in 0..10 {
            let run = nowhere(&[(name, "a secret in the wrong place")]);
            run.failed(&[&format!("{name} must be PG.<KEYWORD>")]);
        }
    }
}

#[test]
fn without_any_variable_it_says_which_to_set() {
    demo(&[]).failed(&["PG.HOST, which is not set", "PG__HOST"]);
}

#[test]
fn settings_are_logged_at_debug_and_only_there() {
    let run = demo(&with(&RDS, &[("RUST_LOG", "debug")]));
    run.succeeded();
    assert!(logged(&run).contains("password: Some(_)"), "{}", run.output);
    for level in ["info", "warn"] {
        let run = demo(&with(&RDS, &[("RUST_LOG", level)]));
        assert!(!run.output.contains("Settings"), "{}", run.output);
    }
}

#[test]
fn the_answer_is_shown_without_rust_log() {
    let output = assert_cmd::Command::new(PROGRAM)
        .env_clear()
        .envs(RDS.env())
        .output()
        .unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(
        log.contains("INFO") && log.contains("catalog_name: \"postgres\""),
        "{log}"
    );
}

#[test]
fn names_with_a_dot_come_through_env_and_not_through_shells() {
    let end = |command: &str, args: &[&str]| {
        let output = std::process::Command::new(command)
            .env_remove("RUST_LOG")
            .args(args)
            .output()
            .unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    let seen = "connecting to nowhere.invalid:";
    let not_seen = "PG.HOST, which is not set";
    assert!(end("env", &["PG.HOST=nowhere.invalid", PROGRAM]).contains(seen));
    assert!(
        end(
            "env",
            &["PG__HOST=nowhere.invalid", "sh", "-c", "\"$0\"", PROGRAM]
        )
        .contains(seen)
    );
    let refused = end(
        "bash",
        &["-c", "export PG.HOST=nowhere.invalid; \"$0\"", PROGRAM],
    );
    assert!(
        refused.contains("not a valid identifier") && refused.contains(not_seen),
        "{refused}"
    );
    if std::fs::exists("/bin/dash").unwrap() {
        let dropped = end(
            "env",
            &[
                "PG.HOST=nowhere.invalid",
                "/bin/dash",
                "-c",
                "\"$0\"",
                PROGRAM,
            ],
        );
        assert!(dropped.contains(not_seen), "{dropped}");
    }
}
