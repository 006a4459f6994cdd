//! A throwaway PostgreSQL that looks like an Amazon RDS instance to a client.
//!
//! ```no_run
//! let rds = local_rds::LocalRds::builder().start()?;
//! let status = std::process::Command::new("psql").envs(rds.libpq_env()).status()?;
//! # Ok::<(), anyhow::Error>(())
//! ```
//!
//! The server is a real PostgreSQL, with certificates like those of RDS. It listens on 127.0.0.1 only. Dropping the
//! [`LocalRds`], or the end of its process, stops the server and deletes its data.

mod builder;
mod certificates;
mod home;
mod programs;
mod relay;
mod server;

use std::process::Command;

pub use builder::Builder;
pub use certificates::{Authority, KeyType, ServerCertificate};
pub use programs::psql;
pub use relay::Relay;
pub use server::LocalRds;

/// The host name in the server's certificate. It has the form of an RDS endpoint.
pub const ENDPOINT: &str = "database-1.xq7f5vzbpq1x.ca-central-1.rds.amazonaws.com";

/// The master user that the RDS console proposes. It is not a superuser, as on RDS.
pub const USER: &str = "postgres";

/// The master user's password, unless the [`Builder`] is given another.
pub const PASSWORD: &str = "throwaway";

/// A user with IAM database authentication: see [`LocalRds::iam_token`].
pub const IAM_USER: &str = "iam_user";

/// Removes from the command's environment the variables in which Cargo describes the running package. With them, a
/// Cargo that the command starts builds ring again.
pub fn forget_package(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
}
