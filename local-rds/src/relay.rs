//! A relay that delays messages, as a long network path does, and counts round trips.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

/// A relay to a server. It delays each message, and counts the round trips.
pub struct Relay {
    port: u16,
    connections: Arc<Mutex<Vec<Arc<Mutex<Trips>>>>>,
}

/// The round trips of one connection.
#[derive(Default)]
struct Trips {
    /// How often the server has answered after the client has sent something.
    answered: usize,
    /// Whether the client has sent something, and has no answer yet.
    waits: bool,
}

impl Relay {
    /// Starts a relay to a port on 127.0.0.1. `round_trip` must not be zero: without a delay, the relay cannot tell
    /// which messages belong together.
    pub fn new(to: u16, round_trip: Duration) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let connections = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&connections);
        spawn(move || {
            for client in listener.incoming() {
                let trips = Arc::default();
                all.lock().unwrap().push(Arc::clone(&trips));
                spawn(move || connect(client?, to, round_trip, trips));
            }
        });
        Ok(Self { port, connections })
    }

    /// The port of the relay, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The round trips of each connection so far, including the round trip that opens TCP.
    pub fn round_trips(&self) -> Vec<usize> {
        let connections = self.connections.lock().unwrap();
        let answered = |trips: &Arc<Mutex<Trips>>| trips.lock().unwrap().answered;
        connections
            .iter()
            .map(|trips| 1 + answered(trips))
            .collect()
    }
}

fn connect(
    client: TcpStream,
    to: u16,
    round_trip: Duration,
    trips: Arc<Mutex<Trips>>,
) -> std::io::Result<()> {
    let server = TcpStream::connect((Ipv4Addr::LOCALHOST, to))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_server, to_client) = (server.try_clone()?, client.try_clone()?);
    let answers = Arc::clone(&trips);
    let answered = move || {
        let mut trips = answers.lock().unwrap();
        trips.answered += usize::from(std::mem::take(&mut trips.waits));
    };
    spawn(move || carry(from_server, to_client, round_trip / 2, || {}, answered));
    // Opening TCP takes a round trip, which took no time on this machine.
    sleep(round_trip);
    let asks = move || trips.lock().unwrap().waits = true;
    carry(client, server, round_trip / 2, asks, || {});
    Ok(())
}

/// Carries bytes in one direction, and delays each by `time`. Bytes that are due at the same time are sent together, as
/// in a packet of a network.
fn carry(
    mut from: TcpStream,
    mut to: TcpStream,
    time: Duration,
    arrived: impl Fn(),
    delivered: impl Fn() + Send + 'static,
) {
    let (send, receive) = channel::<(Instant, Vec<u8>)>();
    spawn(move || {
        while let Ok((due, mut bytes)) = receive.recv() {
            sleep(due.saturating_duration_since(Instant::now()));
            bytes.extend(receive.try_iter().flat_map(|(_, more)| more));
            delivered();
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        arrived();
        if send
            .send((Instant::now() + time, buffer[..count].to_vec()))
            .is_err()
        {
            return;
        }
    }
}
