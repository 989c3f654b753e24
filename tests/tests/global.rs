//! A VM that outlives every node that held it: from an S3-compatible server.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::path::Path;

use understudy_tests::demo::{self, Options};
use understudy_tests::harness::{Cluster, counter, epoch, run, run_json, wait_for};
use understudy_tests::s3::{Keys, S3};

const GUEST: &str = "mib=16 rate=2000 heartbeat_ms=50 verify=4";

/// The newest restore point there, as an agent lists it.
fn newest(cluster: &Cluster, agent: usize) -> u64 {
    let listed = run_json(cluster.standby(agent).args(["ls", "web", "--global", "--json"])).unwrap();
    let last = listed.as_array().unwrap().last().cloned();
    last.map_or(0, |point| epoch(&point["name"]))
}

#[test]
fn a_vm_goes_on_and_is_copied_from_a_bucket_when_no_holder_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3::start();
    server.make_bucket("pool");
    let keys = folder.path().join("keys");
    Keys::any().write(&keys);
    let (keys, endpoint) = (keys.display().to_string(), server.endpoint());
    let reach = ["--global-endpoint", &endpoint, "--global-credentials", &keys];
    let mut global = vec!["--global", "s3://pool/cluster", "--global-every", "300ms"];
    global.extend(reach);

    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    // The first keeps the registry, and holds nothing.
    for name in ["alder", "birch", "cedar"] {
        cluster.start_agent(name, &global).unwrap();
    }
    let at: Vec<_> = cluster.agents.iter().map(|agent| agent.address.clone()).collect();
    let (holders, registry) = (at[1..].join(","), at[0].clone());
    let arguments = [
        "--memory",
        "48M",
        "--every",
        "50ms",
        "--protect-to",
        &holders,
        "--registry",
        &registry,
        "--ack-quorum",
        "2",
    ];
    let mut machine = cluster.launch("web", "churn", GUEST, &arguments).unwrap();
    let first = cluster.committed(&machine, 5).unwrap();
    let up = wait_for("an upload", || {
        Ok(Some(newest(&cluster, 1)).filter(|up| *up >= first))
    })
    .unwrap();
    assert!(
        run(cluster.standby(1).args(["status"]))
            .unwrap()
            .contains("s3://pool/cluster")
    );
    assert!(
        run(cluster.standby(1).args(["ls", "web"]))
            .unwrap()
            .contains("s3://pool/cluster")
    );

    // A copy, on a host that held nothing, read where it is; while the VM runs.
    let run_dir = folder.path().join("copy-run");
    let copy = |cluster: &Cluster, what: &str| {
        let mut vmm = cluster.vmm("restore", &run_dir);
        vmm.args([what, "--from", "s3://pool/cluster", "--name", "copy"])
            .args(reach)
            .arg("--store")
            .arg(folder.path().join("copy"));
        vmm
    };
    let checked = run(copy(&cluster, "web").arg("--check")).unwrap();
    assert!(checked.contains("this host can run web/"), "{checked}");
    // Under its own name it could be a second one.
    let refused = cluster
        .vmm("restore", &run_dir)
        .args(["web", "--from", "s3://pool/cluster"])
        .args(reach)
        .arg("--store")
        .arg(folder.path().join("second"))
        .output()
        .unwrap();
    assert!(!refused.status.success());
    let console = folder.path().join("copy.console");
    let at = format!("web@{up}");
    run(copy(&cluster, &at)
        .arg("--detach")
        .arg("--console-log")
        .arg(&console))
    .unwrap();
    goes_on(&console, None);
    run(cluster.vmm("stop", &run_dir).arg("copy")).unwrap();

    // The owner's host and both holders are gone, with all they had.
    machine.kill().unwrap();
    let last_words = machine.console().unwrap();
    // What is committed is there: nothing would be lost.
    let committed = || {
        let explained = run_json(cluster.standby(0).args(["explain", "web", "--json"])).unwrap();
        epoch(&explained["vm"]["newest"]["name"])
    };
    wait_for("the last upload", || {
        Ok((newest(&cluster, 0) >= committed()).then_some(()))
    })
    .unwrap();
    let verified = run(cluster.standby(0).args(["verify", "web", "--global"])).unwrap();
    assert!(verified.contains(": 0 bad"), "{verified}");
    for holder in [1, 2] {
        cluster.kill_agent(holder).unwrap();
        std::fs::remove_dir_all(&cluster.agents[holder].data).unwrap();
    }
    let refused = cluster.standby(0).args(["promote", "web"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("--force"), "{said}");
    let report = run_json(cluster.standby(0).args(["promote", "web", "--force", "--json"])).unwrap();
    assert!(epoch(&report["resumed_from"]) >= up, "{report}");
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    let machine = cluster.adopt("web", 0, pid);
    goes_on(
        &machine.console,
        counter(&last_words, "writes").map(|last| last / 2),
    );
    cluster.own(machine);
}

#[test]
fn the_demo_of_a_cluster_goes_as_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("figures/demo.json");
    let options = Options {
        cluster: true,
        slow: true,
        ..Options::short(folder.path().join("demo"), json.clone())
    };
    let figures = demo::tell(&options).unwrap();
    assert_eq!(figures.bad_pages, 0);
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert!(written["cluster"]["points"].as_u64().unwrap() > 0, "{written}");
    assert!(["alder", "birch"].contains(&written["cluster"]["node"].as_str().unwrap()));
}

/// The guest is heard to write, and finds nothing wrong with what it wrote before.
fn goes_on(console: &Path, beyond: Option<u64>) {
    let text = || std::fs::read_to_string(console).unwrap_or_default();
    let first = wait_for("the guest to be heard", || Ok(counter(&text(), "writes"))).unwrap();
    wait_for("the guest to go on", || {
        let now = text();
        assert!(!now.contains("BAD"), "the guest found damage:\n{now}");
        Ok(counter(&now, "writes").filter(|writes| *writes > first.max(beyond.unwrap_or(0))))
    })
    .unwrap();
}
