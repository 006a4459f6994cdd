//! The README's pool, taken as it is printed, recovers by itself from what a service meets, and the healthy do not
//! pay for it.
//!
//! | the service meets                             | and then                                                 |
//! |-----------------------------------------------|----------------------------------------------------------|
//! | queries past their limit, cancelled requests  | the next requests work; no session is left on the server |
//! | frozen, terminated, restarted servers         | at most one request fails for each client of the pool    |
//! | a failover                                    | the pool finds the new writer                            |
//! | errors of queries, transactions left half-way | the next request has the same session, as good as new    |
//! | 50 tasks at once                              | each gets its own answer                                 |

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{scope, sleep, spawn};
use std::time::Duration;

use crate::broken_servers::{Fault::Silence, Point::Query, server};
use crate::failover::hosts;
use crate::support::fake::{Fake, black_hole, own_tls, silence};
use crate::support::page::{between, new_project, program, replaced, section, take};
use crate::support::{
    RDS, Var, admin, at_port, builder, changed, eventually, file, kill, run_of, terminate,
    then_the_good_one, with,
};
use local_rds::{ENDPOINT, LocalRds, Relay};
use rustix::process::Signal;

/// The size of the README's pool.
const SIZE: usize = 4;

/// The blocks of this language under the heading, in order.
fn blocks(language: &str) -> Vec<String> {
    let section = section("Take it into your project");
    let start = format!("```{language}\n");
    let blocks = section.split(&start).skip(1);
    blocks
        .map(|block| block.split("```").next().unwrap().to_owned())
        .collect()
}

/// The service as the README has it: its block, and after it what it says from our program.
fn printed() -> String {
    let program = program();
    let settings = "/// A field that you add";
    let (_, from_settings) = program.split_once(settings).unwrap();
    let [_, service, _] = &blocks("rust")[..] else {
        panic!("three blocks of Rust are under the heading: imports, a service, a fresh password")
    };
    format!(
        "{service}\n{}\n{settings}{from_settings}",
        take(&program, "require_tls")
    )
}

/// A project with this code, and the dependencies that the README says.
fn project(name: &str, code: &str) -> PathBuf {
    new_project(name, code, &blocks("toml")[0])
}

/// A `main` that answers requests from its standard input, each in a task of its own: `<id> <form> <limit in ms> <SQL>`.
/// `<id> cancel` drops the future of a request.
const MAIN: &str = r#"
#[tokio::main]
async fn main() -> Result<()> {
    let settings = Settings::from_env()?;
    let pool = pool(settings.pg, &settings.db_ca_cert.context("DB_CA_CERT is not set")?)?;
    let mut requests = HashMap::new();
    info!("ready");
    // For who calls `pool.get()`.
    ensure!(pool.timeouts().wait.is_some() && pool.timeouts().create.is_some());
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        let id = words[0].to_owned();
        if words[1] == "cancel" {
            let request: tokio::task::JoinHandle<()> = requests.remove(&id).context("no such request")?;
            request.abort();
            continue;
        }
        let (form, limit, sql) = (words[1].to_owned(), words[2].parse()?, words[3].to_owned());
        let pool = pool.clone();
        requests.insert(id.clone(), tokio::spawn(async move {
            let limit = Duration::from_millis(limit);
            let answer: Result<String> = with_client(&pool, limit, async |client| {
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
                    _ => client.query_typed_one(&sql, &[]).await?,
                };
                row.try_get(0)
            })
            .await;
            match answer {
                Ok(answer) => println!("{id} ok {answer}"),
                Err(error) => println!("{id} error {}", format!("{error:#}").replace('\n', " ")),
            }
        }));
    }
    Ok(())
}
"#;

/// The recipe with that `main` in place of its own.
fn recipe() -> String {
    let printed = printed();
    let main = format!("#[tokio::main]\n{}", take(&printed, "main"));
    replaced(&printed, &main, MAIN)
}

static SERVICE: LazyLock<PathBuf> = LazyLock::new(|| project("pool-service", &recipe()));

/// A service that runs, until this is dropped.
struct Service {
    process: Child,
    requests: ChildStdin,
    answers: Receiver<String>,
    arrived: HashMap<String, Result<String, String>>,
    next: usize,
}

impl Service {
    fn new(vars: &[Var]) -> Self {
        Self::of(&SERVICE, vars)
    }

    fn of(program: &PathBuf, vars: &[Var]) -> Self {
        let mut process = Command::new(program)
            .env_clear()
            .envs(vars.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let requests = process.stdin.take().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let (send, answers) = channel();
        spawn(move || {
            lines
                .map_while(Result::ok)
                .try_for_each(|line| send.send(line))
        });
        Self {
            process,
            requests,
            answers,
            arrived: HashMap::new(),
            next: 0,
        }
    }

    /// Sends a request, and returns its number.
    fn send(&mut self, form: &str, millis: u64, sql: &str) -> String {
        self.next += 1;
        let id = self.next.to_string();
        writeln!(self.requests, "{id} {form} {millis} {sql}").unwrap();
        id
    }

    fn cancel(&mut self, id: &str) {
        writeln!(self.requests, "{id} cancel").unwrap();
    }

    /// The answer to a request. It comes, whatever happens: so nothing hangs or panics.
    #[track_caller]
    fn answer(&mut self, id: &str) -> Result<String, String> {
        loop {
            if let Some(answer) = self.arrived.remove(id) {
                return answer;
            }
            let line = self.answers.recv_timeout(Duration::from_secs(60));
            let line = line.unwrap_or_else(|error| panic!("no answer to request {id}: {error}"));
            let [of, kind, text] = line.splitn(3, ' ').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            let answer = match kind {
                "ok" => Ok(text.to_owned()),
                _ => Err(text.to_owned()),
            };
            self.arrived.insert(of.to_owned(), answer);
        }
    }

    /// Sends a request, and waits for its answer.
    #[track_caller]
    fn ask(&mut self, form: &str, millis: u64, sql: &str) -> Result<String, String> {
        let id = self.send(form, millis, sql);
        self.answer(&id)
    }

    /// So many requests after each other, each with an answer of its own.
    #[track_caller]
    fn works(&mut self, times: usize) {
        for nth in 0..times {
            let answer = self.ask("typed", 10_000, &format!("SELECT '{nth}'::text"));
            assert_eq!(answer, Ok(nth.to_string()));
        }
    }

    /// Requests until one works; returns how many have failed before.
    #[track_caller]
    fn failures(&mut self) -> usize {
        let mut failures = 0;
        while let Err(error) = self.ask("typed", 1500, "SELECT 'works'::text") {
            failures += 1;
            assert!(failures < 100, "{error}");
            // A server that restarts refuses at once.
            sleep(Duration::from_millis(50));
        }
        failures
    }

    /// Opens all connections of the pool, by as many queries at once.
    fn fill(&mut self, rds: &LocalRds) {
        while sessions(rds).len() < SIZE {
            let sql = "SELECT pg_sleep(0.2)::text";
            let ids = [(); SIZE].map(|()| self.send("typed", 10_000, sql));
            ids.iter().for_each(|id| _ = self.answer(id).unwrap());
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The processes of the service's sessions on the server.
fn sessions(rds: &LocalRds) -> Vec<i32> {
    let ours = "SELECT pid FROM pg_stat_activity WHERE usename = 'postgres'";
    let rows = admin(rds).query(ours, &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

fn terminate_sessions(rds: &LocalRds) {
    let mut admin = admin(rds);
    for pid in sessions(rds) {
        terminate(&mut admin, pid);
    }
}

/// No more sessions than clients, soon.
#[track_caller]
fn no_more_sessions_than_clients(rds: &LocalRds) {
    eventually("no more sessions than clients of the pool", || {
        sessions(rds).len() <= SIZE
    });
}

#[test]
fn as_printed_it_connects_reaches_the_second_host_and_says_what_fails() {
    let pool = &project("pool", &printed());
    let (hole, ..) = &black_hole();
    let silent = Fake::new(silence).port.to_string();
    let (acceptor, roots) = own_tls();
    let fake = Fake::new(move |wire| server(wire, Some(acceptor.clone()), Query, Silence));
    let (silent, no_answer) = (("PG.PORT", &*silent), fake.port.to_string());
    let no_answer = [
        ("PG.PORT", &*no_answer),
        ("DB_CA_CERT", roots.to_str().unwrap()),
    ];
    let [shorter, longer] = [("PG.CONNECT_TIMEOUT", "1"), ("PG.CONNECT_TIMEOUT", "9")];
    let late = [[silent, longer], [silent, shorter]];
    scope(|scope| {
        for vars in [
            with(&RDS, &[]),
            then_the_good_one(ENDPOINT, 1, "1"),
            then_the_good_one(ENDPOINT, *hole, "1"),
            then_the_good_one(ENDPOINT, *hole, ""),
        ] {
            scope.spawn(move || {
                let run = run_of(pool, &vars);
                let answer = "max_connections: 100";
                assert!(
                    run.code == Some(0) && run.output.contains(answer),
                    "{run:?}"
                );
            });
        }
        for (change, words) in [
            (&late[0][..], &["no connection within 4s"][..]),
            (&late[1], &["connecting", "Timeout"]),
            (&no_answer, &["no answer within 4s"]),
            (&[("PG.PORT", "1")], &["connecting", "Connection refused"]),
            (
                &[("DB_CA_CERT", "/nonexistent")],
                &["/nonexistent", "No such file"],
            ),
            (&[("DB_CA_CERT", "")], &["DB_CA_CERT is not set"]),
            (
                &[("PG.USER", "nobody")],
                &["password authentication failed"],
            ),
        ] {
            scope.spawn(move || run_of(pool, &with(&RDS, change)).failed(words));
        }
    });
}

#[test]
fn queries_past_their_limit_leave_neither_a_busy_client_nor_a_session() {
    let rds = builder().start().unwrap();
    let mut service = Service::new(&with(&rds, &[]));
    for nth in 1..=2 {
        service.fill(&rds);
        let slow = "SELECT pg_sleep(600)::text";
        for id in [(); SIZE].map(|()| service.send("typed", 500, slow)) {
            let error = service.answer(&id).unwrap_err();
            assert_eq!(error, "no answer within 500ms: deadline has elapsed");
        }
        service.works(5);
        no_more_sessions_than_clients(&rds);
        eventually("the server has noticed that each client is gone", || {
            let lost = "connection to client lost";
            rds.log().unwrap().matches(lost).count() == nth * SIZE
        });
        // It has not waited for `statement_timeout` to do so.
        assert!(!rds.log().unwrap().contains("canceling statement"));
    }
    // The server also ends what takes too long while its client waits.
    let timeout = service.ask("typed", 5000, "SELECT current_setting('statement_timeout')");
    assert_eq!(timeout, Ok("1min".to_owned()));
    let own = ("PG.OPTIONS", "-c statement_timeout=300ms");
    let mut service = Service::new(&with(&rds, &[own]));
    let error = service
        .ask("typed", 5000, "SELECT pg_sleep(20)::text")
        .unwrap_err();
    assert!(
        error.contains("canceling statement due to statement timeout"),
        "{error}"
    );
    service.works(1);
}

#[test]
fn requests_cancelled_at_any_point_do_no_harm() {
    let rds = builder().start().unwrap();
    let table = "SET ROLE postgres; CREATE TABLE half_way (i int)";
    admin(&rds).batch_execute(table).unwrap();
    let mut service = Service::new(&with(&rds, &[]));
    for nth in 0..60 {
        let form = ["typed", "query", "cached", "transaction"][nth % 4];
        let id = service.send(form, 10_000, "SELECT pg_sleep(0.02)::text");
        // Connecting takes some milliseconds, and so do the queries.
        sleep(Duration::from_millis(nth as u64 % 30));
        service.cancel(&id);
        if nth % 5 == 0 {
            service.works(1);
        }
    }
    service.works(2 * SIZE);
    no_more_sessions_than_clients(&rds);
    // What a cancelled transaction has inserted is rolled back, or was committed before.
    let open = "SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
    eventually("no transaction is open", || {
        admin(&rds).query(open, &[]).unwrap().is_empty()
    });
}

#[test]
fn frozen_sessions_cost_one_failed_request_each_at_most() {
    let rds = builder().start().unwrap();
    let mut service = Service::new(&with(&rds, &[]));
    service.fill(&rds);
    let frozen = sessions(&rds);
    assert_eq!(frozen.len(), SIZE);
    frozen.iter().for_each(|pid| kill(Signal::STOP, *pid));
    let ids = [(); SIZE].map(|()| service.send("typed", 1000, "SELECT 'late'::text"));
    for id in ids {
        let error = service.answer(&id).unwrap_err();
        assert!(error.contains("no answer within 1s"), "{error}");
    }
    service.works(3 * SIZE);
    frozen.iter().for_each(|pid| kill(Signal::CONT, *pid));
    no_more_sessions_than_clients(&rds);
}

#[test]
fn terminated_sessions_and_a_server_that_restarts_are_replaced() {
    let mut rds = builder().start().unwrap();
    let mut service = Service::new(&with(&rds, &[]));
    service.fill(&rds);
    terminate_sessions(&rds);
    assert!(service.failures() <= SIZE);
    service.works(2 * SIZE);

    service.fill(&rds);
    rds.restart().unwrap();
    assert!(service.failures() <= SIZE);
    service.works(2 * SIZE);
    no_more_sessions_than_clients(&rds);
}

#[test]
fn a_failover_leads_to_the_new_writer() {
    let primary = builder().start().unwrap();
    let standby = primary.standby().unwrap();
    let roots = file(std::fs::read(primary.roots()).unwrap());
    let read_write = ("PG.TARGET_SESSION_ATTRS", "read-write");
    let vars = hosts(&[&primary, &standby], &[read_write]);
    let vars = changed(vars, &[("DB_CA_CERT", roots.to_str().unwrap())]);
    let mut service = Service::new(&vars);
    service.fill(&primary);
    let port = "SELECT current_setting('port')";
    let of = |rds: &LocalRds| Ok(rds.port().to_string());
    assert_eq!(service.ask("typed", 10_000, port), of(&primary));
    admin(&standby).query("SELECT pg_promote()", &[]).unwrap();
    drop(primary);
    assert!(service.failures() <= SIZE);
    service.works(2 * SIZE);
    assert_eq!(service.ask("typed", 10_000, port), of(&standby));
}

#[test]
fn fifty_tasks_at_once_get_their_own_answers_from_four_sessions() {
    let rds = builder().start().unwrap();
    let mut service = Service::new(&with(&rds, &[]));
    let sql = |nth: usize| format!("SELECT 'answer {nth}' || pg_sleep(0.05)::text");
    let sent: Vec<_> = (0..50)
        .map(|nth| service.send("typed", 30_000, &sql(nth)))
        .collect();
    for (nth, id) in sent.iter().enumerate() {
        assert_eq!(service.answer(id), Ok(format!("answer {nth}")));
    }
    assert_eq!(sessions(&rds).len(), SIZE);
}

#[test]
fn an_error_of_a_query_costs_no_connection_and_leaves_no_transaction_open() {
    let rds = builder().start().unwrap();
    // As on RDS, the master user owns the database, and may make tables in it.
    let table = "SET ROLE postgres; CREATE TABLE half_way (i int)";
    admin(&rds).batch_execute(table).unwrap();
    let mut service = Service::new(&with(&rds, &[]));
    let pid = "SELECT pg_backend_pid()::text";
    let session = service.ask("typed", 5000, pid).unwrap();
    for form in ["typed", "query", "cached", "transaction"] {
        let error = service.ask(form, 5000, "SELECT (1 / 0)::text").unwrap_err();
        assert!(error.contains("division by zero"), "{error}");
        assert_eq!(
            service.ask("query", 5000, pid).as_ref(),
            Ok(&session),
            "{form}"
        );
        let count = service.ask("typed", 5000, "SELECT count(*)::text FROM half_way");
        assert_eq!(count, Ok("0".to_owned()));
    }
    service
        .ask("transaction", 5000, "SELECT 'done'::text")
        .unwrap();
    assert_eq!(
        service.ask("typed", 5000, "SELECT count(*)::text FROM half_way"),
        Ok("1".to_owned())
    );
}

#[test]
fn on_a_warm_pool_a_request_takes_the_round_trips_of_its_queries_and_no_more() {
    let relay = Relay::new(RDS.port(), Duration::from_millis(50)).unwrap();
    let mut service = Service::new(&at_port(relay.port(), &RDS));
    for (form, trips) in [("typed", 1), ("cached", 1), ("query", 2)] {
        let sql = format!("SELECT '{form}'::text");
        service.ask(form, 10_000, &sql).unwrap();
        let before = relay.round_trips();
        for _ in 0..5 {
            service.ask(form, 10_000, &sql).unwrap();
        }
        let after = relay.round_trips();
        assert_eq!((before.len(), after.len()), (1, 1));
        assert_eq!(after[0] - before[0], 5 * trips, "{form}");
    }
}

#[test]
fn a_connection_that_is_late_for_one_request_serves_the_next() {
    // Connecting takes six round trips: longer than any request may take.
    let relay = Relay::new(RDS.port(), Duration::from_millis(200)).unwrap();
    let mut service = Service::new(&at_port(relay.port(), &RDS));
    let mut ask = || service.ask("typed", 800, "SELECT 'works'::text");
    let error = ask().unwrap_err();
    assert!(error.contains("no connection within 800ms"), "{error}");
    let works = (0..5).any(|_| ask().is_ok());
    assert!(works, "each request begins to connect anew");
}

#[test]
fn a_fresh_password_is_read_for_each_new_connection() {
    let code = recipe();
    let page = section("Take it into your project");
    let fresh = between(&page, "replace `Manager::new(pg, tls)` by `", "`");
    let code = replaced(&code, "Manager::new(pg, tls)", fresh);
    let program = project(
        "pool-fresh-password",
        &format!("{code}\n{}", blocks("rust")[2]),
    );

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
    let mut service = Service::of(&program, &vars);
    service.works(1);
    set("the second");
    // The session outlives the change; a new one needs the new password.
    service.works(1);
    terminate_sessions(&rds);
    eventually("no session is left", || sessions(&rds).is_empty());
    let error = (0..SIZE).find_map(|_| {
        service
            .ask("typed", 5000, "SELECT 'x'::text")
            .err()
            .filter(|e| e.contains("authentication"))
    });
    assert!(error.is_some());
    std::fs::write(&password, "the second\n").unwrap();
    service.works(1);
}
