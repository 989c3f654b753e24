//! What is committed: pure bookkeeping of who has what.

use std::collections::BTreeMap;

use segment::SegmentName;

use crate::registry::SegmentRecord;
use crate::wire::{Held, Offer};

/// The most committed checkpoints that wait to be registered; beyond, the oldest are given up (holders list them).
pub(super) const MAX_UNREGISTERED: usize = 8192;

/// A step forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Committed {
    pub(super) name: SegmentName,
    pub(super) holders: Vec<String>,
}

#[derive(Debug)]
struct HolderLine {
    address: String,
    acked: Option<Held>,
}

/// Which holder has which checkpoint, and what follows from it.
#[derive(Debug)]
pub(super) struct Ledger {
    quorum: usize,
    holders: Vec<HolderLine>,
    committed: Option<SegmentName>,
    /// Acknowledged by someone, and the registry does not know it yet.
    unregistered: BTreeMap<SegmentName, SegmentRecord>,
    /// How many were given up.
    given_up: u64,
}

impl Ledger {
    pub(super) fn new(holders: &[String], quorum: usize) -> Self {
        let holders = holders
            .iter()
            .map(|h| HolderLine {
                address: h.clone(),
                acked: None,
            })
            .collect();
        Self {
            quorum: quorum.max(1),
            holders,
            committed: None,
            unregistered: BTreeMap::new(),
            given_up: 0,
        }
    }

    pub(super) fn committed(&self) -> Option<&SegmentName> {
        self.committed.as_ref()
    }

    pub(super) fn address(&self, holder: usize) -> &str {
        self.holders.get(holder).map_or("", |h| &h.address)
    }

    pub(super) fn acked(&self, holder: usize) -> Option<&Held> {
        self.holders.get(holder)?.acked.as_ref()
    }

    /// A holder has said at the opening what it has: this may be less than before, when it lost something.
    pub(super) fn position(&mut self, holder: usize, newest: Option<Held>) -> Option<Committed> {
        if let Some(line) = self.holders.get_mut(holder) {
            line.acked = newest;
        }
        self.advance()
    }

    /// A holder has stored what was offered.
    pub(super) fn stored(&mut self, holder: usize, offer: &Offer) -> Option<Committed> {
        let line = self.holders.get_mut(holder)?;
        let held = offer.held();
        if line.acked.as_ref().is_none_or(|a| a.name < held.name) {
            line.acked = Some(held);
        }
        let record = self
            .unregistered
            .entry(offer.name.clone())
            .or_insert_with(|| SegmentRecord {
                name: offer.name.clone(),
                checkpoint: offer.checkpoint,
                digest: offer.digest,
                bytes: offer.bytes,
                parent: offer.parent.clone(),
                holders: Vec::new(),
                created_unix_ns: offer.created_unix_ns,
            });
        if !record.holders.contains(&line.address) {
            record.holders.push(line.address.clone());
        }
        while self.unregistered.len() > MAX_UNREGISTERED {
            self.unregistered.pop_first();
            self.given_up += 1;
        }
        self.advance()
    }

    /// The newest checkpoint that `quorum` holders have: what the quorum-th of them has, newest first.
    fn advance(&mut self) -> Option<Committed> {
        let mut newest: Vec<_> = self
            .holders
            .iter()
            .filter_map(|h| h.acked.as_ref())
            .map(|a| &a.name)
            .collect();
        newest.sort_unstable_by(|a, b| b.cmp(a));
        let name = (*newest.get(self.quorum - 1)?).clone();
        if self.committed.as_ref().is_some_and(|c| *c >= name) {
            return None;
        }
        let has = |h: &&HolderLine| h.acked.as_ref().is_some_and(|a| a.name >= name);
        let holders = self
            .holders
            .iter()
            .filter(has)
            .map(|h| h.address.clone())
            .collect();
        self.committed = Some(name.clone());
        Some(Committed { name, holders })
    }

    /// At most `limit` committed checkpoints that the registry does not know, and how many were given up before.
    pub(super) fn take_unregistered(&mut self, limit: usize) -> (Vec<SegmentRecord>, u64) {
        let given_up = std::mem::take(&mut self.given_up);
        let Some(committed) = &self.committed else {
            return (Vec::new(), given_up);
        };
        let names: Vec<_> = self
            .unregistered
            .range(..=committed.clone())
            .take(limit)
            .map(|(n, _)| n.clone())
            .collect();
        let records = names.iter().filter_map(|n| self.unregistered.remove(n)).collect();
        (records, given_up)
    }

    /// They could not be registered now.
    pub(super) fn put_back(&mut self, records: Vec<SegmentRecord>) {
        for record in records {
            let known = self
                .unregistered
                .entry(record.name.clone())
                .or_insert_with(|| SegmentRecord {
                    holders: Vec::new(),
                    ..record.clone()
                });
            for holder in record.holders {
                if !known.holders.contains(&holder) {
                    known.holders.push(holder);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use segment::{CheckpointId, Digest, Epoch, Generation, VmId};

    use super::*;

    fn offer(epoch: u64) -> Offer {
        let name = SegmentName::new(VmId::new("web").unwrap(), Generation(1), Epoch(epoch));
        let checkpoint = CheckpointId([epoch as u8; 16]);
        Offer {
            generation: Generation(1),
            name,
            checkpoint,
            digest: Digest([1; 32]),
            bytes: 10,
            parent: None,
            created_unix_ns: 7,
        }
    }

    fn ledger(quorum: usize) -> Ledger {
        Ledger::new(&["a".into(), "b".into(), "c".into()], quorum)
    }

    #[test]
    fn committed_is_what_a_quorum_has() {
        let mut l = ledger(2);
        assert_eq!(l.stored(0, &offer(1)), None);
        assert_eq!(l.stored(0, &offer(2)), None);
        let step = l.stored(1, &offer(1)).unwrap();
        assert_eq!(
            (step.name, step.holders),
            (offer(1).name, vec!["a".to_owned(), "b".to_owned()])
        );
        // A merged segment makes up for the ones it covers.
        assert_eq!(l.stored(2, &offer(3)).unwrap().name, offer(2).name);
        assert_eq!(l.committed(), Some(&offer(2).name));
    }

    #[test]
    fn committed_never_goes_back() {
        let mut l = ledger(1);
        assert_eq!(l.stored(0, &offer(5)).unwrap().name, offer(5).name);
        assert_eq!(l.position(0, None), None);
        assert_eq!(l.stored(0, &offer(4)), None);
        assert_eq!(l.committed(), Some(&offer(5).name));
    }

    #[test]
    fn only_committed_ones_are_registered() {
        let mut l = ledger(2);
        for epoch in 1..=3 {
            l.stored(0, &offer(epoch));
        }
        assert!(l.take_unregistered(10).0.is_empty());
        l.stored(1, &offer(2));
        let (records, _) = l.take_unregistered(1);
        assert_eq!(records.iter().map(|r| r.name.epoch.0).collect::<Vec<_>>(), [1]);
        l.put_back(records);
        let (records, _) = l.take_unregistered(10);
        assert_eq!(
            records.iter().map(|r| r.holders.len()).collect::<Vec<_>>(),
            [1, 2]
        );
        assert!(l.take_unregistered(10).0.is_empty());
    }

    #[test]
    fn the_unregistered_are_bounded() {
        let mut l = ledger(2);
        for epoch in 0..MAX_UNREGISTERED as u64 + 10 {
            l.stored(0, &offer(epoch));
        }
        assert_eq!(l.unregistered.len(), MAX_UNREGISTERED);
        assert_eq!(l.take_unregistered(1).1, 10);
    }
}
