//! How a node takes a VM over: a pure plan, events in, actions out.
//!
//! ```text
//!   Reading --record--> Raising --raised--> Sealing --enough--> Fetching --whole here--> Starting --> Done
//!                          |  from here on the old owner's   |  from here on it cannot commit
//!                          |  generation is over             |  what the sealed holders lack
//! ```
//!
//! Invariants: the guest is started only after `holders - ack_quorum + 1` holders have promised the new generation, so
//! that every checkpoint that was ever committed is among what they have, and the highest complete one of those is
//! taken; whoever loses the compare-and-swap, or meets a higher generation on the way, starts nothing; a plan that
//! fails leaves nothing running, and beginning anew is always safe (it raises the generation once more).
//!
//! What it never does: it has no socket, no clock and no store; it does not judge whether the old owner is dead.

use std::fmt;

use segment::{Generation, SegmentName, VmId};

use crate::registry::{RegistryError, VmRecord};
use crate::wire::SegmentBrief;

/// How many holders have to be sealed, so that they meet every set of `ack_quorum` holders.
#[must_use]
pub fn seals_needed(holders: usize, ack_quorum: usize) -> usize {
    // Any two sets of these sizes have a holder in common: needed + quorum = holders + 1.
    (holders + 1).saturating_sub(ack_quorum).max(1)
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

/// The VM runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// The process.
    pub pid: u32,
    /// Its control socket.
    pub socket: Option<String>,
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
    /// A holder was sealed (or, of a dry run, asked), and has this as its newest complete checkpoint.
    Sealed {
        /// The holder.
        holder: String,
        /// What it has.
        result: Result<Option<SegmentBrief>, SealFailure>,
    },
    /// The chain is whole in the local store; or why not.
    Fetched(Result<(), String>),
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
    /// Only ask a holder what it has; answer `Sealed`.
    Peek {
        /// The holder.
        holder: String,
    },
    /// Make the chain of this checkpoint whole in the local store, from one of these; answer `Fetched`.
    Fetch {
        /// Who has it.
        from: Vec<String>,
        /// The checkpoint.
        tip: SegmentBrief,
        /// The new generation.
        generation: Generation,
    },
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

/// How it ended badly. In every case nothing was started by this plan, unless it says so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromoteError {
    /// The record could not be read.
    #[error("cannot promote VM {vm}: {source}. Nothing was changed")]
    Read {
        /// The VM.
        vm: VmId,
        /// Why. (Told in the text: it has to cross the wire whole.)
        source: RegistryError,
    },
    /// The compare-and-swap was lost, or not answered.
    #[error("cannot promote VM {vm}: {source}. Nothing was started; promoting again is safe")]
    Raise {
        /// The VM.
        vm: VmId,
        /// Why.
        source: RegistryError,
    },
    /// Another candidate is ahead.
    #[error(
        "VM {vm} is being taken over by someone else: {holder} has promised generation {current}, this promote had \
         {generation}. Nothing was started here; see `standby status` for who owns it"
    )]
    Overtaken {
        /// The VM.
        vm: VmId,
        /// Who said so.
        holder: String,
        /// The generation of this plan.
        generation: Generation,
        /// What is promised.
        current: Generation,
    },
    /// Not enough holders.
    #[error(
        "cannot promote VM {vm}: {sealed} of its {holders} holders were sealed and {needed} are needed, so a \
         committed checkpoint could be missed. {state}. Not reached: {failures}. Start those agents, then promote again"
    )]
    TooFewSeals {
        /// The VM.
        vm: VmId,
        /// How many were sealed.
        sealed: usize,
        /// How many holders there are.
        holders: usize,
        /// How many are needed.
        needed: usize,
        /// What state it is left in.
        state: Left,
        /// Who failed, and why.
        failures: String,
    },
    /// No holder has anything.
    #[error(
        "cannot promote VM {vm}: none of the sealed holders has a complete checkpoint of it, so none was ever \
         committed. {state}"
    )]
    Nothing {
        /// The VM.
        vm: VmId,
        /// What state it is left in.
        state: Left,
    },
    /// The chain could not be brought here.
    #[error("cannot promote VM {vm}: {tip} could not be loaded here: {why}. {state}")]
    Fetch {
        /// The VM.
        vm: VmId,
        /// The checkpoint.
        tip: SegmentName,
        /// Why.
        why: String,
        /// What state it is left in.
        state: Left,
    },
    /// The guest could not be started.
    #[error("VM {vm} could not be started from {tip}: {why}. {state}")]
    Start {
        /// The VM.
        vm: VmId,
        /// The checkpoint.
        tip: SegmentName,
        /// Why.
        why: String,
        /// What state it is left in.
        state: Left,
    },
}

/// What state a promote that failed leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Nothing was changed.
    Unchanged,
    /// The generation was raised and nothing runs.
    Raised(Generation),
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unchanged => f.write_str("Nothing was changed"),
            Self::Raised(generation) => write!(
                f,
                "It is stopped under generation {generation} and nothing that was committed is lost; promoting again, \
                 here or elsewhere, is safe"
            ),
        }
    }
}

#[derive(Debug)]
enum State {
    Fresh,
    Reading,
    Raising,
    Sealing {
        record: Box<VmRecord>,
        sealed: Vec<(String, Option<SegmentBrief>)>,
        failed: Vec<(String, String)>,
    },
    Fetching {
        record: Box<VmRecord>,
        tip: SegmentBrief,
    },
    Starting {
        record: Box<VmRecord>,
        tip: SegmentBrief,
    },
    Finished,
}

/// One node's try to take one VM over.
#[derive(Debug)]
pub struct Plan {
    vm: VmId,
    dry_run: bool,
    state: State,
    notes: Vec<String>,
}

impl Plan {
    /// For `vm`; a dry run changes nothing.
    #[must_use]
    pub fn new(vm: VmId, dry_run: bool) -> Self {
        Self {
            vm,
            dry_run,
            state: State::Fresh,
            notes: Vec::new(),
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
            (State::Reading, PlanEvent::Record(Ok(record))) if self.dry_run => self.ask_holders(record),
            (State::Reading, PlanEvent::Record(Ok(record))) => {
                self.state = State::Raising;
                vec![PlanAction::Raise {
                    expected: record.generation,
                }]
            }
            (State::Reading, PlanEvent::Record(Err(source))) => self.fail(PromoteError::Read {
                vm: self.vm.clone(),
                source,
            }),
            // The record as the compare-and-swap left it: its holders cannot change any more but under the new
            // generation, which is ours. (The ones read before could be old.)
            (State::Raising, PlanEvent::Raised(Ok(record))) => self.ask_holders(record),
            (State::Raising, PlanEvent::Raised(Err(source))) => self.fail(PromoteError::Raise {
                vm: self.vm.clone(),
                source,
            }),
            (
                State::Sealing {
                    record,
                    mut sealed,
                    mut failed,
                },
                PlanEvent::Sealed { holder, result },
            ) => {
                match result {
                    Ok(newest) => sealed.push((holder, newest)),
                    Err(SealFailure::Unreachable { why }) => failed.push((holder, why)),
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
                self.sealing(record, sealed, failed)
            }
            (State::Fetching { record, tip }, PlanEvent::Fetched(Ok(()))) => {
                self.state = State::Starting {
                    record: record.clone(),
                    tip: tip.clone(),
                };
                vec![PlanAction::Start { record, tip }]
            }
            (State::Fetching { record, tip }, PlanEvent::Fetched(Err(why))) => {
                let (vm, tip, state) = (self.vm.clone(), tip.name, Left::Raised(record.generation));
                self.fail(PromoteError::Fetch { vm, tip, why, state })
            }
            (State::Starting { record, tip }, PlanEvent::Started(Ok(running))) => {
                self.succeed(*record, tip, Some(running))
            }
            (State::Starting { record, tip }, PlanEvent::Started(Err(why))) => {
                let (vm, tip, state) = (self.vm.clone(), tip.name, Left::Raised(record.generation));
                self.fail(PromoteError::Start { vm, tip, why, state })
            }
            // Holders that answer after enough others did; and answers to what was not asked.
            (
                state,
                PlanEvent::Begin
                | PlanEvent::Record(_)
                | PlanEvent::Raised(_)
                | PlanEvent::Sealed { .. }
                | PlanEvent::Fetched(_)
                | PlanEvent::Started(_),
            ) => {
                self.state = state;
                Vec::new()
            }
        }
    }

    fn ask_holders(&mut self, record: VmRecord) -> Vec<PlanAction> {
        let generation = record.generation;
        let ask = |holder: &String| match self.dry_run {
            true => PlanAction::Peek {
                holder: holder.clone(),
            },
            false => PlanAction::Seal {
                holder: holder.clone(),
                generation,
            },
        };
        let actions: Vec<_> = record.holders.iter().map(ask).collect();
        let record = Box::new(record);
        if actions.is_empty() {
            return self.sealing(record, Vec::new(), Vec::new());
        }
        self.state = State::Sealing {
            record,
            sealed: Vec::new(),
            failed: Vec::new(),
        };
        actions
    }

    fn left(&self, record: &VmRecord) -> Left {
        if self.dry_run {
            Left::Unchanged
        } else {
            Left::Raised(record.generation)
        }
    }

    fn sealing(
        &mut self,
        record: Box<VmRecord>,
        sealed: Vec<(String, Option<SegmentBrief>)>,
        failed: Vec<(String, String)>,
    ) -> Vec<PlanAction> {
        let holders = record.holders.len();
        let needed = seals_needed(holders, record.ack_quorum as usize);
        let open = holders.saturating_sub(sealed.len() + failed.len());
        // A dry run waits for everyone, to tell the whole picture.
        let enough = sealed.len() >= needed && (open == 0 || !self.dry_run);
        // Everyone is heard before it is given up: the message names all who are missing.
        if !enough && open == 0 {
            let failures: Vec<_> = failed
                .iter()
                .map(|(holder, why)| format!("{holder} ({why})"))
                .collect();
            let failures = if failures.is_empty() {
                "none".to_owned()
            } else {
                failures.join("; ")
            };
            let (vm, sealed, state) = (self.vm.clone(), sealed.len(), self.left(&record));
            return self.fail(PromoteError::TooFewSeals {
                vm,
                sealed,
                holders,
                needed,
                state,
                failures,
            });
        }
        if !enough {
            self.state = State::Sealing {
                record,
                sealed,
                failed,
            };
            return Vec::new();
        }
        for (holder, why) in &failed {
            self.notes.push(format!("{holder} was not reached: {why}"));
        }
        let best = sealed
            .iter()
            .filter_map(|(_, newest)| newest.as_ref())
            .max_by_key(|b| b.name.position());
        let Some(tip) = best.cloned() else {
            let (vm, state) = (self.vm.clone(), self.left(&record));
            return self.fail(PromoteError::Nothing { vm, state });
        };
        let has = |newest: &Option<SegmentBrief>| newest.as_ref().is_some_and(|b| b.held() == tip.held());
        let from: Vec<_> = sealed
            .iter()
            .filter(|(_, newest)| has(newest))
            .map(|(h, _)| h.clone())
            .collect();
        if self.dry_run {
            self.notes.push(format!(
                "would seal {needed} of {holders} holders and go on from {}",
                tip.name
            ));
            self.notes.push(format!("it is at {}", from.join(", ")));
            return self.succeed(*record, tip, None);
        }
        // The point of no return: enough holders have promised the new generation, so the old owner cannot commit
        // anything beyond what they have, whatever becomes of this node. What is left to do can only end in the guest
        // running here, or in nobody running it until someone promotes again.
        self.state = State::Fetching {
            record: record.clone(),
            tip: tip.clone(),
        };
        vec![PlanAction::Fetch {
            from,
            tip,
            generation: record.generation,
        }]
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
