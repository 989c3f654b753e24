//! `vmm restore`.

use crate::support::{World, last_tick, wait_for};

/// A VM that ticked, was checkpointed twice, and was stopped; returns what it had said by the second checkpoint.
fn checkpointed_text(world: &World) -> String {
    world.detached("web", "period_ms=5");
    wait_for("the guest to tick", || (world.ticks("web")? >= 5).then_some(()));
    world.vmm(&["checkpoint", "web"]).ok();
    wait_for("the guest to tick", || (world.ticks("web")? >= 10).then_some(()));
    world.vmm(&["pause", "web"]).ok();
    world.vmm(&["checkpoint", "web"]).ok();
    let text = world.console("web");
    world.vmm(&["stop", "web"]).ok();
    text
}

/// The same, and its last tick then.
fn checkpointed(world: &World) -> u64 {
    last_tick(&checkpointed_text(world)).unwrap()
}

fn segment(world: &World, epoch: u32) -> String {
    world.text(&format!("state/understudy/vms/web/segments/web/1/{epoch}.seg"))
}

#[test]
fn a_vm_goes_on_from_its_newest_checkpoint() {
    let world = World::new();
    let before = checkpointed_text(&world);
    let said = world.vmm(&["restore", "--name", "web", "--detach"]).ok();
    assert!(said.starts_with("web: running from web/1/2, pid "), "{said}");
    let after = wait_for("the guest to go on", || {
        Some(world.console("web")).filter(|text| text.matches('\n').count() > 3)
    });
    // It may have been stopped in the middle of a line: together they are as if nothing had happened.
    let text = before + &after;
    let (whole, _) = text.rsplit_once('\n').unwrap();
    let ticks: Vec<u64> = whole
        .lines()
        .filter_map(|line| line.trim().strip_prefix("tick ")?.parse().ok())
        .collect();
    assert_eq!(ticks, (0..ticks.len() as u64).collect::<Vec<_>>(), "{text}");
    let status = world.row("web").unwrap()["status"].clone();
    assert_eq!(
        (status["generation"].as_u64(), status["restored_from"].as_str()),
        (Some(2), Some("web/1/2"))
    );
}

#[test]
fn an_earlier_checkpoint_becomes_another_vm() {
    let world = World::new();
    let tick = checkpointed(&world);
    // By time or number.
    let refused = |args: &[&str], parts: &[&str]| world.vmm(args).refused(parts);
    refused(
        &["restore", "web@-1h", "--name", "copy"],
        &["web has no restore point at or before", "the oldest is web/1/1"],
    );
    refused(
        &["restore", "web@yesterday", "--name", "copy"],
        &["yesterday", "-10m"],
    );
    let store = world.text("state/understudy/vms/web");
    refused(&["restore", "web@1", "--from", &store], &["--name"]);
    let said = world
        .vmm(&["restore", "web@1", "--name", "copy", "--detach"])
        .ok();
    assert!(said.starts_with("copy: running from web/1/1"), "{said}");
    let text = wait_for("the copy to go on", || {
        Some(world.console("copy")).filter(|text| last_tick(text).is_some())
    });
    let first: u64 = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("tick ")?.parse().ok())
        .unwrap();
    assert!(
        (5..tick).contains(&first),
        "it began at {first}, and the later checkpoint was at {tick}"
    );
}

#[test]
fn a_chain_of_files_is_enough() {
    let world = World::new();
    let tick = checkpointed(&world);
    let (full, delta) = (world.text("full.seg"), world.text("delta.seg"));
    std::fs::rename(segment(&world, 1), &full).unwrap();
    std::fs::rename(segment(&world, 2), &delta).unwrap();
    world.vmm(&["restore", &delta]).refused(&["web/1/2"]);
    world
        .vmm(&["restore", &full, &delta, "--name", "moved", "--detach"])
        .ok();
    wait_for("the guest to go on", || {
        (world.ticks("moved")? > tick).then_some(())
    });
    // Without a name it has the one it had, which another may have as well.
    world
        .vmm(&["restore", &full, "--paused", "--detach"])
        .refused(&["web", "--allow-second-copy"]);
    let certain = ["restore", &full, "--paused", "--detach", "--allow-second-copy"];
    let said = world.vmm(&certain).ok();
    assert!(said.starts_with("web: paused from web/1/1"), "{said}");
    assert_eq!(world.console("web"), "");
    world.vmm(&["resume", "web"]).ok();
    wait_for("the guest to go on", || world.ticks("web"));
}

#[test]
fn the_one_line_for_the_agent() {
    let world = World::new();
    let tick = checkpointed(&world);
    let from = world.text("state/understudy/vms/web");
    let (store, run, log) = (
        world.text("spool"),
        world.text("agent-run"),
        world.text("agent.console"),
    );
    let args = [
        "restore",
        "--from",
        &from,
        "--name",
        "web",
        "--segment",
        "web/1/2",
        "--generation",
        "7",
        // Part of this has no registry to ask.
        "--allow-second-copy",
    ];
    // No holder is there: nothing runs, and the line says so.
    let protected = [
        "--protect-to",
        "127.0.0.1:1",
        "--ack-quorum",
        "1",
        "--every",
        "50ms",
        "--registry",
        "127.0.0.1:1",
        "--insecure-plaintext",
    ];
    let rest = [
        "--store",
        &store,
        "--run-dir",
        &run,
        "--ready-stdout",
        "--console-log",
        &log,
    ];
    let said = world.vmm(&[&args[..], &protected, &rest].concat());
    assert_eq!((said.code(), said.stdout.lines().count()), (1, 1), "{said:?}");
    let line: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(line["state"], "failed");
    assert!(line["error"].as_str().unwrap().contains("127.0.0.1:1"), "{line}");

    let mut vm = world.start(&[&args[..], &rest].concat());
    vm.says("\n");
    let line: serde_json::Value = serde_json::from_str(&vm.stdout()).unwrap();
    assert_eq!(
        (line["state"].as_str(), line["name"].as_str()),
        (Some("running"), Some("web"))
    );
    assert_eq!(line["pid"].as_u64(), Some(vm.pid()));
    assert_eq!(line["resumed_from"], "web/1/2");
    assert_eq!(
        line["socket"].as_str(),
        Some(format!("{run}/web/api.sock").as_str())
    );
    wait_for("the guest to go on", || {
        (last_tick(&std::fs::read_to_string(&log).ok()?)? > tick + 3).then_some(())
    });
    assert_eq!(
        vm.stdout().lines().count(),
        1,
        "only the one line is on standard output: {}",
        vm.stdout()
    );
    let status: serde_json::Value =
        serde_json::from_str(&world.vmm(&["inspect", "web", "--json", "--run-dir", &run]).ok()).unwrap();
    assert_eq!(status["generation"], 7);

    // A later owner gets the name although this process is still there, and neither harms the other.
    vm.signal("STOP");
    let spool = world.text("spool2");
    let later = [
        "restore",
        "--from",
        &from,
        "--name",
        "web",
        "--segment",
        "web/1/2",
        "--generation",
        "8",
        "--allow-second-copy",
    ];
    let rest = ["--store", &spool, "--run-dir", &run, "--ready-stdout"];
    let mut new = world.start(&[&later[..], &rest].concat());
    new.says("\n");
    assert!(new.stdout().contains("\"running\""), "{}", new.stdout());
    vm.signal("CONT");
    vm.signal("TERM");
    assert_eq!(vm.finish().code(), 0);
    world.vmm(&["pause", "web", "--run-dir", &run]).ok();
    world.vmm(&["stop", "web", "--run-dir", &run]).ok();
    assert_eq!(new.finish().code(), 0);
}
