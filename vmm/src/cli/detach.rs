//! `--detach`: the same command again, in a process that goes on without this one.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Deserialize;

use super::{CliError, Outcome, print};

/// How long the VM may take to run.
const DEADLINE: Duration = Duration::from_secs(300);
/// The longest line it may say.
const MAX_LINE_BYTES: u64 = 64 << 10;

#[derive(Debug, Deserialize)]
struct Ready {
    state: String,
    name: Option<String>,
    pid: Option<u32>,
    socket: Option<String>,
    resumed_from: Option<String>,
    error: Option<String>,
}

/// Starts this command line again as a process of its own and returns when its VM runs.
pub(super) fn detach() -> Result<Outcome, CliError> {
    let exe = std::env::current_exe().map_err(CliError::io("find this program's file"))?;
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Behind the subcommand, which has no option before it.
    arguments.insert(1.min(arguments.len()), "--detached-child".into());
    let mut child = Command::new(&exe)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(CliError::io(format!("start {exe:?} in the background")))?;
    let Some(stdout) = child.stdout.take() else {
        return Err(CliError::Said(
            "the process in the background has no output".into(),
        ));
    };
    let (say, said) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout.take(MAX_LINE_BYTES)).read_line(&mut line);
        // Nobody waits any more after the deadline.
        let _ = say.send(read.map(|_| line));
    });
    let Ok(line) = said.recv_timeout(DEADLINE) else {
        let ended = child.kill();
        return Err(CliError::Said(format!(
            "the VM did not run within {} s; its process was ended ({ended:?})",
            DEADLINE.as_secs()
        )));
    };
    let line = line.map_err(CliError::io("read what the process in the background says"))?;
    if line.is_empty() {
        let status = child
            .wait()
            .map_err(CliError::io("wait for the process in the background"))?;
        return Err(CliError::Said(format!(
            "the process in the background ended without a word ({status})"
        )));
    }
    let ready: Ready = serde_json::from_str(&line)?;
    if let Some(error) = ready.error {
        return Err(CliError::Said(error));
    }
    let from = ready
        .resumed_from
        .map_or(String::new(), |from| format!(" from {from}"));
    print(
        format!(
            "{}: {}{from}, pid {}, socket {}\n",
            ready.name.as_deref().unwrap_or("?"),
            ready.state,
            ready.pid.unwrap_or_default(),
            ready.socket.as_deref().unwrap_or("?"),
        )
        .as_bytes(),
    )
}
