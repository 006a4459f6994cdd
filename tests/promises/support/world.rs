//! The servers that the commands of the pages are for, and what stands in for AWS's command line, DNS and a terminal.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::admin;
use super::page::PROJECT;
use local_rds::{Authority, ENDPOINT, IAM_USER, KeyType, LocalRds, PASSWORD};
use tempfile::TempDir;

/// The servers, and a folder to run the commands in.
pub struct World {
    /// The project, in which the roots of the servers take the place of some of RDS, and the commands that stand in for others.
    pub folder: TempDir,
    express: LocalRds,
    forced: LocalRds,
    writer: LocalRds,
    reader: LocalRds,
}

impl World {
    pub fn new() -> Self {
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
            "examples",
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
        // It asks the terminal for the password.
        let psql = format!("PGPASSWORD={PASSWORD} exec '{}' \"$@\"", psql.display());
        script("psql", &psql);
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

    /// The major version of the servers.
    pub fn version(&self) -> u32 {
        self.forced.version().unwrap()
    }

    /// The addresses and ports of the server for this state; none if there is no server to connect to.
    pub fn server(&self, state: &str, place: &str) -> (String, String) {
        let one = |port: u16| ("127.0.0.1".to_owned(), port.to_string());
        match state {
            "variables" => (String::new(), String::new()),
            "rds.force_ssl=1" | "iam" | "sql" => one(self.forced.port()),
            "express" => one(self.express.port()),
            "cluster" => {
                let ports = format!("{},{}", self.reader.port(), self.writer.port());
                ("127.0.0.1,127.0.0.1".to_owned(), ports)
            }
            other => panic!(
                "{place}: no such state: {other:?}. Write one of `World::server`, or add it there"
            ),
        }
    }

    /// The master user of RDS may grant `rds_iam`, without being a superuser.
    pub fn before_iam_user_is_created(&self) {
        let may = "ALTER ROLE postgres SUPERUSER; DROP ROLE iam_user";
        admin(&self.forced).batch_execute(may).unwrap();
    }

    pub fn after_iam_user_is_created(&self) {
        let token = self.forced.iam_token();
        let rest =
            format!("ALTER ROLE postgres NOSUPERUSER; ALTER ROLE iam_user PASSWORD '{token}'");
        admin(&self.forced).batch_execute(&rest).unwrap();
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
