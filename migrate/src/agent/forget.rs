//! Forgetting a VM: first in the registry, then at every holder, in the background.
//!
//! Removing thousands of segments takes longer than anyone should wait for one answer. So the work is a task of its
//! own, which a caller that goes away does not end, and every call, the first and the next ones, answers after a moment
//! with how far it is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use segment::VmId;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{Inner, blocking};
use crate::registry::RegistryError;
use crate::store::StoreError;
use crate::transport::{Client, in_full};
use crate::wire::{Call, Failure, ForgetCall, ForgetReport, Reply};

/// How long one call waits for the end before it tells how far the work is.
const TURN: Duration = Duration::from_secs(2);
/// How long another holder may take to tell how far it is.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// How long the outcome of one that has ended is kept for a caller who has not asked again.
const REMEMBERED: Duration = Duration::from_secs(60);
/// The segments that are removed between two looks at the clock.
const BATCH: usize = 64;

/// How far one is.
#[derive(Debug, Clone, Default)]
struct Progress {
    segments: u64,
    bytes: u64,
    left_here: u64,
    /// At the others, as they said last.
    left_there: HashMap<String, u64>,
    notes: Vec<String>,
    ended: Option<Result<(), String>>,
}

impl Progress {
    fn report(&self) -> ForgetReport {
        let left = self.left_here + self.left_there.values().sum::<u64>();
        ForgetReport {
            segments: self.segments,
            bytes: self.bytes,
            notes: self.notes.clone(),
            // What is under way is not done, whatever the counts say.
            left: if self.ended.is_some() { 0 } else { left.max(1) },
        }
    }
}

/// What is being forgotten now.
#[derive(Debug, Default, Clone)]
// Shared by the calls' tasks; held for moments.
pub(super) struct Forgetting(Arc<Mutex<HashMap<VmId, watch::Receiver<Progress>>>>);

impl Forgetting {
    fn get(&self, vm: &VmId) -> Option<watch::Receiver<Progress>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(vm)
            .cloned()
    }

    fn drop_if(&self, vm: &VmId, tell: &watch::Sender<Progress>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all
            .get(vm)
            .is_some_and(|progress| progress.same_channel(&tell.subscribe()))
        {
            all.remove(vm);
        }
    }

    fn set(&self, vm: &VmId, progress: Option<watch::Receiver<Progress>>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Some(progress) => all.insert(vm.clone(), progress),
            None => all.remove(vm),
        };
    }
}

/// Begins, or looks how far it is.
pub(super) async fn forget(inner: &Arc<Inner>, call: ForgetCall) -> Result<ForgetReport, Failure> {
    let vm = call.vm.clone();
    let turn = call
        .wait_ms
        .map_or(TURN, |ms| Duration::from_millis(ms.into()).min(TURN));
    let mut progress = match inner.forgetting.get(&vm) {
        Some(progress) => progress,
        None => begin(inner, call).await?,
    };
    let waited = tokio::time::timeout(turn, progress.wait_for(|p| p.ended.is_some())).await;
    drop(waited);
    let now = progress.borrow().clone();
    match &now.ended {
        Some(Err(why)) => {
            inner.forgetting.set(&vm, None);
            Err(Failure { why: why.clone() })
        }
        Some(Ok(())) => {
            inner.forgetting.set(&vm, None);
            Ok(now.report())
        }
        None => Ok(now.report()),
    }
}

async fn begin(inner: &Arc<Inner>, call: ForgetCall) -> Result<watch::Receiver<Progress>, Failure> {
    let ForgetCall {
        vm,
        force,
        only_here,
        wait_ms: _,
    } = call;
    let refuse = |why: String| Err(Failure { why });
    if let Some(owner) = inner.sessions.owner(&vm)
        && !force
    {
        return refuse(format!(
            "VM {vm} is being shipped here by {owner}: stop it first by `vmm stop {vm}`"
        ));
    }
    let mut holders = Vec::new();
    if !only_here {
        holders = match inner.registry.get_vm(&vm).await {
            Ok(record) => record.holders,
            Err(RegistryError::NoSuchVm { .. }) if inner.store.entries(&vm).is_empty() => {
                return refuse(format!("neither the registry nor this agent has a VM {vm}"));
            }
            Err(RegistryError::NoSuchVm { .. }) => Vec::new(),
            Err(error) => return refuse(error.to_string()),
        };
        if let Err(error) = inner.registry.forget_vm(&vm, force).await {
            return refuse(error.to_string());
        }
        holders.retain(|holder| *holder != inner.address);
    }
    let left_here = inner.store.entries(&vm).len() as u64;
    let (tell, progress) = watch::channel(Progress {
        left_here,
        ..Progress::default()
    });
    inner.forgetting.set(&vm, Some(progress.clone()));
    let inner = inner.clone();
    tokio::spawn(async move {
        let ended = work(&inner, &vm, holders, &tell).await;
        if let Err(why) = &ended {
            tracing::error!(%vm, %why, "forgetting failed");
        }
        tell.send_modify(|progress| progress.ended = Some(ended));
        let Progress { segments, bytes, .. } = tell.borrow().clone();
        tracing::info!(%vm, segments, bytes, "forgotten");
        // Whoever has its number asks again; if nobody does, it is not kept for ever.
        tokio::time::sleep(REMEMBERED).await;
        inner.forgetting.drop_if(&vm, &tell);
    });
    Ok(progress)
}

async fn work(
    inner: &Arc<Inner>,
    vm: &VmId,
    holders: Vec<String>,
    tell: &watch::Sender<Progress>,
) -> Result<(), String> {
    let mut elsewhere = JoinSet::new();
    for holder in holders {
        let (inner, vm, tell) = (inner.clone(), vm.clone(), tell.clone());
        elsewhere.spawn(async move {
            let ended = at(&inner, &holder, &vm, &tell).await;
            tell.send_modify(|progress| {
                progress.left_there.remove(&holder);
                if let Err(why) = ended {
                    progress
                        .notes
                        .push(format!("{holder} keeps what it has of {vm}: {why}"));
                }
            });
        });
    }
    let (agent, store, of, telling) = (inner.clone(), inner.store.clone(), vm.clone(), tell.clone());
    let here = blocking(move || {
        store.forget_acked(&of)?;
        let mut entries = store.entries(&of);
        // The newest first: whatever instant this is cut at, what is left is whole chains.
        while !entries.is_empty() {
            let batch = entries.split_off(entries.len().saturating_sub(BATCH));
            let bytes: u64 = batch.iter().map(|entry| entry.bytes).sum();
            let names: Vec<_> = batch.iter().rev().map(|entry| entry.name.clone()).collect();
            store.remove_all(&names)?;
            telling.send_modify(|progress| {
                progress.segments += names.len() as u64;
                progress.bytes += bytes;
                progress.left_here = entries.len() as u64;
            });
        }
        store.set_policy(&of, None)?;
        agent.grants.forget(&of);
        Ok::<_, StoreError>(())
    });
    let here = here.await.map_err(|e| in_full(&e));
    while elsewhere.join_next().await.is_some() {}
    here
}

/// Lets another holder forget it, and passes on how far that is.
async fn at(inner: &Inner, holder: &str, vm: &VmId, tell: &watch::Sender<Progress>) -> Result<(), String> {
    let mut client = Client::connect(holder, &inner.identity)
        .await
        .map_err(|e| e.in_full())?;
    loop {
        let call = ForgetCall {
            vm: vm.clone(),
            force: true,
            only_here: true,
            wait_ms: None,
        };
        match client.call(Call::Forget(call), ANSWER_DEADLINE).await {
            Ok(Reply::Forgotten(report)) if report.left == 0 => return Ok(()),
            Ok(Reply::Forgotten(report)) => tell.send_modify(|progress| {
                progress.left_there.insert(holder.to_owned(), report.left);
            }),
            Ok(_) => return Err("it answered something else".to_owned()),
            Err(error) => return Err(in_full(&error)),
        }
    }
}
