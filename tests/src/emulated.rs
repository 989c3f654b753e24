//! Tests whose work is a script in an emulated host, until all is well.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::Binaries;

/// The emulated processor does not always do as a real one. Of 47 boots of a guest with four vCPUs that nothing paused and
/// of which no checkpoint was taken, while the host it ran on was kept busy by other processes, one hung, one ended in a
/// triple fault and one took the whole emulated host with it; with checkpoints all the time the host's kernel was
/// seen to find its own stack overwritten. On another machine three lives of some minutes in a row failed, each in
/// another way. Guests of one vCPU were not seen to fail so. What we do wrong each time fails each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// What is over for a reason that is known to be the emulation's is tried again, and told; whatever else is wrong is
    /// wrong at once.
    Emulation,
    /// Four vCPUs, for a minute: whatever is wrong is told and tried again.
    Nothing,
}

impl Trust {
    /// How often it is tried, and for how long at most.
    fn tries(self) -> (u32, &'static str) {
        match self {
            Self::Emulation => (4, "10m"),
            Self::Nothing => (6, "5m"),
        }
    }
}

/// The script's status for an end that is known to be the emulation's.
const EMULATION: i32 = 75;

/// Runs `command` in an emulated host of so much memory, which has the files `share` too, until its last words are that all is
/// well; what it said.
///
/// # Panics
/// When it ends otherwise, for a reason that `trust` does not try again, or too often.
#[must_use]
pub fn until_well(memory: &str, trust: Trust, share: &[&Path], command: &[&OsStr]) -> String {
    let (tries, timeout) = trust.tries();
    let vmm = Binaries::find().expect("the programs are built").vmm;
    let nested_host = vmm.with_file_name("nested-host");
    let share = share
        .iter()
        .flat_map(|path| [OsStr::new("--share"), path.as_os_str()]);
    for left in (0..tries).rev() {
        let output = Command::new(&nested_host)
            .args(["--timeout", timeout, "--memory", memory])
            .args(share.clone())
            .args(command)
            .output()
            .expect("nested-host is started");
        let said = String::from_utf8_lossy(&output.stdout);
        if output.status.success() && said.ends_with("all is well\n") {
            return said.into_owned();
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        let again = trust == Trust::Nothing
            || output.status.code() == Some(EMULATION)
            || errors.contains("ended while the command ran on it");
        assert!(again && left > 0, "{}\n{said}\n{errors}", output.status);
        eprintln!(
            "the emulated host failed, {left} attempts left: {}\n{said}\n{errors}",
            output.status
        );
    }
    panic!("the emulated host failed {tries} times");
}

/// A script of tests/tests in `folder`, behind what all of them begin with.
///
/// # Panics
/// When it cannot be written.
#[must_use]
pub fn script(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("script.sh");
    std::fs::write(&path, [include_str!("emulated.sh"), "\n", text].concat()).expect("the script is written");
    path
}
