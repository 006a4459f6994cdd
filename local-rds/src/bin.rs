//! Where the PostgreSQL server programs are on this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The folder with `initdb` and `postgres`: that of `LOCAL_RDS_BIN`, or else the first found.
pub fn folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("LOCAL_RDS_BIN").map(PathBuf::from) {
        ensure!(
            has_server(&folder),
            "no initdb and postgres in LOCAL_RDS_BIN {}",
            folder.display()
        );
        return Ok(folder);
    }
    folders()
        .into_iter()
        .find(|folder| has_server(folder))
        .context(
            "no PostgreSQL server on this machine: install it (Debian: apt-get install postgresql; \
         macOS: brew install postgresql@18), or set LOCAL_RDS_BIN to the folder of its programs",
        )
}

/// psql itself, which on Debian is not the `psql` of `PATH`: that is a script which looks for it.
pub fn psql() -> Result<PathBuf> {
    let mut programs = folders().into_iter().map(|folder| folder.join("psql"));
    programs
        .find(|psql| psql.is_file())
        .context("no psql on this machine")
}

/// Where PostgreSQL's programs may be: the folder to use first, then the others.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    folders.extend(std::env::var_os("LOCAL_RDS_BIN").map(PathBuf::from));
    if let Ok(out) = Command::new("pg_config").arg("--bindir").output() {
        folders.push(PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()));
    }
    // Debian's and Ubuntu's, the newest first; then Homebrew's on Apple silicon and on Intel.
    folders.extend(versions("/usr/lib/postgresql", ""));
    folders.extend(versions("/opt/homebrew/opt", "postgresql@"));
    folders.extend(versions("/usr/local/opt", "postgresql@"));
    folders
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
