//! A VM is taken over without anyone's word, and never runs twice.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use migrate::registry::Registry;
use migrate::transport::Identity;
use rustix::process::Signal;
use segment::{Generation, VmId};
use serde_json::Value;
use understudy_tests::demo::{self, Options};
use understudy_tests::harness::{Cluster, Machine, counter, run, run_json, signal, wait_for};

fn history(cluster: &Cluster, vm: &str) -> Vec<Value> {
    let history = run_json(cluster.standby(0).args(["history", vm, "--json"])).unwrap();
    history.as_array().unwrap().clone()
}

/// Waits until the history has such an entry.
fn entry(cluster: &Cluster, vm: &str, event: &str) -> Value {
    wait_for(format!("{event} in the history of {vm}"), || {
        Ok(history(cluster, vm).into_iter().find(|e| e["event"] == event))
    })
    .unwrap()
}

/// Three agents; a guest under a lease, on none of them, that two of them hold and have committed checkpoints of.
fn leased(folder: &tempfile::TempDir, vm: &str, detect: &str) -> (Cluster, Machine) {
    leased_at(folder, vm, detect, &[])
}

fn leased_at(folder: &tempfile::TempDir, vm: &str, detect: &str, agents: &[&str]) -> (Cluster, Machine) {
    working(folder, vm, detect, agents, "mib=4 rate=500 heartbeat_ms=10")
}

fn working(
    folder: &tempfile::TempDir,
    vm: &str,
    detect: &str,
    agents: &[&str],
    work: &str,
) -> (Cluster, Machine) {
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    for name in ["alder", "birch", "cedar"] {
        cluster.start_agent(name, agents).unwrap();
    }
    let holders = format!("{},{}", cluster.agents[1].address, cluster.agents[2].address);
    let protect = [
        "--memory",
        "32M",
        "--every",
        "50ms",
        "--protect-to",
        &holders,
        "--failover",
        "auto",
        "--detect",
        detect,
    ];
    let machine = cluster.launch(vm, "churn", work, &protect).unwrap();
    cluster.committed(&machine, 3).unwrap();
    (cluster, machine)
}

/// The guest where it was taken over to, once it is heard there.
fn taken_over(cluster: &Cluster, vm: &str) -> (String, Machine) {
    let entry = entry(cluster, vm, "taken-over");
    let node = entry["node"].as_str().unwrap().to_owned();
    let agent = cluster.agents.iter().position(|a| a.name == node).unwrap();
    let there = cluster.agents[agent].data.join("run");
    let status = wait_for("its control socket to answer", || {
        Ok(cluster.status(vm, &there).ok())
    })
    .unwrap();
    let pid = u32::try_from(status["pid"].as_u64().unwrap()).unwrap();
    let machine = cluster.adopt(vm, agent, pid);
    goes_on(&machine);
    (node, machine)
}

fn heartbeat(machine: &Machine) -> u64 {
    counter(&machine.console().unwrap_or_default(), "writes").unwrap_or(0)
}

/// For how many milliseconds the owner before was waited for.
fn waited(entry: &Value) -> Option<u64> {
    let (_, rest) = entry["detail"].as_str()?.split_once("waited ")?;
    rest.split(' ').next()?.parse().ok()
}

fn goes_on(machine: &Machine) {
    let before = heartbeat(machine);
    wait_for("the guest to go on", || {
        Ok((heartbeat(machine) > before).then_some(()))
    })
    .unwrap();
}

#[test]
fn the_demo_without_anyones_help_goes_as_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("figures/demo.json");
    let options = Options {
        auto: true,
        ..Options::short(folder.path().join("demo"), json.clone())
    };
    let figures = demo::tell(&options).unwrap();
    assert_eq!(figures.bad_pages, 0);
    assert!(figures.resumed_from_count >= figures.committed_at_count);
    let auto = figures.auto.unwrap();
    assert!(auto.node == "alder" || auto.node == "birch", "{auto:?}");
    assert!(
        auto.detection_ms > 0.0 && auto.takeover_ms > 0.0 && auto.total_ms > 0.0,
        "{auto:?}"
    );
    let written: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    for name in ["detection_ms", "takeover_ms", "total_ms"] {
        assert!(
            written["auto"][name].is_number(),
            "{name} is missing in {written}"
        );
    }
}

#[test]
fn an_owner_that_is_stopped_for_longer_than_its_lease_is_never_heard_again() {
    let folder = tempfile::tempdir().unwrap();
    // It never rests and speaks all the time: what it is let run is heard.
    let (mut cluster, mut old) = working(
        &folder,
        "stopped",
        "default",
        &[],
        "mib=4 rate=1000000 heartbeat_ms=1",
    );
    signal(old.pid, Signal::STOP).unwrap();
    let (node, new) = taken_over(&cluster, "stopped");
    let lost = entry(&cluster, "stopped", "owner-lost");
    assert!(
        lost["detail"].as_str().unwrap().contains("SIGSTOP"),
        "the reason is known: {lost}"
    );
    assert_eq!(lost["node"].as_str(), Some(node.as_str()));
    let before = old.console().unwrap();
    signal(old.pid, Signal::CONT).unwrap();
    let status = old.wait().unwrap();
    assert_eq!(status.code(), Some(3), "it is told that it is fenced, and ends");
    assert_eq!(
        old.console().unwrap(),
        before,
        "it was heard after another host had taken it over"
    );
    goes_on(&new);
    let owners: Vec<_> = history(&cluster, "stopped")
        .into_iter()
        .filter(|e| e["event"] == "taken-over")
        .collect();
    assert_eq!(owners.len(), 1, "{owners:?}");
    cluster.own(new);
}

#[test]
fn a_process_that_ended_is_replaced_at_once_and_its_successor_too() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, mut machine) = leased(&folder, "dead", "default");
    machine.kill().unwrap();
    let (_, mut second) = taken_over(&cluster, "dead");
    let lost = entry(&cluster, "dead", "owner-lost");
    assert!(
        lost["detail"].as_str().unwrap().contains("its process ended"),
        "{lost}"
    );
    // What has ended runs nothing: its lease is not waited for to its end.
    let taken = entry(&cluster, "dead", "taken-over");
    assert!(waited(&taken) < Some(2500), "{taken}");
    // Protected again, and by itself.
    wait_for("the successor to commit", || {
        let status = cluster.status("dead", &second.run_dir)?;
        Ok(status["committed"]
            .as_str()
            .filter(|c| c.starts_with("dead/2/"))
            .map(drop))
    })
    .unwrap();
    second.kill().unwrap();
    let again = wait_for("it to be taken over again", || {
        let all = history(&cluster, "dead").into_iter();
        let mut again = all.filter(|e| e["event"] == "taken-over" && e["generation"] == 3);
        Ok(again.next())
    })
    .unwrap();
    let agent = cluster
        .agents
        .iter()
        .position(|a| again["node"] == a.name.as_str())
        .unwrap();
    let there = cluster.agents[agent].data.join("run");
    let status = wait_for("its control socket to answer", || {
        Ok(cluster.status("dead", &there).ok())
    })
    .unwrap();
    let third = cluster.adopt(
        "dead",
        agent,
        u32::try_from(status["pid"].as_u64().unwrap()).unwrap(),
    );
    goes_on(&third);
    cluster.own(third);
}

#[test]
fn a_vm_that_was_stopped_on_purpose_is_left_alone_and_can_be_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let (cluster, mut machine) = leased(&folder, "off", "default");
    run(cluster.vmm("stop", &machine.run_dir).arg("off")).unwrap();
    machine.wait().unwrap();
    entry(&cluster, "off", "stopped");
    // Longer than a lease, and than the watchers' lists are old.
    std::thread::sleep(std::time::Duration::from_secs(4));
    let events: Vec<_> = history(&cluster, "off")
        .iter()
        .map(|e| e["event"].clone())
        .collect();
    assert!(!events.iter().any(|e| e == "owner-lost"), "{events:?}");
    let said = run(cluster.standby(0).args(["history", "off"])).unwrap();
    assert!(said.contains("stopped") && said.contains("running"), "{said}");
}

#[test]
fn a_drill_runs_a_copy_and_leaves_the_vm_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, machine) = leased(&folder, "drilled", "default");
    let nothing = cluster.standby(0).args(["drill", "drilled"]).output().unwrap();
    let why = String::from_utf8_lossy(&nothing.stderr);
    assert!(
        !nothing.status.success()
            && why.contains("no complete checkpoint")
            && why.contains("standby explain"),
        "{why}"
    );
    let report = run_json(
        cluster
            .standby(1)
            .args(["drill", "drilled", "--watch", "200ms", "--json"]),
    )
    .unwrap();
    assert!(report["recovery_us"].as_u64().unwrap() > 0, "{report}");
    assert!(report["watched_ms"].as_u64().unwrap() >= 200, "{report}");
    assert!(
        report["segment"]["name"]
            .as_str()
            .unwrap()
            .starts_with("drilled/1/"),
        "{report}"
    );
    entry(&cluster, "drilled", "drilled");
    let left: Vec<_> = std::fs::read_dir(cluster.agents[1].data.join("drills"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    goes_on(&machine);
    let status = cluster.status("drilled", &machine.run_dir).unwrap();
    assert_eq!(
        (status["state"].as_str(), status["generation"].as_u64()),
        (Some("running"), Some(1))
    );
    cluster.own(machine);
}

#[test]
fn what_a_broken_off_takeover_left_is_started_by_hand_only_after_the_owner_has_no_time() {
    let folder = tempfile::tempdir().unwrap();
    // Agents that only store: nobody takes it over by itself.
    let (mut cluster, mut old) =
        leased_at(&folder, "broken", "ttl=1000ms,renew=200ms", &["--roles", "store"]);
    signal(old.pid, Signal::STOP).unwrap();
    // A takeover that got no further than the registry: no holder knows of it, and grants the owner time if it asks.
    let identity = Identity::tls(&cluster.certificate("birch")).unwrap();
    let registry = Registry::remote(&cluster.agents[0].address, &identity);
    let vm = VmId::new("broken").unwrap();
    let raised = tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(registry.raise_generation(&vm, Generation(1), "birch"))
        .unwrap();
    assert_eq!(raised.generation, Generation(2));
    let log = folder.path().join("by-hand.log");
    let holders = format!("{},{}", cluster.agents[1].address, cluster.agents[2].address);
    let run_dir = folder.path().join("by-hand");
    let mut by_hand = cluster.vmm("run", &run_dir);
    by_hand
        .env("UNDERSTUDY_TLS", cluster.certificate("birch"))
        .env("UNDERSTUDY_LOG", "info")
        .args([
            "--name",
            "broken",
            "--memory",
            "32M",
            "--protect-to",
            &holders,
            "--failover",
            "auto",
        ])
        .args(["--cmdline", "mib=4 rate=500 heartbeat_ms=10", "--kernel"])
        .arg(cluster.guest("churn"))
        .arg("--store")
        .arg(folder.path().join("by-hand-store"))
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap());
    let mut by_hand = by_hand.spawn().unwrap();
    // Ended with the cluster, whatever is found below.
    cluster.own(cluster.adopt("broken", 1, by_hand.id()));
    let status = wait_for("it to run", || {
        if let Some(status) = by_hand.try_wait()? {
            panic!("it ended with {status}: {}", std::fs::read_to_string(&log)?);
        }
        let status = cluster.status("broken", &run_dir).ok();
        Ok(status.filter(|status| status["state"] == "running"))
    })
    .unwrap();
    assert_eq!(status["generation"], 3, "{status}");
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(said.contains("the owner before has to stand still"), "{said}");
    let before = old.console().unwrap();
    signal(old.pid, Signal::CONT).unwrap();
    assert_eq!(
        old.wait().unwrap().code(),
        Some(3),
        "the holders know of the new generation"
    );
    assert_eq!(old.console().unwrap(), before);
}

/// A node that raised the generation and is gone leaves a VM that nobody runs: another goes on with it.
#[test]
fn a_takeover_that_was_broken_off_is_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let (cluster, mut old) = leased(&folder, "left", "ttl=500ms,renew=100ms");
    // It gets no further than the registry.
    let identity = Identity::tls(&cluster.certificate("birch")).unwrap();
    let registry = Registry::remote(&cluster.agents[0].address, &identity);
    let vm = VmId::new("left").unwrap();
    let raised = tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(registry.raise_generation(&vm, Generation(1), "birch"))
        .unwrap();
    assert_eq!(raised.generation, Generation(2));
    // The owner is refused, and its guest is never run again.
    assert_eq!(old.wait().unwrap().code(), Some(3));
    taken_over(&cluster, "left");
    let lost = entry(&cluster, "left", "owner-lost");
    let why = lost["detail"].as_str().unwrap();
    assert!(why.contains("broken off"), "{why}");
}
