//! `ca-certificates/` holds the files that Amazon publishes, and rustls accepts every certificate in them.

use std::collections::BTreeMap;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use sha2::{Digest, Sha256};
use x509_cert::Certificate;
use x509_cert::der::Decode;

const RDS: &[u8] = include_bytes!("../../ca-certificates/global-bundle.pem");
const TRUST_SERVICES: &[u8] = include_bytes!("../../ca-certificates/amazon-trust-services.pem");

fn sha256(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The certificates of a file. Asserts that each is valid today, and that rustls accepts it as a root.
fn roots(pem: &[u8]) -> Vec<(CertificateDer<'static>, Certificate)> {
    let mut store = RootCertStore::empty();
    let roots = CertificateDer::pem_slice_iter(pem).map(|der| {
        let der = der.unwrap();
        store.add(der.clone()).unwrap();
        let certificate = Certificate::from_der(&der).unwrap();
        let until = certificate.tbs_certificate.validity.not_after;
        let until = until.to_system_time();
        let subject = &certificate.tbs_certificate.subject;
        assert!(until > SystemTime::now(), "{subject} has expired");
        (der, certificate)
    });
    roots.collect()
}

#[test]
fn the_bundle_of_rds_is_amazons_byte_for_byte() {
    assert_eq!(
        sha256(RDS),
        "e5bb2084ccf45087bda1c9bffdea0eb15ee67f0b91646106e466714f9de3c7e3"
    );
    assert_eq!(RDS.len(), 165_408);
}

#[test]
fn the_bundle_of_rds_has_three_roots_for_each_of_34_regions_and_6_of_aws_itself() {
    let mut regions = BTreeMap::<String, Vec<String>>::new();
    let mut names = Vec::new();
    for (_, root) in roots(RDS) {
        // "CN=Amazon RDS ca-central-1 Root CA RSA2048 G1,…"
        let subject = root.tbs_certificate.subject.to_string();
        let (_, name) = subject.split_once("CN=Amazon RDS ").unwrap();
        let name = name.split([',', '+']).next().unwrap();
        let (region, keys) = name.split_once(" Root CA ").unwrap();
        names.push(region.to_owned());
        let of_region = regions.entry(region.to_owned()).or_default();
        of_region.push(keys.to_owned());
    }
    assert_eq!((names.len(), &*names[0]), (108, "sa-east-1"));
    for (region, keys) in &mut regions {
        keys.sort();
        assert_eq!(*keys, ["ECC384 G1", "RSA2048 G1", "RSA4096 G1"], "{region}");
    }
    let is_aws = |region: &&String| region.starts_with("Preview ") || region.starts_with("Beta ");
    let (aws, regions): (Vec<_>, Vec<_>) = regions.keys().partition(is_aws);
    assert_eq!(aws, ["Beta us-east-1", "Preview us-east-2"]);
    assert_eq!(regions.len(), 34);
}

#[test]
fn the_roots_of_amazon_trust_services_are_those_five_with_these_fingerprints() {
    let roots = roots(TRUST_SERVICES);
    let fingerprints: Vec<_> = roots.iter().map(|(der, _)| sha256(der)).collect();
    assert_eq!(
        fingerprints,
        [
            "8ecde6884f3d87b1125ba31ac3fcb13d7016de7f57cc904fe1cb97c6ae98196e",
            "1ba5b2aa8c65401a82960118f80bec4f62304d83cec4713a19c39c011ea46db4",
            "18ce6cfe7bf14e60b2e347b8dfe868cb31d02ebb3ada271569f50343b46db3a4",
            "e35d28419ed02025cfa69038cd623962458da5c695fbdea3c22b0bfb25897092",
            "568d6905a2c88708a4b3025190edcfedb1974a606a13c6e5290fcb2ae63edab5",
        ]
    );
    for (_, root) in roots {
        let certificate = root.tbs_certificate;
        assert_eq!(
            certificate.issuer, certificate.subject,
            "a root has signed itself"
        );
    }
}
