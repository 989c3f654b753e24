//! A Debian guest on a complete KVM: booted with four vCPUs, checkpointed while it boots and after, restored, restarted.
//! All in one emulated host, for each of those costs seconds; what is done there is in `linux.sh`.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::path::Path;
use std::process::Command;

use guest_images::debian::{Image, Packages, cache};
use understudy_tests::harness::Binaries;

#[test]
fn a_debian_guest_boots_is_restored_keeps_its_time_and_restarts() {
    whole_life("2");
}

/// Some ten checkpoints a second while four vCPUs are started.
#[test]
#[ignore = "the emulated processor fails too often under that much work: see ATTEMPTS"]
fn a_debian_guest_boots_under_constant_checkpoints() {
    whole_life("0");
}

/// The emulated processor does not always do as a real one. Of 47 boots of a guest with four vCPUs that nothing paused and
/// of which no checkpoint was taken, while the host it ran on was kept busy by other processes, one hung, one ended in a
/// triple fault and one took the whole emulated host with it; with checkpoints all the time the host's kernel was
/// seen to find its own stack overwritten. So what is over for such a reason is tried again, and told; whatever
/// else is wrong is wrong at once, and what we do wrong each time fails each time.
const ATTEMPTS: u32 = 3;
/// The script's status for such an end.
const EMULATION: i32 = 75;

/// `pace`: seconds between the checkpoints of the boot.
fn whole_life(pace: &str) {
    let cache = cache().unwrap();
    let image = Image::build(&cache.join("debian"), &Packages::new(cache.join("packages"))).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("linux.sh");
    std::fs::write(&script, include_str!("linux.sh")).unwrap();
    let vmm = Binaries::find().unwrap().vmm;
    let nested_host = vmm.with_file_name("nested-host");
    let share = |path: &Path| ["--share".into(), path.as_os_str().to_owned()];
    for left in (0..ATTEMPTS).rev() {
        let output = Command::new(&nested_host)
            .args(["--timeout", "10m"])
            .args(share(&image.bzimage))
            .args(share(&image.initramfs))
            .args(share(&script))
            .arg("sh")
            .args([&script, &image.bzimage, &image.initramfs])
            .arg(pace)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        if output.status.success() && said.ends_with("all is well\n") {
            return;
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        let emulation =
            output.status.code() == Some(EMULATION) || errors.contains("ended while the command ran on it");
        assert!(emulation && left > 0, "{}\n{said}\n{errors}", output.status);
        eprintln!(
            "the emulated host failed, {left} attempts left: {}\n{said}\n{errors}",
            output.status
        );
    }
}
