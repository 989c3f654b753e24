//! What a process does that runs a guest: it asks for time, takes checkpoints and ships them, and stops itself.

use std::time::Duration;

use migrate::lease::{Lapse, Verdict};
use segment::Generation;

use super::net::Place;
use super::world::{Event, Message, World};
use crate::parts::At;

impl World {
    /// What it does each time that it has to ask for more time.
    pub(super) fn beat(&mut self, o: usize) {
        let owner = &self.owners[o];
        if !owner.alive {
            return;
        }
        if self.now < owner.stopped {
            self.queue.push(owner.stopped, Event::Beat { owner: o });
            return;
        }
        let (vm, host) = (owner.vm, owner.host);
        let clock = self.hosts[host].clock;
        let sent = clock.at(self.now);
        match owner.lease.verdict(sent) {
            Verdict::MustStop(Lapse::Fenced { .. }) => return self.end(o, "fenced"),
            Verdict::MustStop(Lapse::Expired { .. }) => self.report.lapsed += 1,
            Verdict::MustStop(Lapse::Never) => {}
            Verdict::MayRun { .. } => self.owners[o].epoch += 1,
        }
        let here = Place::Host(host);
        self.send(here, Place::Registry, Message::Renew { owner: o, sent });
        for holder in self.vms[vm].holders.clone() {
            let to = Place::Host(holder);
            self.send(here, to, Message::Renew { owner: o, sent });
            let owner = &self.owners[o];
            let stored = owner.stored.get(&holder).copied().unwrap_or_default();
            if stored < owner.epoch {
                let at = (owner.generation, stored + 1);
                self.send(here, to, Message::Ship { owner: o, at });
            }
        }
        let next = self.now + clock.lasts(self.config.terms.renew_every);
        self.queue.push(next, Event::Beat { owner: o });
    }

    /// The process ends.
    pub(super) fn end(&mut self, o: usize, why: &str) {
        let owner = &mut self.owners[o];
        if std::mem::take(&mut owner.alive) {
            let (vm, generation, host) = (owner.vm, owner.generation, owner.host);
            self.report.fenced += u64::from(why == "fenced");
            self.tell(|| format!("VM {vm}: its owner {generation} at host {host} ended: {why}"));
        }
    }

    /// An answer to an owner; one that is stopped hears it when it goes on.
    pub(super) fn answered(&mut self, from: Place, o: usize, message: Message) {
        let owner = &mut self.owners[o];
        if !owner.alive || owner.boot != self.hosts[owner.host].boot {
            return;
        }
        if self.now < owner.stopped {
            let (at, to) = (owner.stopped, Place::Host(owner.host));
            self.queue.push(at, Event::Arrive { from, to, message });
            return;
        }
        let (vm, local) = (owner.vm, self.hosts[owner.host].clock.at(self.now));
        match message {
            Message::Granted { by, sent, .. } => {
                let sent = match self.config.rules.counts_from_asking {
                    true => sent,
                    false => local,
                };
                match by {
                    Place::Registry => owner.lease.renewed(sent),
                    Place::Host(holder) => owner.lease.granted(&holder.to_string(), sent),
                }
                self.check_alone(vm);
            }
            Message::Stale { current, .. } if current > Generation(owner.generation) => {
                owner.lease.fence("someone", current);
                self.end(o, "fenced");
            }
            Message::Stored { holder, at, .. } => {
                let stored = owner.stored.entry(holder).or_default();
                *stored = (*stored).max(at.1);
            }
            _ => {}
        }
    }

    /// A checkpoint is on a holder's disk: it may be committed now, whether or not its owner hears of it.
    pub(super) fn stored(&mut self, vm: usize, at: At) {
        let of = &self.vms[vm];
        let has = |holder: &&usize| {
            let holder = self.hosts[**holder].holds.get(&vm);
            holder.is_some_and(|holder| holder.has.contains(&at))
        };
        if of.holders.iter().filter(has).count() < self.config.quorum || of.committed.contains(&at) {
            return;
        }
        self.vms[vm].committed.insert(at);
        self.report.committed += 1;
        let beyond = self
            .owners
            .iter()
            .find(|later| later.vm == vm && later.generation > at.0 && later.from < at)
            .map(|later| (later.generation, later.from));
        if let Some(later) = beyond {
            self.wrong(format!(
                "VM {vm}: {at:?} was committed after generation {} was started from {:?}",
                later.0, later.1
            ));
        }
        // Told to the registry now and then, which lags.
        if self.random.per_mille(300) {
            self.vms[vm].registry.register(at);
        }
    }

    /// The guest is started after a takeover: it goes on from what was committed, and nobody has started it before.
    pub(super) fn taken_over(&mut self, vm: usize, host: usize, generation: u64, from: At, process: u32) {
        self.report.started += 1;
        self.tell(|| format!("VM {vm}: started at host {host} under generation {generation} from {from:?}"));
        let newest = self.vms[vm]
            .committed
            .range(..(generation, 0))
            .next_back()
            .copied();
        if newest.is_some_and(|newest| newest > from) {
            self.wrong(format!(
                "VM {vm}: {newest:?} was committed, and {from:?} is started from"
            ));
        }
        let twice = |owner: &super::world::Owner| owner.vm == vm && owner.generation == generation;
        if self.owners.iter().any(twice) {
            self.wrong(format!("VM {vm}: generation {generation} is started twice"));
        }
        self.run_guest(vm, host, generation, from, process);
        self.check_alone(vm);
    }

    /// Of a process that is stopped for so long.
    pub(super) fn stop(&mut self, o: usize, time: Duration) {
        let until = self.now + time;
        let owner = &mut self.owners[o];
        owner.stopped = owner.stopped.max(until);
        let (vm, generation) = (owner.vm, owner.generation);
        self.tell(|| format!("VM {vm}: owner {generation} is stopped until {until:?}"));
    }
}
