//! `GET /metrics` of a real agent, read with a plain TCP client.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use migrate::agent::{Agent, AgentConfig};
use migrate::registry::RegistryAddr;
use migrate::store::{Durability, FsStore};
use net_common::*;
use segment::Generation;

/// What a server says to `request`, until it closes.
fn ask(at: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    // One that was refused in the middle of what it said may be reset.
    match stream.read_to_string(&mut answer) {
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        Err(e) => panic!("{at} does not answer: {e}"),
    }
    answer
}

/// The samples, by name and labels. Every line has to be one of the format.
fn parsed(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let mut lines = text.lines().peekable();
    let (mut family, mut kind) = (String::new(), String::new());
    while let Some(line) = lines.next() {
        if let Some(comment) = line.strip_prefix("# ") {
            if comment == "EOF" {
                assert!(lines.peek().is_none(), "something follows the end");
                return samples;
            }
            let mut words = comment.splitn(3, ' ');
            let (what, name) = (words.next().unwrap(), words.next().unwrap());
            let rest = words.next().unwrap_or_else(|| panic!("{line:?} says nothing"));
            match what {
                "HELP" => name.clone_into(&mut family),
                "TYPE" => {
                    assert_eq!(name, family, "{line}");
                    assert!(
                        ["counter", "gauge", "histogram", "info"].contains(&rest),
                        "{line}"
                    );
                    rest.clone_into(&mut kind);
                }
                "UNIT" => assert!(name == family && name.ends_with(rest), "{line}"),
                _ => panic!("{line:?} is no line of the format"),
            }
            continue;
        }
        let (name, value) = line
            .rsplit_once(' ')
            .unwrap_or_else(|| panic!("{line:?} is no sample"));
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line:?} has no number"));
        let bare = name.split('{').next().unwrap();
        let ending = bare
            .strip_prefix(family.as_str())
            .unwrap_or_else(|| panic!("{line} is in {family}"));
        let endings: &[&str] = match kind.as_str() {
            "counter" => &["_total"],
            "info" => &["_info"],
            "histogram" => &["_bucket", "_count", "_sum"],
            _ => &[""],
        };
        assert!(endings.contains(&ending), "{line} of a {kind}");
        assert!(bare.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{line}");
        assert!(name == bare || name.ends_with("\"}"), "{line}");
        assert!(
            samples.insert(name.to_owned(), value).is_none(),
            "{name} is there twice"
        );
    }
    panic!("it has no end: {text}");
}

fn scrape(at: SocketAddr) -> BTreeMap<String, f64> {
    let answer = ask(at, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{answer:?}"));
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let head = head.to_ascii_lowercase();
    assert!(
        head.contains("content-type: application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    assert!(head.contains("connection: close"), "{head}");
    parsed(body)
}

/// A process that ends with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn config_with(dir: &std::path::Path, node: &str, registry: RegistryAddr) -> AgentConfig {
    AgentConfig {
        metrics: Some("127.0.0.1:0".into()),
        // It looks at what the registry lists often.
        replace_after: Duration::from_millis(400),
        lease_ttl: Duration::from_millis(600),
        ..config(dir, node, registry)
    }
}

async fn metered(dir: &std::path::Path, node: &str, registry: RegistryAddr) -> (Agent, SocketAddr) {
    let agent = Agent::start(config_with(dir, node, registry)).await.unwrap();
    let at = agent.metrics_address().unwrap();
    (agent, at)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_to_segments_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, at) = metered(dir.path(), "a", RegistryAddr::Embedded).await;
    let before = scrape(at);
    assert_eq!(before["understudy_segments_received_total"], 0.0);
    assert_eq!(
        before["understudy_segments_refused_total{reason=\"fenced\"}"],
        0.0
    );
    assert_eq!(before["understudy_registry_reachable"], 1.0);
    assert_eq!(before["understudy_node_lease_held"], 1.0);
    assert!(before["understudy_resident_memory_bytes"] > 1e6);

    let generation = create(agent.registry(), "web", &[agent.address()], 1).await;
    let registry = agent.registry().clone();
    let mut owner = Owner::start(
        dir.path(),
        "web",
        generation,
        &[agent.address()],
        1,
        Some(registry),
    );
    for pages in [16, 3, 4] {
        let name = owner.take(pages);
        owner.wait_committed(&name).await;
    }
    let held = agent.store().sum(&vm("web"));
    eventually("the registry's word to be told", || {
        scrape(at).get("understudy_vm_committed_epoch{vm=\"web\"}") == Some(&3.0)
    })
    .await;
    let after = scrape(at);
    assert_eq!(after["understudy_segments_received_total"], 3.0);
    assert_eq!(
        after["understudy_segments_received_bytes_total"],
        held.bytes as f64
    );
    assert_eq!(after["understudy_segments_acknowledged_total"], 3.0);
    assert_eq!(after["understudy_store_segments"], 3.0);
    assert_eq!(after["understudy_store_used_bytes"], held.bytes as f64);
    assert_eq!(after["understudy_sessions"], 1.0);
    assert_eq!(after["understudy_vms_held"], 1.0);
    assert_eq!(after["understudy_vm_segments{vm=\"web\"}"], 3.0);
    assert_eq!(after["understudy_vm_stored_bytes{vm=\"web\"}"], held.bytes as f64);
    assert_eq!(after["understudy_vm_newest_epoch{vm=\"web\"}"], 3.0);
    assert_eq!(
        after["understudy_vm_newest_generation{vm=\"web\"}"],
        generation.0 as f64
    );
    assert_eq!(after["understudy_vm_chain_links{vm=\"web\"}"], 3.0);
    assert_eq!(after["understudy_vm_shipping{vm=\"web\"}"], 1.0);
    // By its checkpoint's own time, which is years ago.
    assert!(after["understudy_vm_newest_age_seconds{vm=\"web\"}"] > 1e6);

    // Another owner is promised: this one's next frame is fenced.
    agent
        .store()
        .promise(&vm("web"), Generation(generation.0 + 5))
        .unwrap();
    owner.take(2);
    eventually("the fenced segment to be counted", || {
        scrape(at)["understudy_segments_refused_total{reason=\"fenced\"}"] >= 1.0
    })
    .await;
    let fenced = scrape(at);
    assert_eq!(fenced["understudy_segments_received_total"], 3.0);
    assert_eq!(fenced["understudy_segments_acknowledged_total"], 3.0);
    eventually("its session to be over", || {
        scrape(at)["understudy_sessions"] == 0.0
    })
    .await;
    owner.shipper.stop().await;
    agent.stop().await;
    assert!(TcpStream::connect(at).is_err(), "the port is still served");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_too_many_vms_the_first_are_told_of_and_how_many_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(&dir.path().join("a/store"), None, Durability::Spool).unwrap();
    // As they are on disk: to store so many durably would take long.
    for number in 0..1003 {
        let name = name(&format!("vm-{number:04}"), 1, 1);
        let path = store.segment_path(&name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, segment_bytes(&name, checkpoint_of(&name, 1), None, 1)).unwrap();
    }
    drop(store);
    let (agent, at) = metered(dir.path(), "a", RegistryAddr::Embedded).await;
    let told = scrape(at);
    assert_eq!(told["understudy_vms_held"], 1003.0);
    assert_eq!(told["understudy_vms_untold"], 3.0);
    for (vm, is_told) in [("vm-0000", true), ("vm-0999", true), ("vm-1000", false)] {
        let sample = format!("understudy_vm_segments{{vm=\"{vm}\"}}");
        assert_eq!(told.contains_key(&sample), is_told, "{vm}");
    }
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_and_the_budget_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let config = AgentConfig {
        budget: Some(100_000),
        ..config_with(dir.path(), "a", RegistryAddr::Embedded)
    };
    let agent = Agent::start(config).await.unwrap();
    let at = agent.metrics_address().unwrap();
    let generation = create(agent.registry(), "web", &[agent.address()], 1).await;
    let mut owner = Owner::start(dir.path(), "web", generation, &[agent.address()], 1, None);
    let name = owner.take(16);
    owner.wait_committed(&name).await;
    owner.take(16);
    eventually("the refused segment to be counted", || {
        scrape(at)["understudy_segments_refused_total{reason=\"full\"}"] >= 1.0
    })
    .await;
    let told = scrape(at);
    assert_eq!(told["understudy_store_budget_bytes"], 100_000.0);
    assert_eq!(told["understudy_segments_received_total"], 1.0);
    owner.shipper.stop().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_away_and_a_lease_that_is_lost_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let first = first_agent(dir.path()).await;
    let registry = RegistryAddr::Agent(first.address().to_owned());
    let (second, at) = metered(dir.path(), "b", registry).await;
    eventually("the lease to be held", || {
        scrape(at)["understudy_node_lease_held"] == 1.0
    })
    .await;
    let address = first.address().to_owned();
    first.stop().await;
    eventually("both to be told", || {
        let told = scrape(at);
        told["understudy_registry_reachable"] == 0.0 && told["understudy_node_lease_held"] == 0.0
    })
    .await;
    assert!(scrape(at)["understudy_node_lease_renewal_age_seconds"] >= 0.6);
    let first = Agent::start(again(dir.path(), "a", RegistryAddr::Embedded, &address))
        .await
        .unwrap();
    eventually("both to be well again", || {
        let told = scrape(at);
        told["understudy_registry_reachable"] == 1.0 && told["understudy_node_lease_held"] == 1.0
    })
    .await;
    second.stop().await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_get_of_the_metrics_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, at) = metered(dir.path(), "a", RegistryAddr::Embedded).await;
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), "404"),
        ("GET /metrics/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), "404"),
        ("GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), "200"),
        (
            "POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "405",
        ),
        ("DELETE /metrics HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), "405"),
        ("HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), "405"),
        ("\u{1}\u{2}\u{3}nonsense\r\n\r\n".to_owned(), "400"),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000)), "4"),
        (
            format!("GET /metrics HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(1000)),
            "4",
        ),
        (
            format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(20_000)),
            "4",
        ),
    ] {
        let answer = ask(at, &request);
        // One that is too long may be cut off before it is told so.
        let cut_off = answer.is_empty() && request.len() > 5000;
        assert!(
            cut_off || answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{:.60}: {answer:.200}",
            request
        );
    }
    scrape(at);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_slow_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, at) = metered(dir.path(), "a", RegistryAddr::Embedded).await;
    let mut slow: Vec<TcpStream> = (0..40)
        .map(|number| {
            let mut stream = TcpStream::connect(at).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            if number % 2 == 0 {
                stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ").unwrap();
            }
            stream
        })
        .collect();
    for _ in 0..5 {
        scrape(at);
    }
    // The oldest had to give way, and all others run out of time.
    for stream in &mut slow {
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset, "{e}"),
        }
    }
    scrape(at);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_option_nothing_is_served_and_a_port_that_is_taken_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let first = first_agent(dir.path()).await;
    assert_eq!(first.metrics_address(), None);
    let taken = AgentConfig {
        metrics: Some(first.address().to_owned()),
        ..config(dir.path(), "b", RegistryAddr::Embedded)
    };
    let error = Agent::start(taken).await.unwrap_err().to_string();
    assert!(
        error.contains(first.address()) && error.contains("--metrics"),
        "{error}"
    );
    first.stop().await;
}

#[test]
fn the_binary_says_where_its_metrics_are_and_has_the_option_from_a_file_too() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("standby.toml");
    let data = dir.path().join("a");
    let text = format!(
        "data = {:?}\nname = \"a\"\nlisten = \"127.0.0.1:0\"\nmetrics = \"127.0.0.1:0\"\ninsecure-plaintext = true\n",
        data.display().to_string()
    );
    std::fs::write(&file, text).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_standby"))
        .arg("serve")
        .arg("--config")
        .arg(&file)
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = Ended(child);
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("listening on "));
    let second = lines.next().unwrap().unwrap();
    let at = second.strip_prefix("metrics at http://").unwrap();
    let samples = scrape(at.strip_suffix("/metrics").unwrap().parse().unwrap());
    assert_eq!(samples["understudy_store_segments"], 0.0);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        samples[&format!("understudy_build_info{{version=\"{version}\"}}")],
        1.0
    );
}
