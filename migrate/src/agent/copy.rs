//! Segments from several holders at once: each link is taken by whoever is free, verified, stored durably, and tried at
//! the next holder when one dies or lies. What is here already is not asked for again, so nothing starts over.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use segment::{Generation, VmId};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::{Inner, blocking};
use crate::registry::{MAX_HOLDERS, MAX_REGISTER_SEGMENTS, SegmentRecord};
use crate::store::{Incoming, MAX_CHAIN_LINKS, Pace, StoreError, Stored};
use crate::transport::{Client, in_full};
use crate::wire::{
    Call, CopyCall, CopyReport, Failure, Held, ListCall, MAX_PAGE_SEGMENTS, NameCall, Reply, SegmentBrief,
};

/// How long a holder may take to begin sending a segment, or to list a page.
const HOLDER_DEADLINE: Duration = Duration::from_secs(10);
/// The most holders that are asked at the same time.
const MAX_AT_ONCE: usize = 4;
/// The most segments of one VM that are listed.
const MAX_LISTED: usize = 100_000;
/// The most failures that are told.
const MAX_TOLD: usize = 10;

/// What came of copying.
#[derive(Debug, Default)]
pub(super) struct Copied {
    pub(super) stored: Vec<SegmentBrief>,
    /// In words, the first of them.
    pub(super) failures: Vec<String>,
}

/// A segment that is wanted, and who could not give it.
#[derive(Debug)]
struct Item {
    brief: SegmentBrief,
    tried: BTreeSet<usize>,
}

#[derive(Debug, Default)]
struct Board {
    wanted: VecDeque<Item>,
    under_way: usize,
    copied: Copied,
}

enum Next {
    Take(Box<Item>),
    /// Somebody may put back what this one has not tried.
    Wait,
    End,
}

impl Board {
    fn next(&mut self, holder: usize) -> Next {
        match self.wanted.iter().position(|item| !item.tried.contains(&holder)) {
            Some(at) => match self.wanted.remove(at) {
                Some(item) => {
                    self.under_way += 1;
                    Next::Take(Box::new(item))
                }
                None => Next::End,
            },
            None if self.under_way > 0 => Next::Wait,
            None => Next::End,
        }
    }

    fn fail(&mut self, why: String) {
        if self.copied.failures.len() < MAX_TOLD {
            self.copied.failures.push(why);
        }
    }
}

/// What the workers share.
struct Work {
    inner: Arc<Inner>,
    generation: Generation,
    pace: Pace,
    // Taken from and put back by every worker; held for moments.
    board: Mutex<Board>,
    moved: Notify,
}

impl Work {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies what is not here of `wanted`, in that order as far as several at once have one.
pub(super) async fn copy(
    inner: &Arc<Inner>,
    from: &[String],
    wanted: Vec<SegmentBrief>,
    generation: Generation,
    pace: Pace,
) -> Copied {
    let missing = wanted.into_iter().filter(|brief| !is_here(inner, &brief.held()));
    let wanted = missing.map(|brief| Item {
        brief,
        tried: BTreeSet::new(),
    });
    let work = Arc::new(Work {
        inner: inner.clone(),
        generation,
        pace,
        board: Mutex::new(Board {
            wanted: wanted.collect(),
            ..Board::default()
        }),
        moved: Notify::new(),
    });
    let mut workers = JoinSet::new();
    for (at, holder) in from.iter().take(MAX_AT_ONCE).enumerate() {
        workers.spawn(serve(work.clone(), at, holder.clone()));
    }
    while let Some(ended) = workers.join_next().await {
        if let Err(e) = ended {
            std::panic::resume_unwind(e.into_panic());
        }
    }
    let mut board = work.board();
    let left: Vec<_> = board.wanted.drain(..).map(|item| item.brief.name).collect();
    if let Some(first) = left.first() {
        let why = format!("{} segments came from nobody ({first} is one)", left.len());
        board.fail(why);
    }
    std::mem::take(&mut board.copied)
}

pub(super) fn is_here(inner: &Inner, held: &Held) -> bool {
    inner
        .store
        .get(&held.name)
        .is_some_and(|e| e.checkpoint == held.checkpoint)
}

/// Why a segment did not come.
enum Trouble {
    /// The holder cannot be reached: it gives nothing.
    Holder(String),
    /// It cannot give this one.
    Segment(String),
}

/// Takes from one holder until there is nothing more that it could give.
async fn serve(work: Arc<Work>, at: usize, holder: String) {
    let mut client: Option<Client> = None;
    loop {
        let moved = work.moved.notified();
        tokio::pin!(moved);
        // Before the look at the board, so that nothing that is put back in between is missed.
        moved.as_mut().enable();
        let next = work.board().next(at);
        let mut item = match next {
            Next::Take(item) => item,
            Next::Wait => {
                moved.await;
                continue;
            }
            Next::End => break,
        };
        let fetched = fetch(&work, &holder, &mut client, &item.brief).await;
        let lost = matches!(&fetched, Err(Trouble::Holder(_)));
        {
            let mut board = work.board();
            board.under_way -= 1;
            match fetched {
                Ok(()) => board.copied.stored.push(item.brief),
                Err(trouble) => {
                    match trouble {
                        Trouble::Holder(why) => board.fail(format!("{holder}: {why}")),
                        Trouble::Segment(why) => {
                            board.fail(format!("{holder}: {}: {why}", item.brief.name));
                        }
                    }
                    item.tried.insert(at);
                    board.wanted.push_front(*item);
                }
            }
        }
        work.moved.notify_waiters();
        if lost {
            return;
        }
    }
    work.moved.notify_waiters();
}

async fn fetch(
    work: &Work,
    holder: &str,
    kept: &mut Option<Client>,
    brief: &SegmentBrief,
) -> Result<(), Trouble> {
    // Kept again only when the answer was read whole: after a failure another question needs another connection.
    let mut client = match kept.take() {
        Some(client) => client,
        None => Client::connect(holder, &work.inner.identity)
            .await
            .map_err(|e| Trouble::Holder(e.in_full()))?,
    };
    let segment = Trouble::Segment;
    let call = Call::Fetch(NameCall {
        name: brief.name.clone(),
    });
    let sent = match client.call(call, HOLDER_DEADLINE).await {
        Ok(Reply::Fetch(sent)) if sent.name == brief.name => sent,
        Ok(_) => return Err(segment("it answered something else".into())),
        Err(e) => return Err(segment(in_full(&e))),
    };
    let (held, generation) = (brief.held(), work.generation);
    receive(&work.inner, &mut client, &sent, &held, generation, &work.pace)
        .await
        .map_err(segment)?;
    *kept = Some(client);
    Ok(())
}

/// The file that a holder announced as `sent`, verified and stored.
pub(super) async fn receive(
    inner: &Arc<Inner>,
    client: &mut Client,
    sent: &SegmentBrief,
    held: &Held,
    generation: Generation,
    pace: &Pace,
) -> Result<Stored, String> {
    if sent.checkpoint != held.checkpoint {
        return Err(format!(
            "it has {} as another checkpoint than the chain needs",
            held.name
        ));
    }
    let (store, of, bytes) = (inner.store.clone(), held.name.clone(), sent.bytes);
    let begun = blocking(move || store.begin_under(&of, bytes, generation)).await;
    let mut incoming: Incoming = begun.map_err(|e| in_full(&e))?;
    while let Some(bytes) = client.next_chunk().await.map_err(|e| in_full(&e))? {
        let pace = pace.clone();
        let written = blocking(move || {
            let paid = pace.spend(bytes.len() as u64);
            let written = paid.and_then(|()| incoming.write_all(&bytes));
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
    let entry = stored.entry();
    let lie = if entry.checkpoint != held.checkpoint {
        Some(format!(
            "{} came as another checkpoint than was announced",
            held.name
        ))
    } else if entry.digest != sent.digest {
        Some(format!(
            "{} was announced with digest {} and came with {}",
            held.name, sent.digest, entry.digest
        ))
    } else {
        None
    };
    if let Some(why) = lie {
        // A holder that says one thing and sends another is not to be built on.
        let (store, of) = (inner.store.clone(), held.name.clone());
        blocking(move || store.set_aside(&of))
            .await
            .map_err(|e| in_full(&e))?;
        tracing::error!(holder = client.peer(), %why, "a holder lies: its copy is set aside");
        return Err(why);
    }
    tracing::info!(name = %held.name, bytes, from = client.peer(), "fetched");
    Ok(stored)
}

/// What a holder has of a VM.
async fn list(inner: &Inner, holder: &str, vm: &VmId) -> Result<Vec<SegmentBrief>, String> {
    let mut client = Client::connect(holder, &inner.identity)
        .await
        .map_err(|e| e.in_full())?;
    let mut all: Vec<SegmentBrief> = Vec::new();
    while all.len() < MAX_LISTED {
        let call = ListCall {
            vm: Some(vm.clone()),
            after: all.last().map(|s| s.name.clone()),
            limit: MAX_PAGE_SEGMENTS,
        };
        let page = match client.call(Call::List(call), HOLDER_DEADLINE).await {
            Ok(Reply::List(page)) => page,
            Ok(_) => return Err("it answered something else".into()),
            Err(e) => return Err(in_full(&e)),
        };
        let end = !page.more || page.segments.is_empty();
        // Of this VM only, whatever it says.
        all.extend(page.segments.into_iter().filter(|s| s.name.vm == *vm));
        if end {
            break;
        }
    }
    Ok(all)
}

/// The chain of `tip` as one holder has it, from the tip down; shorter when it does not meet.
fn chain(listed: &[SegmentBrief], tip: &Held) -> Vec<SegmentBrief> {
    let by_name: BTreeMap<_, _> = listed.iter().map(|s| (&s.name, s)).collect();
    let (mut links, mut next) = (Vec::new(), Some(tip.clone()));
    while let Some(held) = next.take().filter(|_| links.len() < MAX_CHAIN_LINKS) {
        if let Some(brief) = by_name.get(&held.name)
            && brief.checkpoint == held.checkpoint
        {
            next.clone_from(&brief.parent);
            links.push((*brief).clone());
        }
    }
    links
}

/// Brings what is missing of a chain from all holders at once. What does not come is left to who goes down the chain
/// link by link afterwards.
pub(super) async fn prefetch(inner: &Arc<Inner>, from: &[String], tip: &Held, generation: Generation) {
    for holder in from {
        let Ok(listed) = list(inner, holder, &tip.name.vm).await else {
            continue;
        };
        let links = chain(&listed, tip);
        if links.is_empty() {
            continue;
        }
        let copied = copy(inner, from, links, generation, Pace::unlimited()).await;
        for why in &copied.failures {
            tracing::warn!(tip = %tip.name, %why, "a holder did not give a link");
        }
        return;
    }
}

/// Everything that other holders have of a VM: what another agent asks for when this one is to join its holders.
pub(super) async fn copy_vm(inner: &Arc<Inner>, call: CopyCall) -> Result<CopyReport, Failure> {
    let CopyCall { vm, generation, from } = call;
    let _counted = inner.metrics.copying();
    if from.len() > MAX_HOLDERS {
        let why = format!("{} holders to copy from: at most {MAX_HOLDERS}", from.len());
        return Err(Failure { why });
    }
    let record = inner.registry.get_vm(&vm).await.map_err(|error| Failure {
        why: format!("who holds VM {vm} is not known: {}", in_full(&error)),
    })?;
    // Whom to ask is not for the caller alone to say: a node that is no holder could have anything under the VM's name, and
    // what is newest here is what a takeover runs.
    let (from, strangers): (Vec<_>, Vec<_>) = from
        .into_iter()
        .filter(|holder| *holder != inner.address)
        .partition(|holder| record.holders.contains(holder));
    let (mut wanted, mut rest) = (Vec::new(), BTreeMap::new());
    let mut tip: Option<SegmentBrief> = None;
    let mut failures: Vec<_> = strangers
        .iter()
        .map(|stranger| format!("{stranger} is no holder of VM {vm}: it was not asked"))
        .collect();
    let unasked = failures.len();
    for holder in &from {
        let listed = match list(inner, holder, &vm).await {
            Ok(listed) => listed,
            Err(why) => {
                failures.push(format!("{holder}: {why}"));
                continue;
            }
        };
        let newest = listed
            .iter()
            .filter(|s| s.complete)
            .max_by_key(|s| s.name.position());
        if let Some(newest) = newest
            && tip.as_ref().is_none_or(|t| t.name < newest.name)
        {
            // What a takeover needs comes first.
            wanted = chain(&listed, &newest.held());
            tip = Some(newest.clone());
        }
        for brief in listed {
            rest.entry(brief.name.clone()).or_insert(brief);
        }
    }
    let asked_for_nothing = from.is_empty() && unasked == 0;
    if tip.is_none() && rest.is_empty() && failures.len() == from.len() + unasked && !asked_for_nothing {
        return Err(Failure {
            why: format!("no holder of VM {vm} says what it has: {}", failures.join("; ")),
        });
    }
    // In the order they were taken, so that what stands on something comes after it.
    let first: BTreeSet<_> = wanted.iter().map(|s| s.name.clone()).collect();
    wanted.extend(rest.into_values().filter(|s| !first.contains(&s.name)));
    let copied = copy(inner, &from, wanted, generation, inner.copying.clone()).await;
    failures.extend(copied.failures);
    if let Some(tip) = &tip
        && inner.store.chain(&tip.name).is_err()
    {
        // Holders that fold differently have links that do not meet: one holder's chain, then.
        super::gather::gather(inner, &from, tip, generation, false)
            .await
            .map_err(|why| Failure {
                why: format!("the newest checkpoint of VM {vm} could not be copied: {why}"),
            })?;
    }
    let (segments, bytes) = (
        copied.stored.len() as u64,
        copied.stored.iter().map(|s| s.bytes).sum(),
    );
    tracing::info!(%vm, segments, bytes, "copied from other holders");
    tell(inner, &vm, generation, copied.stored).await;
    let newest = inner.store.newest_complete(&vm);
    Ok(CopyReport {
        segments,
        bytes,
        newest: newest.map(|e| Held {
            name: e.name,
            checkpoint: e.checkpoint,
        }),
        notes: failures,
    })
}

/// Tells the registry that committed segments are here too.
async fn tell(inner: &Inner, vm: &VmId, generation: Generation, stored: Vec<SegmentBrief>) {
    let newest = match inner.registry.get_vm(vm).await {
        Ok(record) => record.newest,
        Err(error) => return tracing::debug!(%vm, %error, "the registry was not told of copies"),
    };
    let Some(newest) = newest else { return };
    // What is newer is not committed as far as the registry knows: its owner says when it is.
    let records: Vec<_> = stored
        .into_iter()
        .filter(|s| s.name <= newest.name)
        .map(|s| SegmentRecord {
            name: s.name,
            checkpoint: s.checkpoint,
            digest: s.digest,
            bytes: s.bytes,
            parent: s.parent,
            holders: vec![inner.address.clone()],
            created_unix_ns: s.created_unix_ns,
        })
        .collect();
    for some in records.chunks(MAX_REGISTER_SEGMENTS) {
        if let Err(error) = inner
            .registry
            .register_segments(vm, generation, some.to_vec())
            .await
        {
            return tracing::debug!(%vm, %error, "the registry was not told of copies");
        }
    }
}
