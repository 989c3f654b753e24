//! Bad input: one clear line, a status that is not 0, nothing left behind.

use crate::support::{Running, World, wait_for};

#[test]
fn each_mistake_has_its_message() {
    let world = World::new();
    let ticker = world.ticker();
    let big = world.text("big.img");
    std::fs::File::create(&big).unwrap().set_len(64 << 20).unwrap();
    let cut = world.text("cut.elf");
    std::fs::write(&cut, &guest_images::TICKER[..100]).unwrap();
    let config = world.text("config.json");
    std::fs::write(
        &config,
        r#"{"boot-source": {"kernel_image_path": "k"}, "drives": [{"drive_id": "r"}]}"#,
    )
    .unwrap();
    let typo = world.text("typo.json");
    std::fs::write(
        &typo,
        r#"{"machine-config": {"vcpu_count": 1, "mem_size_mb": 64}}"#,
    )
    .unwrap();
    let broken = world.text("broken.json");
    std::fs::write(&broken, "{\"name\": ").unwrap();
    let long = format!("/tmp/{}", "a".repeat(110));
    let base = ["run", "--name", "x"];
    for (args, parts) in [
        (vec![], vec!["no kernel", "--kernel"]),
        (
            vec!["--kernel", "/nonexistent"],
            vec!["read kernel", "/nonexistent", "No such file"],
        ),
        (
            vec!["--kernel", "/etc/hostname"],
            vec!["/etc/hostname", "not a kernel", "PVH"],
        ),
        (vec!["--kernel", &cut], vec!["cut.elf", "not a kernel"]),
        (vec!["--kernel", "/tmp"], vec!["not a regular file"]),
        (
            vec!["--kernel", &ticker, "--memory", "2M"],
            vec!["mem_size_mib", "2 MiB", "4 to"],
        ),
        (
            vec!["--kernel", &ticker, "--memory", "16M", "--initrd", &big],
            vec!["too little", "--memory"],
        ),
        (
            vec!["--kernel", &ticker, "--initrd", "/nonexistent"],
            vec!["read initrd", "/nonexistent"],
        ),
        (
            vec!["--kernel", &ticker, "--cpus", "0"],
            vec!["vcpu_count", "1 to 32"],
        ),
        (
            vec!["--kernel", &ticker, "--cpus", "33"],
            vec!["vcpu_count", "1 to 32"],
        ),
        (vec!["--kernel", &ticker, "--every", "5ms"], vec!["--protect-to"]),
        (
            vec!["--kernel", &ticker, "--protect-to", ""],
            vec!["--protect-to", "empty holder", "HOST:PORT"],
        ),
        (
            vec!["--kernel", &ticker, "--protect-to", ","],
            vec!["--protect-to", "empty holder"],
        ),
        (
            vec!["--kernel", &ticker, "--protect-to", "127.0.0.1:1, "],
            vec!["--protect-to", "empty holder"],
        ),
        (vec!["--initrd", &big], vec!["--kernel"]),
        (vec!["--config", &config], vec!["drives", "path_on_host"]),
        (vec!["--config", &typo], vec!["typo.json", "mem_size_mb"]),
        (vec!["--config", &broken], vec!["broken.json", "line 1"]),
        (
            vec!["--config", "/nonexistent"],
            vec!["configuration file", "/nonexistent"],
        ),
        (
            vec!["--kernel", &ticker, "--api-sock", &big],
            vec!["not a socket", "choose another path"],
        ),
        (
            vec!["--kernel", &ticker, "--api-sock", &long],
            vec!["107", "--api-sock"],
        ),
        (
            vec!["--kernel", &ticker, "--api-sock", "/nonexistent/a"],
            vec!["/nonexistent/a"],
        ),
        (
            vec!["--kernel", &ticker, "--console-log", "/nonexistent/a"],
            vec!["/nonexistent/a"],
        ),
        (
            vec![
                "--kernel",
                &ticker,
                "--protect-to",
                "127.0.0.1:1",
                "--insecure-plaintext",
            ],
            vec!["0 of 1 holders", "127.0.0.1:1", "standby serve"],
        ),
    ] {
        world
            .vmm(&[base.as_slice(), args.as_slice()].concat())
            .refused(&parts);
    }
    assert!(
        !std::path::Path::new(&big)
            .metadata()
            .unwrap()
            .file_type()
            .is_socket(),
        "the file is still there"
    );
    world
        .vmm(&["run", "--kernel", &ticker])
        .refused(&["no name", "--name"]);
    world
        .vmm(&["run", "--kernel", &ticker, "--name", "Web"])
        .refused(&["Web", "a-z"]);
    world.vmm(&["restore"]).refused(&["nothing to restore"]);
    world
        .vmm(&["restore", "--name", "gone"])
        .refused(&["gone", "no whole chain"]);
    world
        .vmm(&["restore", "--from", "/nonexistent", "gone"])
        .refused(&["/nonexistent"]);
    world
        .vmm(&["restore", "--segment", "gone/1/1"])
        .refused(&["gone"]);
    world
        .vmm(&["restore", &ticker])
        .refused(&["ticker.elf", "not a segment"]);
    world
        .vmm(&["inspect", &ticker])
        .refused(&["ticker.elf", "not a segment"]);
    world.vmm(&["inspect", "gone"]).refused(&["no VM named gone"]);
    world.vmm(&["inspect", "gone/1/1"]).refused(&["gone"]);
    world.vmm(&["pause", "../run"]).refused(&["no VM named ../run"]);
    let left: Vec<_> = std::fs::read_dir(world.run_dir()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

use std::os::unix::fs::FileTypeExt;

#[test]
fn a_command_line_that_makes_no_sense_has_status_2() {
    let world = World::new();
    for args in [
        &["run", "--memory", "256"][..],
        &["run", "--memory", "lots"],
        &["run", "--memory", "1500K"],
        &["run", "--every", "5"],
        &["run", "--nonsense"],
        &["restore", "--segment", "web"],
        &["frobnicate"],
        &[],
    ] {
        let said = world.vmm(args);
        assert_eq!(said.code(), 2, "{args:?}: {said:?}");
    }
}

#[test]
fn a_store_in_use_is_refused() {
    let world = World::new();
    world.detached("a", "period_ms=5");
    let store = world.text("state/understudy/vms/a");
    let args = [
        "run",
        "--name",
        "b",
        "--kernel",
        &world.ticker(),
        "--store",
        &store,
    ];
    world.vmm(&args).refused(&["store", &store]);
    assert_eq!(world.row("a").unwrap()["state"], "running");
}

/// `vmm` that sees an empty file system of so many MiB at `at`, and nobody else does.
fn beside_a_mount(world: &World, at: &str, mib: u32, args: &[&str]) -> Running {
    let mut command = world.command("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "--", "sh", "-c"]);
    let mount = format!("mount -t tmpfs -o size={mib}m none \"$0\" && exec \"$@\"");
    command.args([&mount, at, env!("CARGO_BIN_EXE_vmm")]).args(args);
    Running::new(command)
}

#[test]
fn a_host_without_kvm_is_told_what_it_needs() {
    let world = World::new();
    let kernel = world.ticker();
    let parts = ["/dev/kvm does not exist", "kvm-intel or kvm-amd"];
    let without = |args: &[&str]| beside_a_mount(&world, "/dev", 1, args).finish();
    without(&["run", "--name", "a", "--kernel", &kernel]).refused(&parts);
    assert_eq!(world.row("a"), None, "something is left of it");
    // The same VM where there is one.
    world.detached("a", "period_ms=5");
    world.vmm(&["pause", "a"]).ok();
    world.vmm(&["checkpoint", "a"]).ok();
    world.vmm(&["stop", "a"]).ok();
    without(&["restore", "--name", "a"]).refused(&parts);
    without(&["restore", "--check", "a"]).refused(&parts);
    let said = world.vmm(&["restore", "--name", "a", "--detach"]).ok();
    assert!(said.starts_with("a: running from a/1/1"), "{said}");
}

#[test]
fn a_full_disk_costs_the_checkpoint_and_nothing_else() {
    let world = World::new();
    let store = world.text("state/understudy/vms/a");
    std::fs::create_dir_all(&store).unwrap();
    let (kernel, cmdline) = (world.churn(), "mib=4 rate=200 mix=0:0:100 heartbeat_ms=20");
    let args = [
        "run",
        "--name",
        "a",
        "--kernel",
        &kernel,
        "--memory",
        "32M",
        "--cmdline",
        cmdline,
    ];
    let mut vm = beside_a_mount(&world, &store, 48, &args);
    vm.says("churn filled");
    world.vmm(&["checkpoint", "a"]).ok();
    // The file system as the process sees it, filled to its last byte.
    let inside = format!("/proc/{}/root{store}", vm.pid());
    let filler = format!("{inside}/filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write(&mut file, &[1; 1 << 12]).is_ok_and(|written| written > 0) {}
    let refused = world.vmm(&["checkpoint", "a", "--full"]);
    refused.refused(&["full", &store]);
    let row = world.row("a").unwrap();
    assert_eq!(row["state"], "running");
    assert!(
        row["status"]["problem"].as_str().unwrap().contains("full"),
        "{row}"
    );
    // Closed as well: what is open takes its room still.
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    let said = world.vmm(&["checkpoint", "a"]).ok();
    assert!(said.starts_with("a/1/3: delta"), "{said}");
    assert_eq!(world.row("a").unwrap()["status"].get("problem"), None);
    // The delta has what the failed checkpoint had taken from the set of changed pages: the guest checks all it has.
    world
        .vmm(&[
            "restore", "a/1/3", "--from", &inside, "--name", "copy", "--detach",
        ])
        .ok();
    wait_for("the copy to check its memory twice", || {
        let console = world.console("copy");
        assert!(!console.contains("BAD"), "{console}");
        // The last line may not be whole yet.
        let (whole, _) = console.rsplit_once('\n')?;
        let checked = |line: &str| {
            let (_, rest) = line.split_once("verified=")?;
            rest.split(' ').next()?.parse::<u64>().ok()
        };
        let counts: Vec<u64> = whole.lines().filter_map(checked).collect();
        (counts.last()? - counts.first()? > 2048).then_some(())
    });
    world.vmm(&["stop", "copy"]).ok();
    world.vmm(&["stop", "a"]).ok();
    assert_eq!(vm.finish().code(), 0);
}
