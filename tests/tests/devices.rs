//! A VM with devices is taken over by a host that has been told what they are there, and by no other.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::Command;

use understudy_tests::harness::{Cluster, run, run_json, wait_for};

/// A TAP interface of this host, removed at the end.
struct Tap(String);

impl Tap {
    fn new(what: &str) -> Self {
        // Unlike any other's: tests run beside each other.
        let name = format!("us{}{what}", std::process::id() % 10_000_000);
        run(Command::new("ip").args(["tuntap", "add", "dev", &name, "mode", "tap"])).unwrap();
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // A process that was killed may not be gone yet.
        let removed = wait_for(format!("the interface {} to go", self.0), || {
            let status = Command::new("ip")
                .args(["tuntap", "del", "dev", &self.0, "mode", "tap"])
                .status()?;
            Ok(status.success().then_some(()))
        });
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

#[test]
fn a_host_takes_over_with_its_own_devices_and_changes_nothing_when_it_lacks_one() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (Tap::new("a"), Tap::new("b"));
    let bound = folder.path().join("bound");
    fs::create_dir(&bound).unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    let disks = format!("disk:data={}/{{vm}}.img", bound.display());
    let card = format!("web/net:0={}", second.0);
    cluster.start_agent("alder", &["--bind", &disks]).unwrap();
    cluster
        .start_agent(
            "birch",
            &["--bind", &disks, "--bind", &card, "--bind", "net:1=nowhere"],
        )
        .unwrap();
    let holders = format!("{},{}", cluster.agents[0].address, cluster.agents[1].address);

    let content: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 512) as u8).collect();
    let disk = folder.path().join("data.img");
    fs::write(&disk, &content).unwrap();
    let (disk, net) = (format!("data={}", disk.display()), format!("0={}", first.0));
    let more = [
        "--memory",
        "32M",
        "--every",
        "100ms",
        "--protect-to",
        &holders,
        "--disk",
        &disk,
        "--net",
        &net,
        "--vsock",
        "52",
    ];
    let mut machine = cluster.launch("web", "ticker", "period_ms=5", &more).unwrap();
    cluster.committed(&machine, 2).unwrap();

    // What is missing is said before anything is changed: the guest and its protection go on.
    let refused = cluster.standby(0).args(["promote", "web"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success(), "{said}");
    for part in ["net:0", "Nothing was changed", "--bind"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let status = cluster.status("web", &machine.run_dir).unwrap();
    assert_eq!(status["generation"], 1, "{status}");
    let now = cluster.committed(&machine, 0).unwrap();
    cluster.committed(&machine, now + 2).unwrap();

    machine.kill().unwrap();
    let report = run_json(cluster.standby(1).args(["promote", "web", "--json"])).unwrap();
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    let successor = cluster.adopt("web", 1, pid);
    assert_eq!(fs::read(bound.join("web.img")).unwrap(), content);
    // Nobody had to say where its stream sockets are: they are with its control socket.
    UnixStream::connect(successor.run_dir.join("web/vsock")).unwrap();
    let status = cluster.status("web", &successor.run_dir).unwrap();
    assert_eq!(status["state"], "running", "{status}");
    cluster.own(successor);
}
