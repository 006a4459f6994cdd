//! A look-up of the host's name that gets no answer ends at the limit, and so does the process.

use std::process::Command;
use std::thread::scope;
use std::time::{Duration, Instant};

use crate::support::service::SERVICE;
use crate::support::{PROGRAM, file};

/// The program in a network of its own, whose two DNS servers never answer: their addresses lead nowhere.
const SILENT: &str = "
ip link set lo up && ip route add 192.0.2.0/24 dev lo && mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";

/// How long a command takes to fail, and its error. None if the system does not allow a network of our own.
fn timed(command: &[&str]) -> Option<(Duration, String)> {
    // A look-up gives up after 4 s, twice the limit.
    let resolvers =
        file("nameserver 192.0.2.1\nnameserver 192.0.2.2\noptions timeout:2 attempts:1\n");
    let run = |command: &[&str]| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--net", "--mount"]);
        unshare
            .args(["sh", "-c", SILENT])
            .arg(&resolvers)
            .args(command);
        unshare.env_remove("RUST_BACKTRACE").output()
    };
    if !run(&["true"]).is_ok_and(|output| output.status.success()) {
        eprintln!(
            "no network of our own, with `unshare` and `ip`: DNS that never answers is not tested"
        );
        return None;
    }
    let start = Instant::now();
    let output = run(command).unwrap();
    let time = start.elapsed();
    assert!(!output.status.success(), "{output:?}");
    Some((time, String::from_utf8(output.stderr).unwrap()))
}

#[test]
fn dns_that_never_answers_ends_at_the_limit_and_the_process_is_gone_then() {
    let ends = |program: &str, expected: &[&str]| {
        let host = ["PG.HOST=db.example", "PG.CONNECT_TIMEOUT=1", "PG.USER=u"];
        let roots = "DB_CA_CERT=ca-certificates/global-bundle.pem";
        let timed = timed(&[&["env"], &host[..], &[roots, program]].concat());
        timed.map(|(time, error)| {
            for words in expected {
                assert!(error.contains(words), "no {words:?}: {error}");
            }
            time
        })
    };
    let limit = "connecting to db.example:5432: no answer within 2s";
    let service = SERVICE.to_str().unwrap();
    let asking = [
        "asking db.example:5432",
        "Timeout occurred while creating a new object",
    ];
    let (resolver, times) = scope(|scope| {
        let program = scope.spawn(|| ends(PROGRAM, &[limit]));
        let service = scope.spawn(|| ends(service, &asking));
        let resolver = timed(&["getent", "ahosts", "db.example"]);
        (resolver, [program, service].map(|run| run.join().unwrap()))
    });
    let Some((resolver, _)) = resolver else {
        return;
    };
    for time in times.map(Option::unwrap) {
        // The run must end well before the look-up does.
        assert!(
            time.mul_f64(1.25) < resolver,
            "{time:?}, and the resolver gives up after {resolver:?}"
        );
    }
}
