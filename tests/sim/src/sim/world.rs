//! Everything there is in a history, and what happens next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use migrate::detect::broken_off_after;
use migrate::failover::{PlanAction, PlanEvent};
use migrate::lease::{Electors, OwnerLease, Verdict};
use migrate::registry::VmRecord;
use segment::{Generation, VmId};

use super::agent::Watch;
use super::net::{Clock, Net, Place, Queue, Random};
use super::takeover::Takeover;
use super::{Config, Failure, Report};
use crate::parts::{At, Holder, Registry, vm};

/// How much of what happened is kept to be told.
const TOLD: usize = 60;
/// In the end, how long it may take until every VM runs.
const PATIENCE_LEASES: u32 = 40;

/// What happens at an instant.
#[derive(Debug, Clone)]
pub(super) enum Event {
    Arrive {
        from: Place,
        to: Place,
        message: Message,
    },
    /// A write of a host's process of this life is on the disk.
    Written { host: usize, life: u64, write: u64 },
    /// An owner asks for time, takes a checkpoint and ships.
    Beat { owner: usize },
    /// An agent looks at a VM's owner.
    Look { host: usize, life: u64, vm: usize },
    /// What was asked of others for a look is judged.
    Judge {
        host: usize,
        life: u64,
        vm: usize,
        round: u64,
    },
    /// A question of a takeover was not answered in time.
    Unanswered {
        host: usize,
        life: u64,
        vm: usize,
        ask: u64,
    },
    /// Something goes wrong.
    Fault,
    /// A host comes back.
    Up { host: usize },
    /// The ways are whole again.
    Heal,
}

// The order of events of one instant is that of their numbers: these are never compared.
impl PartialEq for Event {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Event {}
impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Event {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

/// What is sent.
#[derive(Debug, Clone)]
pub(super) enum Message {
    /// An owner asks a holder, or the registry, for time.
    Renew { owner: usize, sent: Duration },
    /// It has it.
    Granted { owner: usize, by: Place, sent: Duration },
    /// It is refused as stale.
    Stale { owner: usize, current: Generation },
    /// An owner's checkpoint for a holder.
    Ship { owner: usize, at: At },
    /// It is stored.
    Stored { owner: usize, holder: usize, at: At },
    /// Of a takeover: this is to be done.
    Act {
        host: usize,
        vm: usize,
        ask: u64,
        action: Box<PlanAction>,
    },
    /// It was.
    Done {
        vm: usize,
        ask: u64,
        event: Box<PlanEvent>,
    },
    /// What do you see of the owner?
    See { host: usize, vm: usize, round: u64 },
    /// This.
    Seen {
        vm: usize,
        round: u64,
        holder: usize,
        silent: Duration,
        heard: bool,
        newest: Option<At>,
    },
    /// What does the record say?
    Read { vm: usize, round: u64 },
    /// This.
    Record {
        vm: usize,
        round: u64,
        record: Box<VmRecord>,
    },
    /// Has that process of yours ended?
    Ended {
        host: usize,
        vm: usize,
        ask: u64,
        owner: usize,
    },
}

/// A write on its way to a host's disk.
#[derive(Debug, Clone)]
pub(super) struct Write {
    pub(super) from: Place,
    pub(super) message: Message,
}

#[derive(Debug)]
pub(super) struct Host {
    pub(super) up: bool,
    /// Counts its boots.
    pub(super) boot: u64,
    /// Counts its agent's lives.
    pub(super) life: u64,
    pub(super) clock: Clock,
    /// When its agent began, by its clock.
    pub(super) since: Duration,
    pub(super) holds: BTreeMap<usize, Holder>,
    pub(super) writing: BTreeMap<u64, Write>,
    pub(super) watches: BTreeMap<usize, Watch>,
    pub(super) takeovers: BTreeMap<usize, Takeover>,
    /// Its disk is this slow.
    pub(super) disk: Duration,
}

/// A process that runs a guest, or may.
#[derive(Debug)]
pub(super) struct Owner {
    pub(super) vm: usize,
    pub(super) host: usize,
    pub(super) boot: u64,
    /// Its number, as the record has it.
    pub(super) process: u32,
    pub(super) generation: u64,
    pub(super) from: At,
    pub(super) epoch: u64,
    pub(super) stored: BTreeMap<usize, u64>,
    pub(super) lease: OwnerLease,
    pub(super) alive: bool,
    /// It is stopped (SIGSTOP) until then.
    pub(super) stopped: Duration,
}

#[derive(Debug)]
pub(super) struct Vm {
    pub(super) id: VmId,
    pub(super) holders: Vec<usize>,
    pub(super) registry: Registry,
    /// As it was some time ago.
    pub(super) past: VmRecord,
    pub(super) committed: BTreeSet<At>,
    /// A holder has lost what it had acknowledged.
    pub(super) damaged: bool,
}

/// A history.
#[derive(Debug)]
pub(super) struct World {
    pub(super) seed: u64,
    pub(super) config: Config,
    pub(super) random: Random,
    pub(super) now: Duration,
    pub(super) queue: Queue,
    pub(super) net: Net,
    pub(super) hosts: Vec<Host>,
    pub(super) vms: Vec<Vm>,
    pub(super) owners: Vec<Owner>,
    pub(super) registry_clock: Clock,
    /// The registry does not answer until then.
    pub(super) registry_away: Duration,
    /// Counts questions, writes and rounds.
    pub(super) count: u64,
    pub(super) report: Report,
    pub(super) wrong: Option<String>,
    digest: DefaultHasher,
    told: VecDeque<String>,
}

impl World {
    pub(super) fn new(seed: u64, config: Config) -> Self {
        let mut random = Random::new(seed);
        let ttl = config.terms.ttl;
        let host = |random: &mut Random| {
            let clock = Clock::new(random);
            Host {
                up: true,
                boot: 0,
                life: 0,
                clock,
                since: clock.at(Duration::ZERO),
                holds: BTreeMap::new(),
                writing: BTreeMap::new(),
                watches: BTreeMap::new(),
                takeovers: BTreeMap::new(),
                disk: random.time(ttl / 20),
            }
        };
        let hosts = (0..config.hosts).map(|_| host(&mut random)).collect();
        let net = Net {
            loses: random.number() % 60,
            delay: random.time(ttl / 20),
            rarely: ttl * 2,
            ..Net::default()
        };
        let registry_clock = Clock::new(&mut random);
        let mut world = Self {
            seed,
            config,
            random,
            now: Duration::ZERO,
            queue: Queue::default(),
            net,
            hosts,
            vms: Vec::new(),
            owners: Vec::new(),
            registry_clock,
            registry_away: Duration::ZERO,
            count: 0,
            report: Report::default(),
            wrong: None,
            digest: DefaultHasher::new(),
            told: VecDeque::new(),
        };
        (0..config.vms).for_each(|number| world.make(number));
        world.queue.push(config.fault_every, Event::Fault);
        world
    }

    /// A VM that runs somewhere, and is held elsewhere too.
    fn make(&mut self, number: usize) {
        let Config {
            hosts,
            holders,
            quorum,
            terms,
            ..
        } = self.config;
        let first = self.random.below(hosts);
        // In a row from somewhere: who runs it may be one of them.
        let from = self.random.below(hosts);
        let holders: Vec<usize> = (0..holders).map(|h| (from + h) % hosts).collect();
        let names: Vec<String> = holders.iter().map(usize::to_string).collect();
        // Those of takeovers are counted from below.
        let process = u32::MAX - self.owners.len() as u32;
        let registry = Registry::new(
            vm(number),
            &first.to_string(),
            names,
            quorum as u32,
            terms,
            process,
        );
        let past = registry.record().clone();
        for holder in &holders {
            let host = &mut self.hosts[*holder];
            host.holds.insert(number, Holder::default());
            host.watches.insert(number, Watch::default());
            let life = host.life;
            let at = self.random.time(terms.renew_every);
            self.queue.push(
                at,
                Event::Look {
                    host: *holder,
                    life,
                    vm: number,
                },
            );
        }
        self.vms.push(Vm {
            id: vm(number),
            holders,
            registry,
            past,
            committed: BTreeSet::new(),
            damaged: false,
        });
        self.run_guest(number, first, 1, (0, 0), process);
    }

    /// A process begins to run the guest: it asks for time first.
    pub(super) fn run_guest(&mut self, vm: usize, host: usize, generation: u64, from: At, process: u32) {
        let record = self.vms[vm].registry.record();
        let electors = Electors::new(&record.holders, record.ack_quorum);
        self.owners.push(Owner {
            vm,
            host,
            boot: self.hosts[host].boot,
            process,
            generation,
            from,
            epoch: 0,
            stored: BTreeMap::new(),
            lease: OwnerLease::new(self.config.terms, electors),
            alive: true,
            stopped: Duration::ZERO,
        });
        self.queue.push(
            self.now,
            Event::Beat {
                owner: self.owners.len() - 1,
            },
        );
    }

    pub(super) fn next_number(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    pub(super) fn send(&mut self, from: Place, to: Place, message: Message) {
        let arrivals = self.net.arrivals(&mut self.random, from, to);
        match arrivals.len() {
            0 => self.report.lost += 1,
            1 => {}
            _ => self.report.doubled += 1,
        }
        for after in arrivals {
            let message = message.clone();
            self.queue
                .push(self.now + after, Event::Arrive { from, to, message });
        }
    }

    /// Something that must not be.
    pub(super) fn wrong(&mut self, what: String) {
        self.wrong.get_or_insert(what);
    }

    /// Notes what happened: told when something goes wrong later, and part of the digest.
    pub(super) fn tell(&mut self, what: impl FnOnce() -> String) {
        let line = what();
        line.hash(&mut self.digest);
        if self.told.len() == TOLD {
            self.told.pop_front();
        }
        self.told.push_back(format!("{:?} {line}", self.now));
    }

    /// Whether an owner's guest may run at this instant. (One that is stopped may go on at any time.)
    pub(super) fn may_run(&self, owner: &Owner) -> bool {
        let local = self.hosts[owner.host].clock.at(self.now);
        owner.alive && matches!(owner.lease.verdict(local), Verdict::MayRun { .. })
    }

    /// To be asked whenever somebody may run who could not before.
    pub(super) fn check_alone(&mut self, vm: usize) {
        let running: Vec<_> = self
            .owners
            .iter()
            .filter(|owner| owner.vm == vm && self.may_run(owner))
            .map(|owner| (owner.generation, owner.host))
            .collect();
        if running.len() > 1 {
            self.wrong(format!("VM {vm} may run at {running:?} (generation, host)"));
        }
    }

    pub(super) fn run(mut self) -> Result<Report, Box<Failure>> {
        let end = self.config.troubled;
        self.until(end)?;
        self.calm();
        // Several times the longest that detection and a takeover may take.
        let patience = broken_off_after(self.config.terms) * 3 + self.config.terms.ttl * PATIENCE_LEASES;
        self.until(end + patience)?;
        for vm in 0..self.vms.len() {
            self.check_running(vm);
        }
        match self.wrong.take() {
            Some(what) => Err(self.failure(what)),
            None => {
                self.report.digest = self.digest.finish();
                Ok(self.report)
            }
        }
    }

    fn check_running(&mut self, vm: usize) {
        let running = self
            .owners
            .iter()
            .any(|owner| owner.vm == vm && self.may_run(owner));
        let of = &self.vms[vm];
        if !running && !of.damaged && !of.committed.is_empty() {
            let record = of.registry.record();
            let (state, generation) = (record.state, record.generation);
            self.wrong(format!(
                "all is well again and VM {vm} does not run: {state} under generation {generation}"
            ));
        }
    }

    fn until(&mut self, end: Duration) -> Result<(), Box<Failure>> {
        while let Some((at, event)) = self.queue.pop() {
            if at > end {
                self.queue.push(at, event);
                break;
            }
            self.now = at;
            self.report.events += 1;
            self.happen(event);
            if let Some(what) = self.wrong.take() {
                return Err(self.failure(what));
            }
        }
        self.now = end;
        Ok(())
    }

    fn failure(&self, what: String) -> Box<Failure> {
        Box::new(Failure {
            seed: self.seed,
            config: self.config,
            at: self.now,
            what,
            before: self.told.iter().cloned().collect(),
        })
    }

    fn happen(&mut self, event: Event) {
        let lives = |world: &Self, host: usize, life: u64| {
            let host = &world.hosts[host];
            host.up && host.life == life
        };
        match event {
            Event::Arrive { from, to, message } => match to {
                Place::Registry if self.now < self.registry_away => {}
                Place::Registry => self.at_registry(from, message),
                Place::Host(host) if self.hosts[host].up => self.at_host(from, host, message),
                Place::Host(_) => {}
            },
            Event::Written { host, life, write } if lives(self, host, life) => {
                if let Some(write) = self.hosts[host].writing.remove(&write) {
                    self.written(host, write, true);
                }
            }
            Event::Look { host, life, vm } if lives(self, host, life) => self.look(host, vm),
            Event::Judge {
                host,
                life,
                vm,
                round,
            } if lives(self, host, life) => self.judge(host, vm, round),
            Event::Unanswered { host, life, vm, ask } if lives(self, host, life) => {
                self.unanswered(host, vm, ask);
            }
            Event::Written { .. } | Event::Look { .. } | Event::Judge { .. } | Event::Unanswered { .. } => {}
            Event::Beat { owner } => self.beat(owner),
            Event::Fault => self.fault(),
            Event::Up { host } => self.up(host),
            Event::Heal => self.net.heal(),
        }
    }
}
