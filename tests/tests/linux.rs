//! A Debian guest on a complete KVM: booted with four vCPUs, checkpointed while it boots and after, restored, restarted.
//! All in one emulated host, for each of those costs seconds; what is done there is in `linux.sh`.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::ffi::OsStr;
use std::path::Path;

use guest_images::debian::{Image, Packages, cache};
use understudy_tests::emulated::{script, until_well};

#[test]
fn a_debian_guest_boots_is_restored_keeps_its_time_and_restarts() {
    whole_life("2");
}

/// Some ten checkpoints a second while four vCPUs are started.
#[test]
#[ignore = "the emulated processor fails too often under that much work: see src/emulated.rs"]
fn a_debian_guest_boots_under_constant_checkpoints() {
    whole_life("0");
}

/// The wall clock, compared with the host's in the guest, after a gap of a minute: on both clock sources, with catch-up.
#[test]
#[ignore = "two gaps of a minute: scripts/test --run-ignored only linux"]
fn a_guests_clocks_are_right_within_50_ms_after_a_minute() {
    let image = image();
    let said = emulated(
        "2G",
        // Its own shell has an `ip` of its own.
        "bash",
        include_str!("clock.sh"),
        &[&image.bzimage, &image.initramfs, &image.torture],
        &["60"],
    );
    println!("{said}");
}

/// Memory on both sides of the hole below 4 GiB.
#[test]
#[ignore = "a large guest: scripts/test --run-ignored only linux"]
fn a_guest_with_6_gib_boots_and_is_restored() {
    large("1", "6G");
}

#[test]
#[ignore = "the emulated processor takes minutes to start so many: scripts/test --run-ignored only linux"]
fn a_guest_with_32_vcpus_boots_and_is_restored() {
    large("32", "512M");
}

fn large(cpus: &str, memory: &str) {
    let image = image();
    let files = [image.bzimage.as_path(), &image.initramfs];
    println!(
        "{}",
        emulated("8G", "sh", include_str!("large.sh"), &files, &[cpus, memory])
    );
}

fn image() -> Image {
    let cache = cache().unwrap();
    Image::build(&cache.join("debian"), &Packages::new(cache.join("packages"))).unwrap()
}

/// `pace`: seconds between the checkpoints of the boot.
fn whole_life(pace: &str) {
    let image = image();
    emulated(
        "2G",
        "sh",
        include_str!("linux.sh"),
        &[&image.bzimage, &image.initramfs],
        &[pace],
    );
}

/// Runs the script in that shell with those files and those last words in an emulated host of so much memory; what it said.
fn emulated(memory: &str, shell: &str, text: &str, files: &[&Path], last: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let script = script(folder.path(), text);
    let mut command = vec![OsStr::new(shell), script.as_os_str()];
    command.extend(files.iter().map(|file| file.as_os_str()));
    command.extend(last.iter().map(OsStr::new));
    until_well(memory, &[files, &[&script]].concat(), &command)
}
