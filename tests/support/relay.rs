//! A relay that makes the way to a server longer, and counts the round trips on it.

#[path = "listener.rs"]
mod listener;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use listener::listen;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::{Instant, sleep, sleep_until};

pub struct Relay {
    pub port: u16,
    trips: Arc<Mutex<Vec<Trips>>>,
}

/// The round trips of one connection.
#[derive(Default)]
struct Trips {
    /// How often the client has spoken, and waited for the answer.
    answered: usize,
    /// It has spoken, and the answer is on its way.
    waits: bool,
}

impl Relay {
    /// To this port on 127.0.0.1, with so long a way to it and back. Of no length at all it
    /// could not tell an answer from the next question, which it has to for counting.
    pub fn new(to: u16, round_trip: Duration) -> Self {
        let trips = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&trips);
        let port = listen(move |nth, client| {
            let (asks, answers) = (Arc::clone(&all), Arc::clone(&all));
            all.lock().unwrap().push(Trips::default());
            async move {
                let server = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await.unwrap();
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let answered = move || {
                    let trips = &mut answers.lock().unwrap()[nth];
                    trips.answered += usize::from(std::mem::take(&mut trips.waits));
                };
                tokio::spawn(carry(
                    from_server,
                    to_client,
                    round_trip / 2,
                    || {},
                    answered,
                ));
                // That of TCP itself, which the kernel has answered for us at once.
                sleep(round_trip).await;
                let asks = move || asks.lock().unwrap()[nth].waits = true;
                carry(from_client, to_server, round_trip / 2, asks, || {}).await;
            }
        });
        Self { port, trips }
    }

    /// The round trips of each connection so far, with the one of TCP.
    pub fn round_trips(&self) -> Vec<usize> {
        self.trips
            .lock()
            .unwrap()
            .iter()
            .map(|trips| 1 + trips.answered)
            .collect()
    }
}

/// Carries bytes one way, each for as long as the way takes. What has arrived together by then
/// goes on together, as it would in the real network's packets.
async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    time: Duration,
    arrived: impl Fn() + Send + 'static,
    delivered: impl Fn() + Send + 'static,
) {
    let (send, mut receive) = unbounded_channel::<(Instant, Vec<u8>)>();
    tokio::spawn(async move {
        while let Some((due, mut bytes)) = receive.recv().await {
            sleep_until(due).await;
            while let Ok((_, more)) = receive.try_recv() {
                bytes.extend(more);
            }
            delivered();
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    });
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        arrived();
        if send
            .send((Instant::now() + time, buffer[..count].to_vec()))
            .is_err()
        {
            return;
        }
    }
}
