//! What people take from the program, as the README says and without a change, keeps its promises in a project of
//! their own.
//!
//! | taken             | and then                                                                                         |
//! |-------------------|--------------------------------------------------------------------------------------------------|
//! | the whole program | a setting is added; a transaction, several queries and `?` on any error are written into `query` |
//! | `require_tls`     | a `Config` from a connection string that says nothing of `sslmode`                               |
//! | the service       | see [`super::service_taken`]                                                                     |

use crate::support::fake::{CLEARTEXT_PASSWORD, Fake, SSL_REQUEST, silence, startup};
use crate::support::page::{between, new_project, program, replaced, section, take};
use crate::support::{PLAIN, RDS, Run, admin, run_of, vars, with};
use local_rds::{ENDPOINT, PASSWORD};
use tokio::io::AsyncWriteExt;
use tokio_postgres::Config;

#[test]
fn the_whole_program_connects_over_tls_and_ends_on_a_silent_server() {
    let copy = new_project("copied", &program(), "");
    run_of(&copy, &with(&RDS, &[])).succeeded();
    let silent = Fake::new(silence).port.to_string();
    let silent = [("PG.PORT", &*silent), ("PG.CONNECT_TIMEOUT", "1")];
    run_of(&copy, &with(&RDS, &silent)).failed(&[ENDPOINT, "no answer within 2s"]);
}

/// What people write into `query`: several statements, a transaction, parameters, rows, a struct, an answer that they
/// log, and `?` on errors of any kind.
const QUERY: &str = r#"
struct Order {
    id: i32,
    name: String,
}

#[derive(Debug)]
struct Mine(tokio_postgres::Error);

impl std::fmt::Display for Mine {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "no sleep")
    }
}

impl std::error::Error for Mine {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

async fn query(mut client: Client) -> Result<()> {
    client.batch_execute("CREATE TEMPORARY TABLE t (id int, name text); SET work_mem = '8MB'").await?;
    let names = [(1, String::from("one")), (2, "two".into()), (3, "three".into())];
    let transaction = client.transaction().await?;
    for (id, name) in &names {
        transaction.execute("INSERT INTO t VALUES ($1, $2)", &[id, name]).await?;
    }
    transaction.commit().await?;
    let rolled_back = client.transaction().await?;
    rolled_back.execute("DELETE FROM t", &[]).await?;
    drop(rolled_back);
    let select = client.prepare("SELECT id, name FROM t WHERE id < $1 ORDER BY id").await?;
    let rows = client.query(&select, &[&3]).await?;
    let sleep: f64 = env::var("SLEEP").unwrap_or("0".into()).parse()?;
    client.query_one("SELECT pg_sleep($1)", &[&sleep]).await.map_err(Mine)?;
    let typed = [(&"typed parameter" as _, tokio_postgres::types::Type::TEXT)];
    client.query_typed("SELECT $1", &typed).await?;
    for row in rows {
        let order = Order { id: row.try_get(0)?, name: row.try_get(1)? };
        info!("order {} is {}", order.id, order.name);
    }
    Ok(())
}
"#;

#[test]
fn query_takes_a_transaction_and_several_queries_and_settings_take_a_field() {
    let ours = program();
    let before = take(&ours, "query");
    let program = replaced(&ours, &before, QUERY);
    let field = "    table: Option<String>,\n}\n\nimpl Settings";
    let program = replaced(&program, "}\n\nimpl Settings", field);
    let log = r#"debug!("{settings:?}");"#;
    let shown = format!(r#"{log} info!("table: {{:?}}", settings.table);"#);
    let program = replaced(&program, log, &shown);
    let limit = "let query_limit = connect_limit;";
    let program = replaced(&program, limit, "let query_limit = Duration::from_secs(4);");
    let copy = new_project("query", &program, "");
    let run = |change: &[(&str, &str)]| run_of(&copy, &with(&RDS, change));

    let answer = |run: Run| {
        assert_eq!(run.code, Some(0), "{}", run.output);
        for order in ["order 1 is one\n", "order 2 is two\n"] {
            assert!(run.output.contains(order), "{}", run.output);
        }
        assert!(!run.output.contains("catalog_name"), "{}", run.output);
        run.output
    };
    assert!(answer(run(&[])).contains("table: None"));
    let shown = answer(run(&[("TABLE", "orders")]));
    assert!(shown.contains(r#"table: Some("orders")"#));
    // What the page warns of, at debug.
    let debug = answer(run(&[("TABLE", "orders"), ("RUST_LOG", "debug")]));
    for words in [
        r#", table: Some("orders") }"#,
        "with parameters: [3]",
        "SET work_mem = '8MB'",
    ] {
        assert!(debug.contains(words), "no {words} in {debug}");
    }
    assert!(!debug.contains("typed parameter"), "{debug}");

    run(&[("SLEEP", "x")]).failed(&["querying", "invalid float literal"]);
    let [shorter, longer] = [("SLEEP", "2.5"), ("SLEEP", "60")];
    let two_seconds = ("PG.CONNECT_TIMEOUT", "1");
    let application = ("PG.APPLICATION_NAME", "sleeps");
    let querying = format!("Error: querying {ENDPOINT}:{}", RDS.port());
    std::thread::scope(|scope| {
        // The queries have a limit of their own, and connecting keeps its own.
        scope.spawn(|| answer(run(&[two_seconds, shorter])));
        scope.spawn(|| run(&[longer]).failed(&[&querying, "no answer within 4s"]));
        // All around it is as before, such as the reason why a connection was closed, under an error of one's own.
        let terminated = scope.spawn(|| run(&[longer, application]));
        let terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE application_name = 'sleeps' AND wait_event = 'PgSleep'";
        let mut admin = admin(&RDS);
        while admin.query(terminate, &[]).unwrap().is_empty() {
            assert!(!terminated.is_finished(), "{:?}", terminated.join());
        }
        let why = "terminating connection due to administrator command";
        terminated
            .join()
            .unwrap()
            .failed(&[&querying, "no sleep", why]);
    });
}

/// A program that has a `Config` already, and connects with it as the page says.
const OWN: &str = r#"
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut pg: Config = std::env::var("DATABASE_URL")?.parse()?;
    let roots = std::env::var("ROOTS")?;
    CALL
    let row = client.query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[]).await?;
    eprintln!("TLS: {}", row.get::<_, bool>(0));
    Ok(())
}
"#;

#[test]
fn require_tls_alone_requires_it_of_a_config_from_a_connection_string() {
    let page = section("README.md", "Take it into your project");
    let imports = between(&page, "```rust\n", "```");
    let (_, rest) = page.split_once(imports).unwrap();
    let call = between(rest, "```rust\n", "```");
    let call = replaced(
        call,
        r#"Path::new("global-bundle.pem")"#,
        "Path::new(&roots)",
    );
    let own = replaced(OWN, "CALL", &call);
    let program = format!("{imports}{own}\n{}", take(&program(), "require_tls"));
    let copy = new_project("require-tls", &program, "");
    // What the page says of URLs.
    for option in ["sslmode=verify-full", "sslrootcert=system"] {
        let url = format!("postgres://u:p@h/d?{option}").parse::<Config>();
        assert!(url.is_err(), "{option}: {url:?}");
    }
    let token = RDS.iam_token();
    let raw = format!("postgres://iam_user:{token}@h/d").parse::<Config>();
    assert!(raw.is_err() || raw.unwrap().get_password() != Some(token.as_bytes()));

    let run = |port: u16, mode: &str, roots: &str| {
        let url = format!(
            "postgres://postgres:{PASSWORD}@{ENDPOINT}:{port}/postgres?hostaddr=127.0.0.1{mode}"
        );
        run_of(&copy, &vars([("DATABASE_URL", &*url), ("ROOTS", roots)]))
    };
    let roots = PLAIN.roots();
    let roots = roots.to_str().unwrap();
    // It reads a file that is none as the program does, and names it.
    run(1, "", "/nonexistent").failed(&["root certificates from /nonexistent", "No such file"]);
    // As people print the roots of another instance.
    let others = "ca-certificates/global-bundle.pem";
    run(PLAIN.port(), "", others).failed(&["invalid peer certificate: UnknownIssuer"]);

    for mode in [
        "",
        "&sslmode=prefer",
        "&sslmode=disable",
        "&sslmode=require",
    ] {
        let connected = run(PLAIN.port(), mode, roots);
        assert_eq!(connected.code, Some(0), "{}", connected.output);
        assert!(
            connected.output.contains("TLS: true"),
            "{}",
            connected.output
        );

        let strips = Fake::new(|mut wire| async move {
            startup(&mut wire).await?;
            wire.write_all(b"N").await?;
            startup(&mut wire).await?;
            wire.write_all(CLEARTEXT_PASSWORD).await?;
            silence(wire).await
        });
        run(strips.port, mode, roots).failed(&["server does not support TLS"]);
        assert_eq!(strips.heard(), [SSL_REQUEST], "{mode}");
    }
}

#[test]
fn its_trick_is_in_the_program_word_for_word() {
    let readme = section("README.md", "The trick");
    let code = between(&readme, "```rust\n", "```");
    assert!(
        code.contains(".with_root_certificates(") && code.contains("SslMode::Require"),
        "{code}"
    );
    assert!(take(&program(), "require_tls").contains(code), "{code}");
}
