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
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use segment::VmId;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Inner, host, promote};
use crate::detect::{
    Cause, HolderView, Host, Judgement, Process, RegistrySight, Sight, Standing, head_start, judge, turn,
};
use crate::lease::LeaseTerms;
use crate::process;
use crate::registry::{LeaseState, Role, VmRecord, VmState};
use crate::transport::{Client, Identity};
use crate::wire::{Call, OwnerViewCall, OwnerViewReport, PromoteCall, Reply};

/// How often the VMs to watch are read anew.
const LIST_EVERY: Duration = Duration::from_secs(1);
/// How often owners are looked at, at most and at least.
const LOOK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// How long another holder may take to say what it sees.
const VIEW_DEADLINE: Duration = Duration::from_millis(500);
/// How long until a VM is tried again that could not be taken over.
const AGAIN: Duration = Duration::from_secs(2);

/// A VM to watch.
struct Watched {
    record: VmRecord,
    terms: LeaseTerms,
}

/// Runs until the agent stops.
pub(super) async fn run(inner: Arc<Inner>) {
    if !inner.roles.contains(&Role::Execute) {
        return;
    }
    let mut stop = inner.stop.clone();
    let (mut watched, mut listed) = (HashMap::<VmId, Watched>::new(), None::<Instant>);
    let mut not_before: HashMap<VmId, Instant> = HashMap::new();
    loop {
        if listed.is_none_or(|at| at.elapsed() >= LIST_EVERY) {
            listed = Some(Instant::now());
            // What was known last is watched on while the registry is away.
            if let Ok(vms) = inner.registry.all_vms().await {
                watched = vms.into_iter().filter_map(|vm| wanted(&inner, vm)).collect();
                not_before.retain(|vm, _| watched.contains_key(vm));
            }
        }
        for (vm, of) in &watched {
            if not_before.get(vm).is_some_and(|at| Instant::now() < *at) || !amiss(&inner, of) {
                continue;
            }
            if consider(&inner, of).await {
                // Read anew before it is looked at again: it is owned by another now, or is to be tried later.
                not_before.insert(vm.clone(), Instant::now() + AGAIN);
                listed = None;
            }
        }
        let pace = watched.values().map(|of| of.terms.renew_every / 2).min();
        let pause = pace.unwrap_or(LOOK.1).clamp(LOOK.0, LOOK.1);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.changed() => return,
        }
    }
}

/// Whether a VM is one to watch: meant to run, by itself if need be, held here, and owned by another.
fn wanted(inner: &Inner, record: VmRecord) -> Option<(VmId, Watched)> {
    let terms = record.failover?.terms().ok()?;
    let here = record.holders.contains(&inner.address);
    (here && record.state == VmState::Running).then(|| (record.vm.clone(), Watched { record, terms }))
}

/// What can be seen without asking anyone.
fn amiss(inner: &Inner, of: &Watched) -> bool {
    let owner = of.record.failover.and_then(|failover| failover.process);
    let gone = owner.is_some_and(|owner| process::look(&owner) == Some(Process::Gone));
    gone || inner.grants.silent_for(&of.record.vm).0 >= of.terms.guard()
}

/// Judges, and takes the VM over when its owner is lost; whether it tried.
async fn consider(inner: &Arc<Inner>, of: &Watched) -> bool {
    let Some((cause, record, ahead)) = look(inner, of).await else {
        return false;
    };
    tokio::time::sleep(head_start(ahead, of.terms)).await;
    if ahead > 0 {
        // The better candidate may have begun: then the generation is another's, or the VM is stopped until it runs.
        match look(inner, of).await {
            Some((_, now, _)) if now.generation == record.generation => {}
            Some(_) | None => return false,
        }
    }
    let vm = record.vm.clone();
    tracing::warn!(%vm, generation = %record.generation, owner = %record.owner, %cause, "the owner is lost: taking over");
    let call = PromoteCall {
        vm: vm.clone(),
        dry_run: false,
        accept_loss: false,
    };
    match promote::promote(inner, call).await {
        Ok(report) => {
            let (generation, ms) = (report.generation, report.total_us / 1000);
            tracing::warn!(%vm, %generation, %cause, ms, "taken over: it runs here");
        }
        Err(failure) => tracing::error!(%vm, %cause, %failure, "not taken over"),
    }
    true
}

/// Asks everyone who may know; the cause when the owner is lost, the record, and how many are to try first.
async fn look(inner: &Arc<Inner>, of: &Watched) -> Option<(Cause, VmRecord, usize)> {
    let vm = &of.record.vm;
    let owner = of.record.failover.and_then(|failover| failover.process);
    let host = async {
        match owner {
            Some(owner) => host::find(inner, &owner)
                .await
                .map_or(Host::Unknown, Host::Answers),
            None => Host::Unknown,
        }
    };
    let (record, views, host) = tokio::join!(
        tokio::time::timeout(VIEW_DEADLINE, inner.registry.get_vm(vm)),
        views(inner, &of.record),
        host
    );
    let Ok(Ok(record)) = record else {
        tracing::debug!(%vm, "the registry does not answer: nothing can be decided");
        return None;
    };
    // Of another generation, or of another process: looked at with the new list.
    if record.generation != of.record.generation || record.failover != of.record.failover {
        return None;
    }
    let sight = Sight {
        registry: Some(RegistrySight {
            state: record.state,
            lease_silent_for: match record.owner_lease() {
                // By the registry's clock it has run out.
                LeaseState::Gone => Some(of.terms.guard()),
                LeaseState::Held => Some(Duration::ZERO),
                LeaseState::Never => None,
            },
            ack_quorum: record.ack_quorum as usize,
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
            Some((cause, record, turn(&mine, &others)))
        }
        Judgement::Wait(doubt) => {
            tracing::info!(%vm, %doubt, "an owner is not heard as it should be");
            None
        }
        Judgement::Well => None,
    }
}

fn standing(address: &str, record: &VmRecord, view: &OwnerViewReport) -> Standing {
    let committed = record.newest.as_ref().map(|held| held.name.position());
    Standing {
        newest: view.newest.as_ref().map(|name| name.position()) >= committed,
        hot: false,
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
