//! `examples/service.rs` keeps its promises: as it is, and as a copy in a project of its own, to which a handler is added.
//!
//! | the service meets                             | and then                                                  |
//! |-----------------------------------------------|-----------------------------------------------------------|
//! | a wrong setting at the start                  | it ends, with the reason                                  |
//! | 3 and 25 times the requests that it carries   | it answers as many as before, and refuses the rest        |
//! | callers that hang up, limits that are short   | never more sessions than clients of the pool              |
//! | queries past their limit, cancelled requests  | the next requests work; no session is left on the server  |
//! | frozen, terminated, restarted servers         | at most one request fails for each client of the pool     |
//! | an outage                                     | the log has the status, the host and the cause            |
//! | a failover, a migration                       | the pool finds the new writer; a client fails once        |
//! | errors of queries, transactions left half-way | the session goes on to serve, as good as new              |
//! | SIGTERM, SIGINT                               | running requests are answered, and it ends                |

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::{scope, sleep, spawn};
use std::time::{Duration, Instant};

use crate::failover::hosts;
use crate::support::fake::{
    CLEARTEXT_PASSWORD, Fake, black_hole, message, own_tls, silence, startup, tls,
};
use crate::support::page::{
    MORE_LOCKED, between, build, example, manifest, new_project, program, replaced, section, take,
    target,
};
use crate::support::{
    RDS, Var, admin, at_port, builder, changed, eventually, file, kill, run_of, terminate,
    then_the_good_one, with,
};
use local_rds::{ENDPOINT, LocalRds, Relay};
use rustix::process::Signal;
use tokio::io::AsyncWriteExt;

/// The size of its pool.
const SIZE: usize = 4;

/// The example as it is.
pub static SERVICE: LazyLock<PathBuf> = LazyLock::new(|| {
    // As the tests are built, so that nothing is built twice.
    let built = Command::new(env!("CARGO"))
        .args(["build", "-q", "--workspace", "--example", "service"])
        .env_clear()
        .envs(crate::support::page::environment())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{errors}");
    target().join("debug/examples/service")
});

/// What people add: a handler that runs any query, in the form that it is asked for.
const HANDLER: &str = r#"
async fn sql(
    State(database): State<Database>,
    extract::Path((form, limit)): extract::Path<(String, u64)>,
    sql: String,
) -> Result<String, Error> {
    let queries = async |client: &mut Client| {
        let row = match form.as_str() {
            "query" => client.query_one(&sql, &[]).await?,
            "cached" => {
                let statement = client.prepare_cached(&sql).await?;
                client.query_one(&statement, &[]).await?
            }
            // A transaction that is left half-way if the query fails.
            "transaction" => {
                let transaction = client.transaction().await?;
                let one = 1;
                transaction.execute("INSERT INTO half_way VALUES ($1)", &[&one]).await?;
                let row = transaction.query_one(&sql, &[]).await?;
                transaction.commit().await?;
                row
            }
            // What the contract forbids, and people do.
            "begin" => {
                client.batch_execute("BEGIN; INSERT INTO half_way VALUES (1)").await?;
                client.query_typed_one(&sql, &[]).await?
            }
            "begin, then an error of ours" => {
                client.batch_execute("BEGIN; INSERT INTO half_way VALUES (1)").await?;
                return Err(Error::NotFound);
            }
            "join" => {
                let slow = "SELECT pg_sleep(600)";
                tokio::try_join!(client.query_typed_one(&sql, &[]), client.query_typed_one(slow, &[]))?.0
            }
            _ => client.query_typed_one(&sql, &[]).await?,
        };
        Ok(row.try_get(0)?)
    };
    database.run(Duration::from_millis(limit), queries).await
}
"#;

/// The service as the README says to take it, with that handler.
static COPY: LazyLock<PathBuf> = LazyLock::new(|| {
    let route = r#".route("/settings/{name}", get(setting))"#;
    let more = format!("{route}\n.route(\"/sql/{{form}}/{{limit}}\", axum::routing::post(sql))");
    let code = replaced(&example(), route, &more) + HANDLER;
    new_project("service-copy", &code, dependencies())
});

/// The dependencies that the README adds.
fn dependencies() -> &'static str {
    static LINES: LazyLock<String> = LazyLock::new(|| {
        let section = section("Take it into your project");
        between(&section, "```toml\n", "```").to_owned()
    });
    &LINES
}

/// A service that runs, until this is dropped.
struct Service {
    process: Child,
    address: String,
    log: Arc<Mutex<String>>,
}

fn start(program: &Path, vars: &[Var]) -> Child {
    let mut command = Command::new(program);
    command.env_clear().env("LISTEN", "127.0.0.1:0");
    command.envs(vars.iter().cloned()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

impl Service {
    fn new(program: &Path, vars: &[Var]) -> Self {
        let process = start(program, vars);
        let log = Arc::new(Mutex::new(String::new()));
        let mut service = Self {
            address: String::new(),
            log: Arc::clone(&log),
            process,
        };
        let lines = BufReader::new(service.process.stderr.take().unwrap()).lines();
        spawn(move || {
            for line in lines.map_while(Result::ok) {
                *log.lock().unwrap() += &(line + "\n");
            }
        });
        let listening = || service.log().contains("listening on http://");
        eventually("it listens", listening);
        service.address = between(&service.log(), "listening on http://", ",").to_owned();
        service
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The status and the body of an answer. No answer within the time: the caller has hung up.
    fn call(&self, path: &str, body: Option<&str>, time: Duration) -> Option<(u16, String)> {
        let url = format!("http://{}/{path}", self.address);
        let agent = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = agent.timeout_global(Some(time)).build().new_agent();
        let response = match body {
            Some(body) => agent.post(url).send(body),
            None => agent.get(url).call(),
        };
        let mut response = match response {
            Err(ureq::Error::Timeout(_)) => return None,
            response => response.unwrap_or_else(|error| panic!("{error}: {}", self.log())),
        };
        let body = response.body_mut().read_to_string().unwrap();
        Some((response.status().as_u16(), body))
    }

    /// The value of a parameter, or the status of the error.
    fn setting(&self, name: &str) -> Result<String, u16> {
        let answer = self.call(&format!("settings/{name}"), None, MINUTE);
        value(answer.expect("an answer within a minute"))
    }

    /// The answer to a query in one of the forms of [`HANDLER`]. It comes, whatever happens: so nothing hangs.
    fn sql(&self, form: &str, millis: u64, sql: &str) -> Result<String, u16> {
        let path = format!("sql/{}/{millis}", form.replace(' ', "%20"));
        value(
            self.call(&path, Some(sql), MINUTE)
                .expect("an answer within a minute"),
        )
    }

    /// So many requests after each other, each with an answer of its own.
    #[track_caller]
    fn works(&self, times: usize) {
        for nth in 0..times {
            let answer = self.sql("typed", 10_000, &format!("SELECT '{nth}'::text"));
            assert_eq!(answer, Ok(nth.to_string()), "{}", self.log());
        }
    }

    /// Requests until one works; returns how many have failed before.
    #[track_caller]
    fn failures(&self) -> usize {
        let mut failures = 0;
        while self.sql("typed", 1500, "SELECT 'works'::text").is_err() {
            failures += 1;
            assert!(failures < 100, "{}", self.log());
            // A server that restarts refuses at once.
            sleep(Duration::from_millis(50));
        }
        failures
    }

    /// As many requests at once as the pool has clients.
    fn at_once(&self, form: &str, millis: u64, sql: &str) -> Vec<Result<String, u16>> {
        scope(|scope| {
            let asked = [(); SIZE].map(|()| scope.spawn(|| self.sql(form, millis, sql)));
            asked.map(|asked| asked.join().unwrap()).to_vec()
        })
    }

    /// Opens all connections of the pool, by as many queries at once.
    fn fill(&self, rds: &LocalRds) {
        while sessions(rds).len() < SIZE {
            for answer in self.at_once("typed", 10_000, "SELECT pg_sleep(0.2)::text") {
                answer.unwrap();
            }
        }
    }

    /// Sends a signal, and waits for the end.
    fn end(&mut self, signal: Signal) -> ExitStatus {
        kill(signal, self.process.id() as i32);
        self.process.wait().unwrap()
    }
}

const MINUTE: Duration = Duration::from_secs(60);

fn value((status, body): (u16, String)) -> Result<String, u16> {
    match status {
        200 => Ok(body),
        // A caller is told no more.
        _ => {
            assert!(body.starts_with(&format!("{status} ")), "{body}");
            Err(status)
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let log = self.log();
        if !std::thread::panicking() {
            assert!(
                !log.contains("panicked") && !log.contains(local_rds::PASSWORD),
                "{log}"
            );
        }
    }
}

const SESSIONS: &str = "SELECT pid FROM pg_stat_activity
    WHERE usename = 'postgres' AND backend_type = 'client backend'";

/// The processes of the service's sessions on the server.
fn sessions(rds: &LocalRds) -> Vec<i32> {
    let rows = admin(rds).query(SESSIONS, &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

fn terminate_sessions(rds: &LocalRds) {
    let mut admin = admin(rds);
    for pid in sessions(rds) {
        terminate(&mut admin, pid);
    }
}

/// The most sessions that the server has at a time while this is done.
fn most_sessions(rds: &LocalRds, done: impl FnOnce()) -> usize {
    let over = AtomicBool::new(false);
    scope(|scope| {
        let most = scope.spawn(|| {
            let mut admin = admin(rds);
            let mut most = 0;
            while !over.load(Ordering::Relaxed) {
                most = most.max(admin.query(SESSIONS, &[]).unwrap().len());
                sleep(Duration::from_millis(2));
            }
            most
        });
        done();
        over.store(true, Ordering::Relaxed);
        most.join().unwrap()
    })
}

/// Counts answers and refusals of so many callers, each of which comes again as soon as it is answered.
fn callers(count: usize, time: Duration, call: impl Fn() -> bool + Sync) -> [usize; 2] {
    let [answered, refused] = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let start = Instant::now();
    scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                while start.elapsed() < time {
                    let counter = if call() { &answered } else { &refused };
                    if start.elapsed() < time {
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    [answered, refused].map(AtomicUsize::into_inner)
}

#[test]
fn as_it_is_it_starts_or_says_why_not() {
    let (hole, ..) = &black_hole();
    let silent = Fake::new(silence).port.to_string();
    let asking = format!("asking {ENDPOINT}:");
    let silent = [("PG.PORT", silent.as_str()), ("PG.CONNECT_TIMEOUT", "1")];
    scope(|scope| {
        for vars in [
            with(&RDS, &[]),
            then_the_good_one(ENDPOINT, 1, "1"),
            then_the_good_one(ENDPOINT, *hole, "1"),
            then_the_good_one(ENDPOINT, *hole, ""),
        ] {
            scope.spawn(move || {
                let service = Service::new(&SERVICE, &vars);
                assert_eq!(service.setting("max_connections"), Ok("100".to_owned()));
            });
        }
        for (change, words) in [
            (&[("PG.PORT", "1")][..], &["Connection refused"][..]),
            (&silent, &["Timeout", "creating"]),
            (
                &[("PG.USER", "nobody")],
                &["password authentication failed"],
            ),
            (
                &[("PG.PASSWORD", "not the password")],
                &["password authentication failed"],
            ),
            (
                &[("PG.DBNAME", "nothing")],
                &["database \"nothing\" does not exist"],
            ),
            (
                &[("DB_CA_CERT", "ca-certificates/global-bundle.pem")],
                &["invalid peer certificate: UnknownIssuer"],
            ),
        ] {
            let asking = &asking;
            scope.spawn(move || {
                let run = run_of(&SERVICE, &with(&RDS, change));
                run.failed(&[&[asking.as_str()], words].concat());
            });
        }
        for (name, value, words) in [
            (
                "PG.HOST",
                "db.example.com",
                "certificate not valid for name",
            ),
            (
                "DB_CA_CERT",
                "/nonexistent",
                "root certificates from /nonexistent",
            ),
            ("DB_CA_CERT", "", "DB_CA_CERT is not set"),
            (
                "PASSWORD_FILE",
                "hunter2",
                "reading the file of PASSWORD_FILE",
            ),
            ("LISTEN", "127.0.0.1:x", "listening on LISTEN, 127.0.0.1:x"),
            ("RUST_LOG", "info=x=y", "reading RUST_LOG"),
        ] {
            scope.spawn(move || run_of(&SERVICE, &with(&RDS, &[(name, value)])).failed(&[words]));
        }
    });
}

#[test]
fn as_it_is_it_answers_with_a_status_and_keeps_the_cause_for_the_log() {
    let rds = builder().start().unwrap();
    let service = Service::new(&SERVICE, &with(&rds, &[]));
    assert_eq!(service.setting("max_connections"), Ok("100".to_owned()));
    assert_eq!(service.setting("no_such_parameter"), Err(404));
    assert_eq!(service.setting("data_directory"), Err(500));
    let target = format!("{ENDPOINT}:{}", rds.port());
    let logged = |status: &str, cause: &str| {
        eventually(cause, || {
            let log = service.log();
            log.lines().any(|line| {
                [status, &target, cause]
                    .iter()
                    .all(|word| line.contains(word))
            })
        });
    };
    logged(
        "500 Internal Server Error",
        "querying: db error: ERROR: must be superuser",
    );
    assert!(!service.log().contains("404"), "{}", service.log());

    let frozen = sessions(&rds);
    frozen.iter().for_each(|pid| kill(Signal::STOP, *pid));
    assert_eq!(service.setting("max_connections"), Err(504));
    logged("504 Gateway Timeout", "no answer within 4s");
    frozen.iter().for_each(|pid| kill(Signal::CONT, *pid));

    drop(rds);
    // A session that ended with the server may still be taken for a living one, once each.
    for _ in 0..=SIZE {
        assert_eq!(service.setting("max_connections"), Err(503));
    }
    logged(
        "503 Service Unavailable",
        "no connection: Error occurred while creating a new object",
    );
    logged("503 Service Unavailable", "Connection refused");
}

#[test]
fn a_signal_lets_running_requests_finish_and_ends_it() {
    // Four round trips a second, so that a request takes long.
    let relay = Relay::new(RDS.port(), Duration::from_millis(250)).unwrap();
    let end = |signal| {
        let mut service = Service::new(&SERVICE, &at_port(relay.port(), &RDS));
        // A caller that keeps its connection open, and one that never asks.
        let mut idle = TcpStream::connect(&service.address).unwrap();
        let _silent = TcpStream::connect(&service.address).unwrap();
        idle.write_all(b"GET /settings/port HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        assert!(idle.read(&mut [0; 1024]).unwrap() > 0);
        let running = Running::start(&service, "max_connections");
        let status = service.end(signal);
        assert_eq!(
            (status.code(), status.signal()),
            (Some(0), None),
            "{}",
            service.log()
        );
        assert!(running.answer().ends_with("\r\n\r\n100"));
    };
    // So it ends at its start, while it waits for a server.
    let end_at_start = |signal| {
        let fake = Fake::new(silence);
        let limit = ("PG.CONNECT_TIMEOUT", "60");
        let vars = changed(at_port(fake.port, &RDS), &[limit]);
        let mut process = start(&SERVICE, &vars);
        eventually("it connects", || fake.has_a_client());
        kill(signal, process.id() as i32);
        assert_eq!(process.wait().unwrap().code(), Some(0));
    };
    scope(|scope| {
        for signal in [Signal::TERM, Signal::INT] {
            scope.spawn(move || end(signal));
            scope.spawn(move || end_at_start(signal));
        }
    });
}

/// A request that runs.
struct Running(TcpStream);

impl Running {
    fn start(service: &Service, name: &str) -> Self {
        let mut stream = TcpStream::connect(&service.address).unwrap();
        write!(stream, "GET /settings/{name} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        // It is on its way to the server, and the answer is not yet here.
        sleep(Duration::from_millis(100));
        Self(stream)
    }

    fn answer(mut self) -> String {
        let mut answer = String::new();
        self.0.read_to_string(&mut answer).unwrap();
        answer
    }
}

#[test]
fn offered_more_than_it_carries_it_answers_as_many_as_it_can() {
    let offer = |times: usize| {
        // With a round trip of 0.3 s, four clients carry 13 requests a second, whoever asks.
        let relay = Relay::new(RDS.port(), Duration::from_millis(300)).unwrap();
        let service = Service::new(&SERVICE, &at_port(relay.port(), &RDS));
        let ask = || {
            let answer = service.setting("max_connections");
            assert!(matches!(answer, Ok(_) | Err(503)), "{answer:?}");
            answer.is_ok()
        };
        // Opens all connections.
        callers(SIZE, Duration::from_secs(1), ask);
        let [carried, _] = callers(SIZE, Duration::from_secs(2), ask);
        // All of these callers come at once, and again as soon as they are answered.
        let [answered, refused] = callers(13 * times, Duration::from_secs(3), ask);
        let ratio = (answered as f64 / 3.0) / (carried as f64 / 2.0);
        assert!(
            ratio > 0.8,
            "{carried} answers in 2 s, then {answered} in 3 s; {refused} refused"
        );
        assert!(times == 3 || refused > 0);
        // And then it is as good as new.
        assert!(ask());
        assert_eq!(relay.round_trips().len(), SIZE, "no connection was lost");
        eventually("each refusal is in the log", || {
            service.log().matches("503 Service Unavailable").count() >= refused
        });
    };
    scope(|scope| [3, 25].map(|times| _ = scope.spawn(move || offer(times))));
}

#[test]
fn callers_that_hang_up_limits_that_are_short_and_overload_make_no_more_sessions_than_clients() {
    let rds = builder().start().unwrap();
    let service = Service::new(&COPY, &with(&rds, &[]));
    let slow = "SELECT pg_sleep(5)::text";
    let time = Duration::from_millis(1500);
    for (what, call) in [
        (
            "hang up",
            &(|| {
                let left = service.call("sql/typed/10000", Some(slow), Duration::from_millis(60));
                assert_eq!(left, None);
            }) as &(dyn Fn() + Sync),
        ),
        ("are late", &|| {
            _ = service.sql("typed", 100, slow).unwrap_err()
        }),
        ("are many", &|| {
            _ = service.sql("typed", 4000, "SELECT pg_sleep(0.2)::text")
        }),
    ] {
        let most = most_sessions(&rds, || {
            callers(50, time, || {
                call();
                true
            });
        });
        assert!(most <= SIZE, "{most} sessions when callers {what}");
        service.works(SIZE);
    }
    let log = rds.log().unwrap();
    assert!(!log.contains("remaining connection slots"), "{log}");
}

#[test]
fn queries_past_their_limit_are_cancelled() {
    let rds = builder().start().unwrap();
    let service = Service::new(&COPY, &with(&rds, &[]));
    for nth in 1..=2 {
        service.fill(&rds);
        let before = sessions(&rds);
        for answer in service.at_once("typed", 500, "SELECT pg_sleep(600)::text") {
            assert_eq!(answer, Err(504));
        }
        service.works(5);
        let cancelled = "canceling statement due to user request";
        eventually("each was cancelled", || {
            rds.log().unwrap().matches(cancelled).count() == nth * SIZE
        });
        // A cancel request that comes late would hit the next request in the same session.
        let after = sessions(&rds);
        assert!(after.len() <= SIZE && after.iter().all(|pid| !before.contains(pid)));
    }
    // The server also ends what takes too long while its client waits.
    let timeout = service.sql("typed", 5000, "SELECT current_setting('statement_timeout')");
    assert_eq!(timeout, Ok("1min".to_owned()));
    let own = ("PG.OPTIONS", "-c statement_timeout=300ms");
    let service = Service::new(&COPY, &with(&rds, &[own]));
    assert_eq!(
        service.sql("typed", 5000, "SELECT pg_sleep(20)::text"),
        Err(500)
    );
    eventually("the log has the cause", || {
        service
            .log()
            .contains("canceling statement due to statement timeout")
    });
    service.works(1);
}

#[test]
fn where_no_cancel_request_comes_through_a_session_ends_soon_all_the_same() {
    let rds = builder().start().unwrap();
    let limit = ("PG.CONNECT_TIMEOUT", "1");
    let service = Service::new(&COPY, &with(&rds, &[limit]));
    service.fill(&rds);
    // The process that takes connections, and so cancel requests.
    let pid = std::fs::read_to_string(rds.socket().join("postmaster.pid")).unwrap();
    let mut admin = admin(&rds);
    let postmaster = pid.lines().next().unwrap().parse().unwrap();
    kill(Signal::STOP, postmaster);
    for answer in service.at_once("typed", 500, "SELECT pg_sleep(600)::text") {
        assert_eq!(answer, Err(504));
    }
    eventually("the server has ended them", || {
        admin
            .query(SESSIONS, &[])
            .is_ok_and(|sessions| sessions.is_empty())
    });
    let log = rds.log().unwrap();
    assert_eq!(log.matches("connection to client lost").count(), SIZE);
    // It has not waited for `statement_timeout` to do so.
    assert!(!log.contains("canceling statement"));

    // The reason is in the log, even if each caller has hung up by then.
    let left = service.call("settings/port", None, Duration::from_millis(200));
    assert_eq!(left, None);
    let target = format!("{ENDPOINT}:{}", rds.port());
    let words = format!("{target}: no connection: Timeout occurred while creating a new object");
    eventually("the log says why", || service.log().contains(&words));
    kill(Signal::CONT, postmaster);
    service.works(SIZE);
}

#[test]
fn requests_cancelled_at_any_point_do_no_harm() {
    let rds = builder().start().unwrap();
    tables(&rds);
    let service = Service::new(&COPY, &with(&rds, &[]));
    for nth in 0..60 {
        let form = ["typed", "query", "cached", "transaction"][nth % 4];
        // Connecting takes some milliseconds, and so do the queries.
        let time = Duration::from_millis(1 + nth as u64 % 30);
        service.call(
            &format!("sql/{form}/10000"),
            Some("SELECT pg_sleep(0.02)::text"),
            time,
        );
        if nth % 5 == 0 {
            service.works(1);
        }
    }
    service.works(2 * SIZE);
    assert!(sessions(&rds).len() <= SIZE);
    // What a cancelled transaction has inserted is rolled back, or was committed before.
    let open = "SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
    eventually("no transaction is open", || {
        admin(&rds).query(open, &[]).unwrap().is_empty()
    });
}

/// As on RDS, the master user owns the database, and may make tables in it.
fn tables(rds: &LocalRds) {
    let table = "SET ROLE postgres; CREATE TABLE half_way (i int);
        CREATE TABLE names AS SELECT 'x'::varchar AS name";
    admin(rds).batch_execute(table).unwrap();
}

#[test]
fn frozen_sessions_cost_one_failed_request_each_at_most() {
    let rds = builder().start().unwrap();
    let service = Service::new(&COPY, &with(&rds, &[]));
    service.fill(&rds);
    let frozen = sessions(&rds);
    assert_eq!(frozen.len(), SIZE);
    frozen.iter().for_each(|pid| kill(Signal::STOP, *pid));
    for answer in service.at_once("typed", 1000, "SELECT 'late'::text") {
        assert_eq!(answer, Err(504));
    }
    service.works(3 * SIZE);
    frozen.iter().for_each(|pid| kill(Signal::CONT, *pid));
    eventually("no more sessions than clients", || {
        sessions(&rds).len() <= SIZE
    });
}

#[test]
fn terminated_sessions_and_a_server_that_restarts_are_replaced() {
    let mut rds = builder().start().unwrap();
    let service = Service::new(&COPY, &with(&rds, &[]));
    service.fill(&rds);
    terminate_sessions(&rds);
    assert!(service.failures() <= SIZE);
    service.works(2 * SIZE);
    let words =
        "lost a connection: db error: FATAL: terminating connection due to administrator command";
    eventually("the log says why", || service.log().contains(words));
    scope(|scope| {
        let asked = scope.spawn(|| service.at_once("typed", 10_000, "SELECT pg_sleep(600)::text"));
        let sleeping = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        let all = || admin(&rds).query(sleeping, &[]).unwrap().len() == SIZE;
        eventually("all of them run", all);
        terminate_sessions(&rds);
        assert_eq!(asked.join().unwrap(), [const { Err(503) }; SIZE]);
    });

    service.fill(&rds);
    rds.restart().unwrap();
    assert!(service.failures() <= SIZE);
    service.works(2 * SIZE);
    assert!(sessions(&rds).len() <= SIZE);
}

#[test]
fn a_failover_leads_to_the_new_writer() {
    let primary = builder().start().unwrap();
    let standby = primary.standby().unwrap();
    let roots = file(std::fs::read(primary.roots()).unwrap());
    let read_write = ("PG.TARGET_SESSION_ATTRS", "read-write");
    let vars = hosts(&[&primary, &standby], &[read_write]);
    let vars = changed(vars, &[("DB_CA_CERT", roots.to_str().unwrap())]);
    let service = Service::new(&COPY, &vars);
    service.fill(&primary);
    assert_eq!(service.setting("port"), Ok(primary.port().to_string()));
    admin(&standby).query("SELECT pg_promote()", &[]).unwrap();
    drop(primary);
    assert!(service.failures() <= SIZE);
    service.works(2 * SIZE);
    assert_eq!(service.setting("port"), Ok(standby.port().to_string()));
}

/// What a service logs in which much goes wrong, one after the other.
pub fn log_of_a_bad_day() -> String {
    let rds = builder().start().unwrap();
    tables(&rds);
    let short = ("PG.OPTIONS", "-c statement_timeout=300ms");
    let service = Service::new(&COPY, &with(&rds, &[short]));
    let name = || service.sql("cached", 4000, "SELECT name FROM names");
    assert_eq!(name(), Ok("x".to_owned()));
    let alter = "ALTER TABLE names ALTER COLUMN name TYPE text";
    admin(&rds).batch_execute(alter).unwrap();
    assert_eq!(name(), Err(500));
    let slow = "SELECT pg_sleep(20)::text";
    assert_eq!(service.sql("typed", 4000, slow), Err(500));
    service.fill(&rds);
    sessions(&rds)
        .iter()
        .for_each(|pid| kill(Signal::STOP, *pid));
    scope(|scope| {
        let asked =
            [(); SIZE + 1].map(|()| scope.spawn(|| service.sql("typed", 3000, "SELECT 1::text")));
        asked
            .into_iter()
            .for_each(|asked| _ = asked.join().unwrap().unwrap_err());
    });
    sessions(&rds)
        .iter()
        .for_each(|pid| kill(Signal::CONT, *pid));
    service.works(SIZE);
    terminate_sessions(&rds);
    eventually("it has noticed", || {
        service.log().contains("lost a connection")
    });
    service.log()
}

#[test]
fn a_migration_costs_each_client_one_failed_request_at_most() {
    let rds = builder().start().unwrap();
    tables(&rds);
    let service = Service::new(&COPY, &with(&rds, &[]));
    // It answers after a while, so that all clients take part.
    let ask = || service.at_once("cached", 4000, "SELECT * FROM names, pg_sleep(0.2)");
    for migration in ["ADD COLUMN age int", "ALTER COLUMN name TYPE text"] {
        assert!(ask().iter().all(Result::is_ok));
        let alter = format!("ALTER TABLE names {migration}");
        admin(&rds).batch_execute(&alter).unwrap();
        assert_eq!(ask(), [const { Err(500) }; SIZE], "{migration}");
        let words = "cached plan must not change result type";
        eventually("the log says why", || service.log().contains(words));
        assert!(
            ask().iter().all(Result::is_ok),
            "{migration}: {}",
            service.log()
        );
    }
    assert_eq!(rds.log().unwrap().matches("cached plan").count(), 2 * SIZE);
}

#[test]
fn fifty_callers_at_once_get_their_own_answers_from_four_sessions() {
    let rds = builder().start().unwrap();
    let service = Service::new(&COPY, &with(&rds, &[]));
    scope(|scope| {
        for nth in 0..50 {
            let service = &service;
            scope.spawn(move || {
                let sql = format!("SELECT 'answer {nth}' || pg_sleep(0.05)::text");
                assert_eq!(
                    service.sql("typed", 4000, &sql),
                    Ok(format!("answer {nth}"))
                );
            });
        }
    });
    assert_eq!(sessions(&rds).len(), SIZE);
}

#[test]
fn an_error_costs_no_connection_and_leaves_nothing_behind() {
    let rds = builder().start().unwrap();
    tables(&rds);
    let service = Service::new(&COPY, &with(&rds, &[]));
    let count = || {
        service
            .sql("typed", 5000, "SELECT count(*)::text FROM half_way")
            .unwrap()
    };
    let first = sessions(&rds);
    for form in ["typed", "query", "cached", "transaction"] {
        assert_eq!(service.sql(form, 5000, "SELECT (1 / 0)::text"), Err(500));
        assert_eq!(count(), "0", "{form}");
    }
    // While a session is asked whether it is idle, another one may serve.
    let now = sessions(&rds);
    assert!(
        now.len() <= 2 && first.iter().all(|pid| now.contains(pid)),
        "{first:?}, {now:?}"
    );
    // A transaction by hand that is left open, or that has failed, or queries that nobody waits for.
    for (form, status) in [
        ("begin, then an error of ours", 404),
        ("begin", 500),
        ("join", 500),
    ] {
        assert_eq!(service.sql(form, 5000, "SELECT (1 / 0)::text"), Err(status));
        for _ in 0..=SIZE {
            assert_eq!(count(), "0", "{form}");
        }
    }
    assert!(sessions(&rds).len() <= SIZE);
    service
        .sql("transaction", 5000, "SELECT 'done'::text")
        .unwrap();
    assert_eq!(count(), "1");
    let log = rds.log().unwrap();
    let warnings = log.matches("WARNING").count();
    // Of the one transaction that was left open; nothing else is worth a line there.
    assert_eq!(warnings, 1, "{log}");
}

#[test]
fn a_server_far_away_keeps_its_connection_after_an_error() {
    let relay = Relay::new(RDS.port(), Duration::from_millis(100)).unwrap();
    let service = Service::new(&COPY, &at_port(relay.port(), &RDS));
    for _ in 0..5 {
        assert_eq!(service.sql("typed", 5000, "SELECT (1 / 0)::text"), Err(500));
    }
    service.works(1);
    // As many as the pool may have: while one session is asked whether it is idle, another serves.
    let connections = relay.round_trips().len();
    assert!(connections <= 2, "{connections} connections");
}

#[test]
fn on_a_warm_pool_a_request_takes_the_round_trips_of_its_queries_and_no_more() {
    let relay = Relay::new(RDS.port(), Duration::from_millis(50)).unwrap();
    let service = Service::new(&COPY, &at_port(relay.port(), &RDS));
    for (form, trips) in [("typed", 1), ("cached", 1), ("query", 2)] {
        let sql = format!("SELECT '{form}'::text");
        service.sql(form, 10_000, &sql).unwrap();
        let before = relay.round_trips();
        for _ in 0..5 {
            service.sql(form, 10_000, &sql).unwrap();
        }
        let after = relay.round_trips();
        assert_eq!((before.len(), after.len()), (1, 1));
        assert_eq!(after[0] - before[0], 5 * trips, "{form}");
    }
}

#[test]
fn a_connection_that_is_late_for_one_request_serves_the_next() {
    // Connecting takes six round trips: longer than any caller waits.
    let rds = builder().start().unwrap();
    let relay = Relay::new(rds.port(), Duration::from_millis(150)).unwrap();
    let service = Service::new(&SERVICE, &at_port(relay.port(), &rds));
    terminate_sessions(&rds);
    eventually("it has noticed", || {
        service.log().contains("lost a connection")
    });
    let call = || service.call("settings/port", None, Duration::from_millis(600));
    assert_eq!(call(), None);
    let works = (0..5).any(|_| call().is_some());
    assert!(works, "each request begins to connect anew");
}

#[test]
fn a_fresh_password_is_read_for_each_new_connection() {
    let rds = builder().start().unwrap();
    let set = |password: &str| {
        let sql = format!("ALTER ROLE postgres PASSWORD '{password}'");
        admin(&rds).batch_execute(&sql).unwrap();
    };
    set("the first");
    let password = file("the first\n");
    let vars = with(
        &rds,
        &[
            ("PASSWORD_FILE", password.to_str().unwrap()),
            ("PG.PASSWORD", ""),
        ],
    );
    let service = Service::new(&SERVICE, &vars);
    set("the second");
    // The session outlives the change; a new one needs the new password.
    service.setting("port").unwrap();
    terminate_sessions(&rds);
    eventually("no session is left", || sessions(&rds).is_empty());
    let refused =
        || service.setting("port") == Err(503) && service.log().contains("authentication");
    eventually("the old password is refused", refused);
    std::fs::write(&password, "the second\n").unwrap();
    assert_eq!(service.setting("port"), Ok(rds.port().to_string()));
    std::fs::remove_file(&password).unwrap();
    terminate_sessions(&rds);
    let logged = || {
        let _ = service.setting("port");
        service
            .log()
            .contains("reading the file of PASSWORD_FILE: No such file")
    };
    eventually("the log says why there is none", logged);
}

/// A program of one's own around `Database`, with errors of one's own and with anyhow, in which requests end in ways that
/// a service knows only from its worst days.
const OWN: &str = r#"
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::{env, ffi::OsString, fs, time::Duration};

use anyhow::{Context, Result, anyhow, bail, ensure};
use deadpool_postgres::{Client, Connect, Manager, ManagerConfig, Pool, PoolError, Runtime};
use log::{debug, error, warn};
use rustls::crypto::ring::{default_provider, kx_group};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio::runtime::{Builder, Handle};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

const CLIENTS: usize = 1;
const WAIT_LIMIT: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
enum Mine {
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error(transparent)]
    Query(#[from] tokio_postgres::Error),
}

const SLEEP: &str = "SELECT pg_sleep(600)";

/// A request that has begun its query, but is not polled any more.
fn begun(runtime: &tokio::runtime::Runtime, database: &Database) -> Pin<Box<dyn Future<Output = Result<(), Mine>>>> {
    let database = database.clone();
    let mut request: Pin<Box<dyn Future<Output = _>>> = Box::pin(async move {
        let limit = Duration::from_secs(60);
        database.run(limit, async |client| Ok(client.batch_execute(SLEEP).await?)).await
    });
    let polled = runtime.block_on(async { timeout(Duration::from_millis(300), &mut request).await });
    assert!(polled.is_err(), "{polled:?}");
    request
}

fn main() -> Result<()> {
    env_logger::init();
    let settings = Settings::from_env()?;
    let roots = settings.db_ca_cert.context("DB_CA_CERT is not set")?;
    let flavors = [Builder::new_current_thread, Builder::new_multi_thread];
    for build in flavors {
        let runtime = build().enable_all().build()?;
        let database = Database::new(settings.pg.clone(), &roots)?;
        // Dropped outside the runtime: the one client of the pool is free again.
        drop(begun(&runtime, &database));
        let one = runtime.block_on(async {
            let database = database.clone();
            // In a task, with anyhow.
            tokio::spawn(async move {
                database
                    .run(WAIT_LIMIT, async |client| {
                        let row = client.query_typed_one("SELECT 1", &[]).await?;
                        anyhow::Ok(row.try_get::<_, i32>(0)?)
                    })
                    .await
            })
            .await
        })??;
        eprintln!("one: {one}");
        // Late, and then dropped after the runtime.
        let late = runtime.block_on(database.run(Duration::ZERO, async |client| {
            Ok::<_, Mine>(client.batch_execute(SLEEP).await?)
        }));
        eprintln!("late: {}", late.unwrap_err());
        let request = begun(&runtime, &database);
        let running = database.clone();
        runtime.spawn(async move {
            running.run(WAIT_LIMIT, async |client| anyhow::Ok(client.batch_execute(SLEEP).await?)).await
        });
        drop(runtime);
        drop(request);
        // The pool serves another runtime as well.
        let runtime = build().enable_all().build()?;
        let again = runtime.block_on(database.run(WAIT_LIMIT, async |client| {
            anyhow::Ok(client.query_typed_one("SELECT 2", &[]).await?.try_get::<_, i32>(0)?)
        }))?;
        eprintln!("again: {again}");
        // Outside of any runtime, and after it.
        let request = begun(&runtime, &database);
        runtime.shutdown_background();
        drop(request);
    }
    Ok(())
}
"#;

#[test]
fn the_database_of_another_program_panics_neither_outside_the_runtime_nor_at_its_end() {
    let example = example();
    let (_, database) = example
        .split_once("/// A pool of connections over TLS")
        .unwrap();
    // As the page says for RDS Proxy and PgBouncer.
    let section = section("Take it into your project");
    let first = "let limits";
    let last = between(
        &section,
        &format!("Delete the lines from `{first}` to `"),
        "`",
    );
    let lines: Vec<_> = database.split_inclusive('\n').collect();
    let of = |words: &str| lines.iter().position(|line| line.contains(words)).unwrap();
    let database = [&lines[..of(first)], &lines[of(last) + 1..]]
        .concat()
        .concat();
    let code = format!("{OWN}\n/// A pool of connections over TLS{database}");
    let program = new_project("service-database", &code, dependencies());
    let rds = builder().start().unwrap();
    let run = run_of(&program, &with(&rds, &[("RUST_LOG", "debug")]));
    assert_eq!(run.code, Some(0), "{}", run.output);
    for (words, count) in [
        ("one: 1", 2),
        ("late: no answer within 0ns", 2),
        ("again: 2", 2),
    ] {
        assert_eq!(
            run.output.matches(words).count(),
            count,
            "{words}: {}",
            run.output
        );
    }
}

#[test]
#[ignore = "builds the AWS SDK, which takes minutes"]
fn with_the_code_of_the_page_it_logs_in_with_an_iam_token() {
    let section = section("IAM tokens");
    let [code, more] = ["```rust\n", "```toml\n"].map(|start| between(&section, start, "```"));
    let code = replaced(&example(), &take(&example(), "fresh_password"), code);
    let more = manifest("service-iam", &format!("{}{more}", dependencies()));
    let program = build("service-iam", &code, &more, MORE_LOCKED, &[]);

    let (acceptor, roots) = own_tls();
    let (heard, token) = std::sync::mpsc::channel();
    let fake = Fake::new(move |wire| {
        let (acceptor, heard) = (acceptor.clone(), heard.clone());
        async move {
            let mut wire = tls(wire, &acceptor).await?;
            startup(&mut wire).await?;
            wire.write_all(CLEARTEXT_PASSWORD).await?;
            wire.flush().await?;
            let (_, password) = message(&mut wire).await?;
            heard.send(String::from_utf8(password).unwrap()).unwrap();
            Ok(())
        }
    });
    let port = fake.port.to_string();
    let vars = with(
        &RDS,
        &[
            ("PG.PORT", &*port),
            ("PG.USER", "iam_user"),
            ("PG.PASSWORD", ""),
            ("DB_CA_CERT", roots.to_str().unwrap()),
            ("AWS_REGION", "ca-central-1"),
            ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE"),
            ("AWS_SECRET_ACCESS_KEY", "made-up"),
        ],
    );
    run_of(&program, &vars).failed(&["asking"]);
    let token = token.recv().unwrap();
    let start = format!("{ENDPOINT}:{port}/?Action=connect&DBUser=iam_user&");
    assert!(token.starts_with(&start), "{token}");
    for part in [
        "AKIAEXAMPLE%2F",
        "%2Fca-central-1%2Frds-db%2Faws4_request",
        "&X-Amz-Signature=",
    ] {
        assert!(token.contains(part), "{token}");
    }
}

#[test]
fn the_dependencies_that_the_page_adds_are_those_that_the_tests_have() {
    let manifest = std::fs::read_to_string("Cargo.toml").unwrap() + "\n";
    let ours = between(&manifest, "[dev-dependencies]\n", "\n\n");
    for line in dependencies().lines() {
        // The tests need more of tokio.
        match line.split_once(" = { version = \"1.51\", features = [") {
            Some(("tokio", features)) => {
                let (_, all) = ours
                    .split_once("\ntokio = { version = \"1.51\", features = [")
                    .unwrap();
                let all = all.lines().next().unwrap();
                for feature in features.trim_end_matches("] }").split(", ") {
                    assert!(all.contains(feature), "{feature}");
                }
            }
            _ => assert!(ours.lines().any(|other| other == line), "{line}"),
        }
    }
}

#[test]
fn what_it_has_from_the_program_it_has_word_for_word() {
    let (program, example) = (program(), example());
    let (_, ours) = program.split_once("/// The server, for errors.").unwrap();
    assert!(example.ends_with(&format!(
        "{}\n/// The server, for errors.{ours}",
        take(&program, "require_tls")
    )));
}
