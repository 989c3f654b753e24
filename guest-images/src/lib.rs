//! Guests for tests, demos and benchmarks. [`debian`] makes a Linux guest; two bare-metal guests are ready to be booted
//! through the PVH protocol:
//!
//! - [`TICKER`] prints `tick N` at a fixed period: it shows whether a guest runs, stood still or went back.
//! - [`CHURN`] writes memory at a given rate and for ever verifies all of it, and its registers: it shows
//!   whether a checkpoint lost anything.
//!
//! Both of these are static ELF64 images without relocations, loaded at 2 MiB, started in 32-bit protected mode at the
//! entry point that their PVH note names, with `hvm_start_info` in EBX. They talk over the serial port at 0x3f8.
//! Command lines and output are documented in `guests/cmdline.rs`, `guests/ticker.rs` and `guests/churn.rs`.
//!
//! What they expect of a monitor beyond that is little: 0x34 to port 0x600 (ACPI's "off"), or else 0xfe to port 0x64 (a
//! reset), ends the guest, and a 32-bit write of microseconds to port 0x0d80 lets its vCPU sleep that long at most (a monitor without it only pays
//! with a busy vCPU). Offering CPUID leaf 0x40000010 saves them 12 ms of measuring the TSC.
//!
//! They run their work at privilege level 3, so that they are fast also on a host whose KVM has neither VMX nor
//! SVM and emulates level 0 instruction by instruction.

use std::io;
use std::path::{Path, PathBuf};

pub mod cpio;
pub mod debian;

/// The guest that counts: one line a period.
pub static TICKER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ticker.elf"));

/// The guest that writes and verifies memory.
pub static CHURN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/churn.elf"));

/// The program that tortures a Linux guest, and is the other end of its stream: a static Linux executable.
pub static TORTURE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/torture"));

/// The program by which a Linux guest asks for a checkpoint of itself: a static Linux executable.
pub static CHECKPOINT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/understudy-checkpoint"));
/// What it is called.
pub const CHECKPOINT_NAME: &str = "understudy-checkpoint";

/// Every guest with the name of its file.
pub static ALL: [(&str, &[u8]); 2] = [("ticker.elf", TICKER), ("churn.elf", CHURN)];

/// Writes `ticker.elf` and `churn.elf` into `dir`, which must exist.
///
/// # Errors
/// Whatever the file system says about the first file that cannot be written.
pub fn write_all(dir: &Path) -> io::Result<()> {
    ALL.iter()
        .try_for_each(|(name, image)| std::fs::write(dir.join(name), image))
}

/// Writes `understudy-checkpoint` into `dir`, which must exist; where it is.
///
/// # Errors
/// Whatever the file system says.
pub fn write_checkpoint(dir: &Path) -> io::Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join(CHECKPOINT_NAME);
    std::fs::write(&path, CHECKPOINT)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

// The parts of the guests that are pure enough to run here, for the unit tests.
#[cfg(test)]
#[path = "../guests/clock.rs"]
mod clock;
#[cfg(test)]
#[path = "../guests/cmdline.rs"]
mod cmdline;
#[cfg(test)]
#[path = "../guests/content.rs"]
mod content;
#[cfg(test)]
#[path = "../guests/layout.rs"]
mod layout;
#[cfg(test)]
#[path = "../guests/port.rs"]
#[expect(dead_code, reason = "only the constants are of use here")]
mod port;
#[cfg(test)]
#[path = "../guests/registers.rs"]
mod registers;
#[cfg(test)]
mod tests;

// Never compiled here, only formatted: `cargo fmt` finds the guests through these lines.
#[cfg(any())]
#[path = "../guests/churn.rs"]
mod churn;
#[cfg(any())]
#[path = "../guests/ticker.rs"]
mod ticker;
