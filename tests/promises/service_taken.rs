//! What people take from `examples/service.rs`, as its page says: its dependencies, its `Database` for a program of
//! their own, and code to put in place of some of it.

use std::path::Path;

use crate::support::fake::{CLEARTEXT_PASSWORD, Fake, message, own_tls, startup, tls};
use crate::support::page::{
    between, build, example, manifest, new_project, program, quoted, replaced, section, take,
};
use crate::support::service::{Service, dependencies};
use crate::support::{RDS, UNSET, admin, builder, changed, run_of, with};
use local_rds::ENDPOINT;
use tokio::io::AsyncWriteExt;

/// A program of one's own around `Database`, with errors of one's own and with anyhow, in which requests end in ways that
/// a service knows only from its worst days.
const OWN: &str = r#"
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::{env, ffi::OsString, fs, time::Duration};

use anyhow::{Context, Result, anyhow, bail, ensure};
use deadpool_postgres::{Client, Connect, Hook, HookError, Manager, ManagerConfig};
use deadpool_postgres::{Pool, PoolError, Runtime};
use log::{debug, error, warn};
use rustls::crypto::ring::{default_provider, kx_group};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::{Config, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

const CLIENTS: usize = 1;
const WAIT_LIMIT: Duration = Duration::from_secs(2);
const PASSWORD_LIMIT: Duration = Duration::from_secs(3);
const RETRY_DELAY: Duration = Duration::from_millis(200);
const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);

#[derive(Debug, thiserror::Error)]
enum Mine {
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error(transparent)]
    Query(#[from] tokio_postgres::Error),
}

const SLEEP: &str = "SELECT pg_sleep(600)";

/// A request that has begun its query, but is not polled any more.
fn begun(runtime: &tokio::runtime::Runtime, database: &Database) -> Pin<Box<dyn Future<Output = Result<(), Mine>>>> {
    let database = database.clone();
    let mut request: Pin<Box<dyn Future<Output = _>>> = Box::pin(async move {
        let limit = Duration::from_secs(60);
        database.run(limit, async |client| Ok(client.batch_execute(SLEEP).await?)).await
    });
    let polled = runtime.block_on(async { timeout(Duration::from_millis(300), &mut request).await });
    assert!(polled.is_err(), "{polled:?}");
    request
}

fn main() -> Result<()> {
    env_logger::init();
    let settings = Settings::from_env()?;
    let roots = settings.db_ca_cert.context("DB_CA_CERT is not set")?;
    eprintln!("LISTEN: {:?}", settings.listen);
    let flavors = [Builder::new_current_thread, Builder::new_multi_thread];
    for build in flavors {
        let runtime = build().enable_all().build()?;
        let database = Database::new(settings.pg.clone(), &roots)?;
        // Dropped outside the runtime: the one client of the pool is free again.
        drop(begun(&runtime, &database));
        let one = runtime.block_on(async {
            let database = database.clone();
            // In a task, with anyhow.
            tokio::spawn(async move {
                database
                    .run(WAIT_LIMIT, async |client| {
                        let row = client.query_typed_one("SELECT 1", &[]).await?;
                        anyhow::Ok(row.try_get::<_, i32>(0)?)
                    })
                    .await
            })
            .await
        })??;
        eprintln!("one: {one}");
        // The pool has as many clients as it is told, whatever machine it is on.
        let pid = async || {
            let queries = async |client: &mut Client| {
                let row = client.query_typed_one("SELECT pg_backend_pid()", &[]).await?;
                anyhow::Ok(row.try_get::<_, i32>(0)?)
            };
            database.run(WAIT_LIMIT, queries).await
        };
        let (first, second) = runtime.block_on(async { tokio::join!(pid(), pid()) });
        eprintln!("the same session: {}", first? == second?);
        // Late, and then dropped after the runtime.
        let late = runtime.block_on(database.run(Duration::ZERO, async |client| {
            Ok::<_, Mine>(client.batch_execute(SLEEP).await?)
        }));
        eprintln!("late: {}", late.unwrap_err());
        let request = begun(&runtime, &database);
        let running = database.clone();
        runtime.spawn(async move {
            running.run(WAIT_LIMIT, async |client| anyhow::Ok(client.batch_execute(SLEEP).await?)).await
        });
        drop(runtime);
        drop(request);
        // The pool serves another runtime as well.
        let runtime = build().enable_all().build()?;
        let again = runtime.block_on(database.run(WAIT_LIMIT, async |client| {
            anyhow::Ok(client.query_typed_one("SELECT 2", &[]).await?.try_get::<_, i32>(0)?)
        }))?;
        eprintln!("again: {again}");
        // Outside of any runtime, and after it.
        let request = begun(&runtime, &database);
        runtime.shutdown_background();
        drop(request);
    }
    Ok(())
}
"#;

#[test]
fn the_database_of_another_program_panics_neither_outside_the_runtime_nor_at_its_end() {
    let example = example();
    let (_, database) = example
        .split_once("/// A pool of connections over TLS")
        .unwrap();
    // As the page says for RDS Proxy and PgBouncer.
    let section = section("examples/README.md", "Behind a pooler");
    let first = "let limits";
    let last = between(
        &section,
        &format!("delete the lines from `{first}` to `"),
        "`",
    );
    let lines: Vec<_> = database.split_inclusive('\n').collect();
    let of = |words: &str| lines.iter().position(|line| line.contains(words)).unwrap();
    let database = [&lines[..of(first)], &lines[of(last) + 1..]]
        .concat()
        .concat();
    let code = format!("{OWN}\n/// A pool of connections over TLS{database}");
    let program = new_project("service-database", &code, dependencies());
    let rds = builder().start().unwrap();
    let run = run_of(&program, &with(&rds, &[("RUST_LOG", "debug")]));
    assert_eq!(run.code, Some(0), "{}", run.output);
    for (words, count) in [
        ("one: 1", 2),
        ("the same session: true", 2),
        ("late: no answer within 0ns", 2),
        ("again: 2", 2),
    ] {
        assert_eq!(
            run.output.matches(words).count(),
            count,
            "{words}: {}",
            run.output
        );
    }
}

#[test]
#[ignore = "builds the AWS SDK, which takes minutes"]
fn with_the_code_of_the_page_it_logs_in_with_an_iam_token() {
    let section = section("docs/rds.md", "IAM tokens");
    let [code, more] = ["```rust\n", "```toml\n"].map(|start| between(&section, start, "```"));
    let code = replaced(&example(), &take(&example(), "fresh_password"), code);
    let more = manifest("service-iam", &format!("{}{more}", dependencies()));
    let program = build("service-iam", &code, &more, &[]);

    let (acceptor, roots) = own_tls();
    let (heard, token) = std::sync::mpsc::channel();
    let fake = Fake::new(move |wire| {
        let (acceptor, heard) = (acceptor.clone(), heard.clone());
        async move {
            let mut wire = tls(wire, &acceptor).await?;
            startup(&mut wire).await?;
            wire.write_all(CLEARTEXT_PASSWORD).await?;
            wire.flush().await?;
            let (_, password) = message(&mut wire).await?;
            heard.send(String::from_utf8(password).unwrap()).unwrap();
            Ok(())
        }
    });
    let port = fake.port.to_string();
    let vars = with(
        &RDS,
        &[
            ("PG.PORT", &*port),
            ("PG.USER", "iam_user"),
            ("PG.PASSWORD", UNSET),
            ("DB_CA_CERT", roots.to_str().unwrap()),
            ("AWS_REGION", "ca-central-1"),
            ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE"),
            ("AWS_SECRET_ACCESS_KEY", "made-up"),
        ],
    );
    run_of(&program, &vars).failed(&["asking"]);
    let token = token.recv().unwrap();
    // The name of the host, without a region or with two hosts, is in the error.
    let making = format!("getting a password for {ENDPOINT}:{port}");
    let no_region = [("AWS_REGION", UNSET), ("AWS_EC2_METADATA_DISABLED", "true")];
    run_of(&program, &changed(vars.clone(), &no_region))
        .failed(&[&making, "making an IAM token: AWS_REGION is not set"]);
    let two = format!("{ENDPOINT},{ENDPOINT}");
    let two = [("PG.HOST", &*two), ("PG.HOSTADDR", "127.0.0.1,127.0.0.1")];
    run_of(&program, &changed(vars, &two))
        .failed(&[ENDPOINT, "making an IAM token: PG.HOST must be one host"]);
    // With their default features, AWS's crates would bring these, which have advisories.
    let lock = Path::new(env!("CARGO_TARGET_TMPDIR")).join("service-iam/Cargo.lock");
    let lock = std::fs::read_to_string(lock).unwrap();
    assert!(lock.contains("name = \"aws-sdk-rds\""));
    for (name, old) in [
        ("rustls", "0.21."),
        ("rustls-webpki", "0.101."),
        ("h2", "0.3."),
    ] {
        let package = format!("name = \"{name}\"\nversion = \"{old}");
        assert!(!lock.contains(&package), "{name} {old} is in the lock file");
    }
    let start = format!("{ENDPOINT}:{port}/?Action=connect&DBUser=iam_user&");
    assert!(token.starts_with(&start), "{token}");
    for part in [
        "AKIAEXAMPLE%2F",
        "%2Fca-central-1%2Frds-db%2Faws4_request",
        "&X-Amz-Signature=",
    ] {
        assert!(token.contains(part), "{token}");
    }
}

#[test]
fn the_handler_of_the_page_stores_a_note_and_has_a_status_of_its_own() {
    let section = section("examples/README.md", "Take it into your project");
    let handler = between(&section, "```rust\n", "```");
    let line = |start: &str| {
        let item = section.lines().find(|line| line.starts_with(start));
        let item = item.unwrap_or_else(|| panic!("no {start:?} in examples/README.md"));
        quoted(item).pop().unwrap()
    };
    let code = [
        ("        .layer(", line("- Add its route above")),
        (
            "            Self::Query(_)",
            line("- For a status of its own"),
        ),
    ];
    let code = code.iter().fold(example(), |code, (below, line)| {
        replaced(&code, below, &format!("{line}\n{below}"))
    });
    let program = new_project("service-notes", &(code + handler), dependencies());
    let rds = builder().start().unwrap();
    let table = "SET ROLE postgres; CREATE TABLE notes (name text PRIMARY KEY, text text)";
    admin(&rds).batch_execute(table).unwrap();
    let service = Service::new(&program, &with(&rds, &[]));
    let store = |note: &str| {
        let url = format!("http://{}/notes", service.address);
        let agent = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = agent.build().new_agent();
        let request = agent.post(url).header("Content-Type", "application/json");
        request.send(note).unwrap().status().as_u16()
    };
    let note = r#"{"name": "one", "text": "first"}"#;
    assert_eq!([note, note, "{}"].map(store), [201, 409, 422]);
    let stored = admin(&rds).query("SELECT FROM notes", &[]).unwrap();
    assert_eq!(stored.len(), 1);
}

#[test]
fn the_dependencies_that_the_page_adds_are_those_that_the_tests_have() {
    let manifest = std::fs::read_to_string("Cargo.toml").unwrap() + "\n";
    let ours = between(&manifest, "[dev-dependencies]\n", "\n\n");
    for line in dependencies().lines() {
        // The tests need more of tokio.
        match line.split_once(" = { version = \"1.51\", features = [") {
            Some(("tokio", features)) => {
                let (_, all) = ours
                    .split_once("\ntokio = { version = \"1.51\", features = [")
                    .unwrap();
                let all = all.lines().next().unwrap();
                for feature in features.trim_end_matches("] }").split(", ") {
                    assert!(all.contains(feature), "{feature}");
                }
            }
            _ => assert!(ours.lines().any(|other| other == line), "{line}"),
        }
    }
}

#[test]
fn what_it_has_from_the_program_it_has_word_for_word() {
    let (program, example) = (program(), example());
    let (_, ours) = program.split_once("/// The server, for errors.").unwrap();
    // But for the fields of `Settings`, to which readers are told to add their own.
    let fields = |code: &str| between(code, "struct Settings {\n", "\n}\n").to_owned();
    let field = "\n    /// From `LISTEN`: an address and port.\n    listen: Option<String>,";
    assert_eq!(fields(&example), fields(&program) + field);
    let example = replaced(&example, field, "");
    assert!(example.ends_with(&format!(
        "{}\n/// The server, for errors.{ours}",
        take(&program, "require_tls")
    )));
}
