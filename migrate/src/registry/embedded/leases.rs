//! The leases of an embedded registry: granted durably, renewed in memory.
//!
//! A renewal writes nothing: after a restart every lease that was granted is held for its whole time once more, for
//! whoever renewed meanwhile could not be heard. Time is this process's monotonic clock; nobody else's counts.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::registry::request::Changed;
use crate::registry::types::{LeaseRecord, LeaseSubject, LiveLease};

#[derive(Debug)]
struct Held {
    record: LeaseRecord,
    until: Instant,
}

/// Whom a lease stands for, whatever its id or generation: one at a time has one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Node(String),
    Vm(String),
}

impl From<&LeaseSubject> for Key {
    fn from(subject: &LeaseSubject) -> Self {
        match subject {
            LeaseSubject::Node { name, .. } => Self::Node(name.clone()),
            LeaseSubject::Owner { vm, .. } => Self::Vm(vm.as_str().to_owned()),
        }
    }
}

pub(super) fn changed(subject: &LeaseSubject) -> Changed {
    match subject {
        LeaseSubject::Node { name, .. } => Changed::Node { name: name.clone() },
        LeaseSubject::Owner { vm, .. } => Changed::Vm { vm: vm.clone() },
    }
}

/// All leases that are held.
#[derive(Debug, Default)]
pub(super) struct Leases {
    held: HashMap<u64, Held>,
    of: HashMap<Key, u64>,
}

impl Leases {
    pub(super) fn grant(&mut self, id: u64, record: LeaseRecord, now: Instant) {
        let until = now + Duration::from_millis(record.ttl_ms);
        if let Some(old) = self.of.insert(Key::from(&record.subject), id)
            && old != id
        {
            self.held.remove(&old);
        }
        self.held.insert(id, Held { record, until });
    }

    /// What a lease stands for, when it is held.
    pub(super) fn get(&self, id: u64, now: Instant) -> Option<&LeaseRecord> {
        self.held
            .get(&id)
            .filter(|held| held.until > now)
            .map(|held| &held.record)
    }

    /// Holds it for its whole time from now; false when it is not held any more.
    pub(super) fn renew(&mut self, id: u64, now: Instant) -> bool {
        match self.held.get_mut(&id) {
            Some(held) if held.until > now => {
                held.until = now + Duration::from_millis(held.record.ttl_ms);
                true
            }
            Some(_) | None => false,
        }
    }

    pub(super) fn remove(&mut self, id: u64) {
        if let Some(held) = self.held.remove(&id) {
            let key = Key::from(&held.record.subject);
            if self.of.get(&key) == Some(&id) {
                self.of.remove(&key);
            }
        }
    }

    pub(super) fn id_of(&self, key: &Key) -> Option<u64> {
        self.of.get(key).copied()
    }

    pub(super) fn live(&self, key: &Key, now: Instant) -> Option<(LiveLease, &LeaseSubject)> {
        let lease = self.id_of(key)?;
        let record = self.get(lease, now)?;
        let ttl_ms = record.ttl_ms;
        Some((LiveLease { lease, ttl_ms }, &record.subject))
    }

    /// Those that ran out.
    pub(super) fn expired(&self, now: Instant) -> Vec<u64> {
        let over = self.held.iter().filter(|(_, held)| held.until <= now);
        over.map(|(id, _)| *id).collect()
    }

    /// When the next one runs out.
    pub(super) fn next(&self) -> Option<Instant> {
        self.held.values().map(|held| held.until).min()
    }
}
