//! Where the PostgreSQL server programs are on this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail, ensure};

/// The folder with `initdb` and `postgres`: that of `LOCAL_RDS_BIN`, or else the first found.
pub fn folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("LOCAL_RDS_BIN") {
        let folder = PathBuf::from(folder);
        ensure!(
            has_server(&folder),
            "no initdb and postgres in LOCAL_RDS_BIN {}",
            folder.display()
        );
        return Ok(folder);
    }
    let mut candidates = Vec::new();
    if let Ok(out) = Command::new("pg_config").arg("--bindir").output() {
        candidates.push(PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()));
    }
    // Debian's and Ubuntu's, the newest first; then Homebrew's on Apple silicon and on Intel.
    candidates.extend(versions("/usr/lib/postgresql", ""));
    candidates.extend(versions("/opt/homebrew/opt", "postgresql@"));
    candidates.extend(versions("/usr/local/opt", "postgresql@"));
    match candidates.into_iter().find(|folder| has_server(folder)) {
        Some(folder) => Ok(folder),
        None => bail!(
            "no PostgreSQL server on this machine: install it (Debian: apt-get install postgresql; \
             macOS: brew install postgresql@18), or set LOCAL_RDS_BIN to the folder of its programs"
        ),
    }
}

fn has_server(folder: &Path) -> bool {
    folder.join("initdb").is_file() && folder.join("postgres").is_file()
}

/// `parent/<prefix><version>/bin`, from the highest version down.
fn versions(parent: &str, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((
                name.strip_prefix(prefix)?.parse().ok()?,
                entry.path().join("bin"),
            ))
        })
        .collect();
    found.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    found.into_iter().map(|(_, folder)| folder).collect()
}
