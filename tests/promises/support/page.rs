//! The pages, their parts, and the shell that people run their commands in.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

pub const PROJECT: &str = env!("CARGO_MANIFEST_DIR");

/// Where Cargo builds, so that what the pages run need not be built anew.
pub fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

/// Variables and their values.
pub type Variables = BTreeMap<String, String>;

/// Of our environment what a reader's shell has: what Cargo tells the tests of their package would
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

/// All that people read.
pub const PAGES: [&str; 4] = [
    "README.md",
    "docs/rds.md",
    "examples/README.md",
    "CONTRIBUTING.md",
];

/// The text of a page, by its path in the project.
#[track_caller]
pub fn page(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A line of a page, and where it stands.
pub struct Line<'a> {
    /// The number of the line, from 1 on.
    pub number: usize,
    /// The heading of its section.
    pub section: &'a str,
    /// Whether it is code, or the fence of a code block.
    pub is_code: bool,
    pub text: &'a str,
}

/// The lines of a page.
pub fn lines(page: &str) -> Vec<Line<'_>> {
    let (mut section, mut is_open) = ("", false);
    let line = |(nth, text): (usize, _)| {
        let is_fence = str::starts_with(text, "```");
        let is_code = is_open || is_fence;
        is_open ^= is_fence;
        if let (false, Some(heading)) = (is_code, text.strip_prefix("## ")) {
            section = heading;
        }
        Line {
            number: nth + 1,
            section,
            is_code,
            text,
        }
    };
    page.lines().enumerate().map(line).collect()
}

/// A code block of a page.
pub struct Block {
    /// The line of its first fence.
    pub line: usize,
    /// The line of its last fence.
    pub end: usize,
    pub section: String,
    /// What stands behind the first fence.
    pub kind: String,
    pub code: String,
}

/// The code blocks of a page.
pub fn blocks(page: &str) -> Vec<Block> {
    let (mut all, mut open) = (Vec::new(), None::<Block>);
    for line in lines(page).into_iter().filter(|line| line.is_code) {
        match &mut open {
            None => {
                open = Some(Block {
                    line: line.number,
                    end: line.number,
                    section: line.section.to_owned(),
                    kind: line.text.trim_start_matches('`').to_owned(),
                    code: String::new(),
                });
            }
            Some(block) if line.text == "```" => {
                block.end = line.number;
                all.extend(open.take());
            }
            Some(block) => block.code += &format!("{}\n", line.text),
        }
    }
    all
}

/// Our program, as people copy it.
pub fn program() -> String {
    fs::read_to_string("src/main.rs").unwrap()
}

/// The service, as people copy it.
pub fn example() -> String {
    fs::read_to_string("examples/service.rs").unwrap()
}

/// The part of a page under a heading `## …`, with the heading, up to the next of its kind.
#[track_caller]
pub fn section(path: &str, heading: &str) -> String {
    let page = page(path);
    let lines = lines(&page).into_iter();
    let lines = lines.skip_while(|line| line.is_code || line.section != heading);
    let lines: Vec<_> = lines
        .take_while(|line| line.section == heading)
        .map(|line| line.text)
        .collect();
    assert!(
        !lines.is_empty(),
        "{path} has no heading \"## {heading}\": write it, or correct the test"
    );
    lines.join("\n") + "\n"
}

/// What a text is, for errors: its first words.
fn beginning(text: &str) -> String {
    let line = text.lines().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or("nothing at all");
    format!("the text that begins with {line:?}")
}

/// What stands after the first `start`, up to the next `end`.
#[track_caller]
pub fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let Some((_, rest)) = text.split_once(start) else {
        panic!("no {start:?} in {}", beginning(text))
    };
    let Some((found, _)) = rest.split_once(end) else {
        panic!("no {end:?} after {start:?} in {}", beginning(text))
    };
    found
}

/// What is in backticks.
pub fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// This text with one part of it, which is there once, replaced.
#[track_caller]
pub fn replaced(text: &str, part: &str, by: &str) -> String {
    let count = text.matches(part).count();
    assert_eq!(count, 1, "times {part:?} is in {}", beginning(text));
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
    let found = found.unwrap_or_else(|| panic!("no function {function} in {}", beginning(code)));
    let comment = lines[..found].iter().rev();
    let start = found - comment.take_while(|line| line.starts_with("///")).count();
    let length = lines[found..]
        .iter()
        .position(|line| *line == "}\n")
        .unwrap();
    lines[start..=found + length].concat()
}

/// A new project with this code and what the pages say to copy from `Cargo.toml`, built as it says. A dependency
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

/// Runs our Cargo in this project, as a reader's shell does.
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
