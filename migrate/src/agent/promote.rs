//! Carries a takeover plan out: the registry, the holders, the local store and the new process.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use segment::{Generation, SegmentName, VmId};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Inner, gather, global, history, host, spawn};
use crate::clock::boottime;
use crate::failover::{
    Holding, Outcome, Plan, PlanAction, PlanEvent, PlanOptions, PromoteError, SealFailure,
};
use crate::registry::{MAX_PAGE_RECORDS, OwnerProcess, Role, VmState};
use crate::seal;
use crate::transport::{Client, in_full};
use crate::wire::{Call, Failure, HoldingCall, PhaseTime, PromoteCall, PromoteReport, Reply, SealReport};

/// How long a holder may take to promise.
const SEAL_DEADLINE: Duration = Duration::from_secs(5);
/// How often it is looked for the process of the owner before, while its time runs out.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a holder may take to check every byte of a chain.
const THOROUGH_DEADLINE: Duration = Duration::from_secs(300);

/// The promotes that this agent carries out now.
#[derive(Debug, Default, Clone)]
// Shared by the calls' tasks; held for moments.
pub(super) struct UnderWay(Arc<Mutex<HashSet<VmId>>>);

impl UnderWay {
    /// Whether the VM is being promoted here now.
    pub(super) fn is_under_way(&self, vm: &VmId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(vm)
    }

    fn begin(&self, vm: &VmId) -> Option<Claim> {
        let mut vms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        vms.insert(vm.clone()).then(|| Claim {
            all: self.clone(),
            vm: vm.clone(),
        })
    }
}

struct Claim {
    all: UnderWay,
    vm: VmId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.all
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.vm);
    }
}

/// The same by a person's word, which its history tells.
pub(super) async fn by_word(inner: &Arc<Inner>, call: PromoteCall) -> Result<PromoteReport, Failure> {
    let (vm, dry_run) = (call.vm.clone(), call.dry_run);
    let before = match dry_run {
        true => None,
        false => inner.registry.get_vm(&vm).await.ok(),
    };
    let result = promote(inner, call, None).await;
    if let Some(before) = before {
        history::promoted(inner, &vm, before.generation, &result);
    }
    result
}

/// Runs the VM here, or says what would be done; only over the owner of the generation `judged`, if that is given.
///
/// # Errors
/// In words; of a takeover that was begun, what state it left.
pub(super) async fn promote(
    inner: &Arc<Inner>,
    call: PromoteCall,
    judged: Option<Generation>,
) -> Result<PromoteReport, Failure> {
    let PromoteCall {
        vm,
        dry_run,
        accept_loss,
        force,
    } = call;
    let options = PlanOptions {
        dry_run,
        accept_loss,
        force,
        judged,
        global: inner.global.is_some(),
    };
    let started = Instant::now();
    let refuse = |why: String| Err(Failure { why });
    if !inner.roles.contains(&Role::Execute) {
        return refuse(format!(
            "node {} only stores: it cannot run VM {vm}. Promote it on a node with the role execute (`standby status`)",
            inner.name
        ));
    }
    // Before anything is changed, not after the old owner was fenced.
    if let Err(why) = spawn::find_vmm(inner.vmm.as_deref()) {
        return refuse(format!("cannot promote VM {vm}: {why}. Nothing was changed"));
    }
    if let Err(why) = spawn::check(inner, &vm).await {
        return refuse(format!(
            "cannot promote VM {vm} here: {why}. Nothing was changed: give the host what is missing (`standby serve --bind` \
             names its devices), or promote it on another"
        ));
    }
    let Some(claim) = inner.promotes.begin(&vm) else {
        return refuse(format!(
            "a promote of VM {vm} is under way on this node already: wait for its end"
        ));
    };
    // On a task of its own: a caller that goes away (Ctrl-C) does not leave a takeover half-way.
    let inner = inner.clone();
    let carried = tokio::spawn(async move {
        let _claim = claim;
        if !dry_run {
            inner.metrics.takeover_begins();
        }
        let done = carry_out(&inner, vm, options, started).await;
        if !dry_run {
            inner.metrics.takeover_ended(started.elapsed(), done.is_ok());
        }
        done
    });
    match carried.await {
        Ok(Ok(report)) => Ok(report),
        Ok(Err(error)) => refuse(error.to_string()),
        Err(e) => refuse(format!("the promote failed inside: {e}")),
    }
}

async fn carry_out(
    inner: &Arc<Inner>,
    vm: VmId,
    options: PlanOptions,
    started: Instant,
) -> Result<PromoteReport, PromoteError> {
    let mut phases: Vec<PhaseTime> = Vec::new();
    let mut phase = ("check", started);
    let mut plan = Plan::new(vm.clone(), options);
    let mut asked: JoinSet<PlanEvent> = JoinSet::new();
    let mut event = PlanEvent::Begin;
    loop {
        for action in plan.step(event) {
            let next = match &action {
                PlanAction::ReadRecord => "read",
                PlanAction::Raise { .. } => "raise",
                PlanAction::Ask { .. } => "ask",
                PlanAction::Seal { .. } => "seal",
                PlanAction::Fetch { .. } => "fetch",
                PlanAction::LookGlobal => "global",
                PlanAction::Wait { .. } => "wait",
                PlanAction::Start { .. } => "restore",
                PlanAction::Finish(_) => "end",
            };
            if next != phase.0 {
                let us = phase.1.elapsed().as_micros() as u64;
                phases.push(PhaseTime {
                    phase: phase.0.to_owned(),
                    us,
                });
                phase = (next, Instant::now());
            }
            if let PlanAction::Finish(result) = action {
                let outcome = (*result)?;
                return Ok(report(inner, outcome, options.dry_run, started, phases).await);
            }
            let (inner, vm) = (inner.clone(), vm.clone());
            asked.spawn(async move { act(&inner, &vm, action).await });
        }
        event = match asked.join_next().await {
            Some(Ok(event)) => event,
            Some(Err(e)) => std::panic::resume_unwind(e.into_panic()),
            // A plan that waits has asked something.
            None => PlanEvent::Fetched(Err("the plan waits for nothing".into())),
        };
    }
}

async fn report(
    inner: &Arc<Inner>,
    outcome: Outcome,
    dry_run: bool,
    started: Instant,
    phases: Vec<PhaseTime>,
) -> PromoteReport {
    let total_us = started.elapsed().as_micros() as u64;
    let Outcome {
        record,
        tip,
        running,
        mut notes,
    } = outcome;
    if running.is_some() {
        // The guest runs whether or not the registry hears of it; the new owner says it too.
        let said = inner
            .registry
            .set_vm_state(&record.vm, record.generation, VmState::Running)
            .await;
        if let Err(error) = said {
            notes.push(format!("the registry was not told that it runs: {error}"));
        }
        tracing::info!(vm = %record.vm, generation = %record.generation, from = %tip.name, total_us, "promoted");
    }
    PromoteReport {
        vm: record.vm,
        generation: record.generation,
        resumed_from: Some(tip.held()),
        total_us,
        phases,
        pid: running.as_ref().map(|r| r.pid),
        socket: running.and_then(|r| r.socket),
        notes,
        dry_run,
    }
}

async fn act(inner: &Arc<Inner>, vm: &VmId, action: PlanAction) -> PlanEvent {
    match action {
        PlanAction::ReadRecord => PlanEvent::Record(inner.registry.get_vm(vm).await),
        PlanAction::Raise { expected } => {
            PlanEvent::Raised(inner.registry.raise_generation(vm, expected, &inner.name).await)
        }
        PlanAction::Seal { holder, generation } => {
            let result = seal(inner, &holder, vm, generation).await;
            PlanEvent::Sealed { holder, result }
        }
        PlanAction::Ask { holder, thorough } => {
            let result = ask(inner, &holder, vm, thorough).await;
            PlanEvent::Asked { holder, result }
        }
        PlanAction::Fetch {
            from,
            thorough,
            tip,
            generation,
        } => PlanEvent::Fetched(gather::gather(inner, &from, &tip, generation, thorough).await),
        PlanAction::LookGlobal => PlanEvent::Global(global::committed(inner, vm).await),
        PlanAction::Start { record, tip } => PlanEvent::Started(spawn::restore(inner, &record, &tip).await),
        PlanAction::Wait { time, process } => PlanEvent::Waited {
            time: wait(inner, vm, time, process).await,
        },
        PlanAction::Finish(_) => PlanEvent::Begin,
    }
}

/// Waits so long, or until the owner's process is seen to have ended; returns for how long it waited.
async fn wait(inner: &Inner, vm: &VmId, time: Duration, owner: Option<OwnerProcess>) -> Duration {
    let started = boottime();
    tracing::info!(%vm, ?time, "waiting until the owner before has to stand still");
    loop {
        // By the clock that leases run by: asleep, a host makes nobody else's time go slower.
        let waited = boottime().saturating_sub(started);
        if waited >= time {
            return waited;
        }
        if let Some(owner) = owner
            && host::ended(inner, &owner).await
        {
            tracing::info!(%vm, pid = owner.pid, "the owner's process has ended: there is nothing to wait for");
            return boottime().saturating_sub(started);
        }
        let left = time.saturating_sub(boottime().saturating_sub(started));
        tokio::time::sleep(left.min(LOOK_EVERY)).await;
    }
}

async fn seal(
    inner: &Inner,
    holder: &str,
    vm: &VmId,
    generation: Generation,
) -> Result<Holding, SealFailure> {
    let report = seal::seal(holder, &inner.identity, vm, generation, SEAL_DEADLINE).await?;
    remembered(inner, holder, vm, report)
        .await
        .map_err(|why| SealFailure::Unreachable { why })
}

async fn ask(inner: &Inner, holder: &str, vm: &VmId, thorough: bool) -> Result<Holding, String> {
    let mut client = Client::connect(holder, &inner.identity)
        .await
        .map_err(|e| e.in_full())?;
    let call = Call::Holding(HoldingCall {
        vm: vm.clone(),
        thorough,
    });
    let deadline = if thorough {
        THOROUGH_DEADLINE
    } else {
        SEAL_DEADLINE
    };
    match client.call(call, deadline).await {
        Ok(Reply::Sealed(report)) => remembered(inner, holder, vm, report).await,
        Ok(_) => Err("it answered something else".into()),
        Err(e) => Err(in_full(&e)),
    }
}

/// What a holder says; one that knows nothing of the VM is looked up in the registry: its disk may be a new one.
async fn remembered(inner: &Inner, holder: &str, vm: &VmId, report: SealReport) -> Result<Holding, String> {
    let granted = report.granted();
    let SealReport {
        newest,
        had,
        dangling,
        ..
    } = report;
    let mut forgot = None;
    if newest.is_none() && had.is_none() && dangling.is_none() {
        let mut after: Option<SegmentName> = None;
        loop {
            let (page, more) = inner
                .registry
                .list_segments(vm, after.clone(), MAX_PAGE_RECORDS)
                .await
                .map_err(|e| format!("it has nothing, and whether it ever had is not known: {e}"))?;
            if let Some(record) = page.iter().find(|r| r.holders.iter().any(|h| h == holder)) {
                forgot = Some(format!(
                    "the registry says that it stored {}, and it has nothing of this VM: was its data directory emptied?",
                    record.name
                ));
                break;
            }
            after = page.last().map(|record| record.name.clone());
            if !more || page.is_empty() {
                break;
            }
        }
    }
    Ok(Holding {
        newest,
        had,
        dangling,
        forgot,
        granted,
    })
}
