//! With `DB_CA_CERT`, a run has verified TLS or ends with an error. Without it, a run has plaintext and a warning.

use std::thread::scope;

use crate::support::{PLAIN, RDS, TLS_1_2, UNSET, demo, file, with};
use local_rds::{Authority, ENDPOINT, IAM_USER, KeyType, LocalRds, PASSWORD};

#[test]
fn connects_with_each_of_the_three_key_types() {
    let connects = |key_type| {
        let rds = LocalRds::builder().key_type(key_type).start().unwrap();
        demo(&with(&rds, &[])).succeeded();
        // The file for a real instance has many roots, and one of them is the instance's.
        let bundle = std::fs::read("ca-certificates/global-bundle.pem").unwrap();
        let both = file([bundle, std::fs::read(rds.roots()).unwrap()].concat());
        demo(&with(&rds, &[("DB_CA_CERT", both.to_str().unwrap())])).succeeded();
    };
    scope(|scope| {
        for key_type in [KeyType::Rsa2048, KeyType::Rsa4096, KeyType::Ecc384] {
            scope.spawn(move || connects(key_type));
        }
    });
}

/// The lines in the log of [`PLAIN`] about the connections of this application.
fn logged(application: &str) -> String {
    let name = format!("application_name={application}");
    let log = PLAIN.log().unwrap();
    let lines = log.lines().filter(|line| line.contains(&name));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_server_saw_tls_and_channel_binding() {
    let change = [
        ("PG.CHANNEL_BINDING", "require"),
        ("PG.APPLICATION_NAME", "bound"),
    ];
    demo(&with(&PLAIN, &change)).succeeded();
    assert!(logged("bound").contains("SSL enabled"));
}

#[test]
fn connects_with_tls_1_2_alone_as_on_rds_before_16() {
    demo(&with(&TLS_1_2, &[("PG.CHANNEL_BINDING", "require")])).succeeded();
}

#[test]
fn channel_binding_required_is_not_to_be_had_with_a_cleartext_password() {
    let iam = [("PG.USER", IAM_USER), ("PG.PASSWORD", &RDS.iam_token())];
    let binding = [("PG.CHANNEL_BINDING", "require")];
    demo(&with(&RDS, &[iam.as_slice(), &binding].concat()))
        .failed(&[ENDPOINT, "server did not use channel binding"]);
}

#[test]
fn logs_in_with_an_iam_token() {
    let token = RDS.iam_token();
    assert!(token.len() >= 3000, "{}", token.len());
    demo(&with(
        &RDS,
        &[("PG.USER", IAM_USER), ("PG.PASSWORD", &token)],
    ))
    .succeeded();
    demo(&with(
        &RDS,
        &[("PG.USER", IAM_USER), ("PG.PASSWORD", &token[1..])],
    ))
    .failed(&["password authentication failed for user \"iam_user\""]);
}

#[test]
fn an_iam_token_is_refused_without_tls_even_where_tls_is_not_forced() {
    let token = PLAIN.iam_token();
    let iam = [
        ("PG.USER", IAM_USER),
        ("PG.PASSWORD", &token),
        ("DB_CA_CERT", UNSET),
    ];
    demo(&with(&PLAIN, &iam)).failed(&["pg_hba.conf rejects connection", "no encryption"]);
}

#[test]
fn connects_without_tls_where_allowed_and_warns() {
    for mode in [UNSET, "disable", "prefer"] {
        let plainly = [
            ("DB_CA_CERT", UNSET),
            ("PG.SSLMODE", mode),
            ("PG.APPLICATION_NAME", "plain"),
        ];
        let run = demo(&with(&PLAIN, &plainly));
        run.succeeded();
        assert!(run.output.contains("WARN") && run.output.contains("no DB_CA_CERT, so no TLS"));
    }
    let log = logged("plain");
    assert_eq!(log.matches("connection authorized").count(), 3, "{log}");
    assert!(!log.contains("SSL enabled"), "{log}");
}

#[test]
fn is_refused_without_tls_where_it_is_forced() {
    demo(&with(&RDS, &[("DB_CA_CERT", UNSET)])).failed(&[
        ENDPOINT,
        "FATAL: no pg_hba.conf entry for host \"127.0.0.1\", user \"postgres\", database \"postgres\"",
    ]);
}

#[test]
fn requires_and_verifies_where_sslmode_says_so() {
    for mode in ["require", "verify-full"] {
        demo(&with(&RDS, &[("PG.SSLMODE", mode)])).succeeded();
        demo(&with(
            &RDS,
            &[
                ("PG.SSLMODE", mode),
                ("DB_CA_CERT", "ca-certificates/global-bundle.pem"),
            ],
        ))
        .failed(&[ENDPOINT, "invalid peer certificate: UnknownIssuer"]);
    }
}

#[test]
fn refuses_another_authority_with_the_very_same_names() {
    let other = file(Authority::new(KeyType::Rsa2048).unwrap().root());
    demo(&with(&RDS, &[("DB_CA_CERT", other.to_str().unwrap())])).failed(&[
        ENDPOINT,
        "error performing TLS handshake",
        "invalid peer certificate",
    ]);
}

#[test]
fn refuses_another_name_than_the_certificates() {
    for name in [
        "database-2.xq7f5vzbpq1x.ca-central-1.rds.amazonaws.com",
        "db.example.com",
    ] {
        demo(&with(&RDS, &[("PG.HOST", name)])).failed(&[
            &format!("connecting to {name}:{}", RDS.port()),
            &format!("certificate not valid for name \"{name}\""),
            ENDPOINT,
        ]);
    }
    demo(&with(&RDS, &[("PG.HOST", "127.0.0.1")]))
        .failed(&["certificate not valid for name \"127.0.0.1\""]);
}

#[test]
fn direct_tls_goes_past_a_server_older_than_17_only() {
    let run = demo(&with(&RDS, &[("PG.SSLNEGOTIATION", "direct")]));
    match RDS.version().unwrap() {
        17.. => run.succeeded(),
        old => {
            eprintln!("PostgreSQL {old} has no direct TLS: only its refusal is tested");
            run.failed(&[ENDPOINT, "error performing TLS handshake"]);
        }
    }
}

#[test]
fn the_handshake_is_shown_at_debug_and_no_secret() {
    let run = demo(&with(&RDS, &[("RUST_LOG", "debug")]));
    run.succeeded();
    let alpn = match RDS.version().unwrap() {
        17.. => "Some(",
        _ => "None",
    };
    for line in [
        format!("DnsName(\"{ENDPOINT}\")"),
        "Using ciphersuite TLS13_AES_256_GCM_SHA384".to_owned(),
        format!("ALPN protocol is {alpn}"),
    ] {
        assert!(run.output.contains(&line), "no {line} in {}", run.output);
    }
    assert!(!run.output.contains(PASSWORD), "{}", run.output);
}

#[test]
fn channel_binding_required_is_not_to_be_had_without_tls() {
    let binding = [("DB_CA_CERT", UNSET), ("PG.CHANNEL_BINDING", "require")];
    demo(&with(&PLAIN, &binding)).failed(&[ENDPOINT, "server did not use channel binding"]);
}
