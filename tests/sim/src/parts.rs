//! What holds a VM's segments and what holds its record: the shells around the product's rules, without their disks.

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use migrate::failover::{Holding, SealFailure};
use migrate::lease::{Grant, LeaseTerms};
use migrate::registry::rules::{self, Step};
use migrate::registry::{
    Failover, LiveLease, OwnerProcess, RegistryError, RegistryRequest, VmRecord, VmState,
};
use migrate::store::{Promise, promise};
use migrate::wire::SegmentBrief;
use segment::{CheckpointId, Digest, Epoch, Generation, SegmentName, VmId};

use crate::Rules;

/// A checkpoint: generation and epoch.
pub type At = (u64, u64);

/// The VM with this number.
///
/// # Panics
/// Never: the name is a valid one.
#[must_use]
pub fn vm(number: usize) -> VmId {
    VmId::new(&format!("vm{number}")).unwrap_or_else(|why| panic!("name a VM: {why}"))
}

/// What a holder says of a checkpoint.
#[must_use]
pub fn brief(vm: &VmId, (generation, epoch): At) -> SegmentBrief {
    let mut checkpoint = [0; 16];
    checkpoint[..8].copy_from_slice(&generation.to_le_bytes());
    checkpoint[8..].copy_from_slice(&epoch.to_le_bytes());
    SegmentBrief {
        name: SegmentName::new(vm.clone(), Generation(generation), Epoch(epoch)),
        checkpoint: CheckpointId(checkpoint),
        digest: Digest([0; 32]),
        bytes: 1,
        parent: None,
        created_unix_ns: 0,
        links: 1,
        complete: true,
        label: None,
    }
}

/// Which checkpoint that is.
#[must_use]
pub fn at(brief: &SegmentBrief) -> At {
    (brief.name.generation.0, brief.name.epoch.0)
}

/// A holder of one VM. Promises and segments are on its disk, grants in its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holder {
    /// The highest generation it has promised.
    pub promised: u64,
    /// The checkpoints that are whole here.
    pub has: BTreeSet<At>,
    /// The newest it remembers to have acknowledged.
    pub had: Option<At>,
    /// What it granted the owner.
    pub grant: Grant,
}

impl Hash for Holder {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.promised, &self.has, self.had).hash(state);
        // How long it holds from the beginning of time: its end.
        self.grant.remaining(Duration::ZERO).hash(state);
    }
}

impl Holder {
    /// Promises a generation; the one that is promised already, when that is higher.
    ///
    /// # Errors
    /// The higher one.
    pub fn open(&mut self, rules: Rules, generation: u64) -> Result<(), u64> {
        match promise(Generation(self.promised), Generation(generation)) {
            Promise::Refused if rules.holders_fence => return Err(self.promised),
            Promise::Refused | Promise::Stands => {}
            Promise::Raise => self.promised = generation,
        }
        Ok(())
    }

    /// Stores a checkpoint of an owner.
    ///
    /// # Errors
    /// The higher generation that is promised.
    pub fn store(&mut self, rules: Rules, at: At) -> Result<(), u64> {
        self.open(rules, at.0)?;
        self.has.insert(at);
        self.had = self.had.max(Some(at));
        Ok(())
    }

    /// Grants an owner time, under the promised generation only.
    pub fn grant(&mut self, rules: Rules, generation: u64, terms: LeaseTerms, now: Duration) -> bool {
        let promised = self.promised == generation || !rules.holders_fence;
        if promised {
            self.grant.grant(terms, now);
        }
        promised
    }

    /// Promises a generation to who takes the VM over, and says what is here.
    ///
    /// # Errors
    /// [`SealFailure::Fenced`] when a higher one is promised.
    pub fn seal(
        &mut self,
        rules: Rules,
        vm: &VmId,
        generation: u64,
        now: Duration,
    ) -> Result<Holding, SealFailure> {
        let fenced = |current| SealFailure::Fenced {
            current: Generation(current),
        };
        self.open(rules, generation).map_err(fenced)?;
        // After the promise: nothing is granted or acknowledged under a lower one any more.
        Ok(self.holding(vm, now))
    }

    /// What is here.
    #[must_use]
    pub fn holding(&self, vm: &VmId, now: Duration) -> Holding {
        let newest = self.has.last().copied();
        Holding {
            newest: newest.map(|at| brief(vm, at)),
            had: self.had.max(newest).map(|at| brief(vm, at).name),
            granted: self.grant.remaining(now),
            ..Holding::default()
        }
    }

    /// Its process begins anew.
    pub fn restart(&mut self, rules: Rules, terms: LeaseTerms, now: Duration) {
        self.grant = match rules.restart_remembers {
            true => Grant::after_restart(terms, now),
            false => Grant::default(),
        };
    }
}

/// The registry's record of one VM, and its owner's lease.
#[derive(Debug, Clone)]
pub struct Registry {
    record: VmRecord,
    /// Until when the owner's lease is held.
    leased_until: Option<Duration>,
}

impl Registry {
    /// A VM that its first owner runs under a lease.
    #[must_use]
    pub fn new(
        vm: VmId,
        owner: &str,
        holders: Vec<String>,
        ack_quorum: u32,
        terms: LeaseTerms,
        process: u32,
    ) -> Self {
        let record = VmRecord {
            vm,
            generation: Generation(1),
            revision: 1,
            owner: owner.to_owned(),
            holders,
            ack_quorum,
            every_ms: 200,
            state: VmState::Running,
            changed_unix_ms: 0,
            newest: None,
            claim: [0; 16],
            policy: None,
            leased: None,
            swap: None,
            alive: None,
            failover: Some(failover(terms, process)),
        };
        Self {
            record,
            leased_until: None,
        }
    }

    /// The record as it is.
    #[must_use]
    pub fn record(&self) -> &VmRecord {
        &self.record
    }

    fn held(&self, now: Duration) -> bool {
        self.leased_until.is_some_and(|until| now < until)
    }

    /// The record as it is told.
    #[must_use]
    pub fn read(&self, now: Duration) -> VmRecord {
        let alive = self.held(now).then_some(LiveLease { lease: 1, ttl_ms: 1 });
        VmRecord {
            alive,
            ..self.record.clone()
        }
    }

    /// A request that changes the record.
    ///
    /// # Errors
    /// As the rules have it.
    pub fn ask(
        &mut self,
        request: &RegistryRequest,
        now: Duration,
        wall_ms: u64,
    ) -> Result<VmRecord, RegistryError> {
        let ruled = rules::changed(request, self.record.clone(), wall_ms);
        let Some(ruled) = ruled else {
            return Err(RegistryError::Invalid {
                why: format!("{request:?} changes no VM"),
            });
        };
        if let Step::Write(record) = ruled? {
            if record.generation != self.record.generation {
                // As the backends do: a raise ends the lease.
                self.leased_until = None;
            }
            self.record = record;
        }
        Ok(self.read(now))
    }

    /// Renews the lease of an owner, or gives it another.
    ///
    /// # Errors
    /// When its generation is over.
    pub fn renew(&mut self, generation: u64, terms: LeaseTerms, now: Duration) -> Result<(), RegistryError> {
        rules::owned(&self.record, Generation(generation))?;
        if !self.held(now) {
            self.record.leased = Some(generation);
            self.record.revision += 1;
        }
        self.leased_until = Some(now + terms.guard());
        Ok(())
    }

    /// Holds what it held for its whole time once more, as a registry does that begins anew.
    pub fn restart(&mut self, terms: LeaseTerms, now: Duration) {
        if self.held(now) {
            self.leased_until = Some(now + terms.guard());
        }
    }

    /// Forgets a lease that ran out.
    pub fn forget(&mut self, now: Duration) {
        self.leased_until = self.leased_until.filter(|until| now < *until);
    }

    /// Somebody says what was committed.
    pub fn register(&mut self, at: At) {
        let held = brief(&self.record.vm, at).held();
        let older = self.record.newest.as_ref();
        if older.is_none_or(|older| older.name.position() < held.name.position()) {
            self.record.newest = Some(held);
        }
    }
}

/// How a VM fails over whose owner is this process.
#[must_use]
pub fn failover(terms: LeaseTerms, process: u32) -> Failover {
    Failover {
        ttl_ms: terms.ttl.as_millis() as u64,
        stop_on_lapse: None,
        renew_every_ms: terms.renew_every.as_millis() as u64,
        process: Some(OwnerProcess {
            boot: [1; 16],
            namespace: 1,
            pid: process,
            started: 1,
        }),
    }
}
