//! Someone on the network path to the server learns no user name, password or query, whatever they answer.
//!
//! | the man in the middle                          | what he gets                           |
//! |------------------------------------------------|----------------------------------------|
//! | says that the server has no TLS, in five ways  | SSLRequest, and not one byte more      |
//! | says yes to TLS, and goes on in plaintext      | a ClientHello; no user, no password    |
//! | has a certificate that is wrong, in eight ways | an alert                               |
//! | offers TLS 1.1 at most                         | an alert                               |
//! | has a certificate of the same authority        | a log-in that channel binding ends     |

use std::io::Error;

use crate::support::fake::{
    CLEARTEXT_PASSWORD, Fake, SSL_REQUEST, Wire, acceptor, message, silence, startup, tls,
};
use crate::support::{RDS, UNSET, at, builder, demo, eventually, with};
use local_rds::{Authority, ENDPOINT, KeyType, LocalRds};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa};
use time::{Duration, OffsetDateTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;

/// A server that sends this answer to SSLRequest, and then asks for the password.
fn trap(answer: &'static [u8]) -> Fake {
    Fake::new(move |mut wire: Wire| async move {
        if startup(&mut wire).await? == SSL_REQUEST[4..] {
            wire.write_all(answer).await?;
            startup(&mut wire).await?;
        }
        wire.write_all(CLEARTEXT_PASSWORD).await?;
        silence(wire).await
    })
}

#[test]
fn the_trap_works_on_a_client_without_tls() {
    let trap = trap(b"N");
    at(
        trap.port,
        &RDS,
        &[("DB_CA_CERT", UNSET), ("PG.CONNECT_TIMEOUT", "1")],
    )
    .failed(&["no answer within 2s"]);
    assert!(
        trap.heard()[0].ends_with(b"throwaway\0"),
        "{:?}",
        trap.heard()
    );
}

#[test]
fn a_server_that_says_it_has_no_tls_hears_nothing_more() {
    for answer in [
        &b"N"[..],
        b"E\0\0\0\x2bSFATAL\0C08P01\0Munsupported protocol\0\0", // PostgreSQL before 7.3, and poolers
        b"EFATAL:  unsupported frontend protocol\n\0",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0\xff\x16\x03\x01garbage",
    ] {
        let trap = trap(answer);
        at(trap.port, &RDS, &[]).failed(&[ENDPOINT, "server does not support TLS"]);
        assert_eq!(trap.heard(), [SSL_REQUEST], "{answer:?}");
    }
}

#[test]
fn direct_tls_says_nothing_in_plaintext_at_all() {
    let trap = Fake::new(|mut wire: Wire| async move {
        wire.read_u8().await?;
        wire.write_all(CLEARTEXT_PASSWORD).await?;
        silence(wire).await
    });
    at(trap.port, &RDS, &[("PG.SSLNEGOTIATION", "direct")]).failed(&[ENDPOINT, "TLS handshake"]);
    only_tls(&trap.heard()[0]);
}

#[test]
fn plaintext_after_yes_to_tls_is_not_taken_for_an_answer() {
    for after in [
        &b"S"[..],
        b"SR\0\0\0\x08\0\0\0\x03",
        b"SR\0\0\0\x08\0\0\0\0Z\0\0\0\x05I",
        b"SN",
    ] {
        let trap = trap(after);
        at(trap.port, &RDS, &[("PG.CONNECT_TIMEOUT", "1")]).failed(&[ENDPOINT]);
        let heard = &trap.heard()[0];
        assert_eq!(heard[..8], SSL_REQUEST);
        only_tls(&heard[8..]);
    }
}

/// Asserts that these bytes are only TLS handshakes and alerts, in which only the host name can be read.
fn only_tls(mut heard: &[u8]) {
    while let [kind, 3, _, high, low, rest @ ..] = heard {
        assert!([0x15, 0x16].contains(kind), "{heard:?}");
        heard = &rest[usize::from(u16::from_be_bytes([*high, *low]))..];
    }
    assert!(heard.is_empty(), "{heard:?}");
}

#[test]
fn a_wrong_certificate_is_refused_for_what_is_wrong_with_it() {
    type Change = fn(&mut CertificateParams);
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let as_it_should_be: Change = |_| {};
    let refused = |root: &str, name, change, subordinate: bool, why: &str| {
        let mut certificate = authority.issue(name, change).unwrap();
        if !subordinate {
            certificate.subordinate.clear();
        }
        let rds = LocalRds::builder()
            .certificate(&certificate, root)
            .start()
            .unwrap();
        let run = demo(&with(&rds, &[]));
        match why {
            "" => run.succeeded(),
            why => {
                run.failed(&[ENDPOINT, "error performing TLS handshake", why]);
                eventually("the server has logged the end", || {
                    rds.log()
                        .unwrap()
                        .contains("could not accept SSL connection")
                });
            }
        }
        assert!(!rds.log().unwrap().contains("throwaway"));
    };
    let own = authority.root();
    let other = Authority::new(KeyType::Ecc384).unwrap();
    std::thread::scope(|scope| {
        for (root, name, change, subordinate, why) in [
            (own, ENDPOINT, as_it_should_be, true, ""),
            (
                other.root(),
                ENDPOINT,
                as_it_should_be,
                true,
                "invalid peer certificate",
            ),
            (
                own,
                "database-2.example",
                as_it_should_be,
                true,
                "not valid for name",
            ),
            (own, ENDPOINT, as_it_should_be, false, "UnknownIssuer"),
            (
                own,
                ENDPOINT,
                |leaf| leaf.not_after = days(-1),
                true,
                "certificate expired",
            ),
            (
                own,
                ENDPOINT,
                |leaf| leaf.not_before = days(1),
                true,
                "certificate not valid yet",
            ),
            (
                own,
                ENDPOINT,
                |leaf| leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
                true,
                "CaUsedAsEndEntity",
            ),
            (
                own,
                ENDPOINT,
                |leaf| leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth],
                true,
                "certificate does not allow extended key usage for server authentication",
            ),
            // The name is only in the subject, which clients no longer read.
            (
                own,
                ENDPOINT,
                |leaf| leaf.subject_alt_names.clear(),
                true,
                "not valid for name",
            ),
        ] {
            scope.spawn(move || refused(root, name, change, subordinate, why));
        }
    });
}

fn days(days: i64) -> OffsetDateTime {
    OffsetDateTime::now_utc() + Duration::days(days)
}

#[test]
fn tls_1_1_is_refused() {
    let rds = builder()
        .setting("ssl_min_protocol_version", "TLSv1.1")
        .setting("ssl_max_protocol_version", "TLSv1.1")
        .setting("ssl_ciphers", "ALL:@SECLEVEL=0")
        .start()
        .unwrap();
    demo(&with(&rds, &[])).failed(&[ENDPOINT, "received fatal alert: ProtocolVersion"]);
    // The server writes its log after the client has left.
    eventually("the log says why", || {
        rds.log().unwrap().contains("unsupported protocol")
    });
}

/// A relay to the real server with another certificate of the same authority, as someone who has stolen the authority's
/// key could make it. `change` changes the first message that the server sends.
fn relay(rds: &LocalRds, authority: &Authority, change: fn(&mut Vec<u8>)) -> Fake {
    let acceptor = acceptor(&authority.issue(ENDPOINT, |_| {}).unwrap());
    let connector = anyone();
    let port = rds.port();
    Fake::new(move |wire: Wire| {
        let (acceptor, connector) = (acceptor.clone(), connector.clone());
        async move {
            let mut client = tls(wire, &acceptor).await?;
            let mut server = TcpStream::connect(("127.0.0.1", port)).await?;
            server.write_all(&SSL_REQUEST).await?;
            server.read_u8().await?;
            let mut server = connector
                .connect(ENDPOINT.try_into().unwrap(), server)
                .await?;

            let hello = startup(&mut client).await?;
            server.write_u32(hello.len() as u32 + 4).await?;
            server.write_all(&hello).await?;
            let (kind, mut body) = message(&mut server).await?;
            change(&mut body);
            client.write_u8(kind).await?;
            client.write_u32(body.len() as u32 + 4).await?;
            client.write_all(&body).await?;
            client.flush().await?;
            copy_bidirectional(&mut client, &mut server).await?;
            Ok::<(), Error>(())
        }
    })
}

/// A TLS client that accepts every certificate, for the relay.
fn anyone() -> tokio_rustls::TlsConnector {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, SignatureScheme};

    #[derive(Debug)]
    struct Anyone;
    impl ServerCertVerifier for Anyone {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![
                SignatureScheme::ECDSA_NISTP384_SHA384,
                SignatureScheme::RSA_PSS_SHA256,
            ]
        }
    }

    let provider = rustls::crypto::ring::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(std::sync::Arc::new(Anyone))
        .with_no_client_auth();
    std::sync::Arc::new(config).into()
}

#[test]
fn channel_binding_gives_a_relay_away_that_has_a_certificate_of_the_same_authority() {
    let authority = Authority::new(KeyType::Ecc384).unwrap();
    let certificate = authority.issue(ENDPOINT, |_| {}).unwrap();
    let rds = LocalRds::builder()
        .certificate(&certificate, authority.root())
        .start()
        .unwrap();
    let run = |fake: &Fake, binding: &str| at(fake.port, &rds, &[("PG.CHANNEL_BINDING", binding)]);

    let honest = relay(&rds, &authority, |_| {});
    for binding in [UNSET, "prefer", "require"] {
        run(&honest, binding).failed(&[ENDPOINT, "SCRAM channel binding check failed"]);
    }
    // Without channel binding the relay works, so it is channel binding that stops it.
    run(&honest, "disable").succeeded();

    let strips_plus = relay(&rds, &authority, |body| {
        assert_eq!(body[4..], *b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0");
        body.drain(4..4 + b"SCRAM-SHA-256-PLUS\0".len());
    });
    run(&strips_plus, UNSET).failed(&[ENDPOINT, "SCRAM channel binding negotiation error"]);
    run(&strips_plus, "require").failed(&[ENDPOINT, "server did not use channel binding"]);
    run(&strips_plus, "disable").succeeded();

    // A server that asks for the password itself gets no channel binding. Only `require` refuses that.
    let asks_for_it = relay(&rds, &authority, |body| {
        *body = 3_u32.to_be_bytes().to_vec()
    });
    run(&asks_for_it, "require").failed(&[ENDPOINT, "server did not use channel binding"]);
}
