//! Connects to Amazon RDS for PostgreSQL, asks it one question and logs the answer.
//!
//! The smallest honest form of a tokio-postgres client over rustls. It promises that
//!
//! - with `DB_CA_CERT`, a server is told nothing before it has proven, by the root certificates
//!   in that file alone, to be the host that was asked for;
//! - no secret is logged or part of an error, and settings that contradict each other are refused;
//! - it ends: every host has `connect_timeout` to give the answer.
//!
//! Left out on purpose: a pool, retries, and client certificates, which RDS does not ask for.

use std::collections::{BTreeMap, HashMap, hash_map::RandomState};
use std::hash::{BuildHasher, Hasher};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::{env, fs::File, time::Duration};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use log::{debug, info, trace, warn};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring, ring::kx_group};
use rustls::pki_types::{CertificateDer, pem::ReadIter};
use rustls::{ClientConfig, RootCertStore};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio::{runtime, time::timeout};
use tokio_postgres::config::{ChannelBinding, Host, LoadBalanceHosts, SslMode, SslNegotiation};
use tokio_postgres::{Config, NoTls, Socket, tls::MakeTlsConnect};
use tokio_postgres_rustls::MakeRustlsConnect;

const QUERY: &str = "SELECT * FROM information_schema.information_schema_catalog_name";

/// What the environment says. `{:?}` is safe to log: that of `Config` hides the password.
#[derive(Debug, Deserialize)]
struct Settings {
    /// From `PG.<KEYWORD>`. A `Config` for each host, as tokio-postgres by itself would stay with
    /// one that accepts a connection and then falls silent.
    #[serde(default, deserialize_with = "one_for_each_host")]
    pg: Vec<Config>,
    /// From `DB_CA_CERT`: a PEM file with the root certificates to trust. Without it, no TLS.
    db_ca_cert: Option<PathBuf>,
}

impl Settings {
    fn from_env() -> Result<Self> {
        let mut found = HashMap::new();
        for (name, value) in env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let lower = name.to_ascii_lowercase();
            // `PG__` too, because shells and AWS Lambda do not pass on a name with a dot.
            let key = match lower.strip_prefix("pg.").or(lower.strip_prefix("pg__")) {
                Some("ssl_mode") => "pg.sslmode".into(),
                Some("hosts") => "pg.host".into(),
                Some("ports") => "pg.port".into(),
                Some(keyword) => format!("pg.{keyword}"),
                None if lower == "db_ca_cert" => lower,
                None => continue, // Whatever else is in the environment does no harm.
            };
            // Errors have the name alone: any value may be a password in the wrong place.
            let Ok(value) = value.into_string() else {
                bail!("{name} is not UTF-8")
            };
            if value.is_empty() || key == "pg.host" && value.split(',').any(str::is_empty) {
                bail!("{name} is empty, or one of its entries: give it a value, or unset it")
            }
            if let Some(keyword) = key.strip_prefix("pg.") {
                // A plain word, or config would see a path in it, and the parser a URL.
                let plain = keyword.bytes().all(|b| matches!(b, b'a'..=b'z' | b'_'));
                ensure!(plain && !keyword.is_empty(), "{name} is no keyword");
                if let Err(error) = pair(keyword, &value).parse::<Config>() {
                    bail!("{name}: {}", Error::new(error).root_cause())
                }
                // Of anything else Linux says "Invalid argument", and not which.
                let range = match keyword {
                    "keepalives_idle" | "keepalives_interval" => 0..=32_767,
                    "keepalives_retries" => 1..=127,
                    "tcp_user_timeout" => 0..=2_147_483,
                    _ => 0..=u64::MAX,
                };
                let in_range = range.contains(&value.parse().unwrap_or(1));
                ensure!(in_range, "{name} is not in {range:?}");
            }
            if let Some((twin, other)) = found.insert(key, (name.clone(), value.clone()))
                && other != value
            {
                bail!("{twin} and {name} are one setting, with two values")
            }
        }

        let entries = |key| match found.get(key) {
            Some((_, list)) => list.split(',').count(),
            None => 0,
        };
        let [hosts, addrs, ports] = ["pg.host", "pg.hostaddr", "pg.port"].map(entries);
        if hosts.min(addrs) > 0 && hosts != addrs || ports > 1 && ports != hosts.max(addrs) {
            bail!("PG.HOST, PG.HOSTADDR and PG.PORT are lists of different lengths")
        }

        let tls = found.contains_key("db_ca_cert");
        let mut vars: HashMap<_, _> = found.into_iter().map(|(k, (_, v))| (k, v)).collect();
        if tls {
            // tokio-postgres's default, `prefer`, takes a server's word that it has no TLS.
            vars.entry("pg.sslmode".into()).or_insert("require".into());
        }
        let source = config::Environment::default().source(Some(vars));
        let config = config::Config::builder().add_source(source).build()?;
        let settings: Self = config.try_deserialize()?;
        for pg in &settings.pg {
            let require = pg.get_ssl_mode() == SslMode::Require;
            let direct = pg.get_ssl_negotiation() == SslNegotiation::Direct;
            let binding = pg.get_channel_binding() == ChannelBinding::Require;
            // Of a server without a name there is nothing to check, and a socket has no TLS.
            let named = matches!(pg.get_hosts(), [Host::Tcp(_)]);
            let wrong = match tls {
                true if !require => "DB_CA_CERT requires TLS and PG.SSLMODE does not",
                true if !named => "DB_CA_CERT requires a host name and PG.HOST is none",
                false if require => "PG.SSLMODE requires TLS and there is no DB_CA_CERT",
                false if direct => "PG.SSLNEGOTIATION requires TLS and there is no DB_CA_CERT",
                false if binding => "PG.CHANNEL_BINDING requires TLS and there is no DB_CA_CERT",
                _ => continue,
            };
            bail!(wrong)
        }
        Ok(settings)
    }
}

/// As tokio-postgres parses it, which knows, checks and documents every keyword.
fn pair(keyword: &str, value: &str) -> String {
    let value = match (keyword, value) {
        // libpq's words for what comes to the same here.
        ("sslmode", "verify-full") => "require",
        ("sslmode", "allow") => "prefer",
        _ => value,
    };
    let value = value.replace('\\', r"\\").replace('\'', r"\'");
    format!("{keyword}='{value}' ")
}

/// The keywords once for each host, with its own entry of each list.
fn one_for_each_host<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Config>, D::Error> {
    let keywords = BTreeMap::<String, String>::deserialize(from)?;
    let hosts = keywords.get("host").or(keywords.get("hostaddr"));
    let one = |i: usize| {
        let nth = |(keyword, value): (&String, &String)| match keyword.as_str() {
            "host" | "hostaddr" | "port" => {
                let list: Vec<&str> = value.split(',').collect();
                pair(keyword, list.get(i).unwrap_or(&list[0])) // One port is for all hosts.
            }
            _ => pair(keyword, value),
        };
        let pairs: String = keywords.iter().map(nth).collect();
        pairs.parse().map_err(D::Error::custom)
    };
    (0..hosts.map_or(0, |list| list.split(',').count()))
        .map(one)
        .collect()
}

/// Trusts the certificates in `file`, and no others.
fn client_config(file: &Path) -> Result<ClientConfig> {
    let mut pem = BufReader::new(File::open(file)?);
    // A byte-order mark would hide the first line, and with it the first certificate.
    if pem.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
        pem.consume(3);
    }
    let mut roots = RootCertStore::empty();
    for der in ReadIter::<_, CertificateDer>::new(pem) {
        let good = roots.len();
        // In our words, as the parser's would quote the file, which may be a private key; and
        // not with `add_parsable_certificates`, which passes over a damaged one.
        let der = der.map_err(|_| anyhow!("PEM that is damaged or cut short"));
        let added = der.and_then(|der| Ok(roots.add(der)?));
        added.with_context(|| format!("after {good} certificates"))?;
    }
    ensure!(!roots.is_empty(), "no certificate in it");
    debug!("trust anchors in {}: {}", file.display(), roots.len());
    trace!("{:?}", roots.roots);

    // P-256 first: PostgreSQL up to 17 takes no other, and to be told so is a round trip.
    let kx_groups = vec![kx_group::SECP256R1, kx_group::X25519, kx_group::SECP384R1];
    let provider = CryptoProvider {
        kx_groups,
        ..ring::default_provider()
    };
    let mut config = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    // PostgreSQL resumes no session, so there is none to keep.
    config.resumption = Resumption::disabled();
    // `sslnegotiation=direct` cannot do without; servers before 17 ignore it.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(config)
}

/// Asks one host after the other, and is content with the first answer.
async fn ask<T>(mut hosts: Vec<Config>, tls: T) -> Result<String>
where
    T: MakeTlsConnect<Socket> + Clone,
{
    if hosts
        .iter()
        .any(|pg| pg.get_load_balance_hosts() == LoadBalanceHosts::Random)
    {
        // The standard library's own randomness: every `RandomState` has other keys.
        hosts.sort_by_cached_key(|_| RandomState::new().build_hasher().finish());
    }
    let mut hosts = hosts.into_iter().peekable();
    while let Some(mut pg) = hosts.next() {
        let limit = *pg.get_connect_timeout().unwrap_or(&Duration::from_secs(10));
        // Half for TCP: a dead address of the host then leaves time for the next one.
        pg.connect_timeout(limit / 2);
        let answer = timeout(limit, query(&pg, tls.clone())).await;
        let answer = answer
            .unwrap_or_else(|_| Err(anyhow!("no answer within {limit:?} (PG.CONNECT_TIMEOUT)")));
        match answer.with_context(|| format!("connecting to {}", target(&pg))) {
            Err(error) if hosts.peek().is_some() => warn!("{error:#}; trying the next host"),
            answer => return answer,
        }
    }
    bail!(
        "no host: set PG.HOST (or PG__HOST) to the endpoint, PG.USER, PG.PASSWORD and PG.DBNAME \
         to log in, and DB_CA_CERT to a file with the root certificates"
    )
}

/// One question in one round trip, and a goodbye.
async fn query<T: MakeTlsConnect<Socket>>(pg: &Config, tls: T) -> Result<String> {
    let (client, connection) = pg.connect(tls).await?;
    // The client is dropped with the answer, upon which the connection takes its leave.
    let row = async move { client.query_typed_one(QUERY, &[]).await };
    let row = match tokio::join!(row, connection) {
        (Err(error), Err(cause)) if error.is_closed() => Err(cause),
        (row, _) => row,
    };
    Ok(row.context(QUERY)?.try_get(0)?)
}

fn target(pg: &Config) -> String {
    let host = match (pg.get_hosts(), pg.get_hostaddrs()) {
        ([Host::Tcp(name)], _) => name.clone(),
        ([Host::Unix(folder)], _) => folder.display().to_string(),
        (_, addresses) => format!("{addresses:?}"),
    };
    format!("{host}:{}", pg.get_ports().first().unwrap_or(&5432))
}

fn main() -> Result<()> {
    let default = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(default).init();
    let settings = Settings::from_env()?;
    debug!("{settings:?}");

    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let answer = runtime.block_on(async {
        if let Some(file) = &settings.db_ca_cert {
            let config = client_config(file).with_context(|| {
                format!(
                    "reading the root certificates in {} (DB_CA_CERT)",
                    file.display()
                )
            })?;
            ask(settings.pg, MakeRustlsConnect::new(config)).await
        } else {
            warn!("no DB_CA_CERT, so no TLS: others can read, and change, all that is sent");
            ask(settings.pg, NoTls).await
        }
    });
    // Not waiting for a look-up that is still under way, which nothing can cancel.
    runtime.shutdown_background();
    info!("information_schema_catalog_name: {:?}", answer?);
    Ok(())
}
