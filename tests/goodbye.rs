//! The server sees every session end as it should.

mod support;

use local_rds::LocalRds;
use support::{demo, eventually, with};

/// Only at this level does PostgreSQL log a client that goes without a word.
const LEVEL: (&str, &str) = ("log_min_messages", "debug1");

#[test]
fn says_goodbye() {
    let builder = LocalRds::builder()
        .force_ssl(false)
        .setting(LEVEL.0, LEVEL.1);
    let rds = builder.setting("log_disconnections", "on").start().unwrap();
    demo(&with(&rds, &[])).succeeded();
    demo(&with(&rds, &[("DB_CA_CERT", "")])).succeeded();
    let over = |log: String| log.matches("disconnection: ").count();
    // Two of ours and two of the set-up; the server logs them after it has hung up.
    eventually("four sessions are over", || over(rds.log().unwrap()) == 4);
    let log = rds.log().unwrap();
    for sign in ["unexpected EOF", "could not receive data", "SSL error"] {
        assert!(!log.contains(sign), "{log}");
    }
}

#[test]
fn the_log_would_show_a_session_that_ends_without_goodbye() {
    let rds = LocalRds::builder()
        .setting(LEVEL.0, LEVEL.1)
        .start()
        .unwrap();
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(rds.socket())
        .port(rds.port())
        .user("rdsadmin")
        .dbname("postgres");
    // As a program leaves it that returns from `main` without waiting for the connection.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    drop(
        runtime
            .block_on(config.connect(tokio_postgres::NoTls))
            .unwrap(),
    );
    eventually("the server has noticed", || {
        rds.log().unwrap().contains("unexpected EOF")
    });
}
