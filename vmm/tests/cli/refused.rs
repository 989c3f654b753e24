//! Bad input: one clear line, a status that is not 0, nothing left behind.

use crate::support::World;

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
