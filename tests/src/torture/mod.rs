//! `scripts/torture`: real processes, real guests and real faults, for as long as it takes.
//!
//! ```text
//!   torture --> unshare --> sh --> the same program again, alone with its processes, its network and its mounts of /proc
//!                             +-- a bridge, an etcd, the witness
//!                             +-- hosts, each in namespaces of its own, plugged into the bridge: an agent, VMs
//! ```
//!
//! When the inner program ends, however that is, the shell that started it does, which is the first process of the namespace:
//! the kernel ends all the others, and with them go networks and interfaces. It ends by itself when the outer one is gone.

mod arena;
mod ears;
mod epochs;
mod failovers;
mod links;
mod lookout;
mod proxy;
pub mod witness;

use std::ffi::OsString;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};

/// Left in the folder by the inner program when it is where it should be.
const ARRIVED: &str = "arrived";
/// How long the inner program may take to be gone when it was told to.
const END: Duration = Duration::from_secs(10);
/// The status of one who was interrupted.
const INTERRUPTED: u8 = 130;

/// Tortures a cluster of real processes and guests on this machine, and sees that nothing was lost and nothing ran twice.
#[derive(Debug, Parser)]
#[command(name = "torture", max_term_width = 100)]
pub struct Options {
    #[command(subcommand)]
    what: What,
    /// Where everything is; set for the program that runs in namespaces of its own.
    #[arg(long, global = true, hide = true, value_name = "FOLDER")]
    inside: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// One VM under load is taken over again and again: killed, stopped, its host killed or cut off
    Failovers(FailoverOptions),
    /// The links between three hosts are cut, delayed and healed at random
    Links(LinkOptions),
    /// A guest is checkpointed thousands of times, and what its holder keeps is compared with what the guest had
    Epochs(EpochOptions),
}

/// What all of them take.
#[derive(Debug, Clone, Args)]
pub(crate) struct Common {
    /// The same faults in the same order again [default: by the clock]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Write the figures to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep the logs, the consoles and the segments also when all went well
    #[arg(long)]
    keep: bool,
}

impl Common {
    pub(crate) fn seed(&self) -> u64 {
        self.seed.unwrap_or_default()
    }

    pub(crate) fn write(&self, figures: &impl serde::Serialize) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        let text = serde_json::to_string_pretty(figures)?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }
}

/// What `torture failovers` takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct FailoverOptions {
    /// How many failovers
    #[arg(long, value_name = "N", default_value_t = 200)]
    count: u32,
    /// How fast a lost owner is noticed, as `vmm run --detect` takes it
    #[arg(long, value_name = "TERMS", default_value = "ttl=1000ms,renew=200ms")]
    detect: String,
    #[command(flatten)]
    common: Common,
}

/// What `torture links` takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct LinkOptions {
    /// For how many minutes
    #[arg(long, value_name = "N", default_value_t = 10.0)]
    minutes: f64,
    #[command(flatten)]
    common: Common,
}

/// What `torture epochs` takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct EpochOptions {
    /// How many checkpoints
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    count: u32,
    #[command(flatten)]
    common: Common,
}

impl What {
    fn common(&self) -> &Common {
        match self {
            Self::Failovers(options) => &options.common,
            Self::Links(options) => &options.common,
            Self::Epochs(options) => &options.common,
        }
    }
}

/// Numbers from a seed, the same each time.
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of 0 to `below`, which is not reached.
    pub(crate) fn below(&mut self, below: u64) -> u64 {
        self.next() % below.max(1)
    }

    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for at in (1..list.len()).rev() {
            list.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

/// Says how it goes on.
pub(crate) fn say(text: impl AsRef<str>) {
    println!("{}", text.as_ref());
}

/// Does what the command line says.
#[must_use]
pub fn main() -> ExitCode {
    let options = Options::parse();
    let done = match &options.inside {
        Some(folder) => inside(&options, folder).map(|()| ExitCode::SUCCESS),
        None => outside(&options),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn inside(options: &Options, folder: &Path) -> Result<()> {
    std::fs::write(folder.join(ARRIVED), "")?;
    std::thread::Builder::new()
        .name("outside".into())
        .spawn(|| {
            // It says nothing, and its end is the end.
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            std::process::exit(INTERRUPTED.into());
        })
        .context("watch the outer program")?;
    match &options.what {
        What::Failovers(options) => failovers::run(options, folder),
        What::Links(options) => links::run(options, folder),
        What::Epochs(_) => bail!("that needs no namespaces"),
    }
}

fn outside(options: &Options) -> Result<ExitCode> {
    let common = options.what.common();
    let by_clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = common.seed.unwrap_or_else(|| by_clock().as_millis() as u64);
    let folder = tempfile::Builder::new().prefix("understudy-torture-").tempdir();
    let folder = folder.context("make a folder for the torture")?;
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if common.seed.is_none() {
        arguments.extend(["--seed".into(), seed.to_string().into()]);
    }
    arguments.extend(["--inside".into(), folder.path().into()]);
    let done = match &options.what {
        What::Epochs(options) => Some(epochs::run(options, seed, folder.path())),
        What::Failovers(_) | What::Links(_) => None,
    };
    match done {
        Some(Ok(())) if common.keep => say(format!("kept: {}", folder.keep().display())),
        Some(Ok(())) => {}
        Some(Err(error)) => {
            let folder = folder.keep();
            return Err(error.context(format!(
                "with seed {seed}; what there is, is kept in {}",
                folder.display()
            )));
        }
        None => return namespaces(common, seed, &arguments, folder),
    }
    Ok(ExitCode::SUCCESS)
}

/// The same program again, in namespaces of its own.
fn namespaces(common: &Common, seed: u64, arguments: &[OsString], folder: TempDir) -> Result<ExitCode> {
    say(format!(
        "seed {seed}; all of it is in {}",
        folder.path().display()
    ));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a runtime")?;
    let Some(status) = runtime.block_on(go_inside(arguments))? else {
        // The folder goes with this.
        return Ok(ExitCode::from(INTERRUPTED));
    };
    if status.success() {
        if common.keep {
            say(format!("kept: {}", folder.keep().display()));
        }
        return Ok(ExitCode::SUCCESS);
    }
    if !folder.path().join(ARRIVED).exists() {
        bail!(
            "no namespaces of processes and networks can be made here (`unshare` ended with {status}): run this as root, or \
             let users make their own (user.max_user_namespaces)"
        );
    }
    bail!(
        "it failed with seed {seed}; logs, consoles and segments are kept in {}",
        folder.keep().display()
    );
}

/// Runs this program in namespaces of its own; nothing when it was interrupted, and then no process of it is left.
async fn go_inside(arguments: &[OsString]) -> Result<Option<ExitStatus>> {
    let mut command = tokio::process::Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let me = std::env::current_exe().context("find this program")?;
    let mut child = command
        .args([
            "--net",
            "--pid",
            "--mount-proc",
            "--fork",
            "--kill-child=KILL",
            "--",
        ])
        // The namespace's first process inherits those whose parents are gone, and has to wait for them: a shell does.
        .args(["sh", "-c", "\"$@\"; exit $?", "sh"])
        .arg(me)
        .args(arguments)
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("start `unshare` (of util-linux)")?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let inner = child.stdin.take();
    tokio::select! {
        status = child.wait() => return Ok(Some(status.context("wait for `unshare`")?)),
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
    }
    // By this it knows.
    drop(inner);
    if tokio::time::timeout(END, child.wait()).await.is_err() {
        child.kill().await.context("end `unshare`")?;
    }
    Ok(None)
}
