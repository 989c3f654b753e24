//! Debian guests on a complete KVM, in emulated hosts: booted, checkpointed while they boot and after, restored, restarted.
//! What is done there is in the scripts: few of them, for each host costs seconds.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::ffi::OsStr;
use std::path::Path;

use guest_images::debian::{Image, Packages, cache};
use understudy_tests::emulated::{Trust, script, until_well};

#[test]
fn a_debian_guest_boots_is_restored_keeps_its_time_and_restarts() {
    whole_life("1", "2");
}

#[test]
fn a_debian_guest_with_four_vcpus_boots_and_is_restored() {
    beating(Trust::Nothing, include_str!("four.sh"), &[]);
}

#[test]
#[ignore = "the emulated processor fails too often under that much work: see src/emulated.rs"]
fn a_debian_guest_with_four_vcpus_lives_as_long() {
    whole_life("4", "2");
}

/// Some ten checkpoints a second while four vCPUs are started.
#[test]
#[ignore = "the emulated processor fails too often under that much work: see src/emulated.rs"]
fn a_debian_guest_boots_under_constant_checkpoints() {
    whole_life("4", "0");
}

/// The wall clock, compared with the host's in the guest, after a gap of a minute: on both clock sources, with catch-up.
#[test]
#[ignore = "two gaps of a minute: scripts/test --run-ignored only linux"]
fn a_guests_clocks_are_right_within_50_ms_after_a_minute() {
    let image = image();
    let said = emulated(
        "2G",
        Trust::Emulation,
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
        emulated(
            "8G",
            Trust::Emulation,
            "sh",
            include_str!("large.sh"),
            &files,
            &[cpus, memory]
        )
    );
}

fn image() -> Image {
    let cache = cache().unwrap();
    Image::build(&cache.join("debian"), &Packages::new(cache.join("packages"))).unwrap()
}

/// `pace`: seconds between the checkpoints of the boot.
fn whole_life(cpus: &str, pace: &str) {
    beating(Trust::Emulation, include_str!("linux.sh"), &[cpus, pace]);
}

/// Behind what lets a guest beat.
fn beating(trust: Trust, text: &str, last: &[&str]) {
    let image = image();
    let text = [include_str!("beating.sh"), "\n", text].concat();
    emulated(
        "2G",
        trust,
        "sh",
        &text,
        &[&image.bzimage, &image.initramfs],
        last,
    );
}

/// Runs the script in that shell with those files and those last words in an emulated host of so much memory; what it said.
fn emulated(memory: &str, trust: Trust, shell: &str, text: &str, files: &[&Path], last: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let script = script(folder.path(), text);
    let mut command = vec![OsStr::new(shell), script.as_os_str()];
    command.extend(files.iter().map(|file| file.as_os_str()));
    command.extend(last.iter().map(OsStr::new));
    until_well(memory, trust, &[files, &[&script]].concat(), &command)
}
