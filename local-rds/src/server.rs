use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::{Uid, User};
use postgres::{Client, Config, NoTls};
use tempfile::TempDir;

use crate::{Authority, ENDPOINT, IAM_USER, KeyType, PASSWORD, ServerCertificate, USER, bin};

/// The superuser, whom only the socket in the server's own folder lets in.
const ADMIN: &str = "rdsadmin";

/// How long a server may take to answer, and a standby to stream.
const START: Duration = Duration::from_secs(60);

/// Runs the server while the script's standard input is open. The kernel closes that when the
/// parent ends, however it ends; then the server is stopped and its folder removed.
const KEEPER: &str = r#"
trap '' HUP INT QUIT
exec 3<&0
(
    test -d "$2/data" || "$1/initdb" -D "$2/data" --username="$4" --encoding=UTF8 --locale=C \
        --auth=trust --no-sync || exit
    exec "$1/postgres" -D "$2/data" -k "$2/data" -p "$3" -c config_file="$2/postgresql.conf"
) </dev/null >>"$2/log" 2>&1 3<&- &
server=$!
{
    cat <&3 >/dev/null
    # Again and again: initdb and postgres are deaf to it for a moment when they start. And in the
    # end without regard to the data: PostgreSQL 18 may wait for ever in recovery after a crash.
    signal=INT tries=0
    until test -e "$2/ended"; do
        tries=$((tries + 1))
        test "$tries" -lt 100 || signal=QUIT
        kill "-$signal" 0
        sleep 0.05
    done
} &
exec 3<&-
wait "$server"
: >"$2/ended"
wait
rm -rf "$2"
"#;

/// What the stand-in is to be like; by default, like a new RDS instance.
pub struct Builder {
    certificate: Option<(ServerCertificate, String)>,
    force_ssl: Option<bool>,
    key_type: KeyType,
    password: String,
    settings: Vec<(String, String)>,
}

impl Builder {
    /// The certificate authority; by default [`KeyType::Rsa2048`].
    pub fn key_type(mut self, key_type: KeyType) -> Self {
        self.key_type = key_type;
        self
    }

    /// `rds.force_ssl`; by default on from PostgreSQL 15 on, as on RDS.
    pub fn force_ssl(mut self, on: bool) -> Self {
        self.force_ssl = Some(on);
        self
    }

    /// The password of [`USER`]; by default [`PASSWORD`].
    pub fn password(mut self, password: &str) -> Self {
        self.password = password.to_owned();
        self
    }

    /// A server certificate, and the root certificates that clients are told to trust, as PEM.
    pub fn certificate(mut self, certificate: &ServerCertificate, roots: &str) -> Self {
        self.certificate = Some((certificate.clone(), roots.to_owned()));
        self
    }

    /// A parameter of the server, as in `postgresql.conf`.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Makes the instance, and waits until it answers.
    pub fn start(self) -> Result<LocalRds> {
        let bin = bin::folder()?;
        let force_ssl = self.force_ssl.unwrap_or(version(&bin)? >= 15);
        let (certificate, roots) = match self.certificate {
            Some(given) => given,
            None => {
                let authority = Authority::new(self.key_type)?;
                (
                    authority.issue(ENDPOINT, |_| {})?,
                    authority.root().to_owned(),
                )
            }
        };
        let mut settings = vec![
            (
                "listen_addresses".to_owned(),
                Ipv4Addr::LOCALHOST.to_string(),
            ),
            ("password_encryption".to_owned(), "scram-sha-256".to_owned()),
            ("fsync".to_owned(), "off".to_owned()),
        ];
        settings.extend(self.settings);

        let files = Files {
            certificate,
            force_ssl,
            roots,
            settings,
        };
        let rds = LocalRds::start(Home::new(bin, files)?, self.password)?;
        let quote = |text: &str| format!("'{}'", text.replace('\'', "''"));
        rds.admin()?.batch_execute(&format!(
            "CREATE ROLE {USER} LOGIN CREATEDB CREATEROLE PASSWORD {};
             CREATE ROLE rds_iam;
             CREATE ROLE {IAM_USER} LOGIN IN ROLE rds_iam PASSWORD {};",
            quote(&rds.password),
            quote(&rds.iam_token()),
        ))?;
        Ok(rds)
    }
}

/// A running stand-in.
pub struct LocalRds {
    home: Home,
    keeper: Child,
    port: u16,
    password: String,
}

impl LocalRds {
    /// An instance as the RDS console makes it if nothing is changed there.
    pub fn builder() -> Builder {
        Builder {
            certificate: None,
            force_ssl: None,
            key_type: KeyType::Rsa2048,
            password: PASSWORD.to_owned(),
            settings: Vec::new(),
        }
    }

    fn start(home: Home, password: String) -> Result<Self> {
        // Asked for and given back: in between another program may take the port.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port();
        let mut keeper = Command::new("/bin/sh");
        keeper.arg("-c").arg(KEEPER).arg("local-rds");
        keeper
            .arg(&home.bin)
            .arg(home.folder.path())
            .arg(port.to_string())
            .arg(ADMIN);
        // Nothing of our environment: it may have variables that are meant for a client.
        keeper
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C");
        // A group of its own, which Ctrl-C in the terminal does not reach.
        keeper.process_group(0).current_dir(home.folder.path());
        keeper
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(user) = &home.user {
            keeper.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let keeper = keeper.spawn().context("starting /bin/sh")?;
        let rds = Self {
            home,
            keeper,
            port,
            password,
        };

        let start = Instant::now();
        while let Err(error) = rds.admin() {
            if rds.path("ended").exists() || start.elapsed() > START {
                bail!(
                    "PostgreSQL does not start: {error:#}; its log:\n{}",
                    rds.log()?
                );
            }
            sleep(Duration::from_millis(20));
        }
        Ok(rds)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.folder.path().join(name)
    }

    /// The TCP port, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The major version of the server.
    pub fn version(&self) -> Result<u32> {
        version(&self.home.bin)
    }

    /// The file of the root certificates that clients are told to trust.
    pub fn roots(&self) -> PathBuf {
        self.path("root.pem")
    }

    /// The folder of the server's Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.path("data")
    }

    /// All that the server has logged so far.
    pub fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.path("log"))?).into_owned())
    }

    /// The environment in which the program connects to it.
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

    /// The environment in which psql, and whatever else is made with libpq, connects to it.
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

    /// The password of [`IAM_USER`], of the form and the length of an IAM token. As on RDS, the
    /// server asks for it in cleartext, and inside TLS only.
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

    /// A session of the superuser, over the Unix socket.
    pub fn admin(&self) -> Result<Client> {
        let mut config = Config::new();
        config
            .host_path(self.socket())
            .port(self.port)
            .user(ADMIN)
            .dbname("postgres");
        Ok(config.connect(NoTls)?)
    }

    /// A hot standby that streams from this instance, with the same certificate; waits until it does.
    pub fn standby(&self) -> Result<Self> {
        let (begin, end) = match self.version()? {
            ..15 => (
                "pg_start_backup('', true, false)",
                "pg_stop_backup(false, false)",
            ),
            15.. => ("pg_backup_start('', true)", "pg_backup_stop(false)"),
        };
        let home = Home::new(self.home.bin.clone(), self.home.files.clone())?;
        let data = home.folder.path().join("data");
        let mut admin = self.admin()?;
        admin.batch_execute(&format!("SELECT {begin}"))?;
        let copied = Command::new("cp")
            .arg("-Rp")
            .arg(self.socket())
            .arg(&data)
            .status()?;
        ensure!(
            copied.success(),
            "copying {}: {copied}",
            self.socket().display()
        );
        let label = admin.query_one(&format!("SELECT labelfile FROM {end}"), &[])?;
        fs::remove_file(data.join("postmaster.pid"))?;
        home.write("data/backup_label", 0o600, label.get("labelfile"))?;
        home.write("data/standby.signal", 0o600, "")?;
        let primary = format!(
            "host={} port={} user={ADMIN}",
            self.socket().display(),
            self.port
        );
        home.write(
            "data/postgresql.auto.conf",
            0o600,
            &format!("primary_conninfo = '{primary}'"),
        )?;
        let standby = Self::start(home, self.password.clone())?;
        let streams = "SELECT FROM pg_stat_replication WHERE state = 'streaming'";
        let start = Instant::now();
        while admin.query(streams, &[])?.is_empty() {
            if start.elapsed() > START {
                bail!("the standby does not stream; its log:\n{}", standby.log()?);
            }
            sleep(Duration::from_millis(20));
        }
        Ok(standby)
    }
}

impl Drop for LocalRds {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// What the server is configured with.
#[derive(Clone)]
struct Files {
    certificate: ServerCertificate,
    force_ssl: bool,
    roots: String,
    settings: Vec<(String, String)>,
}

/// The folder of one server.
struct Home {
    bin: PathBuf,
    files: Files,
    folder: TempDir,
    /// Who runs the server if we are root, as whom PostgreSQL does not run.
    user: Option<User>,
}

impl Home {
    fn new(bin: PathBuf, files: Files) -> Result<Self> {
        let mut user = None;
        if Uid::effective().is_root() {
            for name in ["postgres", "nobody"] {
                user = user.or(User::from_name(name)?);
            }
            ensure!(
                user.is_some(),
                "PostgreSQL does not run as root: make a user postgres"
            );
        }
        let folder = tempfile::Builder::new().prefix("local-rds-").tempdir()?;
        let home = Self {
            bin,
            files,
            folder,
            user,
        };
        home.own("", 0o755)?;

        let Files {
            certificate,
            force_ssl,
            roots,
            settings,
        } = &home.files;
        home.write("root.pem", 0o644, roots)?;
        home.write(
            "server.crt",
            0o644,
            &format!("{}{}", certificate.leaf, certificate.subordinate),
        )?;
        home.write("server.key", 0o600, &certificate.key)?;
        // The rows of IAM users first, as the first that matches counts.
        let host = if *force_ssl { "hostssl" } else { "host" };
        let hba = format!(
            "local all,replication {ADMIN} trust\n\
             hostssl all +rds_iam 127.0.0.1/32 password\n\
             hostnossl all +rds_iam 127.0.0.1/32 reject\n\
             {host} all all 127.0.0.1/32 scram-sha-256\n"
        );
        home.write("pg_hba.conf", 0o600, &hba)?;

        let path = |name| home.folder.path().join(name).display().to_string();
        let mut conf = String::from("ssl = on\n");
        for (name, value) in [
            ("hba_file", path("pg_hba.conf")),
            ("ssl_cert_file", path("server.crt")),
            ("ssl_key_file", path("server.key")),
        ] {
            conf += &format!("{name} = '{value}'\n");
        }
        for (name, value) in settings {
            conf += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        }
        home.write("postgresql.conf", 0o600, &conf)?;
        Ok(home)
    }

    fn write(&self, name: &str, mode: u32, content: &str) -> Result<()> {
        fs::write(self.folder.path().join(name), content)?;
        self.own(name, mode)
    }

    fn own(&self, name: &str, mode: u32) -> Result<()> {
        let path = self.folder.path().join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        if let Some(user) = &self.user {
            chown(&path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
        Ok(())
    }
}

/// The major version of the server programs in `bin`.
fn version(bin: &std::path::Path) -> Result<u32> {
    let postgres = bin.join("postgres");
    let out = Command::new(&postgres).arg("--version").output();
    let out = out.with_context(|| format!("running {}", postgres.display()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
    let number = text
        .split(' ')
        .nth(2)
        .and_then(|number| number.split(['.', '\n']).next());
    number
        .and_then(|major| major.parse().ok())
        .with_context(|| format!("no version in {text:?}"))
}
