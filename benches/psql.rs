//! The program beside `psql sslmode=verify-full`: the same server, roots and query, in pairs.
//!
//! Times are quoted as ratios: the machine's speed is in both halves of a pair. A relay counts the round trips.

use std::fmt::Display;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_rds::{LocalRds, Relay, psql};
use wait4::Wait4;

const QUERY: &str = "SELECT * FROM information_schema.information_schema_catalog_name";

/// What a run took: seconds on the clock, and seconds of CPU.
#[derive(Clone, Copy)]
struct Run {
    wall: f64,
    cpu: f64,
}

fn main() -> Result<()> {
    let (release, dev) = (&build("release", &["--release"])?, &build("debug", &[])?);

    let rds = LocalRds::builder().start()?;
    let mut roots = std::fs::read("ca-certificates/global-bundle.pem")?;
    roots.extend(std::fs::read(rds.roots())?);
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(&file, roots)?;
    let psql = psql()?;

    let server = rds.version()?;
    let client = Command::new(&psql).arg("--version").output()?.stdout;
    println!(
        "server: PostgreSQL {server}; {}",
        String::from_utf8(client)?.trim()
    );
    println!(
        "size of the release build: {:.2} MiB\n",
        std::fs::metadata(release)?.len() as f64 / f64::from(1 << 20)
    );
    line("median (least to most)", "program", "psql", "ratio");

    let relay = || Relay::new(rds.port(), Duration::from_millis(50));
    for (program, build) in [(release, "release"), (dev, "dev")] {
        for (round_trip, port, pairs) in [(0, rds.port(), 100), (50, relay()?.port(), 10)] {
            let pair = || -> Result<[Run; 2]> {
                Ok([
                    run(program, &[], &rds, file.path(), port, &[])?,
                    run(&psql, &["-XAtc", QUERY], &rds, file.path(), port, &[])?,
                ])
            };
            pair()?; // Not counted: the first pair reads the programs from the disk.
            let all = (0..pairs).map(|_| pair()).collect::<Result<Vec<_>>>()?;
            let name = format!("{build}: wall, {round_trip} ms away (ms)");
            row(&name, &all, |run| run.wall * 1e3);
            if round_trip == 0 {
                row(&format!("{build}: CPU (ms)"), &all, |run| run.cpu * 1e3);
            }
        }
    }

    let count = |program: &Path, args: &[&str], more: &[(&str, &str)]| -> Result<usize> {
        let relay = relay()?;
        run(program, args, &rds, file.path(), relay.port(), more)?;
        relay.round_trips().pop().context("it has not connected")
    };
    let stock = [
        count(release, &[], &[])?,
        count(&psql, &["-XAtc", QUERY], &[])?,
    ];
    let ratio = format!("{:.2}", stock[0] as f64 / stock[1] as f64);
    line("round trips", stock[0], stock[1], &ratio);
    let name = "round trips, direct TLS";
    if server >= 17 {
        let direct = count(release, &[], &[("PG.SSLNEGOTIATION", "direct")])?;
        line(name, direct, "", "");
    } else {
        line(name, "needs PostgreSQL 17", "", "");
    }
    Ok(())
}

/// Builds the program as people build it: what Cargo builds for a bench has the features of dev-dependencies, too.
fn build(folder: &str, profile: &[&str]) -> Result<PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "-q"]).args(profile);
    local_rds::forget_package(&mut cargo);
    let built = cargo.status()?;
    ensure!(built.success(), "{cargo:?}: {built}");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name(folder);
    Ok(target.join("tokio-postgres-rustls-rds-demo"))
}

fn line(name: &str, program: impl Display, psql: impl Display, ratio: &str) {
    println!("{name:<34}{program:>26}{psql:>26}{ratio:>22}");
}

/// A line of the table: the values of either program, and the ratios of the pairs.
fn row(name: &str, pairs: &[[Run; 2]], value: impl Fn(&Run) -> f64) {
    let spread = |mut all: Vec<f64>, digits: usize| {
        all.sort_by(f64::total_cmp);
        let (least, most) = (all[0], all[all.len() - 1]);
        format!(
            "{:.digits$} ({least:.digits$} to {most:.digits$})",
            all[all.len() / 2]
        )
    };
    let of = |nth: usize| spread(pairs.iter().map(|pair| value(&pair[nth])).collect(), 1);
    let ratio = spread(pairs.iter().map(|[a, b]| value(a) / value(b)).collect(), 2);
    line(name, of(0), of(1), &ratio);
}

/// Runs a program in an environment where it connects to `port` with these roots.
fn run(
    program: &Path,
    args: &[&str],
    rds: &LocalRds,
    roots: &Path,
    port: u16,
    more: &[(&str, &str)],
) -> Result<Run> {
    let port = port.to_string();
    let mut command = Command::new(program);
    command
        .args(args)
        // Cargo's LD_LIBRARY_PATH would have both search for their libraries in its folders.
        .env_clear()
        .envs(rds.env())
        .envs(rds.libpq_env())
        .envs([("PG.PORT", &port), ("PGPORT", &port)])
        .envs([("DB_CA_CERT", roots), ("PGSSLROOTCERT", roots)])
        .envs(more.iter().copied())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let start = Instant::now();
    let mut process = command.spawn()?;
    let used = process.wait4()?;
    let wall = start.elapsed().as_secs_f64();
    let mut errors = String::new();
    let stderr = process.stderr.as_mut().context("no standard error")?;
    stderr.read_to_string(&mut errors)?;
    ensure!(used.status.success(), "{command:?}: {errors}");
    let cpu = used.rusage.utime + used.rusage.stime;
    let cpu = cpu.as_secs_f64();
    Ok(Run { wall, cpu })
}
