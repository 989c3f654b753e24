//! A test restore: a copy of a VM's newest checkpoint is run here, watched, and ended.
//!
//! The copy is a VM of its own, with a name of its own: it belongs to no cluster, holds nothing back from the VM it is a copy
//! of, and has no network (a VM with network cards is refused by `vmm restore`, which wants each of them bound).
//!
//! Invariants: it changes nothing in the registry but the VM's history; whatever happens, its process has ended and its
//! folder is gone before it is answered.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use segment::SegmentName;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::{Inner, blocking, calls, history, spawn};
use crate::registry::{HistoryEntry, Role, random_id};
use crate::wire::{DrillCall, DrillReport, Failure};

/// The longest that a copy is watched.
const MAX_WATCH: Duration = Duration::from_secs(600);
/// How often it is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long its control socket may take to answer.
const INSPECT_DEADLINE: Duration = Duration::from_secs(10);
pub(super) const DRILLED: &str = "drilled";
pub(super) const DRILL_FAILED: &str = "drill-failed";

/// Runs a copy, and says how that went; the VM's history does too.
pub(super) async fn drill(inner: &Arc<Inner>, call: DrillCall) -> Result<DrillReport, Failure> {
    let vm = call.vm.clone();
    let done = run(inner, call).await;
    inner.metrics.drilled(done.is_ok());
    if let Err(failure) = &done {
        tracing::error!(%vm, why = failure.why, "a drill FAILED: the VM could not be taken over here");
    }
    let (agent, of, came) = (inner.clone(), vm.clone(), done.clone());
    let kept = tokio::task::spawn_blocking(move || agent.drills.ended(&of, &came)).await;
    if kept.is_err() {
        tracing::error!(%vm, "what a drill came to was not kept");
    }
    // A registry that is away keeps nobody from trying a restore; the history lacks it then.
    if let Ok(record) = inner.registry.get_vm(&vm).await {
        let entry = match &done {
            Ok(report) => {
                let recovery = Duration::from_micros(report.recovery_us);
                HistoryEntry {
                    times: vec![history::time("recovery", recovery)],
                    ..HistoryEntry::new(record.generation, &inner.name, DRILLED, told(report))
                }
            }
            Err(failure) => {
                HistoryEntry::new(record.generation, &inner.name, DRILL_FAILED, failure.why.clone())
            }
        };
        history::note(inner, &vm, entry);
    }
    done
}

fn told(report: &DrillReport) -> String {
    format!(
        "a copy of {} ran {} ms after the word, and for {} ms; its state was {} s old",
        report.segment.name,
        report.recovery_us / 1000,
        report.watched_ms,
        report.age_ms / 1000
    )
}

async fn run(inner: &Arc<Inner>, call: DrillCall) -> Result<DrillReport, Failure> {
    let DrillCall { vm, watch_ms } = call;
    let refuse = |why: String| Err(Failure { why });
    if !inner.roles.contains(&Role::Execute) {
        return refuse(format!(
            "node {} only stores: it cannot run a copy of VM {vm}. Drill it on a node with the role execute",
            inner.name
        ));
    }
    let watch = Duration::from_millis(watch_ms);
    if watch > MAX_WATCH {
        return refuse(format!(
            "watching for {watch:?}: at most {MAX_WATCH:?} is possible"
        ));
    }
    let vmm = match spawn::find_vmm(inner.vmm.as_deref()) {
        Ok(vmm) => vmm,
        Err(why) => return refuse(format!("cannot drill VM {vm}: {why}")),
    };
    let Some(newest) = inner.store.newest_complete(&vm) else {
        return refuse(format!(
            "node {} has no complete checkpoint of VM {vm}: drill it on one of its holders (`standby explain {vm}`)",
            inner.name
        ));
    };
    let started = Instant::now();
    // As long as it is read, it stays.
    let _lease = inner
        .store
        .lease(&newest.name)
        .map_err(|e| Failure { why: e.to_string() })?;
    let id: String = random_id()[..4].iter().map(|b| format!("{b:02x}")).collect();
    let copy = Copy {
        vmm,
        // A name has at most so many bytes.
        name: format!("drill-{id}"),
        folder: inner.data.join("drills").join(&id),
    };
    let watched = copy.restore_and_watch(inner, &newest.name, started, watch).await;
    let folder = copy.folder.clone();
    let removed = blocking(move || std::fs::remove_dir_all(&folder)).await;
    if let Err(error) = removed {
        tracing::warn!(folder = %copy.folder.display(), %error, "a drill's folder is left");
    }
    let (recovery, watched) = watched.map_err(|why| Failure {
        why: format!("a copy of VM {vm} from {} does not run here: {why}", newest.name),
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (store, entry) = (inner.store.clone(), newest.clone());
    Ok(DrillReport {
        segment: blocking(move || Ok::<_, Failure>(calls::brief(&store, &entry))).await?,
        recovery_us: u64::try_from(recovery.as_micros()).unwrap_or(u64::MAX),
        age_ms: now
            .saturating_sub(Duration::from_nanos(newest.created_unix_ns))
            .as_millis() as u64,
        watched_ms: watched.as_millis() as u64,
    })
}

/// The copy.
struct Copy {
    vmm: PathBuf,
    name: String,
    folder: PathBuf,
}

impl Copy {
    /// How long it took to run, and for how long it was seen to.
    async fn restore_and_watch(
        &self,
        inner: &Inner,
        tip: &SegmentName,
        started: Instant,
        watch: Duration,
    ) -> Result<(Duration, Duration), String> {
        let log = self.folder.join("vmm.log");
        let begun = std::fs::create_dir_all(&self.folder).and_then(|()| std::fs::File::create(&log));
        let said = begun.map_err(|e| format!("make {}: {e}", self.folder.display()))?;
        let mut child = spawn::command(inner, &self.vmm, &self.name, tip)
            .arg("--store")
            .arg(self.folder.join("store"))
            .arg("--run-dir")
            .arg(self.folder.join("run"))
            .arg("--ready-stdout")
            .arg("--console-log")
            .arg(self.folder.join("console"))
            .stderr(said)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("start {}: {e}", self.vmm.display()))?;
        tracing::info!(%tip, copy = self.name, "a drill begins");
        let times = (started, spawn::allowance(inner, tip), watch);
        let watched = self.watch(&mut child, times, &log).await;
        // It is a copy: nothing of it is kept.
        if let Err(error) = child.kill().await {
            tracing::warn!(copy = self.name, %error, "the copy cannot be ended");
        }
        watched
    }

    async fn watch(
        &self,
        child: &mut Child,
        (started, allowance, watch): (Instant, Duration, Duration),
        log: &Path,
    ) -> Result<(Duration, Duration), String> {
        spawn::runs(child, allowance)
            .await
            .map_err(|why| format!("{why}{}", spawn::tail(log, 0)))?;
        let (recovery, since) = (started.elapsed(), Instant::now());
        loop {
            if let Ok(Some(status)) = child.try_wait() {
                let ms = since.elapsed().as_millis();
                return Err(format!(
                    "it ended after {ms} ms ({status}){}",
                    spawn::tail(log, 0)
                ));
            }
            let state = self.state().await?;
            if state != "running" {
                return Err(format!("it is {state}{}", spawn::tail(log, 0)));
            }
            if since.elapsed() >= watch {
                return Ok((recovery, since.elapsed()));
            }
            tokio::time::sleep(LOOK_EVERY.min(watch.saturating_sub(since.elapsed()))).await;
        }
    }

    /// What its control socket says that it does.
    async fn state(&self) -> Result<String, String> {
        let asked = Command::new(&self.vmm)
            .args(["inspect", "--json", "--run-dir"])
            .arg(self.folder.join("run"))
            .arg(&self.name)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = match tokio::time::timeout(INSPECT_DEADLINE, asked).await {
            Ok(output) => output.map_err(|e| format!("ask it: {e}"))?,
            Err(_) => return Err(format!("it did not answer within {INSPECT_DEADLINE:?}")),
        };
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(|e| {
            let said: String = String::from_utf8_lossy(&output.stderr)
                .trim()
                .chars()
                .take(300)
                .collect();
            format!("what it answers is no status: {e}; {said}")
        })?;
        let state = status["state"].as_str().unwrap_or("in no state that it tells");
        Ok(state.chars().take(40).collect())
    }
}
