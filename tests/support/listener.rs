//! What the fake servers and the relay share.

use std::future::Future;
use std::net::Ipv4Addr;
use std::sync::LazyLock;

use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

pub static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

/// Listens on 127.0.0.1 until the process ends, and returns the port. Each connection is served at
/// once, and told how many were before it.
pub fn listen<F>(serve: impl Fn(usize, TcpStream) -> F + Send + 'static) -> u16
where
    F: Future<Output: Send> + Send + 'static,
{
    let listener = RUNTIME
        .block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .unwrap();
    let port = listener.local_addr().unwrap().port();
    RUNTIME.spawn(async move {
        for nth in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(nth, stream));
        }
    });
    port
}
