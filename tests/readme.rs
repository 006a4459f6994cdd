//! The README is true: its commands give its outputs, its tables are complete, its code runs.
//!
//! A `<!-- test: … -->` before a command says what there is to connect to. Where the README shows
//! times, ports and addresses, any will do; all else is compared as it stands.

#[path = "support/fake.rs"]
mod fake;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use fake::{Fake, WELCOME, acceptor, black_hole, only_says, silence, startup, tls};
use local_rds::{Authority, ENDPOINT, IAM_USER, KeyType, LocalRds, PASSWORD};
use regex::Regex;
use support::{
    KEYWORDS, RDS, Run, at, demo, file, full, run_of, shutting_down, terminate, vars,
    while_the_query_runs, with,
};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;

const PROJECT: &str = env!("CARGO_MANIFEST_DIR");

/// Where Cargo builds, so that what the README runs need not be built anew.
fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

fn readme() -> String {
    fs::read_to_string("README.md").unwrap()
}

/// The part under a heading, up to the next of its kind.
fn section(heading: &str) -> String {
    let readme = readme();
    let start = readme
        .find(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("no {heading}"));
    let rest = &readme[start + 4..];
    rest[..rest.find("\n## ").unwrap_or(rest.len())].to_owned()
}

/// A command of the README, and where it stands.
struct Scenario {
    line: usize,
    section: String,
    state: String,
    command: String,
    output: String,
}

fn scenarios() -> Vec<Scenario> {
    let readme = readme();
    let lines: Vec<&str> = readme.lines().collect();
    let block = |from: usize| {
        lines[from..]
            .iter()
            .take_while(|line| **line != "```")
            .copied()
    };
    let mut section = String::new();
    let mut scenarios = Vec::new();
    for (nth, line) in lines.iter().enumerate() {
        if let Some(heading) = line.strip_prefix("## ") {
            heading.clone_into(&mut section);
        }
        if let Some(state) = line.strip_prefix("<!-- test: ") {
            assert_eq!(lines[nth + 1], "```sh", "README.md:{}", nth + 2);
            let command: Vec<_> = block(nth + 2).collect();
            let after = nth + 3 + command.len();
            let output = if lines[after] == "```text" {
                block(after + 1).collect()
            } else {
                vec![]
            };
            scenarios.push(Scenario {
                line: nth + 3,
                section: section.clone(),
                state: state.strip_suffix(" -->").unwrap().to_owned(),
                command: command.join("\n"),
                output: output.join("\n"),
            });
        }
    }
    scenarios
}

/// What is left when times, ports and addresses may be any.
fn masked(output: &str) -> String {
    let mut text = output.trim_end().to_owned();
    for (any, mask) in [
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
        (r"(hostaddr|port): \[[^\]]*\]", "$1: []"),
        (r"\.com:\d+", ".com:PORT"),
        (r"\d+\.\d+\.\d+\.\d+", "ADDRESS"),
    ] {
        text = Regex::new(any)
            .unwrap()
            .replace_all(&text, mask)
            .into_owned();
    }
    text
}

/// The servers that the scenarios are for, all of one authority.
struct World {
    folder: TempDir,
    forced: LocalRds,
    free: LocalRds,
    writer: LocalRds,
    reader: LocalRds,
}

impl World {
    fn new() -> Self {
        let authority = Authority::new(KeyType::Rsa2048).unwrap();
        let certificate = authority.issue(ENDPOINT, |_| {}).unwrap();
        let server = || LocalRds::builder().certificate(&certificate, authority.root());
        let cluster = ["database-1.cluster-xq7", "database-1.cluster-ro-xq7"]
            .map(|start| format!("{start}f5vzbpq1x.ca-central-1.rds.amazonaws.com"));
        let names = rcgen::CertificateParams::new(cluster)
            .unwrap()
            .subject_alt_names;
        let certificate = authority
            .issue(ENDPOINT, |leaf| leaf.subject_alt_names = names)
            .unwrap();
        let writer = LocalRds::builder()
            .certificate(&certificate, authority.root())
            .start()
            .unwrap();
        let reader = writer.standby().unwrap();

        // The project, but for one of the roots, whose place our authority's takes.
        let folder = TempDir::new().unwrap();
        for name in [
            "Cargo.toml",
            "Cargo.lock",
            "src",
            "tests",
            "benches",
            "local-rds",
        ] {
            symlink(Path::new(PROJECT).join(name), folder.path().join(name)).unwrap();
        }
        let roots = fs::read_to_string("ca-certificates/global-bundle.pem").unwrap();
        let (_, others) = roots.split_once("-----END CERTIFICATE-----\n").unwrap();
        fs::create_dir(folder.path().join("ca-certificates")).unwrap();
        let bundle = folder.path().join("ca-certificates/global-bundle.pem");
        fs::write(bundle, format!("{}{others}", authority.root())).unwrap();

        let (forced, free) = (server().force_ssl(true), server().force_ssl(false));
        let (forced, free) = (forced.start().unwrap(), free.start().unwrap());
        // The AWS command line, for the one thing that is asked of it.
        let aws = folder.path().join("aws");
        let script = format!(
            "#!/bin/sh\ntest \"$*\" = 'rds generate-db-auth-token --hostname {ENDPOINT} --port 5432 \
             --region ca-central-1 --username {IAM_USER}' && echo '{}'\n",
            forced.iam_token()
        );
        fs::write(&aws, script).unwrap();
        fs::set_permissions(&aws, fs::Permissions::from_mode(0o755)).unwrap();
        Self {
            folder,
            forced,
            free,
            writer,
            reader,
        }
    }

    /// Runs a command in this environment, and returns its output and the environment after it.
    fn run(
        &self,
        command: &str,
        project: bool,
        env: &BTreeMap<String, String>,
    ) -> (String, BTreeMap<String, String>) {
        let after = self.folder.path().join("environment");
        let input = self.folder.path().join("input");
        fs::write(&input, format!("{PASSWORD}\n")).unwrap();
        let script = format!("exec 2>&1\n{command}\nenv -0 >'{}'", after.display());
        let folder = if project {
            Path::new(PROJECT)
        } else {
            self.folder.path()
        };
        let output = std::process::Command::new("bash")
            .args(["-c", &script])
            .current_dir(folder)
            .env_clear()
            .envs(env)
            .stdin(Stdio::from(fs::File::open(input).unwrap()))
            .output()
            .unwrap();
        let after = fs::read_to_string(after).unwrap();
        let after = after
            .split_terminator('\0')
            .filter_map(|var| var.split_once('='));
        let after = after
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        (String::from_utf8(output.stdout).unwrap(), after)
    }
}

#[test]
fn its_commands_give_its_outputs() {
    let world = World::new();
    let version = world.forced.version().unwrap();
    let (hole, ..) = &black_hole();
    let inherited = [
        "PATH",
        "HOME",
        "CARGO_HOME",
        "RUSTUP_HOME",
        "LOCAL_RDS_BIN",
        "TMPDIR",
    ];
    let mut shell: BTreeMap<_, _> = std::env::vars()
        .filter(|(name, _)| inherited.contains(&name.as_str()))
        .collect();
    let folder = world.folder.path().display();
    let path = shell.get_mut("PATH").unwrap();
    *path = format!("{folder}:{path}");
    let target = target().to_str().unwrap().to_owned();
    shell.insert("CARGO_TARGET_DIR".to_owned(), target);

    // Each section goes on where the walkthrough has ended; within one it is the same shell.
    let mut walkthrough = shell.clone();
    let mut current = (String::new(), shell.clone());
    let mut count = 0;
    for scenario in scenarios() {
        let Scenario {
            line,
            section,
            state,
            command,
            output,
        } = scenario;
        let (state, needs) = state.split_once(", PostgreSQL ").unwrap_or((&state, "0"));
        if version < needs.parse().unwrap() {
            eprintln!("README.md:{line} needs PostgreSQL {needs}: passed over");
            continue;
        }
        if command.contains("/etc/ssl/certs/")
            && !fs::exists("/etc/ssl/certs/ca-certificates.crt").unwrap()
        {
            eprintln!("README.md:{line} is for Debian: passed over");
            continue;
        }
        if section != current.0 {
            current = (section, walkthrough.clone());
        }
        let one = |port: u16| ("127.0.0.1".to_owned(), port.to_string());
        let place = match state {
            "the project" | "variables" => None,
            "no route" => Some(one(*hole)),
            "rds.force_ssl=0" => Some(one(world.free.port())),
            "rds.force_ssl=1" | "iam" => Some(one(world.forced.port())),
            "cluster" => {
                let ports = format!("{},{}", world.reader.port(), world.writer.port());
                Some(("127.0.0.1,127.0.0.1".to_owned(), ports))
            }
            other => panic!("README.md:{line}: no such state: {other}"),
        };
        let mut env = if state == "the project" {
            shell.clone()
        } else {
            current.1.clone()
        };
        if let Some((addresses, ports)) = place {
            env.extend([
                ("PG__HOSTADDR".to_owned(), addresses),
                ("PG__PORT".to_owned(), ports),
            ]);
        }
        let (printed, after) = world.run(&command, state == "the project", &env);
        assert_eq!(
            masked(&printed),
            masked(&output),
            "README.md:{line}: {command}"
        );
        assert!(!printed.contains(PASSWORD));
        if state != "the project" {
            current.1 = after;
        }
        if current.0 == "Against your RDS instance" {
            walkthrough = current.1.clone();
        }
        count += 1;
    }
    assert!(count >= 13, "only {count} of its commands have been found");
}

/// The cells of a table's rows.
fn table(section: &str) -> Vec<Vec<String>> {
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| {
        row.trim_matches('|')
            .split(" | ")
            .map(|cell| cell.trim().to_owned())
            .collect()
    })
    .collect()
}

/// What is in backticks.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn its_table_of_settings_has_all_that_are_accepted_with_values_that_are() {
    let mut listed = BTreeSet::new();
    for row in table(&section("Settings")) {
        let name = quoted(&row[0])[0].to_owned();
        for value in quoted(&row[1])
            .into_iter()
            .filter(|v| !v.starts_with("PG.") && *v != "DB_CA_CERT")
        {
            let mut all = BTreeMap::from([
                ("PG.HOST", "localhost"),
                ("PG.PORT", "1"),
                ("DB_CA_CERT", "ca-certificates/global-bundle.pem"),
            ]);
            all.insert(&name, value);
            let run = demo(&vars(all));
            for refusal in ["unknown option", "invalid value for option", "is empty"] {
                assert!(
                    !run.error().contains(refusal),
                    "{name}={value}: {}",
                    run.error()
                );
            }
        }
        listed.insert(name);
    }
    let mut expected: BTreeSet<_> = KEYWORDS
        .map(|(keyword, _)| format!("PG.{}", keyword.to_uppercase()))
        .into();
    expected.extend(["DB_CA_CERT".to_owned(), "RUST_LOG".to_owned()]);
    assert_eq!(listed, expected);
}

/// Runs that end in the errors of the table, by the words that it knows them by.
fn provoked() -> BTreeMap<&'static str, Run> {
    let of = |change: &[(&str, &str)]| demo(&with(&RDS, change));
    let at = |port: u16, change: &[(&str, &str)]| {
        let limit = [("PG.CONNECT_TIMEOUT", "2")];
        at(port, &RDS, &[&limit, change].concat())
    };
    let (hole, ..) = &black_hole();
    let silent = Fake::new(silence);
    let no_tls = only_says(b"N");
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let yesterday = time::OffsetDateTime::now_utc() - time::Duration::DAY;
    let expired = acceptor(
        &authority
            .issue(ENDPOINT, |leaf| leaf.not_after = yesterday)
            .unwrap(),
    );
    let expired = Fake::new(move |wire| {
        let expired = expired.clone();
        async move { silence(tls(wire, &expired).await?).await }
    });
    let roots = file(authority.root());
    let iam = [
        ("PG.USER", IAM_USER),
        ("PG.PASSWORD", &RDS.iam_token()),
        ("PG.CHANNEL_BINDING", "require"),
    ];
    let (full, _sessions) = full();
    let (ending, _session) = shutting_down();
    let primary = LocalRds::builder().start().unwrap();
    let standby = primary.standby().unwrap();
    let ended = while_the_query_runs(&primary, "60", terminate);
    BTreeMap::from([
        ("connection timed out", at(*hole, &[])),
        ("no answer within", at(silent.port, &[])),
        (
            "failed to lookup address information",
            of(&[("PG.HOST", "gone.invalid"), ("PG.HOSTADDR", "")]),
        ),
        ("Connection refused", at(1, &[])),
        (
            "no pg_hba.conf entry",
            demo(&with(&primary, &[("DB_CA_CERT", "")])),
        ),
        (
            "UnknownIssuer",
            of(&[("DB_CA_CERT", "ca-certificates/global-bundle.pem")]),
        ),
        (
            "certificate not valid for name",
            of(&[("PG.HOST", "db.example.com")]),
        ),
        (
            "certificate expired",
            at(expired.port, &[("DB_CA_CERT", roots.to_str().unwrap())]),
        ),
        ("server does not support TLS", at(no_tls.port, &[])),
        (
            "reading root certificates",
            of(&[("DB_CA_CERT", "/nonexistent")]),
        ),
        (
            "password authentication failed",
            of(&[("PG.PASSWORD", "not the password")]),
        ),
        ("password missing", of(&[("PG.PASSWORD", "")])),
        ("server did not use channel binding", of(&iam)),
        ("does not exist", of(&[("PG.DBNAME", "nothing")])),
        (
            "database does not allow writes",
            demo(&with(
                &standby,
                &[("PG.TARGET_SESSION_ATTRS", "read-write")],
            )),
        ),
        (
            "remaining connection slots are reserved",
            demo(&with(&full, &[])),
        ),
        (
            "the database system is shutting down",
            demo(&with(&ending, &[])),
        ),
        ("terminating connection due to administrator command", ended),
        ("unknown option", of(&[("PG.PASWORD", "x")])),
        ("invalid value for option", of(&[("PG.PORT", "x")])),
        ("set the same option", of(&[("PG__PORT", "1")])),
        ("PG.HOST, which is not set", demo(&[])),
    ])
}

#[test]
fn its_table_of_errors_has_the_words_of_errors_that_happen() {
    let mut provoked = provoked();
    for row in table(&section("When it does not work")) {
        let words = quoted(&row[0]);
        let run = provoked
            .remove(words[0])
            .unwrap_or_else(|| panic!("{} is not provoked here", row[0]));
        run.failed(&words);
        assert!(
            row.len() == 3 && row.iter().all(|cell| !cell.is_empty()),
            "{row:?}"
        );
    }
    assert!(
        provoked.is_empty(),
        "not in the table: {:?}",
        provoked.keys()
    );
}

/// What stands after the first `start`, up to the next `end`.
fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let (_, rest) = text.split_once(start).unwrap();
    rest.split_once(end).unwrap().0
}

/// A new project with this code and what the README says to copy from `Cargo.toml`, and nothing else.
fn new_project(name: &str, main: &str, more_dependencies: &str) -> PathBuf {
    let ours = fs::read_to_string("Cargo.toml").unwrap();
    let table = |name: &str| between(&(ours.clone() + "\n"), name, "\n\n").to_owned();
    let manifest = format!(
        "[package]\nname = \"{name}\"\nedition = \"2024\"\n\n[workspace]\n\n\
         [dependencies]{}\n{more_dependencies}\n\n[profile.dev.package]{}\n",
        table("\n[dependencies]"),
        table("\n[profile.dev.package]"),
    );
    let project = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(project.join("src")).unwrap();
    fs::write(project.join("src/main.rs"), main).unwrap();
    fs::write(project.join("Cargo.toml"), &manifest).unwrap();
    fs::copy("Cargo.lock", project.join("Cargo.lock")).unwrap();
    let built = std::process::Command::new(env!("CARGO"))
        .args(["rustc", "-q", "--offline", "--", "-D", "warnings"])
        .current_dir(&project)
        .env("CARGO_TARGET_DIR", target())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{manifest}\n{errors}");
    target().join("debug").join(name)
}

#[test]
fn a_copy_of_the_program_connects_over_tls_and_ends_on_a_silent_server() {
    let copy = new_project("copied", &fs::read_to_string("src/main.rs").unwrap(), "");
    run_of(&copy, &with(&RDS, &[])).succeeded();
    let silent = Fake::new(silence).port.to_string();
    let silent = [("PG.PORT", &*silent), ("PG.CONNECT_TIMEOUT", "2")];
    run_of(&copy, &with(&RDS, &silent)).failed(&[ENDPOINT, "no answer within 4s"]);
}

#[test]
fn its_pool_connects_over_tls_reaches_the_second_host_and_ends_on_a_silent_server() {
    let readme = section("Take it into your project");
    let program = fs::read_to_string("src/main.rs").unwrap();
    let function = |start: &str| format!("{start}{}\n}}\n", between(&program, start, "\n}\n"));
    let ask = function("/// Connects, queries");
    let (_, below_ask) = program.split_once(&ask).unwrap();
    let code = [
        between(&readme, "```rust\n", "```"),
        &function("/// TLS that trusts"),
        below_ask,
    ]
    .join("\n");
    let pool = new_project("pool", &code, "deadpool-postgres = \"0.14\"");

    let answer = "PostgreSQL 1";
    let run = run_of(&pool, &with(&RDS, &[]));
    assert!(
        run.code == Some(0) && run.output.contains(answer),
        "{run:?}"
    );
    let (hole, ..) = &black_hole();
    for first in [1, *hole] {
        let ports = format!("{first},{}", RDS.port());
        let hosts = format!("{ENDPOINT},{ENDPOINT}");
        let run = run_of(
            &pool,
            &with(
                &RDS,
                &[
                    ("PG.HOST", &hosts),
                    ("PG.HOSTADDR", "127.0.0.1,127.0.0.1"),
                    ("PG.PORT", &ports),
                    ("PG.CONNECT_TIMEOUT", "2"),
                ],
            ),
        );
        assert!(
            run.code == Some(0) && run.output.contains(answer),
            "{run:?}"
        );
    }
    let failing = |change: &[(&str, &str)], words: &[&str]| {
        let limit = [("PG.CONNECT_TIMEOUT", "2")];
        run_of(&pool, &with(&RDS, &[&limit, change].concat())).failed(words);
    };
    let silent = Fake::new(silence).port.to_string();
    failing(
        &[("PG.PORT", &silent)],
        &[ENDPOINT, &silent, "Timeout occurred while creating"],
    );
    failing(&[("PG.PORT", "1")], &[ENDPOINT, "Connection refused"]);
    failing(
        &[("DB_CA_CERT", "/nonexistent")],
        &["DB_CA_CERT=/nonexistent", "No such file"],
    );
    failing(&[("DB_CA_CERT", "")], &["DB_CA_CERT is not set"]);

    // It takes the start-up, and then falls silent at the query.
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let acceptor = acceptor(&authority.issue(ENDPOINT, |_| {}).unwrap());
    let fake = Fake::new(move |wire| {
        let acceptor = acceptor.clone();
        async move {
            let mut session = tls(wire, &acceptor).await?;
            startup(&mut session).await?;
            session.write_all(WELCOME).await?;
            session.flush().await?;
            silence(session).await
        }
    });
    let roots = file(authority.root());
    let port = fake.port.to_string();
    let change = [("PG.PORT", &*port), ("DB_CA_CERT", roots.to_str().unwrap())];
    failing(&change, &["no answer from", ENDPOINT, "within 4s"]);
}

#[test]
fn its_links_lead_somewhere() {
    let readme = readme();
    let link = Regex::new(r"\]\(([^)]+)\)").unwrap();
    let anchors: BTreeSet<_> = readme
        .lines()
        .filter_map(|line| {
            line.strip_prefix('#')
                .map(|line| line.trim_start_matches('#').trim())
        })
        .map(|heading| {
            heading
                .to_lowercase()
                .replace(' ', "-")
                .replace(|c: char| !c.is_alphanumeric() && c != '-', "")
        })
        .collect();
    for [target] in link.captures_iter(&readme).map(|found| found.extract().1) {
        match target.strip_prefix('#') {
            Some(anchor) => assert!(anchors.contains(anchor), "{target}"),
            None => assert!(
                target.starts_with("https://") || fs::exists(target).unwrap(),
                "{target}"
            ),
        }
    }
}
