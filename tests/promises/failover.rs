//! Two servers, a primary and its standby: the same variables lead to the primary before a failover and after.

use crate::support::{Var, admin, builder, changed, demo, eventually, file, with};
use local_rds::{ENDPOINT, LocalRds};

/// The variables that lead to these servers, with `change` on top.
pub fn hosts(of: &[&LocalRds], change: &[(&str, &str)]) -> Vec<Var> {
    let list = |entry: &dyn Fn(&LocalRds) -> String| {
        of.iter()
            .map(|rds| entry(rds))
            .collect::<Vec<_>>()
            .join(",")
    };
    let host = list(&|_| ENDPOINT.to_owned());
    let hostaddr = list(&|_| "127.0.0.1".to_owned());
    let port = list(&|rds| rds.port().to_string());
    let lists = [
        ("PG.HOST", &*host),
        ("PG.HOSTADDR", &*hostaddr),
        ("PG.PORT", &*port),
    ];
    with(of[0], &[&lists, change].concat())
}

/// How often the master user has logged in to the server.
fn sessions(rds: &LocalRds) -> usize {
    rds.log()
        .unwrap()
        .matches("connection authorized: user=postgres")
        .count()
}

/// Runs the program, and asserts that it has logged in to `there`.
#[track_caller]
fn ends_up(there: &LocalRds, vars: &[Var]) {
    let before = sessions(there);
    demo(vars).succeeded();
    eventually("it has been there", || sessions(there) == before + 1);
}

#[test]
fn the_same_variables_find_the_primary_before_a_failover_and_after() {
    let primary = builder().setting("log_connections", "on").start().unwrap();
    let standby = primary.standby().unwrap();

    let read_write = ("PG.TARGET_SESSION_ATTRS", "read-write");
    let read_only = ("PG.TARGET_SESSION_ATTRS", "read-only");
    let both = [[&primary, &standby], [&standby, &primary]];
    for of in both {
        ends_up(&primary, &hosts(&of, &[read_write]));
        ends_up(&standby, &hosts(&of, &[read_only]));
        ends_up(of[0], &hosts(&of, &[]));
    }
    demo(&hosts(&[&standby], &[read_write])).failed(&[ENDPOINT, "database does not allow writes"]);
    demo(&hosts(&[&primary], &[read_only])).failed(&[ENDPOINT, "database is not read only"]);

    // If each run draws a host at random, forty runs miss one of the two once in 2^39 times.
    let before = [&primary, &standby].map(sessions);
    for _ in 0..40 {
        demo(&hosts(
            &[&primary, &standby],
            &[("PG.LOAD_BALANCE_HOSTS", "random")],
        ))
        .succeeded();
    }
    eventually("both have been reached", || {
        sessions(&primary) > before[0] && sessions(&standby) > before[1]
    });

    let variables = both.map(|of| hosts(&of, &[read_write]));
    admin(&standby).query("SELECT pg_promote()", &[]).unwrap();
    // The file of the root certificate is deleted with the primary, so the standby needs a copy.
    let roots = file(std::fs::read(primary.roots()).unwrap());
    drop(primary);
    for vars in variables {
        let vars = changed(vars, &[("DB_CA_CERT", roots.to_str().unwrap())]);
        ends_up(&standby, &vars);
    }
}
