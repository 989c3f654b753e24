//! The shell of a takeover: it does what the plan says, over ways that lose things.

use std::collections::BTreeMap;
use std::time::Duration;

use migrate::failover::{Plan, PlanAction, PlanEvent, PlanOptions, SealFailure};
use migrate::registry::RegistryError;
use segment::Generation;

use super::net::Place;
use super::world::{Event, Message, World};
use crate::parts::at;

/// One node's try to take one VM over.
#[derive(Debug)]
pub(super) struct Takeover {
    plan: Plan,
    by_itself: bool,
    /// What was asked and is not answered.
    pending: BTreeMap<u64, PlanAction>,
}

impl World {
    /// A node begins, by itself when it has judged the owner of a generation; a second one does not begin beside it.
    pub(super) fn begin(&mut self, host: usize, vm: usize, judged: Option<Generation>) {
        if !self.hosts[host].up || self.hosts[host].takeovers.contains_key(&vm) {
            return;
        }
        self.report.begun += 1;
        let options = PlanOptions {
            judged,
            ..PlanOptions::default()
        };
        let mut plan = Plan::new(self.vms[vm].id.clone(), options);
        let actions = plan.step(PlanEvent::Begin);
        let pending = BTreeMap::new();
        let takeover = Takeover {
            plan,
            by_itself: judged.is_some(),
            pending,
        };
        self.hosts[host].takeovers.insert(vm, takeover);
        self.perform(host, vm, actions);
    }

    fn perform(&mut self, host: usize, vm: usize, actions: Vec<PlanAction>) {
        for action in actions {
            if let PlanAction::Finish(result) = action {
                let takeover = self.hosts[host].takeovers.remove(&vm);
                let by_itself = takeover.is_some_and(|takeover| takeover.by_itself);
                self.report.by_itself += u64::from(by_itself && result.is_ok());
                self.tell(|| match *result {
                    Ok(outcome) => format!("VM {vm}: host {host} has it: {}", outcome.record.generation),
                    Err(error) => format!("VM {vm}: host {host} gives up: {error}"),
                });
                return;
            }
            let ask = self.next_number();
            if let Some(takeover) = self.hosts[host].takeovers.get_mut(&vm) {
                takeover.pending.insert(ask, action.clone());
            }
            self.ask(host, vm, ask, action);
        }
    }

    /// Asks whoever is to do it; it is given up when that takes too long.
    fn ask(&mut self, host: usize, vm: usize, ask: u64, action: PlanAction) {
        let (life, clock) = (self.hosts[host].life, self.hosts[host].clock);
        let deadline = match &action {
            PlanAction::Wait { time, .. } if self.config.rules.takeover_waits => clock.lasts(*time),
            PlanAction::Wait { .. } => Duration::ZERO,
            _ => clock.lasts(self.config.terms.ttl * 2),
        };
        self.queue
            .push(self.now + deadline, Event::Unanswered { host, life, vm, ask });
        let to = match &action {
            PlanAction::Wait { process, .. } => {
                let pid = process.map(|process| process.pid);
                let of = self.owners.iter().position(|owner| Some(owner.process) == pid);
                if let Some(owner) = of {
                    let to = Place::Host(self.owners[owner].host);
                    self.send(Place::Host(host), to, Message::Ended { host, vm, ask, owner });
                }
                return;
            }
            PlanAction::ReadRecord | PlanAction::Raise { .. } | PlanAction::Start { .. } => {
                Some(Place::Registry)
            }
            PlanAction::Ask { holder, .. } | PlanAction::Seal { holder, .. } => place(holder),
            PlanAction::Fetch { from, .. } => from.first().and_then(|holder| place(holder)),
            // No host here has a global store.
            PlanAction::LookGlobal | PlanAction::Finish(_) => None,
        };
        if let Some(to) = to {
            let action = Box::new(action);
            self.send(
                Place::Host(host),
                to,
                Message::Act {
                    host,
                    vm,
                    ask,
                    action,
                },
            );
        }
    }

    /// An answer; one that comes too late, or again, is none.
    pub(super) fn heard(&mut self, host: usize, vm: usize, ask: u64, event: PlanEvent) {
        let Some(takeover) = self.hosts[host].takeovers.get_mut(&vm) else {
            return;
        };
        let Some(action) = takeover.pending.remove(&ask) else {
            return;
        };
        let process = ask as u32;
        match (action, &event) {
            (
                PlanAction::Fetch {
                    from,
                    thorough,
                    tip,
                    generation,
                },
                PlanEvent::Fetched(Err(_)),
            ) if from.len() > 1 => {
                let from = from[1..].to_vec();
                let action = PlanAction::Fetch {
                    from,
                    thorough,
                    tip,
                    generation,
                };
                let ask = self.next_number();
                if let Some(takeover) = self.hosts[host].takeovers.get_mut(&vm) {
                    takeover.pending.insert(ask, action.clone());
                }
                return self.ask(host, vm, ask, action);
            }
            (PlanAction::Start { record, tip }, PlanEvent::Started(Ok(_))) => {
                self.taken_over(vm, host, record.generation.0, at(&tip), process);
            }
            _ => {}
        }
        let Some(takeover) = self.hosts[host].takeovers.get_mut(&vm) else {
            return;
        };
        let actions = takeover.plan.step(event);
        self.perform(host, vm, actions);
    }

    /// Nobody answered in time; or the time is over that was to be waited.
    pub(super) fn unanswered(&mut self, host: usize, vm: usize, ask: u64) {
        let Some(takeover) = self.hosts[host].takeovers.get(&vm) else {
            return;
        };
        let Some(action) = takeover.pending.get(&ask) else {
            return;
        };
        let why = "no answer in time".to_owned();
        let away = || RegistryError::Unavailable {
            address: "registry".into(),
            why: "no answer in time".into(),
        };
        let event = match action {
            PlanAction::ReadRecord => PlanEvent::Record(Err(away())),
            PlanAction::Raise { .. } => PlanEvent::Raised(Err(away())),
            PlanAction::Seal { holder, .. } => PlanEvent::Sealed {
                holder: holder.clone(),
                result: Err(SealFailure::Unreachable { why }),
            },
            PlanAction::Ask { holder, .. } => PlanEvent::Asked {
                holder: holder.clone(),
                result: Err(why),
            },
            PlanAction::Fetch { .. } => PlanEvent::Fetched(Err(why)),
            PlanAction::Wait { time, .. } => PlanEvent::Waited { time: *time },
            PlanAction::LookGlobal => PlanEvent::Global(Err(why)),
            PlanAction::Start { .. } => PlanEvent::Started(Err(why)),
            PlanAction::Finish(_) => return,
        };
        self.heard(host, vm, ask, event);
    }
}

fn place(holder: &str) -> Option<Place> {
    holder.parse().ok().map(Place::Host)
}
