//! Boots the guests in QEMU's software emulator, which knows nothing of our conventions: proof that they run
//! on an ordinary PC with a complete processor.

use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
/// Far beyond what any of these takes (a second or two) on an idle machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// A guest in QEMU, read line by line. Killed when dropped.
struct Guest {
    qemu: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    deadline: Instant,
    _dir: tempfile::TempDir,
}

impl Guest {
    fn boot(image: &str, command_line: &str, machine: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        guest_images::write_all(dir.path()).expect("the directory is writable");
        let mut qemu = qemu(&dir.path().join(image), command_line, machine);
        let output = qemu.stdout.take().expect("stdout is piped");
        let (sender, lines) = channel();
        // Ends with QEMU, whose end closes the pipe.
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).trim_end().to_owned())
                    .is_err()
                {
                    return;
                }
            }
        });
        Self {
            qemu,
            lines,
            seen: Vec::new(),
            deadline: Instant::now() + DEADLINE,
            _dir: dir,
        }
    }

    /// The next line, None at the end of the output.
    fn line(&mut self) -> Option<String> {
        match self
            .lines
            .recv_timeout(self.deadline.saturating_duration_since(Instant::now()))
        {
            Ok(line) => {
                self.seen.push(line.clone());
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                panic!("no more output within {DEADLINE:?} after {:#?}", self.seen)
            }
        }
    }

    /// The first line from here on that starts with `start`.
    fn line_starting(&mut self, start: &str) -> String {
        while let Some(line) = self.line() {
            if line.starts_with(start) {
                return line;
            }
        }
        panic!("no line starts with {start:?} in {:#?}", self.seen)
    }

    /// All lines, once QEMU has ended by itself.
    fn finish(mut self) -> Vec<String> {
        while self.line().is_some() {}
        let status = self.qemu.wait().expect("QEMU can be waited for");
        assert!(
            status.success(),
            "QEMU ended with {status} after {:#?}",
            self.seen
        );
        std::mem::take(&mut self.seen)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended already; either way it is gone afterwards.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn qemu(image: &Path, command_line: &str, machine: &[&str]) -> Child {
    let started = Command::new(QEMU)
        .args([
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ])
        .args(["-serial", "stdio", "-no-reboot"])
        .args(machine)
        .arg("-kernel")
        .arg(image)
        .args(["-append", command_line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    match started {
        Ok(qemu) => qemu,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            panic!("{QEMU} is missing and this test needs it: apt-get install qemu-system-x86")
        }
        Err(error) => panic!("cannot start {QEMU}: {error}"),
    }
}

/// The value of `key=` in a line of the guest.
fn value(line: &str, key: &str) -> u64 {
    line.split(' ')
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("no {key}= in {line:?}"))
        .parse()
        .unwrap_or_else(|error| panic!("{key} in {line:?}: {error}"))
}

#[test]
fn ticker_counts_and_ends() {
    let guest = Guest::boot(
        "ticker.elf",
        "period_ms=20 exit_after_ticks=5 console=ttyS0",
        &["-m", "128"],
    );
    let lines = guest.finish();
    // The firmware may leave something on the line before the guest's first word.
    let start = lines
        .iter()
        .position(|line| line.ends_with("ticker up"))
        .expect("the guest came up");
    assert_eq!(
        lines[start + 1..],
        ["tick 0", "tick 1", "tick 2", "tick 3", "tick 4", "done"]
    );
}

#[test]
fn ticker_boots_on_a_microvm() {
    let mut guest = Guest::boot(
        "ticker.elf",
        "period_ms=20",
        &["-machine", "microvm", "-m", "128"],
    );
    guest.line_starting("tick 3");
}

#[test]
fn churn_writes_and_finds_everything_in_order() {
    let line = "mib=4 rate=2000 heartbeat_ms=50 seed=42 exit_after_beats=40";
    let mut guest = Guest::boot("churn.elf", line, &["-m", "128"]);
    let up = guest.line_starting("churn up");
    assert_eq!(up, "churn up mib=4 pages=1024 rate=2000 mix=20:50:30 avx=1");
    guest.line_starting("churn filled pages=1024");
    let lines = guest.finish();
    let beats: Vec<&String> = lines
        .iter()
        .filter(|line| line.starts_with("churn beat="))
        .collect();
    for (number, beat) in beats.iter().enumerate() {
        assert_eq!(value(beat, "beat"), number as u64, "{lines:#?}");
        assert_eq!(value(beat, "bad"), 0, "{lines:#?}");
    }
    let last = beats.last().expect("forty beats");
    assert!(
        value(last, "writes") > 1024 && value(last, "passes") >= 2,
        "{last}"
    );
    assert!(
        value(last, "verified") > 2048 && value(last, "regs") > 40,
        "{last}"
    );
    assert!(value(last, "up_ms") >= 39 * 50, "{last}");
    assert_eq!(lines.last().map(String::as_str), Some("done"));
}

#[test]
fn churn_uses_memory_above_four_gib() {
    // Sparse: without the fill only what is written becomes real.
    let line = "fill=0 rate=100 heartbeat_ms=100 exit_after_beats=5";
    let mut guest = Guest::boot("churn.elf", line, &["-m", "5G"]);
    let up = guest.line_starting("churn up");
    assert!(value(&up, "mib") > 5000, "{up}");
    let lines = guest.finish();
    let last = lines
        .iter()
        .rfind(|line| line.starts_with("churn beat="))
        .expect("five beats");
    assert!(
        value(last, "writes") > 10 && value(last, "bad") == 0,
        "{lines:#?}"
    );
}

#[test]
fn a_spoilt_page_and_a_spoilt_register_are_reported_once() {
    let line = "mib=1 rate=5000 heartbeat_ms=50 inject_bad=300 inject_reg=4 exit_after_beats=20";
    let lines = Guest::boot("churn.elf", line, &["-m", "64"]).finish();
    let bad: Vec<&String> = lines.iter().filter(|line| line.starts_with("BAD ")).collect();
    assert_eq!(bad.len(), 2, "{lines:#?}");
    assert!(bad.iter().any(|line| *line == "BAD reg=rdx"), "{bad:?}");
    let page = bad
        .iter()
        .find(|line| line.starts_with("BAD page="))
        .expect("a page");
    assert!(
        page.contains(" write=") && page.contains(" kind=") && page.ends_with(" why=content"),
        "{page}"
    );
    let last = lines
        .iter()
        .rfind(|line| line.starts_with("churn beat="))
        .expect("twenty beats");
    assert_eq!(value(last, "bad"), 2, "{last}");
}

#[test]
fn what_cannot_be_done_is_said() {
    for (image, line, wanted) in [
        (
            "churn.elf",
            "rate=fast",
            "churn: ERROR bad word \"rate=fast\" on the command line: a decimal number is wanted",
        ),
        (
            "churn.elf",
            "mib=500",
            "churn: ERROR mib=500 asks for more than the 61 MiB usable",
        ),
        (
            "ticker.elf",
            "period=5",
            "ticker: ERROR bad word \"period=5\" on the command line: ticker knows",
        ),
    ] {
        let lines = Guest::boot(image, line, &["-m", "64"]).finish();
        assert!(
            lines.iter().any(|line| line.contains(wanted)),
            "{wanted:?} is not in {lines:#?}"
        );
    }
}
