//! Builds the two bare-metal guests with rustc itself, into OUT_DIR.
//!
//! There is no bare-metal target here, so the guests are compiled for the host's Linux target as static
//! executables without a C runtime: the linker script gives the layout, the assembly entry what `std` would.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const GUESTS: [&str; 2] = ["ticker", "churn"];
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // The whole folder: the guests share modules, the linker script and the assembly entry.
    println!("cargo::rerun-if-changed=guests");
    for guest in GUESTS {
        if let Err(error) = build(guest) {
            println!("cargo::error=cannot build the guest {guest}: {error}");
        }
    }
}

fn build(guest: &str) -> Result<(), Box<dyn Error>> {
    let sources = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("guests");
    let output = PathBuf::from(variable("OUT_DIR")?).join(format!("{guest}.elf"));
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(&rustc);
    command
        .current_dir(&sources)
        // Flags and wrappers that cargo set for ordinary crates (coverage, sanitizers, native CPU features)
        // have no place in a guest.
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .args([
            "--edition=2024",
            "--crate-type=bin",
            "--target",
            TARGET,
            "--crate-name",
            guest,
        ])
        .args([
            "-Copt-level=3",
            "-Cpanic=abort",
            "-Crelocation-model=static",
            "-Cstrip=debuginfo",
        ])
        // An exception at level 0 would write below the stack pointer; nothing ever unwinds.
        .args(["-Cno-redzone=yes", "-Cforce-unwind-tables=no"])
        .arg(format!("-Clink-args={}", link_arguments(&sources)))
        .arg("-o")
        .arg(&output)
        .arg(format!("{guest}.rs"));
    let run = command
        .output()
        .map_err(|error| format!("cannot start {}: {error}", rustc.display()))?;
    let messages = String::from_utf8_lossy(&run.stderr);
    if !run.status.success() {
        return Err(format!("{} ended with {}\n{messages}", rustc.display(), run.status).into());
    }
    for line in messages.lines() {
        println!("cargo::warning={guest}: {line}");
    }
    Ok(())
}

fn link_arguments(sources: &Path) -> String {
    format!(
        "-nostartfiles -nostdlib -static -no-pie -Wl,-T,{} -Wl,--build-id=none -Wl,-z,noexecstack",
        sources.join("guest.ld").display()
    )
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}, which cargo sets, is unusable: {error}"))
}
