//! Where PostgreSQL's programs are on this machine.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use anyhow::{Context, Result, ensure};

/// The folder of `initdb` and `postgres`: the one in `LOCAL_RDS_BIN`, or else the first of [`FOLDERS`] that has both.
pub fn server() -> Result<PathBuf> {
    let has =
        |folder: &PathBuf| folder.join("initdb").is_file() && folder.join("postgres").is_file();
    if let Some(folder) = std::env::var_os("LOCAL_RDS_BIN").map(PathBuf::from) {
        ensure!(
            has(&folder),
            "no initdb and postgres in LOCAL_RDS_BIN {}",
            folder.display()
        );
        return Ok(folder);
    }
    FOLDERS.iter().find(|folder| has(folder)).cloned().context(
        "no PostgreSQL server on this machine: run local-rds/install-postgresql, or set LOCAL_RDS_BIN to the \
         folder of initdb and postgres",
    )
}

/// The program psql. On Debian, the `psql` in `PATH` is a script that starts it.
pub fn psql() -> Result<PathBuf> {
    let mut programs = FOLDERS.iter().map(|folder| folder.join("psql"));
    programs
        .find(|psql| psql.is_file())
        .context("no psql on this machine")
}

/// The major version of the server in this folder.
pub fn version(folder: &Path) -> Result<u32> {
    let postgres = folder.join("postgres");
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

/// The folders in which PostgreSQL's programs may be, in the order of preference.
static FOLDERS: LazyLock<Vec<PathBuf>> = LazyLock::new(|| {
    let mut folders = Vec::new();
    folders.extend(std::env::var_os("LOCAL_RDS_BIN").map(PathBuf::from));
    if let Ok(out) = Command::new("pg_config").arg("--bindir").output() {
        folders.push(PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()));
    }
    // The folders of Debian and Ubuntu, the newest first; then those of Homebrew on Apple silicon and on Intel.
    folders.extend(versions("/usr/lib/postgresql", ""));
    folders.extend(versions("/opt/homebrew/opt", "postgresql@"));
    folders.extend(versions("/usr/local/opt", "postgresql@"));
    folders
});

/// The folders `parent/<prefix><version>/bin`, the highest version first.
fn versions(parent: &str, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .collect();
    found.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    found.into_iter().map(|(_, folder)| folder).collect()
}
