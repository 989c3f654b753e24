//! Carries a takeover plan out: the registry, the holders, the local store and the new process.

use std::collections::HashSet;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use segment::{Generation, SegmentName, VmId};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Inner, blocking, spawn};
use crate::failover::{Outcome, Plan, PlanAction, PlanEvent, PromoteError, SealFailure};
use crate::protocol::parent_of;
use crate::registry::{Role, VmState};
use crate::store::{Incoming, StoreError, Stored};
use crate::transport::{CallError, Client, in_full};
use crate::wire::{
    Call, Failure, Held, NameCall, Nothing, PhaseTime, PromoteCall, PromoteReport, Reply, SealCall,
    SegmentBrief,
};

/// How long a holder may take to promise.
const SEAL_DEADLINE: Duration = Duration::from_secs(5);
/// How long a holder may take to begin sending a segment.
const FETCH_DEADLINE: Duration = Duration::from_secs(10);
/// The most links that are fetched for one chain.
const MAX_FETCH_LINKS: usize = crate::store::MAX_CHAIN_LINKS;

/// The promotes that this agent carries out now.
#[derive(Debug, Default, Clone)]
// Shared by the calls' tasks; held for moments.
pub(super) struct UnderWay(Arc<Mutex<HashSet<VmId>>>);

impl UnderWay {
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

/// Runs the VM here, or says what would be done.
pub(super) async fn promote(inner: &Arc<Inner>, call: PromoteCall) -> Result<PromoteReport, Failure> {
    let PromoteCall { vm, dry_run } = call;
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
    let Some(claim) = inner.promotes.begin(&vm) else {
        return refuse(format!(
            "a promote of VM {vm} is under way on this node already: wait for its end"
        ));
    };
    // On a task of its own: a caller that goes away (Ctrl-C) does not leave a takeover half-way.
    let inner = inner.clone();
    let carried = tokio::spawn(async move {
        let _claim = claim;
        carry_out(&inner, vm, dry_run).await
    });
    match carried.await {
        Ok(Ok(report)) => Ok(report),
        Ok(Err(error)) => refuse(error.to_string()),
        Err(e) => refuse(format!("the promote failed inside: {e}")),
    }
}

async fn carry_out(inner: &Arc<Inner>, vm: VmId, dry_run: bool) -> Result<PromoteReport, PromoteError> {
    let started = Instant::now();
    let mut phases: Vec<PhaseTime> = Vec::new();
    let mut phase = ("read", started);
    let mut plan = Plan::new(vm.clone(), dry_run);
    let mut asked: JoinSet<PlanEvent> = JoinSet::new();
    let mut event = PlanEvent::Begin;
    loop {
        for action in plan.step(event) {
            let next = match &action {
                PlanAction::ReadRecord => "read",
                PlanAction::Raise { .. } => "raise",
                PlanAction::Seal { .. } | PlanAction::Peek { .. } => "seal",
                PlanAction::Fetch { .. } => "fetch",
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
                return Ok(report(inner, outcome, dry_run, started, phases).await);
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
        PlanAction::Peek { holder } => {
            let result = peek(inner, &holder, vm)
                .await
                .map_err(|why| SealFailure::Unreachable { why });
            PlanEvent::Sealed { holder, result }
        }
        PlanAction::Fetch {
            from,
            tip,
            generation,
        } => PlanEvent::Fetched(fetch(inner, &from, &tip, generation).await),
        PlanAction::Start { record, tip } => PlanEvent::Started(spawn::restore(inner, &record, &tip).await),
        PlanAction::Finish(_) => PlanEvent::Begin,
    }
}

async fn seal(
    inner: &Inner,
    holder: &str,
    vm: &VmId,
    generation: Generation,
) -> Result<Option<SegmentBrief>, SealFailure> {
    let unreachable = |why: String| SealFailure::Unreachable { why };
    let mut client = Client::connect(holder, &inner.name)
        .await
        .map_err(|e| unreachable(e.in_full()))?;
    let call = Call::Seal(SealCall {
        vm: vm.clone(),
        generation,
    });
    match client.call(call, SEAL_DEADLINE).await {
        // A promise of anything else is not the one that was asked for.
        Ok(Reply::Sealed(report)) if report.generation == generation => Ok(report.newest),
        Ok(_) => Err(unreachable("it answered something else".into())),
        Err(CallError::Fenced { fenced, .. }) => Err(SealFailure::Fenced {
            current: fenced.current,
        }),
        Err(e) => Err(unreachable(in_full(&e))),
    }
}

async fn peek(inner: &Inner, holder: &str, vm: &VmId) -> Result<Option<SegmentBrief>, String> {
    let mut client = Client::connect(holder, &inner.name)
        .await
        .map_err(|e| e.in_full())?;
    match client.call(Call::Status(Nothing {}), SEAL_DEADLINE).await {
        Ok(Reply::Status(status)) => Ok(status
            .vms
            .into_iter()
            .find(|v| v.vm == *vm)
            .and_then(|v| v.newest)),
        Ok(_) => Err("it answered something else".into()),
        Err(e) => Err(in_full(&e)),
    }
}

/// Makes the chain of `tip` whole in the local store, from the first of `from` that can.
async fn fetch(
    inner: &Arc<Inner>,
    from: &[String],
    tip: &SegmentBrief,
    generation: Generation,
) -> Result<(), String> {
    if is_whole(inner, &tip.held()) {
        return Ok(());
    }
    let mut failures = Vec::new();
    for holder in from {
        match fetch_from(inner, holder, &tip.held(), generation).await {
            Ok(()) => return Ok(()),
            Err(why) => failures.push(format!("{holder}: {why}")),
        }
    }
    Err(failures.join("; "))
}

fn is_whole(inner: &Inner, held: &Held) -> bool {
    let here = inner
        .store
        .get(&held.name)
        .is_some_and(|e| e.checkpoint == held.checkpoint);
    here && inner.store.chain(&held.name).is_ok()
}

/// From the tip down until something is here already; each link is stored durably before the next is asked for.
async fn fetch_from(
    inner: &Arc<Inner>,
    holder: &str,
    tip: &Held,
    generation: Generation,
) -> Result<(), String> {
    let mut client = Client::connect(holder, &inner.name)
        .await
        .map_err(|e| e.in_full())?;
    let mut wanted = Some(tip.clone());
    for _ in 0..MAX_FETCH_LINKS {
        let Some(held) = wanted else {
            return match inner.store.chain(&tip.name) {
                Ok(_) => Ok(()),
                Err(e) => Err(e.to_string()),
            };
        };
        wanted = match inner.store.get(&held.name) {
            Some(entry) if entry.checkpoint == held.checkpoint => parent_of(&entry),
            Some(entry) => {
                return Err(format!(
                    "{} is stored here as checkpoint {}, and checkpoint {} is needed",
                    held.name, entry.checkpoint, held.checkpoint
                ));
            }
            None => {
                let stored = fetch_one(inner, &mut client, &held.name, generation).await?;
                if stored.entry().checkpoint != held.checkpoint {
                    return Err(format!(
                        "{} came as another checkpoint than the chain needs",
                        held.name
                    ));
                }
                parent_of(stored.entry())
            }
        };
    }
    Err(format!(
        "the chain of {} has more than {MAX_FETCH_LINKS} links",
        tip.name
    ))
}

async fn fetch_one(
    inner: &Arc<Inner>,
    client: &mut Client,
    name: &SegmentName,
    generation: Generation,
) -> Result<Stored, String> {
    let asked = client
        .call(Call::Fetch(NameCall { name: name.clone() }), FETCH_DEADLINE)
        .await;
    let brief = match asked {
        Ok(Reply::Fetch(brief)) if brief.name == *name => brief,
        Ok(_) => return Err("it answered something else".into()),
        Err(e) => return Err(in_full(&e)),
    };
    let (store, of) = (inner.store.clone(), name.clone());
    let begun = blocking(move || store.begin_under(&of, brief.bytes, generation)).await;
    let mut incoming: Incoming = begun.map_err(|e| in_full(&e))?;
    while let Some(bytes) = client.next_chunk().await.map_err(|e| in_full(&e))? {
        let written = blocking(move || {
            let written = incoming.write_all(&bytes);
            Ok::<_, StoreError>((incoming, written))
        });
        let (back, written) = written.await.map_err(|e| in_full(&e))?;
        incoming = back;
        if let Err(error) = written {
            return Err(incoming
                .take_failure()
                .map_or_else(|| error.to_string(), |e| in_full(&e)));
        }
    }
    let stored = blocking(move || incoming.commit())
        .await
        .map_err(|e| in_full(&e))?;
    tracing::info!(%name, bytes = brief.bytes, from = client.peer(), "fetched");
    Ok(stored)
}
