//! The owner's side: one machine per holder.
//!
//! ```text
//!   Waiting --time--> Connecting --connected--> Opening --Position--> Flowing
//!      ^                  |                        |      <--time--      | Refuse
//!      +------- lost -----+------------------------+---- Refused <-------+
//!                                       any of them --Fenced--> Fenced (final)
//! ```
//!
//! Small segments are offered and streamed at once; a large one waits for `Accept`, so that a full holder is not sent
//! gigabytes in vain. Up to a window of segments and bytes may be unacknowledged. A refusal of one drops the rest of the
//! window (they stand on it) and, after a pause, begins anew with `Open`, which tells where the holder is.

mod api;
mod asking;

use std::collections::VecDeque;
use std::time::Duration;

use segment::Generation;

use crate::wire::{Ack, Held, LEASE_VERSION, Message, Offer, Open, Ping, Refuse};
use asking::Asking;

pub use api::{Next, SenderAction, SenderConfig, SenderEvent, SenderState};

/// A holder that stores nothing is waited for at most 2 to this power times as long as the first time: an hour for a small one.
const MAX_STALLS: u32 = 6;

#[derive(Debug)]
enum State {
    Waiting { until: Duration },
    Connecting,
    Opening,
    Flowing(Flow),
    Refused { until: Duration },
    Fenced { current: Generation },
}

/// A transfer that is not acknowledged.
#[derive(Debug)]
struct InFlight {
    transfer: u32,
    offer: Offer,
}

#[derive(Debug, Default)]
struct Flow {
    /// What the holder will have when all that was offered is stored.
    sent: Option<Held>,
    unacked: VecDeque<InFlight>,
    unacked_bytes: u64,
    /// The transfer that waits for `Accept`.
    waiting: Option<u32>,
    /// The question to the spool that is open.
    asking: Option<u64>,
    /// The spool had nothing more when it was asked last.
    dry: bool,
    /// Something new came into the spool after the open question was asked: its answer may not know of it.
    stale: bool,
    /// A full segment is needed.
    need_full: bool,
}

/// The owner's side of one holder.
#[derive(Debug)]
pub struct Sender {
    config: SenderConfig,
    state: State,
    connection: u64,
    up: bool,
    /// A `Disconnect` was asked for and `Lost` has not come.
    closing: bool,
    last_transfer: u32,
    last_ticket: u64,
    last_heard: Duration,
    last_sent: Duration,
    last_progress: Duration,
    /// How often in a row it was given up because it stored nothing.
    stalls: u32,
    attempts: u32,
    refusals: u32,
    full_asked: Option<Duration>,
    /// Why the holder was lost or refused last; cleared when it acknowledges.
    trouble: Option<String>,
    /// The lease, as far as the holder was asked for it on this connection.
    asking: Asking,
    version: u16,
}

impl Sender {
    /// A sender that connects at its first step.
    #[must_use]
    pub fn new(config: SenderConfig) -> Self {
        let lease = config.lease;
        Self {
            config,
            state: State::Waiting {
                until: Duration::ZERO,
            },
            connection: 0,
            up: false,
            closing: false,
            last_transfer: 0,
            last_ticket: 0,
            last_heard: Duration::ZERO,
            last_sent: Duration::ZERO,
            last_progress: Duration::ZERO,
            stalls: 0,
            attempts: 0,
            refusals: 0,
            full_asked: None,
            trouble: None,
            asking: Asking::new(lease),
            version: 0,
        }
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> SenderState {
        match (&self.state, &self.trouble) {
            (State::Fenced { current }, _) => SenderState::Fenced { current: *current },
            (State::Refused { .. }, why) => SenderState::Refused {
                why: why.clone().unwrap_or_default(),
            },
            (State::Waiting { .. } | State::Connecting, Some(why)) => {
                SenderState::Unreachable { why: why.clone() }
            }
            (State::Waiting { .. } | State::Connecting, None) | (State::Opening, _) => {
                SenderState::Connecting
            }
            (State::Flowing(flow), _) if flow.dry && flow.unacked.is_empty() && !flow.need_full => {
                SenderState::UpToDate
            }
            (State::Flowing(_), _) => SenderState::Synchronising,
        }
    }

    /// When it wants to be stepped at the latest; never when it is fenced.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let mut at = match &self.state {
            State::Fenced { .. } => return None,
            State::Waiting { until } => return Some(*until),
            // The driver bounds the time of connecting.
            State::Connecting => return None,
            State::Opening | State::Flowing(_) => self.last_sent + self.config.ping_every,
            State::Refused { until } => (*until).min(self.last_sent + self.config.ping_every),
        };
        if self.closing {
            return None;
        }
        at = at.min(self.last_heard + self.config.dead_after);
        Some(self.asking.due().map_or(at, |due| at.min(due)))
    }

    /// One event, at the time `now` of a clock that never goes back.
    pub fn step(&mut self, event: SenderEvent, now: Duration) -> Vec<SenderAction> {
        let mut actions = Vec::new();
        if let State::Fenced { .. } = self.state {
            return actions;
        }
        match event {
            SenderEvent::Connected { connection, version } => {
                self.connected(connection, version, now, &mut actions);
            }
            SenderEvent::Release => {
                if self.asking.release() && self.up && !self.closing {
                    actions.push(asking::released());
                }
            }
            SenderEvent::Lost {
                connection,
                why,
                jitter,
            } => self.lost(connection, why, jitter, now),
            SenderEvent::Frame {
                connection,
                stream,
                message,
            } if self.is_current(connection) => {
                self.last_heard = now;
                self.frame(stream, message, now, &mut actions);
            }
            SenderEvent::Progress { connection } if self.is_current(connection) => {
                self.last_progress = now;
                self.last_sent = now;
            }
            SenderEvent::StreamFailed { connection, why } if self.is_current(connection) => {
                self.disconnect(why, &mut actions);
            }
            // Of a connection that is over.
            SenderEvent::Frame { .. } | SenderEvent::Progress { .. } | SenderEvent::StreamFailed { .. } => {}
            SenderEvent::NextIs { ticket, next } => self.next_is(ticket, next, now, &mut actions),
            SenderEvent::Notify => {
                if let State::Flowing(flow) = &mut self.state {
                    flow.dry = false;
                    flow.stale = flow.asking.is_some();
                }
            }
            SenderEvent::Tick => {}
        }
        self.time(now, &mut actions);
        if !self.closing
            && let Some(renew) = self.asking.ask(now)
        {
            actions.push(renew);
        }
        self.ask(&mut actions);
        if actions.iter().any(|a| matches!(a, SenderAction::Send { .. })) {
            self.last_sent = now;
        }
        actions
    }

    fn is_current(&self, connection: u64) -> bool {
        self.up && !self.closing && connection == self.connection
    }

    fn connected(&mut self, connection: u64, version: u16, now: Duration, actions: &mut Vec<SenderAction>) {
        match self.state {
            State::Connecting if connection == self.connection && !self.up => {
                self.up = true;
                self.version = version;
                self.last_heard = now;
                self.last_progress = now;
                self.open(actions);
            }
            // Of a try that was given up.
            State::Connecting
            | State::Waiting { .. }
            | State::Opening
            | State::Flowing(_)
            | State::Refused { .. }
            | State::Fenced { .. } => {}
        }
    }

    fn open(&mut self, actions: &mut Vec<SenderAction>) {
        let SenderConfig {
            vm,
            generation,
            owner,
            ..
        } = &self.config;
        let open = Open {
            vm: vm.clone(),
            generation: *generation,
            owner: owner.clone(),
            lease_ttl_ms: self.config.lease.map(|terms| terms.ttl.as_millis() as u64),
        };
        actions.push(SenderAction::Send {
            stream: 0,
            message: Message::Open(open),
        });
        self.state = State::Opening;
    }

    fn lost(&mut self, connection: u64, why: String, jitter: u8, now: Duration) {
        if connection != self.connection || matches!(self.state, State::Waiting { .. }) {
            return;
        }
        let pause = backoff(self.config.backoff_first, self.config.backoff_max, self.attempts);
        // Up to a quarter more, so that many owners do not come back to a holder at one instant.
        let pause = pause + pause * u32::from(jitter) / 1024;
        self.attempts = self.attempts.saturating_add(1);
        self.up = false;
        self.closing = false;
        self.asking.lost();
        self.trouble = Some(why);
        self.state = State::Waiting { until: now + pause };
    }

    fn disconnect(&mut self, why: String, actions: &mut Vec<SenderAction>) {
        if !self.closing {
            self.closing = true;
            actions.push(SenderAction::Disconnect {
                connection: self.connection,
                why,
            });
        }
    }

    fn frame(&mut self, stream: u32, message: Message, now: Duration, actions: &mut Vec<SenderAction>) {
        match message {
            Message::Ping(_) => {}
            Message::Position(position) => match self.state {
                State::Opening if position.generation == self.config.generation => {
                    self.attempts = 0;
                    if let Some(held) = &position.newest
                        && held.name.vm != self.config.vm
                    {
                        let why = format!(
                            "the holder spoke of {} at the opening of {}",
                            held.name, self.config.vm
                        );
                        return self.disconnect(why, actions);
                    }
                    actions.push(SenderAction::Position {
                        newest: position.newest.clone(),
                    });
                    self.last_progress = now;
                    // From here on it has promised our generation, and can be asked for time under it.
                    if self.version >= LEASE_VERSION && self.asking.begin(now) {
                        actions.push(asking::released());
                    }
                    self.state = State::Flowing(Flow {
                        sent: position.newest,
                        ..Flow::default()
                    });
                }
                State::Opening
                | State::Waiting { .. }
                | State::Connecting
                | State::Flowing(_)
                | State::Refused { .. }
                | State::Fenced { .. } => self.out_of_order("Position", actions),
            },
            Message::Accept(_) => match &mut self.state {
                State::Flowing(flow) if flow.waiting == Some(stream) => {
                    flow.waiting = None;
                    self.last_progress = now;
                    actions.push(SenderAction::Stream { transfer: stream });
                }
                // Of a small one, or of one that was given up.
                State::Flowing(_) | State::Refused { .. } | State::Opening => {}
                State::Waiting { .. } | State::Connecting | State::Fenced { .. } => {
                    self.out_of_order("Accept", actions);
                }
            },
            Message::Stored(ack) => self.acknowledged(stream, &ack, true, now, actions),
            Message::Have(ack) => self.acknowledged(stream, &ack, false, now, actions),
            Message::Refuse(refuse) => self.refused(stream, &refuse, now, actions),
            Message::Fenced(fenced) => {
                if fenced.vm == self.config.vm && fenced.current > self.config.generation {
                    self.state = State::Fenced {
                        current: fenced.current,
                    };
                    actions.push(SenderAction::Fence {
                        current: fenced.current,
                    });
                    self.disconnect("fenced".into(), actions);
                } else {
                    self.out_of_order("Fenced for another VM or generation", actions);
                }
            }
            Message::Granted(granted) => match self.asking.granted(granted.seq) {
                Ok(Some(sent)) => actions.push(SenderAction::Granted { sent }),
                Ok(None) => {}
                Err(()) => self.out_of_order("Granted for what was not asked", actions),
            },
            Message::Reject(reject) => self.disconnect(reject.why, actions),
            Message::Chunk(_)
            | Message::Hello(_)
            | Message::Welcome(_)
            | Message::Open(_)
            | Message::Offer(_)
            | Message::End(_)
            | Message::Abort(_)
            | Message::Renew(_)
            | Message::Released(_)
            | Message::Call(_)
            | Message::Reply(_) => self.out_of_order(message.kind().name(), actions),
        }
    }

    fn out_of_order(&mut self, what: &str, actions: &mut Vec<SenderAction>) {
        let state = match self.state {
            State::Waiting { .. } => "waiting",
            State::Connecting => "connecting",
            State::Opening => "opening",
            State::Flowing(_) => "shipping",
            State::Refused { .. } => "waiting after a refusal",
            State::Fenced { .. } => "fenced",
        };
        self.disconnect(format!("the holder sent {what} while {state}"), actions);
    }

    fn acknowledged(
        &mut self,
        stream: u32,
        ack: &Ack,
        streamed: bool,
        now: Duration,
        actions: &mut Vec<SenderAction>,
    ) {
        let State::Flowing(flow) = &mut self.state else {
            // After a refusal what was sent before it may still be acknowledged; the position will tell.
            return;
        };
        let Some(at) = flow.unacked.iter().position(|f| f.transfer == stream) else {
            return;
        };
        let offer = &flow.unacked[at].offer;
        let fits = ack.held == offer.held()
            && ack.generation == self.config.generation
            && (!streamed || ack.digest == offer.digest);
        if !fits {
            let why = format!("the holder acknowledged {} for {}", ack.held.name, offer.name);
            return self.disconnect(why, actions);
        }
        // What the holder has with all it stands on covers whatever was offered before.
        for done in flow.unacked.drain(..=at) {
            flow.unacked_bytes -= done.offer.bytes;
            if flow.waiting == Some(done.transfer) {
                flow.waiting = None;
            }
            if done.transfer == stream {
                if !streamed {
                    actions.push(SenderAction::Cancel { transfer: stream });
                }
                actions.push(SenderAction::Acked {
                    offer: Box::new(done.offer),
                });
            }
        }
        if flow.need_full {
            // The holder's position moved: the spool may know a way on from there.
            flow.dry = false;
            flow.stale = flow.asking.is_some();
        }
        self.last_progress = now;
        self.refusals = 0;
        self.stalls = 0;
        self.trouble = None;
    }

    fn refused(&mut self, stream: u32, refuse: &Refuse, now: Duration, actions: &mut Vec<SenderAction>) {
        let State::Flowing(flow) = &mut self.state else {
            return;
        };
        let Some(first) = flow.unacked.iter().find(|f| f.transfer == stream) else {
            return;
        };
        self.trouble = Some(format!("{} was refused: {}", first.offer.name, refuse.why));
        for dropped in &flow.unacked {
            actions.push(SenderAction::Cancel {
                transfer: dropped.transfer,
            });
        }
        let pause = backoff(self.config.refused_first, self.config.refused_max, self.refusals);
        self.refusals = self.refusals.saturating_add(1);
        self.state = State::Refused { until: now + pause };
    }

    fn next_is(&mut self, ticket: u64, next: Next, now: Duration, actions: &mut Vec<SenderAction>) {
        let State::Flowing(flow) = &mut self.state else {
            return;
        };
        if flow.asking != Some(ticket) || self.closing {
            return;
        }
        flow.asking = None;
        match next {
            Next::Segment(offer) => {
                flow.need_full = false;
                self.full_asked = None;
                self.last_transfer = self.last_transfer.wrapping_add(1).max(1);
                let transfer = self.last_transfer;
                if flow.unacked.is_empty() {
                    self.last_progress = now;
                }
                flow.sent = Some(offer.held());
                flow.unacked_bytes += offer.bytes;
                let eager = offer.bytes <= self.config.eager_bytes;
                actions.push(SenderAction::Send {
                    stream: transfer,
                    message: Message::Offer(offer.clone()),
                });
                if eager {
                    actions.push(SenderAction::Stream { transfer });
                } else {
                    flow.waiting = Some(transfer);
                }
                flow.unacked.push_back(InFlight { transfer, offer });
            }
            Next::UpToDate => flow.dry = !flow.stale,
            Next::NeedFull => {
                flow.dry = !flow.stale;
                flow.need_full = true;
                let due = self
                    .full_asked
                    .is_none_or(|at| now >= at + self.config.full_again);
                // With something on its way the holder's position is going to move: asked again then.
                if due && flow.unacked.is_empty() {
                    self.full_asked = Some(now);
                    actions.push(SenderAction::RequestFull);
                }
            }
        }
    }

    /// What is due by time alone.
    fn time(&mut self, now: Duration, actions: &mut Vec<SenderAction>) {
        if self.closing {
            return;
        }
        match self.state {
            State::Fenced { .. } | State::Connecting => return,
            State::Waiting { until } => {
                if now >= until {
                    self.connection += 1;
                    self.state = State::Connecting;
                    actions.push(SenderAction::Connect {
                        connection: self.connection,
                    });
                }
                return;
            }
            State::Refused { until } if now >= until => {
                self.last_progress = now;
                self.open(actions);
            }
            State::Opening | State::Flowing(_) | State::Refused { .. } => {}
        }
        if now >= self.last_heard + self.config.dead_after {
            let why = format!("not a sign of life for {} ms", self.config.dead_after.as_millis());
            return self.disconnect(why, actions);
        }
        // Of what is with the holder whole nothing is heard until it is on its disk: a large segment takes minutes on a slow one,
        // and would be sent again and again if it were given up before.
        let patience = match &self.state {
            State::Flowing(flow) if !flow.unacked.is_empty() => {
                let storing = flow.unacked_bytes / self.config.slowest_store.max(1);
                let patience = self.config.stall_after + Duration::from_secs(storing);
                // One that is slower still gets there some time.
                Some(patience.saturating_mul(1 << self.stalls.min(MAX_STALLS)))
            }
            State::Opening => Some(self.config.stall_after),
            _ => None,
        };
        if let Some(patience) = patience
            && now >= self.last_progress + patience
        {
            let why = format!("it lives but stored nothing for {} s", patience.as_secs());
            self.stalls = self.stalls.saturating_add(1);
            return self.disconnect(why, actions);
        }
        if now >= self.last_sent + self.config.ping_every {
            actions.push(SenderAction::Send {
                stream: 0,
                message: Message::Ping(Ping {}),
            });
        }
    }

    /// Asks the spool for more while the window has room.
    fn ask(&mut self, actions: &mut Vec<SenderAction>) {
        let State::Flowing(flow) = &mut self.state else {
            return;
        };
        let room =
            flow.unacked.len() < self.config.window_segments && flow.unacked_bytes < self.config.window_bytes;
        if self.closing || flow.dry || !room || flow.asking.is_some() || flow.waiting.is_some() {
            return;
        }
        self.last_ticket += 1;
        flow.asking = Some(self.last_ticket);
        flow.stale = false;
        actions.push(SenderAction::Next {
            ticket: self.last_ticket,
            position: flow.sent.clone(),
        });
    }
}

/// `first` doubled `times` times, at most `max`.
fn backoff(first: Duration, max: Duration, times: u32) -> Duration {
    first.saturating_mul(1 << times.min(20)).min(max)
}
