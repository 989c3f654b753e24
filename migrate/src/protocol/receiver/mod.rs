//! The holder's side: one machine per connection.
//!
//! ```text
//!   Fresh --Open--> Promising --promised--> Finding --position--> Open --Open again--> Promising
//!      any --lower generation than promised--> Fenced is sent, then closed
//!
//!   a transfer:  Offer -> Beginning -> Receiving -> End -> Committing -> Stored
//!                            |  Have / Refuse: what still comes of it is thrown away until End or Abort
//! ```
//!
//! The disk's work is actions, answered by events in the order of the actions. Chunks of a transfer are written behind
//! its `Begin` without waiting for the answer: a driver ignores writes of a transfer whose begin failed.

mod api;

use std::collections::BTreeMap;
use std::time::Duration;

use segment::{Generation, VmId};

use super::Proof;
use crate::lease::{MAX_TTL, MIN_TTL};
use crate::wire::{
    Accept, Ack, Fenced, Granted, Message, Offer, Open, Ping, Position, Refuse, Reject, Renew,
};

/// The most transfers that are not finished, on one connection.
pub const MAX_TRANSFERS: usize = 128;

pub use api::{BeginResult, CommitResult, PromiseResult, ReceiverAction, ReceiverEvent};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Fresh,
    Promising,
    Finding,
    Open,
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// `Begin` is not answered; chunks come already.
    Beginning,
    Receiving,
    /// `End` came; it waits for `Begun` (if that is not answered) and for `Committed`.
    Committing,
    /// It was answered with `Have` or `Refuse` while its chunks were on their way.
    Discarding,
}

#[derive(Debug)]
struct Transfer {
    offer: Offer,
    phase: Phase,
    received: u64,
}

/// The holder's side of one connection.
#[derive(Debug)]
pub struct Receiver {
    state: State,
    vm: Option<VmId>,
    generation: Generation,
    owner: String,
    /// How long a lease of the owner's is; none when it asks for none.
    lease: Option<Duration>,
    transfers: BTreeMap<u32, Transfer>,
    last_heard: Duration,
    last_sent: Duration,
    ping_every: Duration,
    dead_after: Duration,
}

impl Receiver {
    /// For a connection that was greeted at `now`.
    #[must_use]
    pub fn new(ping_every: Duration, dead_after: Duration, now: Duration) -> Self {
        Self {
            state: State::Fresh,
            vm: None,
            generation: Generation(0),
            owner: String::new(),
            lease: None,
            transfers: BTreeMap::new(),
            last_heard: now,
            last_sent: now,
            ping_every,
            dead_after,
        }
    }

    /// The VM that is shipped, its generation and its owner, once the generation is promised.
    #[must_use]
    pub fn shipping(&self) -> Option<(&VmId, Generation, &str)> {
        match self.state {
            State::Finding | State::Open => self
                .vm
                .as_ref()
                .map(|vm| (vm, self.generation, self.owner.as_str())),
            State::Fresh | State::Promising | State::Closed => None,
        }
    }

    /// When it wants to be stepped at the latest; never when it is closed.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        match self.state {
            State::Closed => None,
            State::Fresh | State::Promising | State::Finding | State::Open => {
                Some((self.last_sent + self.ping_every).min(self.last_heard + self.dead_after))
            }
        }
    }

    /// One event, at the time `now` of a clock that never goes back.
    pub fn step<P: Proof>(&mut self, event: ReceiverEvent<P>, now: Duration) -> Vec<ReceiverAction> {
        let mut actions = Vec::new();
        if self.state == State::Closed {
            return actions;
        }
        match event {
            ReceiverEvent::Frame { stream, message } => {
                self.last_heard = now;
                self.frame(stream, message, &mut actions);
            }
            ReceiverEvent::Promised(result) => self.promised(result, &mut actions),
            ReceiverEvent::Found(newest) => {
                if self.state == State::Finding {
                    self.state = State::Open;
                    let position = Position {
                        generation: self.generation,
                        newest,
                    };
                    send(0, Message::Position(position), &mut actions);
                }
            }
            ReceiverEvent::Begun { transfer, result } => self.begun(transfer, result, &mut actions),
            ReceiverEvent::Committed { transfer, result } => self.committed(transfer, result, &mut actions),
            ReceiverEvent::Granted { seq } => match self.state {
                State::Finding | State::Open | State::Promising => {
                    send(0, Message::Granted(Granted { seq }), &mut actions);
                }
                State::Fresh | State::Closed => {}
            },
            ReceiverEvent::Superseded { current } => {
                if current > self.generation && self.vm.is_some() {
                    self.fenced(current, &mut actions);
                } else {
                    let why = "a newer connection of this VM's owner took over".to_owned();
                    self.close(Reject::SUPERSEDED, why, &mut actions);
                }
            }
            ReceiverEvent::Unread => self.last_heard = now,
            ReceiverEvent::Tick => {}
        }
        if self.state != State::Closed {
            if now >= self.last_heard + self.dead_after {
                let why = format!("not a sign of life for {} ms", self.dead_after.as_millis());
                self.close(0, why, &mut actions);
            } else if now >= self.last_sent + self.ping_every {
                send(0, Message::Ping(Ping {}), &mut actions);
            }
        }
        if actions.iter().any(|a| matches!(a, ReceiverAction::Send { .. })) {
            self.last_sent = now;
        }
        actions
    }

    fn frame(&mut self, stream: u32, message: Message, actions: &mut Vec<ReceiverAction>) {
        match message {
            Message::Ping(_) => {}
            Message::Open(open) => self.open(open, actions),
            Message::Renew(renew) => self.renew(renew, actions),
            Message::Released(_) => self.released(actions),
            Message::Offer(offer) => self.offer(stream, offer, actions),
            Message::Chunk(bytes) => self.chunk(stream, bytes, actions),
            Message::End(_) => self.end(stream, actions),
            Message::Abort(_) => {
                // One that was refused is forgotten already.
                if let Some(transfer) = self.transfers.remove(&stream) {
                    match transfer.phase {
                        Phase::Beginning | Phase::Receiving => {
                            actions.push(ReceiverAction::Abort { transfer: stream });
                        }
                        // Too late: it will be stored, and its answer ignored there.
                        Phase::Committing => {
                            self.transfers.insert(stream, transfer);
                        }
                        Phase::Discarding => {}
                    }
                }
            }
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Reject(_)
            | Message::Position(_)
            | Message::Accept(_)
            | Message::Have(_)
            | Message::Refuse(_)
            | Message::Stored(_)
            | Message::Fenced(_)
            | Message::Granted(_)
            | Message::Call(_)
            | Message::Reply(_) => self.out_of_order(message.kind().name(), actions),
        }
    }

    fn open(&mut self, open: Open, actions: &mut Vec<ReceiverAction>) {
        match self.state {
            State::Fresh => {}
            // An owner that was refused asks where it stands.
            State::Open if self.vm.as_ref() == Some(&open.vm) && open.generation == self.generation => {
                for (id, transfer) in std::mem::take(&mut self.transfers) {
                    match transfer.phase {
                        Phase::Beginning | Phase::Receiving => {
                            actions.push(ReceiverAction::Abort { transfer: id });
                        }
                        Phase::Committing | Phase::Discarding => {}
                    }
                }
            }
            State::Open | State::Promising | State::Finding | State::Closed => {
                return self.out_of_order("Open", actions);
            }
        }
        let lease = open.lease_ttl_ms.map(Duration::from_millis);
        if let Some(ttl) = lease.filter(|ttl| !(MIN_TTL..=MAX_TTL).contains(ttl)) {
            let why = format!("a lease of {ttl:?}: {MIN_TTL:?} to {MAX_TTL:?} is possible");
            return self.close(Reject::PROTOCOL, why, actions);
        }
        self.state = State::Promising;
        self.generation = open.generation;
        self.owner = open.owner;
        self.lease = lease;
        self.vm = Some(open.vm.clone());
        actions.push(ReceiverAction::Promise {
            vm: open.vm,
            generation: open.generation,
            lease,
        });
    }

    /// The owner asks for time, once its generation is promised here.
    fn renew(&mut self, renew: Renew, actions: &mut Vec<ReceiverAction>) {
        let promised = matches!(self.state, State::Finding | State::Open);
        match (self.vm.clone(), self.lease) {
            (Some(vm), Some(ttl)) if promised => actions.push(ReceiverAction::Grant {
                vm,
                generation: self.generation,
                seq: renew.seq,
                ttl,
            }),
            // It opened again, and one that it sent before went past that: the next will be answered.
            (Some(_), Some(_)) if self.state == State::Promising => {}
            _ => self.out_of_order("Renew", actions),
        }
    }

    fn released(&mut self, actions: &mut Vec<ReceiverAction>) {
        match (self.state, self.vm.clone()) {
            (State::Promising | State::Finding | State::Open, Some(vm)) => {
                actions.push(ReceiverAction::Release {
                    vm,
                    generation: self.generation,
                });
            }
            _ => self.out_of_order("Released", actions),
        }
    }

    fn promised(&mut self, result: PromiseResult, actions: &mut Vec<ReceiverAction>) {
        if self.state != State::Promising {
            return;
        }
        let Some(vm) = self.vm.clone() else { return };
        match result {
            PromiseResult::Promised => {
                self.state = State::Finding;
                actions.push(ReceiverAction::Find { vm });
            }
            PromiseResult::Fenced { current } => self.fenced(current, actions),
            PromiseResult::Failed { why } => self.close(Reject::FAILED, why, actions),
        }
    }

    fn offer(&mut self, stream: u32, offer: Offer, actions: &mut Vec<ReceiverAction>) {
        if self.state != State::Open {
            return self.out_of_order("Offer", actions);
        }
        if offer.generation != self.generation
            || self.vm.as_ref() != Some(&offer.name.vm)
            || offer.name.generation > self.generation
        {
            let why = format!(
                "{} was offered under generation {} on a connection for {:?} under {}",
                offer.name, offer.generation, self.vm, self.generation
            );
            return self.close(Reject::PROTOCOL, why, actions);
        }
        if stream == 0 || self.transfers.contains_key(&stream) || self.transfers.len() >= MAX_TRANSFERS {
            return self.close(
                Reject::PROTOCOL,
                format!("transfer {stream} cannot begin"),
                actions,
            );
        }
        actions.push(ReceiverAction::Begin {
            transfer: stream,
            offer: offer.clone(),
        });
        self.transfers.insert(
            stream,
            Transfer {
                offer,
                phase: Phase::Beginning,
                received: 0,
            },
        );
    }

    fn chunk(&mut self, stream: u32, bytes: Vec<u8>, actions: &mut Vec<ReceiverAction>) {
        let Some(transfer) = self.transfers.get_mut(&stream) else {
            // Chunks of a transfer that a second `Open` has swept away.
            return match self.state {
                State::Fresh => self.out_of_order("Chunk", actions),
                State::Promising | State::Finding | State::Open | State::Closed => {}
            };
        };
        transfer.received += bytes.len() as u64;
        if transfer.received > transfer.offer.bytes {
            let why = format!("more bytes of {} came than were offered", transfer.offer.name);
            return self.close(Reject::PROTOCOL, why, actions);
        }
        match transfer.phase {
            Phase::Beginning | Phase::Receiving => actions.push(ReceiverAction::Write {
                transfer: stream,
                bytes,
            }),
            Phase::Discarding => {}
            Phase::Committing => self.out_of_order("Chunk after End", actions),
        }
    }

    fn end(&mut self, stream: u32, actions: &mut Vec<ReceiverAction>) {
        let Some(transfer) = self.transfers.get_mut(&stream) else {
            return match self.state {
                State::Fresh => self.out_of_order("End", actions),
                State::Promising | State::Finding | State::Open | State::Closed => {}
            };
        };
        match transfer.phase {
            Phase::Discarding => {
                self.transfers.remove(&stream);
            }
            Phase::Committing => self.out_of_order("a second End", actions),
            Phase::Beginning | Phase::Receiving if transfer.received == transfer.offer.bytes => {
                transfer.phase = Phase::Committing;
                actions.push(ReceiverAction::Commit { transfer: stream });
            }
            Phase::Beginning | Phase::Receiving => {
                let Transfer { offer, received, .. } = transfer;
                let why = format!(
                    "{received} of {} bytes of {} came before End",
                    offer.bytes, offer.name
                );
                self.close(Reject::PROTOCOL, why, actions);
            }
        }
    }

    fn begun<P: Proof>(&mut self, stream: u32, result: BeginResult<P>, actions: &mut Vec<ReceiverAction>) {
        let fence = match &result {
            BeginResult::Fenced { current } => Some(*current),
            BeginResult::Ready | BeginResult::Have(_) | BeginResult::Refused { .. } => None,
        };
        if let Some(current) = fence {
            return self.fenced(current, actions);
        }
        let Some(transfer) = self.transfers.get_mut(&stream) else {
            return;
        };
        // After `End` nothing more comes of it, and the driver answers its commit with nothing.
        let ended = match transfer.phase {
            Phase::Beginning => false,
            Phase::Committing => true,
            Phase::Receiving | Phase::Discarding => return,
        };
        match result {
            BeginResult::Ready => {
                if !ended {
                    transfer.phase = Phase::Receiving;
                    send(stream, Message::Accept(Accept {}), actions);
                }
                return;
            }
            BeginResult::Have(proof) => {
                if let Some(ack) = self.ack(stream, &proof, actions) {
                    send(stream, Message::Have(ack), actions);
                }
            }
            BeginResult::Refused { reason, why } => {
                send(
                    stream,
                    Message::Refuse(Refuse {
                        generation: self.generation,
                        reason,
                        why,
                    }),
                    actions,
                );
            }
            BeginResult::Fenced { .. } => return,
        }
        self.drop_rest(stream, ended);
    }

    fn committed<P: Proof>(
        &mut self,
        stream: u32,
        result: CommitResult<P>,
        actions: &mut Vec<ReceiverAction>,
    ) {
        let fence = match &result {
            CommitResult::Fenced { current } => Some(*current),
            CommitResult::Stored(_) | CommitResult::Refused { .. } => None,
        };
        if let Some(current) = fence {
            return self.fenced(current, actions);
        }
        match self.transfers.get(&stream).map(|t| t.phase) {
            Some(Phase::Committing) => {}
            Some(Phase::Beginning | Phase::Receiving | Phase::Discarding) | None => return,
        }
        match result {
            CommitResult::Stored(proof) => {
                if let Some(ack) = self.ack(stream, &proof, actions) {
                    send(stream, Message::Stored(ack), actions);
                }
            }
            CommitResult::Refused { reason, why } => {
                send(
                    stream,
                    Message::Refuse(Refuse {
                        generation: self.generation,
                        reason,
                        why,
                    }),
                    actions,
                );
            }
            CommitResult::Fenced { .. } => {}
        }
        self.transfers.remove(&stream);
    }

    /// The only place where an acknowledgement is made.
    fn ack<P: Proof>(&mut self, stream: u32, proof: &P, actions: &mut Vec<ReceiverAction>) -> Option<Ack> {
        let offer = &self.transfers.get(&stream)?.offer;
        let held = proof.held();
        if held != offer.held() {
            let why = format!("{} was offered, and the store proves {}", offer.name, held.name);
            self.close(Reject::FAILED, why, actions);
            return None;
        }
        Some(Ack {
            generation: self.generation,
            held,
            digest: proof.digest(),
        })
    }

    /// What still comes of a transfer that was answered early is thrown away.
    fn drop_rest(&mut self, stream: u32, ended: bool) {
        if ended {
            self.transfers.remove(&stream);
        } else if let Some(transfer) = self.transfers.get_mut(&stream) {
            transfer.phase = Phase::Discarding;
        }
    }

    fn fenced(&mut self, current: Generation, actions: &mut Vec<ReceiverAction>) {
        if let Some(vm) = self.vm.clone() {
            send(
                0,
                Message::Fenced(Fenced {
                    vm,
                    asked: self.generation,
                    current,
                }),
                actions,
            );
        }
        let why = format!("generation {} is over, {current} is promised", self.generation);
        self.close(0, why, actions);
    }

    fn out_of_order(&mut self, what: &str, actions: &mut Vec<ReceiverAction>) {
        let why = format!("{what} came while {:?}", self.state);
        self.close(Reject::PROTOCOL, why, actions);
    }

    fn close(&mut self, code: u16, why: String, actions: &mut Vec<ReceiverAction>) {
        for (id, transfer) in std::mem::take(&mut self.transfers) {
            match transfer.phase {
                Phase::Beginning | Phase::Receiving => actions.push(ReceiverAction::Abort { transfer: id }),
                Phase::Committing | Phase::Discarding => {}
            }
        }
        self.state = State::Closed;
        actions.push(ReceiverAction::Close { code, why });
    }
}

fn send(stream: u32, message: Message, actions: &mut Vec<ReceiverAction>) {
    actions.push(ReceiverAction::Send { stream, message });
}
