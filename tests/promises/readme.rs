//! The README is true: its commands give its outputs, its tables are complete, its code runs.
//!
//! A "```sh test: …" says what there is to connect to. Where the README shows ports and addresses,
//! any will do, and what Cargo prints is left out; all else is compared as it stands.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;

use crate::round_trips::STOCK_ROUND_TRIPS;
use crate::support::admin;
use crate::support::page::{PROJECT, between, environment, readme};
use local_rds::{Authority, ENDPOINT, IAM_USER, KeyType, LocalRds, PASSWORD};
use regex::Regex;
use tempfile::TempDir;

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
            // Its output is the next block, if that comes without a word between.
            let after = nth + 2 + command.len();
            let output = match lines[after..] {
                ["", "```text", ..] => block(after + 2).collect(),
                _ => vec![],
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

/// What is left without Cargo's own lines, where ports and addresses may be any.
fn masked(output: &str) -> String {
    let mut text = output.trim_end().to_owned();
    for (any, mask) in [
        (r"(?m)^ *(Blocking|Compiling|Finished|Running) .*\n?", ""),
        (r"(?m)^Password: ?", ""),
        (r"\.com:\d+", ".com:PORT"),
        (r"\d+\.\d+\.\d+\.\d+(:\d+)?", "ADDRESS"),
    ] {
        text = Regex::new(any)
            .unwrap()
            .replace_all(&text, mask)
            .into_owned();
    }
    text.trim_end().to_owned()
}

/// Whether this is the output that the page shows, where "…" stands for the rest or a part of a line.
fn is_as_shown(printed: &str, shown: &str) -> bool {
    let shown = regex::escape(shown).replace('…', ".*");
    Regex::new(&format!("^{shown}$")).unwrap().is_match(printed)
}

/// The servers that the scenarios are for.
struct World {
    folder: TempDir,
    express: LocalRds,
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
        let token = forced.iam_token();
        let (express, other_root) = express(&token);

        // The project, but for one root of each file, whose place the authority of the servers takes.
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
        fs::create_dir(folder.path().join("ca-certificates")).unwrap();
        for (name, root) in [
            ("ca-certificates/global-bundle.pem", authority.root()),
            ("ca-certificates/amazon-trust-services.pem", &other_root),
        ] {
            let roots = fs::read_to_string(name).unwrap();
            let (others, _) = roots.rsplit_once("-----BEGIN CERTIFICATE-----\n").unwrap();
            fs::write(folder.path().join(name), format!("{others}{root}")).unwrap();
        }

        // Stand-ins for the AWS command line, the instance's name in DNS and a terminal, for what is
        // asked of them and nothing else.
        let script = |name: &str, script: &str| {
            let path = folder.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        let only = |name: &str, answers: &[(String, &str)]| {
            let case = |(args, output): &(String, &str)| format!("'{args}') echo '{output}' ;; ");
            let cases: String = answers.iter().map(case).collect();
            script(name, &format!("case \"$*\" in {cases}*) exit 1 ;; esac"));
        };
        let token_for = |host: &str, user: &str| {
            let asked = format!("--hostname {host} --port 5432 --region ca-central-1");
            let args = format!("rds generate-db-auth-token {asked} --username {user}");
            (args, token.as_str())
        };
        only(
            "aws",
            &[
                token_for(ENDPOINT, IAM_USER),
                token_for(EXPRESS, "postgres"),
            ],
        );
        let psql = local_rds::psql().unwrap();
        script("psql", &format!("exec '{}' \"$@\"", psql.display()));
        let host = format!("127.0.0.1 {ENDPOINT}");
        only("getent", &[(format!("hosts {ENDPOINT}"), &host)]);
        script("stty", "case \"$*\" in -echo | echo) ;; *) exit 1 ;; esac");
        Self {
            folder,
            express,
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
                env.insert("PGHOSTADDR".to_owned(), addresses.to_owned());
                env.insert("PG__PORT".to_owned(), ports.clone());
                env.insert("PGPORT".to_owned(), ports);
            };
            match state.as_str() {
                "the project" | "variables" => {}
                "rds.force_ssl=1" | "iam" => to("127.0.0.1", self.forced.port().to_string()),
                "express" => to("127.0.0.1", self.express.port().to_string()),
                "sql" => {
                    // The master user of RDS may grant `rds_iam`, without being a superuser.
                    let may = "ALTER ROLE postgres SUPERUSER; DROP ROLE iam_user";
                    admin(&self.forced).batch_execute(may).unwrap();
                    to("127.0.0.1", self.forced.port().to_string());
                }
                "cluster" => {
                    let ports = format!("{},{}", self.reader.port(), self.writer.port());
                    to("127.0.0.1,127.0.0.1", ports)
                }
                other => panic!("README.md:{line}: no such state: {other}"),
            }
            let (printed, after) = self.run(&command, shell, project, &env);
            let (printed, mut shown) = (masked(&printed), masked(&output));
            if self.forced.version().unwrap() < 17 {
                shown = shown.replace("Some(b\"postgresql\")", "None");
            }
            assert!(
                is_as_shown(&printed, &shown),
                "README.md:{line}, in {shell}: the page shows another output than this command has. \
                 Correct the page or the program.\n{command}\n\nShown:\n{shown}\n\nPrinted:\n{printed}"
            );
            assert!(!printed.contains(PASSWORD));
            if state == "sql" {
                let token = self.forced.iam_token();
                let rest = format!(
                    "ALTER ROLE postgres NOSUPERUSER; ALTER ROLE iam_user PASSWORD '{token}'"
                );
                admin(&self.forced).batch_execute(&rest).unwrap();
            }
            if !project {
                current.1 = after;
            }
            if current.0 == "Connect to your RDS instance" {
                walkthrough = current.1.clone();
            }
            count += 1;
        }
        assert!(
            count >= 9,
            "only {count} commands found: does each block of the README begin with \"```sh test: …\"?"
        );
    }
}

/// The endpoint of the cluster with express configuration.
const EXPRESS: &str = "database-2.cluster-xq7f5vzbpq1x.ca-central-1.rds.amazonaws.com";

/// A server with another authority, whose master user logs in with a token, and the root of that authority.
fn express(token: &str) -> (LocalRds, String) {
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let certificate = authority.issue(EXPRESS, |_| {}).unwrap();
    let builder = LocalRds::builder().certificate(&certificate, authority.root());
    let rds = builder.password(token).start().unwrap();
    admin(&rds)
        .batch_execute("GRANT rds_iam TO postgres")
        .unwrap();
    (rds, authority.root().to_owned())
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

/// Mermaid draws nothing at all if it cannot read one line.
#[test]
fn its_diagram_can_be_drawn_and_has_as_many_round_trips_as_are_counted() {
    let readme = readme();
    let diagram = between(&readme, "```mermaid\nsequenceDiagram\n", "```");
    let line_of = |line: &str| 1 + readme.lines().position(|other| other == line).unwrap();
    let form =
        r"^    (Program->>PostgreSQL|PostgreSQL-->>Program|Note over Program,PostgreSQL): [^;#]+$";
    let form = Regex::new(form).unwrap();
    for line in diagram.lines() {
        assert!(
            form.is_match(line),
            "README.md:{}: not an arrow or a note, or with `;` or `#`, at which Mermaid ends: {line}",
            line_of(line)
        );
        let widest = line
            .split(": ")
            .nth(1)
            .unwrap()
            .split("<br/>")
            .map(str::len)
            .max();
        assert!(
            widest < Some(70),
            "README.md:{}: wider than its box, put a <br/> into it",
            line_of(line)
        );
    }
    let asked: Vec<_> = diagram
        .lines()
        .filter(|line| line.contains("->>PostgreSQL:"))
        .collect();
    let trips = STOCK_ROUND_TRIPS;
    assert_eq!(
        asked.len(),
        trips,
        "round trips are counted, and these are drawn:\n{diagram}"
    );
    for (nth, line) in asked.iter().enumerate() {
        let number = format!("PostgreSQL: {}. ", nth + 1);
        assert!(
            line.contains(&number),
            "README.md:{}: should be {number}",
            line_of(line)
        );
    }
    assert_eq!(diagram.matches("-->>Program:").count(), trips);
    let sentence = "A run takes seven round trips with TLS 1.3, and eight with TLS 1.2";
    assert!(
        readme.contains(sentence),
        "no sentence {sentence:?}, which tests/promises/round_trips.rs counts"
    );
}

/// Prose is all but code.
#[test]
fn it_is_no_longer_than_people_read() {
    let readme = readme();
    let prose = readme.split("```").step_by(2);
    let words = prose
        .map(|prose| prose.split_whitespace().count())
        .sum::<usize>();
    assert!(
        words <= 2600,
        "{words} words of prose: 2600 is the most, take some out"
    );
}

#[test]
fn blank_lines_are_around_its_headings_code_and_tables() {
    let readme = readme();
    let lines: Vec<&str> = readme.lines().collect();
    let mut in_code = false;
    for (nth, pair) in lines.windows(2).enumerate() {
        let [line, next] = pair else { unreachable!() };
        let opens = next.starts_with("```") && !in_code;
        let closes = line.starts_with("```") && in_code;
        let heading = |line: &str| line.starts_with('#') && !in_code;
        let table = |line: &str| line.starts_with('|') && !in_code;
        let edge = opens || closes || heading(line) || heading(next) || table(line) != table(next);
        assert!(
            !edge || line.is_empty() || next.is_empty(),
            "README.md:{}: put a blank line below {line:?}",
            nth + 1
        );
        if line.starts_with("```") {
            in_code = !in_code;
        }
    }
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
