//! The tables of the pages are complete: each setting is accepted, and each error happens.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread::{scope, sleep};
use std::time::Duration;

use crate::service::{
    log_of_a_bad_day, log_of_one_with_an_open_transaction, log_of_one_with_few_files,
};
use crate::support::fake::{Fake, black_hole, only_says, own_tls, silence, startup, tls};
use crate::support::page::{Line, between, example, lines, page, quoted};
use crate::support::service::{COPY, SERVICE, Service, sessions, tables as make_tables};
use crate::support::{
    KEYWORDS, LOCKED, PROGRAM, RDS, Run, UNSET, Var, admin, at, builder, demo, eventually, file,
    full, kill, run_of, shutting_down, vars, while_it_starts, while_the_query_runs, with,
};
use local_rds::{Authority, ENDPOINT, IAM_USER, KeyType, LocalRds, ServerCertificate};
use rcgen::{
    BasicConstraints, CertificateParams, IsCa, KeyPair, PKCS_ECDSA_P384_SHA384, SigningKey,
};
use regex::Regex;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempPath;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use x509_cert::certificate::{Certificate, Version};
use x509_cert::der::asn1::BitString;
use x509_cert::der::pem::LineEnding;
use x509_cert::der::{Decode, Encode, EncodePem};

/// A row of a table.
struct Row {
    /// The file and the line.
    place: String,
    cells: Vec<String>,
}

/// The rows of the tables under a heading of a page.
#[track_caller]
fn table(path: &str, heading: &str) -> Vec<Row> {
    let page = page(path);
    let lines = lines(&page);
    let is_rule = |line: &Line| line.text.starts_with("|---");
    // A head is what stands above a rule.
    let is_head = |nth: usize| lines.get(nth + 1).is_some_and(is_rule);
    let rows = lines.iter().enumerate().filter(|(nth, line)| {
        let is_row = line.section == heading && line.text.starts_with('|');
        is_row && !is_rule(line) && !is_head(*nth)
    });
    let rows: Vec<_> = rows
        .map(|(_, line)| Row {
            place: format!("{path}:{}", line.number),
            cells: line
                .text
                .trim_matches('|')
                .split(" | ")
                .map(|cell| cell.trim().to_owned())
                .collect(),
        })
        .collect();
    assert!(
        !rows.is_empty(),
        "{path} has no table under \"## {heading}\""
    );
    rows
}

/// The errors of a page, from words to where they are; the same words may be in more rows than one.
fn errors(path: &str) -> BTreeMap<String, Vec<String>> {
    let mut errors = BTreeMap::<_, Vec<_>>::new();
    for Row { place, cells } in table(path, "When it does not work") {
        let complete = cells.len() == 3 && cells.iter().all(|cell| !cell.is_empty());
        assert!(
            complete,
            "{place}: write words, a cause and a remedy: {cells:?}"
        );
        errors.entry(cells[0].clone()).or_default().push(place);
    }
    errors
}

/// The words of such an error: all that is in backticks, without what "…" stands for.
fn words(cell: &str) -> Vec<&str> {
    let quoted = quoted(cell);
    quoted
        .into_iter()
        .flat_map(|words| words.split('…'))
        .collect()
}

/// How the tests name that error: without the backticks.
fn key(cell: &str) -> String {
    cell.replace('`', "")
}

#[test]
fn its_table_of_settings_has_all_that_are_accepted_with_values_that_are() {
    let mut listed = BTreeSet::new();
    for Row { place, cells } in table("README.md", "Settings") {
        let name = quoted(&cells[0])[0].to_owned();
        for value in quoted(&cells[1])
            .into_iter()
            .filter(|v| !v.starts_with("PG.") && *v != "DB_CA_CERT")
        {
            let mut all = BTreeMap::from([
                ("PG.HOST", "localhost"),
                ("PG.PORT", "1"),
                ("DB_CA_CERT", "ca-certificates/global-bundle.pem"),
            ]);
            all.insert(&name, value);
            let run = demo(&vars(all));
            for refusal in ["unknown option", "invalid value for option", "is empty"] {
                assert!(
                    !run.error().contains(refusal),
                    "{place}: {name}={value} is refused: {}",
                    run.error()
                );
            }
        }
        listed.insert(name);
    }
    for name in ["DB_CA_CERT", "PG.HOST", "PG.PASSWORD", "RUST_LOG"] {
        assert!(
            listed.contains(name),
            "README.md: {name} is not in the table of settings: add it"
        );
    }
    let ours = KEYWORDS.map(|(keyword, _)| format!("PG.{}", keyword.to_uppercase()));
    let known = |name: &String| ours.contains(name) || name == "DB_CA_CERT" || name == "RUST_LOG";
    let unknown: Vec<_> = listed.iter().filter(|name| !known(name)).collect();
    assert!(
        unknown.is_empty(),
        "README.md: the program has no settings {unknown:?}: take them out of the table"
    );
}

/// How the page writes a time.
fn time(code: &str) -> String {
    let factors = |unit: &str| {
        let code = code.strip_prefix(&format!("Duration::from_{unit}("))?;
        let factors = code.strip_suffix(')')?.split(" * ");
        Some(
            factors
                .map(|factor| factor.parse::<f64>().unwrap())
                .product::<f64>(),
        )
    };
    match (factors("secs"), factors("millis")) {
        (Some(secs), _) if secs >= 60.0 => format!("{} min", secs / 60.0),
        (Some(secs), _) => format!("{secs} s"),
        (_, Some(millis)) => format!("{} s", millis / 1000.0),
        _ => code.to_owned(),
    }
}

#[test]
fn the_tables_of_the_service_have_its_limits_and_what_it_shows() {
    let code = example();
    let limits = Regex::new(r"(?m)^const (\w+): (?:usize|Duration) = (.+);").unwrap();
    let limits = limits.captures_iter(&code).map(|found| found.extract().1);
    let mut limits: BTreeMap<_, _> = limits
        .map(|[name, value]| (name.to_owned(), time(value)))
        .collect();
    // As PostgreSQL is told them.
    let options = Regex::new(r"-c (\w+)=(\d+)(m?s)").unwrap();
    for (_, [name, value, unit]) in options.captures_iter(&code).map(|found| found.extract()) {
        let value: f64 = value.parse().unwrap();
        let seconds = if unit == "ms" { value / 1000.0 } else { value };
        limits.insert(name.to_owned(), format!("{seconds} s"));
    }
    let pause = limits.remove("RETRY_DELAY");
    let pause = format!(
        "the service pauses for {}",
        pause.expect("RETRY_DELAY in the service")
    );
    assert!(
        page("examples/README.md").contains(&pause),
        "examples/README.md: no {pause:?}: correct the page, or the test"
    );
    for Row { place, cells } in table("examples/README.md", "Limits") {
        if let Some(limit) = limits.remove(quoted(&cells[0]).first().copied().unwrap_or_default()) {
            assert_eq!(limit, cells[1], "{place}: write the limit of the service");
        }
    }
    assert!(
        limits.is_empty(),
        "examples/README.md: no row for {limits:?} under \"## Limits\": add one"
    );

    let shown = between(&code, "const SHOWN: [&str; 6] = [", "];");
    let shown: BTreeSet<_> = shown.split('"').skip(1).step_by(2).collect();
    let Row { place, cells } = table("examples/README.md", "Try it").remove(0);
    let listed = BTreeSet::from_iter(quoted(&cells[1]));
    assert_eq!(shown, listed, "{place}: list what the service shows");
}

/// Servers with certificates that are not like those of RDS, as people make them with openssl: one of
/// X.509 v1, and one that is its own authority.
fn not_rds() -> [LocalRds; 2] {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let mut own = CertificateParams::new([ENDPOINT.to_owned()]).unwrap();
    own.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let own = own.self_signed(&key).unwrap();

    // rcgen makes v3 only. In v1 there is neither a version nor an extension.
    let mut v1 = Certificate::from_der(own.der()).unwrap();
    v1.tbs_certificate.version = Version::V1;
    v1.tbs_certificate.extensions = None;
    let signature = key.sign(&v1.tbs_certificate.to_der().unwrap()).unwrap();
    v1.signature = BitString::from_bytes(&signature).unwrap();

    [v1.to_pem(LineEnding::LF).unwrap(), own.pem()].map(|leaf| {
        let certificate = ServerCertificate {
            leaf,
            subordinate: String::new(),
            key: key.serialize_pem(),
        };
        let builder = LocalRds::builder().certificate(&certificate, &own.pem());
        builder.start().unwrap()
    })
}

/// The log-in at a server that asks PAM about its users, as RDS does about those with IAM tokens. None if PostgreSQL
/// is built without PAM.
fn pam() -> Option<Run> {
    let iam = [("PG.USER", IAM_USER), ("PG.PASSWORD", &RDS.iam_token())];
    let hba = file(format!(
        "local all all trust\nhostssl all {IAM_USER} 127.0.0.1/32 pam\n"
    ));
    fs::set_permissions(&hba, fs::Permissions::from_mode(0o644)).unwrap();
    let builder = builder().setting("hba_file", hba.to_str().unwrap());
    match builder.start() {
        Err(error) if error.to_string().contains("\"pam\": not supported") => {
            eprintln!("this PostgreSQL is built without PAM: its refusal is not tested");
            None
        }
        rds => Some(demo(&with(&rds.unwrap(), &iam))),
    }
}

/// The program without `PG.USER` where the system has no name for its user: in an `/etc` with nothing in it, as a container
/// may have, and as a user whose number is in no line of `/etc/passwd`. None if the system does not let it have its own
/// users and mounts.
fn without_a_name() -> Option<[Run; 2]> {
    // sh drops variables with a dot in their name.
    let vars = with(&RDS, &[("PG.USER", UNSET)]);
    let vars = vars.into_iter().map(|(name, value)| {
        let name = name.to_str().unwrap().replace("PG.", "PG__");
        (name, value)
    });
    let vars: Vec<_> = vars.collect();
    let unshare = |args: &[&str], program: &str| {
        let mut unshare = Command::new("unshare");
        unshare.arg("--user").args(args).arg(program);
        unshare.env_clear().env("PATH", std::env::var_os("PATH")?);
        let output = unshare.envs(vars.iter().cloned()).output().ok()?;
        Some(Run {
            code: output.status.code(),
            output: String::from_utf8(output.stderr).unwrap(),
        })
    };
    let mount = "mount -t tmpfs none /etc && exec \"$@\"";
    let empty = ["--map-root-user", "--mount", "sh", "-c", mount, "sh"];
    let unknown = ["--map-user=54321"];
    let runs = [&empty[..], &unknown].map(|args| {
        let may = unshare(args, "true").is_some_and(|run| run.code == Some(0));
        may.then(|| unshare(args, PROGRAM)).flatten()
    });
    let [Some(empty), Some(unknown)] = runs else {
        eprintln!("no users of our own, with `unshare`: a user without a name is not tested");
        return None;
    };
    Some([empty, unknown])
}

/// The errors that not every system can provoke, with the runs that end in them, if this one can.
fn not_everywhere() -> [(&'static str, Option<Run>); 3] {
    let pam = ("PAM authentication failed for user", pam());
    let (empty, unknown) = without_a_name().map(<(_, _)>::from).unzip();
    let empty = (
        "communicating with the server … No such file or directory",
        empty,
    );
    [pam, empty, ("Null record", unknown)]
}

/// A pooler that refuses each log-in with these words, and the variables that lead to it.
fn pooler(words: &'static str) -> (Fake, TempPath) {
    let (acceptor, roots) = own_tls();
    let pooler = Fake::new(move |wire| {
        let acceptor = acceptor.clone();
        async move {
            let mut wire = tls(wire, &acceptor).await?;
            startup(&mut wire).await?;
            let says = format!("SFATAL\0C08P01\0M{words}\0\0");
            wire.write_all(b"E").await?;
            wire.write_u32(says.len() as u32 + 4).await?;
            wire.write_all(says.as_bytes()).await?;
            wire.flush().await?;
            silence(wire).await
        }
    });
    (pooler, roots)
}

fn at_pooler((fake, roots): &(Fake, TempPath)) -> Vec<Var> {
    let port = fake.port.to_string();
    let roots = roots.to_str().unwrap();
    with(&RDS, &[("PG.PORT", &port), ("DB_CA_CERT", roots)])
}

/// The words of RDS Proxy, as AWS documents them, and of PgBouncer 1.18, of which there are none here.
const PROXY_TOKEN: &str = "The IAM authentication failed for the role postgres. Check the IAM \
    token for this role and try again.";
const PROXY_PASSWORD: &str = "The password that was provided for the role postgres is wrong.";
const PROXY_OPTIONS: &str =
    "Feature not supported: RDS Proxy currently doesn't support command-line options.";
const PGBOUNCER_OPTIONS: &str = "unsupported startup parameter: options";

/// Runs that end in the errors of the table, by the words that it knows them by.
fn provoked() -> BTreeMap<&'static str, Run> {
    let of = |change: &[(&str, &str)]| demo(&with(&RDS, change));
    let at = |port: u16, change: &[(&str, &str)]| {
        let limit = [("PG.CONNECT_TIMEOUT", "1")];
        at(port, &RDS, &[&limit, change].concat())
    };
    let (hole, ..) = &black_hole();
    let silent = Fake::new(silence);
    let no_tls = only_says(b"N");
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let yesterday = time::OffsetDateTime::now_utc() - time::Duration::DAY;
    let expired = authority.issue(ENDPOINT, |leaf| leaf.not_after = yesterday);
    let expired = expired.unwrap();
    let expired = LocalRds::builder().certificate(&expired, authority.root());
    let expired = expired.start().unwrap();
    // As with hybrid groups alone, the two have none in common.
    let other_group = builder().setting("ssl_ecdh_curve", "secp521r1");
    let other_group = other_group.setting("ssl_min_protocol_version", "TLSv1.3");
    let other_group = other_group.start().unwrap();
    let iam = [("PG.USER", IAM_USER), ("PG.PASSWORD", &RDS.iam_token())];
    let [v1, own] = not_rds().map(|rds| demo(&with(&rds, &[])));
    let killed = builder().start().unwrap();
    let killed = while_the_query_runs(&killed, "5", |_, pid| kill(Signal::KILL, pid));
    let locked = while_the_query_runs(&LOCKED.lock().unwrap(), "1", |_, _| {});
    // What a client has sent and no one has read, when a socket is closed, makes TCP say so.
    let resets = Fake::new(|wire| async move {
        wire.into_inner().peek(&mut [0]).await?;
        Ok(())
    });
    let [proxy_token, proxy_password] =
        [PROXY_TOKEN, PROXY_PASSWORD].map(|words| demo(&at_pooler(&pooler(words))));
    // As one that does not know direct TLS.
    let closes = Fake::new(|mut wire| async move {
        assert_ne!(wire.read(&mut [0; 1024]).await?, 0);
        Ok(())
    });
    BTreeMap::from([
        ("connection timed out", at(*hole, &[])),
        (
            "tls handshake eof",
            at(closes.port, &[("PG.SSLNEGOTIATION", "direct")]),
        ),
        ("password missing", of(&[("PG.PASSWORD", UNSET)])),
        ("no hostname provided", of(&[("PG.HOST", UNSET)])),
        ("number of hosts", of(&[("PG.HOST", "a,b")])),
        (
            "without DB_CA_CERT, PG.SSLMODE must be disable",
            of(&[("DB_CA_CERT", UNSET), ("PG.SSLMODE", "verify-full")]),
        ),
        ("connection closed", killed),
        ("Connection reset by peer", at(resets.port, &[])),
        ("connecting to … no answer within", at(silent.port, &[])),
        ("querying … no answer within", locked),
        ("The IAM authentication failed for the role", proxy_token),
        (
            "The password that was provided for the role",
            proxy_password,
        ),
        (
            "failed to lookup address information",
            of(&[("PG.HOST", "gone.invalid:5432"), ("PG.HOSTADDR", UNSET)]),
        ),
        ("Connection refused", at(1, &[])),
        ("PG.HOST, which is not set", demo(&[])),
        ("unknown option", of(&[("PG.PASWORD", "x")])),
        ("set the same option", of(&[("PG__USER", "x")])),
        ("is empty", demo(&vars([("PG.HOST", "")]))),
        (
            "database \"…\" does not exist",
            of(&[("PG.DBNAME", "nothing")]),
        ),
        ("HandshakeFailure", demo(&with(&other_group, &[]))),
        ("invalid value for option", of(&[("PG.PORT", "x")])),
        (
            "no pg_hba.conf entry … no encryption",
            of(&[("DB_CA_CERT", UNSET)]),
        ),
        (
            "root certificates … DB_CA_CERT",
            of(&[("DB_CA_CERT", "/nonexistent")]),
        ),
        (
            "UnknownIssuer",
            of(&[("DB_CA_CERT", "ca-certificates/global-bundle.pem")]),
        ),
        (
            "certificate not valid for name",
            of(&[("PG.HOST", "db.example.com")]),
        ),
        (
            "invalid dns name",
            of(&[("PG.HOST", "database-1.example:5432")]),
        ),
        ("certificate expired", demo(&with(&expired, &[]))),
        ("UnsupportedCertVersion", v1),
        ("CaUsedAsEndEntity", own),
        ("server does not support TLS", at(no_tls.port, &[])),
        (
            "password authentication failed",
            of(&[("PG.PASSWORD", "not the password")]),
        ),
        (
            "server did not use channel binding",
            of(&[iam.as_slice(), &[("PG.CHANNEL_BINDING", "require")]].concat()),
        ),
        (
            "database does not allow writes",
            of(&[
                ("PG.TARGET_SESSION_ATTRS", "read-write"),
                ("PG.OPTIONS", "-c default_transaction_read_only=on"),
            ]),
        ),
    ])
}

/// The logs of services that do not start, with errors of their own table.
fn services_that_do_not_start() -> BTreeMap<&'static str, String> {
    let ends = |vars: &[Var]| run_of(&SERVICE, vars).output;
    let silent = Fake::new(silence).port.to_string();
    let silent = [("PG.PORT", &*silent), ("PG.CONNECT_TIMEOUT", "1")];
    let (full, _sessions) = full();
    let limited = builder().start().unwrap();
    let limit = "ALTER ROLE postgres CONNECTION LIMIT 0";
    admin(&limited).batch_execute(limit).unwrap();
    let no_file = [("PASSWORD_FILE", "/nonexistent")];
    let read_only = [
        ("PG.TARGET_SESSION_ATTRS", "read-write"),
        ("PG.OPTIONS", "-c default_transaction_read_only=on"),
    ];
    let (stopping, _session) = shutting_down();
    BTreeMap::from([
        (
            "Timeout occurred while creating a new object",
            ends(&with(&RDS, &silent)),
        ),
        (
            "remaining connection slots are reserved",
            ends(&with(&full, &[])),
        ),
        ("too many connections for role", ends(&with(&limited, &[]))),
        ("the database system is starting up", while_it_starts(ends)),
        (
            "the database system is shutting down",
            ends(&with(&stopping, &[])),
        ),
        (
            "database does not allow writes",
            ends(&with(&RDS, &read_only)),
        ),
        (
            "listening on LISTEN",
            ends(&with(&RDS, &[("LISTEN", "3000")])),
        ),
        ("getting a password for", ends(&with(&RDS, &no_file))),
        (
            "unsupported startup parameter",
            ends(&at_pooler(&pooler(PGBOUNCER_OPTIONS))),
        ),
        (
            "doesn't support command-line options",
            ends(&at_pooler(&pooler(PROXY_OPTIONS))),
        ),
    ])
}

/// The logs of services that run, with the others.
fn services_that_run() -> BTreeMap<&'static str, String> {
    let log = log_of_a_bad_day();
    let words = [
        "Timeout occurred while waiting for a slot",
        "no answer within",
        "cached plan must not change result type",
        "canceling statement due to statement timeout",
        "terminating connection due to administrator command",
        "Connection could not be recycled",
    ];
    let mut logs: BTreeMap<_, _> = words.map(|words| (words, log.clone())).into();
    logs.insert("read-only transaction", log_of_one_on_a_standby());
    logs.insert(
        "idle-in-transaction timeout",
        log_of_one_with_an_open_transaction(),
    );
    let log = log_of_one_whose_sessions_are_killed();
    for words in [
        "connection closed",
        "Connection reset by peer",
        "peer closed connection without sending TLS close_notify",
    ] {
        logs.insert(words, log.clone());
    }
    logs.insert("Too many open files", log_of_one_with_few_files());
    logs
}

fn log_of_one_on_a_standby() -> String {
    let primary = builder().start().unwrap();
    make_tables(&primary);
    let standby = primary.standby().unwrap();
    let service = Service::new(&COPY, &with(&standby, &[]));
    let insert = "INSERT INTO half_way VALUES (1) RETURNING i::text";
    assert_eq!(service.sql("typed", 4000, insert), Err(500));
    eventually("it is logged", || service.log().contains("read-only"));
    service.log()
}

fn log_of_one_whose_sessions_are_killed() -> String {
    let rds = builder().start().unwrap();
    let service = Service::new(&COPY, &with(&rds, &[]));
    // All sessions end with one that is killed, and the server starts anew.
    let is_killed_when = |first: Signal, asked: &dyn Fn()| {
        service.works(1);
        let sessions = sessions(&rds).into_iter();
        let sessions: Vec<_> = sessions.filter_map(Pid::from_raw).collect();
        let all = |signal| {
            for session in &sessions {
                _ = kill_process(*session, signal);
            }
        };
        all(first);
        scope(|scope| {
            let sleeps = || service.sql("typed", 10_000, "SELECT pg_sleep(60)::text");
            let request = scope.spawn(sleeps);
            asked();
            all(Signal::KILL);
            request.join().unwrap().unwrap_err();
        });
        service.failures();
    };
    // The server's process runs the query.
    is_killed_when(Signal::CONT, &|| {
        let waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        eventually("the query runs", || {
            !admin(&rds).query(waiting, &[]).unwrap().is_empty()
        });
    });
    // It is frozen, and has not read the query, if that was sent within the time.
    for _ in 0..10 {
        is_killed_when(Signal::STOP, &|| sleep(Duration::from_millis(500)));
        if service.log().contains("Connection reset by peer") {
            break;
        }
    }
    service.log()
}

#[test]
fn their_tables_of_errors_have_the_words_of_errors_that_happen() {
    // At the same time, as they wait for most of it.
    let (mut provoked, not_everywhere, logged) = scope(|scope| {
        let not_everywhere = scope.spawn(not_everywhere);
        let logged = [services_that_do_not_start, services_that_run].map(|log| scope.spawn(log));
        let provoked = provoked();
        let logged = logged.map(|log| log.join().unwrap());
        (provoked, not_everywhere.join().unwrap(), logged)
    });
    let mut not_provoked = BTreeSet::new();
    for (words, run) in not_everywhere {
        match run {
            Some(run) => _ = provoked.insert(words, run),
            None => _ = not_provoked.insert(words),
        }
    }
    let mut logged: BTreeMap<_, _> = logged.into_iter().flatten().collect();
    for (cell, places) in errors("README.md") {
        let key = key(&cell);
        if not_provoked.contains(&*key) {
            continue;
        }
        let place = places.join(", ");
        let run = provoked.remove(&*key).unwrap_or_else(|| {
            panic!("{place}: {key:?} is not provoked: add a run that does to `provoked`")
        });
        for word in words(&cell) {
            assert!(
                run.code == Some(1) && run.error().contains(word),
                "{place}: no {word:?} in the error that is provoked: correct the row\n{}",
                run.output
            );
        }
    }
    let missing = provoked.keys();
    assert!(
        provoked.is_empty(),
        "README.md: these errors are provoked, but have no row in the table: {missing:?}"
    );

    for (cell, places) in errors("examples/README.md") {
        let (key, place) = (key(&cell), places.join(", "));
        let log = logged.remove(&*key).unwrap_or_else(|| {
            panic!("{place}: {key:?} is not logged: add a service that does to `services_that_run`")
        });
        for word in words(&cell) {
            assert!(
                log.contains(word),
                "{place}: no {word:?} in the log that is provoked: correct the row\n{log}"
            );
        }
    }
    let missing = logged.keys();
    assert!(
        logged.is_empty(),
        "examples/README.md: these errors are logged, but have no row in the table: {missing:?}"
    );
}
