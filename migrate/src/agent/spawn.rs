//! Starts `vmm restore` as a process of its own.
//!
//! The new process writes one line of JSON to its standard output when its guest runs, or when it could not be
//! started, and nothing after that; its messages go to `DATA/vmm/VM.log`. It is in a process group of its own, so that
//! neither the agent's end nor a Ctrl-C in the agent's terminal ends it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use segment::{Generation, SegmentName, VmId};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use super::offer::for_vm;
use super::{Inner, blocking, hot};
use crate::failover::Running;
use crate::image::TakenImage;
use crate::registry::{RegistryAddr, VmRecord};
use crate::wire::SegmentBrief;

/// How long any guest may take to run.
const READY_DEADLINE: Duration = Duration::from_secs(120);
/// How much of a chain is read in a second at least: a longer one is given more time.
const READ_BYTES_A_SECOND: u64 = 32 << 20;
/// How long a process may take to be gone once it was killed.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How long it may take to say whether this host can run a VM.
const CHECK_DEADLINE: Duration = Duration::from_secs(20);
/// The most it may say about that.
const MAX_CHECK_BYTES: u64 = 64 << 10;
/// The longest line it may say that it is ready with.
const MAX_READY_BYTES: u64 = 64 << 10;
/// How much of its log is shown when it failed.
const LOG_TAIL_BYTES: usize = 600;

/// What `vmm restore --ready-stdout` says.
#[derive(Debug, serde::Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum Ready {
    Running { pid: u32, socket: Option<String> },
    Failed { error: String },
}

/// The `vmm` binary: the one that was named, or beside this one, or in the PATH.
///
/// # Errors
/// In words, when there is none.
pub fn find_vmm(named: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(path) = named {
        return match path.is_file() {
            true => Ok(path.to_owned()),
            false => Err(format!(
                "there is no vmm at {}: name it with `standby serve --vmm PATH`",
                path.display()
            )),
        };
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(|dir| dir.join("vmm")));
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&paths).map(|dir| dir.join("vmm"));
    beside
        .into_iter()
        .chain(in_path)
        .find(|p| p.is_file())
        .ok_or_else(|| {
            "there is no vmm beside this binary or in the PATH: name it with `standby serve --vmm PATH`"
                .to_owned()
        })
}

/// `vmm restore` of a checkpoint in the agent's store, as the VM `name`.
pub(super) fn command(inner: &Inner, vmm: &Path, name: &str, tip: &SegmentName) -> Command {
    let mut command = Command::new(vmm);
    command
        .args(["restore", "--name", name, "--segment", &tip.to_string(), "--from"])
        .arg(inner.data.join("store"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if let Some(keys) = &inner.key_file {
        command.arg("--key-file").arg(keys);
    }
    // The keys to the global store are this agent's, and no business of a process that has a guest.
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"AWS_") {
            command.env_remove(name);
        }
    }
    command
}

fn offered(inner: &Inner, vm: &VmId) -> impl Iterator<Item = String> {
    for_vm(&inner.offers, vm)
        .into_iter()
        .flat_map(|(name, what)| ["--offer".to_owned(), format!("{name}={what}")])
}

/// Whether this host has all that the VM needs, as far as its newest checkpoint here tells; nothing is changed.
///
/// # Errors
/// In words, what it lacks. Whatever else keeps the check from being made is for the takeover itself to meet.
pub(super) async fn check(inner: &Arc<Inner>, vm: &VmId) -> Result<(), String> {
    let Some(tip) = inner.store.newest_complete(vm) else {
        return Ok(());
    };
    let mut missing = lacks(inner, vm, &tip.name).await?;
    if missing.iter().any(|lack| lack.starts_with(MEMORY)) {
        if inner.hot.is_hot(vm) {
            // Its image is its memory, and is what the host lacks.
            missing.retain(|lack| !lack.starts_with(MEMORY));
        } else {
            let (agent, of) = (inner.clone(), vm.clone());
            if blocking(move || Ok::<_, String>(agent.hot.make_room(&of))).await? {
                missing = lacks(inner, vm, &tip.name).await?;
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "this host cannot run it ({}): {}",
        tip.name,
        missing.join("; ")
    ))
}

/// How `vmm restore --check` begins the line about memory.
const MEMORY: &str = "memory:";

/// What this host lacks to go on from `tip`, as `vmm restore --check` says it; nothing, too, when that cannot be found out.
///
/// # Errors
/// In words, when there is no `vmm`.
async fn lacks(inner: &Inner, vm: &VmId, tip: &SegmentName) -> Result<Vec<String>, String> {
    let vmm = find_vmm(inner.vmm.as_deref())?;
    let mut command = command(inner, &vmm, vm.as_str(), tip);
    command
        .args(["--check", "--store"])
        .arg(spools(inner, vm))
        .args(offered(inner, vm))
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let checked = async {
        let mut child = command.spawn()?;
        let mut said = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX_CHECK_BYTES).read_to_end(&mut said).await?;
        }
        let status = child.wait().await?;
        io::Result::Ok((status, said))
    };
    let said = match tokio::time::timeout(CHECK_DEADLINE, checked).await {
        Ok(Ok((status, said))) if !status.success() => said,
        Ok(Ok(_)) => return Ok(Vec::new()),
        Ok(Err(error)) => {
            tracing::warn!(%vm, %error, "whether this host can run it was not found out");
            return Ok(Vec::new());
        }
        Err(_) => {
            tracing::warn!(%vm, "whether this host can run it was not found out in {CHECK_DEADLINE:?}");
            return Ok(Vec::new());
        }
    };
    let said = String::from_utf8_lossy(&said);
    let missing = said.lines().filter_map(|line| line.strip_prefix("missing: "));
    Ok(missing.map(str::to_owned).collect())
}

/// Starts the guest of `record` from `tip`, which is whole in the agent's store, and waits until it runs: on its image,
/// when there is one of this very checkpoint.
///
/// # Errors
/// In words, when it does not; no process is left then.
pub(super) async fn restore(
    inner: &Arc<Inner>,
    record: &VmRecord,
    tip: &SegmentBrief,
) -> Result<Running, String> {
    let vm = &record.vm;
    let note = match hot::take(inner, vm, tip.held()).await {
        None => None,
        Some(Err(why)) => Some(format!("from its chain, not from an image: {why}")),
        Some(Ok(image)) => match start(inner, record, tip, Some(&image)).await {
            Ok(mut running) => {
                running.notes.push("from its image: nothing was loaded".into());
                return Ok(running);
            }
            // Said by a process that is gone. Nothing of this generation was stored: its guest has not run.
            Err(NotStarted { why, refused: true }) if !anything_of(inner, record) => {
                tracing::error!(%vm, tip = %tip.name, why, "the image was refused: its chain is loaded");
                Some(format!("from its chain, as its image was refused: {why}"))
            }
            Err(not) => return Err(not.why),
        },
    };
    let started = start(inner, record, tip, None).await;
    let mut running = started.map_err(|not| not.why)?;
    running.notes.extend(note);
    Ok(running)
}

/// Whether there is a checkpoint of the very generation, here or in the store of who runs it: then its guest may have run, and
/// nobody may go on from before that.
fn anything_of(inner: &Inner, record: &VmRecord) -> bool {
    let shipped = inner.store.entries(&record.vm).pop();
    let spool = spool(inner, record).join("segments");
    let own = spool.join(record.vm.as_str()).join(record.generation.to_string());
    shipped.is_some_and(|newest| newest.name.generation >= record.generation)
        || std::fs::read_dir(own).is_ok_and(|mut list| list.next().is_some())
}

/// The store of the process that runs the VM of `record` here. One per generation: an earlier owner of the VM on this host may
/// still be there, stopped, with its own open.
fn spool(inner: &Inner, record: &VmRecord) -> PathBuf {
    spools(inner, &record.vm).join(format!("g{}", record.generation))
}

fn spools(inner: &Inner, vm: &VmId) -> PathBuf {
    inner.data.join("spool").join(vm.as_str())
}

/// Whether a process has a store of `vm` open here: one that this agent started, or an earlier one.
pub(super) fn runs_in_a_spool(inner: &Inner, vm: &VmId) -> bool {
    let list = std::fs::read_dir(spools(inner, vm));
    list.is_ok_and(|list| list.flatten().any(|entry| !is_free(&entry.path())))
}

/// Whether nobody has the store open.
fn is_free(store: &Path) -> bool {
    use rustix::fs::{FlockOperation, flock};
    match OpenOptions::new().read(true).open(store.join("lock")) {
        Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockShared).is_ok(),
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    }
}

/// A guest does not run, and no process is left.
struct NotStarted {
    why: String,
    /// The process itself said why, before its guest could run.
    refused: bool,
}

impl From<String> for NotStarted {
    fn from(why: String) -> Self {
        Self { why, refused: false }
    }
}

/// The same from an image, or from the chain.
async fn start(
    inner: &Arc<Inner>,
    record: &VmRecord,
    tip: &SegmentBrief,
    image: Option<&TakenImage>,
) -> Result<Running, NotStarted> {
    let vmm = find_vmm(inner.vmm.as_deref())?;
    let vm = record.vm.as_str();
    let run_dir = inner.run_dir.clone();
    let log_path = inner.data.join("vmm").join(format!("{vm}.log"));
    let console = inner.data.join("vmm").join(format!("{vm}.console"));
    let (spools, spool) = (spools(inner, &record.vm), spool(inner, record));
    let prepared = (|| -> io::Result<File> {
        std::fs::create_dir_all(&run_dir)?;
        std::fs::create_dir_all(&spool)?;
        std::fs::create_dir_all(inner.data.join("vmm"))?;
        remove_old_spools(&spools, record.generation);
        OpenOptions::new().create(true).append(true).open(&log_path)
    })();
    let log = prepared.map_err(|e| format!("prepare its directories in {}: {e}", inner.data.display()))?;
    let from = log.metadata().map_or(0, |m| m.len());
    let registry = match &inner.registry_addr {
        RegistryAddr::Embedded => inner.address.clone(),
        RegistryAddr::Agent(address) => address.clone(),
        // Any agent answers for it: when this one is gone the holders' are asked.
        RegistryAddr::Etcd(_) => {
            let others = record.holders.iter().filter(|h| **h != inner.address);
            let all: Vec<_> = std::iter::once(&inner.address).chain(others).cloned().collect();
            all.join(",")
        }
    };

    let mut command = command(inner, &vmm, vm, &tip.name);
    command
        .args(offered(inner, &record.vm))
        .args(["--generation", &record.generation.to_string()])
        .arg("--store")
        .arg(&spool);
    if let Some(image) = image {
        // As its standard input: no other process that is started meanwhile gets hold of it.
        let memory = image.memory.try_clone();
        let memory = memory.map_err(|e| format!("give the image away: {e}"))?;
        command
            .stdin(memory)
            .args(["--image", "/proc/self/fd/0", "--image-checkpoint"])
            .arg(image.at.checkpoint.to_string());
        for (name, path) in &image.disks {
            let mut disk = OsString::from(format!("{name}="));
            disk.push(path);
            command.arg("--image-disk").arg(disk);
        }
    }
    command.args(["--protect-to", &record.holders.join(",")]);
    command.args(["--ack-quorum", &record.ack_quorum.to_string()]);
    command.args([
        "--every",
        &format!("{}ms", record.every_ms),
        "--registry",
        &registry,
    ]);
    command
        .args(failover_args(record))
        .args(inner.identity.flags())
        .arg("--run-dir")
        .arg(&run_dir)
        .arg("--ready-stdout")
        .arg("--console-log")
        .arg(&console)
        .stderr(log)
        .process_group(0);
    let mut child = command
        .spawn()
        .map_err(|e| format!("start {}: {e}", vmm.display()))?;
    // It holds the memory of the image open.
    drop(command);

    let pid = child
        .id()
        .map_or_else(|| "gone".to_owned(), |pid| pid.to_string());
    let mut not = match told(&mut child, allowance(inner, &tip.name)).await {
        Ok(running) => {
            let pid = running.pid;
            inner.hot.runs(&record.vm, pid);
            // Reaped when it ends, whenever that is.
            // The agent's store is not held for it.
            let (agent, vm) = (Arc::downgrade(inner), record.vm.clone());
            tokio::spawn(async move {
                let ended = child.wait().await;
                if let Some(agent) = agent.upgrade() {
                    agent.hot.ended(&vm, pid);
                }
                match ended {
                    Ok(status) => tracing::warn!(%vm, pid, %status, "the VM's process ended"),
                    Err(error) => tracing::warn!(%vm, pid, %error, "the VM's process cannot be waited for"),
                }
            });
            return Ok(running);
        }
        Err(not) => not,
    };
    // It must not run when someone else is about to: ended and seen to end before this is told.
    let ended = match tokio::time::timeout(KILL_DEADLINE, child.kill()).await {
        Ok(Ok(())) => String::new(),
        Ok(Err(error)) => {
            format!(". Process {pid} CANNOT BE ENDED ({error}): see that it is gone before promoting again")
        }
        Err(_) => format!(
            ". Process {pid} was killed and is NOT GONE after {} s: see that it is before promoting again",
            KILL_DEADLINE.as_secs()
        ),
    };
    if !ended.is_empty() {
        tracing::error!(vm, pid, "a restore that failed cannot be ended");
        not.refused = false;
    }
    not.why = format!("{}{}{ended}", not.why, tail(&log_path, from));
    Err(not)
}

/// How long a guest that goes on from `tip` may take to run.
pub(super) fn allowance(inner: &Inner, tip: &SegmentName) -> Duration {
    let links = inner.store.chain(tip);
    let bytes: u64 = links.map_or(0, |links| links.iter().map(|link| link.bytes).sum());
    let by_size = READY_DEADLINE + Duration::from_secs(bytes / READ_BYTES_A_SECOND);
    inner.restore_timeout.unwrap_or(by_size)
}

/// Waits until the guest of a `vmm restore --ready-stdout` runs.
///
/// # Errors
/// In words, when it does not: the process may be there still.
pub(super) async fn runs(child: &mut Child, deadline: Duration) -> Result<Running, String> {
    told(child, deadline).await.map_err(|not| not.why)
}

async fn told(child: &mut Child, deadline: Duration) -> Result<Running, NotStarted> {
    let pid = child
        .id()
        .map_or_else(|| "gone".to_owned(), |pid| pid.to_string());
    match tokio::time::timeout(deadline, ready(child)).await {
        Ok(Ok(Ready::Running { pid, socket })) => Ok(Running {
            pid,
            socket,
            notes: Vec::new(),
        }),
        Ok(Ok(Ready::Failed { error })) => Err(NotStarted {
            why: error,
            refused: true,
        }),
        Ok(Err(why)) => Err(why.into()),
        Err(_) => Err(format!(
            "`vmm restore` (process {pid}) did not run the guest within {} and was ended; `standby serve \
             --restore-timeout` gives it longer",
            humantime::format_duration(deadline)
        )
        .into()),
    }
}

/// How the VM fails over from here on: as it did before.
fn failover_args(record: &VmRecord) -> Vec<String> {
    let Some(failover) = &record.failover else {
        return vec!["--failover".into(), "manual".into()];
    };
    let detect = format!("ttl={}ms,renew={}ms", failover.ttl_ms, failover.renew_every_ms);
    let on_lapse = match failover.stop_on_lapse {
        Some(true) => "stop",
        Some(false) | None => "standby",
    };
    ["--failover", "auto", "--detect", &detect, "--on-lapse", on_lapse]
        .map(str::to_owned)
        .into()
}

/// The line it says when it is ready.
async fn ready(child: &mut Child) -> Result<Ready, String> {
    let Some(stdout) = child.stdout.take() else {
        return Err("its output cannot be read".into());
    };
    let mut line = String::new();
    let read = BufReader::new(stdout.take(MAX_READY_BYTES))
        .read_line(&mut line)
        .await;
    match read {
        Ok(0) => {
            let status = child
                .wait()
                .await
                .map_or_else(|e| e.to_string(), |s| s.to_string());
            Err(format!("it ended without a word ({status})"))
        }
        Ok(_) => serde_json::from_str(&line).map_err(|e| {
            let line: String = line.trim_end().chars().take(200).collect();
            format!("it said {line:?} where a line of JSON was due: {e}")
        }),
        Err(e) => Err(format!("read its output: {e}")),
    }
}

/// The last of what it logged since `from`.
pub(super) fn tail(path: &Path, from: u64) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let new = text.get(from as usize..).unwrap_or_default();
    let last = &new[new.len().saturating_sub(LOG_TAIL_BYTES)..];
    let last = String::from_utf8_lossy(last);
    match last.trim() {
        "" => String::new(),
        last => format!(". Its log ({}) ends: {last}", path.display()),
    }
}

/// Removes the spools of earlier generations whose owners are gone.
fn remove_old_spools(spools: &Path, generation: Generation) {
    let Ok(list) = std::fs::read_dir(spools) else {
        return;
    };
    for entry in list.flatten() {
        let name = entry.file_name();
        let of = name
            .to_str()
            .and_then(|n| n.strip_prefix('g'))
            .and_then(|n| n.parse::<u64>().ok());
        if of.is_none_or(|of| of >= generation.0) {
            continue;
        }
        if is_free(&entry.path())
            && let Err(error) = std::fs::remove_dir_all(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "an old spool cannot be removed");
        }
    }
}
