//! A connection on which an owner ships a VM: the pure receiver, with a disk and a socket.
//!
//! The socket is read, the disk is written and the answers are sent at the same time: the disk's work is done in order
//! by one thread per connection, behind a short queue. While the queue is full the socket is not read, so that a slow
//! disk slows the owner's shipping and takes no memory; signs of life are sent all the while.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use segment::{Generation, SegmentName, VmId};
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::authority::{Asked, Denied};
use super::sessions::Session;
use super::{Inner, housekeep};
use crate::protocol::{BeginResult, CommitResult, PromiseResult, Receiver, ReceiverAction, ReceiverEvent};
use crate::store::{FsStore, Incoming, Lease, StoreError, Stored};
use crate::transport::{
    ByteStream, DEAD_AFTER, FrameWriter, Link, PING_EVERY, Peer, TransportError, in_full,
};
use crate::wire::{Held, Message, Offer, RefuseReason, Reject};

/// The most pieces that wait for the disk.
const DISK_QUEUE: usize = 16;
/// The most frames that wait for the receiver.
const FRAME_QUEUE: usize = 8;

/// What the disk's thread is to do.
enum Job {
    Promise {
        vm: VmId,
        generation: Generation,
        lease: Option<Duration>,
    },
    Find {
        vm: VmId,
    },
    Begin {
        transfer: u32,
        offer: Offer,
    },
    Write {
        transfer: u32,
        bytes: Vec<u8>,
    },
    Commit {
        transfer: u32,
    },
    Abort {
        transfer: u32,
    },
}

/// Serves one connection until it ends.
pub(super) async fn serve<S: ByteStream>(inner: Arc<Inner>, link: Link<S>, who: &Peer) {
    let peer = link.peer().to_owned();
    let started = Instant::now();
    let mut receiver = Receiver::new(PING_EVERY, DEAD_AFTER, started.elapsed());
    let Link {
        mut reader,
        mut writer,
    } = link;

    let (frames, mut incoming) = mpsc::channel(FRAME_QUEUE);
    let reading = tokio::spawn(async move {
        loop {
            let frame = reader.next().await;
            let failed = frame.is_err();
            if frames.send(frame).await.is_err() || failed {
                return;
            }
        }
    });
    let (jobs, todo) = mpsc::channel(DISK_QUEUE);
    let (done, mut results) = mpsc::unbounded_channel();
    let agent = inner.clone();
    tokio::task::spawn_blocking(move || Disk::new(agent).run(todo, &done));

    let mut waiting: VecDeque<Job> = VecDeque::new();
    let (kick, mut kicked) = mpsc::unbounded_channel();
    let mut session: Option<Session> = None;
    // The owner that is asked about, if one is: an answer of the registry is waited for without holding up the rest.
    let mut judging: Option<Judging<'_>> = None;
    let why = loop {
        let deadline = receiver.deadline().map(|at| started + at);
        let event = tokio::select! {
            // First what is done, so that a flood of frames cannot keep an acknowledgement back.
            biased;
            Some(result) = results.recv() => result,
            Some(current) = kicked.recv() => ReceiverEvent::Superseded { current },
            judged = judged(&mut judging) => {
                judging = None;
                match judged {
                    Ok(job) => {
                        waiting.push_back(job);
                        continue;
                    }
                    Err(result) => ReceiverEvent::Promised(result),
                }
            }
            permit = jobs.reserve(), if !waiting.is_empty() => {
                match (permit, waiting.pop_front()) {
                    (Ok(permit), Some(job)) => permit.send(job),
                    (Ok(_), None) => {}
                    (Err(_), _) => break "the disk's thread ended".to_owned(),
                }
                continue;
            }
            frame = incoming.recv(), if waiting.len() < DISK_QUEUE => match frame {
                Some(Ok(frame)) => ReceiverEvent::Frame { stream: frame.stream, message: frame.message },
                Some(Err(TransportError::Closed { .. })) | None => break "closed by the owner".to_owned(),
                Some(Err(error)) => break in_full(&error),
            },
            // Frames that wait for a slow disk to make room show that the owner lives.
            () = sleep_until(deadline) => match incoming.is_empty() {
                true => ReceiverEvent::Tick,
                false => ReceiverEvent::Unread,
            },
        };
        inner.metrics.heard(&event);
        let mut actions = VecDeque::from(receiver.step(event, started.elapsed()));
        if session.is_none()
            && let Some((vm, generation, owner)) = receiver.shipping()
        {
            tracing::info!(%vm, %generation, owner, %peer, "an owner ships");
            session = Some(inner.sessions.enter(vm, generation, owner, kick.clone()));
        }
        let mut end = None;
        while let Some(action) = actions.pop_front() {
            match action {
                ReceiverAction::Promise {
                    vm,
                    generation,
                    lease,
                } => judging = Some(Box::pin(judge(&inner, who, vm, generation, lease))),
                // At once, and not behind what waits for the disk: it is in memory.
                ReceiverAction::Grant {
                    vm,
                    generation,
                    seq,
                    ttl,
                } => {
                    if inner.grants.grant(&inner.store, &vm, generation, ttl) {
                        let event = ReceiverEvent::<Stored>::Granted { seq };
                        actions.extend(receiver.step(event, started.elapsed()));
                    }
                }
                ReceiverAction::Release { vm, generation } => {
                    tracing::info!(%vm, %generation, "the owner's guest stands still for good");
                    inner.grants.release(&inner.store, &vm, generation);
                }
                action => {
                    if let ReceiverAction::Send { message, .. } = &action {
                        inner.metrics.answered(message);
                    }
                    end = perform(action, &mut writer, &mut waiting).await.or(end);
                }
            }
        }
        if let Some(why) = end {
            break why;
        }
    };
    // What was sent last (that it is fenced) has to arrive: closed in this direction, and not just dropped.
    let _ = tokio::time::timeout(PING_EVERY, writer.finish()).await;
    reading.abort();
    if let Some(session) = session {
        tracing::info!(vm = %session.vm(), %peer, %why, "the owner's connection ended");
    } else {
        tracing::debug!(%peer, %why, "a connection ended");
    }
}

type Judging<'a> = Pin<Box<dyn Future<Output = Result<Job, PromiseResult>> + Send + 'a>>;

/// Whether the owner may ship: then the disk is to promise its generation.
async fn judge(
    inner: &Inner,
    who: &Peer,
    vm: VmId,
    generation: Generation,
    lease: Option<Duration>,
) -> Result<Job, PromiseResult> {
    let asked = Asked::Ship { vm: &vm, generation };
    match inner.judge(who, asked).await {
        Ok(()) => Ok(Job::Promise {
            vm,
            generation,
            lease,
        }),
        Err(Denied::Over { current }) => Err(PromiseResult::Fenced { current }),
        // It asks again after a while, and shows why meanwhile.
        Err(Denied::Never(why) | Denied::Later(why)) => Err(PromiseResult::Failed { why }),
    }
}

async fn judged(judging: &mut Option<Judging<'_>>) -> Result<Job, PromiseResult> {
    match judging {
        Some(judging) => judging.await,
        None => std::future::pending().await,
    }
}

/// Does what the receiver says; returns why the connection is over, when it is.
async fn perform<W: AsyncWrite + Unpin>(
    action: ReceiverAction,
    writer: &mut FrameWriter<W>,
    waiting: &mut VecDeque<Job>,
) -> Option<String> {
    let job = match action {
        ReceiverAction::Send { stream, message } => {
            let sending = writer.send(stream, &message);
            return match tokio::time::timeout(DEAD_AFTER, sending).await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(in_full(&error)),
                Err(_) => Some("the owner takes no answers".to_owned()),
            };
        }
        ReceiverAction::Close { code, why } => {
            if code != 0 {
                let reject = Message::Reject(Reject {
                    code,
                    why: why.clone(),
                });
                // It may be gone already.
                let _ = tokio::time::timeout(PING_EVERY, writer.send(0, &reject)).await;
            }
            return Some(why);
        }
        ReceiverAction::Find { vm } => Job::Find { vm },
        ReceiverAction::Begin { transfer, offer } => Job::Begin { transfer, offer },
        ReceiverAction::Write { transfer, bytes } => Job::Write { transfer, bytes },
        ReceiverAction::Commit { transfer } => Job::Commit { transfer },
        ReceiverAction::Abort { transfer } => Job::Abort { transfer },
        // Done by the caller.
        ReceiverAction::Promise { .. } | ReceiverAction::Grant { .. } | ReceiverAction::Release { .. } => {
            return None;
        }
    };
    waiting.push_back(job);
    None
}

/// A segment on its way in, with what it stands on kept from being collected; or why it cannot be taken any more.
type Arriving = Result<(Incoming, Option<Lease>), (RefuseReason, String)>;

/// The disk's side of one connection.
struct Disk {
    agent: Arc<Inner>,
    store: Arc<FsStore>,
    generation: Generation,
    /// What is on its way in; none of one whose write failed.
    transfers: HashMap<u32, (Offer, Arriving)>,
    /// The checkpoint that was last found or made complete: to begin with what stands on it needs no look at its chain.
    complete: Option<Held>,
}

impl Disk {
    fn new(agent: Arc<Inner>) -> Self {
        Self {
            store: agent.store.clone(),
            agent,
            generation: Generation(0),
            transfers: HashMap::new(),
            complete: None,
        }
    }

    /// Works until the connection's task is gone; what is half-way then is dropped with its temporary file.
    fn run(mut self, mut todo: mpsc::Receiver<Job>, done: &mpsc::UnboundedSender<ReceiverEvent<Stored>>) {
        while let Some(job) = todo.blocking_recv() {
            let Some(event) = self.work(job) else { continue };
            if done.send(event).is_err() {
                return;
            }
        }
    }

    fn work(&mut self, job: Job) -> Option<ReceiverEvent<Stored>> {
        match job {
            Job::Promise {
                vm,
                generation,
                lease,
            } => {
                self.generation = generation;
                // Before the promise: under it the first may be granted.
                if let Some(ttl) = lease
                    && let Err(error) = self.agent.grants.note(&vm, ttl)
                {
                    let why = in_full(&error);
                    tracing::error!(%vm, why, "the length of the lease cannot be written down: none is granted here");
                }
                Some(ReceiverEvent::Promised(
                    match self.store.promise(&vm, generation) {
                        Ok(_) => PromiseResult::Promised,
                        Err(StoreError::Fenced { current, .. }) => PromiseResult::Fenced { current },
                        Err(error) => PromiseResult::Failed {
                            why: failed("promise a generation", &error),
                        },
                    },
                ))
            }
            Job::Find { vm } => {
                let newest = self.store.newest_complete(&vm);
                let newest = newest.map(|e| Held {
                    name: e.name,
                    checkpoint: e.checkpoint,
                });
                self.complete.clone_from(&newest);
                Some(ReceiverEvent::Found(newest))
            }
            Job::Begin { transfer, offer } => {
                let result = self.begin(transfer, offer);
                Some(ReceiverEvent::Begun { transfer, result })
            }
            Job::Write { transfer, bytes } => {
                if let Some((_, incoming)) = self.transfers.get_mut(&transfer)
                    && let Ok((file, _)) = incoming
                    && let Err(error) = file.write_all(&bytes)
                {
                    // Dropping it frees its room; the commit tells.
                    let why = file
                        .take_failure()
                        .map_or_else(|| error.to_string(), |e| in_full(&e));
                    *incoming = Err((RefuseReason::Failed, why));
                }
                None
            }
            Job::Commit { transfer } => {
                let (offer, incoming) = self.transfers.remove(&transfer)?;
                let result = match incoming {
                    // The lease on its parent ends after the commit has looked at the chain.
                    Ok((incoming, _lease)) => self.commit(&offer, incoming),
                    Err((reason, why)) => CommitResult::Refused { reason, why },
                };
                Some(ReceiverEvent::Committed { transfer, result })
            }
            Job::Abort { transfer } => {
                self.transfers.remove(&transfer);
                None
            }
        }
    }

    fn begin(&mut self, transfer: u32, offer: Offer) -> BeginResult<Stored> {
        let current = self.store.promised(&offer.name.vm);
        if current > self.generation {
            return BeginResult::Fenced { current };
        }
        let lease = match &offer.parent {
            None => None,
            Some(parent) => match self.store.lease_parent(&parent.name) {
                // Looked at once it cannot go any more.
                Ok(lease) if self.is_complete(parent) => Some(lease),
                Ok(_) | Err(_) => {
                    let why = format!(
                        "{} stands on {}, which is not complete here",
                        offer.name, parent.name
                    );
                    return BeginResult::Refused {
                        reason: RefuseReason::MissingParent,
                        why,
                    };
                }
            },
        };
        if let Some(stored) = self.store.stored(&offer.name) {
            return self.held_already(&offer, stored);
        }
        let begin = || self.store.begin_under(&offer.name, offer.bytes, self.generation);
        let begun = begin().or_else(|error| match error {
            // Kept until room is short: now it is.
            e if e.is_full() && housekeep::make_room(&self.agent) > 0 => begin(),
            e => Err(e),
        });
        match begun {
            Ok(incoming) => {
                self.transfers.insert(transfer, (offer, Ok((incoming, lease))));
                BeginResult::Ready
            }
            Err(StoreError::AlreadyHeld { stored }) => self.held_already(&offer, *stored),
            Err(StoreError::Fenced { current, .. }) => BeginResult::Fenced { current },
            Err(error) => {
                let (reason, why) = refusal(&offer.name, &error);
                BeginResult::Refused { reason, why }
            }
        }
    }

    fn held_already(&mut self, offer: &Offer, stored: Stored) -> BeginResult<Stored> {
        let held = stored.entry().checkpoint;
        if held != offer.checkpoint {
            let why = format!(
                "{} is stored here as checkpoint {held}, and {} was offered: two owners wrote one name",
                offer.name, offer.checkpoint
            );
            return BeginResult::Refused {
                reason: RefuseReason::DuplicateName,
                why,
            };
        }
        if !self.is_complete(&offer.held()) {
            let why = format!("{} is here, but not all it stands on", offer.name);
            return BeginResult::Refused {
                reason: RefuseReason::MissingParent,
                why,
            };
        }
        if let Err(error) = self.store.note_acked(&offer.name) {
            let (reason, why) = refusal(&offer.name, &error);
            return BeginResult::Refused { reason, why };
        }
        self.complete = Some(offer.held());
        BeginResult::Have(stored)
    }

    fn commit(&mut self, offer: &Offer, incoming: Incoming) -> CommitResult<Stored> {
        let stored = match incoming.commit() {
            Ok(stored) => stored,
            Err(StoreError::Fenced { current, .. }) => return CommitResult::Fenced { current },
            Err(error) => {
                let (reason, why) = refusal(&offer.name, &error);
                return CommitResult::Refused { reason, why };
            }
        };
        let entry = stored.entry();
        if entry.checkpoint != offer.checkpoint {
            let why = format!("{} came as another checkpoint than was offered", offer.name);
            return CommitResult::Refused {
                reason: RefuseReason::Invalid,
                why,
            };
        }
        // By what came, not by what was offered; and looked up in full, for something may have been removed below it.
        if let Err(missing) = self.store.chain(&offer.name) {
            let why = format!("{} is stored, but not all it stands on: {missing}", offer.name);
            return CommitResult::Refused {
                reason: RefuseReason::MissingParent,
                why,
            };
        }
        // Before it is told, so that this holder can never have acknowledged more than it remembers.
        if let Err(error) = self.store.note_acked(&offer.name) {
            let (reason, why) = refusal(&offer.name, &error);
            return CommitResult::Refused { reason, why };
        }
        self.complete = Some(offer.held());
        self.agent.hot.stored(&offer.name.vm);
        CommitResult::Stored(stored)
    }

    /// Whether this very checkpoint is here with all it stands on.
    fn is_complete(&self, held: &Held) -> bool {
        let here = self
            .store
            .get(&held.name)
            .is_some_and(|e| e.checkpoint == held.checkpoint);
        here && (self.complete.as_ref() == Some(held) || self.store.chain(&held.name).is_ok())
    }
}

fn refusal(name: &SegmentName, error: &StoreError) -> (RefuseReason, String) {
    let reason = match error {
        e if e.is_full() => RefuseReason::Full,
        StoreError::DuplicateName { .. } => RefuseReason::DuplicateName,
        StoreError::Damaged { .. } | StoreError::OtherName { .. } | StoreError::TooLong { .. } => {
            RefuseReason::Invalid
        }
        _ => RefuseReason::Failed,
    };
    (reason, failed(&format!("store {name}"), error))
}

fn failed(what: &str, error: &StoreError) -> String {
    let why = in_full(error);
    tracing::warn!(what, error = %why, "the store refused");
    why
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
