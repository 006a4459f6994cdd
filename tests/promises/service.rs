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

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::thread::{scope, sleep};
use std::time::Duration;

use crate::failover::hosts;
use crate::support::fake::{Fake, black_hole, silence};
use crate::support::service::{
    COPY, SERVICE, SESSIONS, SIZE, Service, callers, most_sessions, sessions, start, tables,
    terminate_sessions, while_frozen,
};
use crate::support::{
    RDS, admin, at_port, builder, changed, eventually, file, kill, run_of, then_the_good_one, with,
};
use local_rds::{ENDPOINT, Relay};
use rustix::process::Signal;

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
    logged("500 Internal Server Error", "querying: db error: ERROR: ");
    logged("500 Internal Server Error", "\"data_directory\"");
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
        println!("{carried} answers in 2 s, then {answered} in 3 s; {refused} refused");
        assert!(times == 3 || refused > 0);
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
        // On a machine that stops for a moment, a cancel request may come before the query or too late; then the
        // server ends the session by itself.
        let count = |words: &str| rds.log().unwrap().matches(words).count();
        let cancelled = || count("canceling statement due to user request");
        let lost = || count("connection to client lost");
        eventually("each has ended", || cancelled() + lost() >= nth * SIZE);
        assert!(cancelled() > lost(), "{}", rds.log().unwrap());
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
    assert!(sessions(&rds).len() <= SIZE);
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
