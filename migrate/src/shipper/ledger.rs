//! What is committed: pure bookkeeping of who has what.
//!
//! While the holder set changes, a checkpoint is committed when a quorum of the old set *and* one of the new set have it:
//! whichever of the two the registry has in the end, whoever seals it finds everything that was ever committed.

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
    /// Counts in the set that the registry has.
    now: bool,
    /// Counts in the set that is to come, while there is one.
    next: bool,
}

impl HolderLine {
    fn new(address: &str, now: bool) -> Self {
        Self {
            address: address.to_owned(),
            acked: None,
            now,
            next: false,
        }
    }
}

/// Which holder has which checkpoint, and what follows from it.
#[derive(Debug)]
pub(super) struct Ledger {
    quorum: usize,
    /// The quorum of the set that is to come, while there is one.
    next_quorum: Option<usize>,
    holders: Vec<HolderLine>,
    committed: Option<SegmentName>,
    /// Acknowledged by someone, and the registry does not know it yet.
    unregistered: BTreeMap<SegmentName, SegmentRecord>,
    /// How many were given up.
    given_up: u64,
}

impl Ledger {
    pub(super) fn new(holders: &[String], quorum: usize) -> Self {
        let holders = holders.iter().map(|h| HolderLine::new(h, true)).collect();
        Self {
            quorum: quorum.max(1),
            next_quorum: None,
            holders,
            committed: None,
            unregistered: BTreeMap::new(),
            given_up: 0,
        }
    }

    /// One that is shipped to and does not count yet; its number.
    pub(super) fn learn(&mut self, address: &str) -> usize {
        self.holders.push(HolderLine::new(address, false));
        self.holders.len() - 1
    }

    /// From now on a commit needs a quorum of the set to come too, if who joins has all that is committed; else nothing
    /// changes and false is returned. At this instant nothing is committed that the set to come could miss.
    pub(super) fn begin_change(&mut self, set: &[String], quorum: usize, joining: usize) -> bool {
        let acked = self.holders.get(joining).and_then(|l| l.acked.as_ref());
        let caught_up = match (&self.committed, acked) {
            (None, _) => true,
            (Some(committed), Some(acked)) => acked.name >= *committed,
            (Some(_), None) => false,
        };
        if caught_up {
            self.force_change(set, quorum, joining);
        }
        caught_up
    }

    /// The same, whatever who joins has: the registry has the new set already.
    pub(super) fn force_change(&mut self, set: &[String], quorum: usize, joining: usize) {
        self.next_quorum = Some(quorum.max(1));
        for (at, line) in self.holders.iter_mut().enumerate() {
            line.next = at == joining || (line.now && set.contains(&line.address));
        }
    }

    /// The registry has the new set: only that counts.
    pub(super) fn finish_change(&mut self) -> Option<Committed> {
        let quorum = self.next_quorum.take()?;
        self.quorum = quorum;
        for line in &mut self.holders {
            line.now = std::mem::take(&mut line.next);
        }
        self.advance()
    }

    /// The registry keeps the old set.
    pub(super) fn give_up_change(&mut self) -> Option<Committed> {
        self.next_quorum = None;
        for line in &mut self.holders {
            line.next = false;
        }
        self.advance()
    }

    pub(super) fn committed(&self) -> Option<&SegmentName> {
        self.committed.as_ref()
    }

    pub(super) fn address(&self, holder: usize) -> &str {
        self.holders.get(holder).map_or("", |h| &h.address)
    }

    /// The number of a holder that counts no more, by its address.
    pub(super) fn number(&self, address: &str) -> Option<usize> {
        let leaves = |h: &HolderLine| h.address == address && !h.now;
        self.holders.iter().rposition(leaves)
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

    /// What the quorum-th of those that count has, newest first.
    fn of_quorum(&self, quorum: usize, counts: impl Fn(&HolderLine) -> bool) -> Option<SegmentName> {
        let counting = self.holders.iter().filter(|h| counts(h));
        let mut newest: Vec<_> = counting
            .filter_map(|h| h.acked.as_ref())
            .map(|a| &a.name)
            .collect();
        newest.sort_unstable_by(|a, b| b.cmp(a));
        newest.get(quorum - 1).map(|name| (*name).clone())
    }

    /// The newest checkpoint that a quorum has, of both sets while there are two.
    fn advance(&mut self) -> Option<Committed> {
        let mut name = self.of_quorum(self.quorum, |h| h.now)?;
        if let Some(quorum) = self.next_quorum {
            name = name.min(self.of_quorum(quorum, |h| h.next)?);
        }
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

    /// What a sealer of `set` is sure to find: the newest of the worst choice of enough holders to seal.
    fn sealed(l: &Ledger, set: &[&str], quorum: usize) -> u64 {
        let acked = |h: &&str| {
            let line = l.holders.iter().rev().find(|line| line.address == **h);
            line.and_then(|l| l.acked.as_ref()).map_or(0, |a| a.name.epoch.0)
        };
        let mut all: Vec<_> = set.iter().map(acked).collect();
        all.sort_unstable();
        all[set.len() - quorum]
    }

    #[test]
    fn a_change_of_holders_loses_nothing_that_was_committed_at_any_step() {
        // Every order of a few acknowledgements, before, during and after the change of c for d.
        let mut seed = 7u64;
        let mut next = |n: u64| {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        let (old, new) = (["a", "b", "c"], ["a", "b", "d"]);
        for round in 0..2000 {
            let mut l = ledger(2);
            let (mut at, mut phase) = ([0u64; 4], 0);
            let joining = l.learn("d");
            for _ in 0..40 {
                match next(5) {
                    4 if phase == 0 => {
                        let set = new.map(str::to_owned);
                        phase = u8::from(l.begin_change(&set, 2, joining));
                    }
                    4 if phase == 1 => {
                        if next(2) == 0 {
                            l.finish_change();
                            phase = 2;
                        } else {
                            l.give_up_change();
                            phase = 0;
                        }
                    }
                    4 => {}
                    holder => {
                        let holder = holder as usize;
                        at[holder] += 1 + next(2);
                        l.stored(holder, &offer(at[holder]));
                    }
                }
                let committed = l.committed().map_or(0, |c| c.epoch.0);
                // The registry has the old set until the end of the change, and may have the new one from its begin.
                if phase <= 1 {
                    assert!(sealed(&l, &old, 2) >= committed, "round {round} {l:?}");
                }
                if phase >= 1 {
                    assert!(sealed(&l, &new, 2) >= committed, "round {round} {l:?}");
                }
            }
        }
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
