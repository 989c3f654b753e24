//! What a user can get wrong: each is one clear message that says what, on what, why and what to do; the exit status
//! is not 0, and nothing is lost.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::process::{Command, Output};

use understudy_tests::harness::{Cluster, run_json, wait_for};

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// It failed with one message that has all of `words`, and no panic.
#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let text = said(output);
    assert!(!output.status.success(), "it was taken; it said: {text}");
    assert!(!text.contains("panicked"), "{text}");
    for word in words {
        assert!(text.contains(word), "the message lacks {word:?}: {text}");
    }
    assert_eq!(text.matches("error:").count(), 1, "not one message: {text}");
}

fn run(cluster: &Cluster, name: &str, kernel: &str, more: &[&str]) -> Output {
    cluster
        .vmm("run", &cluster.run_dir())
        .args(["--name", name, "--kernel", kernel])
        .args([
            "--store",
            cluster.run_dir().join("store").join(name).to_str().unwrap(),
        ])
        .args(more)
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn kernels_memory_names_and_ports() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    let none = folder.path().join("no-kernel");
    std::fs::write(&none, "hello").unwrap();
    let none = none.to_str().unwrap().to_owned();
    let ticker = cluster.guest("ticker").display().to_string();

    refused(
        &run(&cluster, "a", &none, &[]),
        &["no-kernel", "not a kernel", "PVH"],
    );
    refused(&run(&cluster, "a", "/does/not/exist", &[]), &["/does/not/exist"]);
    refused(&run(&cluster, "a", &ticker, &["--memory", "1M"]), &["memory"]);
    refused(&run(&cluster, "a", &ticker, &["--cpus", "200"]), &["200", "vCPU"]);
    refused(&run(&cluster, "../a", &ticker, &[]), &["../a"]);
    refused(
        &run(&cluster, "a", &ticker, &["--protect-to", "127.0.0.1:1"]),
        &["127.0.0.1:1", "standby serve"],
    );

    let first = cluster
        .launch("taken", "ticker", "period_ms=20", &["--memory", "32M"])
        .unwrap();
    refused(&run(&cluster, "taken", &ticker, &["--memory", "32M"]), &["taken"]);
    let said = run_json(cluster.vmm("ps", &cluster.run_dir()).arg("--json"))
        .unwrap()
        .to_string();
    assert!(
        said.contains("running"),
        "the first VM of that name is gone: {said}"
    );
    drop(first);

    let agent = cluster.start_agent("alder", &[]).unwrap();
    let address = cluster.agents[agent].address.clone();
    let second = Command::new(&cluster.binaries.standby)
        .args([
            "serve",
            "--insecure-plaintext",
            "--name",
            "birch",
            "--listen",
            &address,
            "--data",
        ])
        .arg(folder.path().join("birch"))
        .output()
        .unwrap();
    refused(&second, &[&address]);
    let same_data = Command::new(&cluster.binaries.standby)
        .args([
            "serve",
            "--insecure-plaintext",
            "--name",
            "alder",
            "--listen",
            "127.0.0.1:0",
            "--data",
        ])
        .arg(&cluster.agents[agent].data)
        .output()
        .unwrap();
    refused(&same_data, &[cluster.agents[agent].data.to_str().unwrap()]);
    let nobody = Command::new(&cluster.binaries.standby)
        .args(["ls", "--insecure-plaintext", "--agent", "127.0.0.1:1"])
        .output()
        .unwrap();
    refused(&nobody, &["127.0.0.1:1", "standby serve"]);
    let ghost = cluster
        .standby(agent)
        .args(["promote", "ghost"])
        .output()
        .unwrap();
    refused(&ghost, &["ghost"]);
}

#[test]
fn a_protected_name_is_taken_in_the_whole_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    cluster.start_agent("alder", &[]).unwrap();
    let holder = cluster.agents[0].address.clone();
    let protect = ["--memory", "32M", "--protect-to", &holder, "--every", "50ms"];
    let first = cluster.launch("web", "ticker", "period_ms=20", &protect).unwrap();
    let elsewhere = folder.path().join("other-host");
    let second = cluster
        .vmm("run", &elsewhere)
        .args(["--name", "web", "--kernel"])
        .arg(cluster.guest("ticker"))
        .arg("--store")
        .arg(elsewhere.join("store"))
        .args(protect)
        .output()
        .unwrap();
    refused(&second, &["web", "standby promote"]);
    assert_eq!(cluster.status("web", &first.run_dir).unwrap()["state"], "running");
}

#[test]
fn a_full_store_refuses_the_new_and_keeps_the_old() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    let budget = ["--memory", "64M", "--store-budget", "24MiB"];
    let machine = cluster
        .launch(
            "full",
            "churn",
            "mib=16 rate=500 mix=0:0:100 heartbeat_ms=50",
            &budget,
        )
        .unwrap();
    wait_for("the guest to fill its memory", || {
        Ok(machine.console()?.contains("churn filled").then_some(()))
    })
    .unwrap();
    let checkpoint = || {
        cluster
            .vmm("checkpoint", &machine.run_dir)
            .args(["full", "--full"])
            .output()
            .unwrap()
    };
    assert!(checkpoint().status.success());
    refused(&checkpoint(), &["full"]);
    let status = cluster.status("full", &machine.run_dir).unwrap();
    assert_eq!(status["state"], "running");
    assert!(
        status["problem"].as_str().unwrap_or_default().contains("full"),
        "{status}"
    );
    let mut from = cluster.vmm("restore", &folder.path().join("copy"));
    from.args(["--name", "copy", "--paused", "--ready-stdout", "--from"])
        .arg(folder.path().join("vms/full"));
    from.arg("--store")
        .arg(folder.path().join("copy-store"))
        .arg("full");
    let mut copy = from.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(copy.stdout.take().unwrap()),
        &mut line,
    )
    .unwrap();
    copy.kill().unwrap();
    copy.wait().unwrap();
    assert!(
        !line.contains("failed"),
        "the earlier checkpoint does not restore: {line}"
    );
}

#[test]
fn damaged_newer_and_broken_segments() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    let machine = cluster
        .launch("seg", "ticker", "period_ms=5", &["--memory", "32M"])
        .unwrap();
    let checkpoint = || {
        run_json(
            cluster
                .vmm("checkpoint", &machine.run_dir)
                .args(["seg", "--json"]),
        )
        .unwrap()
    };
    checkpoint();
    wait_for("a tick", || {
        Ok(machine.console()?.contains("tick 3").then_some(()))
    })
    .unwrap();
    checkpoint();
    let store = folder.path().join("vms/seg/segments/seg/1");
    let (full, delta) = (store.join("1.seg"), store.join("2.seg"));
    let restore = |files: &[&std::path::Path]| {
        let mut command = cluster.vmm("restore", &folder.path().join("r"));
        command
            .args(["--name", "copy"])
            .arg("--store")
            .arg(folder.path().join("r-store"))
            .args(files);
        command.stdin(std::process::Stdio::null()).output().unwrap()
    };
    refused(&restore(&[&delta]), &["seg/1/1"]);
    let bytes = std::fs::read(&full).unwrap();
    let broken = folder.path().join("broken.seg");
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(&broken, &flipped).unwrap();
    refused(
        &restore(&[&broken]),
        &["broken.seg", "is damaged", "another holder"],
    );
    // In the pages, which are read last and lie behind header, manifest and records: nothing runs all the same.
    let length = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let mut flipped = bytes.clone();
    flipped[128 + length(32) + length(36) + 20] ^= 1;
    std::fs::write(&broken, &flipped).unwrap();
    refused(&restore(&[&broken]), &["is damaged", "another holder"]);
    std::fs::write(&broken, &bytes[..bytes.len() / 2]).unwrap();
    refused(
        &restore(&[&broken]),
        &["broken.seg", "cut short", "copy the segment again"],
    );
    // A newer major version, whatever its digests are.
    let mut newer = bytes;
    newer[8] = 2;
    std::fs::write(&broken, &newer).unwrap();
    refused(
        &restore(&[&broken]),
        &["broken.seg", "2.0 is newer", "or a later one"],
    );
    std::fs::write(&broken, "not a segment").unwrap();
    refused(&restore(&[&broken]), &["broken.seg", "cut short"]);
    std::fs::write(&broken, b"not a segment".repeat(20)).unwrap();
    refused(&restore(&[&broken]), &["broken.seg", "not a segment file"]);
    let inspect = cluster
        .vmm("inspect", &machine.run_dir)
        .arg(&broken)
        .output()
        .unwrap();
    refused(&inspect, &["broken.seg"]);
    // The VM whose files these are has not noticed.
    assert_eq!(
        cluster.status("seg", &machine.run_dir).unwrap()["state"],
        "running"
    );
}
