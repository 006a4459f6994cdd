//! Runs the program as a process, and checks what must hold for every run.

pub mod fake;
pub mod page;
pub mod service;
pub mod world;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use local_rds::{Authority, Builder, ENDPOINT, KeyType, LocalRds, ServerCertificate};
use postgres::Client;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{NamedTempFile, TempPath};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_tokio-postgres-rustls-rds-demo");

/// Every keyword, with a value that the program accepts.
pub const KEYWORDS: [(&str, &str); 19] = [
    ("user", "u"),
    ("password", "p"),
    ("dbname", "d"),
    ("options", "-c geqo=off"),
    ("application_name", "a"),
    ("sslmode", "disable"),
    ("sslnegotiation", "postgres"),
    ("host", "localhost"),
    ("hostaddr", "127.0.0.1"),
    ("port", "1"),
    ("connect_timeout", "2"),
    ("tcp_user_timeout", "3"),
    ("keepalives", "0"),
    ("keepalives_idle", "4"),
    ("keepalives_interval", "5"),
    ("keepalives_retries", "6"),
    ("target_session_attrs", "read-write"),
    ("channel_binding", "disable"),
    ("load_balance_hosts", "random"),
];

/// An instance with the defaults of PostgreSQL 15 and later, for all tests that do not change the instance.
pub static RDS: LazyLock<LocalRds> = LazyLock::new(|| builder().force_ssl(true).start().unwrap());

/// An instance that does not force TLS, and logs who connects.
pub static PLAIN: LazyLock<LocalRds> = LazyLock::new(|| {
    let builder = builder().force_ssl(false);
    builder.setting("log_connections", "on").start().unwrap()
});

/// An instance with TLS 1.2 at most, as RDS has it before PostgreSQL 16.
pub static TLS_1_2: LazyLock<LocalRds> = LazyLock::new(|| {
    let builder = builder().setting("ssl_max_protocol_version", "TLSv1.2");
    builder.start().unwrap()
});

/// An instance for queries that wait for a lock. All other queries on it wait as well, so one test at a time has it.
pub static LOCKED: LazyLock<Mutex<LocalRds>> = LazyLock::new(|| builder().start().unwrap().into());

/// The options of an instance. All instances have the same certificate, because making RSA keys takes long.
pub fn builder() -> Builder {
    static CERTIFICATE: LazyLock<(ServerCertificate, String)> = LazyLock::new(|| {
        let authority = Authority::new(KeyType::Rsa2048).unwrap();
        let certificate = authority.issue(ENDPOINT, |_| {}).unwrap();
        (certificate, authority.root().to_owned())
    });
    LocalRds::builder().certificate(&CERTIFICATE.0, &CERTIFICATE.1)
}

/// A variable and its value. In a list, a later variable replaces an earlier one with the same name.
pub type Var = (OsString, OsString);

/// A list of variables.
pub fn vars<N: AsRef<OsStr>, V: AsRef<OsStr>>(all: impl IntoIterator<Item = (N, V)>) -> Vec<Var> {
    all.into_iter()
        .map(|(n, v)| (n.as_ref().to_owned(), v.as_ref().to_owned()))
        .collect()
}

/// As the value of a variable in a change: the variable is not set. No real value has a NUL. An empty value is a value,
/// which the program refuses.
pub const UNSET: &str = "\0unset";

/// The variables of `rds`, with `change` on top.
pub fn with(rds: &LocalRds, change: &[(&str, &str)]) -> Vec<Var> {
    changed(vars(rds.env()), change)
}

/// The variables in `all`, with `change` on top, which may say [`UNSET`].
pub fn changed(mut all: Vec<Var>, change: &[(&str, &str)]) -> Vec<Var> {
    all.retain(|(name, _)| change.iter().all(|(other, _)| name != other));
    all.extend(vars(
        change.iter().filter(|(_, value)| *value != UNSET).copied(),
    ));
    all
}

/// A file with this content. Dropping the path deletes the file.
pub fn file(content: impl AsRef<[u8]>) -> TempPath {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(&file, content).unwrap();
    file.into_temp_path()
}

/// How a run of the program ended.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub output: String,
}

/// Runs the program with these variables and no others. `RUST_LOG` is `trace` unless the variables set it. The program
/// must end by itself, must not panic, and must not print the password.
pub fn demo(vars: &[Var]) -> Run {
    run_of(PROGRAM.as_ref(), vars)
}

/// Runs another program, as [`demo`] runs ours.
pub fn run_of(program: &Path, vars: &[Var]) -> Run {
    let output = assert_cmd::Command::new(program)
        .env_clear()
        .env("RUST_LOG", "trace")
        .envs(vars.iter().cloned())
        .timeout(Duration::from_secs(120))
        .output()
        .unwrap();
    assert!(output.stdout.is_empty(), "{output:?}");
    let run = Run {
        code: output.status.code(),
        output: String::from_utf8(output.stderr).unwrap(),
    };
    assert!(run.code.is_some(), "ended by a signal: {run:?}");
    assert!(!run.output.contains("panicked"), "{}", run.output);
    for (name, value) in vars {
        if name.to_string_lossy().to_lowercase().contains("pass") && value.len() > 4 {
            let bytes = format!("{:?}", value.as_encoded_bytes());
            for secret in [&value.to_string_lossy(), bytes.trim_matches(['[', ']'])] {
                assert!(
                    !run.output.contains(secret),
                    "it tells the password:\n{}",
                    run.output
                );
            }
        }
    }
    run
}

/// Runs the program with the variables of `rds`, with another port and with `change` on top.
pub fn at(port: u16, rds: &LocalRds, change: &[(&str, &str)]) -> Run {
    demo(&changed(at_port(port, rds), change))
}

/// The variables of `rds`, with another port.
pub fn at_port(port: u16, rds: &LocalRds) -> Vec<Var> {
    with(rds, &[("PG.PORT", &port.to_string())])
}

/// The variables for two hosts: first the one with this name and port on 127.0.0.1, then [`RDS`].
pub fn then_the_good_one(name: &str, port: u16, limit: &str) -> Vec<Var> {
    let good = RDS.port();
    with(
        &RDS,
        &[
            ("PG.HOST", &format!("{name},{ENDPOINT}")),
            ("PG.HOSTADDR", "127.0.0.1,127.0.0.1"),
            ("PG.PORT", &format!("{port},{good}")),
            ("PG.CONNECT_TIMEOUT", limit),
        ],
    )
}

/// How the superuser connects, over the Unix socket.
pub fn admin_config(rds: &LocalRds) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    config.host_path(rds.socket()).port(rds.port());
    config.user("rdsadmin").dbname("postgres");
    config
}

/// A session of the superuser.
pub fn admin(rds: &LocalRds) -> Client {
    let config = postgres::Config::from(admin_config(rds));
    config.connect(postgres::NoTls).unwrap()
}

/// Waits until the condition is true, and no longer than a minute.
#[track_caller]
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "still not: {what}"
        );
        sleep(Duration::from_millis(20));
    }
}

/// Sends a signal to a process of a server.
pub fn kill(signal: Signal, pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// A server with no free connection, until one of these sessions is closed.
pub fn full() -> (LocalRds, [Client; 2]) {
    let rds = builder()
        .setting("max_connections", "4")
        .setting("superuser_reserved_connections", "2")
        .setting("max_wal_senders", "0")
        .start()
        .unwrap();
    let sessions = [admin(&rds), admin(&rds)];
    (rds, sessions)
}

/// A server that is shutting down: it accepts no connection, and ends when this session is closed.
pub fn shutting_down() -> (LocalRds, Client) {
    let rds = builder().start().unwrap();
    let session = admin(&rds);
    let pid = std::fs::read_to_string(rds.socket().join("postmaster.pid")).unwrap();
    kill(Signal::TERM, pid.lines().next().unwrap().parse().unwrap());
    eventually("it is shutting down", || {
        rds.log().unwrap().contains("smart shutdown")
    });
    (rds, session)
}

/// Makes a server wait, the next time it starts, until the returned file is deleted.
pub fn waits_for_more_to_recover(rds: &LocalRds) -> PathBuf {
    let [waits, standby] = ["waits", "standby.signal"].map(|name| rds.socket().join(name));
    // A standby runs this command to get more to recover.
    let command = format!(
        "while test -e \"{}\"; do sleep 0.1; done; false",
        waits.display()
    );
    let sql = format!("ALTER SYSTEM SET restore_command = '{command}'");
    admin(rds).batch_execute(&sql).unwrap();
    for file in [&waits, &standby] {
        std::fs::write(file, "").unwrap();
    }
    waits
}

/// Calls `done` with the variables of a server while that server is starting up.
pub fn while_it_starts<R>(done: impl FnOnce(&[Var]) -> R) -> R {
    let mut rds = builder().start().unwrap();
    let vars = with(&rds, &[]);
    let log = rds.socket().with_file_name("log");
    let waits = waits_for_more_to_recover(&rds);
    std::thread::scope(|scope| {
        let restart = scope.spawn(|| rds.restart());
        eventually("it starts", || {
            let log = std::fs::read_to_string(&log).unwrap();
            log.matches("database system was shut down at").count() == 2
        });
        let result = done(&vars);
        std::fs::remove_file(waits).unwrap();
        restart.join().unwrap().unwrap();
        result
    })
}

/// Runs the program until its query waits for a lock. Then calls `done` with a session of the superuser and the server
/// process that runs the query, and returns how the run ended.
pub fn while_the_query_runs(
    rds: &LocalRds,
    limit: &str,
    done: impl FnOnce(&mut Client, i32),
) -> Run {
    let view = "information_schema.information_schema_catalog_name";
    let mut lock = admin(rds);
    lock.batch_execute(&format!(
        "BEGIN; LOCK TABLE {view} IN ACCESS EXCLUSIVE MODE"
    ))
    .unwrap();
    let vars = with(
        rds,
        &[
            ("PG.CONNECT_TIMEOUT", limit),
            ("PG.APPLICATION_NAME", "waits"),
        ],
    );
    let run = std::thread::spawn(move || demo(&vars));
    let mut admin = admin(rds);
    let waiting = "SELECT pid FROM pg_stat_activity
        WHERE application_name = 'waits' AND wait_event_type = 'Lock'";
    let pid = loop {
        if let Some(row) = admin.query_opt(waiting, &[]).unwrap() {
            break row.get(0);
        }
        assert!(!run.is_finished(), "{:?}", run.join());
    };
    done(&mut admin, pid);
    run.join().unwrap()
}

/// Has the server end a session.
pub fn terminate(admin: &mut Client, pid: i32) {
    admin
        .query("SELECT pg_terminate_backend($1)", &[&pid])
        .unwrap();
}

impl Run {
    /// Asserts that the program has connected and logged the answer.
    #[track_caller]
    pub fn succeeded(&self) {
        assert_eq!(self.code, Some(0), "{}", self.output);
        assert!(
            self.output.contains("catalog_name: \"postgres\""),
            "{}",
            self.output
        );
    }

    /// Asserts that the program has failed, and that all of these words are in its error.
    #[track_caller]
    pub fn failed(&self, words: &[&str]) {
        assert_eq!(self.code, Some(1), "{}", self.output);
        for word in words {
            assert!(
                self.error().contains(word),
                "no {word:?} in:\n{}",
                self.output
            );
        }
    }

    /// The error, without the log before it.
    #[track_caller]
    pub fn error(&self) -> &str {
        let start = self.output.find("Error: ");
        &self.output[start.unwrap_or_else(|| panic!("no error in:\n{}", self.output))..]
    }
}
