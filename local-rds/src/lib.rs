//! A throwaway PostgreSQL that looks to a client like an Amazon RDS instance.
//!
//! ```no_run
//! let rds = local_rds::LocalRds::builder().start()?;
//! let status = std::process::Command::new("psql").envs(rds.libpq_env()).status()?;
//! # Ok::<(), anyhow::Error>(())
//! ```
//!
//! The server programs are the real ones, and so are its certificates. It listens on 127.0.0.1
//! alone, and it is gone, data and all, when the [`LocalRds`] is dropped or its process ends.

mod builder;
mod certificates;
mod home;
mod programs;
mod relay;
mod server;

pub use builder::Builder;
pub use certificates::{Authority, KeyType, ServerCertificate};
pub use programs::psql;
pub use relay::Relay;
pub use server::LocalRds;

/// The name that the server's certificate is for; RDS names its endpoints like this.
pub const ENDPOINT: &str = "database-1.xq7f5vzbpq1x.ca-central-1.rds.amazonaws.com";

/// The master user, as the RDS console proposes it. Not a superuser, on RDS as here.
pub const USER: &str = "postgres";

/// The master user's password, unless the [`Builder`] is given another.
pub const PASSWORD: &str = "throwaway";

/// A user who logs in as with IAM database authentication: see [`LocalRds::iam_token`].
pub const IAM_USER: &str = "iam_user";
