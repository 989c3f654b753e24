//! Tests whose work is a script in an emulated host, until all is well.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::Binaries;

/// The emulated processor does not always do as a real one. Of 47 boots of a guest with four vCPUs that nothing paused and
/// of which no checkpoint was taken, while the host it ran on was kept busy by other processes, one hung, one ended in a
/// triple fault and one took the whole emulated host with it; with checkpoints all the time the host's kernel was
/// seen to find its own stack overwritten. So what is over for such a reason is tried again, and told; whatever
/// else is wrong is wrong at once, and what we do wrong each time fails each time. Guests of one vCPU were not seen to
/// fail so. On one machine three lives of some minutes with four vCPUs in a row failed, each in another way, so that
/// what has four is short.
const ATTEMPTS: u32 = 6;
/// The script's status for such an end, and nested-host's when the time is up: a host that hangs.
const EMULATION: [i32; 2] = [75, 124];

/// Runs `command` in an emulated host of so much memory, which has the files `share` too, for at most that time (`10m`), until
/// its last words are that all is well; what it said.
///
/// # Panics
/// When it ends otherwise, for another reason than the emulation.
#[must_use]
pub fn until_well(memory: &str, timeout: &str, share: &[&Path], command: &[&OsStr]) -> String {
    let vmm = Binaries::find().expect("the programs are built").vmm;
    let nested_host = vmm.with_file_name("nested-host");
    let share = share
        .iter()
        .flat_map(|path| [OsStr::new("--share"), path.as_os_str()]);
    for left in (0..ATTEMPTS).rev() {
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
        let emulation = output.status.code().is_some_and(|code| EMULATION.contains(&code))
            || errors.contains("ended while the command ran on it");
        assert!(emulation && left > 0, "{}\n{said}\n{errors}", output.status);
        eprintln!(
            "the emulated host failed, {left} attempts left: {}\n{said}\n{errors}",
            output.status
        );
    }
    panic!("the emulated host failed {ATTEMPTS} times");
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
