//! Builds the two bare-metal guests and the Linux guests' programs with rustc itself, into OUT_DIR.
//!
//! The programs are static executables with `std`: they run in an initramfs without libraries, and in any distribution.
//!
//! There is no bare-metal target here, so the guests are compiled for the host's Linux target as static
//! executables without a C runtime: the linker script gives the layout, the assembly entry what `std` would.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const GUESTS: [&str; 2] = ["ticker", "churn"];
/// The Linux programs: the folder of their source, and their names.
const PROGRAMS: [(&str, &str); 2] = [("torture", "torture"), ("checkpoint", "understudy-checkpoint")];
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // The whole folder: the guests share modules, the linker script and the assembly entry.
    println!("cargo::rerun-if-changed=guests");
    println!("cargo::rerun-if-changed=programs");
    for guest in GUESTS {
        if let Err(error) = guest_command(guest).and_then(run) {
            println!("cargo::error=cannot build the guest {guest}: {error}");
        }
    }
    for (folder, name) in PROGRAMS {
        if let Err(error) = program_command(folder, name).and_then(run) {
            println!("cargo::error=cannot build the program {name}: {error}");
        }
    }
}

/// rustc in `folder`, for the program `name` from `source`.
fn rustc(folder: &Path, name: &str, source: &str, output: &Path) -> Command {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(rustc);
    command
        .current_dir(folder)
        // Flags and wrappers that cargo set for ordinary crates (coverage, sanitizers, native CPU features)
        // have no place in a guest.
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .args(["--edition=2024", "--crate-type=bin", "--target", TARGET])
        .args(["--crate-name", name, "-Cpanic=abort", "-o"])
        .arg(output)
        .arg(source);
    command
}

fn program_command(folder: &str, name: &str) -> Result<Command, Box<dyn Error>> {
    let folder = PathBuf::from(variable("CARGO_MANIFEST_DIR")?)
        .join("programs")
        .join(folder);
    let output = PathBuf::from(variable("OUT_DIR")?).join(name);
    let mut command = rustc(&folder, &name.replace('-', "_"), "main.rs", &output);
    command
        .args(["-Copt-level=2", "-Ctarget-feature=+crt-static", "-Cstrip=symbols"])
        // The same program wherever the sources lie.
        .arg(format!("--remap-path-prefix={}=.", folder.display()))
        .arg("-Clink-args=-Wl,--build-id=none");
    Ok(command)
}

fn guest_command(guest: &str) -> Result<Command, Box<dyn Error>> {
    let sources = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("guests");
    let output = PathBuf::from(variable("OUT_DIR")?).join(format!("{guest}.elf"));
    let mut command = rustc(&sources, guest, &format!("{guest}.rs"), &output);
    command
        .args(["-Copt-level=3", "-Crelocation-model=static", "-Cstrip=debuginfo"])
        // An exception at level 0 would write below the stack pointer; nothing ever unwinds.
        .args(["-Cno-redzone=yes", "-Cforce-unwind-tables=no"])
        .arg(format!("-Clink-args={}", link_arguments(&sources)));
    Ok(command)
}

fn run(mut command: Command) -> Result<(), Box<dyn Error>> {
    let run = command
        .output()
        .map_err(|error| format!("cannot start {}: {error}", command.get_program().display()))?;
    let messages = String::from_utf8_lossy(&run.stderr);
    if !run.status.success() {
        return Err(format!("{command:?} ended with {}\n{messages}", run.status).into());
    }
    for line in messages.lines() {
        println!("cargo::warning={line}");
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
