//! The sender and the receiver against each other, over a model network that breaks and a model disk that fills up,
//! in any order of events; and each of them alone against anything.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use migrate::lease::LeaseTerms;
use migrate::protocol::{
    BeginResult, CommitResult, Next, PromiseResult, Receiver, ReceiverAction, ReceiverEvent, Sender,
    SenderAction, SenderConfig, SenderEvent, SenderState,
};
use migrate::wire::{Abort, End, Held, Message, Offer, RefuseReason, Reject};
use net_common::model::*;
use proptest::prelude::*;
use segment::{Generation, SegmentName};

/// The holder's disk: survives connections and restarts.
#[derive(Debug, Default)]
struct Disk {
    stored: BTreeMap<SegmentName, Offer>,
    promised: Generation,
    full: bool,
    /// When time was granted last.
    granted: Option<Duration>,
}

impl Disk {
    fn is_whole(&self, held: &Held) -> bool {
        let mut at = Some(held.clone());
        while let Some(h) = at {
            match self.stored.get(&h.name) {
                Some(o) if o.checkpoint == h.checkpoint => at = o.parent.clone(),
                _ => return false,
            }
        }
        true
    }

    fn newest(&self) -> Option<Held> {
        self.stored
            .values()
            .rev()
            .map(Offer::held)
            .find(|h| self.is_whole(h))
    }
}

/// One connection's work for the disk, in order.
#[derive(Debug, Default)]
struct DiskWork {
    jobs: VecDeque<ReceiverAction>,
    coming: HashMap<u32, (Offer, u64)>,
    generation: Generation,
}

impl DiskWork {
    /// Does the next job.
    fn work(&mut self, disk: &mut Disk, now: Duration) -> Option<ReceiverEvent<ModelProof>> {
        Some(match self.jobs.pop_front()? {
            ReceiverAction::Promise { generation, .. } => {
                self.generation = generation;
                if generation < disk.promised {
                    ReceiverEvent::Promised(PromiseResult::Fenced {
                        current: disk.promised,
                    })
                } else {
                    disk.promised = generation;
                    ReceiverEvent::Promised(PromiseResult::Promised)
                }
            }
            ReceiverAction::Grant { generation, seq, .. } => {
                if generation != disk.promised {
                    return None;
                }
                disk.granted = disk.granted.max(Some(now));
                ReceiverEvent::Granted { seq }
            }
            ReceiverAction::Release { .. } => return None,
            ReceiverAction::Find { .. } => ReceiverEvent::Found(disk.newest()),
            ReceiverAction::Begin { transfer, offer } => {
                let refused = |reason, why: &str| BeginResult::Refused {
                    reason,
                    why: why.to_owned(),
                };
                let result = if self.generation < disk.promised {
                    BeginResult::Fenced {
                        current: disk.promised,
                    }
                } else if offer.parent.as_ref().is_some_and(|p| !disk.is_whole(p)) {
                    refused(RefuseReason::MissingParent, "no parent")
                } else if disk.stored.contains_key(&offer.name) {
                    BeginResult::Have(ModelProof(offer))
                } else if disk.full {
                    refused(RefuseReason::Full, "full")
                } else {
                    self.coming.insert(transfer, (offer, 0));
                    BeginResult::Ready
                };
                ReceiverEvent::Begun { transfer, result }
            }
            ReceiverAction::Write { transfer, bytes } => {
                if let Some((_, got)) = self.coming.get_mut(&transfer) {
                    *got += bytes.len() as u64;
                }
                return None;
            }
            ReceiverAction::Commit { transfer } => {
                let (offer, got) = self.coming.remove(&transfer)?;
                assert_eq!(got, offer.bytes, "a commit of a part");
                let result = if self.generation < disk.promised {
                    CommitResult::Fenced {
                        current: disk.promised,
                    }
                } else {
                    disk.stored.insert(offer.name.clone(), offer.clone());
                    CommitResult::Stored(ModelProof(offer))
                };
                ReceiverEvent::Committed { transfer, result }
            }
            ReceiverAction::Abort { transfer } => {
                self.coming.remove(&transfer);
                return None;
            }
            other => panic!("{other:?} is not for the disk"),
        })
    }
}

/// A connection: what is on its way in each direction, and the holder's side of it.
#[derive(Debug)]
struct Line {
    number: u64,
    to_holder: VecDeque<(u32, Message)>,
    to_owner: VecDeque<(u32, Message)>,
    receiver: Receiver,
    work: DiskWork,
    /// The holder has closed; what it sent before still arrives.
    closed: bool,
}

#[derive(Debug)]
struct World {
    now: Duration,
    sender: Sender,
    config: SenderConfig,
    line: Option<Line>,
    /// Connecting takes a step.
    connecting: Option<u64>,
    questions: VecDeque<(u64, Option<Held>)>,
    /// What the spool said, on its way: the owner may take a checkpoint meanwhile.
    answers: VecDeque<(u64, Next)>,
    offers: HashMap<u32, Offer>,
    /// The owner's checkpoints; which are full.
    taken: Vec<bool>,
    want_full: bool,
    disk: Disk,
    acked: Vec<Held>,
    fenced: Option<Generation>,
    /// From when the newest time is counted that the holder granted.
    granted: Option<Duration>,
    /// What was stored when a stranger's promise came; nothing may be added after.
    sealed: Option<usize>,
}

impl World {
    fn new() -> Self {
        let mut config = SenderConfig::new(vm(), MINE, "owner");
        config.window_segments = 4;
        config.window_bytes = 100;
        config.eager_bytes = 30;
        config.lease = Some(LeaseTerms::DEFAULT);
        Self {
            now: Duration::ZERO,
            sender: Sender::new(config.clone()),
            config,
            line: None,
            connecting: None,
            questions: VecDeque::new(),
            answers: VecDeque::new(),
            offers: HashMap::new(),
            taken: Vec::new(),
            want_full: true,
            disk: Disk::default(),
            acked: Vec::new(),
            fenced: None,
            granted: None,
            sealed: None,
        }
    }

    fn owner(&mut self, event: SenderEvent) {
        let was_fenced = self.fenced.is_some();
        for action in self.sender.step(event, self.now) {
            assert!(!was_fenced, "{action:?} after the fence");
            match action {
                SenderAction::Connect { connection } => self.connecting = Some(connection),
                SenderAction::Disconnect { connection, why } => {
                    self.line = None;
                    self.owner(SenderEvent::Lost {
                        connection,
                        why,
                        jitter: 100,
                    });
                }
                SenderAction::Send { stream, message } => {
                    if let Message::Offer(offer) = &message {
                        self.offers.insert(stream, offer.clone());
                    }
                    self.put(stream, message);
                }
                SenderAction::Stream { transfer } => {
                    let bytes = self.offers[&transfer].bytes as usize;
                    for chunk in vec![0; bytes].chunks(9) {
                        self.put(transfer, Message::Chunk(chunk.to_vec()));
                    }
                    self.put(transfer, Message::End(End {}));
                }
                SenderAction::Cancel { transfer } => self.cancel(transfer),
                SenderAction::Next { ticket, position } => self.questions.push_back((ticket, position)),
                SenderAction::Position { .. } => {}
                SenderAction::Acked { offer } => {
                    let held = offer.held();
                    assert!(
                        self.disk.is_whole(&held),
                        "{} was acknowledged and is not there",
                        held.name
                    );
                    self.acked.push(held);
                }
                SenderAction::Granted { sent } => {
                    // Counted from before the holder heard it; a holder that was sealed since grants nothing.
                    assert!(self.disk.granted >= Some(sent), "granted what was never asked");
                    self.granted = self.granted.max(Some(sent));
                }
                SenderAction::RequestFull => self.want_full = true,
                SenderAction::Fence { current } => {
                    assert!(current > MINE);
                    self.fenced = Some(current);
                }
            }
        }
    }

    fn put(&mut self, stream: u32, message: Message) {
        if let Some(line) = &mut self.line {
            line.to_holder.push_back((stream, message));
        }
    }

    /// What is on its way cannot be taken back; what the writer still has is replaced by `Abort`. The model takes back
    /// all chunks but those behind which something else is on its way.
    fn cancel(&mut self, transfer: u32) {
        let Some(line) = &mut self.line else { return };
        let ended = line
            .to_holder
            .iter()
            .any(|(s, m)| *s == transfer && matches!(m, Message::End(_)));
        if ended {
            line.to_holder
                .retain(|(s, m)| *s != transfer || !matches!(m, Message::Chunk(_) | Message::End(_)));
        }
        line.to_holder.push_back((transfer, Message::Abort(Abort {})));
    }

    fn holder(&mut self, event: ReceiverEvent<ModelProof>) {
        let Some(line) = &mut self.line else { return };
        for action in line.receiver.step(event, self.now) {
            match action {
                ReceiverAction::Send { stream, message } => line.to_owner.push_back((stream, message)),
                ReceiverAction::Close { code, why } => {
                    if code != 0 {
                        line.to_owner
                            .push_back((0, Message::Reject(Reject { code, why })));
                    }
                    line.closed = true;
                }
                job => line.work.jobs.push_back(job),
            }
        }
    }

    fn lose(&mut self) {
        if let Some(line) = self.line.take() {
            let why = "broken".to_owned();
            self.owner(SenderEvent::Lost {
                connection: line.number,
                why,
                jitter: 0,
            });
        }
    }

    /// One thing that can happen; true when something did.
    fn happen(&mut self, what: u8) -> bool {
        match what % 6 {
            0 => {
                let Some(line) = &mut self.line else { return false };
                let Some((stream, message)) = line.to_owner.pop_front() else {
                    if line.closed {
                        self.lose();
                        return true;
                    }
                    return false;
                };
                let connection = line.number;
                self.owner(SenderEvent::Frame {
                    connection,
                    stream,
                    message,
                });
                true
            }
            1 => {
                let Some(line) = &mut self.line else { return false };
                let Some((stream, message)) = line.to_holder.pop_front() else {
                    return false;
                };
                let connection = line.number;
                let chunk = matches!(message, Message::Chunk(_));
                self.holder(ReceiverEvent::Frame { stream, message });
                if chunk {
                    self.owner(SenderEvent::Progress { connection });
                }
                true
            }
            2 => {
                let Some(line) = &mut self.line else { return false };
                if line.work.jobs.is_empty() {
                    return false;
                }
                if let Some(event) = line.work.work(&mut self.disk, self.now) {
                    self.holder(event);
                }
                true
            }
            3 => {
                let Some(connection) = self.connecting.take() else {
                    return false;
                };
                self.line = Some(Line {
                    number: connection,
                    to_holder: VecDeque::new(),
                    to_owner: VecDeque::new(),
                    receiver: Receiver::new(self.config.ping_every, self.config.dead_after, self.now),
                    work: DiskWork::default(),
                    closed: false,
                });
                self.owner(SenderEvent::Connected {
                    connection,
                    version: 2,
                });
                true
            }
            4 => {
                let Some((ticket, position)) = self.questions.pop_front() else {
                    return false;
                };
                self.answers.push_back((ticket, self.next(position.as_ref())));
                true
            }
            _ => {
                let Some((ticket, next)) = self.answers.pop_front() else {
                    return false;
                };
                self.owner(SenderEvent::NextIs { ticket, next });
                true
            }
        }
    }

    /// The model spool: what comes after a position.
    fn next(&self, position: Option<&Held>) -> Next {
        let at = position.map_or(0, |p| p.name.epoch.0);
        let newest = self.taken.len() as u64;
        if at >= newest {
            return if newest == 0 || position.is_some() {
                Next::UpToDate
            } else {
                Next::NeedFull
            };
        }
        if position.is_some() {
            return Next::Segment(offer(at + 1, self.taken[at as usize]));
        }
        match self.taken.iter().rposition(|full| *full) {
            Some(index) => Next::Segment(offer(index as u64 + 1, true)),
            None => Next::NeedFull,
        }
    }

    fn take(&mut self) {
        let full = std::mem::take(&mut self.want_full) || self.taken.len() % 7 == 6;
        self.taken.push(full);
        self.owner(SenderEvent::Notify);
    }

    fn fault(&mut self, what: u8) {
        match what % 6 {
            0 => self.lose(),
            1 => {
                if let Some(connection) = self.connecting.take() {
                    let why = "connection refused".to_owned();
                    self.owner(SenderEvent::Lost {
                        connection,
                        why,
                        jitter: 255,
                    });
                }
            }
            // The last frames to the owner are lost with the connection.
            2 => {
                if let Some(line) = &mut self.line {
                    line.to_owner.clear();
                }
                self.lose();
            }
            3 => self.disk.full = !self.disk.full,
            4 => self.wait(Duration::from_millis(u64::from(what) * 40)),
            _ => self.take(),
        }
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.owner(SenderEvent::Tick);
        self.holder(ReceiverEvent::Tick);
    }

    fn check(&mut self) {
        if let Some(sealed) = self.sealed {
            assert_eq!(self.disk.stored.len(), sealed, "stored after the seal");
        }
        for held in &self.acked {
            assert!(
                self.disk.is_whole(held),
                "{} was acknowledged and is gone",
                held.name
            );
        }
        let waiting = self.questions.len();
        assert!(
            waiting <= 1 + self.config.window_segments + 40,
            "{waiting} questions are open"
        );
    }

    /// No more faults: everything has to come to rest.
    fn settle(&mut self) {
        self.disk.full = false;
        for _ in 0..20_000 {
            let mut any = false;
            for what in 0..6 {
                any |= self.happen(what);
            }
            self.check();
            if !any {
                if self.fenced.is_some() || (self.sender.state() == SenderState::UpToDate && !self.want_full)
                {
                    return;
                }
                if std::mem::take(&mut self.want_full) {
                    self.want_full = true;
                    self.take();
                }
                self.wait(Duration::from_millis(200));
            }
        }
        panic!("it never came to rest: {self:#?}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Happen(u8),
    Fault(u8),
    Take,
    Seal,
}

fn steps(seal: u32) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        60 => any::<u8>().prop_map(Step::Happen),
        2 => any::<u8>().prop_map(Step::Fault),
        6 => Just(Step::Take),
        seal => Just(Step::Seal),
    ];
    prop::collection::vec(step, 0..400)
}

fn run(steps: Vec<Step>) -> World {
    let mut world = World::new();
    world.owner(SenderEvent::Tick);
    for step in steps {
        match step {
            // The one that was drawn, or the next that can.
            Step::Happen(what) => {
                let _any = (0..6).any(|more| world.happen(what % 6 + more));
            }
            Step::Fault(what) => world.fault(what),
            Step::Take => world.take(),
            Step::Seal => {
                if world.sealed.is_none() {
                    world.disk.promised = Generation(MINE.0 + 1);
                    world.sealed = Some(world.disk.stored.len());
                }
            }
        }
        world.check();
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn whatever_breaks_the_holder_ends_with_the_newest(steps in steps(0)) {
        let mut world = run(steps);
        if world.taken.is_empty() {
            world.take();
        }
        world.settle();
        prop_assert_eq!(world.fenced, None);
        let newest = held(world.taken.len() as u64);
        prop_assert_eq!(world.disk.newest(), Some(newest));
    }

    #[test]
    fn after_a_seal_nothing_is_stored_and_the_owner_learns_of_it(steps in steps(1)) {
        let mut world = run(steps);
        world.disk.promised = Generation(MINE.0 + 1);
        world.sealed = Some(world.disk.stored.len());
        world.take();
        world.settle();
        prop_assert_eq!(world.fenced, Some(Generation(MINE.0 + 1)));
    }
}
