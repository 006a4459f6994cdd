//! Starts the stand-in, runs a command with the variables to connect to it, and deletes it.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use local_rds::{KeyType, LocalRds};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

const HELP: &str = "\
A throwaway PostgreSQL that looks like an Amazon RDS instance to a client.

local-rds [OPTIONS] [COMMAND [ARGS]]

With a command: runs it with PG__*, DB_CA_CERT and the variables of libpq, and exits with its exit code.
Your own variables PG.* and PG__* do not reach the command.
Without a command: prints how to connect, and waits for Ctrl-C.

  --force-ssl 0|1                      rds.force_ssl (1 from PostgreSQL 15 on)
  --key-type rsa2048|rsa4096|ecc384    the keys of its certificate authority (rsa2048)
";

fn main() -> Result<ExitCode> {
    let mut builder = LocalRds::builder();
    let mut args = std::env::args_os().skip(1).peekable();
    while let Some(option) = args.next_if(|arg| arg.to_string_lossy().starts_with("--")) {
        let mut value = || args.next().and_then(|value| value.into_string().ok());
        builder = match option.to_str() {
            Some("--help") => {
                print!("{HELP}");
                return Ok(ExitCode::SUCCESS);
            }
            Some("--force-ssl") => match value().as_deref() {
                Some("0") => builder.force_ssl(false),
                Some("1") => builder.force_ssl(true),
                _ => bail!("--force-ssl takes 0 or 1"),
            },
            Some("--key-type") => builder.key_type(match value().as_deref() {
                Some("rsa2048") => KeyType::Rsa2048,
                Some("rsa4096") => KeyType::Rsa4096,
                Some("ecc384") => KeyType::Ecc384,
                _ => bail!("--key-type takes rsa2048, rsa4096 or ecc384"),
            }),
            _ => bail!("no option {}; see --help", option.display()),
        };
    }
    let command: Vec<OsString> = args.collect();

    // From here on, a signal does not end this process before the server has ended.
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let rds = builder.start()?;
    if signals.pending().next().is_some() {
        return Ok(ExitCode::FAILURE);
    }
    let Some((program, args)) = command.split_first() else {
        println!("PostgreSQL {} until Ctrl-C. To connect:\n", rds.version()?);
        for (name, value) in program_env(&rds) {
            println!("  export {name}='{value}'");
        }
        println!();
        for (name, value) in rds.libpq_env() {
            println!("  export {name}='{value}'");
        }
        signals.forever().next();
        return Ok(ExitCode::SUCCESS);
    };

    let mut command = Command::new(program);
    forget_program_env(&mut command);
    local_rds::forget_package(&mut command);
    command.args(args).envs(program_env(&rds));
    command.envs(rds.libpq_env());
    let mut child = command
        .spawn()
        .with_context(|| format!("running {}", program.display()))?;
    let pid = Pid::from_child(&child);
    // The terminal sends Ctrl-C to the command as well, and the command decides whether to end. SIGTERM comes to this
    // process alone, which passes it on.
    std::thread::spawn(move || {
        for _ in signals.forever().filter(|signal| *signal == SIGTERM) {
            let _ = kill_process(pid, Signal::TERM);
        }
    });
    let status = child.wait()?;
    let code = status
        .code()
        .or(status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code)?))
}

/// The variables with which the program connects, under the names that every shell passes on: bash cannot export
/// `PG.HOST`, and dash drops it.
fn program_env(rds: &LocalRds) -> impl Iterator<Item = (String, String)> {
    let variables = rds.env().into_iter();
    variables.map(|(name, value)| (name.replace("PG.", "PG__"), value))
}

/// Removes the caller's own variables of the program, in all spellings that the program accepts: it refuses an option
/// that is set twice, and another option could be for another server.
fn forget_program_env(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let lower = name.to_string_lossy().to_lowercase();
        if lower.starts_with("pg.") || lower.starts_with("pg__") || lower == "db_ca_cert" {
            command.env_remove(&name);
        }
    }
}
