//! Encryption at rest with real processes: no store has what the guest has, and only who has the key goes on from there.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use rustix::process::Signal;
use understudy_tests::harness::{
    Cluster, Machine, counter, epoch, first_counter, run, run_json, signal, wait_for,
};

const CHURN: &str = "mib=16 rate=2000 heartbeat_ms=50 verify=4";
/// What is looked for in files: a part of a disk that does not compress, so that it is stored as it is.
const MARK_BYTES: usize = 64;

/// 256 KiB that do not compress.
fn noise() -> Vec<u8> {
    let blocks = (0..(256 << 10) / 32_u32).map(|n| *blake3::hash(&n.to_le_bytes()).as_bytes());
    blocks.flatten().collect()
}

/// How many files there are below a folder, and how many of them hold `mark`.
fn with_mark(folder: &Path, mark: &[u8]) -> (usize, usize) {
    let (mut files, mut marked) = (0, 0);
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(bytes) = fs::read(&path) {
                // It may be gone again.
                files += 1;
                marked += usize::from(bytes.windows(mark.len()).any(|window| window == mark));
            }
        }
    }
    (files, marked)
}

fn key_file(cluster: &Cluster, command: &str, path: &Path) -> String {
    let mut standby = Command::new(&cluster.binaries.standby);
    run(standby.args(["key", command]).arg(path)).unwrap();
    // The first is the one to write with.
    let list = run(Command::new(&cluster.binaries.standby)
        .args(["key", "list"])
        .arg(path))
    .unwrap();
    list.split(' ').next().unwrap().to_owned()
}

fn refused(output: &Output, parts: &[&str]) {
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part}: {said}");
    }
}

/// The newest checkpoint that an agent has of `web`.
fn newest(cluster: &Cluster, agent: usize) -> String {
    let listed = run_json(cluster.standby(agent).args(["ls", "web", "--json"])).unwrap();
    let complete = |point: &&serde_json::Value| point["complete"] == true;
    let newest = listed.as_array().unwrap().iter().rfind(complete).unwrap().clone();
    newest["name"].as_str().unwrap().to_owned()
}

fn fold(cluster: &Cluster, agent: usize, tip: &str) -> Output {
    let epoch = tip.strip_prefix("web/").unwrap();
    cluster
        .standby(agent)
        .args(["fold", "web", epoch])
        .output()
        .unwrap()
}

/// The guest works on, and has found no damage.
fn goes_on(machine: &Machine) {
    wait_for("the guest to go on", || {
        let console = machine.console()?;
        assert!(!console.contains("BAD"), "the guest found damage:\n{console}");
        let (first, last) = (first_counter(&console, "writes"), counter(&console, "writes"));
        Ok(first
            .zip(last)
            .filter(|(first, last)| *last >= first + 200)
            .map(drop))
    })
    .unwrap();
}

#[test]
fn only_who_has_the_key_reads_what_holders_store() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    let keys = folder.path().join("keys");
    let first = key_file(&cluster, "new", &keys);
    let at_birch = keys.display().to_string();
    // The first keeps the registry; birch has the keys, cedar has not.
    cluster.start_agent("alder", &[]).unwrap();
    cluster.start_agent("birch", &["--key-file", &at_birch]).unwrap();
    cluster.start_agent("cedar", &[]).unwrap();
    let holders = format!("{},{}", cluster.agents[1].address, cluster.agents[2].address);
    let content = noise();
    let mark = &content[4096..4096 + MARK_BYTES];
    let disk = |name: &str| {
        let path = folder.path().join(format!("{name}.img"));
        fs::write(&path, &content).unwrap();
        format!("data={}", path.display())
    };

    // One that is not encrypted is found by what is looked for.
    let data = disk("plain");
    let alder = cluster.agents[0].address.clone();
    let common = ["--memory", "48M", "--every", "50ms", "--disk"];
    let arguments = [&common[..], &[&data, "--protect-to", &alder]].concat();
    let plain = cluster.launch("plain", "churn", CHURN, &arguments).unwrap();
    cluster.committed(&plain, 1).unwrap();
    for store in [
        folder.path().join("vms/plain"),
        cluster.agents[0].data.join("store"),
    ] {
        let (_, marked) = with_mark(&store, mark);
        assert!(marked > 0, "{} does not have the disk's content", store.display());
    }
    drop(plain);

    let data = disk("web");
    let quorum = [
        "--protect-to",
        &holders,
        "--ack-quorum",
        "2",
        "--key-file",
        &at_birch,
    ];
    let arguments = [&common[..], &[&data], &quorum].concat();
    let mut machine = cluster.launch("web", "churn", CHURN, &arguments).unwrap();
    cluster.committed(&machine, 5).unwrap();
    goes_on(&machine);
    for store in [
        folder.path().join("vms/web"),
        cluster.agents[1].data.join("store"),
        cluster.agents[2].data.join("store"),
    ] {
        let (files, marked) = with_mark(&store, mark);
        assert!(files > 3, "{}", store.display());
        assert_eq!(marked, 0, "{} has content of the guest's disk", store.display());
    }

    // Without the key it is stored, checked and shown, and that is all.
    let tip = newest(&cluster, 2);
    let shown = run(cluster.standby(2).args(["show", &tip])).unwrap();
    assert!(shown.contains(&format!("with key {first}")), "{shown}");
    let verified = run(cluster.standby(2).args(["verify", "web"])).unwrap();
    assert!(verified.contains(": 0 bad"), "{verified}");
    let says = ["encrypted with", &first, "--key-file"];
    refused(&fold(&cluster, 2, &tip), &says);
    refused(
        &cluster.standby(2).args(["promote", "web"]).output().unwrap(),
        &says,
    );
    refused(
        &cluster.standby(2).args(["promote", "web"]).output().unwrap(),
        &["Nothing was changed"],
    );
    let status = cluster.status("web", &machine.run_dir).unwrap();
    assert_eq!(
        (&status["generation"], &status["state"]),
        (&1.into(), &"running".into()),
        "{status}"
    );

    let copy = |command: &str, keys: &[&str]| {
        let mut vmm = cluster.vmm(command, &folder.path().join("copy-run"));
        let store = cluster.agents[2].data.join("store");
        match command {
            "inspect" => vmm.arg(&tip).arg("--store").arg(store),
            _ => vmm.args(["--check", &tip, "--name", "copy", "--from"]).arg(store),
        };
        vmm.args(keys);
        vmm
    };
    let with = ["--key-file", &at_birch];
    refused(
        &copy("restore", &[]).output().unwrap(),
        &["missing: key: ", &first, "--key-file"],
    );
    let checked = run(&mut copy("restore", &with)).unwrap();
    assert!(checked.contains(&format!("this host can run {tip}")), "{checked}");
    let without = run(&mut copy("inspect", &[])).unwrap();
    assert!(without.contains(&format!("with key {first}")), "{without}");
    assert!(!without.contains("vcpu/0"), "{without}");
    let inspected = run(&mut copy("inspect", &with)).unwrap();
    assert!(inspected.contains("vcpu/0"), "{inspected}");

    // The key is rotated, and the owner's host dies. Who takes over reads with the old key and writes with the new.
    let second = key_file(&cluster, "rotate", &keys);
    assert_ne!(first, second);
    machine.kill().unwrap();
    let report = run_json(cluster.standby(1).args(["promote", "web", "--json"])).unwrap();
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    let machine = cluster.adopt("web", 1, pid);
    goes_on(&machine);
    wait_for("a commit of the new owner", || {
        let status = cluster.status("web", &machine.run_dir)?;
        let committed = status["committed"].as_str().unwrap_or_default().to_owned();
        Ok((committed.starts_with("web/2/") && epoch(&status["committed"]) > 0).then_some(()))
    })
    .unwrap();
    let tip = newest(&cluster, 2);
    let shown = run(cluster.standby(2).args(["show", &tip])).unwrap();
    assert!(
        tip.starts_with("web/2/") && shown.contains(&format!("with key {second}")),
        "{shown}"
    );

    // The agent reads the file again when it is told to; what it folds then is encrypted too.
    refused(&fold(&cluster, 1, &tip), &["encrypted with", &second]);
    let pid = cluster.agent_pids()[1].parse().unwrap();
    signal(pid, Signal::HUP).unwrap();
    wait_for("a fold", || {
        Ok(fold(&cluster, 1, &tip).status.success().then_some(()))
    })
    .unwrap();
    let shown = run(cluster.standby(1).args(["show", &tip])).unwrap();
    assert!(
        shown.contains("full") && shown.contains(&format!("with key {second}")),
        "{shown}"
    );
    let (files, marked) = with_mark(&cluster.agents[1].data.join("store"), mark);
    assert!(
        files > 3 && marked == 0,
        "{marked} files have content of the guest's disk"
    );
    cluster.own(machine);
}
