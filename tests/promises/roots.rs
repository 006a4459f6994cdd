//! `ca-certificates/global-bundle.pem` is what Amazon publishes, and all of it can be used.

use std::collections::BTreeMap;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use sha2::{Digest, Sha256};
use x509_cert::Certificate;
use x509_cert::der::Decode;

const BUNDLE: &[u8] = include_bytes!("../../ca-certificates/global-bundle.pem");

#[test]
fn is_amazons_byte_for_byte() {
    let hex: String = Sha256::digest(BUNDLE)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(
        hex,
        "e5bb2084ccf45087bda1c9bffdea0eb15ee67f0b91646106e466714f9de3c7e3"
    );
    assert_eq!(BUNDLE.len(), 165_408);
}

#[test]
fn has_three_roots_for_each_of_36_regions_and_each_is_a_trust_anchor() {
    let mut regions = BTreeMap::<String, Vec<String>>::new();
    let mut store = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(BUNDLE) {
        let der = der.unwrap();
        store.add(der.clone()).unwrap();
        let certificate = Certificate::from_der(&der).unwrap().tbs_certificate;
        let until = certificate.validity.not_after.to_system_time();
        assert!(until > SystemTime::now(), "{}", certificate.subject);
        // "CN=Amazon RDS ca-central-1 Root CA RSA2048 G1,…"
        let subject = certificate.subject.to_string();
        let (_, name) = subject.split_once("CN=Amazon RDS ").unwrap();
        let name = name.split([',', '+']).next().unwrap();
        let (region, keys) = name.split_once(" Root CA ").unwrap();
        regions
            .entry(region.to_owned())
            .or_default()
            .push(keys.to_owned());
    }
    assert_eq!((store.len(), regions.len()), (108, 36));
    for (region, mut keys) in regions {
        keys.sort();
        assert_eq!(keys, ["ECC384 G1", "RSA2048 G1", "RSA4096 G1"], "{region}");
    }
}
