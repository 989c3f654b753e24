//! Calls: the registry this agent keeps, the command line, and other agents.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use segment::{Generation, VmId};

use super::authority::{Asked, Denied};
use super::{Inner, blocking, copy, drill, forget, global, keep, promote, software, watcher};
use crate::process;
use crate::protocol::parent_of;
use crate::registry::{Answered, RegistryAddr, RegistryError, RegistryRequest, Role};
use crate::store::{Entry, FsStore, Lease, Lineage, StoreError};
use crate::transport::{ByteStream, FrameWriter, Link, PING_EVERY, Peer, TransportError, in_full};
use crate::wire::{
    AgentStatus, Call, End, Failure, Fenced, HoldingCall, ListCall, MAX_PAGE_SEGMENTS, Message, Ping,
    ProcessReport, Reject, Reply, SealCall, SealReport, SegmentBrief, SegmentDetail, SegmentPage, SpaceBrief,
    VmStatus,
};

/// How long a connection may be without a call.
const IDLE: Duration = Duration::from_secs(600);
/// How much of a segment is sent as one chunk.
const CHUNK_BYTES: u64 = 512 << 10;
/// The longest chain that is looked through before a promote changes anything: some hundredths of a second. A longer
/// one is looked through when its guest did not start.
const VERIFY_BYTES: u64 = 64 << 20;
/// The most VMs a status lists.
const MAX_STATUS_VMS: usize = 1000;
/// The most chains one connection keeps from being collected; the oldest gives way.
const MAX_LEASES: usize = 16;

/// Serves calls, one after the other, until the caller is gone.
pub(super) async fn serve<S: ByteStream>(
    inner: Arc<Inner>,
    mut link: Link<S>,
    peer: &Peer,
) -> Result<(), TransportError> {
    let mut leases = Leases::new();
    loop {
        let Ok(next) = tokio::time::timeout(IDLE, link.reader.next()).await else {
            return Ok(());
        };
        let next = match next {
            Err(TransportError::Closed { .. }) => return Ok(()),
            Err(error @ TransportError::Wire { .. }) => {
                link.reject(Reject::PROTOCOL, &in_full(&error)).await;
                return Err(error);
            }
            other => other?,
        };
        let call = match next.message {
            Message::Call(call) => *call,
            Message::Ping(_) => continue,
            other => {
                let why = format!("{} came where Call was due", other.kind().name());
                link.reject(Reject::PROTOCOL, &why).await;
                return Ok(());
            }
        };
        if let Call::Import(_) = call {
            let verdict = inner.judge(peer, Asked::Call(&call)).await;
            let refused = verdict.err().map(|denied| refusal(denied, &call));
            let reply = keep::import(&inner, &mut link, next.stream, refused).await?;
            link.writer
                .send(next.stream, &Message::Reply(Box::new(reply)))
                .await?;
            continue;
        }
        let mut answering = std::pin::pin!(judged(inner.clone(), peer, call, &mut leases));
        let (reply, file) = loop {
            tokio::select! {
                answered = &mut answering => break answered,
                () = tokio::time::sleep(PING_EVERY) => link.writer.send(0, &Message::Ping(Ping {})).await?,
            }
        };
        let sent = link
            .writer
            .send(next.stream, &Message::Reply(Box::new(reply)))
            .await;
        if let Err(TransportError::Wire { source, .. }) = &sent {
            let reply = Reply::Failed(Failure {
                why: format!("the answer is too long: {source}"),
            });
            link.writer
                .send(next.stream, &Message::Reply(Box::new(reply)))
                .await?;
            continue;
        }
        sent?;
        if let Some((file, bytes)) = file {
            stream(&mut link.writer, next.stream, file, bytes).await?;
        }
    }
}

/// The chains this connection is fetching, kept from being collected until it ends.
type Leases = Vec<Lease>;

type Answer = (Reply, Option<(File, u64)>);

/// Answers what the peer may ask, and says why it does not answer the rest.
async fn judged(inner: Arc<Inner>, peer: &Peer, call: Call, leases: &mut Leases) -> Answer {
    match inner.judge(peer, Asked::Call(&call)).await {
        Ok(()) => answer(inner, call, leases).await,
        Err(denied) => (refusal(denied, &call), None),
    }
}

fn refusal(denied: Denied, call: &Call) -> Reply {
    match (denied, call) {
        (Denied::Over { current }, Call::Seal(seal)) => Reply::Fenced(Fenced {
            vm: seal.vm.clone(),
            asked: seal.generation,
            current,
        }),
        // A refusal of the registry, so that it is not taken for one that is away.
        (Denied::Never(why) | Denied::Later(why), Call::Registry(_)) => {
            Reply::RegistryRefused(RegistryError::Invalid { why }, None)
        }
        (Denied::Never(why) | Denied::Later(why), _) => Reply::Failed(Failure { why }),
        (Denied::Over { current }, _) => Reply::Failed(Failure {
            why: format!("that generation is over: the registry is at {current}"),
        }),
    }
}

async fn answer(inner: Arc<Inner>, call: Call, leases: &mut Leases) -> Answer {
    let reply = match call {
        Call::Registry(request) => registry(&inner, request).await,
        Call::Status(_) => Ok(Reply::Status(status(&inner).await)),
        Call::List(call) => {
            let store = inner.store.clone();
            run(move || Ok(Reply::List(list(&store, &call)))).await
        }
        Call::Show(call) => {
            let store = inner.store.clone();
            run(move || show(&store, &call.name).map(Reply::Show)).await
        }
        Call::Promote(call) => promote::by_word(&inner, call).await.map(Reply::Promoted),
        Call::Copy(call) => copy::copy_vm(&inner, call).await.map(Reply::Copied),
        Call::Forget(call) => forget::forget(&inner, call).await.map(Reply::Forgotten),
        Call::Seal(call) => seal(&inner, call).await,
        Call::Holding(call) => holding(&inner, call).await,
        Call::Keep(call) => keep::keep(&inner, call).await.map(Reply::Kept),
        Call::Fold(call) => keep::fold(&inner, call).await.map(Reply::Folded),
        // Taken before, with what follows it.
        Call::Import(_) => Err(Failure {
            why: "an import without an archive".into(),
        }),
        Call::Verify(call) => keep::verify(&inner, call).await.map(Reply::Verified),
        Call::GlobalList(call) => global::list(&inner, call).await.map(Reply::List),
        Call::GlobalVerify(call) => global::check(&inner, call).await.map(Reply::Verified),
        Call::Drill(call) => drill::drill(&inner, call).await.map(Reply::Drilled),
        Call::OwnerView(call) => {
            let agent = inner.clone();
            run(move || Ok(Reply::OwnerView(watcher::view(&agent, &call.vm)))).await
        }
        Call::Process(call) => Ok(Reply::Process(ProcessReport {
            process: process::look(&call.process),
        })),
        Call::Fetch(call) => {
            // The rest of the chain will be asked for next, link by link.
            if !leases.iter().any(|lease| lease.covers(&call.name))
                && let Ok(lease) = inner.store.lease(&call.name)
            {
                if leases.len() >= MAX_LEASES {
                    leases.remove(0);
                }
                leases.push(lease);
            }
            let store = inner.store.clone();
            let opened = blocking(move || {
                let (file, entry) = store.open_raw(&call.name)?;
                Ok::<_, StoreError>((brief(&store, &entry), file))
            });
            match opened.await {
                Ok((brief, file)) => {
                    let bytes = brief.bytes;
                    return (Reply::Fetch(brief), Some((file, bytes)));
                }
                Err(error) => Err(failure(&error)),
            }
        }
    };
    (reply.unwrap_or_else(Reply::Failed), None)
}

async fn run(work: impl FnOnce() -> Result<Reply, StoreError> + Send + 'static) -> Result<Reply, Failure> {
    blocking(work).await.map_err(|e| failure(&e))
}

fn failure(error: &StoreError) -> Failure {
    Failure { why: in_full(error) }
}

/// Whoever has the registry answers for it: with etcd every agent does, so that who runs a VM needs no access to it.
async fn registry(inner: &Inner, request: RegistryRequest) -> Result<Reply, Failure> {
    let answered = match &inner.registry_addr {
        RegistryAddr::Embedded | RegistryAddr::Etcd(_) => inner.registry.ask(request).await,
        RegistryAddr::Agent(address) => Answered {
            outcome: Err(RegistryError::NotHere {
                node: inner.name.clone(),
                registry: address.clone(),
            }),
            stamp: None,
        },
    };
    Ok(match answered.outcome {
        Ok(response) => Reply::Registry(response, answered.stamp),
        Err(error) => Reply::RegistryRefused(error, answered.stamp),
    })
}

async fn status(inner: &Arc<Inner>) -> AgentStatus {
    let registry_problem = inner
        .registry
        .list_nodes(None, 1)
        .await
        .err()
        .map(|e| e.to_string());
    let store = inner.store.clone();
    let sessions = inner.sessions.clone();
    let agent = inner.clone();
    let vms = tokio::task::spawn_blocking(move || {
        let vms = store.vms().into_iter().take(MAX_STATUS_VMS);
        vms.map(|vm| {
            let held = store.sum(&vm);
            let (hot_at, cold) = agent.hot.standing(&vm);
            VmStatus {
                promised: store.promised(&vm),
                segments: held.segments as u64,
                bytes: held.bytes,
                newest: held.newest.map(|(entry, links)| with_links(&entry, links)),
                shipping: sessions.owner(&vm),
                hot_at,
                cold,
                drill: agent.drills.last(&vm),
                vm,
            }
        })
        .collect::<Vec<_>>()
    });
    AgentStatus {
        node: inner.name.clone(),
        address: inner.address.clone(),
        software: software(),
        roles: inner.roles.iter().map(Role::to_string).collect(),
        registry: inner.registry_addr.to_string(),
        used_bytes: inner.store.used_bytes(),
        budget_bytes: inner.store.budget(),
        vms: vms.await.unwrap_or_default(),
        damaged: inner
            .store
            .damaged()
            .iter()
            .map(|d| format!("{}: {}", d.path.display(), d.why))
            .collect(),
        connections: inner.connections.load(Ordering::Relaxed),
        registry_problem,
        keep: Some(inner.housekeeper.default_policy().to_string()),
        store_problem: inner.housekeeper.problem().or_else(|| unmergeable(&inner.store)),
        verified_unix_s: inner.housekeeper.checked_at(),
        global: inner.global.as_ref().map(global::Global::status),
    }
}

fn list(store: &FsStore, call: &ListCall) -> SegmentPage {
    let after = call.after.as_ref();
    let limit = call.limit.min(MAX_PAGE_SEGMENTS) as usize;
    let mut segments = Vec::new();
    let vms = match &call.vm {
        Some(vm) => vec![vm.clone()],
        None => store.vms(),
    };
    // VMs come in order, and names are ordered by their VM first.
    for vm in vms.iter().filter(|vm| after.is_none_or(|after| **vm >= after.vm)) {
        let lineage = Lineage::new(store.entries(vm));
        for (i, entry) in lineage.entries().iter().enumerate() {
            if after.is_some_and(|after| entry.name <= *after) {
                continue;
            }
            if segments.len() == limit {
                return SegmentPage { segments, more: true };
            }
            segments.push(with_links(entry, lineage.links(i)));
        }
    }
    SegmentPage {
        segments,
        more: false,
    }
}

/// In short, without a look at the chain.
fn brief_of(entry: &Entry) -> SegmentBrief {
    SegmentBrief {
        name: entry.name.clone(),
        checkpoint: entry.checkpoint,
        digest: entry.digest,
        bytes: entry.bytes,
        parent: parent_of(entry),
        created_unix_ns: entry.created_unix_ns,
        links: entry.links,
        complete: false,
        label: entry.label.clone(),
    }
}

/// In short, with as many links as the chain has now; 0 when it is not whole.
fn with_links(entry: &Entry, links: u32) -> SegmentBrief {
    SegmentBrief {
        complete: links > 0,
        links,
        ..brief_of(entry)
    }
}

pub(super) fn brief(store: &FsStore, entry: &Entry) -> SegmentBrief {
    let links = store.chain(&entry.name).map_or(0, |chain| chain.len());
    with_links(entry, u32::try_from(links).unwrap_or(u32::MAX))
}

/// What is not merged for want of a key.
fn unmergeable(store: &FsStore) -> Option<String> {
    let vms = store.unmergeable();
    let all: Vec<String> = vms.iter().map(|(vm, key)| format!("{vm} (key {key})")).collect();
    (!all.is_empty()).then(|| {
        format!(
            "links are not merged that are encrypted with a key which is not here (`standby serve --key-file`): of {}",
            all.join(", ")
        )
    })
}

fn show(store: &FsStore, name: &segment::SegmentName) -> Result<SegmentDetail, StoreError> {
    let reader = store.open_segment(name)?;
    let damaged = |source| StoreError::Damaged {
        name: name.clone(),
        source,
    };
    let entry = Entry::of(&reader);
    let manifest = reader.manifest();
    let index = reader.index();
    let spaces = manifest.spaces.iter().map(|s| SpaceBrief {
        id: s.id.0,
        name: s.name.clone(),
        page_bytes: s.page_bytes,
        pages: s.pages,
    });
    let incomplete = store.chain(name).err().map(|e| e.to_string());
    // How many there are is encrypted as they are.
    let records = match reader.is_open() {
        true => reader.records().map_err(damaged)?.len() as u64,
        false => 0,
    };
    Ok(SegmentDetail {
        segment: brief(store, &entry),
        producer: manifest.producer.clone(),
        spaces: spaces.collect(),
        records,
        key: entry.key.map(|key| key.to_string()),
        frames: index.len() as u64,
        first_epoch: manifest.first_epoch.map(|e| e.0),
        incomplete,
    })
}

/// How far above the highest generation known here one may be that the registry does not confirm. A promise is for ever:
/// of a number near the last there is, nobody could ever go on from it. Generations go up by one a takeover.
const MAX_LEAP: u64 = 1000;

async fn seal(inner: &Arc<Inner>, call: SealCall) -> Result<Reply, Failure> {
    let SealCall { vm, generation } = call;
    let promised = inner.store.promised(&vm);
    if generation.0.saturating_sub(promised.0) > MAX_LEAP {
        let given = inner.registry.get_vm(&vm).await.map(|record| record.generation);
        if !given.as_ref().is_ok_and(|given| *given >= generation) {
            let says = given.map_or_else(|e| e.to_string(), |given| format!("it is at {given}"));
            return Err(Failure {
                why: format!(
                    "generation {generation} of VM {vm} is not promised: {promised} is the highest known here, and the \
                     registry does not confirm one so far above it ({says})"
                ),
            });
        }
    }
    let (agent, of) = (inner.clone(), vm.clone());
    // The promise first, and it is durable before anything is read: what is read then is all that can ever have been
    // acknowledged under a lower generation.
    let sealed = blocking(move || {
        let generation = agent.store.promise(&of, generation)?;
        Ok::<_, StoreError>(held(&agent, &of, generation))
    });
    match sealed.await {
        Ok(report) => {
            tracing::info!(%vm, %generation, newest = ?report.newest.as_ref().map(|b| &b.name), "sealed");
            inner.sessions.sealed(&vm, generation);
            Ok(Reply::Sealed(report))
        }
        Err(StoreError::Fenced { vm, asked, current }) => Ok(Reply::Fenced(Fenced { vm, asked, current })),
        Err(error) => Err(failure(&error)),
    }
}

/// What is here of `vm`.
fn held(inner: &Inner, vm: &VmId, generation: Generation) -> SealReport {
    let store = &*inner.store;
    // A lease that ends a part of a millisecond later has not ended.
    let granted = inner
        .grants
        .remaining(vm)
        .map(|left| left.as_micros().div_ceil(1000) as u64);
    let newest = store.newest_complete(vm);
    let beyond = |e: &Entry| {
        newest
            .as_ref()
            .is_none_or(|n| e.name.position() > n.name.position())
    };
    // What was stored by a promote and never acknowledged was not lost when it is here; and the mark may be behind.
    let had = [store.acked(vm), newest.as_ref().map(|e| e.name.clone())];
    SealReport {
        generation,
        had: had.into_iter().flatten().max_by_key(|name| name.position()),
        dangling: store.entries(vm).pop().filter(beyond).map(|e| brief_of(&e)),
        newest: newest.map(|e| brief(store, &e)),
        grant_remaining_ms: granted,
    }
}

/// What is here, after a look for damage: in a short chain always, in a long one when it is asked for.
async fn holding(inner: &Arc<Inner>, call: HoldingCall) -> Result<Reply, Failure> {
    let HoldingCall { vm, thorough } = call;
    let agent = inner.clone();
    // One at a time: it reads much, and whoever asks often shall not keep the disk busy.
    let _turn = inner.verifying.lock().await;
    run(move || {
        let max_bytes = if thorough { u64::MAX } else { VERIFY_BYTES };
        agent.store.verify_newest(&vm, max_bytes)?;
        Ok(Reply::Sealed(held(&agent, &vm, agent.store.promised(&vm))))
    })
    .await
}

/// Sends a file as chunks and `End`.
async fn stream<W: tokio::io::AsyncWrite + Unpin>(
    writer: &mut FrameWriter<W>,
    stream: u32,
    file: File,
    bytes: u64,
) -> Result<(), TransportError> {
    let file = Arc::new(file);
    let mut at = 0;
    while at < bytes {
        let (from, len) = (file.clone(), (bytes - at).min(CHUNK_BYTES));
        let read = tokio::task::spawn_blocking(move || {
            let mut buffer = vec![0; len as usize];
            from.read_exact_at(&mut buffer, at).map(|()| buffer)
        });
        let read = read.await.unwrap_or_else(|e| Err(std::io::Error::other(e)));
        match read {
            Ok(buffer) => writer.send(stream, &Message::Chunk(buffer)).await?,
            Err(error) => {
                let failure = Failure {
                    why: format!("read the segment at byte {at}: {error}"),
                };
                return writer
                    .send(stream, &Message::Reply(Box::new(Reply::Failed(failure))))
                    .await;
            }
        }
        at += len;
    }
    writer.send(stream, &Message::End(End {})).await
}
