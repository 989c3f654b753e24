//! Guests in this process: booted, watched through their console, checkpointed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use migrate::checkpoint::{CaptureKind, Captured, Source as _};
use migrate::protect::{CheckpointRequest, ProtectOptions, Protector, Taken};
use migrate::store::{Durability, FsStore};
use segment::{Generation, VmId};
use tempfile::TempDir;
use tokio::runtime::Handle;
use vmm::boot::BootSource;
use vmm::control::VmHandle;
use vmm::cpuid::baseline::CpuModel;
use vmm::replica::VmSource;
use vmm::vm::{MachineConfig, Vm, no_devices};

use super::lab::{Lab, cores};

/// How long a guest may take to say what is waited for. Filling 4 GiB takes about a minute where the first write to
/// a page is slow.
const PATIENCE: Duration = Duration::from_secs(600);

/// A kernel and its command line.
pub(crate) fn boot_source(lab: &Lab, kernel: &str, command_line: &str) -> BootSource {
    BootSource {
        kernel: lab.kernel(kernel),
        initrd: None,
        command_line: command_line.to_owned(),
    }
}

/// One vCPU and so many MiB.
pub(crate) fn machine(memory_mib: u64) -> MachineConfig {
    MachineConfig {
        memory_bytes: memory_mib << 20,
        vcpus: 1,
        cpu: CpuModel::Host,
    }
}

/// The counters of one of `churn`'s heartbeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Beat {
    pub(crate) writes: u64,
    pub(crate) verified: u64,
    pub(crate) up_ms: u64,
}

impl Beat {
    fn read(line: &str) -> Option<Self> {
        let words = line.strip_prefix("churn beat=")?;
        let number = |name: &str| {
            let mut values = words
                .split(' ')
                .filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            values.next()?.parse().ok()
        };
        Some(Self {
            writes: number("writes")?,
            verified: number("verified")?,
            up_ms: number("up_ms")?,
        })
    }

    /// Pages verified a second since `earlier`, by the guest's own clock, which runs on while it is stopped.
    pub(crate) fn work_since(&self, earlier: &Self) -> f64 {
        self.per_second(earlier, self.verified - earlier.verified)
    }

    /// Pages written a second since `earlier`.
    pub(crate) fn writes_since(&self, earlier: &Self) -> f64 {
        self.per_second(earlier, self.writes - earlier.writes)
    }

    fn per_second(&self, earlier: &Self, count: u64) -> f64 {
        count as f64 * 1000.0 / (self.up_ms - earlier.up_ms).max(1) as f64
    }
}

/// What a guest has said, read line by line.
#[derive(Debug)]
pub(crate) struct Console {
    vm: VmHandle,
    position: u64,
    rest: String,
}

impl Console {
    pub(crate) fn new(vm: &VmHandle) -> Self {
        Self {
            vm: vm.clone(),
            position: 0,
            rest: String::new(),
        }
    }

    /// Takes what the guest has said since, waiting up to `wait` for it to say something.
    fn read(&mut self, wait: Duration) -> Result<()> {
        let output = self.vm.outbox().read(self.position, wait);
        self.position = output.next;
        self.rest.push_str(&String::from_utf8_lossy(&output.bytes));
        if output.closed && output.bytes.is_empty() {
            bail!("the guest ended");
        }
        Ok(())
    }

    /// The next whole line that was read. A guest that found damage or an error ends the measurement.
    fn line(&mut self) -> Result<Option<String>> {
        let Some(end) = self.rest.find('\n') else {
            return Ok(None);
        };
        let line: String = self.rest.drain(..=end).collect();
        let line = line.trim();
        if line.starts_with("BAD") || line.contains("ERROR") {
            bail!("the guest said: {line}");
        }
        Ok(Some(line.to_owned()))
    }

    /// Waits for the first line in which `found` sees what it looks for. A line is looked at once.
    pub(crate) fn wait_for<T>(&mut self, what: &str, mut found: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            while let Some(line) = self.line()? {
                if let Some(value) = found(&line) {
                    return Ok(value);
                }
            }
            self.read(Duration::from_millis(50))
                .with_context(|| format!("wait for {what}"))?;
            if Instant::now() > deadline {
                bail!("no {what} from the guest within {} s", PATIENCE.as_secs());
            }
        }
    }

    /// Waits until every page has been written.
    pub(crate) fn wait_filled(&mut self) -> Result<()> {
        self.wait_for("`churn filled`", |line| {
            line.starts_with("churn filled").then_some(())
        })
    }

    /// The first heartbeat that is said from now on.
    pub(crate) fn beat(&mut self) -> Result<Beat> {
        self.read(Duration::ZERO)?;
        while self.line()?.is_some() {}
        self.wait_for("heartbeat", Beat::read)
    }

    /// Lets the guest work for `time`; the heartbeats at its begin and at its end.
    pub(crate) fn stretch(&mut self, time: Duration) -> Result<(Beat, Beat)> {
        let first = self.beat()?;
        std::thread::sleep(time);
        Ok((first, self.beat()?))
    }
}

/// A running guest, ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) vm: VmHandle,
    pub(crate) console: Console,
    runtime: Handle,
}

impl Guest {
    /// Boots a guest and lets it run.
    pub(crate) fn start(lab: &Lab, kernel: &str, command_line: &str, memory_mib: u64) -> Result<Self> {
        let source = boot_source(lab, kernel, command_line);
        let vm = VmHandle::start(|outbox, ended| {
            Vm::boot(machine(memory_mib), &source, &no_devices, outbox, ended)
        })
        .with_context(|| format!("boot {kernel} ({command_line}) with {memory_mib} MiB"))?;
        let runtime = lab.runtime().handle().clone();
        runtime.block_on(vm.resume()).context("let the guest run")?;
        Ok(Self {
            console: Console::new(&vm),
            vm,
            runtime,
        })
    }

    /// Boots `churn` and waits until it has written each of its pages once.
    pub(crate) fn filled(lab: &Lab, command_line: &str, memory_mib: u64) -> Result<Self> {
        lab.say(format!(
            "  churn {command_line}, {memory_mib} MiB: filling its memory"
        ));
        let mut guest = Self::start(lab, "churn", command_line, memory_mib)?;
        guest.console.wait_filled()?;
        Ok(guest)
    }

    /// MiB of its memory that are populated.
    pub(crate) fn touched_mib(&self) -> Result<u64> {
        let runs = self.vm.ram().populated().context("find the guest's pages")?;
        Ok(runs.iter().map(|run| run.end - run.start).sum::<u64>() >> 8)
    }

    /// Everything in it, without a store.
    pub(crate) fn capture(&self, kind: CaptureKind) -> Result<Captured> {
        VmSource::new(self.vm.clone())
            .capture(kind)
            .context("capture the guest")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // One that ended by itself is gone already.
        let _ = self.runtime.block_on(self.vm.stop());
    }
}

/// Checkpoints of a guest, into a store of its own, as its owner takes them.
#[derive(Debug)]
pub(crate) struct Taker {
    protector: Protector<VmSource>,
    pub(crate) store: Arc<FsStore>,
    pub(crate) vm: VmId,
    /// The store's folder, gone when this is dropped.
    _folder: TempDir,
}

/// How a series of checkpoints kept its pace.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) elapsed: Duration,
    pub(crate) taken: usize,
}

impl Pace {
    pub(crate) fn per_second(&self) -> f64 {
        self.taken as f64 / self.elapsed.as_secs_f64()
    }
}

impl Taker {
    /// Takes checkpoints of `guest`. The store is that of a protected VM: it waits for no disk, the holders do.
    pub(crate) fn new(lab: &Lab, guest: &Guest) -> Result<Self> {
        let folder = lab.temporary("owner-")?;
        let store =
            FsStore::open(folder.path(), None, Durability::Spool).context("open the owner's store")?;
        let vm: VmId = "bench".parse().context("name the VM")?;
        let options = ProtectOptions {
            level: 1,
            threads: cores(),
            max_links: u32::MAX,
            ..ProtectOptions::default()
        };
        let source = VmSource::new(guest.vm.clone());
        let protector = Protector::new(source, Arc::clone(&store), vm.clone(), Generation(1), options);
        Ok(Self {
            protector,
            store,
            vm,
            _folder: folder,
        })
    }

    /// One checkpoint.
    pub(crate) fn take(&mut self, full: bool) -> Result<Taken> {
        self.protector
            .checkpoint(CheckpointRequest { full, label: None })
            .context("take a checkpoint")
    }

    /// Deltas from the start of one to the start of the next `every`, while `more` says so. One that is late is
    /// followed at once by the next, as in a protected VM.
    pub(crate) fn paced(
        &mut self,
        every: Duration,
        mut more: impl FnMut(usize) -> bool,
        mut each: impl FnMut(&Taken),
    ) -> Result<Pace> {
        let start = Instant::now();
        let (mut due, mut taken) = (start, 0);
        while more(taken) {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            due = (due + every).max(Instant::now());
            each(&self.take(false)?);
            taken += 1;
        }
        Ok(Pace {
            elapsed: start.elapsed(),
            taken,
        })
    }

    /// The files of the newest chain, the full one first.
    pub(crate) fn chain_files(&self) -> Result<Vec<PathBuf>> {
        let newest = self
            .store
            .newest_complete(&self.vm)
            .context("no chain in the store")?;
        let chain = self.store.chain(&newest.name).context("the newest chain")?;
        Ok(chain
            .iter()
            .map(|entry| self.store.segment_path(&entry.name))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::Beat;

    #[test]
    fn a_heartbeat_is_read_whole_or_not_at_all() {
        let line = "churn beat=3 writes=120 verified=456 bad=0 regs=7 passes=0 up_ms=2500";
        let beat = Beat::read(line).expect("it is whole");
        assert_eq!(
            beat,
            Beat {
                writes: 120,
                verified: 456,
                up_ms: 2500
            }
        );
        assert_eq!(Beat::read("rites=120 verified=456 up_ms=2500"), None);
        assert_eq!(Beat::read("churn beat=3 writes=120 veri"), None);
        let later = Beat {
            writes: 220,
            verified: 1456,
            up_ms: 3000,
        };
        assert_eq!(
            (later.writes_since(&beat), later.work_since(&beat)),
            (200.0, 2000.0)
        );
    }
}
