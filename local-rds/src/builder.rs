//! The options of an instance.

use anyhow::Result;

use crate::home::{Files, Home};
use crate::server::LocalRds;
use crate::{Authority, ENDPOINT, IAM_USER, KeyType, PASSWORD, ServerCertificate, USER, programs};

/// The options of the stand-in. The defaults are those of a new RDS instance.
pub struct Builder {
    certificate: Option<(ServerCertificate, String)>,
    force_ssl: Option<bool>,
    key_type: KeyType,
    password: String,
    settings: Vec<(String, String)>,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            certificate: None,
            force_ssl: None,
            key_type: KeyType::Rsa2048,
            password: PASSWORD.to_owned(),
            settings: Vec::new(),
        }
    }

    /// The certificate authority. The default is [`KeyType::Rsa2048`].
    pub fn key_type(mut self, key_type: KeyType) -> Self {
        self.key_type = key_type;
        self
    }

    /// `rds.force_ssl`. The default is on from PostgreSQL 15 on, as on RDS.
    pub fn force_ssl(mut self, on: bool) -> Self {
        self.force_ssl = Some(on);
        self
    }

    /// The password of [`USER`]. The default is [`PASSWORD`].
    pub fn password(mut self, password: &str) -> Self {
        self.password = password.to_owned();
        self
    }

    /// A server certificate, and the root certificates that clients are told to trust, as PEM.
    pub fn certificate(mut self, certificate: &ServerCertificate, roots: &str) -> Self {
        self.certificate = Some((certificate.clone(), roots.to_owned()));
        self
    }

    /// A parameter of the server, as in `postgresql.conf`.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Creates the instance, and waits until it accepts connections.
    pub fn start(self) -> Result<LocalRds> {
        let bin = programs::server()?;
        let (certificate, roots) = match self.certificate {
            Some(given) => given,
            None => {
                let authority = Authority::new(self.key_type)?;
                (
                    authority.issue(ENDPOINT, |_| {})?,
                    authority.root().to_owned(),
                )
            }
        };
        let force_ssl = match self.force_ssl {
            Some(on) => on,
            None => programs::version(&bin)? >= 15,
        };
        let files = Files {
            certificate,
            force_ssl,
            roots,
            settings: self.settings,
        };
        let rds = LocalRds::start(Home::new(bin, files)?, self.password)?;
        let quote = |text: &str| format!("'{}'", text.replace('\'', "''"));
        rds.sql(&format!(
            "CREATE ROLE {USER} LOGIN CREATEDB CREATEROLE PASSWORD {};
             ALTER DATABASE postgres OWNER TO {USER};
             CREATE ROLE rds_iam;
             CREATE ROLE {IAM_USER} LOGIN IN ROLE rds_iam PASSWORD {};",
            quote(rds.password()),
            quote(&rds.iam_token()),
        ))?;
        Ok(rds)
    }
}
