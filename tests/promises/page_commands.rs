//! The pages are true: their commands give their outputs.
//!
//! A "```sh test: …" says what there is to connect to. Where a page shows ports and addresses, any will do, and what
//! Cargo prints is left out; all else is compared as it stands.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::spawn;

use crate::support::kill;
use crate::support::page::{PAGES, PROJECT, Variables, between, blocks, environment, page};
use crate::support::world::World;
use local_rds::PASSWORD;
use regex::Regex;
use rustix::process::Signal;

/// A command of a page, and where it stands.
struct Scenario {
    /// The file and the line.
    place: String,
    /// The page and the section, in which a reader stays in one shell.
    section: String,
    state: String,
    command: String,
    output: String,
}

fn scenarios(path: &str) -> Vec<Scenario> {
    let blocks = blocks(&page(path));
    let mut scenarios = Vec::new();
    for (nth, block) in blocks.iter().enumerate() {
        let Some(state) = block.kind.strip_prefix("sh test: ") else {
            continue;
        };
        // Its output is the next block, if that comes without a word between.
        let next = blocks.get(nth + 1);
        let output = next.filter(|next| next.kind == "text" && next.line == block.end + 2);
        scenarios.push(Scenario {
            place: format!("{path}:{}", block.line),
            section: format!("{path}: {}", block.section),
            state: state.to_owned(),
            command: block.code.trim_end().to_owned(),
            output: output.map_or(String::new(), |output| output.code.clone()),
        });
    }
    scenarios
}

/// What is left without Cargo's own lines, where ports and addresses may be any.
fn masked(output: &str) -> String {
    let mut text = output.trim_end().to_owned();
    for (any, mask) in [
        // A warning of Cargo's, with the lines of the manifest that it shows, up to an empty line.
        (
            r"(?m)^warning: .*\n?(^( .*|\d+ +\|.*|\.\.\.|(note|help): .*)\n?)*(^\n)?",
            "",
        ),
        (
            r"(?m)^ *(Adding|Blocking|Compiling|Downloaded|Downloading|Finished|Locking|Running|Updating) .*\n?",
            "",
        ),
        (r"(?m)^Password: ?\n?", ""),
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

/// Someone who follows the pages in a shell. Each section begins in a new shell, and within a section it stays the same.
struct Reader<'a> {
    world: &'a World,
    shell: &'a str,
    /// The variables of a new shell.
    first: Variables,
    /// The section, and the variables after its commands so far.
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
            section: (String::new(), first.clone()),
            first,
            service: None,
        }
    }

    /// Does what a command of the page says, and returns what is printed.
    fn follow(&mut self, scenario: &Scenario) -> String {
        if scenario.section != self.section.0 {
            self.section = (scenario.section.clone(), self.first.clone());
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
            state => self.run_at(state, &scenario.command, &scenario.place),
        }
    }

    /// Runs a command with the server for this state.
    fn run_at(&mut self, state: &str, command: &str, place: &str) -> String {
        let mut variables = self.section.1.clone();
        let (addresses, ports) = self.world.server(state, place);
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

/// A command of a page that goes on running, until this is dropped.
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

/// The shells that are installed.
fn shells() -> Vec<&'static str> {
    let is_installed = |shell: &&str| {
        let found = Command::new(shell).args(["-c", "exit"]).status().is_ok();
        // bash and dash are everywhere that the tests are.
        if !found && *shell == "zsh" {
            eprintln!("no zsh: the commands of the pages are not tested in it");
        }
        found || *shell != "zsh"
    };
    ["bash", "dash", "zsh"]
        .into_iter()
        .filter(is_installed)
        .collect()
}

#[test]
fn their_commands_give_their_outputs_in_bash_dash_and_zsh() {
    let world = World::new();
    let scenarios: Vec<_> = PAGES.into_iter().flat_map(scenarios).collect();
    let count = scenarios.len();
    assert!(
        count >= 13,
        "only {count} commands found: does each block of the pages begin with \"```sh test: …\"?"
    );
    for shell in shells() {
        let mut reader = Reader::new(&world, shell);
        for scenario in &scenarios {
            let printed = masked(&reader.follow(scenario));
            let mut shown = masked(&scenario.output);
            if world.version() < 17 {
                shown = shown.replace("Some(b\"postgresql\")", "None");
            }
            let Scenario { place, command, .. } = scenario;
            assert!(
                is_as_shown(&printed, &shown),
                "{place}, in {shell}: the page shows another output than this command has. \
                 Correct the page or the program.\n{command}\n\nShown:\n{shown}\n\nPrinted:\n{printed}"
            );
            assert!(!printed.contains(PASSWORD));
        }
    }
}

#[test]
fn warnings_of_cargo_are_no_part_of_an_output() {
    // As Cargo 1.100 prints them.
    let printed = "\
warning: unused workspace dependency `anyhow`
  --> Cargo.toml:61:1
   |
61 | anyhow = \"1.0\"
   | ^^^^^^
   |
   = note: `cargo::unused_workspace_dependencies` is set to `warn` by default
help: consider removing the workspace dependency `anyhow`
warning: workspace (manifest) generated 1 warning
   Compiling x v0.1.0 (/project)
warning: unused variable: `y`

    Finished `dev` profile
     Running `target/debug/x`
Error: connecting

Caused by:
    0: warning: this is ours
";
    let ours = "Error: connecting\n\nCaused by:\n    0: warning: this is ours";
    assert_eq!(masked(printed), ours);
}
