//! A VM in the background, managed by the other commands.

use crate::support::{World, kill, last_tick, wait_for};

#[test]
fn a_vm_is_listed_paused_resumed_checkpointed_inspected_and_stopped() {
    let world = World::new();
    world.detached("web", "period_ms=5");
    let row = world.row("web").unwrap();
    assert_eq!(row["state"], "running");
    assert_eq!(row["status"]["memory_mib"], 32);
    let table = world.vmm(&["ps"]).ok();
    let line = table.lines().find(|line| line.contains("web")).unwrap();
    for part in ["running", "32.0 MiB", "not protected"] {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
    assert!(table.lines().next().unwrap().contains("COMMITTED"), "{table}");

    wait_for("the guest to tick", || (world.ticks("web")? > 3).then_some(()));
    world.vmm(&["pause", "web"]).ok();
    let stopped_at = world.console("web");
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(world.console("web"), stopped_at, "a paused guest spoke");
    assert_eq!(world.row("web").unwrap()["state"], "paused");
    world.vmm(&["pause", "web"]).ok();
    world.vmm(&["resume", "web"]).ok();
    let before = last_tick(&stopped_at).unwrap();
    wait_for("the guest to go on", || {
        (world.ticks("web")? > before).then_some(())
    });

    let full = world
        .vmm(&["checkpoint", "web", "--label", "before the change"])
        .ok();
    assert!(full.starts_with("web/1/1: full, "), "{full}");
    let delta: serde_json::Value =
        serde_json::from_str(&world.vmm(&["checkpoint", "web", "--json"]).ok()).unwrap();
    assert_eq!(
        (delta["name"].as_str(), delta["kind"].as_str()),
        (Some("web/1/2"), Some("delta"))
    );
    let again = world.vmm(&["checkpoint", "web", "--full"]).ok();
    assert!(again.starts_with("web/1/3: full, "), "{again}");

    let shown = world.vmm(&["inspect", "web"]).ok();
    for part in ["running", "1 vCPUs, 32 MiB", "web/1/3 (full", "protection   off"] {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }
    let status: serde_json::Value =
        serde_json::from_str(&world.vmm(&["inspect", "web", "--json"]).ok()).unwrap();
    assert_eq!(status["checkpoints"], 3);

    world.vmm(&["stop", "web"]).ok();
    assert_eq!(world.row("web"), None);
    world
        .vmm(&["pause", "web"])
        .refused(&["no VM named web runs here", "vmm ps"]);
}

/// Whoever starts it anew at once does not find its name taken.
#[test]
fn a_stop_waits_for_the_end_of_the_process() {
    use std::io::Write;
    let world = World::new();
    world.detached("web", "period_ms=5");
    let row = world.row("web").unwrap();
    let socket = row["socket"].as_str().unwrap();
    // A request that is never whole holds the process up for a while after it has answered the stop.
    let mut half = std::os::unix::net::UnixStream::connect(socket).unwrap();
    half.write_all(b"GET /status HTTP/1.1\r\nHost:").unwrap();
    world.vmm(&["stop", "web"]).ok();
    world.detached("web", "period_ms=5");
    world.vmm(&["stop", "web"]).ok();
}

#[test]
fn a_segment_is_shown_with_its_lineage_and_registers() {
    let world = World::new();
    world.detached("web", "period_ms=5");
    world.vmm(&["checkpoint", "web", "--label", "first"]).ok();
    world.vmm(&["checkpoint", "web"]).ok();
    world.vmm(&["stop", "web"]).ok();
    let shown = world.vmm(&["inspect", "web/1/2"]).ok();
    for part in [
        "web/1/2",
        "delta",
        "parent",
        "web/1/1",
        "memory, 8192 pages of 4096 bytes",
        "vcpu/0/regs",
        "rip",
        "64-bit mode",
    ] {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }
    let file = world.path("state/understudy/vms/web/segments/web/1/1.seg");
    let picture = world.path("web.png");
    let shown = world
        .vmm(&[
            "inspect",
            "web/1/2",
            "--frames",
            "--picture",
            picture.to_str().unwrap(),
        ])
        .ok();
    assert!(shown.contains("FRAME") && shown.contains("web.png"), "{shown}");
    assert!(std::fs::read(&picture).unwrap().starts_with(b"\x89PNG"));
    let json = world.vmm(&["inspect", file.to_str().unwrap(), "--json"]).ok();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (json["kind"].as_str(), json["label"].as_str()),
        (Some("full"), Some("first"))
    );
    assert_eq!(json["machine"]["memory_bytes"], 32 << 20);
    let rip = json["machine"]["vcpus"][0]["registers"]["rip"].as_str().unwrap();
    let rip = u64::from_str_radix(rip.trim_start_matches("0x"), 16).unwrap();
    assert!(
        (2 << 20..32 << 20).contains(&rip),
        "the guest's code is above 2 MiB, and rip is {rip:#x}"
    );

    // One byte of the body changed: found, and said where.
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let damaged = world.path("damaged.seg");
    std::fs::write(&damaged, bytes).unwrap();
    world
        .vmm(&["inspect", damaged.to_str().unwrap()])
        .refused(&["damaged.seg", "digest"]);
}

#[test]
fn a_console_is_followed_to_the_vms_end() {
    let world = World::new();
    world.detached("web", "period_ms=5");
    let mut console = world.start(&["console", "web"]);
    console.says("tick 0");
    let seen = world.ticks("web").unwrap();
    console.says(&format!("tick {}", seen + 10));
    world.vmm(&["stop", "web"]).ok();
    let said = console.finish();
    assert_eq!(said.code(), 0, "{said:?}");
}

#[test]
fn a_vm_that_ended_in_the_background_is_remembered() {
    let world = World::new();
    world.detached("job", "period_ms=1 exit_after_ticks=30");
    // Its process says so first, and then the note it leaves.
    let row = wait_for("the guest's end", || {
        world
            .row("job")
            .filter(|row| row["state"] == "ended" && row["status"].is_null())
    });
    assert!(
        row["reason"].as_str().unwrap().contains("switched itself off"),
        "{row}"
    );
    let log = std::fs::read_to_string(world.run_dir().join("job/console.log")).unwrap();
    assert!(log.contains("tick 29") && log.contains("done"), "{log}");
    world
        .vmm(&["checkpoint", "job"])
        .refused(&["VM job does not run any more", "ended"]);
    // Its name is free.
    world.detached("job", "period_ms=5");
    assert_eq!(world.row("job").unwrap()["state"], "running");
}

#[test]
fn a_vm_that_does_not_answer_holds_up_no_other() {
    let world = World::new();
    world.detached("stuck", "period_ms=5");
    world.detached("well", "period_ms=5");
    let pid = world.row("stuck").unwrap()["status"]["pid"].as_u64().unwrap();
    kill(pid, "STOP");
    wait_for("the VM to fall silent", || {
        (world.row("stuck").unwrap()["state"] == "no answer").then_some(())
    });
    let well = world.row("well").unwrap();
    kill(pid, "CONT");
    assert_eq!(well["state"], "running");
    assert_eq!(world.row("stuck").unwrap()["state"], "running");
}

#[test]
fn a_background_start_that_fails_says_why_once() {
    let world = World::new();
    world
        .vmm(&["run", "--name", "a", "--kernel", "/etc/hostname", "--detach"])
        .refused(&["/etc/hostname", "not a kernel", "PVH"]);
    assert_eq!(world.row("a"), None);
    world.detached("a", "period_ms=5");
    let again = ["run", "--name", "a", "--kernel", &world.ticker(), "--detach"];
    world.vmm(&again).refused(&["a VM named a runs here already"]);
}

#[test]
fn documents_and_scripts_are_printed() {
    let world = World::new();
    let document: serde_json::Value = serde_json::from_str(&world.vmm(&["openapi"]).ok()).unwrap();
    assert!(document["paths"]["/snapshot/create"]["put"].is_object());
    for shell in ["bash", "zsh", "fish"] {
        assert!(world.vmm(&["completions", shell]).ok().contains("checkpoint"));
    }
    assert!(world.vmm(&["--version"]).ok().starts_with("vmm "));
}
