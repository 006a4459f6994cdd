//! A running server.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::home::{ADMIN, Home};
use crate::{Builder, ENDPOINT, IAM_USER, USER, programs};

/// The limit for a server to start, and for a standby to begin to stream.
const START: Duration = Duration::from_secs(60);

/// The script that runs a server, and deletes its folder when the server has ended.
const KEEPER: &str = include_str!("keeper.sh");

/// A running stand-in.
pub struct LocalRds {
    home: Home,
    keeper: Child,
    port: u16,
    password: String,
}

/// Start and stop.
impl LocalRds {
    /// The options of an instance. The defaults are the options that the RDS console proposes.
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) fn start(home: Home, password: String) -> Result<Self> {
        let port = free_port();
        let rds = Self {
            keeper: keeper(&home, port)?,
            home,
            port,
            password,
        };
        rds.wait_until_ready(1)?;
        Ok(rds)
    }

    /// Stops the server and starts it again, with the same data and on the same port, as a reboot of an instance does.
    pub fn restart(&mut self) -> Result<()> {
        let starts = self.starts()?;
        self.home.write("keep", 0o600, "")?;
        self.stop();
        for file in ["keep", "ended"] {
            fs::remove_file(self.home.path(file))?;
        }
        self.keeper = keeper(&self.home, self.port)?;
        self.wait_until_ready(starts + 1)
    }

    fn stop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }

    /// How often the server has become ready so far.
    fn starts(&self) -> Result<usize> {
        // A primary logs "… to accept connections", a standby "… to accept read-only connections".
        let ready = "database system is ready to accept";
        Ok(self.log()?.matches(ready).count())
    }

    fn wait_until_ready(&self, starts: usize) -> Result<()> {
        self.wait_until("PostgreSQL does not start", || Ok(self.starts()? >= starts))
    }

    fn wait_until(&self, complaint: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !is_so()? {
            if self.home.path("ended").exists() || start.elapsed() > START {
                bail!("{complaint}; its log:\n{}", self.log()?);
            }
            sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Runs a script of psql as the superuser, over the Unix socket, and returns what it prints.
    pub(crate) fn sql(&self, script: &str) -> Result<String> {
        let mut psql = Command::new(programs::psql()?);
        psql.args([
            "-XAtq",
            "-v",
            "ON_ERROR_STOP=1",
            "-U",
            ADMIN,
            "-d",
            "postgres",
        ])
        .arg("-h")
        .arg(self.socket())
        .args(["-p", &self.port.to_string()])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
        let mut session = psql.spawn().with_context(|| format!("{psql:?}"))?;
        let mut stdin = session.stdin.take().context("no standard input")?;
        stdin.write_all(script.as_bytes())?;
        drop(stdin);
        let output = session.wait_with_output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{psql:?}: {error}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Starts a hot standby with the same certificate, and waits until it streams from this instance.
    pub fn standby(&self) -> Result<Self> {
        let (begin, end) = match self.version()? {
            ..15 => (
                "pg_start_backup('', true, false)",
                "pg_stop_backup(false, false)",
            ),
            15.. => ("pg_backup_start('', true)", "pg_backup_stop(false)"),
        };
        let home = Home::new(self.home.bin.clone(), self.home.files.clone())?;
        let (from, to) = (self.socket(), home.path("data"));
        let label = self.sql(&format!(
            "SELECT {begin} \\g /dev/null
             \\! cp -Rp '{}' '{}' && touch '{}'
             SELECT labelfile FROM {end};",
            from.display(),
            to.display(),
            home.path("copied").display(),
        ))?;
        ensure!(
            home.path("copied").exists(),
            "copying {} has failed",
            from.display()
        );
        fs::remove_file(to.join("postmaster.pid"))?;
        home.write("data/backup_label", 0o600, &label)?;
        home.write("data/standby.signal", 0o600, "")?;
        let primary = format!("host={} port={} user={ADMIN}", from.display(), self.port);
        let conninfo = format!("primary_conninfo = '{primary}'");
        home.write("data/postgresql.auto.conf", 0o600, &conninfo)?;
        let standby = Self::start(home, self.password.clone())?;
        standby.wait_until("the standby does not stream", || {
            let streaming = "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'";
            Ok(!self.sql(streaming)?.is_empty())
        })?;
        Ok(standby)
    }
}

impl Drop for LocalRds {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Facts about the instance, and how to connect to it.
impl LocalRds {
    /// The TCP port, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The major version of the server.
    pub fn version(&self) -> Result<u32> {
        programs::version(&self.home.bin)
    }

    /// The file of the root certificates, for `DB_CA_CERT`.
    pub fn roots(&self) -> PathBuf {
        self.home.path("root.pem")
    }

    /// The folder of the server's Unix socket, which lets the superuser `rdsadmin` in.
    pub fn socket(&self) -> PathBuf {
        self.home.path("data")
    }

    /// The server's log so far.
    pub fn log(&self) -> Result<String> {
        let log = fs::read(self.home.path("log")).unwrap_or_default();
        Ok(String::from_utf8_lossy(&log).into_owned())
    }

    pub(crate) fn password(&self) -> &str {
        &self.password
    }

    /// The variables with which the program connects to the server.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        vec![
            ("PG.HOST", ENDPOINT.to_owned()),
            ("PG.HOSTADDR", Ipv4Addr::LOCALHOST.to_string()),
            ("PG.PORT", self.port.to_string()),
            ("PG.USER", USER.to_owned()),
            ("PG.PASSWORD", self.password.clone()),
            ("PG.DBNAME", "postgres".to_owned()),
            ("DB_CA_CERT", self.roots().display().to_string()),
        ]
    }

    /// The variables with which psql, and other programs with libpq, connect to the server.
    pub fn libpq_env(&self) -> Vec<(&'static str, String)> {
        vec![
            ("PGHOST", ENDPOINT.to_owned()),
            ("PGHOSTADDR", Ipv4Addr::LOCALHOST.to_string()),
            ("PGPORT", self.port.to_string()),
            ("PGUSER", USER.to_owned()),
            ("PGPASSWORD", self.password.clone()),
            ("PGDATABASE", "postgres".to_owned()),
            ("PGSSLMODE", "verify-full".to_owned()),
            ("PGSSLROOTCERT", self.roots().display().to_string()),
        ]
    }

    /// The password of [`IAM_USER`], with the form and length of an IAM token. As on RDS, the server asks for it in
    /// cleartext, and inside TLS only.
    pub fn iam_token(&self) -> String {
        let session = "IQoJb3JpZ2luX2VjEJ%2F%2F%2FwEaDGNhLWNlbnRyYWwtMSJH%2BzBF".repeat(48);
        format!(
            "{ENDPOINT}:{}/?Action=connect&DBUser={IAM_USER}&X-Amz-Algorithm=AWS4-HMAC-SHA256\
             &X-Amz-Credential=ASIAEXAMPLE%2F20261124%2Fca-central-1%2Frds-db%2Faws4_request\
             &X-Amz-Date=20261124T060000Z&X-Amz-Expires=900&X-Amz-SignedHeaders=host\
             &X-Amz-Security-Token={session}&X-Amz-Signature={:064x}",
            self.port, 0x5eed
        )
    }
}

/// Starts the script that runs the server of `home` on `port`.
fn keeper(home: &Home, port: u16) -> Result<Child> {
    let mut keeper = Command::new("/bin/sh");
    keeper.arg("-c").arg(KEEPER).arg("local-rds");
    keeper
        .arg(&home.bin)
        .arg(&home.folder)
        .arg(port.to_string())
        .arg(ADMIN);
    // The server would read variables that are in this process for a client, such as PGDATESTYLE.
    keeper
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C");
    // In a process group of its own, the server does not get Ctrl-C from the terminal.
    keeper.process_group(0).current_dir(&home.folder);
    keeper
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some((uid, gid)) = home.user {
        keeper.uid(uid).gid(gid);
    }
    keeper.spawn().context("starting /bin/sh")
}

/// A port that no other stand-in has. It is below the ports that systems give to clients, because a client could take
/// such a port before the server does.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let nth = process::id()
            .wrapping_mul(97)
            .wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 10_000 + (nth % 20_000) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}
