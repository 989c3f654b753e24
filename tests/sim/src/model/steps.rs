//! What can happen in a state, and what becomes of it then.

use std::time::Duration;

use migrate::failover::{Plan, PlanAction, PlanEvent, PlanOptions, Running, SealFailure, seals_needed};
use migrate::lease::Grant;
use migrate::registry::{RegistryError, RegistryRequest, VmRecord, VmState};
use segment::Generation;

use super::{Action, Asking, Candidate, Model, Owner, State, TERMS, TICK, Wrong, time};
use crate::Shown;
use crate::parts::{At, at, failover};

impl Model {
    pub(super) fn possible(&self, state: &State, actions: &mut Vec<Action>) {
        if state.wrong.is_some() {
            // It is bad enough.
            return;
        }
        if state.now < self.sizes.ticks {
            actions.push(Action::Tick);
        }
        for (o, owner) in state.owners.iter().enumerate().filter(|(_, owner)| owner.alive) {
            self.of_owner(state, o, owner, actions);
        }
        if state.restarts < self.sizes.restarts {
            actions.extend((0..state.holders.len()).map(Action::Restart));
        }
        for (c, candidate) in state.candidates.iter().enumerate() {
            match candidate {
                // The two are alike: the second begins while the first is at it.
                None if state.begins < self.sizes.begins
                    && state.candidates[..c].iter().all(Option::is_some) =>
                {
                    actions.push(Action::Begin(c));
                }
                None => {}
                // One whose host is gone is one that takes no more steps.
                Some((candidate, since)) => {
                    self.of_candidate(state, c, candidate, *since, actions);
                }
            }
        }
    }

    fn of_owner(&self, state: &State, o: usize, owner: &Owner, actions: &mut Vec<Action>) {
        // One that is gone is one that takes no steps, but where it is looked for.
        let looked_for = |candidate: &Candidate| {
            candidate.todo.iter().any(|action| match &**action {
                PlanAction::Wait { process, .. } => {
                    process.is_some_and(|p| u64::from(p.pid) == owner.generation)
                }
                _ => false,
            })
        };
        if state
            .candidates
            .iter()
            .flatten()
            .any(|(candidate, _)| looked_for(candidate))
        {
            actions.push(Action::Die(o));
        }
        if owner.fenced {
            return;
        }
        for (h, stored) in owner.stored.iter().enumerate() {
            if owner.ran && *stored < self.sizes.epochs {
                actions.push(Action::Ship(o, h));
            }
        }
        for (to, asking) in owner.asking.iter().enumerate() {
            match asking {
                Asking::Idle => {}
                Asking::Sent => actions.push(Action::Reach(o, to)),
                Asking::Answered => actions.push(Action::Answer(o, to)),
            }
        }
    }

    fn of_candidate(
        &self,
        state: &State,
        c: usize,
        candidate: &Candidate,
        since: Option<u64>,
        actions: &mut Vec<Action>,
    ) {
        for (which, action) in candidate.todo.iter().enumerate() {
            match &**action {
                PlanAction::Wait { time, process } => {
                    let over = since.is_some_and(|since| state.now - since >= self.ticks_of(*time));
                    let ended = process.is_some_and(|process| {
                        let of = |owner: &&Owner| owner.generation == u64::from(process.pid);
                        state.owners.iter().find(of).is_some_and(|owner| !owner.alive)
                    });
                    if over || ended {
                        actions.push(Action::Do(c, which));
                    }
                }
                PlanAction::Seal { .. } => {
                    actions.push(Action::Do(c, which));
                    // Where all are needed, one that is missed is the end of it: a crash.
                    if seals_needed(self.sizes.holders, self.sizes.quorum) < self.sizes.holders {
                        actions.extend([Action::DoUnheard(c, which), Action::Miss(c, which)]);
                    }
                }
                PlanAction::Raise { .. } => actions.push(Action::Do(c, which)),
                // These are done at once.
                PlanAction::ReadRecord
                | PlanAction::Ask { .. }
                | PlanAction::Fetch { .. }
                | PlanAction::LookGlobal
                | PlanAction::Start { .. }
                | PlanAction::Finish(_) => {}
            }
        }
    }

    /// Does what a candidate has to do that nothing depends on when it is done: to read and to ask is only a look; what
    /// is fetched stays where it is; and a guest that is started later is one that asks for time later.
    fn at_once(&self, state: &mut State, c: usize) {
        loop {
            let Some((candidate, _)) = &state.candidates[c] else {
                return;
            };
            let at_once = |action: &PlanAction| match action {
                PlanAction::ReadRecord
                | PlanAction::Ask { .. }
                | PlanAction::Fetch { .. }
                | PlanAction::LookGlobal
                | PlanAction::Start { .. }
                | PlanAction::Finish(_) => true,
                PlanAction::Raise { .. } | PlanAction::Seal { .. } | PlanAction::Wait { .. } => false,
            };
            match candidate.todo.iter().position(|action| at_once(action)) {
                Some(which) => self.act(state, c, which, true),
                None => return,
            }
        }
    }

    /// How many ticks a time is. What it is longer than a whole number is for clocks that differ, and here there is one.
    pub(super) fn ticks_of(&self, time: Duration) -> u64 {
        match self.rules.takeover_waits {
            true => time.as_secs() / TICK.as_secs(),
            false => 0,
        }
    }

    pub(super) fn step(&self, state: &mut State, action: Action) {
        match action {
            Action::Tick => tick(state),
            Action::Ship(o, h) => self.ship(state, o, h),
            Action::Reach(o, to) => self.reach(state, o, to),
            Action::Answer(o, to) => self.answer(state, o, to),
            Action::Die(o) => state.owners[o].alive = false,
            Action::Restart(h) => {
                state.restarts += 1;
                state.holders[h].restart(self.rules, TERMS, time(state.now));
            }
            Action::Begin(c) => {
                state.begins += 1;
                let mut plan = Plan::new(self.vm.clone(), PlanOptions::default());
                let todo = plan.step(PlanEvent::Begin).into_iter().map(Shown::new).collect();
                let plan = Shown::new(plan);
                let number = state.begins;
                state.candidates[c] = Some((Candidate { number, plan, todo }, None));
                self.at_once(state, c);
            }
            Action::Do(c, which) => {
                self.act(state, c, which, true);
                self.at_once(state, c);
            }
            Action::DoUnheard(c, which) => {
                self.act(state, c, which, false);
                self.at_once(state, c);
            }
            Action::Miss(c, which) => {
                self.miss(state, c, which);
                self.at_once(state, c);
            }
        }
    }

    fn ship(&self, state: &mut State, o: usize, h: usize) {
        let owner = &mut state.owners[o];
        let stored = owner.stored[h] + 1;
        let at = (owner.generation, stored);
        if let Err(current) = state.holders[h].store(self.rules, at) {
            owner.fenced = current > owner.generation;
            return;
        }
        owner.stored[h] = stored;
        // Durable at a quorum: it is committed whether or not its owner has heard so.
        let holders = owner.stored.iter().filter(|newest| **newest >= stored).count();
        if holders < self.sizes.quorum || !state.committed.insert(at) {
            return;
        }
        let beyond = |later: &Owner| later.generation > at.0 && later.from < at;
        if state.owners.iter().any(beyond) {
            state.wrong = Some(Wrong::CommittedBeyond);
        }
    }

    /// An owner's question for time is heard.
    fn reach(&self, state: &mut State, o: usize, to: usize) {
        let now = time(state.now);
        let owner = &mut state.owners[o];
        let generation = owner.generation;
        let answer = match state.holders.get_mut(to) {
            Some(holder) => match holder.open(self.rules, generation) {
                Ok(()) => Ok(holder.grant(self.rules, generation, TERMS, now)),
                Err(current) => Err(Generation(current)),
            },
            None => {
                let renewed = state
                    .registry
                    .change(|registry| registry.renew(generation, TERMS, now));
                match renewed {
                    Ok(()) => Ok(true),
                    Err(RegistryError::Fenced { current, .. }) => Err(current),
                    Err(_) => Ok(false),
                }
            }
        };
        owner.asking[to] = match answer {
            Ok(true) => Asking::Answered,
            Ok(false) => Asking::Idle,
            Err(current) => {
                owner.fenced = current.0 > generation;
                Asking::Idle
            }
        };
        // Counted from when it asked, it makes no difference when the answer comes: later is time that is not made use of.
        // Counted from the answer it does, and it may come in a later tick.
        if owner.asking[to] == Asking::Answered && self.rules.counts_from_asking {
            self.answer(state, o, to);
        }
    }

    fn answer(&self, state: &mut State, o: usize, to: usize) {
        let owner = &mut state.owners[o];
        owner.asking[to] = Asking::Idle;
        owner.granted[to] = Some(state.now);
        owner.ran |= owner.runs(self.sizes.quorum, state.now);
    }

    /// A candidate does what it has to; its plan hears of it, or that nothing was heard.
    fn act(&self, state: &mut State, c: usize, which: usize, heard: bool) {
        let Some((candidate, _)) = &mut state.candidates[c] else {
            return;
        };
        let number = candidate.number;
        let action = candidate.todo.remove(which);
        let event = match (*action).clone() {
            PlanAction::ReadRecord => PlanEvent::Record(Ok(state.registry.read(time(state.now)))),
            PlanAction::Raise { expected } => {
                let request = RegistryRequest::RaiseGeneration {
                    vm: self.vm.clone(),
                    expected,
                    new_owner: c.to_string(),
                    claim: [number; 16],
                };
                let raised = ask(state, &request);
                let lost = RegistryError::Unavailable {
                    address: "registry".into(),
                    why: "no answer".into(),
                };
                PlanEvent::Raised(if heard { raised } else { Err(lost) })
            }
            PlanAction::Seal { holder, generation } => {
                let now = time(state.now);
                let sealed = holder.parse().ok().and_then(|h: usize| state.holders.get_mut(h));
                let sealed = sealed.map(|h| h.seal(self.rules, &self.vm, generation.0, now));
                let result = sealed.filter(|_| heard).unwrap_or_else(unreached);
                PlanEvent::Sealed { holder, result }
            }
            PlanAction::Ask { holder, .. } => {
                let asked = holder.parse().ok().and_then(|h: usize| state.holders.get(h));
                let result = asked.map(|h| h.holding(&self.vm, time(state.now)));
                let result = result.ok_or_else(|| "no such holder".to_owned());
                PlanEvent::Asked { holder, result }
            }
            PlanAction::Fetch { from, tip, .. } => {
                let has = |h: &String| {
                    let holder = h.parse().ok().and_then(|h: usize| state.holders.get(h));
                    holder.is_some_and(|holder| holder.has.contains(&at(&tip)))
                };
                let found = from.iter().any(has);
                PlanEvent::Fetched(if found { Ok(Vec::new()) } else { Err("gone".into()) })
            }
            PlanAction::Wait { time, .. } => PlanEvent::Waited { time },
            PlanAction::LookGlobal => PlanEvent::Global(Ok(None)),
            PlanAction::Start { record, tip } => PlanEvent::Started(self.start(state, &record, at(&tip))),
            PlanAction::Finish(_) => {
                state.candidates[c] = None;
                return;
            }
        };
        hear(state, c, event);
    }

    fn miss(&self, state: &mut State, c: usize, which: usize) {
        let Some((candidate, _)) = &mut state.candidates[c] else {
            return;
        };
        let action = candidate.todo.remove(which);
        let event = match (*action).clone() {
            PlanAction::Seal { holder, .. } => PlanEvent::Sealed {
                holder,
                result: unreached(),
            },
            PlanAction::Ask { .. }
            | PlanAction::ReadRecord
            | PlanAction::Raise { .. }
            | PlanAction::Fetch { .. }
            | PlanAction::Wait { .. }
            | PlanAction::LookGlobal
            | PlanAction::Start { .. }
            | PlanAction::Finish(_) => return,
        };
        hear(state, c, event);
    }

    /// A process begins to run the guest, after the registry has agreed that it runs there.
    fn start(&self, state: &mut State, record: &VmRecord, from: At) -> Result<Running, String> {
        let generation = record.generation;
        let pid = u32::try_from(generation.0).unwrap_or(u32::MAX);
        let agreed = [
            RegistryRequest::SetFailover {
                vm: self.vm.clone(),
                generation,
                failover: Some(failover(TERMS, pid)),
            },
            RegistryRequest::SetVmState {
                vm: self.vm.clone(),
                generation,
                state: VmState::Running,
            },
        ];
        for request in &agreed {
            ask(state, request).map_err(|e| e.to_string())?;
        }
        let before = state.committed.range(..(generation.0, 0)).next_back();
        if before.is_some_and(|newest| *newest > from) {
            state.wrong = Some(Wrong::Lost);
        }
        if state.owners.iter().any(|owner| owner.generation == generation.0) {
            state.wrong = Some(Wrong::StartedTwice);
        }
        let owner = Owner::new(generation.0, from, record.holders.len());
        state.owners.push(owner);
        Ok(Running {
            pid,
            ..Running::default()
        })
    }
}

/// Time goes on; what ran out is forgotten, and everyone asks again.
fn tick(state: &mut State) {
    state.now += 1;
    let now = time(state.now);
    for owner in &mut state.owners {
        for sent in &mut owner.granted {
            *sent = sent.filter(|sent| time(*sent) + TERMS.ttl > now);
        }
        for asking in owner.asking.iter_mut().filter(|asking| **asking == Asking::Idle) {
            *asking = Asking::Sent;
        }
    }
    for holder in &mut state.holders {
        if holder.grant.remaining(now).is_zero() {
            holder.grant = Grant::default();
        }
    }
    state.registry.change(|registry| registry.forget(now));
}

fn unreached<T>() -> Result<T, SealFailure> {
    Err(SealFailure::Unreachable {
        why: "not reached".into(),
    })
}

/// The registry is asked to change the record.
fn ask(state: &mut State, request: &RegistryRequest) -> Result<VmRecord, RegistryError> {
    let now = time(state.now);
    state.registry.change(|registry| registry.ask(request, now, 0))
}

/// A candidate's plan hears of something; it may have more to do then.
fn hear(state: &mut State, c: usize, event: PlanEvent) {
    let now = state.now;
    let Some((candidate, since)) = &mut state.candidates[c] else {
        return;
    };
    for action in candidate.plan.change(|plan| plan.step(event)) {
        if matches!(action, PlanAction::Wait { .. }) {
            *since = Some(now);
        }
        candidate.todo.push(Shown::new(action));
    }
}
