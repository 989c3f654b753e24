//! A client library for Firecracker's API, from PyPI, drives a Debian guest with a disk and a network card: in the emulated host,
//! by `firecracker_client.py`.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_images::debian::{Image, Packages, cache};
use understudy_tests::emulated::{Trust, until_well};

/// What the client's interpreter consists of: itself, its environment, its modules. Each is to be there at its own path; the
/// libraries are found by `nested-host`.
const PARTS: &str = "
import os, sys, sysconfig
print(sys.executable)
print(os.path.join(sys.prefix, 'pyvenv.cfg'))
print(sysconfig.get_path('purelib'))
stdlib = sysconfig.get_path('stdlib')
for name in os.listdir(stdlib):
    if name not in ['test', 'site-packages', 'idlelib', 'ensurepip'] and not name.startswith('config-'):
        print(os.path.join(stdlib, name))
";

/// The interpreter of the environment that `scripts/test` makes.
fn client() -> PathBuf {
    let made = match std::env::var_os("FIRECRACKER_CLIENT") {
        Some(folder) => PathBuf::from(folder),
        None => cache().unwrap().with_file_name("firecracker-client"),
    };
    let python = made.join("bin/python3");
    assert!(
        python.exists(),
        "{} is missing: scripts/test makes it, or FIRECRACKER_CLIENT names a Python environment with firecracker-python",
        python.display()
    );
    python
}

#[test]
#[ignore = "a boot more, and the emulated host may fail: scripts/test --run-ignored only firecracker_client"]
fn a_client_library_of_firecrackers_runs_a_guest_and_restores_it() {
    let cache = cache().unwrap();
    let image = Image::build(&cache.join("debian"), &Packages::new(cache.join("packages"))).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("client.py");
    std::fs::write(&script, include_str!("firecracker_client.py")).unwrap();
    let python = client();
    let parts = Command::new(&python).args(["-c", PARTS]).output().unwrap();
    assert!(
        parts.status.success(),
        "{}",
        String::from_utf8_lossy(&parts.stderr)
    );
    let parts = String::from_utf8(parts.stdout).unwrap();
    let files = [&script, &image.bzimage, &image.initramfs, &image.torture].map(PathBuf::as_path);
    let shared: Vec<&Path> = parts.lines().map(Path::new).chain(files).collect();
    let command = [[python.as_path()].as_slice(), &files].concat();
    let command: Vec<&OsStr> = command.into_iter().map(Path::as_os_str).collect();
    println!("{}", until_well("2G", Trust::Emulation, &shared, &command));
}
