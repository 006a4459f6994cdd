//! Asks Amazon RDS for PostgreSQL one question over verified TLS, and logs the answer: the smallest
//! form of a tokio-postgres client over rustls that promises:
//!
//! - With `DB_CA_CERT`, no user name, password or query is sent until the server's certificate is
//!   verified against the root certificates in that file and the host name.
//! - No password is logged, at any level, or shown in an error.
//! - It never hangs: TCP to each host may take `connect_timeout` (5 s unless set), the rest as long.
//!
//! Left out: a pool (the README has one), retries, and client certificates, which RDS never asks for.

use std::{collections::HashMap, env, fs, path::Path, path::PathBuf, time::Duration};

use anyhow::{Context, Result, anyhow, bail, ensure};
use log::{debug, info, warn};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use rustls::{ClientConfig, NamedGroup::secp256r1, RootCertStore, crypto::ring};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio_postgres::{Config, NoTls, Socket, config::Host, tls::MakeTlsConnect};
use tokio_postgres_rustls::MakeRustlsConnect;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("info"));
    let settings = Settings::from_env().context("reading PG.* and DB_CA_CERT")?;
    debug!("{settings:?}");
    let answer = if let Some(file) = &settings.db_ca_cert {
        ask(settings.pg, MakeRustlsConnect::new(client_config(file)?)).await?
    } else {
        warn!("no DB_CA_CERT, so no TLS: anyone on the network path can read and change the data");
        ask(settings.pg, NoTls).await?
    };
    info!("information_schema_catalog_name: {answer:?}");
    Ok(())
}

/// TLS that trusts the root certificates in a PEM file, and no others.
fn client_config(file: &Path) -> Result<ClientConfig> {
    let reading = || format!("reading root certificates (DB_CA_CERT={})", file.display());
    let pem = fs::read(file).with_context(reading)?;
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_reader_iter(&pem[..]) {
        // The parser's error would quote the file, which may be a private key.
        let der = der.ok().context("damaged PEM").with_context(reading)?;
        roots.add(der).with_context(reading)?;
    }
    ensure!(!roots.is_empty(), "{}: none found", reading());
    debug!("{}: {} found", reading(), roots.len());
    let mut provider = ring::default_provider();
    // P-256 first: PostgreSQL up to 17 takes no other by default, and a refusal costs a round trip.
    provider.kx_groups.sort_by_key(|kx| kx.name() != secp256r1);
    let mut config = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    // `sslnegotiation=direct` needs this ALPN; PostgreSQL before 17 ignores it.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(config)
}

/// Connects, queries in one round trip and says goodbye, all within one limit.
async fn ask<T: MakeTlsConnect<Socket>>(mut pg: Config, tls: T) -> Result<String> {
    const QUERY: &str = "SELECT * FROM information_schema.information_schema_catalog_name";
    let limit = limit(&mut pg);
    let answer = tokio::time::timeout(limit, async {
        let (client, connection) = pg.connect(tls).await?;
        // Dropping the client makes the connection send Terminate.
        let row = async move { client.query_typed_one(QUERY, &[]).await };
        let row = match tokio::join!(row, connection) {
            // Only the connection knows why it was closed.
            (Err(error), Err(cause)) if error.is_closed() => Err(cause),
            (row, _) => row,
        };
        Ok(row.context(QUERY)?.try_get(0)?)
    });
    let late = || Err(anyhow!("no answer within {limit:?} (PG.CONNECT_TIMEOUT)"));
    let answer = answer.await.unwrap_or_else(|_| late());
    answer.with_context(|| format!("connecting to {}", target(&pg)))
}

/// Limits TCP to each host, and returns the limit for everything: as long per host, and once more.
fn limit(pg: &mut Config) -> Duration {
    let tcp = *pg.get_connect_timeout().unwrap_or(&Duration::from_secs(5));
    pg.connect_timeout(tcp);
    let hosts = pg.get_hosts().len().max(pg.get_hostaddrs().len());
    tcp.saturating_mul(hosts as u32 + 1)
}

fn target(pg: &Config) -> String {
    match (pg.get_hosts(), pg.get_ports()) {
        ([Host::Tcp(host)], ports) => format!("{host}:{}", ports.first().unwrap_or(&5432)),
        ([], _) => "PG.HOST, which is not set (in a shell, export PG__HOST instead)".into(),
        (hosts, ports) => format!("{hosts:?}, ports {ports:?}"),
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// From `PG.<KEYWORD>`, or `PG__<KEYWORD>` in shells. Its `Debug` redacts the password.
    #[serde(deserialize_with = "from_keywords")]
    pg: Config,
    /// From `DB_CA_CERT`: a PEM file with the root certificates to trust. Without it, no TLS.
    db_ca_cert: Option<PathBuf>,
}

impl Settings {
    fn from_env() -> Result<Self> {
        let (mut vars, mut names) = (HashMap::new(), HashMap::new());
        for (name, value) in env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let key = name.to_lowercase().replacen("pg__", "pg.", 1);
            if !key.starts_with("pg.") && key != "db_ca_cert" {
                continue; // Other variables are ignored.
            }
            // Errors never show a value: it may be a misplaced password.
            let value = value.into_string().unwrap_or_default();
            ensure!(!value.is_empty(), "{name} is empty or not UTF-8");
            let url = value.contains("://") || key == "pg.host" && value.contains('@');
            ensure!(!url || key == "pg.password", "{name} must not be a URL");
            let twin = names.insert(key.clone(), name.clone()).unwrap_or_default();
            ensure!(twin.is_empty(), "{twin} and {name} set the same option");
            vars.insert(key, value);
        }
        let tls = vars.contains_key("db_ca_cert");
        let direct = vars.get("pg.sslnegotiation").is_some_and(|v| v == "direct");
        ensure!(tls || !direct, "PG.SSLNEGOTIATION=direct needs DB_CA_CERT");
        let mode = match (tls, vars.get("pg.sslmode").map_or("", String::as_str)) {
            // Not `prefer`, the default: it falls back to plaintext if the server says it has no TLS.
            (true, "" | "require" | "verify-full") => "require",
            (false, "" | "prefer" | "disable") => "disable",
            _ => bail!("PG.SSLMODE must be require or verify-full with DB_CA_CERT, else disable"),
        };
        vars.insert("pg.sslmode".into(), mode.into());
        let source = config::Environment::default().source(Some(vars));
        let config = config::Config::builder().add_source(source).build()?;
        Ok(config.try_deserialize()?)
    }
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
