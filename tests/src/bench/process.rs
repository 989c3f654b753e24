//! What a `vmm run` costs as a process: the time until its guest speaks, and memory.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use super::lab::Lab;
use super::row::Row;
use super::stats::Samples;
use crate::harness::Binaries;

const BOOT: &str = "vmm.boot_ms";
const BOOT_TARGET_MS: f64 = 10.0;
const OVERHEAD: &str = "vmm.overhead_mib";
const OVERHEAD_TARGET_MIB: f64 = 8.0;
const MEMORY_MIB: u64 = 128;
/// How smaps names the mapping that is the guest's memory.
const GUEST_MAPPING: &str = "/memfd:guest-ram";
/// After its guest's first word a process is idle.
const SETTLE: Duration = Duration::from_secs(1);

/// A child process, ended when this is dropped.
pub(super) struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Starts a command, and waits for the first byte of its output.
    pub(super) fn start(command: &mut Command) -> Result<(Self, Duration)> {
        Self::start_with(command, Stdio::null())
    }

    /// The same with this as its standard input.
    pub(super) fn start_with(command: &mut Command, input: Stdio) -> Result<(Self, Duration)> {
        let start = Instant::now();
        let child = command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut process = Self(child.with_context(|| format!("start {command:?}"))?);
        let mut output = process.0.stdout.take().context("its output")?;
        let length = output.read(&mut [0]).context("read its output")?;
        let time = start.elapsed();
        if length == 0 {
            let mut said = String::new();
            let mut errors = process.0.stderr.take().context("its errors")?;
            errors.read_to_string(&mut said).context("read its errors")?;
            anyhow::bail!("{command:?} ended without output: {}", said.trim());
        }
        // Kept open, as a pipe that nobody reads would end it.
        process.0.stdout = Some(output);
        Ok((process, time))
    }

    /// MiB resident in mappings that `counts` accepts by their name.
    fn resident_mib(&self, counts: impl Fn(&str) -> bool) -> Result<f64> {
        let path = format!("/proc/{}/smaps", self.0.id());
        let smaps = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let kib = resident_kib(&smaps, counts);
        ensure!(kib > 0, "{path} has no resident mapping");
        Ok(kib as f64 / 1024.0)
    }
}

/// KiB of `Rss:` in those mappings of an smaps file whose name is accepted.
fn resident_kib(smaps: &str, counts: impl Fn(&str) -> bool) -> u64 {
    let (mut counted, mut kib) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("Rss:") if counted => {
                kib += words
                    .next()
                    .and_then(|word| word.parse::<u64>().ok())
                    .unwrap_or(0)
            }
            // 7f00-7f10 rw-s 00000000 00:01 1025 /memfd:guest-ram (deleted)
            Some(range) if !range.ends_with(':') => counted = counts(words.nth(4).unwrap_or_default()),
            Some(_) | None => {}
        }
    }
    kib
}

/// `vmm run` with the ticker.
fn run(lab: &Lab, binaries: &Binaries, folder: &TempDir, name: &str) -> Command {
    let mut command = Command::new(&binaries.vmm);
    command.args(["run", "--name", name, "--cmdline", "period_ms=1000"]);
    command.arg("--memory").arg(format!("{MEMORY_MIB}M"));
    command.arg("--kernel").arg(lab.kernel("ticker"));
    command.arg("--run-dir").arg(folder.path().join("run"));
    command.arg("--store").arg(folder.path().join(name));
    command
}

pub(crate) fn boot(lab: &Lab) -> Result<Vec<Row>> {
    let (binaries, folder) = (Binaries::find()?, lab.temporary("boot-")?);
    let (mut times, mut limit) = (Samples::default(), Samples::default());
    // The first brings the files into the page cache.
    for index in 0..=lab.samples(30, 3) {
        let (_, bare) = Process::start(Command::new(&binaries.vmm).arg("--version"))?;
        let (_, time) = Process::start(&mut run(lab, &binaries, &folder, &format!("boot-{index}")))?;
        if index > 0 {
            limit.push_ms(bare);
            times.push_ms(time);
        }
    }
    let row = Row::new(BOOT, "ms", &times)?
        .limit(
            limit.median(),
            "the first byte of `vmm --version`: a process that makes no VM",
        )
        .at_most(BOOT_TARGET_MS)
        .tail(&times)
        .param("guest", "ticker")
        .param("memory_mib", MEMORY_MIB);
    Ok(vec![row])
}

pub(crate) fn overhead(lab: &Lab) -> Result<Vec<Row>> {
    let (binaries, folder) = (Binaries::find()?, lab.temporary("overhead-")?);
    let (mut own, mut files, mut limit) = (Samples::default(), Samples::default(), Samples::default());
    for index in 0..lab.samples(5, 1) {
        let (process, _) = Process::start(&mut run(lab, &binaries, &folder, &format!("idle-{index}")))?;
        // It says something first, so that it is known to be up; then it sleeps.
        let (idle, _) = Process::start(Command::new("sh").args(["-c", "echo up; exec sleep 60"]))?;
        std::thread::sleep(SETTLE);
        own.push(process.resident_mib(|name| !name.starts_with(GUEST_MAPPING))?);
        files.push(process.resident_mib(|name| name.starts_with('/') && !name.starts_with("/memfd:"))?);
        limit.push(idle.resident_mib(|_| true)?);
    }
    let row = Row::new(OVERHEAD, "MiB resident", &own)?
        .limit(limit.median(), "a process that only sleeps (`sleep`)")
        .at_most(OVERHEAD_TARGET_MIB)
        .param("guest", "ticker")
        .param("memory_mib", MEMORY_MIB)
        .param("without", GUEST_MAPPING)
        .seen("of_files_mib", files.median());
    Ok(vec![row])
}

#[cfg(test)]
mod tests {
    use super::resident_kib;

    #[test]
    fn the_guests_memory_is_told_from_the_rest() {
        let smaps = "\
55d0-55e0 r-xp 00000000 fe:00 42                 /usr/bin/vmm
Size:                 64 kB
Rss:                  40 kB
VmFlags: rd ex mr
7f00-7f10 rw-s 00000000 00:01 1025               /memfd:guest-ram (deleted)
Rss:                9000 kB
7f20-7f30 rw-p 00000000 00:00 0
Rss:                   2 kB
";
        assert_eq!(
            resident_kib(smaps, |name| !name.starts_with(super::GUEST_MAPPING)),
            42
        );
        assert_eq!(resident_kib(smaps, |_| true), 9042);
        assert_eq!(resident_kib(smaps, |name| name.starts_with('/')), 9040);
    }
}
