//! What goes wrong, and how it is made good again.

use super::net::{Clock, Place};
use super::world::{Event, World};

impl World {
    /// Something goes wrong, and something else later.
    pub(super) fn fault(&mut self) {
        if self.now >= self.config.troubled {
            return;
        }
        let next = self.now + self.random.time(self.config.fault_every * 2);
        self.queue.push(next, Event::Fault);
        let ttl = self.config.terms.ttl;
        let time = self.random.time(ttl * 3);
        let host = self.random.below(self.hosts.len());
        let owner = self.newest_owner();
        match self.random.below(16) {
            12 | 13 => self.restart_agent(host),
            14 => {
                let vm = self.owners[owner].vm;
                self.vms[vm]
                    .holders
                    .clone()
                    .into_iter()
                    .for_each(|holder| self.restart_agent(holder));
            }
            15 => {
                let here = Place::Host(self.owners[owner].host);
                self.net.cut(here, Place::Registry);
                self.queue.push(self.now + time, Event::Heal);
                self.tell(|| format!("{here:?} does not reach the registry for {time:?}"));
            }
            0 | 1 => self.crash(host),
            // The host of an owner: what all this is about.
            2 | 3 => self.crash(self.owners[owner].host),
            4 | 5 => self.cut(host, time),
            6 => self.cut(self.owners[owner].host, time),
            7 => self.stop(owner, time),
            8 => self.end(owner, "killed"),
            9 => {
                self.registry_away = self.now + time;
                self.tell(|| format!("the registry is away for {time:?}"));
                if self.random.per_mille(500) {
                    let local = self.registry_clock.at(self.registry_away);
                    let terms = self.config.terms;
                    self.vms
                        .iter_mut()
                        .for_each(|vm| vm.registry.restart(terms, local));
                }
            }
            10 => {
                self.hosts[host].disk = self.random.time(ttl);
                self.tell(|| format!("host {host}: its disk is slow"));
            }
            _ => self.rarely(),
        }
    }

    /// The owner that a random VM has now.
    fn newest_owner(&mut self) -> usize {
        let vm = self.random.below(self.vms.len());
        // Each VM was given one at its beginning.
        self.owners
            .iter()
            .rposition(|owner| owner.vm == vm)
            .unwrap_or_default()
    }

    /// An operator promotes, at one of the holders; or a holder loses something that it had acknowledged.
    fn rarely(&mut self) {
        let vm = self.random.below(self.vms.len());
        let holders = self.vms[vm].holders.len();
        let holder = self.vms[vm].holders[self.random.below(holders)];
        if self.random.per_mille(800) {
            self.tell(|| format!("VM {vm}: an operator promotes it at host {holder}"));
            return self.begin(holder, vm, None);
        }
        let held = self.hosts[holder].holds.get_mut(&vm);
        if held.is_some_and(|held| held.has.pop_last().is_some()) {
            self.vms[vm].damaged = true;
            self.tell(|| format!("VM {vm}: holder {holder} loses the newest it has"));
        }
    }

    /// A host is gone, with every process on it.
    fn crash(&mut self, host: usize) {
        if !self.hosts[host].up {
            return;
        }
        self.report.crashes += 1;
        self.tell(|| format!("host {host} crashes"));
        for owner in 0..self.owners.len() {
            if self.owners[owner].host == host {
                self.end(owner, "its host crashed");
            }
        }
        self.hosts[host].up = false;
        self.hosts[host].boot += 1;
        self.end_agent(host);
        let back = self.now + self.random.time(self.config.terms.ttl * 4);
        self.queue.push(back, Event::Up { host });
    }

    /// The agent's process is gone: what was on its way to its disk is there, or is not.
    fn end_agent(&mut self, host: usize) {
        let of = &mut self.hosts[host];
        of.life += 1;
        of.takeovers.clear();
        let writing = std::mem::take(&mut of.writing);
        for write in writing.into_values() {
            if self.random.per_mille(500) {
                self.report.torn += 1;
                self.written(host, write, false);
            }
        }
    }

    /// It begins, and finds what is on the disk.
    fn begin_agent(&mut self, host: usize) {
        let (rules, terms) = (self.config.rules, self.config.terms);
        let local = self.hosts[host].clock.at(self.now);
        let of = &mut self.hosts[host];
        of.since = local;
        let life = of.life;
        for holder in of.holds.values_mut() {
            holder.restart(rules, terms, local);
        }
        for (vm, watch) in &mut of.watches {
            *watch = super::agent::Watch::default();
            self.queue.push(self.now, Event::Look { host, life, vm: *vm });
        }
    }

    /// The host is back: a new boot, with another clock.
    pub(super) fn up(&mut self, host: usize) {
        if self.hosts[host].up {
            return;
        }
        self.hosts[host].clock = Clock::new(&mut self.random);
        self.hosts[host].up = true;
        self.begin_agent(host);
        self.tell(|| format!("host {host} is back"));
    }

    /// An agent begins anew; the VMs on its host are processes of their own, and go on.
    fn restart_agent(&mut self, host: usize) {
        if self.hosts[host].up {
            self.tell(|| format!("the agent of host {host} begins anew"));
            self.end_agent(host);
            self.begin_agent(host);
        }
    }

    /// A host is cut off: from everyone or from someone, in both directions or in one.
    fn cut(&mut self, host: usize, time: std::time::Duration) {
        let here = Place::Host(host);
        let everyone = self.random.per_mille(500);
        let (out, back) = (self.random.per_mille(800), self.random.per_mille(800));
        let others: Vec<Place> = (0..self.hosts.len())
            .map(Place::Host)
            .chain([Place::Registry])
            .filter(|other| *other != here)
            .collect();
        for other in others {
            if !everyone && self.random.per_mille(500) {
                continue;
            }
            if out {
                self.net.cut(here, other);
            }
            if back {
                self.net.cut(other, here);
            }
        }
        self.queue.push(self.now + time, Event::Heal);
        self.tell(|| {
            format!("host {host} is cut off for {time:?} (everyone {everyone}, out {out}, back {back})")
        });
    }

    /// From now on nothing goes wrong. (Hosts that are down come back when they would have.)
    pub(super) fn calm(&mut self) {
        self.tell(|| "all is made well".to_owned());
        self.net.heal();
        self.net.loses = 0;
        self.net.rarely = self.net.delay;
        self.registry_away = self.now;
        let fast = self.config.terms.ttl / 50;
        self.hosts
            .iter_mut()
            .for_each(|host| host.disk = host.disk.min(fast));
        self.owners
            .iter_mut()
            .for_each(|owner| owner.stopped = owner.stopped.min(self.now));
    }
}
