//! The service as a process, as it is and as a copy, and what a server knows of it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::{scope, sleep, spawn};
use std::time::{Duration, Instant};

use super::page::{PROJECT, between, cargo, example, new_project, replaced, section, target};
use super::{Var, admin, eventually, kill, terminate};
use local_rds::LocalRds;
use rustix::process::Signal;

/// The size of its pool.
pub const SIZE: usize = 4;

/// The example as it is.
pub static SERVICE: LazyLock<PathBuf> = LazyLock::new(|| {
    // As the tests are built, so that nothing is built twice.
    let build = ["build", "-q", "--workspace", "--example", "service"];
    cargo(&build, Path::new(PROJECT));
    target().join("debug/examples/service")
});

/// What people add: a handler that runs any query, in the form that it is asked for.
const HANDLER: &str = r#"
async fn sql(
    State(database): State<Database>,
    extract::Path((form, limit)): extract::Path<(String, u64)>,
    sql: String,
) -> Result<String, Error> {
    let queries = async |client: &mut Client| {
        let row = match form.as_str() {
            "query" => client.query_one(&sql, &[]).await?,
            "cached" => {
                let statement = client.prepare_cached(&sql).await?;
                client.query_one(&statement, &[]).await?
            }
            // A transaction that is left half-way if the query fails.
            "transaction" => {
                let transaction = client.transaction().await?;
                let one = 1;
                transaction.execute("INSERT INTO half_way VALUES ($1)", &[&one]).await?;
                let row = transaction.query_one(&sql, &[]).await?;
                transaction.commit().await?;
                row
            }
            // What the contract forbids, and people do.
            "begin" => {
                client.batch_execute("BEGIN; INSERT INTO half_way VALUES (1)").await?;
                client.query_typed_one(&sql, &[]).await?
            }
            "begin, then an error of ours" => {
                client.batch_execute("BEGIN; INSERT INTO half_way VALUES (1)").await?;
                return Err(Error::NotFound);
            }
            "batch" => {
                client.batch_execute(&sql).await?;
                return Ok(String::new());
            }
            // What the contract forbids: a transaction that it leaves open, and answers.
            "left open" => {
                client.batch_execute("BEGIN").await?;
                return Ok("left open".into());
            }
            // It gives up on a query, and returns no error.
            "in flight" => {
                let slow = client.batch_execute("SELECT pg_sleep(600)");
                _ = timeout(Duration::from_millis(50), slow).await;
                return Ok("gave up".into());
            }
            "join" => {
                let slow = "SELECT pg_sleep(600)";
                tokio::try_join!(client.query_typed_one(&sql, &[]), client.query_typed_one(slow, &[]))?.0
            }
            _ => client.query_typed_one(&sql, &[]).await?,
        };
        Ok(row.try_get(0)?)
    };
    database.run(Duration::from_millis(limit), queries).await
}
"#;

/// The service as its page says to take it, with that handler.
pub static COPY: LazyLock<PathBuf> = LazyLock::new(|| {
    let route = r#".route("/settings/{name}", get(setting))"#;
    let more = format!("{route}\n.route(\"/sql/{{form}}/{{limit}}\", axum::routing::post(sql))");
    let code = replaced(&example(), route, &more) + HANDLER;
    new_project("service-copy", &code, dependencies())
});

/// The dependencies that its page adds.
pub fn dependencies() -> &'static str {
    static LINES: LazyLock<String> = LazyLock::new(|| {
        let section = section("examples/README.md", "Take it into your project");
        between(&section, "```toml\n", "```").to_owned()
    });
    &LINES
}

/// A service that runs, until this is dropped.
pub struct Service {
    pub process: Child,
    pub address: String,
    log: Arc<Mutex<String>>,
}

pub fn start(program: &Path, vars: &[Var]) -> Child {
    start_by(Command::new(program), vars)
}

fn start_by(mut command: Command, vars: &[Var]) -> Child {
    command.env_clear().env("LISTEN", "127.0.0.1:0");
    command.envs(vars.iter().cloned()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

impl Service {
    pub fn new(program: &Path, vars: &[Var]) -> Self {
        Self::of(Command::new(program), vars)
    }

    /// A service that is started by this command.
    pub fn of(command: Command, vars: &[Var]) -> Self {
        let process = start_by(command, vars);
        let log = Arc::new(Mutex::new(String::new()));
        let mut service = Self {
            address: String::new(),
            log: Arc::clone(&log),
            process,
        };
        let lines = BufReader::new(service.process.stderr.take().unwrap()).lines();
        spawn(move || {
            for line in lines.map_while(Result::ok) {
                *log.lock().unwrap() += &(line + "\n");
            }
        });
        let listening = || service.log().contains("listening on http://");
        eventually("it listens", listening);
        service.address = between(&service.log(), "listening on http://", ",").to_owned();
        service
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The status and the body of an answer. No answer within the time: the caller has hung up.
    pub fn call(&self, path: &str, body: Option<&str>, time: Duration) -> Option<(u16, String)> {
        let url = format!("http://{}/{path}", self.address);
        let agent = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = agent.timeout_global(Some(time)).build().new_agent();
        let response = match body {
            Some(body) => agent.post(url).send(body),
            None => agent.get(url).call(),
        };
        let mut response = match response {
            Err(ureq::Error::Timeout(_)) => return None,
            response => response.unwrap_or_else(|error| panic!("{error}: {}", self.log())),
        };
        let body = response.body_mut().read_to_string().unwrap();
        Some((response.status().as_u16(), body))
    }

    /// The value of a parameter, or the status of the error.
    pub fn setting(&self, name: &str) -> Result<String, u16> {
        let answer = self.call(&format!("settings/{name}"), None, MINUTE);
        value(answer.expect("an answer within a minute"))
    }

    /// The answer to a query in one of the forms of [`HANDLER`]. It comes, whatever happens: so nothing hangs.
    pub fn sql(&self, form: &str, millis: u64, sql: &str) -> Result<String, u16> {
        let path = format!("sql/{}/{millis}", form.replace(' ', "%20"));
        value(
            self.call(&path, Some(sql), MINUTE)
                .expect("an answer within a minute"),
        )
    }

    /// So many requests after each other, each with an answer of its own.
    #[track_caller]
    pub fn works(&self, times: usize) {
        for nth in 0..times {
            let answer = self.sql("typed", 10_000, &format!("SELECT '{nth}'::text"));
            assert_eq!(answer, Ok(nth.to_string()), "{}", self.log());
        }
    }

    /// Requests until one works; returns how many have failed before.
    #[track_caller]
    pub fn failures(&self) -> usize {
        let mut failures = 0;
        while self.sql("typed", 1500, "SELECT 'works'::text").is_err() {
            failures += 1;
            assert!(failures < 100, "{}", self.log());
            // A server that restarts refuses at once.
            sleep(Duration::from_millis(50));
        }
        failures
    }

    /// As many requests at once as the pool has clients.
    pub fn at_once(&self, form: &str, millis: u64, sql: &str) -> Vec<Result<String, u16>> {
        scope(|scope| {
            let asked = [(); SIZE].map(|()| scope.spawn(|| self.sql(form, millis, sql)));
            asked.map(|asked| asked.join().unwrap()).to_vec()
        })
    }

    /// Opens all connections of the pool, by as many queries at once.
    pub fn fill(&self, rds: &LocalRds) {
        while sessions(rds).len() < SIZE {
            for answer in self.at_once("typed", 10_000, "SELECT pg_sleep(0.2)::text") {
                answer.unwrap();
            }
        }
    }

    /// Sends a signal, and waits for the end.
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        end(&mut self.process, signal)
    }
}

/// Sends a signal to a process, and waits for its end.
#[track_caller]
pub fn end(process: &mut Child, signal: Signal) -> ExitStatus {
    kill(signal, process.id() as i32);
    let start = Instant::now();
    let mut status = None;
    while status.is_none() && start.elapsed() < MINUTE {
        sleep(Duration::from_millis(20));
        status = process.try_wait().unwrap();
    }
    let _ = process.kill();
    status.expect("it ends within a minute")
}

pub const MINUTE: Duration = Duration::from_secs(60);

fn value((status, body): (u16, String)) -> Result<String, u16> {
    match status {
        200 => Ok(body),
        // A caller is told no more.
        _ => {
            assert!(body.starts_with(&format!("{status} ")), "{body}");
            Err(status)
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let log = self.log();
        if !std::thread::panicking() {
            assert!(
                !log.contains("panicked") && !log.contains(local_rds::PASSWORD),
                "{log}"
            );
        }
    }
}

pub const SESSIONS: &str = "SELECT pid FROM pg_stat_activity
    WHERE usename = 'postgres' AND backend_type = 'client backend' ORDER BY pid";

/// The processes of the service's sessions on the server.
pub fn sessions(rds: &LocalRds) -> Vec<i32> {
    let rows = admin(rds).query(SESSIONS, &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Waits until no session is left but those of the pool: the server may just be ending some others.
#[track_caller]
pub fn no_more_sessions_than_clients(rds: &LocalRds) {
    eventually("no more sessions than clients", || {
        sessions(rds).len() <= SIZE
    });
}

pub fn terminate_sessions(rds: &LocalRds) {
    let mut admin = admin(rds);
    for pid in sessions(rds) {
        terminate(&mut admin, pid);
    }
}

/// Does this while the processes of the service's sessions are stopped.
pub fn while_frozen(rds: &LocalRds, done: impl FnOnce()) {
    let frozen = sessions(rds);
    frozen.iter().for_each(|pid| kill(Signal::STOP, *pid));
    done();
    frozen.iter().for_each(|pid| kill(Signal::CONT, *pid));
}

/// How the connections of a service to this port are kept alive: seconds before the first probe, seconds between two,
/// and probes. None where the system does not let one process look at another's sockets.
pub fn keepalives(service: &Service, port: u16) -> Option<Vec<[u32; 3]>> {
    #[cfg(target_os = "linux")]
    {
        use rustix::net::sockopt;
        use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
        let process = pidfd_open(Pid::from_child(&service.process), PidfdFlags::empty()).ok()?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", service.process.id())).ok()? {
            let number = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let fd = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).ok()?;
            let socket = std::net::TcpStream::from(fd);
            let to_server = socket.peer_addr().is_ok_and(|peer| peer.port() == port);
            if to_server && sockopt::socket_keepalive(&socket).ok()? {
                let [idle, interval] = [
                    sockopt::tcp_keepidle(&socket),
                    sockopt::tcp_keepintvl(&socket),
                ]
                .map(|time| time.unwrap().as_secs() as u32);
                found.push([idle, interval, sockopt::tcp_keepcnt(&socket).ok()?]);
            }
        }
        Some(found)
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// The most sessions that the server has at a time while this is done.
pub fn most_sessions(rds: &LocalRds, done: impl FnOnce()) -> usize {
    let over = AtomicBool::new(false);
    scope(|scope| {
        let most = scope.spawn(|| {
            let mut admin = admin(rds);
            let mut most = 0;
            while !over.load(Ordering::Relaxed) {
                most = most.max(admin.query(SESSIONS, &[]).unwrap().len());
                sleep(Duration::from_millis(2));
            }
            most
        });
        done();
        over.store(true, Ordering::Relaxed);
        most.join().unwrap()
    })
}

/// Counts answers and refusals of so many callers, each of which comes again as soon as it is answered.
pub fn callers(count: usize, time: Duration, call: impl Fn() -> bool + Sync) -> [usize; 2] {
    let [answered, refused] = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let start = Instant::now();
    scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                while start.elapsed() < time {
                    let counter = if call() { &answered } else { &refused };
                    if start.elapsed() < time {
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    [answered, refused].map(AtomicUsize::into_inner)
}

/// As on RDS, the master user owns the database, and may make tables in it.
pub fn tables(rds: &LocalRds) {
    let table = "SET ROLE postgres; CREATE TABLE half_way (i int);
        CREATE TABLE names AS SELECT 'x'::varchar AS name";
    admin(rds).batch_execute(table).unwrap();
}
