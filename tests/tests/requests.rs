//! Checkpoints that a guest asks for. Its streams to CID 2, port 7400, arrive at the Unix socket that is spoken to here
//! (what the device does with them is tested in `vmm`, and from a Linux guest in `linux.rs`).
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use understudy_tests::harness::{Cluster, Machine, PATIENCE, epoch, run, run_json, wait_for};

/// A stream of the guest's.
struct Guest(BufReader<UnixStream>);

impl Guest {
    fn connect(machine: &Machine) -> Self {
        let stream = UnixStream::connect(machine.run_dir.join("web/vsock_7400")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    fn say(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Asks, and returns the name of the checkpoint that was committed.
    fn checkpoint(&mut self, request: &str) -> String {
        self.say(format!("{request}\n").as_bytes());
        let taken = self.hear();
        let name = taken
            .strip_prefix("TAKEN ")
            .unwrap_or_else(|| panic!("{taken}"))
            .to_owned();
        assert_eq!(self.hear(), format!("COMMITTED {name}"));
        name
    }
}

/// Two agents.
fn cluster(folder: &Path) -> Cluster {
    let mut cluster = Cluster::new(folder, false).unwrap();
    cluster.start_agent("alder", &[]).unwrap();
    cluster.start_agent("birch", &[]).unwrap();
    cluster
}

/// A VM at both of them, with stream sockets; it is checkpointed once, and then not of its own accord for an hour.
fn protected(cluster: &mut Cluster) -> Machine {
    let holders = format!("{},{}", cluster.agents[0].address, cluster.agents[1].address);
    let more = [
        "--memory",
        "32M",
        "--every",
        "1h",
        "--protect-to",
        &holders,
        "--ack-quorum",
        "2",
        "--vsock",
        "52",
    ];
    cluster.launch("web", "ticker", "period_ms=5", &more).unwrap()
}

#[test]
fn what_a_guest_asks_for_is_committed_before_it_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(folder.path());
    let mut machine = protected(&mut cluster);
    cluster.committed(&machine, 1).unwrap();

    let mut guest = Guest::connect(&machine);
    let first = guest.checkpoint("CHECKPOINT before the upgrade");
    let second = guest.checkpoint("CHECKPOINT");
    assert_ne!(first, second);
    // Committed: both holders have it, with the name that the guest gave.
    for agent in 0..2 {
        let shown = run_json(cluster.standby(agent).args(["show", &first, "--json"])).unwrap();
        assert_eq!(shown["segment"]["label"], "guest: before the upgrade", "{shown}");
        assert_eq!(shown["segment"]["complete"], true, "{shown}");
    }

    // What is no request is refused, and the connection goes on; a line without an end is not read for ever.
    guest.say(b"PAUSE\n");
    assert!(guest.hear().starts_with("ERROR unknown request"));
    guest.say(format!("CHECKPOINT {}\n", "x".repeat(65)).as_bytes());
    assert!(guest.hear().starts_with("ERROR the name has 65 bytes"));
    let third = guest.checkpoint("CHECKPOINT");
    guest.say(&[b'x'; 4096]);
    assert!(guest.hear().starts_with("ERROR a line of more than"));
    // Closed, by a reset if what was not read is still there.
    assert!(matches!(guest.0.read(&mut [0]), Ok(0) | Err(_)));
    // More connections than are served at once: the last is told so, and the others are served.
    let mut crowd: Vec<_> = (0..8).map(|_| Guest::connect(&machine)).collect();
    wait_for("a ninth connection to be refused", || {
        let mut ninth = Guest::connect(&machine);
        Ok(ninth.hear().contains("connections are open").then_some(()))
    })
    .unwrap();
    let last = crowd[7].checkpoint("CHECKPOINT");
    drop(crowd);

    // A person does not pass for the guest.
    let refused = cluster
        .vmm("checkpoint", &machine.run_dir)
        .args(["web", "--label", "guest: me"])
        .output()
        .unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("one that the guest gave"));

    // It is where a takeover goes on: nothing newer has been taken.
    assert!(
        epoch(&third.as_str().into()) < epoch(&last.as_str().into()),
        "{third} {last}"
    );
    machine.kill().unwrap();
    let report = run_json(cluster.standby(1).args(["promote", "web", "--json"])).unwrap();
    let successor = cluster.adopt("web", 1, u32::try_from(report["pid"].as_u64().unwrap()).unwrap());
    let status = cluster.status("web", &successor.run_dir).unwrap();
    assert_eq!(status["restored_from"], last.as_str(), "{status}");
    // And the new owner answers the guest as the old one did.
    let after = Guest::connect(&successor).checkpoint("CHECKPOINT");
    assert!(after.starts_with("web/2/"), "{after}");
    // The one with a name can be had by it.
    let store = format!("{}/store", cluster.agents[1].data.display());
    let copy = folder.path().join("copy");
    run(cluster
        .vmm("restore", &successor.run_dir)
        .args([
            "web@label=before the upgrade",
            "--from",
            &store,
            "--name",
            "then",
            "--detach",
            "--store",
        ])
        .arg(&copy))
    .unwrap();
    let then = cluster.status("then", &successor.run_dir).unwrap();
    assert_eq!(then["restored_from"], first.as_str(), "{then}");
    run(cluster.vmm("stop", &successor.run_dir).arg("then")).unwrap();
    cluster.own(successor);
}

#[test]
fn a_checkpoint_that_nobody_has_is_not_told_as_committed() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(folder.path());
    let alone = ["--memory", "32M", "--vsock", "52"];
    let machine = cluster.launch("web", "ticker", "period_ms=5", &alone).unwrap();
    let mut guest = Guest::connect(&machine);
    guest.say(b"CHECKPOINT\n");
    assert!(guest.hear().starts_with("ERROR this VM is not protected"));
    drop(guest);
    run(cluster.vmm("stop", &machine.run_dir).arg("web")).unwrap();

    let machine = protected(&mut cluster);
    let before = cluster.committed(&machine, 1).unwrap();
    cluster.kill_agent(1).unwrap();
    let mut guest = Guest::connect(&machine);
    guest.say(b"CHECKPOINT\n");
    let taken = guest.hear();
    assert!(taken.starts_with("TAKEN web/"), "{taken}");
    let status = cluster.status("web", &machine.run_dir).unwrap();
    assert_eq!(epoch(&status["committed"]), before, "{status}");
    // With its holder back it is committed, and only then said to be.
    cluster.restart_agent(1).unwrap();
    let name = taken.trim_start_matches("TAKEN ");
    assert_eq!(guest.hear(), format!("COMMITTED {name}"));
    let status = cluster.status("web", &machine.run_dir).unwrap();
    assert!(epoch(&status["committed"]) >= epoch(&name.into()), "{status}");
}
