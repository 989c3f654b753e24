//! Every interleaving at small sizes: owners, holders, the registry and two candidates, checked by stateright.
//!
//! ```text
//!   State --every Action--> State ..        time is counted in ticks, and is everybody's; a lease is one tick long
//! ```
//!
//! A message that is lost, late or doubled is a step that is never taken, taken late, or taken without being heard of. A
//! process that is stopped takes no steps. Everything that decides is the product's: [`Plan`], [`OwnerLease`], the grants,
//! the registry's rules and the rule of promises.
//!
//! Invariants checked in every state: never two guests of one VM run; what was committed is in whatever is started after
//! it, and nothing is committed beyond that by an owner before; a generation is started once; from here, once nothing
//! more fails, the guest ends up running.

mod recover;
mod steps;

use std::collections::{BTreeSet, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use migrate::failover::{Plan, PlanAction};
use migrate::lease::{Electors, LeaseTerms, OwnerLease, Verdict};
use segment::{Generation, VmId};
use stateright::Property;

use crate::parts::{At, Holder, Registry, vm};
use crate::{Rules, Shown};

/// How long a tick is.
const TICK: Duration = Duration::from_secs(1);
/// A lease of one tick.
const TERMS: LeaseTerms = LeaseTerms {
    ttl: TICK,
    renew_every: Duration::from_millis(300),
};

/// How much there is of what.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Holders.
    pub holders: usize,
    /// How many of them make a checkpoint committed.
    pub quorum: usize,
    /// Ticks.
    pub ticks: u64,
    /// Checkpoints of each owner.
    pub epochs: u64,
    /// Takeovers that are begun.
    pub begins: u8,
    /// Holders that begin anew.
    pub restarts: u8,
}

/// The model, of these sizes and under these rules.
#[derive(Debug)]
pub struct Model {
    /// How much there is of what.
    pub sizes: Sizes,
    /// The rules.
    pub rules: Rules,
    vm: VmId,
    // What is known to end up running: written by the checker's threads; held for moments.
    recovers: Mutex<HashSet<u64>>,
}

/// What went wrong on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wrong {
    /// A committed checkpoint is not in what was started.
    Lost,
    /// An owner committed something after a later one was started from before it.
    CommittedBeyond,
    /// A generation was started twice.
    StartedTwice,
}

/// What becomes of an owner's question for time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Asking {
    /// Nothing is under way.
    Idle,
    /// It is on its way.
    Sent,
    /// The answer is on its way.
    Answered,
}

/// A process that runs the guest, or may.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    generation: u64,
    /// What it was started from.
    from: At,
    /// Its guest has run, so that there are checkpoints.
    ran: bool,
    /// The newest checkpoint of it that each holder has.
    stored: Vec<u64>,
    /// Of each holder and of the registry: when it asked for what it was answered last, as long as that counts.
    granted: Vec<Option<u64>>,
    /// What becomes of what it asked them in this tick.
    asking: Vec<Asking>,
    /// Somebody has refused it as stale.
    fenced: bool,
    /// Its process is there.
    alive: bool,
}

/// A node that takes the VM over.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// Which takeover it is.
    number: u8,
    plan: Shown<Plan>,
    todo: Vec<Shown<PlanAction>>,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    now: u64,
    registry: Shown<Registry>,
    holders: Vec<Holder>,
    owners: Vec<Owner>,
    /// Those that wait know since when.
    candidates: Vec<Option<(Candidate, Option<u64>)>>,
    committed: BTreeSet<At>,
    begins: u8,
    restarts: u8,
    wrong: Option<Wrong>,
}

/// Something happens. Owners, holders and candidates by number; of what owners ask, the registry is the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Time goes on, and every owner asks everyone for more: one that does not is one whose questions are lost.
    Tick,
    /// An owner's next checkpoint reaches a holder.
    Ship(usize, usize),
    /// An owner's question for time reaches one of them.
    Reach(usize, usize),
    /// The answer reaches it.
    Answer(usize, usize),
    /// An owner's host is gone.
    Die(usize),
    /// A holder's process begins anew.
    Restart(usize),
    /// A candidate begins.
    Begin(usize),
    /// It does one of the things it has to do.
    Do(usize, usize),
    /// The same, and the answer is lost.
    DoUnheard(usize, usize),
    /// It does not reach who was to do that.
    Miss(usize, usize),
}

impl Model {
    /// Of these sizes.
    #[must_use]
    pub fn new(sizes: Sizes, rules: Rules) -> Self {
        Self {
            sizes,
            rules,
            vm: vm(0),
            recovers: Mutex::default(),
        }
    }

    /// A guest that runs, with all the time that can be had.
    fn first(&self) -> State {
        let Sizes { holders, quorum, .. } = self.sizes;
        let names: Vec<String> = (0..holders).map(|h| h.to_string()).collect();
        let mut registry = Registry::new(self.vm.clone(), "first", names, quorum as u32, TERMS, 1);
        // It cannot be over yet.
        let _ = registry.renew(1, TERMS, Duration::ZERO);
        let mut holder = Holder::default();
        // Neither can this.
        let _ = holder.open(self.rules, 1);
        holder.grant(self.rules, 1, TERMS, Duration::ZERO);
        let mut owner = Owner::new(1, (0, 0), holders);
        owner.granted.fill(Some(0));
        owner.ran = true;
        State {
            now: 0,
            registry: Shown::new(registry),
            holders: vec![holder; holders],
            owners: vec![owner],
            candidates: vec![None; usize::from(self.sizes.begins)],
            committed: BTreeSet::new(),
            begins: 0,
            restarts: 0,
            wrong: None,
        }
    }

    fn is_known_to_recover(&self, digest: u64) -> bool {
        let known = self.recovers.lock().unwrap_or_else(PoisonError::into_inner);
        known.contains(&digest)
    }

    fn remember(&self, digest: u64) {
        let mut known = self.recovers.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(digest);
    }
}

impl Owner {
    fn new(generation: u64, from: At, holders: usize) -> Self {
        Self {
            generation,
            from,
            ran: false,
            stored: vec![0; holders],
            granted: vec![None; holders + 1],
            asking: vec![Asking::Sent; holders + 1],
            fenced: false,
            alive: true,
        }
    }

    /// The product's account of its lease.
    fn lease(&self, quorum: usize) -> OwnerLease {
        let holders: Vec<String> = (0..self.stored.len()).map(|h| h.to_string()).collect();
        let mut lease = OwnerLease::new(TERMS, Electors::new(&holders, quorum as u32));
        for (to, sent) in self.granted.iter().enumerate() {
            match (holders.get(to), sent) {
                (_, None) => {}
                (Some(holder), Some(sent)) => lease.granted(holder, time(*sent)),
                (None, Some(sent)) => lease.renewed(time(*sent)),
            }
        }
        if self.fenced {
            lease.fence("someone", Generation(self.generation + 1));
        }
        lease
    }

    /// Whether its guest may run.
    fn runs(&self, quorum: usize, now: u64) -> bool {
        let may = |lease: OwnerLease| matches!(lease.verdict(time(now)), Verdict::MayRun { .. });
        self.alive && may(self.lease(quorum))
    }
}

impl State {
    fn running(&self, model: &Model) -> impl Iterator<Item = &Owner> {
        let quorum = model.sizes.quorum;
        self.owners
            .iter()
            .filter(move |owner| owner.runs(quorum, self.now))
    }
}

/// An instant of everyone's clock.
fn time(ticks: u64) -> Duration {
    TICK * u32::try_from(ticks).unwrap_or(u32::MAX)
}

impl stateright::Model for Model {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.first()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.possible(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        self.step(&mut next, action);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two running", |model: &Self, state: &State| {
                state.running(model).count() <= 1
            }),
            Property::always("no committed epoch lost", |_, state: &State| {
                !matches!(state.wrong, Some(Wrong::Lost | Wrong::CommittedBeyond))
            }),
            Property::always("a generation is started once", |_, state: &State| {
                state.wrong != Some(Wrong::StartedTwice)
            }),
            Property::always("it ends up running", |model: &Self, state: &State| {
                model.ends_up_running(state)
            }),
            // That these are reached says that the others were put to the test.
            Property::sometimes(
                "taken over from what was committed",
                |model: &Self, state: &State| {
                    let from = |owner: &Owner| owner.generation > 1 && state.committed.contains(&owner.from);
                    state.running(model).any(from)
                },
            ),
            Property::sometimes("stopped by its own lease", |model: &Self, state: &State| {
                let owner = &state.owners[0];
                owner.alive && !owner.fenced && !owner.runs(model.sizes.quorum, state.now)
            }),
            Property::sometimes("fenced", |_, state: &State| state.owners[0].fenced),
        ]
    }
}
