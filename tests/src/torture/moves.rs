//! A whole Linux machine that works hard is moved between two emulated hosts again and again, and then its host's monitor is
//! killed again and again. `moves.sh` is what happens in there.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use guest_images::debian::{Image, Packages, cache};
use serde::Serialize;

use super::{MoveOptions, say};

const SCRIPT: &str = include_str!("moves.sh");
/// How long the script may be silent: two moves on a busy machine.
const SILENCE: &str = "15m";
/// Of all of it, as `nested-host` takes it.
const TIMEOUT: &str = "6h";

/// What was seen.
#[derive(Debug, Default, Serialize)]
struct Figures {
    seed: u64,
    cpus: u8,
    /// Moves in a row, each to the other host.
    moves: Vec<Line>,
    /// Monitors killed, and the VM taken over by the other host.
    kills: Vec<Line>,
}

/// The numbers of one line, `key=number`.
type Line = serde_json::Map<String, serde_json::Value>;

/// Runs it in emulated hosts.
///
/// # Errors
/// When something was lost or stuck, or the hosts could not be made.
pub(super) fn run(options: &MoveOptions, seed: u64, folder: &Path) -> Result<()> {
    let cache = cache().context("this program is not in a target folder")?;
    let image = cache.join("debian");
    Image::build(&image, &Packages::new(cache.join("packages"))).context("make the Debian guest")?;
    let script = folder.join("moves.sh");
    std::fs::write(&script, SCRIPT).with_context(|| format!("write {}", script.display()))?;
    let program = std::env::current_exe()
        .context("find this program")?
        .with_file_name("nested-host");
    let mut child = Command::new(&program)
        .args(["--hosts", "2", "--timeout", TIMEOUT, "--silence", SILENCE])
        .arg("--share")
        .arg(&image)
        .arg("--share")
        .arg(&script)
        .arg("bash")
        .args([&script, &image])
        .args([options.moves, options.kills, options.cpus.into()].map(|number| number.to_string()))
        .arg(seed.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {} (`cargo build --workspace --bins`)", program.display()))?;
    let mut figures = Figures {
        seed,
        cpus: options.cpus,
        ..Figures::default()
    };
    let out = child.stdout.take().context("its output is not ours")?;
    let mut well = false;
    for line in BufReader::new(out).lines() {
        let line = line.context("read what it says")?;
        if let Some(numbers) = line.strip_prefix("move ") {
            figures.moves.push(parsed(numbers));
        } else if let Some(numbers) = line.strip_prefix("kill ") {
            figures.kills.push(parsed(numbers));
        }
        well |= line == "all is well";
        say(&line);
    }
    let status = child.wait().context("wait for nested-host")?;
    if !status.success() || !well {
        bail!(
            "after {} of {} moves and {} of {} kills: nested-host ended with {status}; 125 is the emulation's own end \
             (docs/nested-host.md)",
            figures.moves.len(),
            options.moves,
            figures.kills.len(),
            options.kills
        );
    }
    let count = |lines: &[Line], key: &str| -> Vec<u64> {
        lines.iter().filter_map(|line| line.get(key)?.as_u64()).collect()
    };
    for key in ["stop_ms", "takeover_ms"] {
        let mut times = count(&figures.moves, key);
        times.sort_unstable();
        if let [first, .., last] = times[..] {
            say(format!(
                "{key}: {first} to {last}, median {}",
                times[times.len() / 2]
            ));
        }
    }
    options.common.write(&figures)
}

fn parsed(numbers: &str) -> Line {
    let mut line = Line::new();
    for (at, word) in numbers.split_whitespace().enumerate() {
        let (key, value) = word.split_once('=').unwrap_or(("number", word));
        // Words are not figures.
        if let (true, Ok(value)) = (at == 0 || key != "number", value.parse::<u64>()) {
            line.insert(key.into(), value.into());
        }
    }
    line
}
