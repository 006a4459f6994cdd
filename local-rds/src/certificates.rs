//! Certificates shaped like those of the three RDS authorities: root, subordinate, leaf.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256, PKCS_RSA_SHA384, SignatureAlgorithm,
};
use time::{Duration, OffsetDateTime};

/// The keys of an RDS certificate authority; the comments give its name in the RDS console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyType {
    /// `rds-ca-rsa2048-g1`, the default; signs with SHA-256.
    Rsa2048,
    /// `rds-ca-rsa4096-g1`; signs with SHA-384.
    Rsa4096,
    /// `rds-ca-ecc384-g1`; signs with SHA-384.
    Ecc384,
}

impl KeyType {
    fn generate(self) -> Result<KeyPair> {
        match self {
            Self::Rsa2048 => rsa(2048, &PKCS_RSA_SHA256),
            Self::Rsa4096 => rsa(4096, &PKCS_RSA_SHA384),
            Self::Ecc384 => Ok(KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384)?),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Rsa2048 => "RSA2048",
            Self::Rsa4096 => "RSA4096",
            Self::Ecc384 => "ECC384",
        }
    }
}

/// Makes an RSA key with the command `openssl`: ring cannot make RSA keys, and the libraries that can take long to
/// build. Debian's PostgreSQL depends on the package `openssl`.
fn rsa(bits: u32, algorithm: &'static SignatureAlgorithm) -> Result<KeyPair> {
    let mut openssl = Command::new("openssl");
    openssl.args(["genpkey", "-algorithm", "RSA", "-pkeyopt"]);
    openssl.arg(format!("rsa_keygen_bits:{bits}"));
    let output = openssl.output().with_context(|| format!("{openssl:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{openssl:?}: {error}");
    let pem = String::from_utf8(output.stdout)?;
    Ok(KeyPair::from_pkcs8_pem_and_sign_algo(&pem, algorithm)?)
}

/// A certificate authority: a root, and the subordinate under it, which signs the certificates of servers.
pub struct Authority {
    key_type: KeyType,
    root: String,
    subordinate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A server certificate, the certificate of its signer, and its private key, all as PEM.
#[derive(Clone)]
pub struct ServerCertificate {
    /// The server's own certificate.
    pub leaf: String,
    /// The certificate of the subordinate that signed `leaf`. A server sends both.
    pub subordinate: String,
    /// The private key of `leaf`.
    pub key: String,
}

impl Authority {
    /// Creates an authority with new keys. All authorities of a key type have the same names.
    pub fn new(key_type: KeyType) -> Result<Self> {
        let root_key = key_type.generate()?;
        let root = ca(
            &format!("Amazon RDS ca-central-1 Root CA {} G1", key_type.name()),
            36_500,
        );
        let root_certificate = root.self_signed(&root_key)?;

        let key = key_type.generate()?;
        let subordinate = ca(
            &format!(
                "Amazon RDS ca-central-1 Subordinate CA {} G1.A.3",
                key_type.name()
            ),
            1_825,
        );
        let signed = subordinate.signed_by(&key, &Issuer::new(root, root_key))?;
        Ok(Self {
            key_type,
            root: root_certificate.pem(),
            subordinate: signed.pem(),
            issuer: Issuer::new(subordinate, key),
        })
    }

    /// The root certificate as PEM, for `DB_CA_CERT`.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Issues a server certificate for `name`, valid for a year, after `change` has changed it.
    pub fn issue(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<ServerCertificate> {
        let mut leaf = params(name, 365);
        leaf.subject_alt_names = CertificateParams::new([name.to_owned()])?.subject_alt_names;
        leaf.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut leaf);
        let key = self.key_type.generate()?;
        Ok(ServerCertificate {
            leaf: leaf.signed_by(&key, &self.issuer)?.pem(),
            subordinate: self.subordinate.clone(),
            key: key.serialize_pem(),
        })
    }
}

fn ca(name: &str, days: i64) -> CertificateParams {
    let mut ca = params(name, days);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    ca
}

/// The fields that all certificates of RDS have. They are valid from yesterday, in case a clock is slow.
fn params(name: &str, days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    for (kind, value) in [
        (DnType::CommonName, name),
        (DnType::OrganizationalUnitName, "Amazon RDS"),
        (DnType::OrganizationName, "Amazon Web Services, Inc."),
        (DnType::LocalityName, "Seattle"),
        (DnType::StateOrProvinceName, "Washington"),
        (DnType::CountryName, "US"),
    ] {
        params.distinguished_name.push(kind, value);
    }
    params.not_before = OffsetDateTime::now_utc() - Duration::DAY;
    params.not_after = OffsetDateTime::now_utc() + Duration::days(days);
    params.use_authority_key_identifier_extension = true;
    params
}
