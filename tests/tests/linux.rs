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

/// Some ten checkpoints a second while four vCPUs are started. Of four such boots one ended in a triple fault and one
/// stood still, where each of four without checkpoints came up: whose fault that is, ours, KVM's or that of the
/// processor it is emulated on, is not known yet.
#[test]
#[ignore = "known to fail: a guest that is checkpointed all the time while it boots does not always come up there"]
fn a_debian_guest_boots_under_constant_checkpoints() {
    whole_life("0");
}

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
    let output = Command::new(nested_host)
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
    assert!(
        output.status.success() && said.ends_with("all is well\n"),
        "{}\n{said}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
