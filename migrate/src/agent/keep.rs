//! Calls about what the store keeps: policies, folding and checking by hand.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use segment::{SegmentName, VmId};
use tokio::sync::mpsc;

use super::calls::brief;
use super::housekeep::{FOLD_LEVEL, check_one};
use super::{Inner, blocking};
use crate::registry::{RegistryError, random_id};
use crate::store::{Health, KeepPolicy, Lineage, Pace, StoreError};
use crate::transport::{ByteStream, Client, Link, PING_EVERY, TransportError, in_full, within};
use crate::wire::{
    Call, Failure, FoldCall, FoldReport, ImportReport, KeepCall, KeepReport, Message, Ping, Reject, Reply,
    VerifyCall, VerifyReport,
};

/// How long another holder may take to change its policy.
const KEEP_DEADLINE: Duration = Duration::from_secs(10);
/// The most problems one report lists.
const MAX_PROBLEMS: usize = 1000;
/// How long the next piece of an archive may take: whoever sends it may be reading a slow disk.
const IMPORT_IDLE: Duration = Duration::from_secs(60);
/// The most pieces of an archive that wait for the disk.
const IMPORT_QUEUE: usize = 8;
/// What stands for the agent's own policy.
const DEFAULT: &str = "default";

fn failed(error: &StoreError) -> Failure {
    Failure { why: in_full(error) }
}

/// Says what is kept of a VM, after changing it here and at its other holders when that is asked.
pub(super) async fn keep(inner: &Arc<Inner>, call: KeepCall) -> Result<KeepReport, Failure> {
    let KeepCall {
        vm,
        policy,
        only_here,
    } = call;
    let mut notes = Vec::new();
    if let Some(text) = &policy {
        let policy = match text.as_str() {
            DEFAULT => None,
            text => Some(
                text.parse::<KeepPolicy>()
                    .map_err(|e| Failure { why: e.to_string() })?,
            ),
        };
        let (store, of) = (inner.store.clone(), vm.clone());
        blocking(move || store.set_policy(&of, policy))
            .await
            .map_err(|e| failed(&e))?;
        tracing::info!(%vm, policy = %text, "the policy was changed");
        if !only_here {
            notes = keep_elsewhere(inner, &vm, text).await;
        }
    }
    let (policy, is_default) = inner.housekeeper.policy(&inner.store, &vm);
    let points = Lineage::new(inner.store.entries(&vm)).points();
    Ok(KeepReport {
        policy: policy.to_string(),
        is_default,
        points: points.len() as u64,
        kept: policy.keep(&points).len() as u64,
        notes,
    })
}

async fn keep_elsewhere(inner: &Arc<Inner>, vm: &VmId, policy: &str) -> Vec<String> {
    let holders = match inner.registry.get_vm(vm).await {
        Ok(record) => record.holders,
        Err(RegistryError::NoSuchVm { .. }) => Vec::new(),
        Err(error) => {
            return vec![format!(
                "only this agent was told, as the registry does not name the other holders: {error}"
            )];
        }
    };
    let mut notes = Vec::new();
    for holder in holders.iter().filter(|holder| **holder != inner.address) {
        if let Err(why) = keep_at(inner, holder, vm, policy).await {
            notes.push(format!("{holder} was not told: {why}"));
        }
    }
    notes
}

async fn keep_at(inner: &Inner, holder: &str, vm: &VmId, policy: &str) -> Result<(), String> {
    let mut client = Client::connect(holder, &inner.identity)
        .await
        .map_err(|e| e.in_full())?;
    let call = KeepCall {
        vm: vm.clone(),
        policy: Some(policy.to_owned()),
        only_here: true,
    };
    let kept = client.call(Call::Keep(call), KEEP_DEADLINE).await;
    kept.map(|_| ()).map_err(|e| in_full(&e))
}

/// Folds a chain, as fast as it goes: somebody waits.
pub(super) async fn fold(inner: &Arc<Inner>, call: FoldCall) -> Result<FoldReport, Failure> {
    let FoldCall { vm, tip } = call;
    let tip = match tip.or_else(|| inner.store.newest_complete(&vm).map(|entry| entry.name)) {
        Some(tip) => tip,
        None => {
            let why = format!("{} holds no complete checkpoint of VM {vm}", inner.name);
            return Err(Failure { why });
        }
    };
    let store = inner.store.clone();
    let folded = blocking(move || {
        let chain = store.chain(&tip).map_err(|source| StoreError::Chain {
            tip: tip.clone(),
            source: Box::new(source),
        })?;
        // The links stay until it is done, whatever the collector thinks of them.
        let _lease = store.lease(&tip);
        let entry = store.fold(&tip, FOLD_LEVEL, &Pace::unlimited())?;
        Ok::<_, StoreError>(FoldReport {
            segment: brief(&store, &entry),
            links: chain.len() as u64,
            bytes: chain.iter().map(|entry| entry.bytes).sum(),
        })
    });
    folded.await.map_err(|e| failed(&e))
}

/// Reads segments whole, and fetches damaged ones again.
pub(super) async fn verify(inner: &Arc<Inner>, call: VerifyCall) -> Result<VerifyReport, Failure> {
    let VerifyCall { vm, sample } = call;
    let mut names: Vec<SegmentName> = match &vm {
        Some(vm) => inner.store.entries(vm),
        None => inner.store.all(),
    }
    .into_iter()
    .map(|entry| entry.name)
    .collect();
    if let Some(vm) = &vm
        && names.is_empty()
    {
        let why = format!("{} holds no segments of VM {vm}", inner.name);
        return Err(Failure { why });
    }
    if let Some(sample) = sample {
        choose(&mut names, sample as usize);
    }
    let mut report = VerifyReport::default();
    for name in names {
        check_into(inner, &name, &mut report).await;
    }
    let vms = vm.map_or_else(|| inner.store.vms(), |vm| vec![vm]);
    for vm in vms {
        let lineage = Lineage::new(inner.store.entries(&vm));
        let whole = lineage.points().len();
        report.incomplete += (lineage.entries().len() - whole) as u64;
    }
    Ok(report)
}

async fn check_into(inner: &Arc<Inner>, name: &SegmentName, report: &mut VerifyReport) {
    let mut problem = |text: String| {
        report.bad += 1;
        if report.problems.len() < MAX_PROBLEMS {
            report.problems.push(text);
        }
    };
    match check_one(inner, name, Pace::unlimited()).await {
        Err(why) => problem(format!("{name}: could not be checked: {why}")),
        Ok((check, note)) => {
            match &check.health {
                Health::Sound => {}
                Health::Gone => return,
                Health::Unreadable(why) => problem(format!("{name}: cannot be read: {why}")),
                Health::Damaged(why) => {
                    let note = note.unwrap_or_default();
                    problem(format!("{name}: {why}; {note}"));
                    report.repaired += u64::from(note.starts_with("repaired"));
                }
            }
            report.checked += 1;
            report.bytes += check.bytes;
        }
    }
}

/// Leaves `count` of `names`, each as likely as another.
fn choose(names: &mut Vec<SegmentName>, count: usize) {
    let mut left = names.len();
    for at in 0..count.min(names.len()) {
        let number = u128::from_be_bytes(random_id());
        // The remainder's bias is below 2^-64.
        let other = at + (number % left as u128) as usize;
        names.swap(at, other);
        left -= 1;
    }
    names.truncate(count);
}

/// The pieces of an archive as they come in.
struct Pieces {
    incoming: mpsc::Receiver<Vec<u8>>,
    piece: std::io::Cursor<Vec<u8>>,
}

impl Read for Pieces {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let read = self.piece.read(buf)?;
            if read > 0 || buf.is_empty() {
                return Ok(read);
            }
            match self.incoming.blocking_recv() {
                Some(next) => self.piece = std::io::Cursor::new(next),
                None => return Ok(0),
            }
        }
    }
}

/// Takes an archive, which comes as chunks on `stream`; when it is `refused`, it is read for nobody, so that the caller
/// hears why at its end.
pub(super) async fn import<S: ByteStream>(
    inner: &Arc<Inner>,
    link: &mut Link<S>,
    stream: u32,
    refused: Option<Reply>,
) -> Result<Reply, TransportError> {
    if let Some(refused) = refused {
        let failed = archive(link, stream, None).await?;
        return Ok(failed.map_or(refused, Reply::Failed));
    }
    let (pieces, incoming) = mpsc::channel(IMPORT_QUEUE);
    let store = inner.store.clone();
    let mut working = tokio::task::spawn_blocking(move || {
        store.import(Pieces {
            incoming,
            piece: std::io::Cursor::new(Vec::new()),
        })
    });
    if let Some(failure) = archive(link, stream, Some(&pieces)).await? {
        return Ok(Reply::Failed(failure));
    }
    drop(pieces);
    let imported = loop {
        tokio::select! {
            done = &mut working => break done,
            () = tokio::time::sleep(PING_EVERY) => link.writer.send(0, &Message::Ping(Ping {})).await?,
        }
    };
    Ok(match imported {
        Ok(Ok(imported)) => {
            tracing::info!(tip = %imported.tip.name, added = imported.added, held = imported.held, "imported");
            Reply::Imported(ImportReport {
                segment: brief(&inner.store, &imported.tip),
                added: imported.added,
                held: imported.held,
            })
        }
        Ok(Err(error)) => Reply::Failed(Failure { why: in_full(&error) }),
        Err(e) => Reply::Failed(Failure {
            why: format!("the import failed inside: {e}"),
        }),
    })
}

/// Reads the pieces of an archive until its end.
async fn archive<S: ByteStream>(
    link: &mut Link<S>,
    stream: u32,
    to: Option<&mpsc::Sender<Vec<u8>>>,
) -> Result<Option<Failure>, TransportError> {
    let peer = link.peer().to_owned();
    loop {
        let next = within(
            &peer,
            "send the next piece of the archive",
            IMPORT_IDLE,
            link.reader.next(),
        );
        let next = next.await?;
        match next.message {
            Message::Chunk(piece) if next.stream == stream => {
                if let Some(to) = to {
                    // When the import has failed already, the rest is read for nobody: the caller hears of it at the end.
                    drop(to.send(piece).await);
                }
            }
            Message::End(_) if next.stream == stream => return Ok(None),
            Message::Ping(_) => {}
            other => {
                let why = format!(
                    "{} came where a piece of the archive was due",
                    other.kind().name()
                );
                link.reject(Reject::PROTOCOL, &why).await;
                return Ok(Some(Failure { why }));
            }
        }
    }
}
