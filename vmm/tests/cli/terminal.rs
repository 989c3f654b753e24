//! On a terminal: `script` (util-linux) gives the command one.

use std::process::Stdio;

use crate::support::{Running, World};

/// Runs a shell line on a terminal of its own.
fn on_a_terminal(world: &World, line: &str) -> Running {
    let mut command = world.command("script");
    command.args(["-qec", line, "/dev/null"]).stdin(Stdio::piped());
    Running::new(command)
}

const THEN_SHOW_THE_TERMINAL: &str = "echo status=$?; stty -a; echo shown";

#[track_caller]
fn is_as_before(text: &str) {
    let settings: Vec<&str> = text.split([' ', ';', '\r', '\n']).collect();
    for setting in ["icanon", "isig", "echo", "icrnl", "ixon"] {
        assert!(settings.contains(&setting), "{setting} is not set again: {text}");
    }
}

#[test]
fn ctrl_a_x_ends_the_vm_and_the_terminal_is_as_before() {
    let world = World::new();
    let vmm = env!("CARGO_BIN_EXE_vmm");
    let line = format!(
        "{vmm} run --name a --kernel {} --cmdline period_ms=10; {THEN_SHOW_THE_TERMINAL}",
        world.ticker()
    );
    let mut shell = on_a_terminal(&world, &line);
    shell.says("tick 3");
    // Raw: what the terminal would make a signal of is the guest's.
    shell.write(b"typed\x03\x1a");
    let seen = world.ticks("a").unwrap();
    shell.says(&format!("tick {}", seen + 5));
    shell.write(b"\x01x");
    shell.says("shown");
    let text = shell.stdout();
    assert!(text.contains("status=0"), "{text}");
    is_as_before(&text);
}

#[test]
fn a_signal_leaves_the_terminal_as_before() {
    let world = World::new();
    let vmm = env!("CARGO_BIN_EXE_vmm");
    let line = format!(
        "{vmm} run --name a --kernel {} --cmdline period_ms=10; {THEN_SHOW_THE_TERMINAL}",
        world.ticker()
    );
    let mut shell = on_a_terminal(&world, &line);
    shell.says("tick 3");
    let pid = world.row("a").unwrap()["status"]["pid"].as_u64().unwrap();
    crate::support::kill(pid, "TERM");
    shell.says("shown");
    is_as_before(&shell.stdout());
}

#[test]
fn ctrl_a_x_leaves_a_console_and_the_vm_runs_on() {
    let world = World::new();
    world.detached("a", "period_ms=10");
    let line = format!(
        "{} console a; {THEN_SHOW_THE_TERMINAL}",
        env!("CARGO_BIN_EXE_vmm")
    );
    let mut shell = on_a_terminal(&world, &line);
    shell.says("Ctrl-A x leaves");
    shell.says("tick 3");
    shell.write(b"\x01");
    shell.write(b"x");
    shell.says("shown");
    assert!(shell.stdout().contains("status=0"), "{}", shell.stdout());
    is_as_before(&shell.stdout());
    assert_eq!(world.row("a").unwrap()["state"], "running");
}
