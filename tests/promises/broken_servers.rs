//! When a server breaks down, at any point, the program ends with an error and within its limits.
//!
//! | when                                  | what the server does                                    |
//! |---------------------------------------|---------------------------------------------------------|
//! | before TCP is connected               | does not answer; refuses                                |
//! | after accept, SSLRequest, ClientHello | falls silent; closes; sends half a message or garbage   |
//! | after start-up, the password, a query | the same, with TLS and without                          |
//! | in its answer                         | sends no row, several rows, another type                |
//! | as a real server does                 | shuts down; has no free connection; loses its processes |
//!
//! The tests recognize a limit by the words of the error and not by a clock, so they pass on a busy machine.
//! With several hosts, the program goes on to the next host after a failure; a host that falls silent ends the run.

use std::io::Error;
use std::thread::scope;

use crate::support::fake::{
    CLEARTEXT_PASSWORD, Fake, WELCOME, Wire, asleep, black_hole, message, only_says, own_tls,
    silence, startup, tls,
};
use crate::support::page::{between, section};
use crate::support::{
    LOCKED, PLAIN, RDS, Run, UNSET, admin, at, builder, demo, eventually, full, kill,
    shutting_down, terminate, then_the_good_one, waits_for_more_to_recover, while_it_starts,
    while_the_query_runs, with,
};
use local_rds::ENDPOINT;
use rustix::process::Signal;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

/// The points at which the client waits for a server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Point {
    Accept,
    SslRequest,
    ClientHello,
    Startup,
    Password,
    Query,
}
use Point::*;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    Silence,
    Close,
    HalfAMessage,
    Garbage,
}
use Fault::*;

const POINTS: [Point; 6] = [Accept, SslRequest, ClientHello, Startup, Password, Query];
const FAULTS: [Fault; 4] = [Silence, Close, HalfAMessage, Garbage];

async fn break_down(
    mut wire: impl AsyncRead + AsyncWrite + Unpin,
    fault: Fault,
    half: &[u8],
) -> Result<(), Error> {
    match fault {
        Silence => return silence(wire).await,
        Close => {}
        HalfAMessage => wire.write_all(half).await?,
        Garbage => {
            wire.write_all(b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8\xf7\xf6")
                .await?
        }
    }
    wire.shutdown().await
}

/// Acts as a server up to `point`, with TLS or without, and then breaks down.
pub async fn server(
    wire: Wire,
    acceptor: Option<tokio_rustls::TlsAcceptor>,
    point: Point,
    fault: Fault,
) -> Result<(), Error> {
    if point == Accept {
        return break_down(wire, fault, b"").await;
    }
    let Some(acceptor) = acceptor else {
        return in_session(wire, point, fault).await;
    };
    if let SslRequest | ClientHello = point {
        let mut wire = wire;
        startup(&mut wire).await?;
        if point == ClientHello {
            wire.write_all(b"S").await?;
        }
        return break_down(wire, fault, b"\x16\x03\x03\0\x7a\x02").await;
    }
    in_session(tls(wire, &acceptor).await?, point, fault).await
}

async fn in_session<W: AsyncRead + AsyncWrite + Unpin>(
    mut wire: W,
    point: Point,
    fault: Fault,
) -> Result<(), Error> {
    startup(&mut wire).await?;
    if point == Startup {
        return break_down(wire, fault, b"R\0\0\0\x08\0\0").await;
    }
    wire.write_all(CLEARTEXT_PASSWORD).await?;
    wire.flush().await?;
    message(&mut wire).await?;
    if point == Password {
        return break_down(wire, fault, b"R\0\0\0\x08\0\0").await;
    }
    answer(&mut wire, b"").await?;
    break_down(wire, fault, b"1\0\0\0\x042\0\0\0\x04T\0\0\0\xff\0\x01").await
}

/// Ends the log-in, waits for the query, and sends this answer.
async fn answer<W: AsyncRead + AsyncWrite + Unpin>(
    wire: &mut W,
    answer: &[u8],
) -> Result<(), Error> {
    wire.write_all(WELCOME).await?;
    wire.flush().await?;
    while message(wire).await?.0 != b'S' {}
    wire.write_all(answer).await?;
    wire.flush().await
}

/// The words of the error that the program must end with.
fn cause(with_tls: bool, point: Point, fault: Fault) -> &'static str {
    match (with_tls, point, fault) {
        (_, _, Silence) => "no answer within",
        (true, Accept | SslRequest, Close) | (true, Accept, HalfAMessage) => "early eof",
        (true, Accept | SslRequest, _) => "server does not support TLS",
        (_, ClientHello, Close | HalfAMessage) => "tls handshake eof",
        (_, ClientHello, Garbage) => "received corrupt message",
        (_, _, Close) | (_, Accept, HalfAMessage) => "connection closed",
        (_, _, HalfAMessage) => "bytes remaining on stream",
        (_, _, Garbage) => "invalid message length",
    }
}

#[test]
fn every_fault_at_every_point_is_an_error_within_the_time_allowed() {
    let (acceptor, roots) = own_tls();
    let roots = roots.to_str().unwrap();
    let case = |with_tls: bool, point: Point, fault: Fault, limit: &str| {
        let acceptor = with_tls.then(|| acceptor.clone());
        let fake = Fake::new(move |wire| server(wire, acceptor.clone(), point, fault));
        let roots = if with_tls { roots } else { UNSET };
        let change = [("DB_CA_CERT", roots), ("PG.CONNECT_TIMEOUT", limit)];
        let run = at(fake.port, &RDS, &change);
        run.failed(&[
            ENDPOINT,
            &fake.port.to_string(),
            cause(with_tls, point, fault),
        ]);
        if fault == Silence {
            // Connecting to one host may take twice `PG.CONNECT_TIMEOUT`, which is 5 s by default.
            let limit = if limit == "2" { "4" } else { "10" };
            run.failed(&[&format!("no answer within {limit}s")]);
        }
        let doing = match point {
            Query => "Error: querying",
            _ => "Error: connecting to",
        };
        run.failed(&[doing]);
    };
    let asleep = asleep(RDS.port()).port;
    let page = section("docs/rds.md", "Aurora with express configuration");
    let limit = between(&page, "env PG.CONNECT_TIMEOUT=", " ");
    scope(|scope| {
        // A database that wakes up is no error if the limit is as long as the README says.
        scope.spawn(|| at(asleep, &RDS, &[("PG.CONNECT_TIMEOUT", limit)]).succeeded());
        scope.spawn(|| at(asleep, &RDS, &[]).failed(&[ENDPOINT, "no answer within 10s"]));
        for (with_tls, points) in [
            (true, &POINTS[..]),
            (false, &[Accept, Startup, Password, Query]),
        ] {
            for point in points {
                for fault in FAULTS {
                    scope.spawn(move || case(with_tls, *point, fault, "2"));
                }
                // Without a limit in the settings, the default applies.
                for none in [UNSET, "0", "-1"] {
                    scope.spawn(move || case(with_tls, *point, Silence, none));
                }
            }
        }
    });
}

/// Runs the program without TLS at a fake server.
fn plainly(fake: &Fake) -> Run {
    let change = [("DB_CA_CERT", UNSET), ("PG.CONNECT_TIMEOUT", "1")];
    at(fake.port, &RDS, &change)
}

#[test]
fn a_server_that_never_stops_talking_does_not_outlast_the_time_allowed() {
    let fake = Fake::new(|mut wire| async move {
        startup(&mut wire).await?;
        wire.write_all(&WELCOME[..9]).await?;
        loop {
            wire.write_all(b"S\0\0\0\x08a\0b\0").await?;
        }
    });
    plainly(&fake).failed(&["no answer within 2s"]);
}

#[test]
fn a_server_that_asks_for_billions_of_rounds_of_scram_does_not_get_them() {
    let fake = Fake::new(|mut wire| async move {
        let sasl = |kind: u32, body: &[u8]| {
            let length = (body.len() as u32 + 8).to_be_bytes();
            [b"R", &length[..], &kind.to_be_bytes(), body].concat()
        };
        startup(&mut wire).await?;
        wire.write_all(&sasl(10, b"SCRAM-SHA-256\0\0")).await?;
        let (_, first) = message(&mut wire).await?;
        let first = String::from_utf8_lossy(&first).into_owned();
        let nonce = first.split_once(",r=").unwrap().1;
        let challenge = format!("r={nonce}more,s=c2FsdHNhbHRzYWx0,i={}", u32::MAX);
        wire.write_all(&sasl(11, challenge.as_bytes())).await?;
        silence(wire).await
    });
    // The limits could not end that, because the computation never waits.
    plainly(&fake).failed(&[
        ENDPOINT,
        "SCRAM iteration count exceeds the maximum allowed",
    ]);
}

#[test]
fn an_answer_that_is_none_is_an_error() {
    // A RowDescription with one column of the type `name`, DataRows, and the end of the answer.
    const COLUMN: &[u8] = b"1\0\0\0\x042\0\0\0\x04T\0\0\0\x1a\0\x01c\0\0\0\0\0\0\0\0\0\0\x13\0\x40\xff\xff\xff\xff\0\0";
    const ROW: &[u8] = b"D\0\0\0\x12\0\x01\0\0\0\x08postgres";
    const NULL: &[u8] = b"D\0\0\0\x0a\0\x01\xff\xff\xff\xff";
    const NOT_UTF_8: &[u8] = b"D\0\0\0\x0c\0\x01\0\0\0\x02\xff\xfe";
    const NO_COLUMNS: &[u8] = b"1\0\0\0\x042\0\0\0\x04T\0\0\0\x06\0\0D\0\0\0\x06\0\0";
    const END: &[u8] = b"C\0\0\0\x0dSELECT 1\0Z\0\0\0\x05I";
    let run = |parts: &[&[u8]]| {
        let said = [parts.concat().as_slice(), END].concat();
        plainly(&Fake::new(move |mut wire: Wire| {
            let said = said.clone();
            async move {
                startup(&mut wire).await?;
                answer(&mut wire, &said).await?;
                silence(wire).await
            }
        }))
    };
    run(&[COLUMN, ROW]).succeeded();
    let rows = "query returned an unexpected number of rows";
    run(&[COLUMN]).failed(&["querying", ENDPOINT, rows]);
    run(&[COLUMN, ROW, ROW]).failed(&["querying", ENDPOINT, rows]);
    run(&[b"1\0\0\0\x042\0\0\0\x04n\0\0\0\x04"]).failed(&["querying", ENDPOINT, rows]);
    run(&[COLUMN, NULL]).failed(&[ENDPOINT, "error deserializing column 0"]);
    run(&[COLUMN, NOT_UTF_8]).failed(&[ENDPOINT, "error deserializing column 0"]);
    run(&[NO_COLUMNS]).failed(&[ENDPOINT, "invalid column `0`"]);
    run(&[b"1\0\0\0\x04E\0\0\0\x1bSERROR\0C42501\0Mdenied\0\0"])
        .failed(&[ENDPOINT, "ERROR: denied"]);
}

#[test]
fn a_port_where_nobody_listens_refuses() {
    at(1, &RDS, &[]).failed(&[&format!("connecting to {ENDPOINT}:1"), "Connection refused"]);
}

#[test]
fn a_packet_that_is_dropped_is_not_waited_for_for_minutes() {
    let (port, ..) = &black_hole();
    at(*port, &RDS, &[("PG.CONNECT_TIMEOUT", "1")]).failed(&[
        ENDPOINT,
        "error connecting to server",
        "connection timed out",
    ]);
}

#[test]
fn of_several_hosts_the_next_is_tried_in_time_if_the_first_fails() {
    let closes = Fake::new(|wire| server(wire, None, Accept, Close));
    let no_tls = only_says(b"N");
    let (hole, ..) = &black_hole();
    let good = RDS.port();
    scope(|scope| {
        for (name, port) in [
            (ENDPOINT, 1),
            (ENDPOINT, *hole),
            (ENDPOINT, closes.port),
            (ENDPOINT, no_tls.port),
            ("db.example.com", good),
        ] {
            for limit in ["2", UNSET] {
                scope.spawn(move || demo(&then_the_good_one(name, port, limit)).succeeded());
            }
        }
    });
}

#[test]
fn of_several_hosts_one_that_falls_silent_ends_it_within_the_time_of_all() {
    let after_accept = Fake::new(silence);
    let says_yes_and_no_more = only_says(b"S");
    scope(|scope| {
        for port in [after_accept.port, says_yes_and_no_more.port] {
            scope.spawn(move || {
                let run = demo(&then_the_good_one(ENDPOINT, port, "1"));
                run.failed(&[ENDPOINT, "no answer within 3s"]);
            });
        }
    });
}

#[test]
fn a_host_whose_name_is_gone_is_passed_over() {
    let hosts = ("PG.HOST", "gone.invalid,127.0.0.1");
    let change = [hosts, ("PG.HOSTADDR", UNSET), ("DB_CA_CERT", UNSET)];
    demo(&with(&PLAIN, &change)).succeeded();
    let gone = [("PG.HOST", "gone.invalid"), ("PG.HOSTADDR", UNSET)];
    demo(&with(&PLAIN, &gone)).failed(&[
        "connecting to gone.invalid:",
        "failed to lookup address information",
    ]);
}

#[test]
fn a_server_that_shuts_down_says_so() {
    let (rds, _session) = shutting_down();
    demo(&with(&rds, &[])).failed(&[ENDPOINT, "FATAL: the database system is shutting down"]);
}

#[test]
fn a_server_that_starts_up_says_so() {
    while_it_starts(|vars| {
        demo(vars).failed(&[ENDPOINT, "FATAL: the database system is starting up"]);
    });
}

#[test]
fn a_server_that_recovers_from_a_crash_says_so() {
    let rds = builder().start().unwrap();
    let waits = waits_for_more_to_recover(&rds);
    let mut admin = admin(&rds);
    admin.query("SELECT pg_reload_conf()", &[]).unwrap();
    // After this crash the server starts again, and waits for the command that restores more.
    let pid: i32 = admin
        .query_one("SELECT pg_backend_pid()", &[])
        .unwrap()
        .get(0);
    kill(Signal::KILL, pid);
    eventually("it starts anew", || {
        rds.log()
            .unwrap()
            .contains("database system was interrupted")
    });
    demo(&with(&rds, &[])).failed(&[ENDPOINT, "FATAL: the database system is in recovery mode"]);
    std::fs::remove_file(waits).unwrap();
    // A server that is ready stops sooner.
    eventually("it is ready", || {
        rds.log()
            .unwrap()
            .contains("ready to accept read-only connections")
    });
}

#[test]
fn a_server_without_a_free_connection_says_so() {
    let (rds, _sessions) = full();
    demo(&with(&rds, &[])).failed(&[ENDPOINT, "FATAL: remaining connection slots are reserved"]);
}

#[test]
fn a_session_that_is_ended_while_its_query_runs_says_why() {
    let rds = LOCKED.lock().unwrap();
    while_the_query_runs(&rds, "60", terminate).failed(&[
        ENDPOINT,
        "Error: querying",
        "FATAL: terminating connection due to administrator command",
    ]);
}

#[test]
fn a_process_that_is_killed_while_its_query_runs_is_an_end_without_a_word() {
    let rds = builder().start().unwrap();
    let run = while_the_query_runs(&rds, "60", |_, pid| kill(Signal::KILL, pid));
    run.failed(&[
        ENDPOINT,
        "Error: querying",
        "peer closed connection without sending TLS close_notify",
    ]);
}

#[test]
fn a_query_that_waits_for_a_lock_has_the_time_allowed_and_no_more() {
    let rds = LOCKED.lock().unwrap();
    while_the_query_runs(&rds, "2", |_, _| {}).failed(&[
        "Error: querying",
        ENDPOINT,
        "no answer within 4s",
    ]);
}
