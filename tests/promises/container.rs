//! In a container: the binaries and the `Dockerfile` of the page, in a root folder that has nothing else.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::support::page::{PROJECT, between, environment, section, target};
use crate::support::service::{Service, end};
use crate::support::{RDS, UNSET, with};
use rustix::process::Signal;
use tempfile::TempDir;

/// The words after an instruction of the page's `Dockerfile`, for each time that it is there.
fn instructions<'a>(file: &'a str, name: &str) -> Vec<Vec<&'a str>> {
    let lines = file.lines().filter_map(|line| line.strip_prefix(name));
    lines
        .map(|rest| rest.split_whitespace().collect())
        .collect()
}

/// Builds the root folder of the image that the `Dockerfile` describes.
fn image(file: &str) -> TempDir {
    let root = TempDir::with_prefix_in("image-", "/tmp").unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for words in instructions(file, "COPY ") {
        let [from, to] = words[..] else {
            panic!("COPY takes one file and its place: {words:?}")
        };
        // Where Cargo builds for the tests.
        let from = match from.strip_prefix("target/") {
            Some(built) => target().join(built),
            None => Path::new(PROJECT).join(from),
        };
        let to = root.path().join(to.trim_start_matches('/'));
        fs::copy(&from, &to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    }
    root
}

#[test]
#[ignore = "builds the release for musl, which takes minutes"]
fn the_image_of_the_page_needs_nothing_else() {
    let section = section("examples/README.md", "In a container");
    let build = between(&section, "```sh\n", "```");
    let built = Command::new("bash")
        .args(["-euc", build])
        .current_dir(PROJECT)
        .env_clear()
        .envs(environment())
        .status();
    assert!(built.unwrap().success(), "{build}");

    let file = between(&section, "```dockerfile\n", "```");
    assert_eq!(instructions(file, "FROM "), [["scratch"]]);
    let root = image(file);
    // The root of the stand-in's authority takes the place of those of RDS.
    let roots = root.path().join("global-bundle.pem");
    assert!(roots.exists(), "no global-bundle.pem is copied: {file}");
    fs::copy(RDS.roots(), roots).unwrap();

    // `PATH` is for `chroot`. The root certificates are those of the image.
    let path = std::env::var("PATH").unwrap();
    let mut vars = with(&RDS, &[("DB_CA_CERT", UNSET), ("PATH", &path)]);
    for words in instructions(file, "ENV ") {
        for word in words {
            let (name, value) = word.split_once('=').unwrap();
            // Any port, as another service may have that one.
            let any = value.replace("0.0.0.0:3000", "0.0.0.0:0");
            vars.push((name.into(), any.into()));
        }
    }
    let user = &instructions(file, "USER ")[0];
    let [program] = instructions(file, "ENTRYPOINT ")[0][..] else {
        panic!("one program is to be started: {file}")
    };
    let program = program.trim_matches(['[', ']', '"']);

    // As the user of the image, where this process may change to it.
    let chroot = |program: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "chroot"]);
        if rustix::process::getuid().is_root() {
            command = Command::new("chroot");
            command.arg(format!("--userspec={0}:{0}", user[0]));
        }
        command.arg(root.path()).arg(program);
        command
    };
    let mut service = Service::of(chroot(program), &vars);
    assert!(service.address.starts_with("0.0.0.0:"));
    assert_eq!(service.setting("max_connections"), Ok("100".to_owned()));
    assert_eq!(end(&mut service.process, Signal::TERM).code(), Some(0));
}
