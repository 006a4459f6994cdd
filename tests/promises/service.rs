//! `examples/service.rs` keeps its promises: as it is, and as a copy in a project of its own, to which a handler is added.
//!
//! | the service meets                             | and then                                                  |
//! |-----------------------------------------------|-----------------------------------------------------------|
//! | a wrong setting at the start                  | it ends, with the reason                                  |
//! | 3 and 25 times the requests that it carries   | it answers as many as before, and refuses the rest        |
//! | callers that have 1 s of patience             | it answers most of what it carries in time                |
//! | callers that hang up, limits that are short   | no more sessions than clients of the pool, but for those  |
//! |                                               | that are just ending; callers that stay are answered      |
//! | queries past their limit, cancelled requests  | the next requests work; no session is left on the server  |
//! | frozen, terminated, restarted servers         | at most one request fails for each client of the pool     |
//! | a writer that turns read-only                 | the same, and then 503 until there is a writer            |
//! | an outage                                     | the log has the request, the status, the host, the cause  |
//! | a server that refuses                         | it is asked some 20 times a second                        |
//! | a failover, a migration                       | the pool finds the new writer; a client fails once        |
//! | errors of queries, transactions left half-way | the session goes on to serve, as good as new              |
//! | an idle hour, and more                        | the connection is kept alive, and replaced when it is old |
//! | SIGTERM, SIGINT                               | running requests are answered, and it ends                |

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::thread::{scope, sleep};
use std::time::Duration;

use crate::failover::hosts;
use crate::support::fake::{Fake, WELCOME, black_hole, own_tls, silence, startup, tls};
use crate::support::page::{between, example, new_project, replaced};
use crate::support::service::{
    COPY, MINUTE, SERVICE, SESSIONS, SIZE, Service, callers, dependencies, end, keepalives,
    most_sessions, no_more_sessions_than_clients, sessions, start, tables, terminate_sessions,
    while_frozen,
};
use crate::support::{
    RDS, UNSET, Var, admin, at_port, builder, changed, eventually, file, kill, run_of,
    then_the_good_one, with,
};
use local_rds::{ENDPOINT, Relay};
use rustix::process::Signal;
use tempfile::{TempDir, TempPath};
use tokio::io::AsyncWriteExt;

#[test]
fn as_it_is_it_starts_or_says_why_not() {
    let (hole, ..) = &black_hole();
    let silent = Fake::new(silence).port.to_string();
    let asking = format!("asking {ENDPOINT}:");
    let silent = [("PG.PORT", silent.as_str()), ("PG.CONNECT_TIMEOUT", "1")];
    let (logged_in, roots) = silent_after_the_log_in();
    let port = logged_in.port.to_string();
    let logged_in = [
        ("PG.PORT", port.as_str()),
        ("DB_CA_CERT", roots.to_str().unwrap()),
    ];
    let no_password = format!(
        "getting a password for {ENDPOINT}:{}\n\nCaused by:\n    0: no answer within 3s",
        RDS.port()
    );
    let (fifo, _folder) = fifo();
    scope(|scope| {
        for vars in [
            with(&RDS, &[]),
            then_the_good_one(ENDPOINT, 1, "1"),
            then_the_good_one(ENDPOINT, *hole, "1"),
            then_the_good_one(ENDPOINT, *hole, UNSET),
        ] {
            scope.spawn(move || {
                let service = Service::new(&SERVICE, &vars);
                assert_eq!(service.setting("max_connections"), Ok("100".to_owned()));
            });
        }
        for (change, words) in [
            (&[("PG.PORT", "1")][..], &["Connection refused"][..]),
            (&silent, &["Timeout", "creating"]),
            (&logged_in, &["no answer within 4s"]),
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
            ("DB_CA_CERT", UNSET, "DB_CA_CERT is not set"),
            (
                "PASSWORD_FILE",
                "hunter2",
                "reading the file of PASSWORD_FILE",
            ),
            ("PASSWORD_FILE", &fifo, &no_password),
            ("LISTEN", "127.0.0.1:x", "listening on LISTEN, 127.0.0.1:x"),
            ("RUST_LOG", "info=x=y", "reading RUST_LOG"),
        ] {
            scope.spawn(move || run_of(&SERVICE, &with(&RDS, &[(name, value)])).failed(&[words]));
        }
    });
}

/// A server that lets everyone in and then says no more, and the file of its root certificate.
fn silent_after_the_log_in() -> (Fake, TempPath) {
    let (acceptor, roots) = own_tls();
    let fake = Fake::new(move |wire| {
        let acceptor = acceptor.clone();
        async move {
            let mut wire = tls(wire, &acceptor).await?;
            startup(&mut wire).await?;
            wire.write_all(WELCOME).await?;
            wire.flush().await?;
            silence(wire).await
        }
    });
    (fake, roots)
}

/// A file that nobody writes to, so that reading it waits for ever, and the folder that it is in.
fn fifo() -> (String, TempDir) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("fifo");
    let made = Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    (path.to_str().unwrap().to_owned(), folder)
}

#[test]
fn as_it_is_it_answers_with_a_status_and_keeps_the_cause_for_the_log() {
    let rds = builder().start().unwrap();
    let service = Service::new(&SERVICE, &with(&rds, &[]));
    assert_eq!(service.setting("max_connections"), Ok("100".to_owned()));
    for name in ["no_such_parameter", "data_directory", "app.secret", "%00"] {
        assert_eq!(service.setting(name), Err(404), "{name}");
    }
    let target = format!("{ENDPOINT}:{}", rds.port());
    let logged = |status: &str, cause: &str| {
        let line = format!("GET /settings/max_connections: {status}: {target}: {cause}");
        eventually(&line, || service.log().contains(&line));
    };
    let may = |word: &str| {
        let sql = format!("{word} EXECUTE ON FUNCTION current_setting(text) ");
        let role = if word == "REVOKE" {
            "FROM PUBLIC"
        } else {
            "TO PUBLIC"
        };
        admin(&rds).batch_execute(&(sql + role)).unwrap();
    };
    may("REVOKE");
    assert_eq!(service.setting("max_connections"), Err(500));
    let denied = "querying: db error: ERROR: permission denied for function current_setting";
    logged("500 Internal Server Error", denied);
    may("GRANT");
    let log = service.log();
    assert!(!log.contains("404 Not Found"), "{log}");

    while_frozen(&rds, || {
        assert_eq!(service.setting("max_connections"), Err(504));
        logged("504 Gateway Timeout", "no answer within 4s");
    });

    drop(rds);
    // A session that ended with the server may still be taken for a living one, once each.
    for _ in 0..=SIZE {
        assert_eq!(service.setting("max_connections"), Err(503));
    }
    let refused = "no connection: error connecting to server: Connection refused";
    logged("503 Service Unavailable", refused);
    // A load balancer keeps it, as it will answer again.
    let health = service.call("healthz", None, MINUTE);
    assert_eq!(health, Some((200, "ok".to_owned())));
}

#[test]
fn a_log_that_nobody_reads_holds_up_no_request() {
    let mut process = start(&SERVICE, &with(&RDS, &[("RUST_LOG", "trace")]));
    let mut log = BufReader::new(process.stderr.take().unwrap()).lines();
    let line = log.find_map(|line| {
        let line = line.unwrap();
        line.contains("listening on http://").then_some(line)
    });
    let line = line.expect("it listens");
    let mut caller = TcpStream::connect(between(&line, "http://", ",")).unwrap();
    caller.set_read_timeout(Some(MINUTE)).unwrap();
    // Each is in the log, at this level, with 600 bytes: more than a pipe holds.
    let answered = (0..500).all(|_| {
        caller
            .write_all(b"GET /settings/port HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        caller.read(&mut [0; 1024]).is_ok_and(|count| count > 0)
    });
    end(&mut process, Signal::KILL);
    assert!(answered);
}

#[test]
fn a_signal_lets_running_requests_finish_and_ends_it() {
    // Four round trips a second, so that a request takes long.
    let relay = Relay::new(RDS.port(), Duration::from_millis(250)).unwrap();
    let still = "some requests were still running or incomplete after 9s";
    let end_with = |signal, part: &str| {
        let mut service = Service::new(&SERVICE, &at_port(relay.port(), &RDS));
        // A caller that keeps its connection open, and one that sends nothing, or a part of a request.
        let mut idle = TcpStream::connect(&service.address).unwrap();
        let mut silent = TcpStream::connect(&service.address).unwrap();
        silent.write_all(part.as_bytes()).unwrap();
        idle.write_all(b"GET /settings/port HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        assert!(idle.read(&mut [0; 1024]).unwrap() > 0);
        let running = Running::start(&service, "max_connections");
        let status = service.end(signal);
        let log = service.log();
        assert_eq!((status.code(), status.signal()), (Some(0), None), "{log}");
        assert!(running.answer().ends_with("\r\n\r\n100"));
        if part.is_empty() {
            assert!(!log.contains(still), "{log}");
        } else {
            eventually(still, || service.log().contains(still));
        }
    };
    // So it ends at its start, while it waits for a server or for a file.
    let (fifo, _folder) = fifo();
    let fake = Fake::new(silence);
    let server = changed(at_port(fake.port, &RDS), &[("PG.CONNECT_TIMEOUT", "60")]);
    let files = ["PASSWORD_FILE", "DB_CA_CERT"].map(|name| with(&RDS, &[(name, &fifo)]));
    let end_at_start = |signal, vars: &[Var], waits: &dyn Fn() -> bool| {
        let mut process = start(&SERVICE, vars);
        eventually("it waits", waits);
        // It reads a file right after it has begun to listen for signals.
        sleep(Duration::from_millis(500));
        assert_eq!(end(&mut process, signal).code(), Some(0));
    };
    scope(|scope| {
        for signal in [Signal::TERM, Signal::INT] {
            scope.spawn(move || end_with(signal, ""));
        }
        scope.spawn(|| end_with(Signal::TERM, "GET /settings/port HTTP/1.1\r\n"));
        scope.spawn(|| end_at_start(Signal::INT, &server, &|| fake.has_a_client()));
        for vars in &files {
            scope.spawn(|| end_at_start(Signal::TERM, vars, &|| true));
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
        println!("{carried} answers in 2 s, then {answered} in 3 s; {refused} refused");
        assert!(refused > 0);
        // And then it is as good as new.
        assert!(ask());
        assert_eq!(relay.round_trips().len(), SIZE, "no connection was lost");
        eventually("each refusal is in the log", || {
            service.log().matches("503 Service Unavailable").count() >= refused
        });
        (answered as f64 / 3.0) / (carried as f64 / 2.0)
    };
    // The machine may be busier in the second part than in the first, but not always.
    let holds = |times| assert!((0..3).any(|_| offer(times) > 0.8), "{times} times");
    scope(|scope| [3, 25].map(|times| _ = scope.spawn(move || holds(times))));
}

#[test]
fn callers_with_little_patience_are_answered_in_time_or_not_at_all() {
    let offer = || {
        let relay = Relay::new(RDS.port(), Duration::from_millis(200)).unwrap();
        let service = Service::new(&SERVICE, &at_port(relay.port(), &RDS));
        let ask = |patience: Duration| match service.call("settings/port", None, patience) {
            None | Some((503, _)) => false,
            Some(answer) => answer == (200, RDS.port().to_string()),
        };
        callers(SIZE, Duration::from_secs(2), || ask(MINUTE));
        let [carried, _] = callers(SIZE, Duration::from_secs(2), || ask(MINUTE));
        // Who came first is served first: if all waited for longer, each would leave just before its turn.
        let second = Duration::from_secs(1);
        let [answered, _] = callers(10 * SIZE, Duration::from_secs(3), || ask(second));
        println!("{carried} answers in 2 s to patient callers, then {answered} in 3 s");
        (answered as f64 / 3.0) / (carried as f64 / 2.0)
    };
    assert!((0..3).any(|_| offer() > 0.8));
}

#[test]
fn callers_that_hang_up_cost_others_little() {
    let rds = builder().start().unwrap();
    let service = Service::new(&COPY, &with(&rds, &[]));
    service.fill(&rds);
    let time = Duration::from_secs(2);
    let stay = || callers(10, time, || service.setting("port").is_ok())[0];
    let alone = stay();
    let hang_up = || {
        let slow = "SELECT pg_sleep(5)::text";
        let left = service.call("sql/typed/10000", Some(slow), Duration::from_millis(60));
        assert_ne!(left.map(|(status, _)| status), Some(200));
        // Two of these callers hang up some 20 times a second.
        sleep(Duration::from_millis(40));
        true
    };
    let beside = scope(|scope| {
        let stay = scope.spawn(stay);
        callers(2, time, hang_up);
        stay.join().unwrap()
    });
    println!("{alone} answers alone, {beside} beside callers that hang up");
    assert!(beside > alone / 4, "{beside} answers, alone {alone}");
}

#[test]
fn callers_that_hang_up_limits_that_are_short_and_overload_make_no_more_sessions_than_clients() {
    let rds = builder().start().unwrap();
    let service = Service::new(&COPY, &with(&rds, &[]));
    let slow = "SELECT pg_sleep(5)::text";
    // It goes on for a moment when it is cancelled.
    let stubborn = "DO $$ BEGIN PERFORM pg_sleep(5);
        EXCEPTION WHEN query_canceled THEN PERFORM pg_sleep(0.3); END $$";
    let time = Duration::from_millis(1500);
    for (what, call) in [
        (
            "hang up while a query goes on",
            &(|| {
                let time = Duration::from_millis(60);
                _ = service.call("sql/batch/10000", Some(stubborn), time);
            }) as &(dyn Fn() + Sync),
        ),
        ("hang up", &|| {
            let left = service.call("sql/typed/10000", Some(slow), Duration::from_millis(60));
            assert_eq!(left, None);
        }),
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
        println!("{most} sessions when callers {what}");
        // With those that the server is just ending. Without a guard there would be one for each caller.
        assert!(most <= SIZE + 2, "{most} sessions when callers {what}");
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
        // On a machine that stops for a moment, a cancel request may come before the query or too late; then the
        // server ends the session by itself.
        let count = |words: &str| rds.log().unwrap().matches(words).count();
        let cancelled = || count("canceling statement due to user request");
        let lost = || count("connection to client lost");
        eventually("each has ended", || cancelled() + lost() >= nth * SIZE);
        assert!(cancelled() > lost(), "{}", rds.log().unwrap());
        // A cancel request that comes late would hit the next request in the same session.
        eventually("their sessions have ended", || {
            sessions(&rds).iter().all(|pid| !before.contains(pid))
        });
        no_more_sessions_than_clients(&rds);
    }
    // Its limit is the one that it is given.
    let longer = service.sql("typed", 500, "SELECT pg_sleep(0.8)::text");
    assert_eq!(longer, Err(504));
    // The server also ends what takes too long while its client waits, or waits while its client does nothing.
    for (name, value) in [
        ("statement_timeout", "1min"),
        ("idle_in_transaction_session_timeout", "10s"),
        ("client_connection_check_interval", "500ms"),
    ] {
        let shown = service.sql("typed", 5000, &format!("SELECT current_setting('{name}')"));
        assert_eq!(shown, Ok(value.to_owned()));
    }
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
    let target = format!("{ENDPOINT}:{}", rds.port());
    let words = format!("{target}: no connection: Timeout occurred while creating a new object");
    eventually("the log says why", || {
        let left = service.call("settings/port", None, Duration::from_millis(200));
        assert_eq!(left, None);
        service.log().contains(&words)
    });
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
    let service = Service::new(&COPY, &with(&rds, &[]));
    service.fill(&rds);
    assert_eq!(sessions(&rds).len(), SIZE);
    while_frozen(&rds, || {
        for answer in service.at_once("typed", 1000, "SELECT 'late'::text") {
            assert_eq!(answer, Err(504));
        }
        service.works(3 * SIZE);
    });
    no_more_sessions_than_clients(&rds);
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

    // A process that is killed says nothing, and the server ends all the others.
    service.fill(&rds);
    let asked = scope(|scope| {
        let asked = scope.spawn(|| service.at_once("typed", 10_000, "SELECT pg_sleep(600)::text"));
        eventually("all of them run", || {
            let sleeping = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
            admin(&rds).query(sleeping, &[]).unwrap().len() == SIZE
        });
        kill(Signal::KILL, sessions(&rds)[0]);
        asked.join().unwrap()
    });
    assert_eq!(asked, [const { Err(503) }; SIZE]);
    eventually("it has recovered", || {
        service.sql("typed", 1500, "SELECT 1::text").is_ok()
    });

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
    let service = Service::new(&COPY, &vars);
    service.fill(&primary);
    assert_eq!(service.setting("port"), Ok(primary.port().to_string()));
    admin(&standby).query("SELECT pg_promote()", &[]).unwrap();
    drop(primary);
    assert!(service.failures() <= SIZE);
    service.works(2 * SIZE);
    assert_eq!(service.setting("port"), Ok(standby.port().to_string()));
}

#[test]
fn a_writer_that_turns_read_only_costs_each_client_one_failed_request_and_then_heals() {
    let rds = builder().start().unwrap();
    tables(&rds);
    let read_write = ("PG.TARGET_SESSION_ATTRS", "read-write");
    let service = Service::new(&COPY, &with(&rds, &[read_write]));
    let write = || service.sql("transaction", 4000, "SELECT 'written'::text");
    service.fill(&rds);
    // While it can write, an error costs no session.
    let before = sessions(&rds);
    assert_eq!(
        service.sql("transaction", 4000, "SELECT (1 / 0)::text"),
        Err(500)
    );
    service.works(2 * SIZE);
    assert_eq!(sessions(&rds), before);
    let read_only = |on: &str| {
        let mut admin = admin(&rds);
        let sql = format!("ALTER SYSTEM SET default_transaction_read_only = {on}");
        admin.batch_execute(&sql).unwrap();
        admin.query("SELECT pg_reload_conf()", &[]).unwrap();
    };
    read_only("on");
    let mut failed = 0;
    eventually("there is no connection any more", || match write() {
        Err(500) => {
            failed += 1;
            false
        }
        answer => answer == Err(503),
    });
    assert!((1..=SIZE).contains(&failed), "{failed}: {}", service.log());
    for words in [
        "cannot execute INSERT in a read-only transaction",
        "database does not allow writes",
    ] {
        eventually(words, || service.log().contains(words));
    }
    read_only("off");
    eventually("it writes again", || write().is_ok());
    service.works(2 * SIZE);

    // Where nothing is said of it, a session that is read-only is as good as any other.
    let service = Service::new(&COPY, &with(&rds, &[]));
    service.fill(&rds);
    let before = sessions(&rds);
    read_only("on");
    eventually("it is read-only", || {
        service.setting("transaction_read_only") == Ok("on".to_owned())
    });
    for _ in 0..SIZE {
        assert_eq!(service.sql("transaction", 4000, "SELECT ''"), Err(500));
    }
    service.works(SIZE);
    assert!(sessions(&rds).iter().all(|pid| before.contains(pid)));
}

#[test]
fn a_server_that_refuses_is_asked_some_twenty_times_a_second() {
    let rds = builder().start().unwrap();
    let service = Service::new(&SERVICE, &with(&rds, &[]));
    let role = |sql: &str| {
        let sql = format!("ALTER ROLE postgres {sql}");
        admin(&rds).batch_execute(&sql).unwrap();
    };
    role("NOLOGIN");
    terminate_sessions(&rds);
    let works = || service.setting("port").is_ok();
    let asked = || {
        rds.log()
            .unwrap()
            .matches("is not permitted to log in")
            .count()
    };
    eventually("it is refused", || !works() && asked() > 0);
    let before = asked();
    callers(10, Duration::from_secs(2), || !works());
    let asked = asked() - before;
    println!("asked {asked} times in 2 s");
    // Without a delay, it is asked thousands of times.
    assert!((1..100).contains(&asked), "asked {asked} times");
    role("LOGIN");
    // Each client may have one more attempt behind it, and then it works.
    assert!((0..=SIZE).any(|_| works()), "{}", service.log());
}

#[test]
fn an_idle_connection_is_kept_alive_and_an_old_one_is_replaced() {
    let rds = builder().start().unwrap();
    let kept_alive = |vars: &[(&str, &str)], expected: [u32; 3]| {
        let service = Service::new(&SERVICE, &with(&rds, vars));
        match keepalives(&service, rds.port()) {
            Some(found) => assert_eq!(found, [expected]),
            None => eprintln!("the sockets of another process cannot be seen: not tested"),
        }
    };
    kept_alive(&[], [60, 10, 3]);
    let own = [
        ("PG.KEEPALIVES_IDLE", "20"),
        ("PG.KEEPALIVES_INTERVAL", "5"),
        ("PG.KEEPALIVES_RETRIES", "7"),
    ];
    kept_alive(&own, [20, 5, 7]);
    eventually("both are gone", || sessions(&rds).is_empty());

    let lifetime = "const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);";
    let short = lifetime.replace("from_secs(30 * 60)", "from_millis(1500)");
    let code = replaced(&example(), lifetime, &short);
    let program = new_project("service-short", &code, dependencies());
    let service = Service::new(&program, &with(&rds, &[]));
    let session = || {
        service.setting("port").unwrap();
        sessions(&rds).pop()
    };
    let first = session();
    // The next request has the same session, and none fails when it is replaced.
    assert_eq!(session(), first);
    eventually("there is another one", || session() != first);
    eventually("the first is gone", || sessions(&rds).len() == 1);
}

#[test]
fn a_query_that_is_given_up_without_an_error_costs_the_next_request_and_no_more() {
    let rds = builder().start().unwrap();
    let service = Service::new(&COPY, &with(&rds, &[]));
    let gave_up = service.sql("in flight", 4000, "SELECT ''");
    assert_eq!(gave_up, Ok("gave up".to_owned()));
    assert_eq!(service.sql("typed", 500, "SELECT 'next'::text"), Err(504));
    service.works(2 * SIZE);
}

/// What a service logs whose callers take all the files that it may have open.
pub fn log_of_one_with_few_files() -> String {
    let program = SERVICE.to_str().unwrap();
    let script = "ulimit -n 40; exec \"$0\"";
    // Not `sh`, which may drop names with a dot.
    let mut command = Command::new("bash");
    command.args(["-c", script, program]);
    let service = Service::of(command, &with(&RDS, &[]));
    let all: Vec<_> = (0..40)
        .map(|_| TcpStream::connect(&service.address).unwrap())
        .collect();
    eventually("the log says so", || {
        service.log().contains("accept error: Too many open files")
    });
    drop(all);
    assert_eq!(service.setting("port"), Ok(RDS.port().to_string()));
    service.log()
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
    while_frozen(&rds, || {
        scope(|scope| {
            let ask = || service.sql("typed", 3000, "SELECT 1::text");
            let asked = [(); SIZE + 1].map(|()| scope.spawn(ask));
            for asked in asked {
                asked.join().unwrap().unwrap_err();
            }
        });
    });
    service.works(SIZE);
    terminate_sessions(&rds);
    eventually("it has noticed", || {
        service.log().contains("lost a connection")
    });
    let words = "Connection could not be recycled";
    eventually(words, || {
        _ = service.sql("typed", 3000, "SELECT 1::text");
        service.log().contains(words)
    });
    service.log()
}

/// What a service logs with a handler that leaves a transaction open.
pub fn log_of_one_with_an_open_transaction() -> String {
    let short = ("PG.OPTIONS", "-c idle_in_transaction_session_timeout=300ms");
    let service = Service::new(&COPY, &with(&RDS, &[short]));
    let left_open = service.sql("left open", 4000, "");
    assert_eq!(left_open, Ok("left open".to_owned()));
    let words = "idle-in-transaction timeout";
    eventually(words, || service.log().contains(words));
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
                let sql = format!("SELECT 'answer {nth}' || pg_sleep(0.02)::text");
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
        now.len() <= SIZE && first.iter().all(|pid| now.contains(pid)),
        "{first:?}, {now:?}"
    );
    // Neither a row nor a line of the caller's own is in the log.
    let check = "ALTER TABLE names ADD CHECK (name <> 'secret')";
    admin(&rds).batch_execute(check).unwrap();
    for sql in [
        "INSERT INTO names VALUES ('secret') RETURNING ''",
        "SELECT E'a number\nforged'::int::text",
    ] {
        assert_eq!(service.sql("typed", 5000, sql), Err(500));
    }
    eventually("it is logged", || service.log().contains("a number"));
    let log = service.log();
    assert!(log.contains("violates check constraint"), "{log}");
    for words in ["secret", "forged"] {
        assert!(!log.contains(words), "{log}");
    }
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
    no_more_sessions_than_clients(&rds);
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
    for _ in 0..10 {
        assert_eq!(service.sql("typed", 5000, "SELECT (1 / 0)::text"), Err(500));
    }
    service.works(1);
    // While one session is asked whether it is idle, others serve; none is closed, and none is cancelled.
    let connections = relay.round_trips().len();
    assert!(connections <= SIZE, "{connections} connections");
}

#[test]
fn on_a_warm_pool_a_request_takes_the_round_trips_of_its_queries_and_no_more() {
    let relay = Relay::new(RDS.port(), Duration::from_millis(50)).unwrap();
    let service = Service::new(&COPY, &at_port(relay.port(), &RDS));
    // Not those that prepare a statement each time: closing it is one more, where the next request comes late.
    for form in ["typed", "cached"] {
        let sql = format!("SELECT '{form}'::text");
        service.sql(form, 10_000, &sql).unwrap();
        let before = relay.round_trips();
        for _ in 0..5 {
            service.sql(form, 10_000, &sql).unwrap();
        }
        let after = relay.round_trips();
        assert_eq!((before.len(), after.len()), (1, 1));
        assert_eq!(after[0] - before[0], 5, "{form}");
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
            ("PG.PASSWORD", UNSET),
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
