//! After many runs, eight at a time, the server has no connection left, and no error in its log.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{admin, builder, demo, eventually, with};

#[test]
fn five_hundred_runs_leave_no_connection_and_no_error_behind() {
    let builder = builder().setting("log_min_messages", "debug1");
    let rds = builder.setting("log_disconnections", "on").start().unwrap();
    let vars = with(&rds, &[("RUST_LOG", "info")]);
    let begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while begun.fetch_add(1, Ordering::Relaxed) < 500 {
                    demo(&vars).succeeded();
                }
            });
        }
    });

    let ours = "SELECT FROM pg_stat_activity WHERE usename = 'postgres'";
    eventually("no connection is left", || {
        admin(&rds).query(ours, &[]).unwrap().is_empty()
    });
    let ended = || rds.log().unwrap().matches("disconnection: ").count();
    eventually("each has ended", || ended() >= 500);
    let log = rds.log().unwrap();
    for sign in [
        "ERROR:",
        "FATAL:",
        "PANIC:",
        "WARNING:",
        "unexpected EOF",
        "could not",
        "SSL error",
    ] {
        let lines: Vec<_> = log.lines().filter(|line| line.contains(sign)).collect();
        assert!(lines.is_empty(), "{lines:?}");
    }
}
