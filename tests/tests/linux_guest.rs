//! The Debian guest image in QEMU's emulator, and the emulated KVM host. One boot a test; the slow ones are ignored:
//! `scripts/test --run-ignored only linux_guest` runs them.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use guest_images::debian::{Image, Packages, cache};

/// Seconds after which `timeout` ends what hangs.
const DEADLINE: &str = "300";

fn image(dir: &Path) -> Image {
    let packages = Packages::new(cache().unwrap().join("packages"));
    Image::build(dir, &packages).unwrap()
}

fn nested_host(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command
        .args(["--signal=KILL", DEADLINE])
        .arg(env!("CARGO_BIN_EXE_nested-host"));
    command.args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{said}\n{errors}",
        output.status
    );
    said
}

/// The largest value of `key=` in the lines that start with `start`.
fn total(text: &str, start: &str, key: &str) -> u64 {
    let lines = text.lines().filter(|line| line.starts_with(start));
    let values = lines.flat_map(|line| line.split_whitespace()).filter_map(|word| {
        let (name, value) = word.split_once('=')?;
        (name == key).then(|| value.trim().parse().unwrap())
    });
    values.max().unwrap_or(0)
}

#[test]
fn the_debian_guest_comes_up_and_its_torture_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir.path().join("guest"));
    let disk = dir.path().join("disk");
    File::create(&disk).unwrap().set_len(32 << 20).unwrap();
    run(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&disk));
    let console = run(Command::new("timeout")
        .args(["--signal=KILL", DEADLINE, "qemu-system-x86_64"])
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "256M",
        ])
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .arg("-kernel")
        .arg(&image.bzimage)
        .arg("-initrd")
        .arg(&image.initramfs)
        .arg("-append")
        .arg("console=ttyS0 quiet panic=-1 us.run=torture us.seconds=5 us.disk=vda us.mib=8 us.records=512")
        .arg("-drive")
        .arg(format!(
            "if=virtio,format=raw,cache=unsafe,file={}",
            disk.display()
        ))
        .args(["-device", "virtio-rng-pci", "-device", "virtio-balloon-pci"]));
    assert!(console.contains("us: up kernel="), "{console}");
    assert!(console.contains("torture done bad=0"), "{console}");
    assert!(!console.contains("BAD "), "{console}");
    for (worker, count) in [
        ("torture disk", "synced"),
        ("torture disk", "verified"),
        ("torture memory", "checked"),
        ("torture registers-0", "stretches"),
        ("torture registers-1", "stretches"),
        ("torture timers-1", "expiries"),
        ("torture dmesg", "lines"),
    ] {
        assert!(
            total(&console, worker, count) > 0,
            "{worker} did nothing: {console}"
        );
    }
    // What the guest was told to be on disk is there, to be found from outside.
    let records = dir.path().join("records");
    run(Command::new("debugfs")
        .arg("-R")
        .arg(format!("dump /records {}", records.display()))
        .arg(&disk));
    run(Command::new("e2fsck").arg("-fn").arg(&disk));
    let check = |file: &Path| {
        Command::new(&image.torture)
            .arg("check")
            .arg(format!("file={}", file.display()))
            .output()
    };
    let found = String::from_utf8(check(&records).unwrap().stdout).unwrap();
    assert!(
        total(&found, "records", "newest") >= total(&console, "torture disk", "synced"),
        "{found}"
    );
    // A lost record is seen.
    let mut bytes = std::fs::read(&records).unwrap();
    bytes[4096 + 100] ^= 1;
    std::fs::write(&records, bytes).unwrap();
    assert!(
        !check(&records).unwrap().status.success(),
        "a damaged record passed"
    );
}

#[test]
fn the_same_parts_give_the_same_image() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (image(&dir.path().join("one")), image(&dir.path().join("two")));
    assert_eq!(one.id, two.id);
    for (one, two) in [(&one.initramfs, &two.initramfs), (&one.vmlinux, &two.vmlinux)] {
        assert!(
            std::fs::read(one).unwrap() == std::fs::read(two).unwrap(),
            "{} differs",
            one.display()
        );
    }
    // Made before: nothing is written again.
    let before = std::fs::metadata(&one.initramfs).unwrap().modified().unwrap();
    let again = image(&dir.path().join("one"));
    assert_eq!(
        std::fs::metadata(again.initramfs).unwrap().modified().unwrap(),
        before
    );
}

#[test]
fn a_command_in_the_emulated_host_has_its_output_status_and_kvm() {
    let dir = tempfile::tempdir().unwrap();
    let results = dir.path().join("results");
    let script = "echo out; echo err >&2; vmm --version; echo kept >/results/file; [ -c /dev/kvm ] && exit 7";
    let output = nested_host(&["--results", results.to_str().unwrap(), "sh", "-c", script]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{errors}");
    assert!(
        output.stdout.starts_with(b"out\nvmm "),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    // It may have had to start the host again, which it tells.
    let errors: Vec<&str> = errors
        .lines()
        .filter(|line| !line.starts_with("nested-host: host 1 "))
        .collect();
    assert_eq!(errors, ["err"]);
    assert_eq!(std::fs::read_to_string(results.join("file")).unwrap(), "kept\n");
}

#[test]
#[ignore = "a boot more: scripts/test --run-ignored only linux_guest"]
fn a_command_that_hangs_ends_with_the_console() {
    let output = nested_host(&["--timeout", "2s", "sleep", "1000"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(124), "{errors}");
    assert!(errors.contains("the last lines of its console"), "{errors}");
    assert!(errors.contains("took longer than 2 s"), "{errors}");
}

#[test]
#[ignore = "two boots more: scripts/test --run-ignored only linux_guest"]
fn two_emulated_hosts_reach_each_other_and_one_may_die() {
    let script = "on-host 2 sh -c 'uname -n; exit 5'; echo status $?; echo through | on-host 2 cat; \
        ping -c 1 -w 60 10.77.0.2 >/dev/null && echo pinged; on-host 2 --crash && echo crashed; \
        on-host 2 true || echo gone";
    let output = nested_host(&["--hosts", "2", "sh", "-c", script]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(said, "host-2\nstatus 5\nthrough\npinged\ncrashed\ngone\n");
}

#[test]
#[ignore = "a guest in the emulated host: scripts/test --run-ignored only linux_guest"]
fn a_guest_of_the_emulated_kvm_keeps_its_memory_and_its_avx_registers() {
    let dir = tempfile::tempdir().unwrap();
    guest_images::write_all(dir.path()).unwrap();
    let kernel = dir.path().join("churn.elf");
    let script = format!(
        "vmm run --name churn --kernel {} --memory 128M --cpus 1 --store /tmp/store --run-dir /tmp/run \
         --cmdline 'mib=32 exit_after_beats=20' </dev/null",
        kernel.display()
    );
    let output = nested_host(&["--share", kernel.to_str().unwrap(), "sh", "-c", &script]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("avx=1"), "{said}");
    assert!(total(&said, "churn beat=", "regs") > 0, "{said}");
    assert_eq!(total(&said, "churn beat=", "bad"), 0, "{said}");
    assert!(!said.contains("FAULT"), "{said}");
}
