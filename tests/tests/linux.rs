//! A Debian guest on a complete KVM: booted with four vCPUs, checkpointed while it boots and after, restored, restarted.
//! All in one emulated host, for each of those costs seconds; what is done there is in `linux.sh`.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::path::Path;
use std::process::Command;

use guest_images::debian::{Image, Packages, cache};
use understudy_tests::harness::Binaries;

#[test]
fn a_debian_guest_boots_is_restored_keeps_its_time_and_restarts() {
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
