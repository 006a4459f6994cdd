//! The README is true: its commands give its outputs, its tables are complete, its code runs.
//!
//! A "```sh test: …" says what there is to connect to. Where the README shows ports and addresses,
//! any will do, and what Cargo prints is left out; all else is compared as it stands.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::spawn;

use crate::round_trips::STOCK_ROUND_TRIPS;
use crate::support::kill;
use crate::support::page::{PROJECT, Variables, between, environment, readme};
use crate::support::world::World;
use local_rds::PASSWORD;
use regex::Regex;
use rustix::process::Signal;

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

/// Someone who follows the page in a shell. Each section goes on where the walkthrough has ended; within one it is the same
/// shell.
struct Reader<'a> {
    world: &'a World,
    shell: &'a str,
    /// The variables at first, those after the walkthrough so far, and those of the section so far.
    first: Variables,
    walkthrough: Variables,
    section: (String, Variables),
    service: Option<Service>,
}

impl<'a> Reader<'a> {
    fn new(world: &'a World, shell: &'a str) -> Self {
        let mut first = environment();
        let path = first.get_mut("PATH").unwrap();
        *path = format!("{}:{path}", world.folder.path().display());
        Self {
            world,
            shell,
            walkthrough: first.clone(),
            section: (String::new(), first.clone()),
            first,
            service: None,
        }
    }

    /// Does what a command of the page says, and returns what is printed.
    fn follow(&mut self, scenario: &Scenario) -> String {
        if scenario.section != self.section.0 {
            self.section = (scenario.section.clone(), self.walkthrough.clone());
        }
        match scenario.state.as_str() {
            "the project" => {
                self.run(&scenario.command, Path::new(PROJECT), self.first.clone())
                    .0
            }
            "service" => {
                let service = Service::start(&scenario.command, self.shell, &self.first);
                self.service.insert(service).printed.clone()
            }
            "curl" => {
                let service = self.service.take().expect("a service that runs");
                let path = scenario.command.strip_prefix("curl localhost:3000/");
                service.get(path.expect("what the service is asked"))
            }
            state => self.run_at(state, &scenario.command, scenario.line),
        }
    }

    /// Runs a command of the walkthrough with one of its servers.
    fn run_at(&mut self, state: &str, command: &str, line: usize) -> String {
        let mut variables = self.section.1.clone();
        let (addresses, ports) = self.world.server(state, line);
        for (names, value) in [
            (["PG__HOSTADDR", "PGHOSTADDR"], addresses),
            (["PG__PORT", "PGPORT"], ports),
        ] {
            if !value.is_empty() {
                variables.extend(names.map(|name| (name.to_owned(), value.clone())));
            }
        }
        if state == "sql" {
            self.world.before_iam_user_is_created();
        }
        let (printed, after) = self.run(command, self.world.folder.path(), variables);
        if state == "sql" {
            self.world.after_iam_user_is_created();
        }
        if self.section.0 == "Connect to your RDS instance" {
            self.walkthrough = after.clone();
        }
        self.section.1 = after;
        printed
    }

    /// Runs a command with these variables, and returns its output and the variables after it.
    fn run(&self, command: &str, folder: &Path, variables: Variables) -> (String, Variables) {
        let file = |name: &str| self.world.folder.path().join(name);
        let (after, input) = (file("environment"), file("input"));
        fs::write(&input, format!("{PASSWORD}\n")).unwrap();
        // All of the shell's variables are to be there in the next command, exported or not.
        let script = format!(
            "exec 2>&1\nset -a\n{command}\nenv -0 >'{}'",
            after.display()
        );
        let output = Command::new(self.shell)
            .args(["-c", &script])
            .current_dir(folder)
            .env_clear()
            .envs(variables)
            .stdin(Stdio::from(fs::File::open(input).unwrap()))
            .output()
            .unwrap();
        let after = fs::read_to_string(after).unwrap();
        let after = after
            .split_terminator('\0')
            .filter_map(|var| var.split_once('='));
        let after = after.map(|(name, value)| (name.to_owned(), value.to_owned()));
        (String::from_utf8(output.stdout).unwrap(), after.collect())
    }
}

/// A command of the page that goes on running, until this is dropped.
struct Service {
    process: Child,
    printed: String,
}

impl Service {
    fn start(command: &str, shell: &str, variables: &Variables) -> Self {
        let mut process = Command::new(shell)
            .args(["-c", &format!("exec 2>&1\nexec {command}")])
            .current_dir(PROJECT)
            .env_clear()
            .envs(variables)
            .env("LISTEN", "127.0.0.1:0")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut printed = String::new();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        while !printed.contains("listening on") {
            let line = lines
                .next()
                .unwrap_or_else(|| panic!("it has ended:\n{printed}"));
            printed += &(line.unwrap() + "\n");
        }
        // What it prints later has somewhere to go.
        spawn(move || lines.map_while(Result::ok).count());
        Self { process, printed }
    }

    /// What `curl` prints.
    fn get(&self, path: &str) -> String {
        let address = between(&self.printed, "http://", ",");
        let mut response = ureq::get(format!("http://{address}/{path}"))
            .call()
            .unwrap();
        response.body_mut().read_to_string().unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        kill(Signal::TERM, self.process.id() as i32);
        let status = self.process.wait().unwrap();
        assert!(status.success() || std::thread::panicking(), "{status}");
    }
}

#[test]
fn its_commands_give_its_outputs_in_bash_and_in_dash() {
    let world = World::new();
    let scenarios = scenarios();
    let count = scenarios.len();
    assert!(
        count >= 11,
        "only {count} commands found: does each block of the README begin with \"```sh test: …\"?"
    );
    for shell in ["bash", "dash"] {
        let mut reader = Reader::new(&world, shell);
        for scenario in &scenarios {
            let printed = masked(&reader.follow(scenario));
            let mut shown = masked(&scenario.output);
            if world.version() < 17 {
                shown = shown.replace("Some(b\"postgresql\")", "None");
            }
            let Scenario { line, command, .. } = scenario;
            assert!(
                is_as_shown(&printed, &shown),
                "README.md:{line}, in {shell}: the page shows another output than this command has. \
                 Correct the page or the program.\n{command}\n\nShown:\n{shown}\n\nPrinted:\n{printed}"
            );
            assert!(!printed.contains(PASSWORD));
        }
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
