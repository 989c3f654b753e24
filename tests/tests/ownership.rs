//! Who may run a VM, and from which state: the ways in which one could go back in time or run twice.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use understudy_tests::harness::{Cluster, counter, epoch, run_json, wait_for};

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
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
    cluster.committed(&machine, 3).unwrap();
    cluster.kill_agent(1).unwrap();
    let now = epoch(&cluster.status("web", &machine.run_dir).unwrap()["committed"]);
    cluster.committed(&machine, now + 5).unwrap();
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
    cluster.committed(&machine, 5).unwrap();
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
    cluster.committed(&machine, newest + 2).unwrap();
    machine.kill().unwrap();
    let report = run_json(cluster.standby(1).args(["promote", "off", "--json"])).unwrap();
    let successor = cluster.adopt("off", 1, report["pid"].as_u64().unwrap() as u32);
    wait_for("the guest to go on", || {
        Ok(counter(&successor.console()?, "writes"))
    })
    .unwrap();
    cluster.own(successor);
}

/// By force a VM is forgotten while it runs. It says that nothing protects it any more, and what is to be done.
#[test]
fn a_vm_that_is_forgotten_while_it_runs_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, holders) = pair(&folder);
    let protect = ["--memory", "32M", "--every", "50ms", "--protect-to", &holders];
    let machine = cluster.launch("lost", "ticker", "period_ms=5", &protect).unwrap();
    cluster.committed(&machine, 3).unwrap();
    let forget = |more: &[&str]| {
        cluster
            .standby(0)
            .args(["forget", "lost"])
            .args(more)
            .output()
            .unwrap()
    };
    let unforced = forget(&[]);
    assert!(
        !unforced.status.success() && said(&unforced).contains("vmm stop lost"),
        "{}",
        said(&unforced)
    );
    let forced = forget(&["--force"]);
    assert!(forced.status.success(), "{}", said(&forced));
    let status = wait_for("the owner to say that it is not protected", || {
        let status = cluster.status("lost", &machine.run_dir)?;
        Ok(status["protection"].is_null().then_some(status))
    })
    .unwrap();
    assert_eq!(status["state"], "running", "{status}");
    assert!(
        status["problem"]
            .as_str()
            .is_some_and(|why| why.contains("does not know VM lost any more")),
        "{status}"
    );
    let listed = cluster.vmm("ps", &machine.run_dir).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(
        listed.contains("not protected") && listed.contains("To protect it again"),
        "{listed}"
    );

    // As it says. Whoever holds something of the generation that was forgotten is not to take it for this one's.
    let vmm = |args: &[&str]| {
        let output = cluster
            .vmm(args[0], &machine.run_dir)
            .args(&args[1..])
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {}", said(&output));
    };
    vmm(&["checkpoint", "lost", "--full"]);
    vmm(&["stop", "lost"]);
    vmm(&[
        "restore",
        "lost",
        "--store",
        status["store"].as_str().unwrap(),
        "--detach",
        "--every",
        "50ms",
        "--protect-to",
        &holders,
    ]);
    let status = cluster.status("lost", &machine.run_dir).unwrap();
    assert!(
        status["problem"].is_null() && status["generation"].as_u64() > Some(1),
        "{status}"
    );
    cluster.committed(&machine, 1).unwrap();
    vmm(&["stop", "lost"]);
}

#[test]
fn one_generation_is_taken_up_once() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, holders) = pair(&folder);
    let protect = ["--memory", "32M", "--every", "50ms", "--protect-to", &holders];
    let mut machine = cluster.launch("one", "ticker", "period_ms=5", &protect).unwrap();
    cluster.committed(&machine, 3).unwrap();
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
    cluster.committed(&machine, 1).unwrap();
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
    cluster.committed(&machine, 2).unwrap();
    let ticks = machine.console().unwrap().len();
    // ...and what it does in a short spell between two looks as well.
    vmm("resume");
    wait_for("some ticks", || {
        Ok((machine.console()?.len() > ticks + 50).then_some(()))
    })
    .unwrap();
    vmm("pause");
    let before = epoch(&cluster.status("naps", &machine.run_dir).unwrap()["newest"]["name"]);
    cluster.committed(&machine, before.max(2) + 1).unwrap();
}

#[test]
fn a_second_copy_is_not_started_by_accident() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, holders) = pair(&folder);
    let protect = ["--memory", "32M", "--every", "50ms", "--protect-to", &holders];
    let machine = cluster.launch("web", "ticker", "period_ms=5", &protect).unwrap();
    cluster.committed(&machine, 3).unwrap();
    let restore = |cluster: &Cluster, run: &str, more: &[&str]| {
        let mut command = cluster.vmm("restore", &folder.path().join(run));
        command.args(more).arg("--detach");
        command.stdin(std::process::Stdio::null()).output().unwrap()
    };
    let text = |path: std::path::PathBuf| path.display().to_string();
    let agent = text(cluster.agents[1].data.join("store"));
    let (r1, r2) = (text(folder.path().join("s1")), text(folder.path().join("s2")));

    // It runs: neither from a holder's store, nor from its own, nor from the bare files.
    let files: Vec<String> = std::fs::read_dir(format!("{agent}/segments/web/1"))
        .unwrap()
        .map(|entry| text(entry.unwrap().path()))
        .filter(|path| path.ends_with("/1.seg"))
        .collect();
    assert_eq!(files.len(), 1);
    for source in [
        vec!["web", "--from", &agent, "--store", &r1],
        vec!["--store", &r1, &files[0]],
    ] {
        let refused = restore(&cluster, "r1", &source);
        assert!(!refused.status.success(), "{source:?} ran a second copy");
        for part in [
            "in the care of a cluster",
            "standby promote web",
            "--name OTHER",
            "--allow-second-copy",
        ] {
            assert!(
                said(&refused).contains(part),
                "{source:?}: {} lacks {part:?}",
                said(&refused)
            );
        }
    }
    // Nor from files that no longer tell where they come from, nor by a word that is the agents' alone.
    let plain = text(folder.path().join("plain.seg"));
    std::fs::copy(&files[0], &plain).unwrap();
    for source in [
        vec!["--store", &r1, &plain],
        vec!["--store", &r1, "--name", "web", &plain],
        vec!["--store", &r1, "--generation", "9", &plain],
    ] {
        let refused = restore(&cluster, "r1", &source);
        assert!(!refused.status.success(), "{source:?} ran a second copy");
        for part in ["may run already", "--name OTHER", "--allow-second-copy"] {
            let said = said(&refused);
            assert!(said.contains(part), "{source:?}: {said} lacks {part:?}");
        }
    }
    // A pace that is none is refused while it runs as it is at its start.
    let socket = machine.run_dir.join("web/api.sock");
    for body in [
        r#"{"holders":[],"every_ms":0}"#,
        r#"{"holders":[],"every_ms":100}"#,
    ] {
        let (status, answer) = request(&socket, "PUT", "/protection", body);
        assert_eq!(status, 400, "{body}: {answer}");
    }
    // A copy beside it, and one that was asked for by its flag, are fine.
    let copy = restore(
        &cluster,
        "r1",
        &["web", "--from", &agent, "--name", "copy", "--store", &r1],
    );
    assert!(copy.status.success(), "{}", said(&copy));
    let checkpoint = cluster
        .vmm("checkpoint", &folder.path().join("r1"))
        .arg("copy")
        .output();
    assert!(checkpoint.unwrap().status.success());
    let stop = cluster
        .vmm("stop", &folder.path().join("r1"))
        .arg("copy")
        .output();
    assert!(stop.unwrap().status.success());
    let certain = restore(
        &cluster,
        "r2",
        &["web", "--from", &agent, "--allow-second-copy", "--store", &r2],
    );
    assert!(certain.status.success(), "{}", said(&certain));
    let stop = cluster.vmm("stop", &folder.path().join("r2")).arg("web").output();
    assert!(stop.unwrap().status.success());

    // Another VM's store is not taken for one's own.
    let mixed = cluster
        .vmm("run", &folder.path().join("r3"))
        .args(["--name", "db", "--memory", "32M", "--store", &r1, "--kernel"])
        .arg(cluster.guest("ticker"))
        .arg("--detach")
        .output()
        .unwrap();
    assert!(
        !mixed.status.success() && said(&mixed).contains("is that of VM copy"),
        "{}",
        said(&mixed)
    );
}

#[test]
fn of_an_unprotected_vm_one_copy_runs_too() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    let mut machine = cluster
        .launch("solo", "ticker", "period_ms=5", &["--memory", "32M"])
        .unwrap();
    run_json(
        cluster
            .vmm("checkpoint", &machine.run_dir)
            .args(["solo", "--json"]),
    )
    .unwrap();
    let own = folder.path().join("vms/solo").display().to_string();
    let restore = |run: &str| {
        let mut command = cluster.vmm("restore", &folder.path().join(run));
        command.args(["solo", "--store", &own, "--detach"]);
        command.stdin(std::process::Stdio::null()).output().unwrap()
    };
    let refused = restore("r1");
    assert!(
        !refused.status.success() && said(&refused).contains("in use by another process"),
        "{}",
        said(&refused)
    );
    machine.kill().unwrap();
    // Only from its own store, which one process has: of a copy of that store nobody could tell.
    let mut elsewhere = cluster.vmm("restore", &folder.path().join("r0"));
    elsewhere.args(["solo", "--from", &own, "--detach", "--store"]);
    elsewhere.arg(folder.path().join("r0-store"));
    let refused = elsewhere.stdin(std::process::Stdio::null()).output().unwrap();
    assert!(
        !refused.status.success() && said(&refused).contains("may run already"),
        "{}",
        said(&refused)
    );
    let first = restore("r1");
    assert!(first.status.success(), "{}", said(&first));
    let second = restore("r2");
    assert!(
        !second.status.success() && said(&second).contains("in use by another process"),
        "two restores of one VM ran at once: {}",
        said(&second)
    );
    let stop = cluster
        .vmm("stop", &folder.path().join("r1"))
        .arg("solo")
        .output()
        .unwrap();
    assert!(stop.status.success(), "{}", said(&stop));
}

#[test]
fn a_stop_says_which_holder_lacks_what() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, holders) = pair(&folder);
    for (quorum, committed_here) in [("1", true), ("2", false)] {
        let name = format!("q{quorum}");
        let protect = [
            "--memory",
            "32M",
            "--every",
            "50ms",
            "--ack-quorum",
            quorum,
            "--protect-to",
            &holders,
        ];
        let mut machine = cluster.launch(&name, "ticker", "period_ms=5", &protect).unwrap();
        cluster.committed(&machine, 3).unwrap();
        cluster.kill_agent(1).unwrap();
        let stop = cluster
            .vmm("stop", &machine.run_dir)
            .args([&name, "--drain", "1s"])
            .output()
            .unwrap();
        machine.wait().unwrap();
        let told = said(&stop);
        assert_eq!(stop.status.success(), committed_here, "{told}");
        let lacks = format!(
            "holder {} (birch) lacks the last checkpoint, {name}/1/",
            cluster.agents[1].address
        );
        assert!(told.contains(&lacks), "{told:?} lacks {lacks:?}");
        if !committed_here {
            assert!(
                told.contains("is not committed") && told.contains("vmm restore"),
                "{told}"
            );
        }
        cluster.restart_agent(1).unwrap();
    }
}

#[test]
fn a_takeover_with_a_holder_away_runs_and_one_agent_is_not_two_holders() {
    let folder = tempfile::tempdir().unwrap();
    let (mut cluster, holders) = pair(&folder);
    let protect = ["--memory", "32M", "--every", "50ms", "--protect-to", &holders];
    let mut machine = cluster.launch("web", "ticker", "period_ms=5", &protect).unwrap();
    cluster.committed(&machine, 3).unwrap();

    // The host of its owner and one of its two holders are lost at once: the other has all that was committed.
    machine.kill().unwrap();
    cluster.kill_agent(1).unwrap();
    let report = run_json(cluster.standby(0).args(["promote", "web", "--json"])).unwrap();
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    let successor = cluster.adopt("web", 0, pid);
    let from = report["resumed_from"]["name"]
        .as_str()
        .or(report["resumed_from"].as_str());
    assert!(epoch(&from.into()) >= 3, "{report}");
    let status = cluster.status("web", &successor.run_dir).unwrap();
    assert_eq!(status["state"], "running", "{status}");
    // It commits again when the holder is back.
    cluster.restart_agent(1).unwrap();
    wait_for("the new owner's first commit", || {
        let status = cluster.status("web", &successor.run_dir)?;
        let committed = status["committed"].as_str().unwrap_or_default();
        Ok(committed.starts_with("web/2/").then_some(()))
    })
    .unwrap();
    cluster.own(successor);

    // The same agent by another of its names.
    let other = cluster.agents[0].address.replace("127.0.0.1", "localhost");
    let twice = format!("{},{other}", cluster.agents[0].address);
    let refused = cluster
        .vmm("run", &folder.path().join("twice"))
        .args([
            "--name",
            "db",
            "--memory",
            "32M",
            "--protect-to",
            &twice,
            "--kernel",
        ])
        .arg(cluster.guest("ticker"))
        .arg("--store")
        .arg(folder.path().join("twice-store"))
        .arg("--detach")
        .output()
        .unwrap();
    assert!(
        !refused.status.success() && said(&refused).contains("are the same agent"),
        "{}",
        said(&refused)
    );
}
