//! An error about wrong input names the variable or the host, and shows no secret.
//!
//! | input                 | refused                                        | accepted, though it may look wrong     |
//! |-----------------------|------------------------------------------------|----------------------------------------|
//! | `DB_CA_CERT`          | 13 files without good roots                    | 6 files with roots and other text      |
//! | `PG.*`                | values out of range or of another kind         | all values that tokio-postgres accepts |
//! | any variable          | a value that is empty or not UTF-8             |                                        |
//! | `PG.HOST`             | with TLS: the folder of a socket, or no name   | without TLS: the folder of a socket    |
//! | all but `PG.PASSWORD` | a value that seems to hold a secret by mistake |                                        |

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;

use crate::support::fake::{SSL_REQUEST, only_says};
use crate::support::{PLAIN, PROGRAM, RDS, Run, UNSET, at, demo, file, with};
use local_rds::{Authority, ENDPOINT, KeyType, ServerCertificate};
use tempfile::TempDir;

/// Runs the program with a file of this content in `DB_CA_CERT`.
fn with_file(content: impl AsRef<[u8]>) -> Run {
    let file = file(content);
    let path = file.to_str().unwrap();
    let run = demo(&with(&RDS, &[("DB_CA_CERT", path)]));
    if run.code != Some(0) {
        run.failed(&["root certificates", path, "DB_CA_CERT"]);
    }
    run
}

fn root() -> String {
    fs::read_to_string(RDS.roots()).unwrap()
}

fn certificate() -> ServerCertificate {
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    authority.issue(ENDPOINT, |_| {}).unwrap()
}

#[test]
fn a_file_that_is_no_bundle_of_roots_is_refused() {
    let key = certificate().key;
    let root = root();
    let lines: Vec<&str> = root.lines().collect();
    let none = "none found";
    let damaged = "damaged PEM";
    for (content, why) in [
        ("".as_bytes(), none),
        (b"a line of text\n", none),
        (b"\0\xff\xfe\x7fELF binary \x80\x81", none),
        (key.as_bytes(), none),
        (root.replace("CERTIFICATE", "X509 CRL").as_bytes(), none),
        (
            root.replace("CERTIFICATE-----", "CERTIFICATE----")
                .as_bytes(),
            damaged,
        ),
        (lines[..lines.len() / 2].join("\n").as_bytes(), damaged),
        (lines[..lines.len() - 1].join("\n").as_bytes(), damaged),
        (
            root.replacen(lines[3], "not base64!", 1).as_bytes(),
            damaged,
        ),
        // Base64 that is valid, but not of a certificate.
        (
            root.replacen(lines[1], lines[2], 1).as_bytes(),
            "BadEncoding",
        ),
        (
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "BadEncoding",
        ),
        (
            b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
            "BadEncoding",
        ),
        // A damaged certificate after a good one.
        (
            format!("{root}{}", root.replacen(lines[1], lines[2], 1)).as_bytes(),
            "BadEncoding",
        ),
    ] {
        with_file(content).failed(&[why]);
    }
}

#[test]
fn a_private_key_in_the_wrong_place_is_not_quoted() {
    let key = certificate().key;
    let secret = key.lines().nth(1).unwrap();
    for content in [
        key.replace('\n', ""),
        key.replace('\n', " "),
        key[..key.len() - 5].to_owned(),
    ] {
        let run = with_file(&content);
        assert_ne!(run.code, Some(0));
        let bytes = format!("{:?}", &secret.as_bytes()[..20]);
        for secret in [&secret[..20], bytes.trim_matches(['[', ']'])] {
            assert!(!run.output.contains(secret), "{}", run.output);
        }
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    for (path, why) in [
        ("/nonexistent/bundle.pem", "No such file or directory"),
        ("/tmp", "Is a directory"),
        ("Cargo.toml/bundle.pem", "Not a directory"),
        (&"x".repeat(300), "File name too long"),
    ] {
        demo(&with(&RDS, &[("DB_CA_CERT", path)])).failed(&["DB_CA_CERT", path, why]);
    }
}

#[test]
fn a_file_that_may_not_be_read_is_named() {
    // Root may read every file, so another user runs the program, in a folder that this user can enter.
    let folder = TempDir::with_prefix_in("demo-", "/tmp").unwrap();
    let (program, file) = (folder.path().join("demo"), folder.path().join("bundle.pem"));
    // Not by `fs::copy`: a process that another test starts meanwhile would inherit the file, open for writing.
    let cp = std::process::Command::new("cp")
        .arg(PROGRAM)
        .arg(&program)
        .status();
    assert!(cp.unwrap().success());
    fs::write(&file, root()).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o0)).unwrap();
    let mut command = std::process::Command::new(program);
    if fs::read(&file).is_ok() {
        std::os::unix::process::CommandExt::uid(&mut command, 65_534);
    }
    let output = command
        .env_clear()
        .envs(RDS.env())
        .env("DB_CA_CERT", &file)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error.contains("DB_CA_CERT") && error.contains("Permission denied"),
        "{error}"
    );
}

#[test]
fn roots_with_more_around_them_are_accepted() {
    let root = root();
    let others = fs::read_to_string("ca-certificates/global-bundle.pem").unwrap();
    let certificate = certificate();
    let key = &certificate.key;
    for content in [
        root.replace('\n', "\r\n"),
        root.replace('\n', "\r"),
        format!("# the root of our instance\n\n{root}\n# and that is all"),
        format!("{others}{root}"),
        format!("{root}{others}"),
        format!("{key}{root}{key}{}", certificate.leaf),
    ] {
        with_file(content).succeeded();
    }
}

#[test]
fn the_systems_own_bundle_is_accepted_as_it_is() {
    // Readers may take this bundle for RDS Proxy. Systems such as macOS do not have it.
    let path = "/etc/ssl/certs/ca-certificates.crt";
    if fs::exists(path).unwrap() {
        demo(&with(&RDS, &[("DB_CA_CERT", path)]))
            .failed(&[ENDPOINT, "invalid peer certificate: UnknownIssuer"]);
    } else {
        eprintln!("no {path}: not tested");
    }
}

#[test]
fn a_value_out_of_its_range_or_not_of_its_kind_is_refused() {
    for (name, values) in [
        ("PG.SSLNEGOTIATION", &["tls", "Direct"][..]),
        (
            "PG.HOSTADDR",
            &["localhost", "127.0.0", "256.0.0.1", "127.0.0.1,", "::g"],
        ),
        (
            "PG.PORT",
            &["65536", "-1", "x", "5432x", "0x10", "5432 ", "1,x"],
        ),
        (
            "PG.CONNECT_TIMEOUT",
            &["ten", "1.5", "10s", "9223372036854775808"],
        ),
        ("PG.TCP_USER_TIMEOUT", &["ten", "1.5"]),
        ("PG.KEEPALIVES", &["on", "-1"]),
        ("PG.KEEPALIVES_IDLE", &["x", "1.5"]),
        ("PG.KEEPALIVES_INTERVAL", &["x", "1.5"]),
        ("PG.KEEPALIVES_RETRIES", &["x", "-1", "4294967296"]),
        ("PG.TARGET_SESSION_ATTRS", &["primary", "read_write"]),
        ("PG.CHANNEL_BINDING", &["on", "Require"]),
        ("PG.LOAD_BALANCE_HOSTS", &["on", "Random"]),
    ] {
        for value in values {
            let keyword = name[3..].to_lowercase();
            let run = demo(&with(&RDS, &[(name, value)]));
            run.failed(&[&format!("invalid value for option `{keyword}`")]);
            assert!(
                !run.output.contains(ENDPOINT),
                "it is no more than read: {}",
                run.output
            );
        }
    }
}

#[test]
fn port_0_is_a_port_where_nobody_listens() {
    at(0, &RDS, &[]).failed(&[&format!("connecting to {ENDPOINT}:0"), "os error"]);
}

#[test]
fn a_limit_of_any_length_is_none_to_overflow() {
    let (max, hosts) = (i64::MAX.to_string(), ["127.0.0.1"; 9].join(","));
    demo(&with(&RDS, &[("PG.CONNECT_TIMEOUT", &max)])).succeeded();
    let dead = [
        ("PG.HOST", &*hosts),
        ("PG.HOSTADDR", UNSET),
        ("PG.CONNECT_TIMEOUT", &max),
    ];
    at(1, &RDS, &dead).failed(&["connecting to", "Connection refused"]);
}

#[test]
fn an_empty_value_is_refused() {
    for name in [
        "PG.HOST",
        "PG.USER",
        "PG.PASSWORD",
        "PG__PORT",
        "PG.OPTIONS",
        "DB_CA_CERT",
    ] {
        let change = [(&*name.replace("__", "."), UNSET), (name, "")];
        demo(&with(&RDS, &change)).failed(&[&format!("{name} is empty or not UTF-8")]);
    }
}

#[test]
fn a_value_that_is_not_utf_8_is_refused_and_not_shown() {
    for name in [
        "PG.PASSWORD",
        "PG.HOST",
        "PG.USER",
        "PG__PASSWORD",
        "DB_CA_CERT",
    ] {
        let mut vars = with(&RDS, &[(&name.replace("__", "."), UNSET)]);
        vars.push((name.into(), OsStr::from_bytes(b"s3cret \xe9\xff").into()));
        let run = demo(&vars);
        run.failed(&[&format!("{name} is empty or not UTF-8")]);
        assert!(!run.output.contains("s3cret"), "{}", run.output);
    }
    // A name that is not UTF-8 is refused, too, if it begins as ours do.
    let mut vars = with(&RDS, &[]);
    vars.push((OsStr::from_bytes(b"PG.HOST\xff").into(), "x".into()));
    demo(&vars).failed(&["PG.HOST\u{fffd} must be PG.<KEYWORD>"]);
}

#[test]
fn a_socket_is_refused_where_tls_is_required_and_used_where_it_is_not() {
    let socket = RDS.socket();
    let socket = [
        ("PG.HOST", socket.to_str().unwrap()),
        ("PG.HOSTADDR", UNSET),
    ];
    demo(&with(&RDS, &socket)).failed(&[socket[0].1, "server does not support TLS"]);
    let plainly = [("DB_CA_CERT", UNSET), ("PG.USER", "rdsadmin")];
    demo(&with(&RDS, &[socket, plainly].concat())).succeeded();
    let nonexistent = [
        ("PG.HOST", "/nonexistent"),
        ("PG.HOSTADDR", UNSET),
        ("DB_CA_CERT", UNSET),
    ];
    demo(&with(&RDS, &nonexistent)).failed(&["/nonexistent", "No such file or directory"]);
}

#[test]
fn an_address_without_a_name_is_refused_where_tls_is_required() {
    let hello = only_says(b"S");
    let address = format!("connecting to [127.0.0.1], ports [{}]", hello.port);
    at(hello.port, &RDS, &[("PG.HOST", UNSET)]).failed(&[&address, "no hostname provided"]);
    assert_eq!(hello.heard(), [SSL_REQUEST]);
    demo(&with(&PLAIN, &[("PG.HOST", UNSET), ("DB_CA_CERT", UNSET)])).succeeded();
}

#[test]
fn a_name_that_cannot_be_one_is_an_error() {
    for name in [
        "under_score.example",
        "-",
        "ex\u{e4}mple.com",
        "*",
        "host:5432",
        "[::1]",
        "a..b",
    ] {
        demo(&with(&RDS, &[("PG.HOST", name)])).failed(&[&format!("connecting to {name}:")]);
    }
}

#[test]
fn what_the_server_does_not_accept_is_its_own_words() {
    for (name, value, why) in [
        (
            "PG.PASSWORD",
            "not the password",
            "FATAL: password authentication failed for user \"postgres\"",
        ),
        (
            "PG.USER",
            "nobody",
            "FATAL: password authentication failed for user \"nobody\"",
        ),
        (
            "PG.DBNAME",
            "nothing",
            "FATAL: database \"nothing\" does not exist",
        ),
        (
            "PG.OPTIONS",
            "-c nonsense=1",
            "FATAL: unrecognized configuration parameter \"nonsense\"",
        ),
        ("PG.PASSWORD", UNSET, "password missing"),
    ] {
        demo(&with(&RDS, &[(name, value)])).failed(&[ENDPOINT, why]);
    }
}
