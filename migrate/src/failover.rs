//! How a node takes a VM over: a pure plan, events in, actions out.
//!
//! ```text
//!   Reading --record--> Asking --enough--> Raising --raised--> Sealing --enough--> Fetching --whole here--> Starting --> Done
//!                         |  nothing is      |  from here on the    |  from here on it   ^                      |
//!                         |  changed yet     |  old owner's         |  cannot commit     +--- a damaged copy ---+
//!                                            |  generation is over  |                         is replaced, once
//! ```
//!
//! Before anything is changed, the holders are asked whether it can work at all, and look for damage in what they have:
//! a promote that cannot succeed leaves the old owner alone.
//!
//! While the chain is fetched, the time runs out in which the owner before may still run its guest: its lease in the
//! registry, and what the sealed holders had granted it (see [`crate::lease`]).
//!
//! Invariants: the guest is started only after that time, and only after `holders - ack_quorum + 1` holders have promised the new generation; it
//! never goes on from a checkpoint older than one that can have been committed (see `failover/evidence.rs` for the
//! proof), unless the operator has accepted that loss in so many words; whoever loses the compare-and-swap, or meets a
//! higher generation on the way, starts nothing; a plan that fails leaves nothing running, and beginning anew is always
//! safe (it raises the generation once more).
//!
//! What it never does: it has no socket, no clock and no store; it does not judge whether the old owner is dead.

mod error;
mod evidence;
#[cfg(test)]
mod global_tests;

pub use error::{Left, PromoteError};

use evidence::{Answers, Choice, Look, Verdict};
use std::time::Duration;

use segment::{Generation, SegmentName, VmId};

use crate::lease::{LeaseTerms, MAX_TTL};
use crate::registry::{LeaseState, OwnerProcess, RegistryError, VmRecord};
use crate::wire::SegmentBrief;

/// How many holders have to be sealed, so that they meet every set of `ack_quorum` holders.
#[must_use]
pub fn seals_needed(holders: usize, ack_quorum: usize) -> usize {
    // Any two sets of these sizes have a holder in common: needed + quorum = holders + 1.
    (holders + 1).saturating_sub(ack_quorum).max(1)
}

/// How long the lease of the owner before may hold in the registry after the raise, which ended its renewals.
#[must_use]
pub fn lease_left(before: &VmRecord, raised: &VmRecord) -> Duration {
    let Some(failover) = &raised.failover else {
        // Its owner runs it without one.
        return Duration::ZERO;
    };
    // It had run out by the registry's clock, or was given back, and none was taken since: that would have changed the
    // record. (One that was never taken under this generation says nothing of the owner before it.)
    let over = before.owner_lease() == LeaseState::Gone && raised.revision == before.revision + 1;
    if over {
        return Duration::ZERO;
    }
    let terms = failover.terms();
    terms.map_or(MAX_TTL + MAX_TTL, LeaseTerms::guard)
}

/// Why a holder was not sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SealFailure {
    /// It has promised a higher generation: someone else takes the VM over.
    Fenced {
        /// Which.
        current: Generation,
    },
    /// It was not reached, or could not promise.
    Unreachable {
        /// Why.
        why: String,
    },
}

/// What a holder says of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holding {
    /// Its newest checkpoint whose chain is whole there.
    pub newest: Option<SegmentBrief>,
    /// The newest it has ever acknowledged, as far as it remembers; more than `newest` when it lost something.
    pub had: Option<SegmentName>,
    /// The newest one that is there and lacks a link of its chain, when it is newer than `newest`.
    pub dangling: Option<SegmentBrief>,
    /// Why it cannot tell what it had, when it cannot.
    pub forgot: Option<String>,
    /// For how long it lets nobody else run the guest, from when it said so: what it granted before it promised.
    pub granted: Duration,
}

/// The VM runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Running {
    /// The process.
    pub pid: u32,
    /// Its control socket.
    pub socket: Option<String>,
    /// How it was started, where that is worth telling.
    pub notes: Vec<String>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanEvent {
    /// Begin.
    Begin,
    /// The registry's record of the VM.
    Record(Result<VmRecord, RegistryError>),
    /// The answer to the compare-and-swap.
    Raised(Result<VmRecord, RegistryError>),
    /// A holder was asked, and promised nothing. (Not the same as sealed: one may be late.)
    Asked {
        /// The holder.
        holder: String,
        /// What it has; or why it was not reached.
        result: Result<Holding, String>,
    },
    /// A holder was sealed.
    Sealed {
        /// The holder.
        holder: String,
        /// What it has.
        result: Result<Holding, SealFailure>,
    },
    /// The chain is whole in the local store, and what had to be replaced for it, in words; or why not.
    Fetched(Result<Vec<String>, String>),
    /// The time is over that was to be waited for; or what could have run the guest in it is known to have ended.
    Waited {
        /// For how long it was waited.
        time: Duration,
    },
    /// The newest checkpoint in the global store that the registry has as committed; or why that is not known.
    Global(Result<Option<SegmentBrief>, String>),
    /// The guest runs; or why not.
    Started(Result<Running, String>),
}

/// What to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanAction {
    /// Read the VM's record; answer `Record`.
    ReadRecord,
    /// Raise the generation by compare-and-swap; answer `Raised`.
    Raise {
        /// What the record said.
        expected: Generation,
    },
    /// Let a holder promise the generation durably; answer `Sealed`.
    Seal {
        /// The holder.
        holder: String,
        /// The new generation.
        generation: Generation,
    },
    /// Only ask a holder what it has; answer `Asked`.
    Ask {
        /// The holder.
        holder: String,
        /// It shall check every byte of it, however long that takes.
        thorough: bool,
    },
    /// Make the chain of this checkpoint whole in the local store, from these; answer `Fetched`.
    Fetch {
        /// Who may have its links, the best first.
        from: Vec<String>,
        /// Check every byte of what is here already.
        thorough: bool,
        /// The checkpoint.
        tip: SegmentBrief,
        /// The new generation.
        generation: Generation,
    },
    /// Let the time run out in which the owner before may still run its guest; answer `Waited`. It may be answered at
    /// once when that owner's process is known to have ended.
    Wait {
        /// At most so long.
        time: Duration,
        /// The owner before, as the record named it after the raise: later none can have come.
        process: Option<OwnerProcess>,
    },
    /// See which committed checkpoint the global store has; answer `Global`.
    LookGlobal,
    /// Start the guest from the local store; answer `Started`.
    Start {
        /// The VM, under its new generation.
        record: Box<VmRecord>,
        /// The checkpoint to go on from.
        tip: SegmentBrief,
    },
    /// It ended.
    Finish(Box<Result<Outcome, PromoteError>>),
}

/// How it ended well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The VM under its new generation; of a dry run, as it is.
    pub record: VmRecord,
    /// The checkpoint it goes on from, or would.
    pub tip: SegmentBrief,
    /// The process; absent of a dry run.
    pub running: Option<Running>,
    /// What was noticed on the way.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone)]
enum State {
    Fresh,
    Reading,
    Asking {
        record: Box<VmRecord>,
        answers: Answers,
    },
    Raising {
        before: Box<VmRecord>,
    },
    Sealing {
        record: Box<VmRecord>,
        answers: Answers,
    },
    Fetching {
        record: Box<VmRecord>,
        tip: Box<SegmentBrief>,
        from: Vec<String>,
        otherwise: Otherwise,
    },
    /// The chain is here, and the time of the owner before is not over.
    Waiting {
        record: Box<VmRecord>,
        tip: Box<SegmentBrief>,
        repair_from: Option<Vec<String>>,
    },
    Starting {
        record: Box<VmRecord>,
        tip: Box<SegmentBrief>,
        /// Where a copy may be had when the one here turns out to be damaged; absent at the second try.
        repair_from: Option<Vec<String>>,
    },
    Finished,
}

/// What to do when a chain cannot be made whole.
#[derive(Debug, Clone)]
enum Otherwise {
    /// Say so.
    Fail,
    /// It was put together from several holders' parts: what is lost without it.
    Loss {
        error: Box<PromoteError>,
        /// What the operator has agreed to go on from then.
        accepted: Option<Choice>,
    },
    /// It was looked through because the start failed: why that was.
    StartFailed(String),
}

/// What is asked of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlanOptions {
    /// Change nothing, only tell what would be done.
    pub dry_run: bool,
    /// Go on from the newest that is there even if a later one was committed and is lost. An operator's word only.
    pub accept_loss: bool,
    /// Go on though fewer holders answer than it takes to fence the owner before. An operator's word only: that owner may
    /// run on, and what only the others have is lost.
    pub force: bool,
    /// The generation whose owner was judged to be lost: of another one nothing is known, and it may be well. Absent, it
    /// is whichever the registry names.
    pub judged: Option<Generation>,
    /// There is a global store: it is looked at when the holders that answer do not have what is needed.
    pub global: bool,
}

/// One node's try to take one VM over.
#[derive(Debug, Clone)]
pub struct Plan {
    vm: VmId,
    options: PlanOptions,
    state: State,
    notes: Vec<String>,
    /// How long the lease in the registry may hold after the raise.
    leased: Duration,
    /// The time of the owner before is being waited for.
    waiting: bool,
}

/// What a phase of questions came to.
enum Judged {
    Wait(Box<VmRecord>, Answers),
    /// The holders do not have what is needed: the global store may.
    Look(Box<VmRecord>, Answers),
    Go {
        record: Box<VmRecord>,
        choice: Choice,
        otherwise: Otherwise,
        notes: Vec<String>,
        granted: Duration,
    },
    Fail(PromoteError),
}

impl Plan {
    /// For `vm`.
    #[must_use]
    pub fn new(vm: VmId, options: PlanOptions) -> Self {
        Self {
            vm,
            options,
            state: State::Fresh,
            notes: Vec::new(),
            leased: Duration::ZERO,
            waiting: false,
        }
    }

    /// Whether it ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Finished)
    }

    /// One event.
    pub fn step(&mut self, event: PlanEvent) -> Vec<PlanAction> {
        let state = std::mem::replace(&mut self.state, State::Finished);
        match (state, event) {
            (State::Fresh, PlanEvent::Begin) => {
                self.state = State::Reading;
                vec![PlanAction::ReadRecord]
            }
            (State::Reading, PlanEvent::Record(Ok(record))) => match self.options.judged {
                Some(judged) if record.generation != judged => self.fail(PromoteError::NotJudged {
                    vm: self.vm.clone(),
                    judged,
                    current: record.generation,
                    owner: record.owner,
                }),
                Some(_) | None => self.ask(record),
            },
            (State::Reading, PlanEvent::Record(Err(source))) => self.fail(PromoteError::Read {
                vm: self.vm.clone(),
                source,
            }),
            (State::Asking { record, mut answers }, PlanEvent::Asked { holder, result }) => {
                match result {
                    Ok(holding) => answers.heard.push((holder, holding)),
                    Err(why) => answers.failed.push((holder, why)),
                }
                self.asked(record, answers)
            }
            // The record as the compare-and-swap left it: its holders cannot change any more but under the new
            // generation, which is ours. (The ones read before could be old.)
            (State::Raising { before }, PlanEvent::Raised(Ok(record))) => {
                self.leased = lease_left(&before, &record);
                self.seal(record)
            }
            (State::Raising { .. }, PlanEvent::Raised(Err(source))) => self.fail(PromoteError::Raise {
                vm: self.vm.clone(),
                source,
            }),
            (State::Sealing { record, mut answers }, PlanEvent::Sealed { holder, result }) => {
                match result {
                    Ok(holding) => answers.heard.push((holder, holding)),
                    Err(SealFailure::Unreachable { why }) => answers.failed.push((holder, why)),
                    Err(SealFailure::Fenced { current }) => {
                        let (vm, generation) = (self.vm.clone(), record.generation);
                        return self.fail(PromoteError::Overtaken {
                            vm,
                            holder,
                            generation,
                            current,
                        });
                    }
                }
                self.sealed(record, answers)
            }
            (State::Asking { record, mut answers }, PlanEvent::Global(result)) => {
                answers.looked(result);
                self.asked(record, answers)
            }
            (State::Sealing { record, mut answers }, PlanEvent::Global(result)) => {
                answers.looked(result);
                self.sealed(record, answers)
            }
            (
                State::Fetching {
                    record,
                    tip,
                    from,
                    otherwise,
                },
                PlanEvent::Fetched(result),
            ) => self.fetched(record, tip, from, otherwise, result),
            (state, PlanEvent::Waited { time }) => self.waited(state, time),
            (State::Starting { record, tip, .. }, PlanEvent::Started(Ok(mut running))) => {
                self.notes.append(&mut running.notes);
                self.succeed(*record, *tip, Some(running))
            }
            (
                State::Starting {
                    record,
                    tip,
                    repair_from: Some(from),
                },
                PlanEvent::Started(Err(why)),
            ) => self.fetch(record, Choice { tip, from }, Otherwise::StartFailed(why)),
            (
                State::Starting {
                    record,
                    tip,
                    repair_from: None,
                },
                PlanEvent::Started(Err(why)),
            ) => self.start_failed(&record, *tip, why),
            // Holders that answer after enough others did; and answers to what was not asked.
            (
                state,
                PlanEvent::Begin
                | PlanEvent::Record(_)
                | PlanEvent::Asked { .. }
                | PlanEvent::Raised(_)
                | PlanEvent::Sealed { .. }
                | PlanEvent::Fetched(_)
                | PlanEvent::Global(_)
                | PlanEvent::Started(_),
            ) => {
                self.state = state;
                Vec::new()
            }
        }
    }

    fn ask(&mut self, record: VmRecord) -> Vec<PlanAction> {
        // Who has accepted a loss shall not lose more than has to be: then time is worth less than certainty.
        let thorough = self.options.accept_loss;
        let asks: Vec<_> = record
            .holders
            .iter()
            .map(|holder| PlanAction::Ask {
                holder: holder.clone(),
                thorough,
            })
            .collect();
        let (record, answers) = (Box::new(record), Answers::default());
        if asks.is_empty() {
            return self.asked(record, answers);
        }
        self.state = State::Asking { record, answers };
        asks
    }

    fn asked(&mut self, record: Box<VmRecord>, answers: Answers) -> Vec<PlanAction> {
        let open = record.holders.len() > answers.heard.len() + answers.failed.len();
        if self.options.dry_run && open {
            // It waits for everyone, to tell the whole picture.
            self.state = State::Asking { record, answers };
            return Vec::new();
        }
        match self.judge(record, answers, Left::Unchanged) {
            Judged::Wait(record, answers) => {
                self.state = State::Asking { record, answers };
                Vec::new()
            }
            Judged::Look(record, answers) => {
                self.state = State::Asking { record, answers };
                vec![PlanAction::LookGlobal]
            }
            Judged::Fail(error) => self.fail(error),
            Judged::Go {
                record,
                choice,
                notes,
                ..
            } if self.options.dry_run => {
                let holders = record.holders.len();
                let needed = seals_needed(holders, record.ack_quorum as usize);
                self.notes = notes;
                self.notes.push(format!(
                    "would seal {needed} of {holders} holders and go on from {}",
                    choice.tip.name
                ));
                self.notes.push(format!("it is at {}", choice.from.join(", ")));
                self.succeed(*record, *choice.tip, None)
            }
            // What was noticed is noticed again when they are sealed.
            Judged::Go { record, .. } => {
                let expected = record.generation;
                self.state = State::Raising { before: record };
                vec![PlanAction::Raise { expected }]
            }
        }
    }

    fn seal(&mut self, record: VmRecord) -> Vec<PlanAction> {
        let generation = record.generation;
        let seals: Vec<_> = record
            .holders
            .iter()
            .map(|holder| PlanAction::Seal {
                holder: holder.clone(),
                generation,
            })
            .collect();
        let (record, answers) = (Box::new(record), Answers::default());
        if seals.is_empty() {
            return self.sealed(record, answers);
        }
        self.state = State::Sealing { record, answers };
        seals
    }

    fn sealed(&mut self, record: Box<VmRecord>, answers: Answers) -> Vec<PlanAction> {
        let left = Left::Raised(record.generation);
        match self.judge(record, answers, left) {
            Judged::Wait(record, answers) => {
                self.state = State::Sealing { record, answers };
                Vec::new()
            }
            Judged::Look(record, answers) => {
                self.state = State::Sealing { record, answers };
                vec![PlanAction::LookGlobal]
            }
            Judged::Fail(error) => self.fail(error),
            // The point of no return: enough holders have promised the new generation, so the old owner cannot commit
            // anything beyond what they have, whatever becomes of this node. What is left to do can only end in the
            // guest running here, or in nobody running it until someone promotes again.
            Judged::Go {
                record,
                choice,
                otherwise,
                notes,
                granted,
            } => {
                self.notes = notes;
                let wait = self.wait(granted, &record);
                let mut actions = self.fetch(record, choice, otherwise);
                actions.extend(wait);
                actions
            }
        }
    }

    /// What the answers of a phase allow.
    fn judge(&self, record: Box<VmRecord>, mut answers: Answers, state: Left) -> Judged {
        let verdict = answers.verdict(&record);
        let lacks = match &verdict {
            Verdict::Wait | Verdict::Go(_) => false,
            Verdict::TooFew => self.options.force,
            Verdict::Nothing | Verdict::Assemble { .. } | Verdict::Loss { .. } => true,
        };
        if lacks && self.options.global {
            match answers.global {
                Look::NotAsked => {
                    answers.global = Look::Asked;
                    return Judged::Look(record, answers);
                }
                Look::Asked => return Judged::Wait(record, answers),
                Look::Heard(_) | Look::Failed(_) => {}
            }
        }
        let vm = self.vm.clone();
        let holders = record.holders.len();
        let failures = answers.failures();
        let granted = answers.heard.iter().map(|(_, holding)| holding.granted).max();
        let mut granted = granted.unwrap_or_default();
        let mut notes: Vec<_> = answers
            .failed
            .iter()
            .map(|(holder, why)| format!("{holder} was not reached: {why}"))
            .collect();
        let loss = |why: &str, best: Option<&Choice>| PromoteError::WouldLose {
            vm: vm.clone(),
            why: why.to_owned(),
            best: best.map(|b| Box::new(b.tip.name.clone())),
            state,
            failures: failures.clone(),
        };
        if let Look::Failed(why) = &answers.global {
            notes.push(format!("the global store could not be looked at: {why}"));
        }
        let (choice, otherwise) = match verdict {
            Verdict::Wait => return Judged::Wait(record, answers),
            Verdict::TooFew if self.options.force && answers.newest().is_some() => {
                let needed = seals_needed(holders, record.ack_quorum as usize);
                notes.push(format!(
                    "forced: {} of the {needed} holders that are needed answered, so the owner before was not fenced; if it \
                     runs, VM {vm} runs twice, and what only the other holders have is lost",
                    answers.heard.len()
                ));
                // What the others granted is not known: as much as they can have, up to now.
                let terms = record.failover.and_then(|failover| failover.terms().ok());
                granted = granted.max(terms.map_or(Duration::ZERO, LeaseTerms::guard));
                let Some(choice) = answers.newest() else {
                    return Judged::Fail(PromoteError::Nothing { vm, state });
                };
                // What the global store has may be old, and the registry says how old: to lose that is another word than
                // to go on without the holders.
                if let Some(why) = answers.global_behind(&choice, &record) {
                    if !self.options.accept_loss {
                        return Judged::Fail(loss(&why, Some(&choice)));
                    }
                    notes.push(format!("at a loss that was accepted: {why}"));
                }
                (choice, Otherwise::Fail)
            }
            Verdict::TooFew => {
                return Judged::Fail(PromoteError::TooFewSeals {
                    vm,
                    sealed: answers.heard.len(),
                    holders,
                    needed: seals_needed(holders, record.ack_quorum as usize),
                    state,
                    failures,
                });
            }
            Verdict::Nothing => return Judged::Fail(PromoteError::Nothing { vm, state }),
            Verdict::Go(choice) => (choice, Otherwise::Fail),
            Verdict::Assemble { choice, why, best } => {
                let error = Box::new(loss(&why, best.as_ref()));
                let accepted = best.filter(|_| self.options.accept_loss);
                (choice, Otherwise::Loss { error, accepted })
            }
            Verdict::Loss {
                why,
                best: Some(choice),
            } if self.options.accept_loss => {
                notes.push(format!("at a loss that was accepted: {why}"));
                (choice, Otherwise::Fail)
            }
            Verdict::Loss { why, best } => return Judged::Fail(loss(&why, best.as_ref())),
        };
        Judged::Go {
            record,
            choice,
            otherwise,
            notes,
            granted,
        }
    }

    /// What has to run out before the guest may run here: fewer than a quorum of the holders that were not sealed can
    /// have granted time, so that of the others' is all there is beside the lease in the registry.
    fn wait(&mut self, granted: Duration, record: &VmRecord) -> Option<PlanAction> {
        let time = granted.max(self.leased);
        self.waiting = !time.is_zero();
        self.waiting.then_some(PlanAction::Wait {
            time,
            process: record.failover.and_then(|failover| failover.process),
        })
    }

    fn waited(&mut self, state: State, time: Duration) -> Vec<PlanAction> {
        if std::mem::take(&mut self.waiting) {
            let ms = time.as_millis();
            self.notes.push(format!(
                "waited {ms} ms until the owner before had to stand still"
            ));
        }
        match state {
            State::Waiting {
                record,
                tip,
                repair_from,
            } => self.start(record, tip, repair_from),
            state => {
                self.state = state;
                Vec::new()
            }
        }
    }

    fn start(
        &mut self,
        record: Box<VmRecord>,
        tip: Box<SegmentBrief>,
        repair_from: Option<Vec<String>>,
    ) -> Vec<PlanAction> {
        if self.waiting {
            self.state = State::Waiting {
                record,
                tip,
                repair_from,
            };
            return Vec::new();
        }
        self.state = State::Starting {
            record: record.clone(),
            tip: tip.clone(),
            repair_from,
        };
        vec![PlanAction::Start { record, tip: *tip }]
    }

    fn fetch(&mut self, record: Box<VmRecord>, choice: Choice, otherwise: Otherwise) -> Vec<PlanAction> {
        let Choice { tip, from } = choice;
        let action = PlanAction::Fetch {
            from: from.clone(),
            thorough: matches!(otherwise, Otherwise::StartFailed(_)),
            tip: (*tip).clone(),
            generation: record.generation,
        };
        self.state = State::Fetching {
            record,
            tip,
            from,
            otherwise,
        };
        vec![action]
    }

    fn fetched(
        &mut self,
        record: Box<VmRecord>,
        tip: Box<SegmentBrief>,
        from: Vec<String>,
        otherwise: Otherwise,
        result: Result<Vec<String>, String>,
    ) -> Vec<PlanAction> {
        let repair_from = match (result, otherwise) {
            // Every byte is as it was written: it was not for the copy that the guest did not start.
            (Ok(replaced), Otherwise::StartFailed(why)) if replaced.is_empty() => {
                return self.start_failed(&record, *tip, why);
            }
            (Ok(replaced), Otherwise::StartFailed(_)) => {
                self.notes.extend(replaced);
                None
            }
            (Ok(replaced), Otherwise::Fail | Otherwise::Loss { .. }) => {
                self.notes.extend(replaced);
                Some(from)
            }
            (Err(why), Otherwise::Fail) => {
                let (vm, tip, state) = (self.vm.clone(), tip.name, Left::Raised(record.generation));
                return self.fail(PromoteError::Fetch { vm, tip, why, state });
            }
            (Err(also), Otherwise::StartFailed(why)) => {
                let why = format!("{why}; and a sound copy of its chain is not to be had: {also}");
                return self.start_failed(&record, *tip, why);
            }
            (
                Err(why),
                Otherwise::Loss {
                    accepted: Some(choice),
                    ..
                },
            ) => {
                self.notes.push(format!(
                    "at a loss that was accepted: {} could not be put together: {why}",
                    tip.name
                ));
                return self.fetch(record, choice, Otherwise::Fail);
            }
            (
                Err(_),
                Otherwise::Loss {
                    error,
                    accepted: None,
                },
            ) => return self.fail(*error),
        };
        self.start(record, tip, repair_from)
    }

    fn start_failed(&mut self, record: &VmRecord, tip: SegmentBrief, why: String) -> Vec<PlanAction> {
        let (vm, tip, state) = (self.vm.clone(), tip.name, Left::Raised(record.generation));
        self.fail(PromoteError::Start { vm, tip, why, state })
    }

    fn succeed(&mut self, record: VmRecord, tip: SegmentBrief, running: Option<Running>) -> Vec<PlanAction> {
        self.state = State::Finished;
        let notes = std::mem::take(&mut self.notes);
        vec![PlanAction::Finish(Box::new(Ok(Outcome {
            record,
            tip,
            running,
            notes,
        })))]
    }

    fn fail(&mut self, error: PromoteError) -> Vec<PlanAction> {
        self.state = State::Finished;
        vec![PlanAction::Finish(Box::new(Err(error)))]
    }
}
