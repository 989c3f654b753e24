//! What the tests of real guests share.
#![allow(dead_code)] // Each test binary uses its part.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmm::boot::BootSource;
use vmm::cpuid::baseline::CpuModel;
use vmm::outbox::Outbox;
use vmm::session::SessionConfig;
use vmm::vm::MachineConfig;

/// How long a test waits for a guest before it says that the guest hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The guests' files.
pub(crate) struct Guests(tempfile::TempDir);

impl Guests {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        guest_images::write_all(dir.path()).unwrap();
        Self(dir)
    }

    pub(crate) fn source(&self, name: &str, command_line: &str) -> BootSource {
        BootSource {
            kernel: self.path(name),
            initrd: None,
            command_line: command_line.into(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(format!("{name}.elf"))
    }
}

/// Waits for `found` to see what it looks for in the console's text.
pub(crate) fn wait_for<T>(outbox: &Outbox, found: impl Fn(&str) -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    let (mut text, mut position) = (String::new(), 0);
    loop {
        let output = outbox.read(position, Duration::from_millis(100));
        position = output.next;
        text.push_str(&String::from_utf8_lossy(&output.bytes));
        if let Some(value) = found(&text) {
            return value;
        }
        assert!(
            Instant::now() < deadline && !output.closed,
            "the guest said only:\n{text}"
        );
    }
}

/// One vCPU and so many MiB.
pub(crate) fn small(mib: u64) -> MachineConfig {
    MachineConfig {
        memory_bytes: mib << 20,
        vcpus: 1,
        cpu: CpuModel::Host,
    }
}

/// An unprotected VM with a store of its own.
pub(crate) fn config(name: &str, store: &Path) -> SessionConfig {
    SessionConfig {
        name: name.parse().unwrap(),
        store: store.to_owned(),
        store_budget: None,
        checkpoints: Default::default(),
        protection: None,
        generation: None,
        trust: Default::default(),
        // Here "web" is many a VM.
        second_copy: true,
        keys: Default::default(),
    }
}

/// A counter of `churn`'s newest heartbeat, `name=N`.
pub(crate) fn counter(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .rfind(|line| line.starts_with("churn beat=") && line.contains("up_ms="))?;
    line.split(' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}
