//! Servers that do what no honest server does, and that record what clients send.

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

/// The runtime of the fake servers. Its thread runs until the process ends.
static RUNTIME: LazyLock<Handle> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
});

/// All that a client with `sslmode=require` sends in plaintext.
pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
/// AuthenticationCleartextPassword: the server asks for the password itself.
pub const CLEARTEXT_PASSWORD: &[u8] = b"R\0\0\0\x08\0\0\0\x03";
/// The end of a log-in: AuthenticationOk, BackendKeyData and ReadyForQuery.
pub const WELCOME: &[u8] = b"R\0\0\0\x08\0\0\0\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I";

/// A connection that records what it reads.
pub type Wire = InspectReader<TcpStream, Box<dyn FnMut(&[u8]) + Send>>;

/// A server on 127.0.0.1 that runs a script for each client, until the tests end.
pub struct Fake {
    pub port: u16,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Fake {
    /// Starts a server. It ignores errors of the script, because a client may leave at any time.
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

    /// Whether a client has connected.
    pub fn has_a_client(&self) -> bool {
        !self.heard.lock().unwrap().is_empty()
    }

    /// Waits until all clients have left, and returns all that each has sent.
    pub fn heard(&self) -> Vec<Vec<u8>> {
        // Every connection has a reference to the record, and so have the listener and `self`.
        let gone = || Arc::strong_count(&self.heard) == 2;
        eventually("all clients are gone", gone);
        self.heard.lock().unwrap().clone()
    }
}

/// A server that sends this answer to SSLRequest, and then nothing.
pub fn only_says(answer: &'static [u8]) -> Fake {
    Fake::new(move |mut wire| async move {
        startup(&mut wire).await?;
        wire.write_all(answer).await?;
        silence(wire).await
    })
}

/// A relay to this port that answers each client only after 15 s, as an express cluster does when it wakes up.
pub fn asleep(port: u16) -> Fake {
    Fake::new(move |mut wire| async move {
        sleep(Duration::from_secs(15)).await;
        let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        copy_bidirectional(&mut wire, &mut server).await?;
        Ok(())
    })
}

/// Reads until the client closes the connection, and sends nothing.
pub async fn silence(mut wire: impl AsyncRead + Unpin) -> std::io::Result<()> {
    let mut buffer = [0; 1024];
    while wire.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// Reads SSLRequest or StartupMessage, which have no type, and returns the body.
pub async fn startup(wire: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let length = wire.read_u32().await?;
    let mut body = vec![0; length as usize - 4];
    wire.read_exact(&mut body).await?;
    Ok(body)
}

/// Reads a message with a type, and returns the type and the body.
pub async fn message(wire: &mut (impl AsyncRead + Unpin)) -> std::io::Result<(u8, Vec<u8>)> {
    Ok((wire.read_u8().await?, startup(wire).await?))
}

/// Reads SSLRequest, answers yes, and accepts TLS.
pub async fn tls<W: AsyncRead + AsyncWrite + Unpin>(
    mut wire: W,
    acceptor: &TlsAcceptor,
) -> std::io::Result<tokio_rustls::server::TlsStream<W>> {
    startup(&mut wire).await?;
    wire.write_all(b"S").await?;
    acceptor.accept(wire).await
}

/// An acceptor of TLS with a certificate for [`ENDPOINT`], and the file of the root certificate.
pub fn own_tls() -> (TlsAcceptor, TempPath) {
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let certificate = authority.issue(ENDPOINT, |_| {}).unwrap();
    (acceptor(&certificate), file(authority.root()))
}

/// An acceptor of TLS with this certificate.
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

/// A port that does not answer to TCP, as behind a security group: the backlog of the listener is full.
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
