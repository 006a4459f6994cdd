//! The folder of one server: its configuration and its data.

use std::io::ErrorKind::AlreadyExists;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs, process};

use anyhow::{Context, Result};
use rustix::fs::statvfs;
use rustix::process::geteuid;

use crate::ServerCertificate;

/// The superuser, who can log in over the Unix socket only.
pub const ADMIN: &str = "rdsadmin";

/// The contents of the configuration files.
#[derive(Clone)]
pub struct Files {
    pub certificate: ServerCertificate,
    pub force_ssl: bool,
    pub roots: String,
    pub settings: Vec<(String, String)>,
}

/// The folder of one server. Dropping this deletes the folder.
pub struct Home {
    pub bin: PathBuf,
    pub files: Files,
    pub folder: PathBuf,
    /// The user and group that run the server if this process is root: PostgreSQL refuses to run as root.
    pub user: Option<(u32, u32)>,
}

impl Home {
    pub fn new(bin: PathBuf, files: Files) -> Result<Self> {
        let user = if geteuid().is_root() {
            let user = server_user();
            Some(user.context("PostgreSQL does not run as root: make a user postgres")?)
        } else {
            None
        };
        let folder = new_folder()?;
        let home = Self {
            bin,
            files,
            folder,
            user,
        };
        home.own("", 0o755)?;
        home.configure()?;
        Ok(home)
    }

    fn configure(&self) -> Result<()> {
        let Files {
            certificate,
            force_ssl,
            roots,
            settings,
        } = &self.files;
        self.write("root.pem", 0o644, roots)?;
        let chain = certificate.leaf.clone() + &certificate.subordinate;
        self.write("server.crt", 0o644, &chain)?;
        self.write("server.key", 0o600, &certificate.key)?;

        // The server uses the first row that matches, so the rows of IAM users come first.
        let host = if *force_ssl { "hostssl" } else { "host" };
        let hba = format!(
            "local all,replication {ADMIN} trust\n\
             hostssl all +rds_iam 127.0.0.1/32 password\n\
             hostnossl all +rds_iam 127.0.0.1/32 reject\n\
             {host} all all 127.0.0.1/32 scram-sha-256\n"
        );
        self.write("pg_hba.conf", 0o600, &hba)?;

        // The server uses the last line of a parameter, so the settings of an instance come last. The server's
        // processes share memory through files in the folder, because /dev/shm may be another user's.
        let mut conf = String::from(
            "dynamic_shared_memory_type = mmap\n\
             fsync = off\n\
             listen_addresses = '127.0.0.1'\n\
             password_encryption = scram-sha-256\n\
             ssl = on\n",
        );
        for (name, file) in [
            ("hba_file", "pg_hba.conf"),
            ("ssl_cert_file", "server.crt"),
            ("ssl_key_file", "server.key"),
        ] {
            conf += &format!("{name} = '{}'\n", self.path(file).display());
        }
        for (name, value) in settings {
            conf += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        }
        self.write("postgresql.conf", 0o600, &conf)
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.join(name)
    }

    pub fn write(&self, name: &str, mode: u32, content: &str) -> Result<()> {
        fs::write(self.path(name), content)?;
        self.own(name, mode)
    }

    fn own(&self, name: &str, mode: u32) -> Result<()> {
        let path = self.path(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        if let Some((uid, gid)) = self.user {
            chown(&path, Some(uid), Some(gid))?;
        }
        Ok(())
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Creates a folder in `TMPDIR`. If `TMPDIR` is not set, the folder is in memory (`/dev/shm`), because a server writes
/// a thousand files and soon deletes them. If `/dev/shm` has less than 1 GiB free, or this user may not write to it, the
/// folder is in the system's temporary folder.
fn new_folder() -> Result<PathBuf> {
    let shm = "/dev/shm";
    if env::var_os("TMPDIR").is_none()
        && statvfs(shm).is_ok_and(|shm| shm.f_bavail * shm.f_frsize > 1 << 30)
        && let Ok(folder) = new_folder_in(Path::new(shm))
    {
        return Ok(folder);
    }
    new_folder_in(&env::temp_dir())
}

/// Creates a folder with a name that this process has not used before, because a folder is deleted twice: by the
/// server's script, and by dropping [`Home`]. The second must not delete the folder of another server.
fn new_folder_in(parent: &Path) -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("local-rds-{}-{nth}", process::id()));
        match fs::create_dir(&folder) {
            // An earlier process with the same number has left this folder.
            Err(error) if error.kind() == AlreadyExists => continue,
            made => made.with_context(|| format!("making {}", folder.display()))?,
        }
        return Ok(folder);
    }
}

/// The user and group to run the server as.
fn server_user() -> Option<(u32, u32)> {
    let of = |name| Some((id("-u", name)?, id("-g", name)?));
    of("postgres").or_else(|| of("nobody"))
}

/// The number of a user, or of the user's group. The command asks all of the system's sources, such as LDAP: reading
/// `/etc/passwd` would not, and neither std nor rustix can ask them.
fn id(option: &str, user: &str) -> Option<u32> {
    let output = Command::new("id").args([option, user]).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}
