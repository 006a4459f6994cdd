//! Counts how often the program waits for the server, and how many roots it reads. The relay delays each message by far
//! more than a busy machine does, so these tests may run beside others.

use std::time::Duration;

use crate::support::{PLAIN, RDS, TLS_1_2, UNSET, at, builder, demo, with};
use local_rds::{LocalRds, Relay};

/// TCP, SSLRequest, TLS, start-up, two for SCRAM, and the query.
pub const STOCK_ROUND_TRIPS: usize = 7;

/// The round trips of a run with the variables of `rds` and with `change` on top.
#[track_caller]
fn round_trips(rds: &LocalRds, change: &[(&str, &str)]) -> usize {
    let relay = Relay::new(rds.port(), Duration::from_millis(50)).unwrap();
    at(relay.port(), rds, change).succeeded();
    let [round_trips] = relay.round_trips()[..] else {
        panic!("more than one connection")
    };
    round_trips
}

#[test]
fn a_stock_server_is_asked_and_waited_for_seven_times() {
    assert_eq!(round_trips(&RDS, &[]), STOCK_ROUND_TRIPS);
}

#[test]
fn direct_tls_saves_one() {
    match RDS.version().unwrap() {
        17.. => assert_eq!(round_trips(&RDS, &[("PG.SSLNEGOTIATION", "direct")]), 6),
        old => eprintln!("PostgreSQL {old} has no direct TLS: not tested"),
    }
}

#[test]
fn without_tls_it_is_two_fewer() {
    assert_eq!(round_trips(&PLAIN, &[("DB_CA_CERT", UNSET)]), 5);
}

#[test]
fn tls_1_2_takes_one_more() {
    assert_eq!(round_trips(&TLS_1_2, &[]), 8);
}

#[test]
fn a_server_with_another_curve_alone_takes_one_more_and_works() {
    let builder = builder().setting("ssl_ecdh_curve", "secp384r1");
    let rds = builder.start().unwrap();
    assert_eq!(round_trips(&rds, &[]), 8);
}

#[test]
fn all_of_the_bundle_is_loaded_and_no_more() {
    for (file, count) in [
        ("ca-certificates/global-bundle.pem", 108),
        (RDS.roots().to_str().unwrap(), 1),
    ] {
        let run = demo(&with(&RDS, &[("DB_CA_CERT", file)]));
        assert!(
            run.output
                .contains(&format!("certificates from {file}: {count} found\n")),
            "{}",
            run.output
        );
    }
}
