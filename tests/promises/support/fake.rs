//! Servers that do what no honest one does, and the record of what clients sent them.

use std::future::Future;
use std::net::Ipv4Addr;
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::Duration;

use super::{eventually, file};
use local_rds::{Authority, ENDPOINT, KeyType, ServerCertificate};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tempfile::TempPath;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;
use tokio_util::io::InspectReader;

/// Where the fake servers live: a thread of its own, until the process ends.
static RUNTIME: LazyLock<Handle> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
});

/// All that a client with `sslmode=require` sends in plaintext.
pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
/// What clients are told when a server asks for the password as it is.
pub const CLEARTEXT_PASSWORD: &[u8] = b"R\0\0\0\x08\0\0\0\x03";
/// The end of a log-in: authenticated, and ready for a query.
pub const WELCOME: &[u8] = b"R\0\0\0\x08\0\0\0\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I";

/// A connection whose incoming bytes are on record.
pub type Wire = InspectReader<TcpStream, Box<dyn FnMut(&[u8]) + Send>>;

/// A server on 127.0.0.1 that follows a script with each client, until the tests are over.
pub struct Fake {
    pub port: u16,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Fake {
    /// Errors of the script are ignored: a client may leave at any time.
    pub fn new<F>(script: impl Fn(Wire) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = std::io::Result<()>> + Send + 'static,
    {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&heard);
        let listener = RUNTIME
            .block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
            .unwrap();
        let port = listener.local_addr().unwrap().port();
        RUNTIME.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let record = Arc::clone(&all);
                let nth = record.lock().unwrap().len();
                record.lock().unwrap().push(Vec::new());
                let inspect = move |bytes: &[u8]| record.lock().unwrap()[nth].extend(bytes);
                tokio::spawn(script(Wire::new(stream, Box::new(inspect))));
            }
        });
        Self { port, heard }
    }

    /// Whether a client has come.
    pub fn has_a_client(&self) -> bool {
        !self.heard.lock().unwrap().is_empty()
    }

    /// All that each client has sent, once all of them are gone.
    pub fn heard(&self) -> Vec<Vec<u8>> {
        // Every connection holds the record, besides this and the listener.
        let gone = || Arc::strong_count(&self.heard) == 2;
        eventually("all clients are gone", gone);
        self.heard.lock().unwrap().clone()
    }
}

/// A server that answers SSLRequest like this, and says no more.
pub fn only_says(answer: &'static [u8]) -> Fake {
    Fake::new(move |mut wire| async move {
        startup(&mut wire).await?;
        wire.write_all(answer).await?;
        silence(wire).await
    })
}

/// A server that answers each client only after 15 s, as an express cluster that has paused.
pub fn asleep(port: u16) -> Fake {
    Fake::new(move |mut wire| async move {
        sleep(Duration::from_secs(15)).await;
        let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        copy_bidirectional(&mut wire, &mut server).await?;
        Ok(())
    })
}

/// Reads what comes until the client has had enough, and says no more.
pub async fn silence(mut wire: impl AsyncRead + Unpin) -> std::io::Result<()> {
    let mut buffer = [0; 1024];
    while wire.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// Reads a message without a type, as SSLRequest and StartupMessage are, and returns its body.
pub async fn startup(wire: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let length = wire.read_u32().await?;
    let mut body = vec![0; length as usize - 4];
    wire.read_exact(&mut body).await?;
    Ok(body)
}

/// Reads any other message, and returns its type and body.
pub async fn message(wire: &mut (impl AsyncRead + Unpin)) -> std::io::Result<(u8, Vec<u8>)> {
    Ok((wire.read_u8().await?, startup(wire).await?))
}

/// Reads SSLRequest, says yes, and is a TLS server from then on.
pub async fn tls<W: AsyncRead + AsyncWrite + Unpin>(
    mut wire: W,
    acceptor: &TlsAcceptor,
) -> std::io::Result<tokio_rustls::server::TlsStream<W>> {
    startup(&mut wire).await?;
    wire.write_all(b"S").await?;
    acceptor.accept(wire).await
}

/// A TLS server with a certificate for [`ENDPOINT`], and the file of its root certificate.
pub fn own_tls() -> (TlsAcceptor, TempPath) {
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let certificate = authority.issue(ENDPOINT, |_| {}).unwrap();
    (acceptor(&certificate), file(authority.root()))
}

/// A TLS server with this certificate.
pub fn acceptor(certificate: &ServerCertificate) -> TlsAcceptor {
    let chain = certificate.leaf.clone() + &certificate.subordinate;
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
        .collect::<Result<_, _>>()
        .unwrap();
    let key = PrivateKeyDer::from_pem_slice(certificate.key.as_bytes()).unwrap();
    let config =
        ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

/// A port that answers to TCP as a security group does, not at all: its backlog is full.
pub fn black_hole() -> (u16, TcpListener, Vec<TcpStream>) {
    RUNTIME.block_on(async {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut waiting = Vec::new();
        let limit = Duration::from_millis(500);
        while let Ok(stream) = tokio::time::timeout(limit, TcpStream::connect(address)).await {
            waiting.push(stream.unwrap());
        }
        (address.port(), listener, waiting)
    })
}
