//! The tables of the README are complete: each setting is accepted, and each error happens.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread::scope;

use crate::service::log_of_a_bad_day;
use crate::support::fake::{Fake, black_hole, only_says, own_tls, silence, startup, tls};
use crate::support::page::{quoted, readme};
use crate::support::service::SERVICE;
use crate::support::{
    KEYWORDS, RDS, Run, UNSET, Var, at, builder, demo, file, full, run_of, vars, while_it_starts,
    with,
};
use local_rds::{Authority, ENDPOINT, IAM_USER, KeyType, LocalRds, ServerCertificate};
use rcgen::{
    BasicConstraints, CertificateParams, IsCa, KeyPair, PKCS_ECDSA_P384_SHA384, SigningKey,
};
use tokio::io::AsyncWriteExt;
use x509_cert::certificate::{Certificate, Version};
use x509_cert::der::asn1::BitString;
use x509_cert::der::pem::LineEnding;
use x509_cert::der::{Decode, Encode, EncodePem};

/// A row of a table, and where it stands.
struct Row {
    line: usize,
    cells: Vec<String>,
}

/// The rows of each table under a heading.
fn tables(heading: &str) -> Vec<Vec<Row>> {
    let readme = readme();
    let lines: Vec<_> = readme.lines().enumerate().collect();
    let start = lines
        .iter()
        .position(|(_, line)| *line == format!("## {heading}"));
    let section = lines[start.unwrap() + 1..].iter();
    let section: Vec<_> = section
        .take_while(|(_, line)| !line.starts_with("## "))
        .collect();
    let tables = section.split(|(_, line)| !line.starts_with('|'));
    let tables = tables.filter(|table| !table.is_empty());
    let row = |(nth, line): &&(usize, &str)| Row {
        line: nth + 1,
        cells: line
            .trim_matches('|')
            .split(" | ")
            .map(|cell| cell.trim().to_owned())
            .collect(),
    };
    tables
        .map(|table| table.iter().skip(2).map(row).collect())
        .collect()
}

#[test]
fn its_table_of_settings_has_all_that_are_accepted_with_values_that_are() {
    let mut listed = BTreeSet::new();
    for Row { line, cells } in tables("Settings").remove(0) {
        let name = quoted(&cells[0])[0].to_owned();
        for value in quoted(&cells[1])
            .into_iter()
            .filter(|v| !v.starts_with("PG.") && *v != "DB_CA_CERT")
        {
            let mut all = BTreeMap::from([
                ("PG.HOST", "localhost"),
                ("PG.PORT", "1"),
                ("DB_CA_CERT", "ca-certificates/global-bundle.pem"),
            ]);
            all.insert(&name, value);
            let run = demo(&vars(all));
            for refusal in ["unknown option", "invalid value for option", "is empty"] {
                assert!(
                    !run.error().contains(refusal),
                    "README.md:{line}: {name}={value} is refused: {}",
                    run.error()
                );
            }
        }
        listed.insert(name);
    }
    for name in ["DB_CA_CERT", "PG.HOST", "PG.PASSWORD", "RUST_LOG"] {
        assert!(
            listed.contains(name),
            "{name} is not in the table of settings"
        );
    }
    let ours = KEYWORDS.map(|(keyword, _)| format!("PG.{}", keyword.to_uppercase()));
    let known = |name: &String| ours.contains(name) || name == "DB_CA_CERT" || name == "RUST_LOG";
    let unknown: Vec<_> = listed.iter().filter(|name| !known(name)).collect();
    assert!(
        unknown.is_empty(),
        "the program has no settings {unknown:?}: take them out of the table"
    );
}

/// Servers with certificates that are not like those of RDS, as people make them with openssl: one of
/// X.509 v1, and one that is its own authority.
fn not_rds() -> [LocalRds; 2] {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let mut own = CertificateParams::new([ENDPOINT.to_owned()]).unwrap();
    own.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let own = own.self_signed(&key).unwrap();

    // rcgen makes v3 only. In v1 there is neither a version nor an extension.
    let mut v1 = Certificate::from_der(own.der()).unwrap();
    v1.tbs_certificate.version = Version::V1;
    v1.tbs_certificate.extensions = None;
    let signature = key.sign(&v1.tbs_certificate.to_der().unwrap()).unwrap();
    v1.signature = BitString::from_bytes(&signature).unwrap();

    [v1.to_pem(LineEnding::LF).unwrap(), own.pem()].map(|leaf| {
        let certificate = ServerCertificate {
            leaf,
            subordinate: String::new(),
            key: key.serialize_pem(),
        };
        let builder = LocalRds::builder().certificate(&certificate, &own.pem());
        builder.start().unwrap()
    })
}

/// The log-in at a server that asks PAM about its users, as RDS does about those with IAM tokens. None if PostgreSQL
/// is built without PAM.
fn pam() -> Option<Run> {
    let iam = [("PG.USER", IAM_USER), ("PG.PASSWORD", &RDS.iam_token())];
    let hba = file(format!(
        "local all all trust\nhostssl all {IAM_USER} 127.0.0.1/32 pam\n"
    ));
    fs::set_permissions(&hba, fs::Permissions::from_mode(0o644)).unwrap();
    let builder = builder().setting("hba_file", hba.to_str().unwrap());
    match builder.start() {
        Err(error) if error.to_string().contains("\"pam\": not supported") => {
            eprintln!("this PostgreSQL is built without PAM: its refusal is not tested");
            None
        }
        rds => Some(demo(&with(&rds.unwrap(), &iam))),
    }
}

/// The words of the one error that not every PostgreSQL can provoke.
const PAM: &str = "PAM authentication failed for user";

/// Runs that end in the errors of the table, by the words that it knows them by.
fn provoked() -> BTreeMap<&'static str, Run> {
    let of = |change: &[(&str, &str)]| demo(&with(&RDS, change));
    let at = |port: u16, change: &[(&str, &str)]| {
        let limit = [("PG.CONNECT_TIMEOUT", "1")];
        at(port, &RDS, &[&limit, change].concat())
    };
    let (hole, ..) = &black_hole();
    let silent = Fake::new(silence);
    let no_tls = only_says(b"N");
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let yesterday = time::OffsetDateTime::now_utc() - time::Duration::DAY;
    let expired = authority.issue(ENDPOINT, |leaf| leaf.not_after = yesterday);
    let expired = expired.unwrap();
    let expired = LocalRds::builder().certificate(&expired, authority.root());
    let expired = expired.start().unwrap();
    // As with hybrid groups alone, the two have none in common.
    let other_group = builder().setting("ssl_ecdh_curve", "secp521r1");
    let other_group = other_group.setting("ssl_min_protocol_version", "TLSv1.3");
    let other_group = other_group.start().unwrap();
    let iam = [("PG.USER", IAM_USER), ("PG.PASSWORD", &RDS.iam_token())];
    let [v1, own] = not_rds().map(|rds| demo(&with(&rds, &[])));
    BTreeMap::from([
        ("connection timed out", at(*hole, &[])),
        ("no answer within", at(silent.port, &[])),
        (
            "failed to lookup address information",
            of(&[("PG.HOST", "gone.invalid:5432"), ("PG.HOSTADDR", UNSET)]),
        ),
        ("Connection refused", at(1, &[])),
        ("PG.HOST, which is not set", demo(&[])),
        ("unknown option", of(&[("PG.PASWORD", "x")])),
        ("set the same option", of(&[("PG__USER", "x")])),
        ("is empty", demo(&vars([("PG.HOST", "")]))),
        (
            "database \"…\" does not exist",
            of(&[("PG.DBNAME", "nothing")]),
        ),
        ("HandshakeFailure", demo(&with(&other_group, &[]))),
        ("invalid value for option", of(&[("PG.PORT", "x")])),
        ("no pg_hba.conf entry", of(&[("DB_CA_CERT", UNSET)])),
        ("root certificates", of(&[("DB_CA_CERT", "/nonexistent")])),
        (
            "UnknownIssuer",
            of(&[("DB_CA_CERT", "ca-certificates/global-bundle.pem")]),
        ),
        (
            "certificate not valid for name",
            of(&[("PG.HOST", "db.example.com")]),
        ),
        (
            "invalid dns name",
            of(&[("PG.HOST", "database-1.example:5432")]),
        ),
        ("certificate expired", demo(&with(&expired, &[]))),
        ("UnsupportedCertVersion", v1),
        ("CaUsedAsEndEntity", own),
        ("server does not support TLS", at(no_tls.port, &[])),
        (
            "password authentication failed",
            of(&[("PG.PASSWORD", "not the password")]),
        ),
        (
            "server did not use channel binding",
            of(&[iam.as_slice(), &[("PG.CHANNEL_BINDING", "require")]].concat()),
        ),
        (
            "database does not allow writes",
            of(&[
                ("PG.TARGET_SESSION_ATTRS", "read-write"),
                ("PG.OPTIONS", "-c default_transaction_read_only=on"),
            ]),
        ),
    ])
}

/// The logs of services that do not start, with errors of their own table.
fn services_that_do_not_start() -> BTreeMap<&'static str, String> {
    let ends = |vars: &[Var]| run_of(&SERVICE, vars).output;
    let silent = Fake::new(silence).port.to_string();
    let silent = [("PG.PORT", &*silent), ("PG.CONNECT_TIMEOUT", "1")];
    // The words of PgBouncer 1.18, of which there is none here.
    let (acceptor, roots) = own_tls();
    let pooler = Fake::new(move |wire| {
        let acceptor = acceptor.clone();
        async move {
            let mut wire = tls(wire, &acceptor).await?;
            startup(&mut wire).await?;
            let says = b"SFATAL\0C08P01\0Munsupported startup parameter: options\0\0";
            wire.write_all(b"E").await?;
            wire.write_u32(says.len() as u32 + 4).await?;
            wire.write_all(says).await?;
            wire.flush().await?;
            silence(wire).await
        }
    });
    let port = pooler.port.to_string();
    let pooler = [("PG.PORT", &*port), ("DB_CA_CERT", roots.to_str().unwrap())];
    let (full, _sessions) = full();
    BTreeMap::from([
        (
            "Timeout occurred while creating a new object",
            ends(&with(&RDS, &silent)),
        ),
        (
            "remaining connection slots are reserved",
            ends(&with(&full, &[])),
        ),
        ("the database system is starting up", while_it_starts(ends)),
        ("unsupported startup parameter", ends(&with(&RDS, &pooler))),
    ])
}

/// The log of one that runs, with the others.
fn a_service_that_runs() -> BTreeMap<&'static str, String> {
    let log = log_of_a_bad_day();
    let words = [
        "Timeout occurred while waiting for a slot",
        "cached plan must not change result type",
        "canceling statement due to statement timeout",
        "terminating connection due to administrator command",
    ];
    words.map(|words| (words, log.clone())).into()
}

#[test]
fn its_table_of_errors_has_the_words_of_errors_that_happen() {
    // At the same time, as they wait for most of it.
    let (mut provoked, pam, logged) = scope(|scope| {
        let pam = scope.spawn(pam);
        let logged = [services_that_do_not_start, a_service_that_runs].map(|log| scope.spawn(log));
        let provoked = provoked();
        let logged = logged.map(|log| log.join().unwrap());
        (provoked, pam.join().unwrap(), logged)
    });
    let without_pam = pam.is_none();
    provoked.extend(pam.map(|run| (PAM, run)));
    let mut logged: BTreeMap<_, _> = logged.into_iter().flatten().collect();
    let [errors, of_services] = <[_; 2]>::try_from(tables("When it does not work"))
        .ok()
        .unwrap();
    for Row { line, cells } in errors {
        let complete = cells.len() == 3 && cells.iter().all(|cell| !cell.is_empty());
        assert!(
            complete,
            "README.md:{line}: words, cause and remedy are wanted: {cells:?}"
        );
        let words = quoted(&cells[0]);
        if words == [PAM] && without_pam {
            continue;
        }
        let mut take = |words: &str| {
            provoked.remove(words).unwrap_or_else(|| {
                panic!(
                    "README.md:{line}: {words:?} is not provoked: add a run that does to `provoked`"
                )
            })
        };
        // "…" between words: all of them are in one error. A comma: each has its own.
        if cells[0].contains("` … `") {
            take(words[0]).failed(&words);
        } else {
            for words in words {
                take(words).failed(&words.split('…').collect::<Vec<_>>());
            }
        }
    }
    let missing = provoked.keys();
    assert!(
        provoked.is_empty(),
        "provoked, but without a row in the table of errors: {missing:?}"
    );

    for Row { line, cells } in of_services {
        assert_eq!(
            cells.len(),
            2,
            "README.md:{line}: words, and cause and remedy are wanted"
        );
        for words in quoted(&cells[0]) {
            let log = logged.remove(words);
            let log = log.unwrap_or_else(|| panic!("README.md:{line}: {words:?} is not logged"));
            assert!(
                log.contains(words),
                "README.md:{line}: no {words:?} in\n{log}"
            );
        }
    }
    let missing = logged.keys();
    assert!(
        logged.is_empty(),
        "logged, but without a row in the table: {missing:?}"
    );
}
