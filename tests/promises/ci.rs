//! `.ci/run` runs the tests as the README tells people to.

use std::fs;

use crate::support::page::page;

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
