//! Watches the owners of the VMs that this node holds and could run, and takes a VM over when its owner is lost.
//!
//! ```text
//!   each tick: own view, own host's processes --> well --------------------------------> nothing is asked
//!                                             +-> amiss --> registry, other holders,
//!                                                           the owner's host --judge--> wait | down
//!                                                                                        |
//!                                              head start for better candidates, judge again, promote
//! ```
//!
//! Invariants: it only ever tries: whether the guest may run here is decided by the raise, the seals and the wait
//! ([`crate::failover`]). A registry that does not answer, and a candidate that hears nobody, decide nothing.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use segment::VmId;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Inner, history, host, promote};
use crate::detect::{
    Cause, Doubt, HolderView, Host, Judgement, Process, RegistrySight, Sight, Standing, head_start,
    is_being_taken_over, judge, turn,
};
use crate::lease::LeaseTerms;
use crate::process;
use crate::registry::{HistoryEntry, LeaseState, MAX_PHASES, Role, VmRecord, VmState};
use crate::transport::{Client, Identity};
use crate::wire::{Call, OwnerViewCall, OwnerViewReport, PromoteCall, Reply};

/// How often the VMs to watch are read anew.
const LIST_EVERY: Duration = Duration::from_secs(1);
/// How long that may take.
const LIST_DEADLINE: Duration = Duration::from_secs(1);
/// How many owners are looked at, or taken over from, at the same time.
const MAX_AT_ONCE: usize = 16;
/// How often owners are looked at, at most and at least.
const LOOK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// How long another holder may take to say what it sees.
const VIEW_DEADLINE: Duration = Duration::from_millis(500);
/// How long until a VM is tried again that could not be taken over.
const AGAIN: Duration = Duration::from_secs(2);

/// A registry that holds a lease for so much longer than it was asked to cannot tell in time that it ran out.
const COARSE: Duration = Duration::from_millis(500);

/// A VM to watch.
struct Watched {
    record: VmRecord,
    terms: LeaseTerms,
    /// Since when this generation is watched.
    since: Instant,
}

/// Runs until the agent stops. Takeovers that have begun go on to their end.
pub(super) async fn run(inner: Arc<Inner>) {
    if !inner.roles.contains(&Role::Execute) {
        return;
    }
    let mut stop = inner.stop.clone();
    let (mut watched, mut listed) = (HashMap::<VmId, Arc<Watched>>::new(), None::<Instant>);
    let mut not_before: HashMap<VmId, Instant> = HashMap::new();
    // A host that dies leaves many VMs: each is looked at by a task of its own, and one that takes long holds up none.
    let (mut busy, mut looks) = (HashSet::new(), JoinSet::<(VmId, Considered)>::new());
    let mut doubts: HashMap<VmId, Doubt> = HashMap::new();
    loop {
        if listed.is_none_or(|at| at.elapsed() >= LIST_EVERY) {
            listed = Some(Instant::now());
            // What was known last is watched on while the registry is away.
            if let Ok(Ok(vms)) = tokio::time::timeout(LIST_DEADLINE, inner.registry.all_vms()).await {
                let wanted = |vm| wanted(&inner, vm, &watched);
                watched = vms.into_iter().filter_map(wanted).collect();
                not_before.retain(|vm, _| watched.contains_key(vm));
                doubts.retain(|vm, _| watched.contains_key(vm));
            }
        }
        for (vm, of) in &watched {
            if looks.len() >= MAX_AT_ONCE
                || busy.contains(vm)
                || not_before.get(vm).is_some_and(|at| Instant::now() < *at)
                || !amiss(&inner, of)
            {
                continue;
            }
            busy.insert(vm.clone());
            let (inner, of, vm) = (inner.clone(), of.clone(), vm.clone());
            looks.spawn(async move { (vm, consider(&inner, &of).await) });
        }
        let pace = watched.values().map(|of| of.terms.renew_every / 2).min();
        let pause = pace.unwrap_or(LOOK.1).clamp(LOOK.0, LOOK.1);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            Some(ended) = looks.join_next() => match ended {
                Ok((vm, considered)) => {
                    busy.remove(&vm);
                    match considered {
                        Considered::Well => drop(doubts.remove(&vm)),
                        // Once, not at every look.
                        Considered::Doubt(doubt) => {
                            if doubts.insert(vm.clone(), doubt) != Some(doubt) {
                                tracing::warn!(%vm, %doubt, "an owner is not heard as it should be");
                            }
                        }
                        Considered::Tried => {
                            // Read anew before it is looked at again: it is owned by another now, or is to be tried later.
                            not_before.insert(vm, Instant::now() + AGAIN);
                            listed = None;
                        }
                    }
                }
                Err(e) => std::panic::resume_unwind(e.into_panic()),
            },
            _ = stop.changed() => return,
        }
    }
}

/// Whether a VM is one to watch: meant to run, by itself if need be, held here, and owned by another.
fn wanted(
    inner: &Inner,
    record: VmRecord,
    before: &HashMap<VmId, Arc<Watched>>,
) -> Option<(VmId, Arc<Watched>)> {
    let terms = record.failover?.terms().ok()?;
    let runs = record.state == VmState::Running || is_being_taken_over(&record);
    if !record.holders.contains(&inner.address) || !runs {
        return None;
    }
    let known = before
        .get(&record.vm)
        .filter(|of| of.record.generation == record.generation);
    let since = known.map_or_else(Instant::now, |of| of.since);
    Some((record.vm.clone(), Arc::new(Watched { record, terms, since })))
}

/// What can be seen without asking anyone.
fn amiss(inner: &Inner, of: &Watched) -> bool {
    let owner = of.record.failover.and_then(|failover| failover.process);
    let gone = owner.is_some_and(|owner| process::look(&owner) == Some(Process::Gone));
    gone || inner.grants.silent_for(&of.record.vm).0 >= of.terms.guard()
}

/// What came of a look at an owner that is not heard as it should be.
enum Considered {
    Well,
    Doubt(Doubt),
    /// It was tried to take the VM over.
    Tried,
}

/// Judges, and takes the VM over when its owner is lost.
async fn consider(inner: &Arc<Inner>, of: &Watched) -> Considered {
    let (cause, record, ahead) = match look(inner, of).await {
        Seen::Well => return Considered::Well,
        Seen::Doubt(doubt) => return Considered::Doubt(doubt),
        Seen::Lost { cause, record, ahead } => (cause, record, ahead),
    };
    if ahead > 0 {
        tokio::time::sleep(head_start(ahead, of.terms)).await;
        // The better candidate may have begun: then the generation is another's, or the VM is stopped until it runs.
        match look(inner, of).await {
            Seen::Lost { record: now, .. } if now.generation == record.generation => {}
            Seen::Lost { .. } | Seen::Doubt(_) | Seen::Well => return Considered::Well,
        }
    }
    take_over(inner, cause, &record).await;
    Considered::Tried
}

async fn take_over(inner: &Arc<Inner>, cause: Cause, record: &VmRecord) {
    let VmRecord {
        vm,
        generation,
        owner,
        ..
    } = record;
    let (silent, heard) = inner.grants.silent_for(vm);
    let since = match heard {
        true => format!("not heard here for {} ms", silent.as_millis()),
        false => "never heard here".to_owned(),
    };
    tracing::warn!(%vm, %generation, %owner, %cause, silent_ms = silent.as_millis() as u64, "the owner is lost: taking over");
    let why = format!("owner {owner}: {cause}; {since}");
    let entry = HistoryEntry {
        times: vec![history::time("silent", silent)],
        ..HistoryEntry::new(*generation, &inner.name, history::OWNER_LOST, why)
    };
    history::note(inner, vm, entry);
    let call = PromoteCall {
        vm: vm.clone(),
        dry_run: false,
        accept_loss: false,
        force: false,
    };
    let entry = match promote::promote(inner, call, Some(*generation)).await {
        Ok(report) => {
            let ms = report.total_us / 1000;
            tracing::warn!(%vm, generation = %report.generation, %cause, ms, "taken over: it runs here");
            let total = Duration::from_micros(report.total_us);
            let mut times = vec![history::time("silent", silent), history::time("takeover", total)];
            times.extend(report.phases.iter().cloned());
            times.truncate(MAX_PHASES);
            HistoryEntry {
                times,
                ..HistoryEntry::new(
                    report.generation,
                    &inner.name,
                    history::TAKEN_OVER,
                    history::how(&report),
                )
            }
        }
        Err(failure) => {
            tracing::error!(%vm, %cause, %failure, "not taken over");
            HistoryEntry::new(*generation, &inner.name, history::NOT_TAKEN_OVER, failure.why)
        }
    };
    history::note(inner, vm, entry);
}

/// What everyone who may know says together.
enum Seen {
    Well,
    Doubt(Doubt),
    Lost {
        cause: Cause,
        record: Box<VmRecord>,
        /// How many other candidates are to try first.
        ahead: usize,
    },
}

/// Asks everyone who may know.
async fn look(inner: &Arc<Inner>, of: &Watched) -> Seen {
    let vm = &of.record.vm;
    let owner = of.record.failover.and_then(|failover| failover.process);
    let host = async {
        match owner {
            Some(process) => host::of(inner, &process, &of.record.owner).await,
            None => Host::Unknown,
        }
    };
    let (record, views, host) = tokio::join!(
        tokio::time::timeout(VIEW_DEADLINE, inner.registry.get_vm(vm)),
        views(inner, &of.record),
        host
    );
    let Ok(Ok(record)) = record else {
        return Seen::Doubt(Doubt::RegistryAway);
    };
    // Of another generation, or of another process: looked at with the new list.
    if record.generation != of.record.generation || record.failover != of.record.failover {
        return Seen::Well;
    }
    let sight = Sight {
        registry: Some(RegistrySight {
            state: record.state,
            lease_silent_for: match record.owner_lease() {
                // By the registry's clock it has run out.
                LeaseState::Gone => Some(of.terms.guard()),
                LeaseState::Held => Some(Duration::ZERO),
                // Its owner began, and took none since it is watched here.
                LeaseState::Never => Some(of.since.elapsed()),
            },
            coarse: record
                .alive
                .is_some_and(|live| Duration::from_millis(live.ttl_ms) > of.terms.guard() + COARSE),
            ack_quorum: record.ack_quorum as usize,
            taking_over: is_being_taken_over(&record),
        }),
        holders: views.iter().map(|(_, view)| seen(view.as_ref())).collect(),
        host,
    };
    match judge(&sight, of.terms) {
        Judgement::Down(cause) => {
            let mine = standing(&inner.address, &record, &view(inner, vm));
            let others: Vec<_> = views
                .iter()
                .filter(|(address, _)| *address != inner.address)
                .filter_map(|(address, view)| Some((address, view.as_ref()?)))
                .filter(|(_, view)| view.executes)
                .map(|(address, view)| standing(address, &record, view))
                .collect();
            Seen::Lost {
                cause,
                ahead: turn(&mine, &others),
                record: Box::new(record),
            }
        }
        Judgement::Wait(doubt) => Seen::Doubt(doubt),
        Judgement::Well => Seen::Well,
    }
}

fn standing(address: &str, record: &VmRecord, view: &OwnerViewReport) -> Standing {
    let committed = record.newest.as_ref().map(|held| held.name.position());
    Standing {
        newest: view.newest.as_ref().map(|name| name.position()) >= committed,
        hot: view.hot == Some(true),
        free: Reverse(0),
        name: Reverse(address.to_owned()),
    }
}

fn seen(view: Option<&OwnerViewReport>) -> HolderView {
    match view {
        None => HolderView::Unreachable,
        Some(view) => {
            let time = Duration::from_millis(view.silent_ms);
            match view.heard {
                true => HolderView::SilentFor(time),
                false => HolderView::NeverHeard { up: time },
            }
        }
    }
}

/// What this holder sees of a VM's owner.
pub(super) fn view(inner: &Inner, vm: &VmId) -> OwnerViewReport {
    let (silent, heard) = inner.grants.silent_for(vm);
    OwnerViewReport {
        silent_ms: silent.as_millis() as u64,
        heard,
        newest: inner.store.newest_complete(vm).map(|entry| entry.name),
        executes: inner.roles.contains(&Role::Execute),
        hot: Some(inner.hot.is_hot(vm)),
    }
}

/// What each holder sees; nothing of one that does not answer in time.
async fn views(inner: &Inner, record: &VmRecord) -> Vec<(String, Option<OwnerViewReport>)> {
    let mut all = vec![(inner.address.clone(), Some(view(inner, &record.vm)))];
    let mut asked = JoinSet::new();
    for holder in record.holders.iter().filter(|h| **h != inner.address) {
        let (address, identity, vm) = (holder.clone(), inner.identity.clone(), record.vm.clone());
        asked.spawn(async move {
            let view = tokio::time::timeout(VIEW_DEADLINE, ask(&address, &identity, vm)).await;
            (address, view.ok().flatten())
        });
    }
    while let Some(answer) = asked.join_next().await {
        all.extend(answer.ok());
    }
    all
}

async fn ask(address: &str, identity: &Identity, vm: VmId) -> Option<OwnerViewReport> {
    let mut client = Client::connect(address, identity).await.ok()?;
    match client
        .call(Call::OwnerView(OwnerViewCall { vm }), VIEW_DEADLINE)
        .await
    {
        Ok(Reply::OwnerView(report)) => Some(report),
        Ok(_) | Err(_) => None,
    }
}
