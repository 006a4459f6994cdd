//! The `local-rds` command: what it sets, what it passes on, and that it leaves nothing behind.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, Signal, kill_process, kill_process_group, test_kill_process, test_kill_process_group,
};
use tempfile::TempDir;

/// The command with these arguments, and the temporary folder in which it makes its own.
fn local_rds(args: &[&str]) -> (Command, TempDir) {
    // In memory where that is possible. The user who runs the server must be able to enter the folder.
    let tmp = ["/dev/shm", "/tmp"]
        .into_iter()
        .find_map(|parent| TempDir::with_prefix_in("stand-in-", parent).ok())
        .unwrap();
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

/// Waits until the folder of the server is deleted. The server has ended before.
#[track_caller]
fn is_gone(tmp: &Path) {
    eventually(&format!("{} is empty", tmp.display()), || is_empty(tmp));
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

/// Waits until the condition is true, and no longer than half a minute.
#[track_caller]
fn eventually(what: &str, is_so: impl Fn() -> bool) {
    assert!(in_time(is_so), "still not: {what}");
}

fn in_time(is_so: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !is_so() {
        if start.elapsed() > Duration::from_secs(30) {
            return false;
        }
        sleep(Duration::from_millis(20));
    }
    true
}

/// A command that runs in a process group of its own, as a terminal runs it. A test that panics ends the command.
struct Running(Child, TempDir);

impl Running {
    /// The folder of the server's socket.
    fn socket(&self) -> PathBuf {
        let mut folders = fs::read_dir(&self.1).unwrap();
        folders.next().unwrap().unwrap().path().join("data")
    }

    /// Sends a signal to the command alone.
    fn kill(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// Sends a signal to the command and to all processes that it has started, as a terminal does with Ctrl-C.
    fn kill_group(&self, signal: Signal) {
        kill_process_group(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            self.kill_group(Signal::KILL);
            let _ = self.0.wait();
            // The temporary folder can be deleted when the server no longer writes to its folder in it.
            in_time(|| is_empty(self.1.path()));
        }
    }
}

/// Starts the command, waits for the folder of the server or for `line` in the command's output, and ends the command
/// with `how`. Returns the exit code.
fn end(args: &[&str], line: Option<&str>, how: impl FnOnce(&Running)) -> Option<i32> {
    let (mut command, tmp) = local_rds(args);
    let command = command.process_group(0).stdout(Stdio::piped());
    let mut running = Running(command.spawn().unwrap(), tmp);
    match line {
        Some(line) => {
            let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
            lines
                .find(|read| read.as_ref().unwrap().contains(line))
                .unwrap()
                .unwrap();
        }
        None => {
            while is_empty(running.1.path()) {
                sleep(Duration::from_millis(1));
            }
        }
    }
    how(&running);
    let status = running.0.wait().unwrap();
    is_gone(running.1.path());
    status.code()
}

/// The shell that drops names with a dot from the environment of what it starts, where there is one.
fn dash() -> &'static str {
    let dash = "/bin/dash";
    if fs::exists(dash).unwrap() {
        dash
    } else {
        eprintln!("no {dash}: tested with another shell");
        "sh"
    }
}

/// The lines of an environment that are about the database, for messages.
fn ours(env: &str) -> Vec<&str> {
    let database = |line: &&str| {
        ["PG", "DB_"]
            .iter()
            .any(|start| line.to_uppercase().starts_with(start))
    };
    env.lines().filter(database).collect()
}

#[test]
fn sets_the_variables_of_the_program_and_of_libpq_which_a_shell_passes_on() {
    let output = run(&[dash(), "-c", "env"]);
    let env = String::from_utf8(output.stdout).unwrap();
    for variable in [
        "PG__HOST=database-1.",
        "PG__HOSTADDR=127.0.0.1",
        "PG__PORT=",
        "PG__USER=postgres",
        "PG__PASSWORD=",
        "PG__DBNAME=postgres",
        "DB_CA_CERT=/",
        "PGSSLMODE=verify-full",
    ] {
        let is_set = env.lines().any(|line| line.starts_with(variable));
        assert!(is_set, "no {variable} in {:?}", ours(&env));
    }
}

#[test]
fn the_callers_own_variables_of_the_program_do_not_reach_the_command() {
    let (mut command, _tmp) = local_rds(&["env"]);
    let callers = [
        "PG.HOST",
        "PG__PORT",
        "pg.user",
        "Pg__SslMode",
        "PG.",
        "db_ca_cert",
        "DB_CA_CERT",
    ];
    command.envs(callers.map(|name| (name, "the caller's")));
    command.env("PG_COLOR", "not the program's");
    let env = String::from_utf8(command.output().unwrap().stdout).unwrap();
    assert!(!env.contains("the caller's"), "{:?}", ours(&env));
    assert!(env.contains("PG_COLOR=not the program's"));
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
    let code = end(&[], Some("PGSSLROOTCERT"), |local_rds| {
        local_rds.kill_group(Signal::INT)
    });
    assert_eq!(code, Some(0));
}

#[test]
fn ctrl_c_is_for_the_command_to_answer() {
    let script =
        "trap : INT; echo ready; sleep 1; sleep 1; psql -c 'select 1' >/dev/null && exit 7";
    let code = end(&["sh", "-c", script], Some("ready"), |local_rds| {
        local_rds.kill_group(Signal::INT)
    });
    assert_eq!(code, Some(7));
}

#[test]
fn is_gone_after_a_term_signal() {
    let script = "echo ready; exec sleep 600";
    let code = end(&["sh", "-c", script], Some("ready"), |local_rds| {
        local_rds.kill(Signal::TERM)
    });
    assert_eq!(code, Some(128 + 15));
}

#[test]
fn is_gone_after_a_kill_signal_and_ctrl_c_whenever_they_come() {
    std::thread::scope(|scope| {
        for millis in [50, 300, 900] {
            for signal in [Signal::KILL, Signal::INT] {
                scope.spawn(move || {
                    end(&[], None, |local_rds| {
                        sleep(Duration::from_millis(millis));
                        local_rds.kill_group(signal);
                    });
                });
            }
        }
    });
}

/// The process and the process group of a server. The first line of its `postmaster.pid` is the process.
fn server(socket: &Path) -> [Pid; 2] {
    let file = fs::read_to_string(socket.join("postmaster.pid")).unwrap();
    let server = Pid::from_raw(file.lines().next().unwrap().parse().unwrap()).unwrap();
    [server, rustix::process::getpgid(Some(server)).unwrap()]
}

#[track_caller]
fn has_ended([server, group]: [Pid; 2]) {
    eventually("the server has ended", || {
        test_kill_process(server).is_err()
    });
    eventually("its script has ended", || {
        test_kill_process_group(group).is_err()
    });
}

#[test]
fn a_server_whose_folder_is_deleted_ends_and_so_does_its_script() {
    let rds = local_rds::LocalRds::builder().start().unwrap();
    let [process, group] = server(&rds.socket());
    fs::remove_dir_all(rds.socket().parent().unwrap()).unwrap();
    eventually("the server has ended", || {
        test_kill_process(process).is_err()
    });
    drop(rds);
    has_ended([process, group]);
}

#[test]
fn a_test_that_panics_leaves_no_server_behind() {
    let mut processes = None;
    let test = std::panic::AssertUnwindSafe(|| {
        let script = "echo ready; exec sleep 600";
        end(&["sh", "-c", script], Some("ready"), |local_rds| {
            processes = Some(server(&local_rds.socket()));
            panic!("as a test that fails does");
        })
    });
    std::panic::catch_unwind(test).unwrap_err();
    has_ended(processes.unwrap());
}

#[test]
fn where_memory_cannot_be_written_to_the_temporary_folder_serves() {
    let mount = "mount -t tmpfs -o ro,size=2g tmpfs /dev/shm && exec \"$0\" \"$@\"";
    let run = |command: &[&str]| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "sh", "-c", mount]).args(command);
        unshare.env_remove("TMPDIR").output()
    };
    if !run(&["true"]).is_ok_and(|output| output.status.success()) {
        eprintln!("no /dev/shm of our own, with `unshare` and `mount`: not tested");
        return;
    }
    let script = "echo $PGSSLROOTCERT; psql -XAtc 'SELECT 1'";
    let output = run(&[env!("CARGO_BIN_EXE_local-rds"), "sh", "-c", script]).unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let temporary = Path::new("/tmp").join("local-rds-");
    let expected = printed.starts_with(temporary.to_str().unwrap()) && printed.ends_with("\n1\n");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(expected, "{printed}\n{error}");
}
