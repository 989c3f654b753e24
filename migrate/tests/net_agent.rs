//! The `standby` binary: its command line, its messages, and promoting with a stand-in for `vmm`.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate::registry::{Registry, VmState};
use net_common::process::{Served, standby, stderr, stdout};
use net_common::*;
use segment::Generation;

/// A script in the place of `vmm`.
fn fake_vmm(dir: &Path, name: &str, body: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(
        &path,
        format!("#!/bin/sh\ncase \"$*\" in *--check*) exit 0;; esac\n{body}\n"),
    )
    .unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// One that runs, says so, and notes its arguments.
fn running_vmm(dir: &Path) -> PathBuf {
    let args = dir.join("args");
    let body = format!(
        "printf '%s\\n' \"$@\" > {}\necho \"{{\\\"state\\\":\\\"running\\\",\\\"name\\\":\\\"web\\\",\\\"pid\\\":$$,\
         \\\"socket\\\":\\\"/run/web.sock\\\",\\\"resumed_from\\\":\\\"x\\\"}}\"\nexec sleep 60",
        args.display()
    );
    fake_vmm(dir, "vmm", &body)
}

fn alive(pid: u64) -> bool {
    // A process that ended and was not reaped yet does not run.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

fn end(pid: u64) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

#[test]
fn without_an_agent_every_command_says_what_to_do() {
    for command in [
        vec!["ls"],
        vec!["show", "web/1/1"],
        vec!["promote", "web"],
        vec!["status"],
        vec!["forget", "web"],
    ] {
        // A port that nothing listens on: it was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .to_string();
        let output = standby(&[&command[..], &["--agent", &port]].concat());
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        assert!(
            told.contains(&format!(
                "no agent answers at {port}: start one with `standby serve`"
            )),
            "{told}"
        );
        assert!(told.contains("--agent") && told.contains("refused"), "{told}");
        assert_eq!(told.trim().lines().count(), 1, "{told}");
    }
    let output = standby(&["ls", "--agent", "192.0.2.1:7400"]);
    assert!(stderr(&output).contains("without TLS"), "{}", stderr(&output));
}

#[test]
fn what_keeps_an_agent_from_starting_is_one_clear_message() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let agent = Served::start(&data, "a", "127.0.0.1:0", &[]);
    let other = dir.path().join("b").display().to_string();
    let locked = data.display().to_string();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let file = file.display().to_string();
    let serve = ["serve", "--listen"];
    for (args, parts) in [
        (
            vec![agent.address.as_str(), "--data", &other, "--name", "b"],
            vec![agent.address.as_str(), "in use", "--listen"],
        ),
        (
            vec!["127.0.0.1:0", "--data", &locked, "--name", "a"],
            vec!["in use by another process", locked.as_str()],
        ),
        // One that keeps no registry there, too.
        (
            vec![
                "127.0.0.1:0",
                "--data",
                &locked,
                "--name",
                "b",
                "--registry",
                &agent.address,
            ],
            vec!["in use by another process", locked.as_str()],
        ),
        (
            vec!["127.0.0.1:0", "--data", &other, "--name", "a b"],
            vec!["\"a b\"", "letters"],
        ),
        (
            vec!["0.0.0.0:0", "--data", &other, "--name", "b"],
            vec!["0.0.0.0:0", "TLS"],
        ),
        (
            vec!["127.0.0.1:0", "--data", &file, "--name", "b"],
            vec![file.as_str()],
        ),
        (
            vec![
                "127.0.0.1:0",
                "--data",
                &other,
                "--name",
                "a",
                "--registry",
                &agent.address,
            ],
            vec!["node a", "--replace"],
        ),
    ] {
        let output = standby(&[&serve[..], &args].concat());
        let told = stderr(&output);
        let last = told.trim().lines().last().unwrap_or_default().to_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {told}");
        for part in parts {
            assert!(last.contains(part), "{args:?}: {last:?} lacks {part:?}");
        }
    }
    // What the command line itself refuses.
    for args in [
        vec!["serve"],
        vec!["serve", "--data", &other, "--registry", "nowhere"],
        vec!["show", "web"],
    ] {
        assert_eq!(standby(&args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_signal_ends_it_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Served::start(dir.path(), "a", "127.0.0.1:0", &[]);
    assert!(agent.terminate().success());
    // Port and data directory are free again.
    let address = agent.address.clone();
    let mut agent = Served::start(dir.path(), "a", &address, &[]);
    assert!(agent.terminate().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_are_listed_shown_and_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let a = Served::start(&dir.path().join("a"), "a", "127.0.0.1:0", &[]);
    let b = Served::start(
        &dir.path().join("b"),
        "b",
        "127.0.0.1:0",
        &["--registry", &a.address],
    );
    let registry = Registry::remote(&a.address, &tester());
    let generation = create(&registry, "web", &[&a.address, &b.address], 2).await;
    let mut owner = Owner::start(
        dir.path(),
        "web",
        generation,
        &[&a.address, &b.address],
        2,
        Some(registry.clone()),
    );
    owner.take(4);
    let last = owner.take(4);
    owner.wait_committed(&last).await;
    let at = |command: &[&str]| {
        let output = standby(&[command, &["--agent", &a.address]].concat());
        assert!(output.status.success(), "{command:?}: {}", stderr(&output));
        stdout(&output)
    };
    let table = at(&["ls", "web"]);
    let lines: Vec<_> = table.lines().collect();
    assert!(
        lines[0].starts_with("SEGMENT") && lines[1].starts_with("web/1/1") && lines[1].contains("full"),
        "{table}"
    );
    assert!(
        lines[2].contains("delta") && lines[3].starts_with("2 segments"),
        "{table}"
    );
    let json: serde_json::Value = serde_json::from_str(&at(&["ls", "--json"])).unwrap();
    assert_eq!(
        (&json[1]["name"], &json[1]["complete"]),
        (&"web/1/2".into(), &true.into())
    );
    assert_eq!(
        (&json[1]["kind"], &json[1]["parent"]["name"]),
        (&"delta".into(), &"web/1/1".into())
    );
    assert!(at(&["ls", "db"]).contains("no segments"));

    let shown = at(&["show", "web/1/2"]);
    for part in [
        "name         web/1/2",
        "parent       web/1/1",
        "memory",
        "1 records",
        "complete     yes",
    ] {
        assert!(shown.contains(part), "{shown} lacks {part:?}");
    }
    let json: serde_json::Value = serde_json::from_str(&at(&["show", "web/1/1", "--json"])).unwrap();
    assert_eq!(
        (&json["segment"]["name"], &json["spaces"][0]["page_bytes"]),
        (&"web/1/1".into(), &4096.into())
    );
    let missing = standby(&["show", "web/1/9", "--agent", &a.address]);
    assert!(
        !missing.status.success() && stderr(&missing).contains("web/1/9"),
        "{}",
        stderr(&missing)
    );

    let status = at(&["status"]);
    for part in [
        "HELD HERE",
        "owner",
        "NODE",
        b.address.as_str(),
        "GENERATION",
        "running",
    ] {
        assert!(status.contains(part), "{status} lacks {part:?}");
    }
    let json: serde_json::Value = serde_json::from_str(&at(&["status", "--json"])).unwrap();
    assert_eq!(json["agent"]["vms"][0]["newest"]["name"], "web/1/2");
    assert_eq!(
        (&json["vms"][0]["vm"], &json["nodes"][1]["name"]),
        (&"web".into(), &"b".into())
    );
    // The same of an agent that does not keep the registry; and without one.
    let from_b = stdout(&standby(&["status", "--agent", &b.address]));
    assert!(
        from_b.contains("GENERATION") && from_b.starts_with("b at"),
        "{from_b}"
    );

    // Two speak against it, each by itself: the owner that ships here, and the registry.
    let forget = || standby(&["forget", "web", "--agent", &a.address]);
    let is = async |state| {
        registry
            .set_vm_state(&vm("web"), generation, state)
            .await
            .unwrap()
    };
    is(VmState::Stopped).await;
    let shipped = stderr(&forget());
    for part in ["is being shipped here by owner", "vmm stop web"] {
        assert!(shipped.contains(part), "{shipped} lacks {part:?}");
    }
    is(VmState::Running).await;
    owner.shipper.stop().await;
    let deadline = std::time::Instant::now() + PATIENCE;
    let running = loop {
        let told = stderr(&forget());
        if !told.contains("is being shipped") {
            break told;
        }
        assert!(std::time::Instant::now() < deadline, "it is shipped for ever");
    };
    for part in ["is recorded as running, owned by owner", "vmm stop web"] {
        assert!(running.contains(part), "{running} lacks {part:?}");
    }
    is(VmState::Stopped).await;
    while !forget().status.success() {
        assert!(std::time::Instant::now() < deadline, "it is never forgotten");
    }
    for agent in [&a, &b] {
        assert!(stdout(&standby(&["ls", "--agent", &agent.address])).contains("no segments"));
    }
    let again = forget();
    assert!(stderr(&again).contains("has a VM web"), "{}", stderr(&again));
}

#[tokio::test(flavor = "multi_thread")]
async fn promote_fetches_spawns_and_fences() {
    let dir = tempfile::tempdir().unwrap();
    let vmm = running_vmm(dir.path()).display().to_string();
    let a = Served::start(&dir.path().join("a"), "a", "127.0.0.1:0", &["--vmm", &vmm]);
    // Not a holder: it has nothing of the VM, and gets it from the one that is.
    let more = ["--vmm", vmm.as_str(), "--registry", &a.address];
    let mut b = Served::start(&dir.path().join("b"), "b", "127.0.0.1:0", &more);
    let registry = Registry::remote(&a.address, &tester());
    let generation = create(&registry, "web", &[&a.address], 1).await;
    let mut owner = Owner::start(dir.path(), "web", generation, &[&a.address], 1, None);
    for _ in 0..5 {
        owner.take(300);
    }
    let last = owner.name(5);
    owner.wait_committed(&last).await;

    let dry = standby(&["promote", "web", "--dry-run", "--agent", &b.address]);
    assert!(
        stdout(&dry).contains("go on from web/1/5"),
        "{}{}",
        stdout(&dry),
        stderr(&dry)
    );
    assert_eq!(
        registry.get_vm(&vm("web")).await.unwrap().generation,
        Generation(1)
    );

    let output = standby(&["promote", "web", "--json", "--agent", &b.address]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((&report["vm"], &report["generation"]), (&"web".into(), &2.into()));
    assert_eq!(
        (&report["resumed_from"], &report["socket"]),
        (&"web/1/5".into(), &"/run/web.sock".into())
    );
    assert!(report["promote_to_running_ms"].as_f64().unwrap() > 0.0);
    for phase in ["read", "ask", "raise", "seal", "fetch", "restore"] {
        assert!(report["phases"][phase].as_f64().is_some(), "{report}");
    }
    // The owner hears of it although it had nothing to ship.
    let is = |e: &migrate::shipper::ShipEvent| matches!(e, migrate::shipper::ShipEvent::Fenced { .. });
    owner.wait_event("the fence", is).await;
    owner.shipper.stop().await;

    let args = fs::read_to_string(dir.path().join("args")).unwrap();
    let args: Vec<_> = args.lines().collect();
    let after = |flag: &str| {
        args[args
            .iter()
            .position(|a| *a == flag)
            .unwrap_or_else(|| panic!("{flag}"))
            + 1]
    };
    let data = dir.path().join("b");
    assert_eq!(args[0], "restore");
    assert_eq!(Path::new(after("--from")), data.join("store"));
    assert_eq!(Path::new(after("--store")), data.join("spool/web/g2"));
    assert_eq!(
        (after("--name"), after("--segment"), after("--generation")),
        ("web", "web/1/5", "2")
    );
    assert_eq!(
        (after("--protect-to"), after("--ack-quorum")),
        (a.address.as_str(), "1")
    );
    assert_eq!(
        (after("--every"), after("--registry")),
        ("200ms", a.address.as_str())
    );
    assert!(args.contains(&"--ready-stdout"));
    let record = registry.get_vm(&vm("web")).await.unwrap();
    assert_eq!((record.owner.as_str(), record.state), ("b", VmState::Running));
    // The chain came whole.
    let store = migrate::store::FsStore::open_read_only(&data.join("store")).unwrap();
    assert_eq!(store.chain(&last).unwrap().len(), 5);
    for entry in store.all() {
        store.verify(&entry.name).unwrap();
    }

    // The VM outlives its agent, and a Ctrl-C in the agent's terminal does not reach it.
    let pid = report["pid"].as_u64().unwrap();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let group = stat.rsplit(") ").next().unwrap().split(' ').nth(2).unwrap();
    assert_eq!(group, pid.to_string());
    b.kill();
    assert!(alive(pid));
    end(pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_fails_says_why_and_can_be_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let says = r#"echo 'cpu feature avx512f is missing' >&2; echo '{"state":"failed","error":"this host cannot run it"}'"#;
    let failing = fake_vmm(dir.path(), "failing", says).display().to_string();
    let data = dir.path().join("a");
    let mut a = Served::start(&data, "a", "127.0.0.1:0", &["--vmm", &failing]);
    let registry = Registry::remote(&a.address, &tester());
    let generation = create(&registry, "web", &[&a.address], 1).await;
    let mut owner = Owner::start(dir.path(), "web", generation, &[&a.address], 1, None);
    let last = owner.take(4);
    owner.wait_committed(&last).await;
    owner.shipper.stop().await;

    let promote = |address: &str| standby(&["promote", "web", "--agent", address]);
    let output = promote(&a.address);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(1));
    for part in [
        "web/1/1",
        "this host cannot run it",
        "avx512f is missing",
        "stopped under generation 2",
        "is safe",
    ] {
        assert!(told.contains(part), "{told} lacks {part:?}");
    }
    let record = registry.get_vm(&vm("web")).await.unwrap();
    assert_eq!(
        (record.generation, record.state),
        (Generation(2), VmState::Stopped)
    );

    // One that says nothing, one that says nonsense, and none.
    for (body, part) in [
        ("exit 3", "without a word (exit status: 3)"),
        ("echo hello; exec sleep 60", "\"hello\""),
    ] {
        a.terminate();
        let vmm = fake_vmm(dir.path(), "odd", body).display().to_string();
        a = Served::start(&data, "a", &a.address.clone(), &["--vmm", &vmm]);
        let told = stderr(&promote(&a.address));
        assert!(told.contains(part), "{told} lacks {part:?}");
    }
    a.terminate();
    a = Served::start(&data, "a", &a.address.clone(), &["--vmm", "/nowhere/vmm"]);
    let before = registry.get_vm(&vm("web")).await.unwrap().generation;
    let told = stderr(&promote(&a.address));
    assert!(
        told.contains("/nowhere/vmm") && told.contains("Nothing was changed"),
        "{told}"
    );
    assert_eq!(registry.get_vm(&vm("web")).await.unwrap().generation, before);

    a.terminate();
    let vmm = running_vmm(dir.path()).display().to_string();
    a = Served::start(&data, "a", &a.address.clone(), &["--vmm", &vmm]);
    let output = promote(&a.address);
    assert!(
        stdout(&output).contains("web runs on a from web/1/1"),
        "{}",
        stderr(&output)
    );
    let json = registry.get_vm(&vm("web")).await.unwrap();
    assert_eq!(json.state, VmState::Running);
    let told = stdout(&output);
    let pid: u64 = told
        .split("pid ")
        .nth(1)
        .and_then(|t| t.split(',').next())
        .unwrap()
        .parse()
        .unwrap();
    assert!(alive(pid));
    end(pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promote_without_enough_holders_or_on_a_storage_node_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let vmm = running_vmm(dir.path()).display().to_string();
    let a = Served::start(&dir.path().join("a"), "a", "127.0.0.1:0", &["--vmm", &vmm]);
    let more = ["--registry", &a.address, "--roles", "store"];
    let mut b = Served::start(&dir.path().join("b"), "b", "127.0.0.1:0", &more);
    let registry = Registry::remote(&a.address, &tester());
    // Committed by one of two: a takeover has to hear both.
    let generation = create(&registry, "web", &[&a.address, &b.address], 1).await;
    let mut owner = Owner::start(dir.path(), "web", generation, &[&a.address, &b.address], 1, None);
    let last = owner.take(4);
    owner.wait_committed(&last).await;
    assert!(owner.shipper.drain(PATIENCE).await);
    owner.shipper.stop().await;

    let stores = standby(&["promote", "web", "--agent", &b.address]);
    assert!(stderr(&stores).contains("only stores"), "{}", stderr(&stores));
    b.kill();
    let few = standby(&["promote", "web", "--agent", &a.address]);
    let told = stderr(&few);
    assert!(
        told.contains("1 of its 2 holders answer and 2 are needed") && told.contains(&b.address),
        "{told}"
    );
    let unknown = standby(&["promote", "db", "--agent", &a.address]);
    assert!(stderr(&unknown).contains("no VM db"), "{}", stderr(&unknown));
    tokio::time::timeout(Duration::from_secs(1), registry.get_vm(&vm("web")))
        .await
        .unwrap()
        .unwrap();
}

#[test]
fn systemd_hears_that_it_is_ready_lives_and_stops() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let dir = tempfile::tempdir().unwrap();
    let abstract_name = format!("understudy-test-{}", std::process::id());
    let path = dir.path().join("notify");
    let by_name = SocketAddr::from_abstract_name(&abstract_name).unwrap();
    for (at, socket, data) in [
        (
            path.display().to_string(),
            UnixDatagram::bind(&path).unwrap(),
            "a",
        ),
        (
            format!("@{abstract_name}"),
            UnixDatagram::bind_addr(&by_name).unwrap(),
            "b",
        ),
    ] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let hear = || {
            let mut text = [0; 100];
            let n = socket.recv(&mut text).unwrap();
            String::from_utf8_lossy(&text[..n]).into_owned()
        };
        let env = [("NOTIFY_SOCKET", at.as_str()), ("WATCHDOG_USEC", "20000")];
        let data = dir.path().join(data);
        let mut served = Served::start_in(&data, "a", "127.0.0.1:0", &[], &env);
        assert_eq!(hear(), "READY=1");
        assert_eq!(hear(), "WATCHDOG=1");
        // Its certificate would be read again; it goes on.
        let pid = rustix::process::Pid::from_child(&served.child);
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
        for _ in 0..5 {
            assert_eq!(hear(), "WATCHDOG=1");
        }
        assert!(served.terminate().success());
        while hear() != "STOPPING=1" {}
    }
}
