//! The README, and the shell that people run its commands in.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

pub const PROJECT: &str = env!("CARGO_MANIFEST_DIR");

/// Where Cargo builds, so that what the README runs need not be built anew.
pub fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

/// Variables and their values.
pub type Variables = BTreeMap<String, String>;

/// Of our environment what a shell of the README has: what Cargo tells the tests of their package would
/// make it build ring anew.
pub fn environment() -> Variables {
    let inherited = [
        "PATH",
        "HOME",
        "CARGO_HOME",
        "RUSTUP_HOME",
        "RUSTUP_TOOLCHAIN",
        "LOCAL_RDS_BIN",
        "TMPDIR",
    ];
    let ours = std::env::vars().filter(|(name, _)| inherited.contains(&name.as_str()));
    let target = target().to_str().unwrap().to_owned();
    ours.chain([("CARGO_TARGET_DIR".to_owned(), target)])
        .collect()
}

pub fn readme() -> String {
    fs::read_to_string("README.md").unwrap()
}

/// Our program, as people copy it.
pub fn program() -> String {
    fs::read_to_string("src/main.rs").unwrap()
}

/// The service, as people copy it.
pub fn example() -> String {
    fs::read_to_string("examples/service.rs").unwrap()
}

/// The part under a heading, up to the next of its kind.
pub fn section(heading: &str) -> String {
    let readme = readme();
    let start = readme
        .find(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("no {heading}"));
    let rest = &readme[start + 4..];
    rest[..rest.find("\n## ").unwrap_or(rest.len())].to_owned()
}

/// What stands after the first `start`, up to the next `end`.
pub fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let (_, rest) = text.split_once(start).unwrap();
    rest.split_once(end).unwrap().0
}

/// What is in backticks.
pub fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// This text with one part of it, which is there once, replaced.
#[track_caller]
pub fn replaced(text: &str, part: &str, by: &str) -> String {
    assert_eq!(text.matches(part).count(), 1, "{part}");
    text.replace(part, by)
}

/// A function of this code, with its comment, up to the brace that ends it.
#[track_caller]
pub fn take(code: &str, function: &str) -> String {
    let lines: Vec<&str> = code.split_inclusive('\n').collect();
    let is_it = |line: &&str| {
        let line = line.strip_prefix("async ").unwrap_or(line);
        line.starts_with(&format!("fn {function}(")) || line.starts_with(&format!("fn {function}<"))
    };
    let found = lines.iter().position(is_it);
    let found = found.unwrap_or_else(|| panic!("no function {function}"));
    let comment = lines[..found].iter().rev();
    let start = found - comment.take_while(|line| line.starts_with("///")).count();
    let length = lines[found..]
        .iter()
        .position(|line| *line == "}\n")
        .unwrap();
    lines[start..=found + length].concat()
}

/// A new project with this code and what the README says to copy from `Cargo.toml`, built as it says. A dependency
/// of `more` takes the place of ours with the same name.
pub fn new_project(name: &str, main: &str, more: &str) -> PathBuf {
    build(name, main, &manifest(name, more), &["--offline"])
}

/// The manifest of that project.
pub fn manifest(name: &str, more: &str) -> String {
    let ours = fs::read_to_string("Cargo.toml").unwrap() + "\n";
    let table = |name: &str| between(&ours, &format!("\n[{name}]\n"), "\n\n");
    let key = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    let replaced = |line: &&str| !more.lines().any(|other| key(other) == key(line));
    let ours: Vec<&str> = table("dependencies").lines().filter(replaced).collect();
    format!(
        "[package]\nname = \"{name}\"\nedition = \"2024\"\n\n[workspace]\n\n\
         [dependencies]\n{}\n{more}\n[profile.dev]\n{}\n\n[profile.dev.package]\n{}\n",
        ours.join("\n"),
        table("profile.dev"),
        table("profile.dev.package"),
    )
}

/// Builds a project with this code and this manifest, and with the versions in our `Cargo.lock`. Without `--offline`,
/// Cargo adds the packages that are not in it, and changes the version of none that is.
pub fn build(name: &str, main: &str, manifest: &str, options: &[&str]) -> PathBuf {
    let project = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(project.join("src")).unwrap();
    fs::write(project.join("src/main.rs"), main).unwrap();
    fs::write(project.join("Cargo.toml"), manifest).unwrap();
    fs::copy("Cargo.lock", project.join("Cargo.lock")).unwrap();
    // A warning is an error where the compiler is one whose lints are known.
    let deny = ["--", "-D", "warnings"];
    let lints = std::env::var_os("DENY_WARNINGS").map_or(&[][..], |_| &deny);
    cargo(&[&["rustc", "-q"], options, lints].concat(), &project);
    target().join("debug").join(name)
}

/// Runs our Cargo in this project, as a shell of the README does.
pub fn cargo(args: &[&str], project: &Path) {
    let built = std::process::Command::new(env!("CARGO"))
        .args(args)
        .current_dir(project)
        .env_clear()
        .envs(environment())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{}: {errors}", project.display());
}
