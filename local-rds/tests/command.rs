//! The `local-rds` command: what it sets, what it passes on, and that it leaves nothing behind.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The command, with a folder of its own to make its folder in.
fn local_rds(args: &[&str]) -> (Command, TempDir) {
    // In memory if there is some; in any case where the user who runs the server may go too.
    let parent = ["/dev/shm", "/tmp"]
        .into_iter()
        .find(|path| Path::new(path).exists());
    let tmp = TempDir::with_prefix_in("stand-in-", parent.unwrap()).unwrap();
    fs::set_permissions(
        tmp.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_local-rds"));
    command
        .args(args)
        .env("TMPDIR", tmp.path())
        .stdin(Stdio::null());
    (command, tmp)
}

fn run(args: &[&str]) -> Output {
    let (mut command, tmp) = local_rds(args);
    let output = command.output().unwrap();
    is_gone(tmp.path());
    output
}

/// No folder is left, and so no server, which ends when its folder is gone at the latest.
#[track_caller]
fn is_gone(tmp: &Path) {
    let start = Instant::now();
    while fs::read_dir(tmp).unwrap().next().is_some() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "{} is not empty",
            tmp.display()
        );
        sleep(Duration::from_millis(20));
    }
}

/// Starts it, waits for the folder of the server, or for `line` of its output, and ends it.
fn end(args: &[&str], line: Option<&str>, how: impl FnOnce(&Child)) -> Option<i32> {
    let (mut command, tmp) = local_rds(args);
    // A process group, as the terminal makes one, whose Ctrl-C is for all in it.
    let mut child = command
        .process_group(0)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    match line {
        Some(line) => {
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            lines
                .find(|read| read.as_ref().unwrap().contains(line))
                .unwrap()
                .unwrap();
        }
        None => {
            while fs::read_dir(tmp.path()).unwrap().next().is_none() {
                sleep(Duration::from_millis(1));
            }
        }
    }
    how(&child);
    let status = child.wait().unwrap();
    is_gone(tmp.path());
    status.code()
}

/// Sends a signal to the command alone.
fn kill(signal: &str, child: &Child) {
    signal_to(signal, child.id().to_string());
}

/// Sends a signal to the command and all that it has started, as a terminal does.
fn kill_group(signal: &str, child: &Child) {
    signal_to(signal, format!("-{}", child.id()));
}

fn signal_to(signal: &str, whom: String) {
    let kill = Command::new("kill")
        .args(["-s", signal, "--", &whom])
        .status();
    assert!(kill.unwrap().success());
}

#[test]
fn sets_the_variables_of_the_program_and_of_libpq() {
    let output = run(&["env"]);
    let env = String::from_utf8(output.stdout).unwrap();
    for name in [
        "PG.HOST=database-1.",
        "PG.HOSTADDR=127.0.0.1",
        "PG.PORT=",
        "PG.USER=postgres",
    ] {
        assert!(env.contains(name), "{env}");
    }
    for name in [
        "PG.PASSWORD=",
        "PG.DBNAME=postgres",
        "DB_CA_CERT=/",
        "PGSSLMODE=verify-full",
    ] {
        assert!(env.contains(name), "{env}");
    }
}

#[test]
fn passes_on_the_exit_code() {
    assert_eq!(run(&["true"]).status.code(), Some(0));
    assert_eq!(run(&["sh", "-c", "exit 42"]).status.code(), Some(42));
    assert_eq!(
        run(&["sh", "-c", "kill -TERM $$"]).status.code(),
        Some(128 + 15)
    );
}

#[test]
fn a_command_that_does_not_exist_is_named() {
    let output = run(&["no-such-program"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error.contains("running no-such-program") && error.contains("No such file"),
        "{error}"
    );
}

#[test]
fn options_that_mean_nothing_are_refused() {
    for args in [
        &["--force-ssl", "2"][..],
        &["--key-type", "dsa"],
        &["--key-type"],
        &["--nonsense"],
    ] {
        let output = run(args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.code() == Some(1) && error.contains(args[0]),
            "{error}"
        );
    }
}

#[test]
fn a_folder_without_a_server_is_named() {
    let (mut command, _tmp) = local_rds(&["true"]);
    let output = command
        .env("LOCAL_RDS_BIN", "/nonexistent")
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("no initdb and postgres in LOCAL_RDS_BIN /nonexistent"),
        "{error}"
    );
}

#[test]
fn without_a_command_it_serves_until_ctrl_c() {
    let code = end(&[], Some("PGSSLROOTCERT"), |child| kill_group("INT", child));
    assert_eq!(code, Some(0));
}

#[test]
fn ctrl_c_is_for_the_command_to_answer() {
    let script =
        "trap : INT; echo ready; sleep 1; sleep 1; psql -c 'select 1' >/dev/null && exit 7";
    let code = end(&["sh", "-c", script], Some("ready"), |child| {
        kill_group("INT", child)
    });
    assert_eq!(code, Some(7));
}

#[test]
fn is_gone_after_a_term_signal() {
    let script = "echo ready; exec sleep 600";
    let code = end(&["sh", "-c", script], Some("ready"), |child| {
        kill("TERM", child)
    });
    assert_eq!(code, Some(128 + 15));
}

#[test]
fn is_gone_after_a_kill_signal_and_ctrl_c_whenever_they_come() {
    std::thread::scope(|scope| {
        for millis in [50, 300, 900] {
            for signal in ["KILL", "INT"] {
                scope.spawn(move || {
                    end(&[], None, |child| {
                        sleep(Duration::from_millis(millis));
                        kill_group(signal, child);
                    });
                });
            }
        }
    });
}
