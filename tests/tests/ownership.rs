//! Who may run a VM, and from which state: the ways in which one could go back in time or run twice.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use understudy_tests::harness::{Cluster, Machine, counter, run_json, wait_for};

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn epoch(value: &Value) -> u64 {
    value
        .as_str()
        .and_then(|name| name.rsplit('/').next())
        .and_then(|e| e.parse().ok())
        .unwrap_or(0)
}

fn committed(cluster: &Cluster, machine: &Machine, at_least: u64) {
    wait_for(
        format!("epoch {at_least} of {} to be committed", machine.name),
        || {
            let status = cluster.status(&machine.name, &machine.run_dir)?;
            Ok((epoch(&status["committed"]) >= at_least).then_some(()))
        },
    )
    .unwrap();
}

fn pair(folder: &tempfile::TempDir) -> (Cluster, String) {
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    cluster.start_agent("alder", &[]).unwrap();
    cluster.start_agent("birch", &[]).unwrap();
    let holders = format!("{},{}", cluster.agents[0].address, cluster.agents[1].address);
    (cluster, holders)
}

/// A request to a VM's control socket; its status and body.
fn request(socket: &std::path::Path, verb: &str, path: &str, body: &str) -> (u16, String) {
    use std::io::{Read, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    write!(
        stream,
        "{verb} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let status = text.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    (
        status,
        text.split("\r\n\r\n").nth(1).unwrap_or_default().to_owned(),
    )
}

#[test]
fn a_restore_does_not_go_back_behind_the_cluster_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, holders) = pair(&folder);
    let protect = [
        "--memory",
        "32M",
        "--every",
        "50ms",
        "--ack-quorum",
        "1",
        "--protect-to",
        &holders,
    ];
    let mut machine = cluster.launch("web", "ticker", "period_ms=5", &protect).unwrap();
    committed(&cluster, &machine, 3);
    cluster.kill_agent(1).unwrap();
    let now = epoch(&cluster.status("web", &machine.run_dir).unwrap()["committed"]);
    committed(&cluster, &machine, now + 5);
    assert!(
        cluster
            .vmm("stop", &machine.run_dir)
            .arg("web")
            .status()
            .unwrap()
            .success()
    );
    machine.wait().unwrap();
    cluster.restart_agent(1).unwrap();
    // Birch's store ends earlier than what alder has.
    let stale = cluster.agents[1].data.join("store");
    let restore = |more: &[&str]| {
        let mut command = cluster.vmm("restore", &folder.path().join("r"));
        command
            .arg("web")
            .arg("--from")
            .arg(&stale)
            .args(["--protect-to", &holders, "--ack-quorum", "1"]);
        command
            .arg("--store")
            .arg(folder.path().join("r-store"))
            .args(more);
        command.stdin(std::process::Stdio::null()).output().unwrap()
    };
    let refused = restore(&[]);
    assert!(
        !refused.status.success(),
        "a stale state was resurrected: {}",
        said(&refused)
    );
    assert!(
        said(&refused).contains("standby promote web"),
        "{}",
        said(&refused)
    );
}

#[test]
fn protection_can_be_turned_off_and_on_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, holders) = pair(&folder);
    let protect = ["--memory", "32M", "--every", "50ms", "--protect-to", &holders];
    let mut machine = cluster
        .launch("off", "churn", "mib=8 rate=500 heartbeat_ms=50", &protect)
        .unwrap();
    committed(&cluster, &machine, 5);
    let socket = machine.run_dir.join("off/api.sock");
    let (_, on) = request(&socket, "GET", "/protection", "");
    let (status, body) = request(&socket, "DELETE", "/protection", "");
    assert!(
        (200..300).contains(&status),
        "DELETE /protection: {status} {body}"
    );

    // It runs here still, so nobody else may: neither a new owner by claim...
    let rival = cluster
        .vmm("run", &folder.path().join("rival"))
        .args([
            "--name",
            "off",
            "--memory",
            "32M",
            "--protect-to",
            &holders,
            "--kernel",
        ])
        .arg(cluster.guest("ticker"))
        .arg("--store")
        .arg(folder.path().join("rival-store"))
        .output()
        .unwrap();
    assert!(!rival.status.success(), "a rival was let in: {}", said(&rival));

    // ...and its checkpoints stand by themselves.
    let taken = run_json(
        cluster
            .vmm("checkpoint", &machine.run_dir)
            .args(["off", "--json"]),
    )
    .unwrap();
    assert_eq!(taken["kind"], "full", "{taken}");

    let fields: Value = serde_json::from_str(&on).unwrap_or_default();
    let again = format!(
        "{{\"holders\":[{}],\"every_ms\":50}}",
        holders
            .split(',')
            .map(|h| format!("{h:?}"))
            .collect::<Vec<_>>()
            .join(",")
    );
    let (status, body) = request(&socket, "PUT", "/protection", &again);
    assert!(
        (200..300).contains(&status),
        "PUT /protection: {status} {body} (was {fields})"
    );
    let newest = epoch(&taken["name"]);
    committed(&cluster, &machine, newest + 2);
    machine.kill().unwrap();
    let report = run_json(cluster.standby(1).args(["promote", "off", "--json"])).unwrap();
    let successor = cluster.adopt("off", 1, report["pid"].as_u64().unwrap() as u32);
    wait_for("the guest to go on", || {
        Ok(counter(&successor.console()?, "writes"))
    })
    .unwrap();
    cluster.own(successor);
}

#[test]
fn one_generation_is_taken_up_once() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, holders) = pair(&folder);
    let protect = ["--memory", "32M", "--every", "50ms", "--protect-to", &holders];
    let mut machine = cluster.launch("one", "ticker", "period_ms=5", &protect).unwrap();
    committed(&cluster, &machine, 3);
    machine.kill().unwrap();
    let report = run_json(cluster.standby(1).args(["promote", "one", "--json"])).unwrap();
    let from = report["resumed_from"]["name"]
        .as_str()
        .or(report["resumed_from"].as_str())
        .unwrap()
        .to_owned();
    let successor = cluster.adopt("one", 1, report["pid"].as_u64().unwrap() as u32);
    // The agent's own command once more, as if it had been repeated.
    let twin = Command::new(&cluster.binaries.vmm)
        .args([
            "restore",
            "--name",
            "one",
            "--segment",
            &from,
            "--generation",
            "2",
            "--protect-to",
            &holders,
        ])
        .arg("--from")
        .arg(cluster.agents[1].data.join("store"))
        .arg("--store")
        .arg(folder.path().join("twin-store"))
        .arg("--run-dir")
        .arg(folder.path().join("twin"))
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(
        !twin.status.success(),
        "two processes took up generation 2: {}",
        said(&twin)
    );
    cluster.own(successor);
}

#[test]
fn work_between_two_pauses_is_not_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, holders) = pair(&folder);
    let protect = ["--memory", "32M", "--every", "1500ms", "--protect-to", &holders];
    let machine = cluster.launch("naps", "ticker", "period_ms=5", &protect).unwrap();
    committed(&cluster, &machine, 1);
    let vmm = |verb: &str| {
        assert!(
            cluster
                .vmm(verb, &machine.run_dir)
                .arg("naps")
                .status()
                .unwrap()
                .success()
        )
    };
    vmm("pause");
    // The state it was paused in is taken once...
    committed(&cluster, &machine, 2);
    let ticks = machine.console().unwrap().len();
    // ...and what it does in a short spell between two looks as well.
    vmm("resume");
    wait_for("some ticks", || {
        Ok((machine.console()?.len() > ticks + 50).then_some(()))
    })
    .unwrap();
    vmm("pause");
    let before = epoch(&cluster.status("naps", &machine.run_dir).unwrap()["newest"]["name"]);
    committed(&cluster, &machine, before.max(2) + 1);
}
