//! `vmm run` in the foreground.

use crate::support::{World, last_tick, wait_for};

#[test]
fn a_guest_runs_to_its_end() {
    let world = World::new();
    let kernel = world.ticker();
    let cmdline = "period_ms=2 exit_after_ticks=20";
    let said = world.vmm(&[
        "run",
        "--name",
        "a",
        "--kernel",
        &kernel,
        "--cmdline",
        cmdline,
        "--memory",
        "64MiB",
    ]);
    assert_eq!(said.stderr, "");
    let text = said.ok();
    assert!(
        text.contains("tick 0") && text.contains("tick 19") && text.contains("done"),
        "{text}"
    );
    assert_eq!(
        std::fs::read_dir(world.run_dir()).unwrap().count(),
        0,
        "something was left in the run folder"
    );
}

#[test]
fn a_signal_ends_the_vm_in_order() {
    for signal in ["INT", "TERM", "HUP"] {
        let world = World::new();
        let mut vm = world.start(&[
            "run",
            "--name",
            "a",
            "--kernel",
            &world.ticker(),
            "--cmdline",
            "period_ms=5",
        ]);
        vm.says("tick 3");
        vm.signal(signal);
        let said = vm.finish();
        assert_eq!(said.code(), 0, "SIG{signal}: {said:?}");
        assert_eq!(
            std::fs::read_dir(world.run_dir()).unwrap().count(),
            0,
            "SIG{signal} left something"
        );
    }
}

#[test]
fn the_console_goes_to_a_file_too() {
    let world = World::new();
    let log = world.text("console.txt");
    let cmdline = "period_ms=1 exit_after_ticks=9";
    let args = [
        "run",
        "--name",
        "a",
        "--kernel",
        &world.ticker(),
        "--cmdline",
        cmdline,
        "--console-log",
        &log,
    ];
    let said = world.vmm(&args).ok();
    assert_eq!(std::fs::read_to_string(&log).unwrap(), said);
    assert_eq!(last_tick(&said), Some(8));
    // The next run adds to it.
    world.vmm(&args).ok();
    assert_eq!(
        std::fs::read_to_string(&log).unwrap().matches("tick 8").count(),
        2
    );
}

#[test]
fn a_guest_that_faults_for_good_has_its_own_status() {
    let world = World::new();
    let kernel = world.path("faults.elf");
    std::fs::write(&kernel, faulting(guest_images::TICKER)).unwrap();
    let said = world.vmm(&[
        "run",
        "--name",
        "a",
        "--kernel",
        kernel.to_str().unwrap(),
        "--memory",
        "32M",
    ]);
    assert_eq!(said.code(), 4, "{said:?}");
    assert!(said.stderr.contains("error: the guest cannot go on"), "{said:?}");
    let row = world.row("a").unwrap();
    assert_eq!(row["state"], "failed");
    assert_eq!(world.vmm(&["stop", "a"]).code(), 0);
    assert_eq!(world.row("a"), None);
}

/// A guest whose first instruction is undefined, with no table to find a handler in.
fn faulting(elf: &[u8]) -> Vec<u8> {
    let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let half = |at: usize| usize::from(u16::from_le_bytes([elf[at], elf[at + 1]]));
    // The PVH note: a name of four bytes, the length of the address, type 18, "Xen".
    let is_note = |w: &[u8]| w[..4] == [4, 0, 0, 0] && w[8..12] == [18, 0, 0, 0] && &w[12..] == b"Xen\0";
    let note = elf.windows(16).position(is_note);
    let note = note.unwrap() + 16;
    let entry = u64::from(u32::from_le_bytes(elf[note..note + 4].try_into().unwrap()));
    let (table, count) = (word(32) as usize, half(56));
    let at = (0..count).find_map(|n| {
        let header = table + n * 56;
        let (kind, offset, address, length) = (
            elf[header],
            word(header + 8),
            word(header + 24),
            word(header + 32),
        );
        (kind == 1 && (address..address + length).contains(&entry))
            .then(|| (entry - address + offset) as usize)
    });
    let mut faulting = elf.to_vec();
    let at = at.unwrap();
    faulting[at..at + 2].copy_from_slice(&[0x0f, 0x0b]);
    faulting
}

#[test]
fn a_second_vm_does_not_get_a_taken_name() {
    let world = World::new();
    let mut first = world.start(&[
        "run",
        "--name",
        "a",
        "--kernel",
        &world.ticker(),
        "--cmdline",
        "period_ms=5",
    ]);
    first.says("tick 0");
    let second = [
        "run",
        "--name",
        "a",
        "--kernel",
        &world.ticker(),
        "--store",
        &world.text("other"),
    ];
    world
        .vmm(&second)
        .refused(&["a VM named a runs here already", "--name", "vmm stop a"]);
    // The first is none the worse for it.
    let seen = last_tick(&first.stdout()).unwrap_or(0);
    first.says(&format!("tick {}", seen + 5));
    assert_eq!(world.row("a").unwrap()["state"], "running");
}

#[test]
fn what_a_killed_vm_left_is_shown_and_cleared() {
    let world = World::new();
    let run = [
        "run",
        "--name",
        "a",
        "--kernel",
        &world.ticker(),
        "--cmdline",
        "period_ms=5",
    ];
    let mut vm = world.start(&run);
    vm.says("tick 0");
    vm.signal("KILL");
    assert_eq!(vm.finish().code(), -1);
    assert!(
        world.run_dir().join("a/api.sock").exists(),
        "the socket of a killed process stays"
    );
    assert_eq!(world.row("a").unwrap()["state"], "dead");
    world
        .vmm(&["pause", "a"])
        .refused(&["VM a does not run any more", "vmm restore --name a"]);
    let mut again = world.start(&run);
    again.says("tick 0");
    wait_for("the VM to be shown as running", || {
        (world.row("a").unwrap()["state"] == "running").then_some(())
    });
}

#[test]
fn a_pipe_that_closes_does_not_end_the_guest() {
    let world = World::new();
    let script = format!(
        "{} run --name a --kernel {} --cmdline period_ms=5 2>/dev/null | head -n 2",
        env!("CARGO_BIN_EXE_vmm"),
        world.ticker()
    );
    let mut command = world.command("sh");
    command.args(["-c", &script]);
    let mut shell = crate::support::Running::new(command);
    shell.says("tick 0");
    let before = world.ticks("a").unwrap();
    wait_for("the guest to go on", || {
        (world.ticks("a")? > before + 5).then_some(())
    });
    world.vmm(&["stop", "a"]).ok();
    assert_eq!(shell.finish().code(), 0);
}
