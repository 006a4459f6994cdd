//! Asks Amazon RDS for PostgreSQL one question over verified TLS, and logs the answer: the smallest
//! form of a tokio-postgres client over rustls that promises:
//!
//! - With `DB_CA_CERT`, no user name, password or query is sent until the server's certificate is
//!   verified against the root certificates in that file and the host name.
//! - The program writes the value of `PG.PASSWORD` into no log, at any level, and into no error. Likely
//!   mistakes that would put a secret into another variable are refused without its value: see [`checked`].
//! - Every wait for the network has a limit: connecting, and the queries.
//!
//! Left out: a pool (see `examples/service.rs`), retries, client certificates (RDS asks for none).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::{env, ffi::OsString, fs, time::Duration};

use anyhow::{Context, Result, anyhow, bail, ensure};
use log::{debug, info, warn};
use rustls::crypto::ring::{default_provider, kx_group};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio::{runtime::Builder, time::timeout};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::{Client, Config, NoTls, Socket, tls::MakeTlsConnect};
use tokio_postgres_rustls::MakeRustlsConnect;

fn main() -> Result<()> {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("info"));
    let mut settings = Settings::from_env().context("reading settings from the environment")?;
    debug!("{settings:?}");
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let result = if let Some(roots) = &settings.db_ca_cert {
        let tls = require_tls(&mut settings.pg, roots).context("reading the file of DB_CA_CERT")?;
        runtime.block_on(connect_and_query(settings.pg, tls))
    } else {
        warn!("no DB_CA_CERT, so no TLS: anyone on the network path can read and change the data");
        runtime.block_on(connect_and_query(settings.pg, NoTls))
    };
    // Dropping the runtime would wait for the thread of a DNS look-up that gets no answer.
    runtime.shutdown_background();
    result
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

/// Connects, hands the client to `query`, and says goodbye.
async fn connect_and_query<T: MakeTlsConnect<Socket>>(mut pg: Config, tls: T) -> Result<()> {
    // tokio-postgres limits TCP alone, for each address, and only if it is told to.
    let tcp_limit = *pg.get_connect_timeout().unwrap_or(&Duration::from_secs(5));
    pg.connect_timeout(tcp_limit);
    // As long for each host, and once more for DNS, TLS and the log-in.
    let hosts = pg.get_hosts().len().max(pg.get_hostaddrs().len());
    let connect_limit = tcp_limit.saturating_mul(hosts as u32 + 1);
    let query_limit = connect_limit; // For a long report, put its own limit here.
    let target = target(&pg);
    let (client, connection) = timeout(connect_limit, pg.connect(tls))
        .await
        .with_context(|| format!("connecting to {target}: no answer within {connect_limit:?}"))?
        .with_context(|| format!("connecting to {target}"))?;
    let querying = async {
        match tokio::join!(query(client), connection) {
            // Only the connection knows why it was closed.
            (Err(error), Err(cause)) => Err(error.context(format!("{:#}", anyhow!(cause)))),
            (result, _) => result,
        }
    };
    timeout(query_limit, querying)
        .await
        .with_context(|| format!("querying {target}: no answer within {query_limit:?}"))?
        .with_context(|| format!("querying {target}"))
}

/// Your queries go here; `?` takes any error. For a transaction, write `mut client`.
async fn query(client: Client) -> Result<()> {
    const QUERY: &str = "SELECT * FROM information_schema.information_schema_catalog_name";
    // Unlike `query_one`, it does not prepare the statement first: one round trip, not two.
    let row = client.query_typed_one(QUERY, &[]).await?;
    let name: String = row.try_get(0)?;
    info!("information_schema_catalog_name: {name:?}");
    // Returning drops the client, which makes the connection send Terminate.
    Ok(())
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
