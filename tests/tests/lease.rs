//! A guest under a lease: it stands still before another host runs it, and when nobody renews its lease.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use understudy_tests::harness::{Cluster, Machine, counter, run_json, signal, wait_for};

/// So long that a person's promote comes well before the agents take it over by themselves.
const TERMS: &str = "ttl=4000ms,renew=400ms";

fn state(cluster: &Cluster, machine: &Machine) -> Option<String> {
    let status = cluster.status(&machine.name, &machine.run_dir).ok()?;
    status["state"].as_str().map(str::to_owned)
}

fn heartbeat(machine: &Machine) -> u64 {
    counter(&machine.console().unwrap(), "writes").unwrap_or(0)
}

/// Two agents, and a guest under a lease that was committed a few times.
fn leased(folder: &tempfile::TempDir, name: &str, on_lapse: &str) -> (Cluster, Machine) {
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    cluster.start_agent("alder", &[]).unwrap();
    cluster.start_agent("birch", &[]).unwrap();
    let holders = format!("{},{}", cluster.agents[0].address, cluster.agents[1].address);
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
        TERMS,
        "--on-lapse",
        on_lapse,
    ];
    let machine = cluster
        .launch(name, "churn", "mib=4 rate=500 heartbeat_ms=20", &protect)
        .unwrap();
    cluster.committed(&machine, 3).unwrap();
    (cluster, machine)
}

fn waited(report: &Value) -> Option<u64> {
    report["notes"].as_array()?.iter().find_map(|note| {
        let ms = note.as_str()?.strip_prefix("waited ")?.split(' ').next()?;
        ms.parse().ok()
    })
}

#[test]
fn an_owner_that_was_stopped_for_longer_than_its_lease_does_not_run_on() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, mut machine) = leased(&folder, "paused", "standby");
    signal(machine.pid, Signal::STOP).unwrap();
    let report = run_json(cluster.standby(1).args(["promote", "paused", "--json"])).unwrap();
    // Its process is there and may go on at any time: all of its lease had to run out.
    assert!(waited(&report) >= Some(500), "{report}");
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    let other = cluster.adopt("paused", 1, pid);
    wait_for("the guest to go on elsewhere", || {
        Ok((heartbeat(&other) > 0).then_some(()))
    })
    .unwrap();
    let before = machine.console().unwrap();
    signal(machine.pid, Signal::CONT).unwrap();
    let status = machine.wait().unwrap();
    assert_eq!(status.code(), Some(3), "it is told that it is fenced, and ends");
    assert_eq!(
        machine.console().unwrap(),
        before,
        "it was heard after another host had taken it over"
    );
    let now = heartbeat(&other);
    wait_for("the guest to go on", || {
        Ok((heartbeat(&other) > now).then_some(()))
    })
    .unwrap();
    cluster.own(other);
}

#[test]
fn a_guest_that_nobody_grants_time_stands_still_and_goes_on_later() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, machine) = leased(&folder, "alone", "standby");
    // One of two is no quorum; the registry, which the other keeps, is enough.
    cluster.kill_agent(1).unwrap();
    // Longer than what the one that is gone had granted.
    std::thread::sleep(Duration::from_millis(5000));
    let now = heartbeat(&machine);
    wait_for("the guest to run by the registry alone", || {
        Ok((heartbeat(&machine) > now).then_some(()))
    })
    .unwrap();
    cluster.kill_agent(0).unwrap();
    wait_for("its lease to run out", || {
        Ok((state(&cluster, &machine).as_deref() == Some("lapsed")).then_some(()))
    })
    .unwrap();
    let before = machine.console().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(machine.console().unwrap(), before, "it is heard without a lease");
    cluster.restart_agent(0).unwrap();
    wait_for("it to go on", || {
        Ok((state(&cluster, &machine).as_deref() == Some("running")).then_some(()))
    })
    .unwrap();
    let now = heartbeat(&machine);
    wait_for("the guest to be heard again", || {
        Ok((heartbeat(&machine) > now).then_some(()))
    })
    .unwrap();
}

#[test]
fn an_owner_that_is_to_stop_without_a_lease_ends_when_nobody_grants_it_time() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, mut machine) = leased(&folder, "ends", "stop");
    cluster.kill_agent(1).unwrap();
    cluster.kill_agent(0).unwrap();
    let status = machine.wait().unwrap();
    assert_eq!(status.code(), Some(3), "as one that was fenced");
    let said = std::fs::read_to_string(folder.path().join("ends.log")).unwrap();
    assert!(said.contains("its lease ran out"), "{said}");
    // It goes on at one of the holders, once they are back.
    cluster.restart_agent(0).unwrap();
    cluster.restart_agent(1).unwrap();
    let (at, status) = wait_for("it to be taken over", || {
        let there = |at: usize| {
            let status = cluster
                .status("ends", &cluster.agents[at].data.join("run"))
                .ok()?;
            (status["state"] == "running").then_some((at, status))
        };
        Ok([0, 1].into_iter().find_map(there))
    })
    .unwrap();
    assert_eq!(
        status["protection"]["on_lapse"], "stop",
        "under the same terms: {status}"
    );
    let pid = u32::try_from(status["pid"].as_u64().unwrap()).unwrap();
    let other = cluster.adopt("ends", at, pid);
    wait_for("the guest to go on", || Ok((heartbeat(&other) > 0).then_some(()))).unwrap();
    cluster.own(other);
}
