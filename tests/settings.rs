//! What the environment may say, and what the program makes of it.

mod support;

use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use local_rds::{ENDPOINT, LocalRds};
use support::{KEYWORDS, PROGRAM, RDS, Run, changed, demo, vars, with};
use tokio_postgres::Config;
use tokio_postgres::config::{
    ChannelBinding, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs,
};

/// Without one of these variables, no TLS and no server is needed to see how settings are read.
const NOWHERE: [(&str, &str); 3] = [
    ("PG.HOST", "127.0.0.1"),
    ("PG.PORT", "1"),
    ("PG.PASSWORD", "nobody's secret"),
];

fn nowhere(change: &[(&str, &str)]) -> Run {
    demo(&changed(vars(NOWHERE), change))
}

/// The line that logs the settings, without the time and the level.
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
    let settings = format!("{{ pg: [{expected:?}], db_ca_cert: None }}");
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
fn lists_make_one_config_a_host() {
    let of = |host: &str, addr: &str, port| {
        let mut config = Config::new();
        config
            .host(host)
            .hostaddr(addr.parse().unwrap())
            .port(port)
            .user("u");
        config
    };
    let hosts = [
        ("PG.HOST", "a,b,/c"),
        ("PG.HOSTADDR", "127.0.0.1,127.0.0.2,::1"),
        ("PG.USER", "u"),
    ];
    for (ports, [a, b, c]) in [
        ("1", [1, 1, 1]),
        ("1,2,3", [1, 2, 3]),
        ("1,,3", [1, 5432, 3]),
    ] {
        let run = demo(&vars(hosts.into_iter().chain([("PG.PORT", ports)])));
        let expected = [
            of("a", "127.0.0.1", a),
            of("b", "127.0.0.2", b),
            of("/c", "::1", c),
        ];
        assert_eq!(
            logged(&run),
            format!("{{ pg: {expected:?}, db_ca_cert: None }}")
        );
    }
}

#[test]
fn other_spellings_mean_the_same() {
    let set = ["PG.HOST", "PG.PORT"].map(|name| (name, ""));
    let port = RDS.port().to_string();
    let spellings = [
        ("PG.HOSTS", ENDPOINT),
        ("pg__ports", &port),
        ("PG__SSL_MODE", "verify-full"),
    ];
    demo(&with(&RDS, &[set.as_slice(), &spellings].concat())).succeeded();
    // Twice the same is no contradiction.
    demo(&with(&RDS, &spellings)).succeeded();
    let ca = RDS.roots().display().to_string();
    demo(&with(&RDS, &[("DB_CA_CERT", ""), ("db_ca_cert", &ca)])).succeeded();
}

#[test]
fn one_setting_with_two_values_is_refused() {
    for (one, other) in [
        ("PG.HOST", "PG__HOST"),
        ("PG.HOST", "PG.HOSTS"),
        ("PG.PORT", "pg.ports"),
        ("PG.SSLMODE", "PG.SSL_MODE"),
        ("PG.PASSWORD", "PG__PASSWORD"),
        ("PG.USER", "PG.user"),
    ] {
        let values = match one {
            "PG.PORT" => ("1", "2"),
            "PG.SSLMODE" => ("disable", "prefer"),
            _ => ("value one", "value two"),
        };
        nowhere(&[(one, values.0), (other, values.1)]).failed(&[
            one,
            other,
            "are one setting, with two values",
        ]);
    }
    nowhere(&[("DB_CA_CERT", "/a"), ("db_ca_cert", "/b")]).failed(&["DB_CA_CERT", "db_ca_cert"]);
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let ca = ("DB_CA_CERT", "ca-certificates/global-bundle.pem");
    for mode in ["disable", "allow", "prefer"] {
        nowhere(&[ca, ("PG.SSLMODE", mode)]).failed(&["DB_CA_CERT", "PG.SSLMODE"]);
    }
    for (name, value) in [
        ("PG.SSLMODE", "require"),
        ("PG.SSLMODE", "verify-full"),
        ("PG.SSLNEGOTIATION", "direct"),
        ("PG.CHANNEL_BINDING", "require"),
    ] {
        nowhere(&[(name, value)]).failed(&[name, "requires TLS", "DB_CA_CERT"]);
    }
}

#[test]
fn nothing_else_in_the_environment_matters() {
    let mut all = with(
        &RDS,
        &[
            ("PG", "x"),
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
    let rds = LocalRds::builder()
        .password(r"it's a \ 'test' %41 = x")
        .start()
        .unwrap();
    demo(&with(&rds, &[])).succeeded();
    let mut admin = rds.admin().unwrap();
    let long = "0123456789".repeat(300);
    for password in [
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
            .batch_execute(&format!("ALTER ROLE postgres PASSWORD '{quoted}'"))
            .unwrap();
        demo(&with(&rds, &[("PG.PASSWORD", password)])).succeeded();
        demo(&with(
            &rds,
            &[("PG.PASSWORD", ""), ("PG__PASSWORD", password)],
        ))
        .succeeded();
    }
}

#[test]
fn any_name_survives() {
    for name in [r#"a "b" 'c' \d"#, "größe", "x=y z", "UPPER"] {
        let quoted = name.replace('"', "\"\"");
        let mut admin = RDS.admin().unwrap();
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
    for name in [
        "PG.PASWORD",
        "PG__PASWORD",
        "pg.ssl-mode",
        "PG.",
        "PG__",
        "PG.HOST[0]",
        "PG.A.B",
        "PG.HOST X",
        "PG.postgres://",
    ] {
        nowhere(&[(name, "a secret in the wrong place")]).failed(&[name]);
    }
    nowhere(&[("PG.PASWORD", "secret")]).failed(&["PG.PASWORD: unknown option `pasword`"]);
}

#[test]
fn without_any_variable_it_says_which_to_set() {
    demo(&[]).failed(&[
        "PG.HOST",
        "PG__HOST",
        "PG.USER",
        "PG.PASSWORD",
        "PG.DBNAME",
        "DB_CA_CERT",
    ]);
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
    let not_seen = "no host: set PG.HOST";
    assert!(end("env", &["PG.HOST=nowhere.invalid", PROGRAM]).contains(seen));
    assert!(end("env", &["PG__HOST=nowhere.invalid", "sh", "-c", PROGRAM]).contains(seen));
    let refused = end(
        "bash",
        &["-c", &format!("export PG.HOST=nowhere.invalid; {PROGRAM}")],
    );
    assert!(
        refused.contains("not a valid identifier") && refused.contains(not_seen),
        "{refused}"
    );
    if std::fs::exists("/bin/dash").unwrap() {
        let dropped = end(
            "env",
            &["PG.HOST=nowhere.invalid", "/bin/dash", "-c", PROGRAM],
        );
        assert!(dropped.contains(not_seen), "{dropped}");
    }
}
