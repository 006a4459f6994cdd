//! A copy with the changes that docs/rds.md lists connects to a server that takes a hybrid group alone.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::round_trips::STOCK_ROUND_TRIPS;
use crate::support::page::{build, manifest, program, quoted, replaced, section};
use crate::support::{PLAIN, RDS, Run, at_port, changed, demo, file, run_of};
use local_rds::{Authority, ENDPOINT, KeyType, Relay};
use tempfile::TempPath;

/// The replacements in the order of the README's list, as old and new text: one in the manifest, two in the program.
fn changes() -> Vec<[String; 2]> {
    let section = section("docs/rds.md", "Post-quantum key exchange");
    let items = section.lines().filter(|line| line.starts_with("- "));
    let quoted = items.map(quoted);
    let pairs = quoted.map(|quoted| match quoted[..] {
        [old, new] => [old.to_owned(), new.to_owned()],
        _ => panic!("docs/rds.md: an item of the list is to have one text and another: {quoted:?}"),
    });
    pairs.collect()
}

/// A server that accepts only X25519MLKEM768, and relays to another server. Its arguments are `<port> <certificates>
/// <key>`. It prints its own port. It is a project of its own, because graviola takes long to build.
const SERVER: &str = r#"
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::{NamedGroup::X25519MLKEM768, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    let to = args[1].parse::<u16>().unwrap();
    let chain = CertificateDer::pem_file_iter(&args[2]).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(&args[3]).unwrap();
    let mut provider = rustls_graviola::default_provider();
    provider.kx_groups.retain(|group| group.name() == X25519MLKEM768);
    assert_eq!(provider.kx_groups.len(), 1);
    let config = ServerConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap().port());
    loop {
        let (mut client, _) = listener.accept().await.unwrap();
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            client.read_exact(&mut [0; 8]).await?; // SSLRequest
            client.write_all(b"S").await?;
            let mut client = acceptor.accept(client).await?;
            let mut server = TcpStream::connect(("127.0.0.1", to)).await?;
            copy_bidirectional(&mut client, &mut server).await
        });
    }
}
"#;

const SERVER_MANIFEST: &str = r#"
[package]
name = "hybrid-alone"
edition = "2024"

[workspace]

[dependencies]
rustls = { version = "0.23", default-features = false, features = ["logging", "ring", "std", "tls12"] }
rustls-graviola = "0.3"
tokio = { version = "1", features = ["io-util", "macros", "net", "rt", "time"] }
tokio-rustls = { version = "0.26", default-features = false }
"#;

/// That server in front of [`PLAIN`], as RDS 18 is with only this group in `ssl_groups`. Dropping this ends the server.
struct HybridAlone {
    process: Child,
    port: u16,
    roots: TempPath,
}

impl HybridAlone {
    fn new() -> Self {
        let program = build("hybrid-alone", SERVER, SERVER_MANIFEST, &[]);
        let authority = Authority::new(KeyType::Ecc384).unwrap();
        let certificate = authority.issue(ENDPOINT, |_| {}).unwrap();
        let chain = file(certificate.leaf + &certificate.subordinate);
        let key = file(certificate.key);
        let mut process = Command::new(program)
            .arg(PLAIN.port().to_string())
            .args([&chain, &key])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut port = String::new();
        let stdout = process.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut port).unwrap();
        Self {
            process,
            port: port.trim().parse().unwrap(),
            roots: file(authority.root()),
        }
    }
}

impl Drop for HybridAlone {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[ignore = "builds AWS-LC, which takes half a minute"]
fn with_the_changes_of_the_page_it_connects_where_a_hybrid_group_is_required() {
    let [feature, provider, first] = &changes()[..] else {
        panic!("docs/rds.md: the list is to have three changes")
    };
    let change = |text: &str, [old, new]: &[String; 2]| replaced(text, old, new);
    let program = change(&change(&program(), provider), first);
    let manifest = change(&manifest("post-quantum", ""), feature);
    let copy = build("post-quantum", &program, &manifest, &[]);
    let round_trips = |port: u16, run: &dyn Fn(u16) -> Run| {
        let relay = Relay::new(port, Duration::from_millis(50)).unwrap();
        run(relay.port()).succeeded();
        relay.round_trips()
    };

    let server = HybridAlone::new();
    let roots = [("DB_CA_CERT", server.roots.to_str().unwrap())];
    let vars = |port: u16| changed(at_port(port, &PLAIN), &roots);
    demo(&vars(server.port)).failed(&["received fatal alert: HandshakeFailure"]);
    let trips = round_trips(server.port, &|port| run_of(&copy, &vars(port)));
    assert_eq!(trips, [STOCK_ROUND_TRIPS]);

    // PostgreSQL up to 17 accepts only P-256, so it asks the client for another key share.
    let again = usize::from(RDS.version().unwrap() < 18);
    let trips = round_trips(RDS.port(), &|port| run_of(&copy, &at_port(port, &RDS)));
    assert_eq!(trips, [STOCK_ROUND_TRIPS + again]);
}
