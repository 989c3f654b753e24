//! Seeded histories of many hosts over the product's decisions: owners that run under leases, holders that fence, agents
//! that watch and take over, and everything that can go wrong on the way.
//!
//! ```text
//!   seed -> Random -> Queue of events, by time -> World: owners, agents (holder, watcher, takeover), registry
//!                                                  ^ faults: crashes, cuts, losses, delays, duplicates, slow and torn
//!                                                    disks, stopped processes, a registry that is away or tells the past
//! ```
//!
//! Invariants: the same seed is the same history, to the last event ([`Report::digest`]); after every event that could
//! break one, never two guests of one VM may run, what was committed is in what is started, and nothing is committed
//! beyond what a later owner was started from. In the end everything is healed, and every VM has to run.
//!
//! What it never does: it reads no clock, and uses no collection without an order.

mod agent;
mod faults;
mod net;
mod owner;
mod takeover;
mod world;

use std::fmt;
use std::time::Duration;

use migrate::lease::LeaseTerms;

use crate::Rules;
use net::Random;
use world::World;

/// What a history is of.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Hosts, each with an agent.
    pub hosts: usize,
    /// VMs.
    pub vms: usize,
    /// Holders of each.
    pub holders: usize,
    /// How many of them make a checkpoint committed.
    pub quorum: usize,
    /// The lease.
    pub terms: LeaseTerms,
    /// For how long things go wrong.
    pub troubled: Duration,
    /// The mean time between two faults.
    pub fault_every: Duration,
    /// The rules.
    pub rules: Rules,
}

impl Config {
    /// A small cluster, another with every seed.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x5eed);
        let hosts = 3 + random.below(5);
        let holders = 1 + random.below(hosts.min(4));
        let profiles = [LeaseTerms::DEFAULT, LeaseTerms::FAST];
        let terms = profiles[random.below(profiles.len())];
        Self {
            hosts,
            vms: 1 + random.below(2),
            holders,
            quorum: 1 + random.below(holders),
            terms,
            troubled: terms.ttl * 12,
            fault_every: terms.ttl / (1 + random.below(5) as u32),
            rules: Rules::SOUND,
        }
    }

    /// Hundreds of hosts.
    #[must_use]
    pub fn large() -> Self {
        Self {
            hosts: 200,
            vms: 100,
            holders: 3,
            quorum: 2,
            terms: LeaseTerms::DEFAULT,
            troubled: LeaseTerms::DEFAULT.ttl * 8,
            fault_every: Duration::from_millis(50),
            rules: Rules::SOUND,
        }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Events.
    pub events: u64,
    /// Checkpoints that were committed.
    pub committed: u64,
    /// Takeovers that were begun.
    pub begun: u64,
    /// Guests that were started by them.
    pub started: u64,
    /// Of these, without anyone's word.
    pub by_itself: u64,
    /// Owners that stood still for want of a lease, at some beat.
    pub lapsed: u64,
    /// Owners that were refused as stale.
    pub fenced: u64,
    /// Hosts that crashed.
    pub crashes: u64,
    /// Messages that were lost, and that came twice.
    pub lost: u64,
    /// Messages that came twice.
    pub doubled: u64,
    /// Writes that a crash met on their way.
    pub torn: u64,
    /// Of the whole history: two that are equal went alike.
    pub digest: u64,
}

impl Report {
    /// Adds another's counts.
    pub fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.committed += other.committed;
        self.begun += other.begun;
        self.started += other.started;
        self.by_itself += other.by_itself;
        self.lapsed += other.lapsed;
        self.fenced += other.fenced;
        self.crashes += other.crashes;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.torn += other.torn;
        // In whatever order they are added.
        self.digest = self.digest.wrapping_add(other.digest);
    }
}

/// A history in which something went wrong that must not.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Its seed: the same one is the same history.
    pub seed: u64,
    /// What it was of.
    pub config: Config,
    /// When, since its beginning.
    pub at: Duration,
    /// What.
    pub what: String,
    /// What happened last before it.
    pub before: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "seed {}, after {:?}: {}. It went so (the last of it), with {:?}:",
            self.seed, self.at, self.what, self.config
        )?;
        self.before.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// The history of this seed.
///
/// # Errors
/// [`Failure`] when a rule that has to hold did not.
pub fn run(seed: u64, config: Config) -> Result<Report, Box<Failure>> {
    World::new(seed, config).run()
}
