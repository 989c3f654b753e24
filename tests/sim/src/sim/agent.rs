//! What an agent does: it holds and fences, it watches owners, and it decides when to take over. And the registry.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use migrate::detect::{
    HolderView, Host, Judgement, RegistrySight, Sight, Standing, head_start, is_being_taken_over, judge, turn,
};
use migrate::failover::{PlanAction, PlanEvent, Running};
use migrate::registry::{LeaseState, RegistryError, RegistryRequest, VmRecord, VmState};
use segment::Generation;

use super::net::Place;
use super::world::{Event, Message, World, Write};
use crate::parts::{At, at, failover};

/// What an agent makes of one VM's owner.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The look that is under way.
    round: u64,
    views: BTreeMap<usize, (HolderView, Option<At>)>,
    record: Option<VmRecord>,
    /// Which generation is watched, and since when by the host's clock.
    generation: u64,
    since: Duration,
    /// Others were let try first under this generation.
    let_others: Option<u64>,
    not_before: Duration,
}

impl World {
    pub(super) fn at_host(&mut self, from: Place, host: usize, message: Message) {
        let local = self.hosts[host].clock.at(self.now);
        match message {
            Message::Renew { owner, sent } => {
                let (vm, generation) = (self.owners[owner].vm, self.owners[owner].generation);
                let Some(holder) = self.hosts[host].holds.get_mut(&vm) else {
                    return;
                };
                if holder.promised < generation {
                    // It has to be promised durably first.
                    return self.write(from, host, message);
                }
                let (rules, terms) = (self.config.rules, self.config.terms);
                let opened = holder.open(rules, generation);
                let answer = match opened {
                    Ok(()) if holder.grant(rules, generation, terms, local) => Message::Granted {
                        owner,
                        by: Place::Host(host),
                        sent,
                    },
                    Ok(()) => return,
                    Err(current) => Message::Stale {
                        owner,
                        current: segment::Generation(current),
                    },
                };
                self.send(Place::Host(host), from, answer);
            }
            Message::Act {
                host: asker,
                vm,
                ask,
                ref action,
            } => match &**action {
                PlanAction::Ask { holder, .. } => {
                    let id = self.vms[vm].id.clone();
                    let holding = self.hosts[host].holds.get(&vm).map(|h| h.holding(&id, local));
                    let result = holding.ok_or_else(|| "it holds nothing".to_owned());
                    let event = PlanEvent::Asked {
                        holder: holder.clone(),
                        result,
                    };
                    self.done(host, asker, vm, ask, event);
                }
                PlanAction::Fetch { tip, .. } => {
                    let holder = self.hosts[host].holds.get(&vm);
                    let has = holder.is_some_and(|holder| holder.has.contains(&at(tip)));
                    let result = if has {
                        Ok(Vec::new())
                    } else {
                        Err("it is not here".to_owned())
                    };
                    self.done(host, asker, vm, ask, PlanEvent::Fetched(result));
                }
                _ => self.write(from, host, message),
            },
            Message::Ship { .. } => self.write(from, host, message),
            Message::See {
                host: asker,
                vm,
                round,
            } => {
                let Some((silent, heard, newest)) = self.view(host, vm) else {
                    return;
                };
                let holder = host;
                let seen = Message::Seen {
                    vm,
                    round,
                    holder,
                    silent,
                    heard,
                    newest,
                };
                self.send(Place::Host(host), Place::Host(asker), seen);
            }
            Message::Ended {
                host: asker,
                vm,
                ask,
                owner,
            } => {
                let of = &self.owners[owner];
                // Of its own boot only.
                if of.host == host && of.boot == self.hosts[host].boot && !of.alive {
                    let time = Duration::ZERO;
                    self.done(host, asker, vm, ask, PlanEvent::Waited { time });
                }
            }
            Message::Done { vm, ask, event } => self.heard(host, vm, ask, *event),
            Message::Seen {
                vm,
                round,
                holder,
                silent,
                heard,
                newest,
            } => {
                if let Some(watch) = self.watch(host, vm, round) {
                    watch.views.insert(holder, (view_of(silent, heard), newest));
                }
            }
            Message::Record { vm, round, record } => {
                if let Some(watch) = self.watch(host, vm, round) {
                    watch.record = Some(*record);
                }
            }
            Message::Granted { owner, .. } | Message::Stale { owner, .. } | Message::Stored { owner, .. } => {
                if self.owners[owner].host == host {
                    self.answered(from, owner, message);
                }
            }
            Message::Read { .. } => {}
        }
    }

    fn watch(&mut self, host: usize, vm: usize, round: u64) -> Option<&mut Watch> {
        let watch = self.hosts[host].watches.get_mut(&vm)?;
        (watch.round == round).then_some(watch)
    }

    pub(super) fn done(&mut self, host: usize, asker: usize, vm: usize, ask: u64, event: PlanEvent) {
        let event = Box::new(event);
        self.send(
            Place::Host(host),
            Place::Host(asker),
            Message::Done { vm, ask, event },
        );
    }

    /// Something is on its way to a host's disk.
    fn write(&mut self, from: Place, host: usize, message: Message) {
        let write = self.next_number();
        let life = self.hosts[host].life;
        let after = self.random.time(self.hosts[host].disk);
        self.hosts[host].writing.insert(write, Write { from, message });
        self.queue
            .push(self.now + after, Event::Written { host, life, write });
    }

    /// It is there; whoever wrote it is there to say so, or its host is gone.
    pub(super) fn written(&mut self, host: usize, write: Write, lives: bool) {
        let Write { from, message } = write;
        let local = self.hosts[host].clock.at(self.now);
        let (rules, terms) = (self.config.rules, self.config.terms);
        let answer = match message {
            Message::Renew { owner, sent } => {
                let (vm, generation) = (self.owners[owner].vm, self.owners[owner].generation);
                let Some(holder) = self.hosts[host].holds.get_mut(&vm) else {
                    return;
                };
                match holder.open(rules, generation) {
                    Err(current) => Message::Stale {
                        owner,
                        current: segment::Generation(current),
                    },
                    // What is granted is in memory alone.
                    Ok(()) if lives && holder.grant(rules, generation, terms, local) => Message::Granted {
                        owner,
                        by: Place::Host(host),
                        sent,
                    },
                    Ok(()) => return,
                }
            }
            Message::Ship { owner, at } => {
                let vm = self.owners[owner].vm;
                let Some(holder) = self.hosts[host].holds.get_mut(&vm) else {
                    return;
                };
                match holder.store(rules, at) {
                    Err(current) => Message::Stale {
                        owner,
                        current: segment::Generation(current),
                    },
                    Ok(()) => {
                        self.stored(vm, at);
                        Message::Stored {
                            owner,
                            holder: host,
                            at,
                        }
                    }
                }
            }
            Message::Act { vm, ask, action, .. } => {
                let PlanAction::Seal {
                    holder: name,
                    generation,
                } = *action
                else {
                    return;
                };
                let id = self.vms[vm].id.clone();
                let Some(holder) = self.hosts[host].holds.get_mut(&vm) else {
                    return;
                };
                let result = holder.seal(rules, &id, generation.0, local);
                let event = Box::new(PlanEvent::Sealed { holder: name, result });
                Message::Done { vm, ask, event }
            }
            _ => return,
        };
        if lives {
            self.send(Place::Host(host), from, answer);
        }
    }

    /// What a holder sees of the owner: for how long it was not heard, whether it ever was, and the newest that is here.
    fn view(&self, host: usize, vm: usize) -> Option<(Duration, bool, Option<At>)> {
        let of = &self.hosts[host];
        let (local, holder) = (of.clock.at(self.now), of.holds.get(&vm)?);
        let silent = holder.grant.silent_for(local);
        let time = silent.unwrap_or(local.saturating_sub(of.since));
        Some((time, silent.is_some(), holder.has.last().copied()))
    }

    /// Looks at an owner, and asks everyone when it is not as it should be.
    pub(super) fn look(&mut self, host: usize, vm: usize) {
        let (life, clock) = (self.hosts[host].life, self.hosts[host].clock);
        let terms = self.config.terms;
        let next = self.now + clock.lasts(terms.renew_every / 2);
        self.queue.push(next, Event::Look { host, life, vm });
        let Some((silent, heard, newest)) = self.view(host, vm) else {
            return;
        };
        let busy = self.hosts[host].takeovers.contains_key(&vm);
        let local = clock.at(self.now);
        let round = self.next_number();
        let Some(watch) = self.hosts[host].watches.get_mut(&vm) else {
            return;
        };
        if busy || local < watch.not_before || silent < terms.guard() {
            return;
        }
        // Until it is judged.
        let deadline = terms.ttl / 5;
        watch.not_before = local + deadline;
        watch.round = round;
        watch.record = None;
        watch.views = BTreeMap::from([(host, (view_of(silent, heard), newest))]);
        self.queue.push(
            self.now + clock.lasts(deadline),
            Event::Judge {
                host,
                life,
                vm,
                round,
            },
        );
        self.send(Place::Host(host), Place::Registry, Message::Read { vm, round });
        for other in self.vms[vm].holders.clone() {
            if other != host {
                self.send(
                    Place::Host(host),
                    Place::Host(other),
                    Message::See { host, vm, round },
                );
            }
        }
    }

    /// Judges what was seen, and takes over when the owner is lost and nobody better is there.
    pub(super) fn judge(&mut self, host: usize, vm: usize, round: u64) {
        let (terms, local) = (self.config.terms, self.hosts[host].clock.at(self.now));
        let holders = self.vms[vm].holders.clone();
        let Some(watch) = self.watch(host, vm, round) else {
            return;
        };
        let registry = watch.record.take();
        if let Some(record) = &registry
            && watch.generation != record.generation.0
        {
            watch.generation = record.generation.0;
            watch.since = local;
        }
        let sight = Sight {
            registry: registry.as_ref().map(|record| RegistrySight {
                state: record.state,
                lease_silent_for: match record.owner_lease() {
                    LeaseState::Gone => Some(terms.guard()),
                    LeaseState::Held => Some(Duration::ZERO),
                    LeaseState::Never => Some(local.saturating_sub(watch.since)),
                },
                coarse: false,
                ack_quorum: record.ack_quorum as usize,
                taking_over: is_being_taken_over(record),
            }),
            holders: holders
                .iter()
                .map(|holder| {
                    watch
                        .views
                        .get(holder)
                        .map_or(HolderView::Unreachable, |(view, _)| *view)
                })
                .collect(),
            host: Host::Unknown,
        };
        let Judgement::Down(cause) = judge(&sight, terms) else {
            return;
        };
        let best = watch.views.values().filter_map(|(_, newest)| *newest).max();
        let standing = |holder: &usize, newest: Option<At>| Standing {
            newest: newest == best,
            hot: false,
            free: Reverse(0),
            name: Reverse(holder.to_string()),
        };
        let of = |(holder, (_, newest)): (&usize, &(HolderView, Option<At>))| standing(holder, *newest);
        let mine = of((&host, &watch.views[&host]));
        let others: Vec<_> = watch.views.iter().filter(|(h, _)| **h != host).map(of).collect();
        let ahead = turn(&mine, &others);
        let generation = watch.generation;
        if ahead > 0 && watch.let_others != Some(generation) {
            watch.let_others = Some(generation);
            watch.not_before = local + head_start(ahead, terms);
            return;
        }
        watch.not_before = local + terms.ttl;
        self.tell(|| format!("VM {vm}: host {host} takes over from generation {generation}: {cause}"));
        self.begin(host, vm, Some(Generation(generation)));
    }

    pub(super) fn at_registry(&mut self, from: Place, message: Message) {
        let local = self.registry_clock.at(self.now);
        match message {
            Message::Renew { owner, sent } => {
                let (vm, generation) = (self.owners[owner].vm, self.owners[owner].generation);
                let renewed = self.vms[vm].registry.renew(generation, self.config.terms, local);
                let answer = match renewed {
                    Ok(()) => Message::Granted {
                        owner,
                        by: Place::Registry,
                        sent,
                    },
                    Err(RegistryError::Fenced { current, .. }) => Message::Stale { owner, current },
                    Err(_) => return,
                };
                self.send(Place::Registry, from, answer);
            }
            Message::Read { vm, round } => {
                let record = Box::new(self.read(vm, local));
                self.send(Place::Registry, from, Message::Record { vm, round, record });
            }
            Message::Act {
                host,
                vm,
                ask,
                action,
            } => {
                if let Some(event) = self.registered(host, vm, ask, &action, local) {
                    let event = Box::new(event);
                    self.send(Place::Registry, from, Message::Done { vm, ask, event });
                }
            }
            _ => {}
        }
    }

    /// The record; now and then as it was.
    fn read(&mut self, vm: usize, local: Duration) -> VmRecord {
        let record = self.vms[vm].registry.read(local);
        if self.random.per_mille(30) {
            return self.vms[vm].past.clone();
        }
        if self.random.per_mille(200) {
            self.vms[vm].past.clone_from(&record);
        }
        record
    }

    /// What a takeover asks of the registry.
    fn registered(
        &mut self,
        host: usize,
        vm: usize,
        ask: u64,
        action: &PlanAction,
        local: Duration,
    ) -> Option<PlanEvent> {
        let id = self.vms[vm].id.clone();
        // A wall clock that jumps: nothing may come of it.
        let wall_ms = self.random.number();
        let change =
            |world: &mut Self, request: RegistryRequest| world.vms[vm].registry.ask(&request, local, wall_ms);
        match action {
            PlanAction::ReadRecord => Some(PlanEvent::Record(Ok(self.read(vm, local)))),
            PlanAction::Raise { expected } => {
                let mut claim = [0; 16];
                claim[..8].copy_from_slice(&ask.to_le_bytes());
                let request = RegistryRequest::RaiseGeneration {
                    vm: id,
                    expected: *expected,
                    new_owner: host.to_string(),
                    claim,
                };
                Some(PlanEvent::Raised(change(self, request)))
            }
            PlanAction::Start { record, .. } => {
                let (generation, process) = (record.generation, ask as u32);
                let failover = Some(failover(self.config.terms, process));
                let set = RegistryRequest::SetFailover {
                    vm: id.clone(),
                    generation,
                    failover,
                };
                let state = VmState::Running;
                let run = RegistryRequest::SetVmState {
                    vm: id,
                    generation,
                    state,
                };
                let agreed = change(self, set).and_then(|_| change(self, run));
                let running = Running {
                    pid: process,
                    ..Running::default()
                };
                Some(PlanEvent::Started(
                    agreed.map(|_| running).map_err(|e| e.to_string()),
                ))
            }
            _ => None,
        }
    }
}

fn view_of(silent: Duration, heard: bool) -> HolderView {
    match heard {
        true => HolderView::SilentFor(silent),
        false => HolderView::NeverHeard { up: silent },
    }
}
