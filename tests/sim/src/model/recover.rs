//! From a state on, nothing more fails: whether the guest ends up running.

use std::hash::{DefaultHasher, Hash, Hasher};

use migrate::failover::PlanAction;

use super::{Action, Asking, Model, Owner, State};

/// More than a takeover takes.
const STEPS: usize = 60;

impl Model {
    /// Whether one candidate, alone and with everyone answering, has the guest running in the end.
    pub(super) fn ends_up_running(&self, state: &State) -> bool {
        if state.wrong.is_some() {
            // That is told by itself.
            return true;
        }
        let mut state = state.clone();
        if self.owner(&state).is_some() && !self.renewed(&mut state.clone()) {
            return false;
        }
        if state.holders.iter().all(|holder| holder.has.is_empty()) {
            // Nothing can have been committed, so there is nothing to go on from.
            return true;
        }
        // All that is under way is lost, and so is whoever runs the guest.
        state.candidates.fill(None);
        state.owners.clear();
        state.begins = 0;
        let mut hasher = DefaultHasher::new();
        state.hash(&mut hasher);
        let digest = hasher.finish();
        if self.is_known_to_recover(digest) {
            return true;
        }
        let recovers = self.take_over(&mut state);
        if recovers {
            self.remember(digest);
        }
        recovers
    }

    /// Whether a candidate that tries alone has the guest running in the end.
    fn take_over(&self, state: &mut State) -> bool {
        self.step(state, Action::Begin(0));
        for _ in 0..STEPS {
            let Some((candidate, since)) = &state.candidates[0] else {
                break;
            };
            // Waiting is what is done last.
            let waits = |action: &PlanAction| matches!(action, PlanAction::Wait { .. });
            let which = candidate.todo.iter().position(|action| !waits(action));
            match (which, candidate.todo.first().map(|action| &**action), since) {
                (Some(which), _, _) => self.step(state, Action::Do(0, which)),
                (None, Some(PlanAction::Wait { time, .. }), Some(since)) => {
                    let over = since + self.ticks_of(*time);
                    state.now = state.now.max(over);
                    self.step(state, Action::Do(0, 0));
                }
                (None, _, _) => break,
            }
        }
        self.renewed(state)
    }

    /// The process that the newest generation was started in, when it is there.
    fn owner(&self, state: &State) -> Option<usize> {
        let generation = state.registry.record().generation.0;
        let is_owner = |owner: &Owner| owner.alive && owner.generation == generation;
        state.owners.iter().position(is_owner)
    }

    /// Whether it runs its guest once everyone answers it, and nobody else does.
    fn renewed(&self, state: &mut State) -> bool {
        let Some(o) = self.owner(state) else {
            return false;
        };
        state.owners[o].asking.fill(Asking::Sent);
        for to in 0..=state.holders.len() {
            self.step(state, Action::Reach(o, to));
            if state.owners[o].asking[to] == Asking::Answered {
                self.step(state, Action::Answer(o, to));
            }
        }
        let running = state.running(self).count();
        running == 1 && state.owners[o].runs(self.sizes.quorum, state.now)
    }
}
