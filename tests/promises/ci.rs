//! `.ci/run` runs the tests as the README tells people to.

use std::fs;

use crate::support::page::{between, page};

#[test]
fn the_readme_asks_for_the_rust_that_the_manifest_declares() {
    let manifest = fs::read_to_string("Cargo.toml").unwrap();
    let version = between(&manifest, "rust-version = \"", "\"");
    let words = format!("[Rust](https://rustup.rs) {version} or later");
    assert!(
        page("README.md").contains(&words),
        "no {words:?} in README.md"
    );
}

#[test]
fn its_last_command_is_the_one_of_the_readme() {
    let script = fs::read_to_string(".ci/run").unwrap();
    let command = script.lines().last().unwrap();
    assert!(
        command.contains("cargo test"),
        "looked for \"cargo test\" in the last line of .ci/run, which is {command:?}"
    );
    let block = format!("\n```sh\n{command}\n```\n");
    assert!(
        page("README.md").contains(&block),
        "looked for the last line of .ci/run as a block of its own in README.md, and found none: {block:?}"
    );
}
