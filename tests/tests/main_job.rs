//! The main job, with real processes: protect, lose the host, go on; and what must hold when things go wrong.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::path::Path;

use serde_json::Value;
use understudy_tests::demo::{self, Options};
use understudy_tests::harness::{Cluster, Machine, counter, epoch, run_json, wait_for};

fn cluster(folder: &tempfile::TempDir, agents: usize) -> Cluster {
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    for name in ["alder", "birch", "cedar"].into_iter().take(agents) {
        cluster.start_agent(name, &[]).unwrap();
    }
    cluster
}

fn holders(cluster: &Cluster) -> String {
    cluster
        .agents
        .iter()
        .map(|a| a.address.clone())
        .collect::<Vec<_>>()
        .join(",")
}

const CHURN: &str = "mib=16 rate=2000 heartbeat_ms=50 verify=4";

fn protect(cluster: &mut Cluster, name: &str, more: &[&str]) -> Machine {
    let holders = holders(cluster);
    let mut arguments = vec!["--memory", "48M", "--every", "50ms", "--protect-to", &holders];
    arguments.extend(more);
    cluster.launch(name, "churn", CHURN, &arguments).unwrap()
}

/// Waits until the quorum has `more` checkpoints beyond what it has now; returns the newest's number.
fn committed(cluster: &Cluster, machine: &Machine, more: u64) -> u64 {
    let mut first = None;
    wait_for(
        format!("{more} more checkpoints of {} to be committed", machine.name),
        || {
            let status = cluster.status(&machine.name, &machine.run_dir)?;
            let now = epoch(&status["committed"]);
            Ok((now >= *first.get_or_insert(now) + more && now > 0).then_some(now))
        },
    )
    .unwrap()
}

/// Waits until the guest says that it has written `more` pages; it must not have found damage.
fn works(machine: &Machine, more: u64) -> u64 {
    let mut first = None;
    wait_for(format!("{} to go on", machine.name), || {
        let console = machine.console()?;
        assert!(!console.contains("BAD"), "the guest found damage:\n{console}");
        let Some(now) = counter(&console, "writes") else {
            return Ok(None);
        };
        Ok((now >= *first.get_or_insert(now) + more).then_some(now))
    })
    .unwrap()
}

fn state(cluster: &Cluster, name: &str, run_dir: &Path) -> String {
    let status = cluster.status(name, run_dir).unwrap();
    status["state"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn the_demo_goes_as_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("figures/demo.json");
    let options = Options::short(folder.path().join("demo"), json.clone());
    let figures = demo::tell(&options).unwrap();
    assert_eq!(figures.bad_pages, 0);
    assert!(figures.epochs_committed >= 5);
    assert!(figures.committed_at_count > 0 && figures.resumed_from_count >= figures.committed_at_count);
    let written: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    for name in [
        "epochs_committed",
        "killed_at_count",
        "resumed_from_count",
        "bad_pages",
        "promote_to_running_ms",
        "bytes_raw",
        "bytes_shipped",
    ] {
        assert!(written[name].is_number(), "{name} is missing in {written}");
    }
}

#[test]
fn two_deaths_in_a_row() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(&folder, 3);
    let mut machine = protect(&mut cluster, "twice", &[]);
    let mut count = works(&machine, 500);
    for agent in [1, 2] {
        committed(&cluster, &machine, 3);
        machine.kill().unwrap();
        let report = run_json(cluster.standby(agent).args(["promote", "twice", "--json"])).unwrap();
        assert_eq!(report["generation"], agent as u64 + 1);
        machine = cluster.adopt("twice", agent, report["pid"].as_u64().unwrap() as u32);
        let now = works(&machine, 500);
        assert!(now > count, "the guest went back from {count} to {now}");
        count = now;
    }
    cluster.own(machine);
}

#[test]
fn a_dead_holder_does_not_stall_the_guest_and_is_served_when_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(&folder, 2);
    let machine = protect(&mut cluster, "lag", &["--ack-quorum", "1"]);
    works(&machine, 200);
    committed(&cluster, &machine, 2);
    cluster.kill_agent(1).unwrap();
    // The guest works on, and commits with the holder that is left.
    works(&machine, 500);
    committed(&cluster, &machine, 5);
    let lag = |cluster: &Cluster| {
        let status = cluster.status("lag", &machine.run_dir).unwrap();
        let holders = status["protection"]["holders"].as_array().unwrap().clone();
        holders[1]["lag_epochs"].as_u64().unwrap()
    };
    wait_for("the lag to show", || Ok((lag(&cluster) >= 3).then_some(()))).unwrap();
    let listed = run_json(cluster.vmm("ps", &machine.run_dir).arg("--json")).unwrap();
    assert!(
        listed.to_string().contains("lag_epochs"),
        "vmm ps does not show the lag: {listed}"
    );
    cluster.restart_agent(1).unwrap();
    wait_for(
        "the holder to catch up",
        || Ok((lag(&cluster) <= 2).then_some(())),
    )
    .unwrap();
    // What it has is whole: it can take over.
    let mut machine = machine;
    machine.kill().unwrap();
    let report = run_json(cluster.standby(1).args(["promote", "lag", "--json"])).unwrap();
    let successor = cluster.adopt("lag", 1, report["pid"].as_u64().unwrap() as u32);
    works(&successor, 500);
    cluster.own(successor);
}

#[test]
fn a_promoted_vm_never_runs_twice() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(&folder, 2);
    let mut machine = protect(&mut cluster, "once", &[]);
    works(&machine, 200);
    committed(&cluster, &machine, 2);
    // The old owner is alive and well.
    let report = run_json(cluster.standby(1).args(["promote", "once", "--json"])).unwrap();
    let successor = cluster.adopt("once", 1, report["pid"].as_u64().unwrap() as u32);
    // The old owner stops its guest, says why and goes: status 3.
    let ended = machine.wait().unwrap();
    assert_eq!(ended.code(), Some(3), "the fenced owner ended with {ended}");
    let listed = run_json(cluster.vmm("ps", &machine.run_dir).arg("--json"))
        .unwrap()
        .to_string();
    assert!(
        listed.contains("fenced") && listed.contains("generation 2"),
        "vmm ps does not say so: {listed}"
    );
    let resumed = cluster
        .vmm("resume", &machine.run_dir)
        .arg("once")
        .output()
        .unwrap();
    assert!(!resumed.status.success(), "a fenced VM was resumed");
    let silent = machine.console().unwrap().len();
    works(&successor, 500);
    assert_eq!(machine.console().unwrap().len(), silent, "the fenced guest spoke");
    assert_eq!(state(&cluster, "once", &successor.run_dir), "running");
    cluster.own(successor);
}

#[test]
fn a_stopped_vm_is_promoted_from_its_very_last_state() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(&folder, 2);
    let mut machine = protect(&mut cluster, "still", &["--ack-quorum", "2"]);
    works(&machine, 200);
    committed(&cluster, &machine, 2);
    let stop = cluster
        .vmm("stop", &machine.run_dir)
        .arg("still")
        .output()
        .unwrap();
    assert!(stop.status.success(), "{}", String::from_utf8_lossy(&stop.stderr));
    assert!(machine.wait().unwrap().success());
    let last = counter(&machine.console().unwrap(), "writes").unwrap();
    let report = run_json(cluster.standby(1).args(["promote", "still", "--json"])).unwrap();
    let successor = cluster.adopt("still", 1, report["pid"].as_u64().unwrap() as u32);
    let first = wait_for("the guest to speak", || {
        Ok(understudy_tests::harness::first_counter(
            &successor.console()?,
            "writes",
        ))
    })
    .unwrap();
    assert!(first >= last, "stopped at {last} and gone on from {first}");
    works(&successor, 200);
    cluster.own(successor);
}
