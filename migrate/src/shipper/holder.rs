//! The task of one holder: it steps the pure sender and does what it says.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::connection::{self, Heard, Out};
use super::{HolderState, Shared, ShipEvent};
use crate::clock::boottime;
use crate::protocol::{Next, Sender, SenderAction, SenderConfig, SenderEvent, SenderState, parent_of};
use crate::spool::{self, Spool};
use crate::store::{Entry, StoreError};
use crate::transport::in_full;
use crate::wire::{Held, Message, Offer};

/// How long what was said last may take to go out.
const FAREWELL: Duration = Duration::from_millis(500);
/// The most events that wait for the task.
const INBOX: usize = 256;
/// How often the spool is asked again when what it named was merged away before it could be opened.
const PIN_TRIES: usize = 8;
/// How long until the spool is asked again after its disk failed.
const SPOOL_AGAIN: Duration = Duration::from_secs(1);

pub(super) struct Holder {
    shared: Arc<Shared>,
    at: usize,
    address: String,
    sender: Sender,
    /// The zero of the sender's clock, which goes on while the host is suspended: leases are counted by it.
    started: Duration,
    inbox: mpsc::Receiver<Heard>,
    heard: mpsc::Sender<Heard>,
    connection: Option<JoinHandle<()>>,
    out: Option<mpsc::UnboundedSender<Out>>,
    /// The file the spool gave last, until the sender says under which number it goes.
    opened: Option<(Offer, File)>,
    files: HashMap<u32, (File, u64)>,
    /// When to ask the spool again on our own.
    again: Option<Instant>,
    /// Whether `HolderUp` was said last.
    up: bool,
    node: Option<String>,
}

impl Holder {
    pub(super) fn new(shared: Arc<Shared>, at: usize, address: String, config: SenderConfig) -> Self {
        let (heard, inbox) = mpsc::channel(INBOX);
        Self {
            shared,
            at,
            address,
            sender: Sender::new(config),
            started: boottime(),
            inbox,
            heard,
            connection: None,
            out: None,
            opened: None,
            files: HashMap::new(),
            again: None,
            up: false,
            node: None,
        }
    }

    /// Runs until `stop` changes or the holder has fenced the owner.
    pub(super) async fn run(
        mut self,
        mut notify: watch::Receiver<u64>,
        mut release: watch::Receiver<bool>,
        mut stop: watch::Receiver<bool>,
    ) {
        self.step(SenderEvent::Tick);
        if *release.borrow_and_update() {
            self.step(SenderEvent::Release);
        }
        loop {
            let now = boottime().saturating_sub(self.started);
            let deadline = self
                .sender
                .deadline()
                .map(|at| Instant::now() + at.saturating_sub(now));
            let wake = match (deadline, self.again) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            let event = tokio::select! {
                changed = notify.changed() => match changed {
                    Ok(()) => SenderEvent::Notify,
                    Err(_) => break,
                },
                heard = self.inbox.recv() => match heard {
                    Some(heard) => self.take(heard),
                    None => break,
                },
                () = sleep_until(wake) => {
                    if self.again.is_some_and(|at| Instant::now() >= at) {
                        self.again = None;
                        SenderEvent::Notify
                    } else {
                        SenderEvent::Tick
                    }
                }
                changed = release.changed() => match changed {
                    Ok(()) => SenderEvent::Release,
                    Err(_) => break,
                },
                _ = stop.changed() => break,
            };
            self.step(event);
            if let SenderState::Fenced { .. } = self.sender.state() {
                break;
            }
        }
        if *release.borrow_and_update() {
            // Both may have come at once. (Said twice it is the same.)
            self.step(SenderEvent::Release);
            self.part().await;
        }
        self.hang_up();
    }

    /// Lets what was said last go out: that the guest stands still, so that nobody waits for its lease.
    async fn part(&mut self) {
        self.out = None;
        if let Some(task) = &mut self.connection
            && tokio::time::timeout(FAREWELL, task).await.is_ok()
        {
            self.connection = None;
        }
    }

    fn take(&mut self, heard: Heard) -> SenderEvent {
        match heard {
            Heard::Up {
                connection,
                node,
                version,
                out,
            } => {
                self.out = Some(out);
                self.node = Some(node);
                SenderEvent::Connected { connection, version }
            }
            Heard::Event(event) => event,
            Heard::Segment { ticket, offer, file } => {
                self.opened = Some((offer.clone(), file));
                SenderEvent::NextIs {
                    ticket,
                    next: Next::Segment(offer),
                }
            }
            Heard::NoSegment { ticket, error } => {
                tracing::warn!(error = %in_full(&error), "the local store cannot be read");
                self.again = Some(Instant::now() + SPOOL_AGAIN);
                SenderEvent::NextIs {
                    ticket,
                    next: Next::UpToDate,
                }
            }
        }
    }

    fn step(&mut self, event: SenderEvent) {
        if let SenderEvent::Lost { why, .. } = &event {
            let why = why.clone();
            self.hang_up();
            if std::mem::take(&mut self.up) {
                tracing::warn!(holder = %self.address, %why, "holder lost");
                self.say(ShipEvent::HolderDown {
                    holder: self.address.clone(),
                    why,
                });
            }
        }
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let now = boottime().saturating_sub(self.started);
            for action in self.sender.step(event, now) {
                if let Some(then) = self.act(action) {
                    events.push_back(then);
                }
            }
        }
        self.show();
    }

    fn act(&mut self, action: SenderAction) -> Option<SenderEvent> {
        match action {
            SenderAction::Connect { connection } => {
                let run = connection::run(
                    self.address.clone(),
                    self.shared.identity.clone(),
                    connection,
                    self.heard.clone(),
                    self.shared.sent(self.at),
                );
                self.connection = Some(tokio::spawn(run));
            }
            SenderAction::Disconnect { connection, why } => {
                if matches!(self.sender.state(), SenderState::Fenced { .. }) {
                    return None;
                }
                self.hang_up();
                if std::mem::take(&mut self.up) {
                    tracing::warn!(holder = %self.address, %why, "holder given up");
                    self.say(ShipEvent::HolderDown {
                        holder: self.address.clone(),
                        why: why.clone(),
                    });
                }
                let jitter = crate::registry::random_id()[0];
                return Some(SenderEvent::Lost {
                    connection,
                    why,
                    jitter,
                });
            }
            SenderAction::Send { stream, message } => {
                if let Message::Offer(offer) = &message
                    && let Some((opened, file)) = self.opened.take()
                    && opened == *offer
                {
                    self.files.insert(stream, (file, offer.bytes));
                }
                self.put(Out::Message { stream, message });
            }
            SenderAction::Stream { transfer } => {
                if let Some((file, bytes)) = self.files.remove(&transfer) {
                    self.put(Out::Segment {
                        transfer,
                        file,
                        bytes,
                    });
                }
            }
            SenderAction::Cancel { transfer } => {
                self.files.remove(&transfer);
                self.put(Out::Cancel { transfer });
            }
            SenderAction::Next { ticket, position } => self.next(ticket, position),
            SenderAction::Position { newest } => self.position(newest),
            SenderAction::Acked { offer } => {
                self.shared
                    .spool
                    .note_acked(&self.address, position(&offer.held()));
                self.shared.stored(self.at, &offer);
            }
            SenderAction::Granted { sent } => self.say(ShipEvent::Granted {
                holder: self.address.clone(),
                sent: self.started + sent,
            }),
            SenderAction::RequestFull => {
                tracing::info!(holder = %self.address, "the holder needs a full segment");
                self.say(ShipEvent::NeedFull {
                    holder: self.address.clone(),
                });
            }
            SenderAction::Fence { current } => {
                tracing::error!(holder = %self.address, generation = %self.shared.generation, %current, "fenced");
                self.say(ShipEvent::Fenced {
                    holder: self.address.clone(),
                    current,
                });
            }
        }
        None
    }

    fn position(&mut self, newest: Option<Held>) {
        self.up = true;
        let node = self.node.clone().unwrap_or_default();
        tracing::info!(holder = %self.address, %node, position = ?newest.as_ref().map(|h| &h.name), "holder up");
        self.shared
            .spool
            .set_position(&self.address, newest.as_ref().map(position));
        self.shared.position(self.at, newest.clone());
        let position = newest.map(|h| h.name);
        self.say(ShipEvent::HolderUp {
            holder: self.address.clone(),
            node,
            position,
        });
    }

    /// Asks the spool in a thread that may wait for the disk.
    fn next(&mut self, ticket: u64, after: Option<Held>) {
        let (spool, holder) = (self.shared.spool.clone(), self.address.clone());
        let generation = self.shared.generation;
        let heard = self.heard.clone();
        tokio::task::spawn_blocking(move || {
            let answer = match look_up(&spool, &holder, after.as_ref()) {
                Ok(Found::Segment(file, entry)) => {
                    let parent = parent_of(&entry);
                    let Entry {
                        name,
                        checkpoint,
                        digest,
                        bytes,
                        created_unix_ns,
                        ..
                    } = *entry;
                    let offer = Offer {
                        generation,
                        name,
                        checkpoint,
                        digest,
                        bytes,
                        parent,
                        created_unix_ns,
                    };
                    Heard::Segment { ticket, offer, file }
                }
                Ok(Found::UpToDate) => Heard::Event(SenderEvent::NextIs {
                    ticket,
                    next: Next::UpToDate,
                }),
                Ok(Found::NeedFull) => Heard::Event(SenderEvent::NextIs {
                    ticket,
                    next: Next::NeedFull,
                }),
                Err(error) => Heard::NoSegment { ticket, error },
            };
            // When the task is gone nobody asks any more.
            let _ = heard.blocking_send(answer);
        });
    }

    fn put(&mut self, out: Out) {
        if let Some(to) = &self.out {
            // A connection that ended says so by itself.
            let _ = to.send(out);
        }
    }

    fn hang_up(&mut self) {
        self.out = None;
        self.files.clear();
        self.opened = None;
        if let Some(task) = self.connection.take() {
            task.abort();
        }
    }

    fn say(&self, event: ShipEvent) {
        // The VM may be gone already while its shipper still drains.
        let _ = self.shared.events.send(event);
    }

    fn show(&self) {
        let state = match self.sender.state() {
            SenderState::Connecting => HolderState::Connecting,
            SenderState::Synchronising => HolderState::Synchronising,
            SenderState::UpToDate => HolderState::UpToDate,
            SenderState::Unreachable { why } => HolderState::Unreachable { why },
            SenderState::Refused { why } => HolderState::Refused { why },
            SenderState::Fenced { current } => HolderState::Fenced { current: current.0 },
        };
        self.shared.show(self.at, state, self.node.as_deref());
    }
}

enum Found {
    Segment(File, Box<Entry>),
    UpToDate,
    NeedFull,
}

fn look_up(spool: &Spool, holder: &str, after: Option<&Held>) -> Result<Found, StoreError> {
    let after = after.map(position);
    let mut tries = 0;
    loop {
        tries += 1;
        let named = match spool.next_for(after.as_ref()) {
            spool::Next::Segment(entry) => entry,
            spool::Next::UpToDate => return Ok(Found::UpToDate),
            spool::Next::NeedFull => return Ok(Found::NeedFull),
        };
        match spool.pin(holder, &named.name) {
            // Merged between the two: what it stands on now may not be what the holder has.
            Ok((_, entry)) if entry.kind != named.kind && tries < PIN_TRIES => {}
            Ok((file, entry)) => return Ok(Found::Segment(file, Box::new(entry))),
            Err(StoreError::NotHeld { .. }) if tries < PIN_TRIES => {}
            Err(e) => return Err(e),
        }
    }
}

fn position(held: &Held) -> spool::Position {
    spool::Position {
        name: held.name.clone(),
        checkpoint: held.checkpoint,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
