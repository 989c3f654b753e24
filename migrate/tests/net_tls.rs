//! Trust between nodes: who is believed, who is not, and what each is told.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

mod net_common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate::ca::{self, NewCertificate};
use migrate::transport::{
    CertRole, Identity, Link, NodeIdentity, Peer, TransportError, connect, expect_hello, in_full,
};
use migrate::wire::{Message, Purpose, Welcome};
use net_common::authority::*;
use net_common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What comes of a greeting between the two: who the listener took the caller for, and what the caller heard.
async fn meet(listener: &Identity, caller: &Identity) -> (Result<Peer, String>, Result<(), String>) {
    meet_at(listener, caller, "127.0.0.1").await
}

async fn meet_at(
    listener: &Identity,
    caller: &Identity,
    host: &str,
) -> (Result<Peer, String>, Result<(), String>) {
    let socket = TcpListener::bind((host, 0)).await.unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let name = listener.name().to_owned();
    let listening = async {
        let (stream, from) = socket.accept().await.unwrap();
        let (stream, who) = listener.accept(stream, &from.to_string()).await?;
        let mut link = Link::new(stream, "caller");
        let (_, version) = expect_hello(&mut link, "").await?;
        let welcome = Welcome {
            version,
            node: name,
            registry: None,
            software: "test".into(),
        };
        link.writer.send(0, &Message::Welcome(welcome)).await?;
        Ok::<_, TransportError>(who)
    };
    let calling = connect(&address, caller, Purpose::Call);
    let (heard, said) = tokio::join!(listening, calling);
    let told = |e: TransportError| in_full(&e);
    (heard.map_err(told), said.map(drop).map_err(told))
}

#[tokio::test]
async fn both_know_each_other_by_their_certificates() {
    let lab = Authority::new("lab");
    let (alder, oak) = (lab.issue("alder", NODE), lab.issue("oak", &[CertRole::Owner]));
    let (heard, said) = meet(&alder, &oak).await;
    let expected = NodeIdentity {
        cluster: Some("lab".into()),
        name: "oak".into(),
        roles: vec![CertRole::Owner],
    };
    assert_eq!(heard, Ok(Peer::Node(expected)));
    assert_eq!(said, Ok(()));
}

#[tokio::test]
async fn another_clusters_certificate_is_refused_in_words() {
    let (lab, other) = (Authority::new("lab"), Authority::new("other"));
    let (alder, stranger) = (lab.issue("alder", NODE), other.issue("oak", NODE));
    let (heard, said) = meet(&alder, &stranger).await;
    // The caller looks first: it ends the handshake, and says so to the listener.
    has(
        &said.unwrap_err(),
        &["not from this cluster's authority", "ca.pem"],
    );
    has(
        &heard.unwrap_err(),
        &["refuses this node's certificate", "different clusters"],
    );

    // One that believes both is refused by the other.
    let trusting = other.dir("oak");
    let both = fs::read_to_string(lab.0.path().join("ca.pem")).unwrap()
        + &fs::read_to_string(other.0.path().join("ca.pem")).unwrap();
    fs::write(trusting.join("ca.pem"), both).unwrap();
    let (heard, said) = meet(&alder, &Identity::tls(&trusting).unwrap()).await;
    has(&heard.unwrap_err(), &["not from this cluster's authority"]);
    // It learns that the clusters differ from the listener's name already.
    has(&said.unwrap_err(), &["cluster lab", "cluster other"]);
}

#[tokio::test]
async fn one_authority_may_not_mix_its_clusters() {
    // Two clusters below one root are told apart by the cluster's name in the certificate.
    let (lab, other) = (Authority::new("lab"), Authority::new("other"));
    let (alder, oak) = (lab.issue("alder", NODE), other.issue("oak", &[CertRole::Owner]));
    let both = fs::read_to_string(lab.0.path().join("ca.pem")).unwrap()
        + &fs::read_to_string(other.0.path().join("ca.pem")).unwrap();
    for dir in [lab.dir("alder"), other.dir("oak")] {
        fs::write(dir.join("ca.pem"), &both).unwrap();
    }
    alder.reload();
    oak.reload();
    let (_, said) = meet(&alder, &oak).await;
    has(&said.unwrap_err(), &["alder", "cluster lab", "cluster other"]);
}

#[tokio::test]
async fn a_certificate_out_of_its_time_names_the_clock() {
    let lab = Authority::new("lab");
    let good = lab.issue("good", NODE);
    for (from, to, words) in [(-9, -2, "expired"), (2, 9, "valid from")] {
        let bad = lab.at("bad", NODE, from, to);
        let (_, said) = meet(&bad, &good).await;
        has(&said.unwrap_err(), &[words, "the clock here says", "hours off"]);
        let (heard, said) = meet(&good, &bad).await;
        has(&heard.unwrap_err(), &[words, "hours off"]);
        has(
            &said.unwrap_err(),
            &["refuses this node's certificate", "hours off", "standby ca issue"],
        );
        let refused = Identity::tls(&lab.dir("bad")).unwrap_err();
        has(&refused.to_string(), &["cert.pem", "holds from", "set the clock"]);
    }
}

#[tokio::test]
async fn a_certificate_for_another_address_is_refused() {
    let lab = Authority::new("lab");
    let (alder, oak) = (lab.issue("alder", NODE), lab.issue("oak", NODE));
    let (_, said) = meet_at(&alder, &oak, "127.0.0.2").await;
    has(
        &said.unwrap_err(),
        &[
            "not for that address",
            "standby ca issue NODE --address 127.0.0.2",
        ],
    );
    let dir = lab.issue_as(&NewCertificate {
        addresses: vec!["127.0.0.2".into()],
        ..NewCertificate::new("alder", NODE, 10)
    });
    let alder = Identity::tls(&dir).unwrap();
    assert_eq!(meet_at(&alder, &oak, "127.0.0.2").await.1, Ok(()));
}

#[tokio::test]
async fn who_is_no_agent_cannot_pose_as_one() {
    let lab = Authority::new("lab");
    let (operator, oak) = (lab.issue("boss", &[CertRole::Operator]), lab.issue("oak", NODE));
    let (_, said) = meet(&operator, &oak).await;
    has(&said.unwrap_err(), &["not for this use", "execute or store"]);
}

#[tokio::test]
async fn an_agent_must_be_who_its_certificate_says() {
    let lab = Authority::new("lab");
    let (alder, oak) = (lab.issue("alder", NODE), lab.issue("oak", NODE));
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let lying = async {
        let (stream, _) = socket.accept().await.unwrap();
        let (stream, _) = alder.accept(stream, "caller").await.unwrap();
        let mut link = Link::new(stream, "caller");
        let (_, version) = expect_hello(&mut link, "").await.unwrap();
        let welcome = Welcome {
            version,
            node: "birch".into(),
            registry: None,
            software: "test".into(),
        };
        link.writer.send(0, &Message::Welcome(welcome)).await.unwrap();
    };
    let (_, said) = tokio::join!(lying, connect(&address, &oak, Purpose::Call));
    has(&said.unwrap_err().to_string(), &["calls itself birch", "alder's"]);
}

#[tokio::test]
async fn plain_and_tls_refuse_each_other_in_words() {
    let lab = Authority::new("lab");
    let (secure, plain) = (lab.issue("alder", NODE), Identity::plaintext("oak"));
    let (heard, said) = meet(&secure, &plain).await;
    has(&heard.unwrap_err(), &["speaks plain TCP", "this node TLS"]);
    has(
        &said.unwrap_err(),
        &["speaks TLS", "--tls", "--insecure-plaintext"],
    );
    let (heard, said) = meet(&plain, &secure).await;
    has(&heard.unwrap_err(), &["speaks TLS", "this node plain TCP"]);
    has(
        &said.unwrap_err(),
        &["does not speak TLS", "--insecure-plaintext"],
    );
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    use rustls::{ClientConfig, RootCertStore};
    use rustls_pki_types::pem::PemObject;
    let lab = Authority::new("lab");
    let alder = lab.issue("alder", NODE);
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let mut roots = RootCertStore::empty();
    let pem = fs::read(lab.0.path().join("ca.pem")).unwrap();
    roots
        .add(rustls_pki_types::CertificateDer::from_pem_slice(&pem).unwrap())
        .unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let calling = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        let mut stream = connector.connect("127.0.0.1".try_into().unwrap(), stream).await?;
        stream.read_u8().await
    };
    let listening = async {
        let (stream, _) = socket.accept().await.unwrap();
        alder.accept(stream, "caller").await
    };
    let (heard, said) = tokio::join!(listening, calling);
    has(&in_full(&heard.unwrap_err()), &["shows no certificate", "--tls"]);
    has(&said.unwrap_err().to_string(), &["CertificateRequired"]);
}

#[tokio::test]
async fn a_renewed_certificate_is_taken_up_and_a_broken_one_is_not() {
    let lab = Authority::new("lab");
    let (alder, oak) = (lab.issue("alder", NODE), lab.issue("oak", NODE));
    let before = alder.certificate().unwrap().not_after;
    lab.issue_as(&NewCertificate::new("alder", NODE, 100));
    // By itself, when it is looked at again.
    let start = std::time::Instant::now();
    while alder.certificate().unwrap().not_after == before {
        assert!(start.elapsed() < PATIENCE, "it was not read again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(meet(&alder, &oak).await.1, Ok(()));

    // A key that is not the certificate's, a file that is none, another node's: what there was goes on.
    let after = alder.certificate().unwrap();
    let dir = lab.dir("alder");
    for (file, content) in [
        ("key.pem", fs::read(lab.dir("oak").join("key.pem")).unwrap()),
        ("cert.pem", b"nothing".to_vec()),
        ("cert.pem", fs::read(lab.dir("oak").join("cert.pem")).unwrap()),
        ("ca.pem", b"".to_vec()),
    ] {
        fs::write(dir.join(file), content).unwrap();
        alder.reload();
        assert_eq!(alder.certificate().unwrap(), after, "{file}");
        assert_eq!(meet(&alder, &oak).await.1, Ok(()), "{file}");
    }
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let lab = Authority::new("lab");
    lab.issue("alder", NODE);
    let key = lab.dir("alder").join("key.pem");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let ca_key = lab.0.path().join("ca-key.pem");
    assert_eq!(fs::metadata(&ca_key).unwrap().permissions().mode() & 0o777, 0o600);
    for mode in [0o640, 0o604, 0o660] {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        let refused = Identity::tls(&lab.dir("alder")).unwrap_err().to_string();
        has(&refused, &["key.pem", "chmod 600", &format!("{mode:04o}")]);
    }
}

#[test]
fn what_is_there_is_not_written_over() {
    let lab = Authority::new("lab");
    lab.issue("alder", NODE);
    let again = ca::init(lab.0.path(), "lab", 10).unwrap_err();
    has(&again.to_string(), &["is there already", "another folder"]);
    let wanted = NewCertificate::new("alder", NODE, 10);
    let again = ca::issue(lab.0.path(), &lab.dir("alder"), &wanted, false).unwrap_err();
    has(&again.to_string(), &["is there already", "--renew"]);
    let nowhere = ca::issue(Path::new("/nonexistent"), &lab.dir("x"), &wanted, false).unwrap_err();
    has(&nowhere.to_string(), &["no authority", "standby ca init"]);
    for node in ["", "a b", "a/b", "ä"] {
        let wanted = NewCertificate::new(node, NODE, 10);
        assert!(
            ca::issue(lab.0.path(), &lab.dir("x"), &wanted, false).is_err(),
            "{node}"
        );
    }
}

/// A certificate of an authority that knows nothing of us.
fn own_authority(dir: &Path, node: &str, roles: &str) -> PathBuf {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let (ca_pem, ca_key) = (dir.join("corporate.pem"), dir.join("corporate-key.pem"));
    if !ca_pem.exists() {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(&ca_pem, params.self_signed(&key).unwrap().pem()).unwrap();
        fs::write(&ca_key, key.serialize_pem()).unwrap();
    }
    let key = KeyPair::from_pem(&fs::read_to_string(ca_key).unwrap()).unwrap();
    let ca_pem = fs::read_to_string(ca_pem).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, key).unwrap();
    let names = [format!("{node}.example.com"), "127.0.0.1".into()];
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(names)
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let out = dir.join(node);
    fs::create_dir_all(&out).unwrap();
    fs::write(out.join("cert.pem"), certificate.pem()).unwrap();
    fs::write(out.join("ca.pem"), ca_pem).unwrap();
    fs::write(out.join("roles.toml"), roles).unwrap();
    let path = out.join("key.pem");
    fs::write(&path, key.serialize_pem()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    out
}

#[tokio::test]
async fn own_certificates_get_their_roles_from_a_table() {
    let dir = tempfile::tempdir().unwrap();
    let table = r#"
        ["alder.example.com"]
        node = "alder"
        roles = ["store"]
        ["oak.example.com"]
        node = "oak"
        roles = ["owner", "operator"]
    "#;
    let alder = Identity::tls(&own_authority(dir.path(), "alder", table)).unwrap();
    let oak = Identity::tls(&own_authority(dir.path(), "oak", table)).unwrap();
    assert_eq!((alder.name(), oak.name()), ("alder", "oak"));
    let (heard, said) = meet(&alder, &oak).await;
    let Ok(Peer::Node(who)) = heard else {
        panic!("{heard:?}")
    };
    assert_eq!(
        (who.name.as_str(), who.roles),
        ("oak", vec![CertRole::Owner, CertRole::Operator])
    );
    assert_eq!(said, Ok(()));

    let unknown = own_authority(dir.path(), "elm", table);
    has(
        &in_full(&Identity::tls(&unknown).unwrap_err()),
        &["elm.example.com", "roles.toml"],
    );
    let wrong = own_authority(
        dir.path(),
        "yew",
        "[\"yew.example.com\"]\nnode = \"yew\"\nrole = []\n",
    );
    has(
        &in_full(&Identity::tls(&wrong).unwrap_err()),
        &["roles.toml", "line 3", "role"],
    );
}

#[tokio::test]
async fn what_is_no_tls_is_refused_at_once() {
    let lab = Authority::new("lab");
    let alder = lab.issue("alder", NODE);
    // A record that claims to be larger than any may be, a browser, and noise.
    for bytes in [
        &[0x16, 3, 1, 0xff, 0xff, 0, 0, 0][..],
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 300],
    ] {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut caller = TcpStream::connect(socket.local_addr().unwrap()).await.unwrap();
        let (stream, _) = socket.accept().await.unwrap();
        caller.write_all(bytes).await.unwrap();
        let (heard, _) = tokio::join!(alder.accept(stream, "caller"), async {
            let mut told = Vec::new();
            let _ = caller.read_to_end(&mut told).await;
            drop(caller);
        });
        let told = in_full(&heard.unwrap_err());
        assert!(!told.contains("within"), "{bytes:x?}: {told}");
    }
}
