//! A service on Amazon RDS for PostgreSQL over verified TLS, whole in one file, to be copied as
//! `src/main.rs`. `GET /settings/{name}` answers with a parameter of the server. It promises:
//!
//! - What `src/main.rs` of this project promises of TLS and of the password. Without `DB_CA_CERT` it
//!   does not start; nor with a wrong host, user, password or root certificate, as it asks once.
//! - Offered more requests than it carries, it answers as many as before, and refuses the rest in time.
//! - It has no more sessions on the server than its pool has clients, whatever its callers do, but for
//!   those that the server is just ending.
//! - It heals by itself from late and cancelled requests, errors, lost sessions, a migration, and, with
//!   `PG.TARGET_SESSION_ATTRS=read-write`, from a failover. Set that for every service that writes.
//! - Callers see a status and nothing of the inside. The log has the request, the status and the cause.
//!
//! Besides the variables of `src/main.rs` it reads `LISTEN`, an address and port, and `PASSWORD_FILE`.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::{env, ffi::OsString, fs, time::Duration};

use anyhow::{Context, Result, anyhow, bail, ensure};
use axum::extract::{self, Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router, routing::get};
use deadpool_postgres::{Client, Connect, Hook, HookError, Manager, ManagerConfig};
use deadpool_postgres::{Pool, PoolError, Runtime};
use log::{debug, error, info, warn};
use rustls::crypto::ring::{default_provider, kx_group};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{sleep, timeout};
use tokio::{net::TcpListener, signal};
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::error::{DbError, Severity};
use tokio_postgres::{Config, SimpleQueryMessage, types::Type};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing_subscriber::filter::{EnvFilter, LevelFilter};

/// The connections of the pool. All instances together must stay below the server's `max_connections`.
const CLIENTS: usize = 4;
/// For a request that waits until a client is free: shorter than the callers' patience, less the time
/// of their queries. Who came first is served first, so with a longer limit each caller would get its
/// client just before it leaves.
const WAIT_LIMIT: Duration = Duration::from_millis(500);
/// For reading `PASSWORD_FILE` or making a token, within the time for connecting.
const PASSWORD_LIMIT: Duration = Duration::from_secs(3);
/// The pause after a failed attempt to connect. Without it, a server that refuses would be asked
/// thousands of times a second.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// For the queries of a request.
const QUERY_LIMIT: Duration = Duration::from_secs(4);
/// A connection that is older is replaced when it is next used.
const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);
/// For the requests that run when the service is told to end. Docker ends it by force after 10 s.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(9);

fn main() -> Result<()> {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into());
    // A thread writes the log, so that no request waits for a log that nobody reads.
    let (writer, _until_the_end) = tracing_appender::non_blocking(io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter.from_env().context("reading RUST_LOG")?)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(writer)
        .init();
    let settings = Settings::from_env().context("reading settings from the environment")?;
    debug!("{settings:?}");
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(serve(settings));
    // Dropping the runtime would wait for the thread of a DNS look-up that gets no answer.
    runtime.shutdown_background();
    result
}

/// Serves until it is told to end.
async fn serve(settings: Settings) -> Result<()> {
    let mut shutdown = pin!(shutdown_signal()?);
    let (database, listener) = tokio::select! {
        started = start(settings) => started?,
        () = &mut shutdown => return Ok(()),
    };
    let (address, server) = (listener.local_addr()?, &database.server);
    info!("listening on http://{address}, connected to {server}");

    let service = Router::new()
        .route("/settings/{name}", get(setting))
        // It does not ask the database, or else a load balancer would stop all instances in an outage.
        .route("/healthz", get(async || "ok"))
        // Logs the failures of the routes above, and of none below.
        .layer(from_fn_with_state(database.clone(), log_failures))
        .with_state(database);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving =
        axum::serve(listener, service).with_graceful_shutdown(async { _ = stopped.await });
    let serving = tokio::spawn(serving.into_future());
    shutdown.await;
    info!("ending, after the requests that run");
    drop(stop);
    if timeout(SHUTDOWN_LIMIT, serving).await.is_err() {
        warn!("some requests were still running or incomplete after {SHUTDOWN_LIMIT:?}");
    }
    Ok(())
}

/// Finds mistakes in the settings, which are to end the service here rather than to fail every request.
async fn start(settings: Settings) -> Result<(Database, TcpListener)> {
    let roots = settings.db_ca_cert.context("DB_CA_CERT is not set")?;
    password_within_limit(&settings.pg).await?;
    // In a thread, as reading a file that is a FIFO may wait for ever.
    let database = spawn_blocking(move || Database::new(settings.pg, &roots)).await?;
    let database = database.context("reading the file of DB_CA_CERT")?;
    let ask = async |client: &mut Client| anyhow::Ok(client.batch_execute("SELECT").await?);
    let asking = || format!("asking {}", database.server);
    database.run(QUERY_LIMIT, ask).await.with_context(asking)?;

    let listen = settings.listen.unwrap_or("127.0.0.1:3000".into());
    let listener = TcpListener::bind(&listen).await;
    let listener = listener.with_context(|| format!("listening on LISTEN, {listen}"))?;
    Ok((database, listener))
}

/// Waits for SIGINT or SIGTERM, which containers send, or for what Windows has in their place.
fn shutdown_signal() -> io::Result<impl Future<Output = ()>> {
    #[cfg(unix)]
    use signal::unix::{SignalKind, signal};
    #[cfg(unix)]
    let (mut interrupt, mut terminate) = (
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    );
    #[cfg(windows)]
    let (mut interrupt, mut terminate) = (
        signal::windows::ctrl_c()?,
        signal::windows::ctrl_shutdown()?,
    );
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// `GET /settings/{name}`: the value of a parameter of the server.
async fn setting(
    State(database): State<Database>,
    extract::Path(name): extract::Path<String>,
) -> Result<String, Error> {
    // Only these, as others may hold a secret, such as one that your application has set.
    const SHOWN: [&str; 6] = [
        "max_connections",
        "port",
        "server_version",
        "statement_timeout",
        "TimeZone",
        "transaction_read_only",
    ];
    const QUERY: &str = "SELECT current_setting($1)";
    if !SHOWN.contains(&name.as_str()) {
        return Err(Error::NotFound);
    }
    database
        .run(QUERY_LIMIT, async |client| {
            let row = client
                .query_typed_one(QUERY, &[(&name, Type::TEXT)])
                .await?;
            Ok(row.try_get(0)?)
        })
        .await
}

/// How a request fails.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("there is no such parameter")]
    NotFound,
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error("querying")]
    Query(#[from] tokio_postgres::Error),
}

/// Why a request has failed, for `log_failures` and not for the caller.
#[derive(Clone)]
struct Cause(String);

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Unavailable(Unavailable::NoConnection(_)) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unavailable(Unavailable::NoAnswer(_)) => StatusCode::GATEWAY_TIMEOUT,
            Self::Query(error) if is_lost(error) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Query(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let cause = format!("{:#}", anyhow!(self));
        // Without the lines of DETAIL, which show rows. No caller can write a line of the log.
        let cause = Cause(cause.lines().next().unwrap_or_default().to_owned());
        (status, Extension(cause), status.to_string()).into_response()
    }
}

/// The connection has ended before the answer, as when the server restarts.
fn is_lost(error: &tokio_postgres::Error) -> bool {
    let severity = error.as_db_error().and_then(DbError::parsed_severity);
    error.is_closed() || severity == Some(Severity::Fatal)
}

async fn log_failures(State(database): State<Database>, request: Request, next: Next) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let response = next.run(request).await;
    if let (status, Some(Cause(cause))) = (response.status(), response.extensions().get())
        && status.is_server_error()
    {
        let (path, server) = (uri.path(), &database.server);
        warn!("{method} {path}: {status}: {server}: {cause}");
    }
    response
}

/// A pool of connections over TLS that trusts these root certificates, and no others.
#[derive(Clone)]
struct Database {
    pool: Pool,
    tls: MakeRustlsConnect,
    server: Arc<str>,
    /// Whether a session must be able to write.
    read_write: bool,
}

/// Why the queries of a request have no result, not even an error.
#[derive(Debug, thiserror::Error)]
enum Unavailable {
    #[error("no connection")]
    NoConnection(#[source] anyhow::Error),
    #[error("no answer within {0:?}")]
    NoAnswer(Duration),
}

impl Database {
    fn new(mut pg: Config, roots: &Path) -> Result<Self> {
        let tls = require_tls(&mut pg, roots)?;
        let server: Arc<str> = target(&pg).into();
        let read_write = pg.get_target_session_attrs() == TargetSessionAttrs::ReadWrite;
        // For TCP to each address. Without it, a host that is down would use up the time of the others.
        let tcp_limit = *pg.get_connect_timeout().unwrap_or(&Duration::from_secs(2));
        pg.connect_timeout(tcp_limit);
        // As long for each host, and once more for DNS, TLS and the log-in.
        let hosts = pg.get_hosts().len().max(pg.get_hostaddrs().len());
        let connect_limit = tcp_limit.saturating_mul(hosts as u32 + 1);
        // AWS forgets a connection that is silent for 350 s, and the default is two hours. Keep-alive also
        // finds out that a server is gone before a request does.
        let idle = pg.get_keepalives_idle().min(Duration::from_secs(60));
        let interval = pg.get_keepalives_interval();
        let retries = pg.get_keepalives_retries();
        pg.keepalives_idle(idle)
            .keepalives_interval(interval.unwrap_or(Duration::from_secs(10)))
            .keepalives_retries(retries.unwrap_or(3));
        // The last resort: the server ends a statement that takes too long, or whose client is gone, and
        // a transaction whose client does nothing.
        let limits = "-c statement_timeout=60s -c idle_in_transaction_session_timeout=10s \
                      -c client_connection_check_interval=500ms";
        let options = pg.get_options().unwrap_or_default();
        pg.options(format!("{limits} {options}"));
        let connector = Connector {
            tls: tls.clone(),
            server: server.clone(),
        };
        let is_young = Hook::sync_fn(|_, metrics| {
            if metrics.age() > MAX_LIFETIME {
                return Err(HookError::message("older than MAX_LIFETIME"));
            }
            Ok(())
        });
        let manager = Manager::from_connect(pg, connector, ManagerConfig::default());
        let pool = Pool::builder(manager)
            .max_size(CLIENTS)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(WAIT_LIMIT))
            .create_timeout(Some(connect_limit.saturating_add(RETRY_DELAY)))
            .pre_recycle(is_young)
            .build()?;
        Ok(Self {
            pool,
            tls,
            server,
            read_write,
        })
    }

    /// Runs the queries of one request. The limit is theirs alone: waiting for a client has its own
    /// limit, and so has connecting.
    ///
    /// The next request gets the same session. So await every query, read every stream to its end, and
    /// return an error if you give up on a query, as in `select!` or `timeout`. Use `transaction()` and
    /// not `BEGIN`, and leave no `SET`, no `LISTEN`, no lock and no temporary table behind.
    async fn run<R, E: From<Unavailable>>(
        &self,
        limit: Duration,
        queries: impl AsyncFnOnce(&mut Client) -> Result<R, E>,
    ) -> Result<R, E> {
        let client = self.client().await.map_err(Unavailable::NoConnection)?;
        let mut guard = Guard {
            client: None,
            idle_limit: Duration::from_millis(20),
            database: self.clone(),
            runtime: Handle::current(),
        };
        let client = guard.client.insert(client);
        let late = |_| Unavailable::NoAnswer(limit);
        let result = timeout(limit, queries(client)).await.map_err(late)?;
        match &result {
            // Back into the pool.
            Ok(_) => drop(guard.client.take()),
            // Most likely the session is idle, and only a server far away takes time to say so.
            Err(_) => guard.idle_limit = Duration::from_secs(1),
        }
        result
    }

    async fn client(&self) -> Result<Client> {
        let (send, receive) = oneshot::channel();
        let (pool, server) = (self.pool.clone(), self.server.clone());
        // In a task: a connection that comes too late for its request serves the next one.
        tokio::spawn(async move {
            let client = pool.get().await.map_err(|error| match error {
                // deadpool's error would say the same once more.
                PoolError::Backend(error) => anyhow!(error),
                error => anyhow!(error),
            });
            if let Err(Err(error)) = send.send(client) {
                // The request is gone, and logs nothing.
                warn!("{server}: no connection: {error:#}");
            }
        });
        receive.await?
    }

    /// Returns a client to the pool if its session is idle and of use, or else closes it.
    async fn reset_or_close(&self, client: Client, idle_limit: Duration) {
        // Queued behind everything sent before. In an open transaction it rolls back, in a failed one it
        // errors. Without `BEGIN`, `ROLLBACK` would write a warning into the server's log each time.
        const RESET: &str = "BEGIN; SHOW transaction_read_only; ROLLBACK";
        let is_usable = {
            let mut answer = pin!(client.simple_query(RESET));
            match timeout(idle_limit, &mut answer).await {
                Ok(Ok(messages)) => !(self.read_write && is_read_only(&messages)),
                Ok(Err(_)) => false,
                Err(_) => {
                    let cancel = async {
                        let token = client.cancel_token();
                        if let Err(error) = token.cancel_query(self.tls.clone()).await {
                            debug!("cancelling a query: {:#}", anyhow!(error));
                        }
                        // Closing it earlier would free its place while the query still runs.
                        _ = answer.await;
                    };
                    // A pooler may pass no cancel request on, and a server that hangs does not answer.
                    // Shorter than `WAIT_LIMIT`: a request that waits for this place still gets it.
                    _ = timeout(Duration::from_millis(400), cancel).await;
                    // Not used again: the cancel request may come late, and hit the next query.
                    false
                }
            }
        };
        if is_usable {
            // After a migration, a statement in the cache would fail for ever.
            client.statement_cache.clear();
        } else {
            drop(Client::take(client));
        }
    }
}

fn is_read_only(messages: &[SimpleQueryMessage]) -> bool {
    messages.iter().any(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0) == Some("on"),
        _ => false,
    })
}

/// Holds the client of a request. Dropping the future of a query does not stop the query: the server
/// goes on, and the client's next query waits behind it. So when a request is late, cancelled or failed,
/// the guard is dropped with the client in it, and the client keeps its place in the pool until its
/// session is reset or closed. Otherwise each such request would leave one more session on the server,
/// until the server accepts no more.
struct Guard {
    client: Option<Client>,
    /// How long the session may take to become idle by itself.
    idle_limit: Duration,
    database: Database,
    runtime: Handle,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
            let (database, idle_limit) = (self.database.clone(), self.idle_limit);
            // `tokio::spawn` would panic if the request is dropped outside the runtime.
            self.runtime
                .spawn(async move { database.reset_or_close(client, idle_limit).await });
        }
    }
}

/// Opens the connections of the pool.
struct Connector {
    tls: MakeRustlsConnect,
    server: Arc<str>,
}

type Connected = Result<(tokio_postgres::Client, JoinHandle<()>), tokio_postgres::Error>;

impl Connect for Connector {
    fn connect(&self, pg: &Config) -> Pin<Box<dyn Future<Output = Connected> + Send + '_>> {
        let (mut pg, server) = (pg.clone(), self.server.clone());
        Box::pin(async move {
            match password_within_limit(&pg).await {
                Ok(Some(password)) => _ = pg.password(password),
                Ok(None) => {}
                // `PG.PASSWORD` is tried, if it is set: the server refuses a wrong one.
                Err(error) => error!("{error:#}"),
            }
            let connected = pg.connect(self.tls.clone()).await;
            if connected.is_err() {
                sleep(RETRY_DELAY).await;
            }
            let (client, connection) = connected?;
            let connection = async move {
                if let Err(error) = connection.await {
                    warn!("{server}: lost a connection: {:#}", anyhow!(error));
                }
            };
            Ok((client, tokio::spawn(connection)))
        })
    }
}

async fn password_within_limit(pg: &Config) -> Result<Option<String>> {
    let late = || format!("no answer within {PASSWORD_LIMIT:?}");
    let password = timeout(PASSWORD_LIMIT, fresh_password(pg)).await;
    let password = password.with_context(late).and_then(|password| password);
    password.with_context(|| format!("getting a password for {}", target(pg)))
}

/// The password for a new connection, if it is not that of `PG.PASSWORD`: from the file of
/// `PASSWORD_FILE`, as containers mount secrets. Make an IAM token here, or ask Secrets Manager.
async fn fresh_password(_pg: &Config) -> Result<Option<String>> {
    let Some(file) = env::var_os("PASSWORD_FILE") else {
        return Ok(None);
    };
    // The error does not show the value: it may be the password, by mistake.
    let password = tokio::fs::read_to_string(file).await;
    let password = password.context("reading the file of PASSWORD_FILE")?;
    Ok(Some(password.trim_end_matches(['\r', '\n']).to_owned()))
}

/// Makes `pg` require TLS that trusts the root certificates in a PEM file, and no others.
fn require_tls(pg: &mut Config, roots: &Path) -> Result<MakeRustlsConnect> {
    let reading = || format!("reading root certificates from {}", roots.display());
    let pem = fs::read(roots).with_context(reading)?;
    let mut store = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(&pem) {
        // The parser's error would quote the file, which may be a private key.
        let der = der.ok().context("damaged PEM").with_context(reading)?;
        store.add(der).with_context(reading)?;
    }
    ensure!(!store.is_empty(), "{}: none found", reading());
    debug!("{}: {} found", reading(), store.len());

    let mut provider = default_provider();
    // PostgreSQL up to 17 takes P-256 only by default: another group first costs a round trip.
    provider.kx_groups = vec![kx_group::SECP256R1, kx_group::X25519, kx_group::SECP384R1];
    let mut tls = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    // `sslnegotiation=direct` needs this ALPN; PostgreSQL before 17 ignores it.
    tls.alpn_protocols = vec![b"postgresql".to_vec()];
    // Not `prefer`, the default: it falls back to plaintext if the server says it has no TLS.
    pg.ssl_mode(SslMode::Require);
    Ok(MakeRustlsConnect::new(tls))
}

/// The server, for errors.
fn target(pg: &Config) -> String {
    let ports = pg.get_ports();
    match (pg.get_hosts(), pg.get_hostaddrs()) {
        ([Host::Tcp(host)], _) => format!("{host}:{}", ports.first().unwrap_or(&5432)),
        ([], []) => "PG.HOST, which is not set (in a shell, export PG__HOST instead)".into(),
        ([], addresses) => format!("{addresses:?}, ports {ports:?}"),
        (hosts, _) => format!("{hosts:?}, ports {ports:?}"),
    }
}

/// A field that you add, such as `table: Option<String>`, is read from the variable `TABLE`. `debug!`
/// in `main` logs every field but the password.
#[derive(Debug, Deserialize)]
struct Settings {
    /// From `PG.<KEYWORD>`, or `PG__<KEYWORD>` in shells. tokio-postgres redacts the password in `Debug`.
    #[serde(deserialize_with = "from_keywords")]
    pg: Config,
    /// From `DB_CA_CERT`: a PEM file with the root certificates to trust. Without it, no TLS.
    db_ca_cert: Option<PathBuf>,
    /// From `LISTEN`: an address and port.
    listen: Option<String>,
}

impl Settings {
    fn from_env() -> Result<Self> {
        let (mut vars, mut names) = (HashMap::new(), HashMap::<String, String>::new());
        for (name, value) in env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let key = name.to_lowercase().replacen("pg__", "pg.", 1);
            let keyword = key.strip_prefix("pg.");
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            // config takes a name with other characters, such as a second dot, for a path.
            let plain = keyword != Some("") && keyword.unwrap_or(&key).chars().all(word);
            if keyword.is_some() || key == "db_ca_cert" {
                ensure!(plain, "{name} must be PG.<KEYWORD>");
                if let Some(twin) = names.insert(key.clone(), name.clone()) {
                    bail!("{twin} and {name} set the same option");
                }
                vars.insert(key.clone(), checked(&name, &key, value)?);
            } else if plain && key != "pg" {
                vars.insert(key, value.to_string_lossy().into_owned());
            }
        }
        let tls = vars.contains_key("db_ca_cert");
        let value = |key| vars.get(key).map_or("", String::as_str);
        let mode = match (tls, value("pg.sslmode"), value("pg.sslnegotiation")) {
            (false, _, "direct") => bail!("PG.SSLNEGOTIATION=direct needs DB_CA_CERT"),
            (false, "" | "disable" | "prefer", _) => "disable",
            (true, "" | "require" | "verify-full", _) => "require",
            _ => bail!("without DB_CA_CERT, PG.SSLMODE must be disable; with it, require"),
        };
        vars.insert("pg.sslmode".into(), mode.into());
        let vars = config::Environment::default().source(Some(vars));
        let config = config::Config::builder().add_source(vars).build()?;
        Ok(config.try_deserialize()?)
    }
}

/// A value, unless it seems to hold a secret by mistake. The error must not show it.
fn checked(name: &str, key: &str, value: OsString) -> Result<String> {
    let value = value.into_string().unwrap_or_default();
    let mistake = match key {
        _ if value.is_empty() => "is empty or not UTF-8",
        "pg.password" => return Ok(value),
        _ if value.contains("://") => "must not be a URL",
        _ if value.to_lowercase().contains("password=") => "must not be a connection string",
        "db_ca_cert" if value.contains("-----BEGIN") => "must be a path, not PEM text",
        "pg.host" if value.contains(['@', '=', ' ', '\t', '\n']) => "must be a host name",
        _ => return Ok(value),
    };
    bail!("{name} {mistake}")
}

/// tokio-postgres's own parser of `keyword='value'` knows, checks and documents every keyword.
fn from_keywords<'de, D: Deserializer<'de>>(from: D) -> Result<Config, D::Error> {
    let mut pairs = String::new();
    for (keyword, value) in HashMap::<String, String>::deserialize(from)? {
        let value = value.replace('\\', r"\\").replace('\'', r"\'");
        pairs += &format!("{keyword}='{value}' ");
    }
    let parsed = pairs.parse::<Config>();
    parsed.map_err(|error| D::Error::custom(anyhow!(error).root_cause()))
}
