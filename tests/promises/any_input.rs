//! What holds for any input, tested with many random inputs.
//!
//! - Any set of `PG.*` either means exactly its values or is refused by the name of a variable.
//! - Any user, password, database, options and application name reach the server as they are.
//! - Any file of `DB_CA_CERT` is either refused or leads to no trust in a server whose root is not in it.
//! - The password is in no output: here it always begins with [`SECRET`].

use std::collections::BTreeMap;
use std::fs;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use crate::support::fake::{CLEARTEXT_PASSWORD, Fake, message, startup};
use crate::support::{RDS, Run, demo, file, vars, with};
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use local_rds::{Authority, ENDPOINT, KeyType};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use tokio::io::AsyncWriteExt;
use tokio_postgres::Config;
use tokio_postgres::config::{
    ChannelBinding, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs,
};

const SECRET: &str = "s3cret";

fn many(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Text of any kind but a URL or a connection string, which are refused. An environment has no place for NUL.
fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[^\0]{1,20}", r"[ '\\=%,&a-z]{1,12}", "[a-z]{1,8}"]
        .prop_filter("may hold a secret", |text| {
            !text.contains("://") && !text.to_lowercase().contains("password=")
        })
}

/// A word that the keyword accepts, or a text that it refuses, which may be a misplaced password.
fn word(good: &'static [&'static str]) -> BoxedStrategy<String> {
    prop_oneof![9 => select(good).prop_map(str::to_owned), 1 => text().prop_map(|t| format!("{SECRET}{t}"))].boxed()
}

/// Keywords with values. Each list has as many entries as there are hosts.
fn keywords() -> impl Strategy<Value = BTreeMap<&'static str, String>> {
    let list = |of: &'static [&'static str]| {
        move |n: usize| prop::collection::vec(select(of), n).prop_map(|list| list.join(","))
    };
    let lists = (1..4_usize).prop_flat_map(move |hosts| {
        (
            list(&["a", "b.example", "größe", r"quo'te\", "/no/folder"])(hosts),
            list(&["127.0.0.1", "127.1.2.3", "::1"])(hosts),
            prop::option::of(prop_oneof![
                list(&["1", "2", "9"])(hosts),
                list(&["1", "65535"])(1)
            ]),
        )
    });
    let free = ["user", "dbname", "options", "application_name"]
        .map(|keyword| (Just(keyword), text().boxed()));
    let words = [
        (
            "password",
            text().prop_map(|text| format!("{SECRET}{text}")).boxed(),
        ),
        ("sslmode", word(&["disable", "prefer"])),
        ("sslnegotiation", word(&["postgres"])),
        ("connect_timeout", word(&["-1", "0", "1", "007", "+8"])),
        ("tcp_user_timeout", word(&["0", "30"])),
        ("keepalives", word(&["0", "1", "2"])),
        ("keepalives_idle", word(&["0", "60"])),
        ("keepalives_interval", word(&["0", "60"])),
        ("keepalives_retries", word(&["1", "9"])),
        (
            "target_session_attrs",
            word(&["any", "read-write", "read-only"]),
        ),
        ("channel_binding", word(&["disable", "prefer"])),
        ("load_balance_hosts", word(&["disable"])),
    ]
    .map(|(keyword, value)| (Just(keyword), value));
    let others: Vec<_> = free.into_iter().chain(words).collect();
    let count = others.len();
    (
        lists,
        prop::sample::subsequence(others, 0..=count).prop_flat_map(|chosen| chosen),
    )
        .prop_map(|((host, hostaddr, port), others)| {
            let mut all: BTreeMap<_, _> = others.into_iter().collect();
            all.extend([("host", host), ("hostaddr", hostaddr)]);
            all.extend(port.map(|port| ("port", port)));
            all
        })
}

/// What tokio-postgres documents these to mean.
fn meaning(keywords: &BTreeMap<&str, String>) -> Option<Config> {
    let mut config = Config::new();
    config.ssl_mode(SslMode::Disable);
    for (keyword, value) in keywords {
        let seconds = || match value.parse::<i64>() {
            Ok(seconds) => Some((seconds > 0).then(|| Duration::from_secs(seconds as u64))),
            Err(_) => None,
        };
        let config = &mut config;
        match (*keyword, value.as_str()) {
            ("user", _) => config.user(value),
            ("password", _) => config.password(value),
            ("dbname", _) => config.dbname(value),
            ("options", _) => config.options(value),
            ("application_name", _) => config.application_name(value),
            ("host", list) => list
                .split(',')
                .fold(config, |config, host| config.host(host)),
            ("hostaddr", list) => {
                for addr in list.split(',') {
                    config.hostaddr(addr.parse().ok()?);
                }
                config
            }
            ("port", list) => {
                for port in list.split(',') {
                    config.port(port.parse().ok()?);
                }
                config
            }
            // Without `DB_CA_CERT` there is no TLS, and both words mean that.
            ("sslmode", "disable" | "prefer") => config,
            ("sslnegotiation", "postgres") => config.ssl_negotiation(SslNegotiation::Postgres),
            ("load_balance_hosts", "disable") => {
                config.load_balance_hosts(LoadBalanceHosts::Disable)
            }
            ("channel_binding", "disable") => config.channel_binding(ChannelBinding::Disable),
            ("channel_binding", "prefer") => config.channel_binding(ChannelBinding::Prefer),
            ("target_session_attrs", "any") => config.target_session_attrs(TargetSessionAttrs::Any),
            ("target_session_attrs", "read-write") => {
                config.target_session_attrs(TargetSessionAttrs::ReadWrite)
            }
            ("target_session_attrs", "read-only") => {
                config.target_session_attrs(TargetSessionAttrs::ReadOnly)
            }
            ("keepalives", _) => config.keepalives(value.parse::<u64>().ok()? != 0),
            ("keepalives_retries", _) => config.keepalives_retries(value.parse().ok()?),
            (keyword, _) => match (keyword, seconds()?) {
                ("connect_timeout", Some(time)) => config.connect_timeout(time),
                ("tcp_user_timeout", Some(time)) => config.tcp_user_timeout(time),
                ("keepalives_idle", Some(time)) => config.keepalives_idle(time),
                ("keepalives_interval", Some(time)) => config.keepalives_interval(time),
                (_, None) => config,
                _ => return None,
            },
        };
    }
    Some(config)
}

proptest! {
    #![proptest_config(many(300))]

    #[test]
    fn any_settings_mean_what_they_say_or_are_refused_by_name(
        keywords in keywords(),
        prefix in select(&["PG.", "PG__", "pg."][..]),
    ) {
        let name = |keyword: &str| format!("{prefix}{}", keyword.to_uppercase());
        let run = demo(&vars(keywords.iter().map(|(keyword, value)| (name(keyword), value))));
        prop_assert_eq!(run.code, Some(1), "nobody listens there: {}", run.output);
        prop_assert!(!run.output.contains(SECRET), "{}", run.output);

        let wrong: Vec<_> = keywords.keys().filter(|keyword| {
            meaning(&BTreeMap::from([(**keyword, keywords[*keyword].clone())])).is_none()
        }).collect();
        if wrong.is_empty() {
            let settings = format!("Settings {{ pg: {:?}, db_ca_cert: None }}", meaning(&keywords).unwrap());
            prop_assert!(run.output.contains(&settings), "not {}, but {}", settings, run.output);
        } else {
            // The error has the keyword if it is the parser's, else the name of the variable.
            let named = |keyword: &str| {
                run.error().contains(&format!("`{keyword}`")) || run.error().contains(&name(keyword))
                    || keyword == "sslmode" && run.error().contains("PG.SSLMODE")
            };
            prop_assert!(wrong.iter().any(|keyword| named(keyword)), "{}", run.output);
        }
    }
}

/// What a client has sent: its StartupMessage, and its password.
type Said = [Vec<u8>; 2];

/// A server that asks every client for the password, and a channel with what the clients have sent.
static LISTENER: LazyLock<(Fake, Mutex<Receiver<Said>>)> = LazyLock::new(|| {
    let (send, receive) = channel();
    let fake = Fake::new(move |mut wire| {
        let send = send.clone();
        async move {
            let hello = startup(&mut wire).await?;
            wire.write_all(CLEARTEXT_PASSWORD).await?;
            let (_, password) = message(&mut wire).await?;
            send.send([hello, password]).unwrap();
            Ok(())
        }
    });
    (fake, receive.into())
});

proptest! {
    #![proptest_config(many(200))]

    #[test]
    fn any_text_reaches_the_server_as_it_is(
        texts in prop::collection::vec(text(), 4),
        password in text(),
    ) {
        let (fake, heard) = &*LISTENER;
        let password = format!("{SECRET}{password}");
        let port = fake.port.to_string();
        let [user, dbname, options, application] = &texts[..] else { unreachable!() };
        let run = demo(&vars([
            ("PG.HOSTADDR", "127.0.0.1"), ("PG.PORT", &port), ("PG.PASSWORD", &password),
            ("PG.USER", user), ("PG__DBNAME", dbname), ("pg.options", options),
            ("PG.APPLICATION_NAME", application),
        ]));
        prop_assert!(run.error().contains("connection closed"), "{}", run.output);
        prop_assert!(!run.output.contains(SECRET), "{}", run.output);
        let [hello, said] = heard.lock().unwrap().recv_timeout(Duration::from_secs(60)).unwrap();
        let expected = format!(
            "client_encoding\0UTF8\0user\0{user}\0database\0{dbname}\0options\0{options}\0\
             application_name\0{application}\0\0"
        );
        prop_assert_eq!(String::from_utf8_lossy(&hello[4..]), expected);
        prop_assert_eq!(said, format!("{password}\0").into_bytes());
    }
}

/// Two roots with a private key and comments around them. The file is so short that each change may hit any part.
static BUNDLE: LazyLock<String> = LazyLock::new(|| {
    let rds = fs::read_to_string("ca-certificates/global-bundle.pem").unwrap();
    let rsa = rds
        .split_inclusive("-----END CERTIFICATE-----\n")
        .next()
        .unwrap();
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let key = authority.issue(ENDPOINT, |_| {}).unwrap().key;
    format!("# roots\n{rsa}\n{key}{}# end\n", authority.root())
});

#[derive(Clone, Debug)]
enum Change {
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, u8),
    CutAfter(Index),
    RemoveLine(Index),
    RepeatLine(Index),
    SwapLines(Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<Index>;
    prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(i, byte)| Change::Set(i, byte)),
        4 => (index(), select(&b"AZaz09+/=-\r\n "[..])).prop_map(|(i, byte)| Change::Set(i, byte)),
        2 => (index(), prop::collection::vec(any::<u8>(), 1..5)).prop_map(|(i, b)| Change::Insert(i, b)),
        2 => (index(), any::<u8>()).prop_map(|(i, n)| Change::Remove(i, n)),
        1 => index().prop_map(Change::CutAfter),
        2 => index().prop_map(Change::RemoveLine),
        2 => index().prop_map(Change::RepeatLine),
        2 => (index(), index()).prop_map(|(i, j)| Change::SwapLines(i, j)),
    ]
}

fn changed(mut file: Vec<u8>, change: &Change) -> Vec<u8> {
    let size = file.len();
    if size == 0 {
        return file;
    }
    match change {
        Change::Set(i, byte) => file[i.index(size)] = *byte,
        Change::Insert(i, bytes) => {
            file.splice(i.index(size)..i.index(size), bytes.iter().copied());
        }
        Change::Remove(i, count) => {
            file.drain(i.index(size)..size.min(i.index(size) + usize::from(*count)));
        }
        Change::CutAfter(i) => file.truncate(i.index(size)),
        Change::RemoveLine(i) => edit_lines(&mut file, |all| {
            all.remove(i.index(all.len()));
        }),
        Change::RepeatLine(i) => edit_lines(&mut file, |all| {
            all.insert(i.index(all.len()), all[i.index(all.len())]);
        }),
        Change::SwapLines(i, j) => edit_lines(&mut file, |all| {
            let count = all.len();
            all.swap(i.index(count), j.index(count));
        }),
    }
    file
}

fn edit_lines(file: &mut Vec<u8>, edit: impl FnOnce(&mut Vec<&[u8]>)) {
    let mut all = file.split_inclusive(|byte| *byte == b'\n').collect();
    edit(&mut all);
    *file = all.concat();
}

/// How many blocks of base64 begin as a certificate does. The blocks are read less strictly than PEM is defined.
fn sequences(file: &[u8]) -> usize {
    let text = String::from_utf8_lossy(file);
    let blocks = text.split("-----BEGIN").skip(1).map(|block| {
        let body = block.split_once("-----").unwrap_or_default().1;
        let body = body.split("-----").next().unwrap_or_default();
        let lax = GeneralPurposeConfig::new()
            .with_decode_allow_trailing_bits(true)
            .with_decode_padding_mode(DecodePaddingMode::RequireNone);
        let letter = |c: &char| c.is_ascii_alphanumeric() || ['+', '/'].contains(c);
        GeneralPurpose::new(&STANDARD, lax).decode(body.chars().filter(letter).collect::<String>())
    });
    blocks
        .filter(|block| block.as_ref().is_ok_and(|der| der.starts_with(&[0x30])))
        .count()
}

/// How many roots the program has read from a file with this content, and how its run with [`RDS`] ended.
fn roots_of(content: &[u8]) -> (usize, Run) {
    let path = file(content);
    let run = demo(&with(&RDS, &[("DB_CA_CERT", path.to_str().unwrap())]));
    let count = run.output.lines().find_map(|line| {
        let (_, count) = line.strip_suffix(" found")?.rsplit_once(": ")?;
        count.parse().ok()
    });
    (count.unwrap_or(0), run)
}

#[test]
fn the_file_as_it_is_yields_its_two_roots() {
    let (count, run) = roots_of(BUNDLE.as_bytes());
    run.failed(&["invalid peer certificate: UnknownIssuer"]);
    assert_eq!(count, 2);
    // With the root of the server in the file, the program connects.
    let root = fs::read_to_string(RDS.roots()).unwrap();
    let (count, run) = roots_of(format!("{}{root}", *BUNDLE).as_bytes());
    run.succeeded();
    assert_eq!(count, 3);
}

proptest! {
    #![proptest_config(many(300))]

    #[test]
    fn any_file_yields_no_root_that_is_not_in_it(changes in prop::collection::vec(change(), 1..4)) {
        let file = changes.iter().fold(BUNDLE.clone().into_bytes(), changed);
        let (count, run) = roots_of(&file);
        prop_assert_eq!(run.code, Some(1), "{}", run.output);
        if count == 0 {
            prop_assert!(run.error().contains("root certificates"), "{}", run.output);
        } else {
            prop_assert!(run.error().contains("invalid peer certificate"), "{}", run.output);
            prop_assert!(count <= sequences(&file), "{}", run.output);
        }
    }
}
