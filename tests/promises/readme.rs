//! The README is true: its commands give its outputs, its tables are complete, its code runs.
//!
//! A "```sh test: …" says what there is to connect to. Where the README shows ports and addresses,
//! any will do, and what Cargo prints is left out; all else is compared as it stands.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::broken_servers::{Fault::Silence, Point::Query, server};
use crate::round_trips::STOCK_ROUND_TRIPS;
use crate::support::fake::{Fake, black_hole, only_says, own_tls, silence};
use crate::support::{
    KEYWORDS, RDS, Run, admin, at, builder, demo, file, run_of, then_the_good_one, vars, with,
};
use local_rds::{Authority, ENDPOINT, IAM_USER, KeyType, LocalRds, PASSWORD, ServerCertificate};
use rcgen::{
    BasicConstraints, CertificateParams, IsCa, KeyPair, PKCS_ECDSA_P384_SHA384, SigningKey,
};
use regex::Regex;
use tempfile::TempDir;
use x509_cert::certificate::{Certificate, Version};
use x509_cert::der::asn1::BitString;
use x509_cert::der::pem::LineEnding;
use x509_cert::der::{Decode, Encode, EncodePem};

const PROJECT: &str = env!("CARGO_MANIFEST_DIR");

/// Where Cargo builds, so that what the README runs need not be built anew.
fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

/// Of our environment what a shell of the README has: what Cargo tells the tests of their package would
/// make it build ring anew.
fn environment() -> BTreeMap<String, String> {
    let inherited = [
        "PATH",
        "HOME",
        "CARGO_HOME",
        "RUSTUP_HOME",
        "LOCAL_RDS_BIN",
        "TMPDIR",
    ];
    let ours = std::env::vars().filter(|(name, _)| inherited.contains(&name.as_str()));
    let target = target().to_str().unwrap().to_owned();
    ours.chain([("CARGO_TARGET_DIR".to_owned(), target)])
        .collect()
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
        if let Some(state) = line.strip_prefix("```sh test: ") {
            let command: Vec<_> = block(nth + 1).collect();
            let after = nth + 2 + command.len();
            let output = if lines[after] == "```text" {
                block(after + 1).collect()
            } else {
                vec![]
            };
            scenarios.push(Scenario {
                line: nth + 2,
                section: section.clone(),
                state: state.to_owned(),
                command: command.join("\n"),
                output: output.join("\n"),
            });
        }
    }
    scenarios
}

/// What is left without Cargo's own lines, and when what depends on the server may be any.
fn masked(output: &str) -> String {
    let mut text = output.trim_end().to_owned();
    for (any, mask) in [
        (r"(?m)^ *(Blocking|Compiling|Finished|Running) .*\n?", ""),
        (r"(?m)^Password: ?", ""),
        (r"(hostaddr|port): \[[^\]]*\]", "$1: []"),
        (r"\.com:\d+", ".com:PORT"),
        (r"\d+\.\d+\.\d+\.\d+(:\d+)?", "ADDRESS"),
        // From PostgreSQL 17 on there is an answer to ALPN.
        (r"(ALPN protocol is|encrypted extensions:) .*", "$1"),
    ] {
        text = Regex::new(any)
            .unwrap()
            .replace_all(&text, mask)
            .into_owned();
    }
    text.trim_end().to_owned()
}

/// The servers that the scenarios are for, all of one authority.
struct World {
    folder: TempDir,
    forced: LocalRds,
    writer: LocalRds,
    reader: LocalRds,
}

impl World {
    fn new() -> Self {
        let authority = Authority::new(KeyType::Rsa2048).unwrap();
        let certificate = authority.issue(ENDPOINT, |_| {}).unwrap();
        let server = |certificate| LocalRds::builder().certificate(certificate, authority.root());
        let forced = server(&certificate).force_ssl(true).start().unwrap();
        let cluster = ["database-1.cluster-xq7", "database-1.cluster-ro-xq7"]
            .map(|start| format!("{start}f5vzbpq1x.ca-central-1.rds.amazonaws.com"));
        let names = rcgen::CertificateParams::new(cluster)
            .unwrap()
            .subject_alt_names;
        let certificate = authority.issue(ENDPOINT, |leaf| leaf.subject_alt_names = names);
        let writer = server(&certificate.unwrap()).start().unwrap();
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
        let (others, _) = roots.rsplit_once("-----BEGIN CERTIFICATE-----\n").unwrap();
        fs::create_dir(folder.path().join("ca-certificates")).unwrap();
        let bundle = folder.path().join("ca-certificates/global-bundle.pem");
        fs::write(bundle, format!("{others}{}", authority.root())).unwrap();

        // Stand-ins for the AWS command line, the instance's name in DNS and a terminal, for what is
        // asked of them and nothing else.
        let script = |name: &str, script: &str| {
            let path = folder.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        let only = |name: &str, args: &str, output: &str| {
            script(name, &format!("test \"$*\" = '{args}' && echo '{output}'"));
        };
        let token = "rds generate-db-auth-token --hostname";
        let account = format!("--port 5432 --region ca-central-1 --username {IAM_USER}");
        only(
            "aws",
            &format!("{token} {ENDPOINT} {account}"),
            &forced.iam_token(),
        );
        let host = format!("127.0.0.1 {ENDPOINT}");
        only("getent", &format!("hosts {ENDPOINT}"), &host);
        script("stty", "case \"$*\" in -echo | echo) ;; *) exit 1 ;; esac");
        Self {
            folder,
            forced,
            writer,
            reader,
        }
    }

    /// Runs a command in this environment, and returns its output and the environment after it.
    fn run(
        &self,
        command: &str,
        shell: &str,
        project: bool,
        env: &BTreeMap<String, String>,
    ) -> (String, BTreeMap<String, String>) {
        let after = self.folder.path().join("environment");
        let input = self.folder.path().join("input");
        fs::write(&input, format!("{PASSWORD}\n")).unwrap();
        // All of the shell's variables are to be there in the next command, exported or not.
        let script = format!(
            "exec 2>&1\nset -a\n{command}\nenv -0 >'{}'",
            after.display()
        );
        let folder = if project {
            Path::new(PROJECT)
        } else {
            self.folder.path()
        };
        let output = std::process::Command::new(shell)
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

    /// Each section goes on where the walkthrough has ended; within one it is the same shell.
    fn follow(&self, shell: &str, environment: &BTreeMap<String, String>) {
        let mut walkthrough = environment.clone();
        let mut current = (String::new(), environment.clone());
        let mut count = 0;
        for scenario in scenarios() {
            let Scenario {
                line,
                section,
                state,
                command,
                output,
            } = scenario;
            if section != current.0 {
                current = (section, walkthrough.clone());
            }
            let project = state == "the project";
            let mut env = if project { environment } else { &current.1 }.clone();
            let mut to = |addresses: &str, ports: String| {
                env.insert("PG__HOSTADDR".to_owned(), addresses.to_owned());
                env.insert("PG__PORT".to_owned(), ports);
            };
            match state.as_str() {
                "the project" | "variables" => {}
                "rds.force_ssl=1" | "iam" => to("127.0.0.1", self.forced.port().to_string()),
                "cluster" => {
                    let ports = format!("{},{}", self.reader.port(), self.writer.port());
                    to("127.0.0.1,127.0.0.1", ports)
                }
                other => panic!("README.md:{line}: no such state: {other}"),
            }
            let (printed, after) = self.run(&command, shell, project, &env);
            assert_eq!(
                masked(&printed),
                masked(&output),
                "README.md:{line} in {shell}: {command}"
            );
            assert!(!printed.contains(PASSWORD));
            if !project {
                current.1 = after;
            }
            if current.0 == "Connect to your RDS instance" {
                walkthrough = current.1.clone();
            }
            count += 1;
        }
        assert!(count >= 7, "only {count} of its commands have been found");
    }
}

#[test]
fn its_commands_give_its_outputs_in_bash_and_in_dash() {
    let world = World::new();
    let mut environment = environment();
    let folder = world.folder.path().display();
    let path = environment.get_mut("PATH").unwrap();
    *path = format!("{folder}:{path}");
    for shell in ["bash", "dash"] {
        world.follow(shell, &environment);
    }
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
    assert!(listed.len() >= 9, "{listed:?}");
    let ours = KEYWORDS.map(|(keyword, _)| format!("PG.{}", keyword.to_uppercase()));
    let known = |name: &String| ours.contains(name) || name == "DB_CA_CERT" || name == "RUST_LOG";
    assert!(listed.iter().all(known), "{listed:?}");
}

/// Servers with certificates that are not like those of RDS, as people make them with openssl: one of
/// X.509 v1, and one that is its own authority.
fn not_rds() -> [LocalRds; 2] {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let mut own = CertificateParams::new([ENDPOINT.to_owned()]).unwrap();
    own.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let own = own.self_signed(&key).unwrap();

    // rcgen makes v3 only. In v1 there is neither a version nor an extension.
    let mut v1 = Certificate::from_der(own.der()).unwrap();
    v1.tbs_certificate.version = Version::V1;
    v1.tbs_certificate.extensions = None;
    let signature = key.sign(&v1.tbs_certificate.to_der().unwrap()).unwrap();
    v1.signature = BitString::from_bytes(&signature).unwrap();

    [v1.to_pem(LineEnding::LF).unwrap(), own.pem()].map(|leaf| {
        let certificate = ServerCertificate {
            leaf,
            subordinate: String::new(),
            key: key.serialize_pem(),
        };
        let builder = LocalRds::builder().certificate(&certificate, &own.pem());
        builder.start().unwrap()
    })
}

/// The log-in at a server that asks PAM about its users, as RDS does about those with IAM tokens. None if PostgreSQL
/// is built without PAM.
fn pam(iam: &[(&str, &str)]) -> Option<Run> {
    let hba = file(format!(
        "local all all trust\nhostssl all {IAM_USER} 127.0.0.1/32 pam\n"
    ));
    fs::set_permissions(&hba, fs::Permissions::from_mode(0o644)).unwrap();
    let builder = builder().setting("hba_file", hba.to_str().unwrap());
    match builder.start() {
        Err(error) if error.to_string().contains("\"pam\": not supported") => {
            eprintln!("this PostgreSQL is built without PAM: its refusal is not tested");
            None
        }
        rds => Some(demo(&with(&rds.unwrap(), iam))),
    }
}

/// The words of the one error that not every PostgreSQL can provoke.
const PAM: &str = "PAM authentication failed for user";

/// Runs that end in the errors of the table, by the words that it knows them by.
fn provoked() -> BTreeMap<&'static str, Run> {
    let of = |change: &[(&str, &str)]| demo(&with(&RDS, change));
    let at = |port: u16, change: &[(&str, &str)]| {
        let limit = [("PG.CONNECT_TIMEOUT", "1")];
        at(port, &RDS, &[&limit, change].concat())
    };
    let (hole, ..) = &black_hole();
    let silent = Fake::new(silence);
    let no_tls = only_says(b"N");
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let yesterday = time::OffsetDateTime::now_utc() - time::Duration::DAY;
    let expired = authority.issue(ENDPOINT, |leaf| leaf.not_after = yesterday);
    let expired = expired.unwrap();
    let expired = LocalRds::builder().certificate(&expired, authority.root());
    let expired = expired.start().unwrap();
    let iam = [("PG.USER", IAM_USER), ("PG.PASSWORD", &RDS.iam_token())];
    let [v1, own] = not_rds().map(|rds| demo(&with(&rds, &[])));
    let mut provoked = BTreeMap::from([
        ("connection timed out", at(*hole, &[])),
        ("no answer within", at(silent.port, &[])),
        (
            "failed to lookup address information",
            of(&[("PG.HOST", "gone.invalid:5432"), ("PG.HOSTADDR", "")]),
        ),
        ("Connection refused", at(1, &[])),
        ("PG.HOST, which is not set", demo(&[])),
        ("unknown option", of(&[("PG.PASWORD", "x")])),
        ("invalid value for option", of(&[("PG.PORT", "x")])),
        ("no pg_hba.conf entry", of(&[("DB_CA_CERT", "")])),
        ("root certificates", of(&[("DB_CA_CERT", "/nonexistent")])),
        (
            "UnknownIssuer",
            of(&[("DB_CA_CERT", "ca-certificates/global-bundle.pem")]),
        ),
        (
            "certificate not valid for name",
            of(&[("PG.HOST", "db.example.com")]),
        ),
        (
            "invalid dns name",
            of(&[("PG.HOST", "database-1.example:5432")]),
        ),
        ("certificate expired", demo(&with(&expired, &[]))),
        ("UnsupportedCertVersion", v1),
        ("CaUsedAsEndEntity", own),
        ("server does not support TLS", at(no_tls.port, &[])),
        (
            "password authentication failed",
            of(&[("PG.PASSWORD", "not the password")]),
        ),
        (
            "server did not use channel binding",
            of(&[iam.as_slice(), &[("PG.CHANNEL_BINDING", "require")]].concat()),
        ),
        (
            "database does not allow writes",
            of(&[
                ("PG.TARGET_SESSION_ATTRS", "read-write"),
                ("PG.OPTIONS", "-c default_transaction_read_only=on"),
            ]),
        ),
    ]);
    provoked.extend(pam(&iam).map(|run| (PAM, run)));
    provoked
}

#[test]
fn its_table_of_errors_has_the_words_of_errors_that_happen() {
    let mut provoked = provoked();
    let without_pam = !provoked.contains_key(PAM);
    let rows = table(&section("When it does not work"));
    assert!(rows.len() <= 20);
    for row in &rows {
        let words = quoted(&row[0]);
        if words == [PAM] && without_pam {
            continue;
        }
        let run = provoked
            .remove(words[0])
            .unwrap_or_else(|| panic!("{} is not provoked here", row[0]));
        match row[0].contains('…') {
            true => run.failed(&words),
            // Either of them.
            false => {
                run.failed(&words[..1]);
                for word in &words[1..] {
                    provoked.remove(word).unwrap().failed(&[word]);
                }
            }
        }
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

#[test]
fn its_trick_is_in_the_program_word_for_word() {
    let readme = readme();
    let code = between(&readme, "```rust\n", "```");
    let program = fs::read_to_string("src/main.rs").unwrap();
    assert!(code.lines().count() > 3 && program.contains(code), "{code}");
}

#[test]
fn its_diagram_has_as_many_round_trips_as_are_counted() {
    let readme = readme();
    let diagram = between(&readme, "```mermaid\n", "```");
    let asked: Vec<_> = diagram
        .lines()
        .filter(|line| line.contains("->>PostgreSQL:"))
        .collect();
    assert_eq!(asked.len(), STOCK_ROUND_TRIPS, "{diagram}");
    for (nth, line) in asked.iter().enumerate() {
        assert!(
            line.contains(&format!("PostgreSQL: {}. ", nth + 1)),
            "{line}"
        );
    }
    assert_eq!(diagram.matches("-->>Program:").count(), STOCK_ROUND_TRIPS);
    assert!(readme.contains("A run takes seven round trips"));
}

#[test]
fn its_sql_makes_the_user_for_iam_tokens() {
    let section = section("IAM tokens");
    let sql = between(&section, "`CREATE USER", "`");
    let run = format!("BEGIN; DROP ROLE {IAM_USER}; CREATE USER{sql} ROLLBACK;");
    admin(&RDS).batch_execute(&run).unwrap();
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
         [dependencies]{}\n{more_dependencies}\n\n[profile.dev]{}\n\n[profile.dev.package]{}\n",
        table("\n[dependencies]"),
        table("\n[profile.dev]"),
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
        .env_clear()
        .envs(environment())
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
    let silent = [("PG.PORT", &*silent), ("PG.CONNECT_TIMEOUT", "1")];
    run_of(&copy, &with(&RDS, &silent)).failed(&[ENDPOINT, "no answer within 2s"]);
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
    let (hole, ..) = &black_hole();
    for vars in [
        with(&RDS, &[]),
        then_the_good_one(ENDPOINT, 1, "1"),
        then_the_good_one(ENDPOINT, *hole, "1"),
    ] {
        let run = run_of(&pool, &vars);
        assert!(
            run.code == Some(0) && run.output.contains(answer),
            "{run:?}"
        );
    }
    let failing = |change: &[(&str, &str)], words: &[&str]| {
        let limit = [("PG.CONNECT_TIMEOUT", "1")];
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

    let (acceptor, roots) = own_tls();
    let fake = Fake::new(move |wire| server(wire, Some(acceptor.clone()), Query, Silence));
    let port = fake.port.to_string();
    let change = [("PG.PORT", &*port), ("DB_CA_CERT", roots.to_str().unwrap())];
    failing(&change, &["no answer from", ENDPOINT, "within 2s"]);
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
