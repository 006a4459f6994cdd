//! The program closes every session as the protocol wants it: the server logs no unexpected end.

use crate::support::{UNSET, admin_config, builder, demo, eventually, with};

#[test]
fn says_goodbye() {
    let rds = builder()
        .force_ssl(false)
        .setting("log_disconnections", "on")
        // Only at this level does PostgreSQL log a client that leaves without Terminate.
        .setting("log_min_messages", "debug1")
        .start()
        .unwrap();
    demo(&with(&rds, &[])).succeeded();
    demo(&with(&rds, &[("DB_CA_CERT", UNSET)])).succeeded();
    let over = |log: String| log.matches("disconnection: ").count();
    // Two sessions are the program's, and one has set up the server. The server logs an end after the client has left.
    eventually("three sessions are over", || over(rds.log().unwrap()) == 3);
    let log = rds.log().unwrap();
    for sign in ["unexpected EOF", "could not receive data", "SSL error"] {
        assert!(!log.contains(sign), "{log}");
    }

    // The log does show a client that ends without waiting for its connection.
    let config = admin_config(&rds);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let connecting = config.connect(tokio_postgres::NoTls);
    drop(runtime.block_on(connecting).unwrap());
    eventually("the server has noticed", || {
        rds.log().unwrap().contains("unexpected EOF")
    });
}
