//! The program connects when `local-rds` runs it: directly or through a shell, whatever variables the caller has.

use std::path::Path;
use std::process::Command;

use crate::support::PROGRAM;
use crate::support::page::{PROJECT, cargo, target};

#[test]
fn the_program_connects_through_a_shell_and_with_variables_of_ones_own() {
    // As the tests are built, so that nothing is built twice.
    let build = ["build", "-q", "--workspace", "--bin", "local-rds"];
    cargo(&build, Path::new(PROJECT));
    // dash drops names with a dot from the environment of what it starts; the other shells pass them on.
    let dash = "/bin/dash";
    let shell = if Path::new(dash).exists() { dash } else { "sh" };
    for command in [&[shell, "-c", "\"$0\"", PROGRAM][..], &[PROGRAM]] {
        let output = Command::new(target().join("debug/local-rds"))
            .args(command)
            .envs([
                ("PG.HOST", "another.invalid"),
                ("PG__PORT", "1"),
                ("pg.user", "another"),
                ("PG.SSLMODE", "disable"),
                ("db_ca_cert", "/nonexistent"),
            ])
            .env_remove("RUST_LOG")
            .output()
            .unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{command:?}: {log}");
        assert!(log.contains("catalog_name: \"postgres\""), "{log}");
    }
}
