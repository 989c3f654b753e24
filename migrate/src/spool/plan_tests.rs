//! The pure plan, by example and against a model of holders.

use proptest::prelude::*;
use segment::SegmentName;

use super::plan::{self, HolderPosition, NextEntry, SpoolAction, SpoolEntry};
use super::{Position, tests::at};
use crate::store::fixture::id;

fn entry(epoch: u64, parent: Option<u64>, bytes: u64) -> SpoolEntry {
    SpoolEntry {
        at: at(epoch),
        parent: parent.map(at),
        bytes,
        labelled: false,
    }
}

/// A full one at `first` and deltas up to `last`, 100 bytes each.
fn line(first: u64, last: u64) -> Vec<SpoolEntry> {
    (first..=last)
        .map(|epoch| entry(epoch, (epoch > first).then(|| epoch - 1), 100))
        .collect()
}

fn holder(name: &str, possible: &[Option<u64>]) -> HolderPosition {
    HolderPosition {
        holder: name.into(),
        possible: possible.iter().map(|epoch| epoch.map(at)).collect(),
    }
}

fn epochs(names: &[SegmentName]) -> Vec<u64> {
    names.iter().map(|name| name.epoch.0).collect()
}

fn next_epoch(entries: &[SpoolEntry], position: Option<u64>) -> Option<u64> {
    match plan::next(entries, position.map(at).as_ref()) {
        NextEntry::Segment(entry) => Some(entry.at.name.epoch.0),
        NextEntry::UpToDate => Some(0),
        NextEntry::NeedFull => None,
    }
}

#[test]
fn what_comes_next() {
    let mut entries = line(3, 6);
    assert_eq!(
        [3, 4, 5, 6].map(|p| next_epoch(&entries, Some(p))),
        [Some(4), Some(5), Some(6), Some(0)]
    );
    // Nothing, or something older than the full one.
    assert_eq!(
        [None, Some(1)].map(|p| next_epoch(&entries, p)),
        [Some(3), Some(3)]
    );
    // Newer than everything here: another owner's. A full one that is older would not bring it on.
    assert_eq!(next_epoch(&entries, Some(9)), None);
    // Another checkpoint of the same name.
    let stranger = Position {
        name: at(4).name,
        checkpoint: id(99),
    };
    assert_eq!(plan::next(&entries, Some(&stranger)), NextEntry::NeedFull);
    // Without the full one only those on the line are served.
    entries.remove(0);
    assert_eq!(
        [None, Some(1), Some(2), Some(3)].map(|p| next_epoch(&entries, p)),
        [None, None, None, Some(4)]
    );
    // A new full one: who is on the old line gets its deltas first, who is not goes straight to it.
    entries.extend([entry(7, None, 100), entry(8, Some(7), 100)]);
    assert_eq!(
        [None, Some(3), Some(6), Some(7)].map(|p| next_epoch(&entries, p)),
        [Some(7), Some(4), Some(7), Some(8)]
    );
    assert_eq!(next_epoch(&[], None), Some(0));
}

#[test]
fn what_all_have_is_dropped_and_the_newest_stays() {
    let drops = |holders: &[HolderPosition]| -> Vec<u64> {
        plan::plan(&line(1, 5), holders, u64::MAX)
            .iter()
            .map(|action| match action {
                SpoolAction::Drop(name) => name.epoch.0,
                other => panic!("{other:?}"),
            })
            .collect()
    };
    assert_eq!(drops(&[]), [0u64; 0]);
    assert_eq!(drops(&[holder("a", &[Some(5)])]), [1, 2, 3, 4]);
    assert_eq!(drops(&[holder("a", &[Some(5)]), holder("b", &[Some(2)])]), [1, 2]);
    assert_eq!(drops(&[holder("a", &[Some(5)]), holder("b", &[None])]), [0u64; 0]);
    // It may not have got what was sent last.
    assert_eq!(drops(&[holder("a", &[Some(4), Some(1), Some(5)])]), [1]);
    // A lost one waits for a full checkpoint: nothing here helps it.
    assert_eq!(
        drops(&[holder("a", &[Some(3)]), holder("lost", &[Some(9)])]),
        [1, 2, 3]
    );
}

#[test]
fn near_the_bound_runs_between_holders_are_merged() {
    let plan = |holders: &[HolderPosition], bound| plan::plan(&line(1, 10), holders, bound);
    let merge = |holders: &[HolderPosition], bound| match plan(holders, bound).pop() {
        Some(SpoolAction::Merge(run)) => epochs(&run),
        other => panic!("{other:?}"),
    };
    let (a, b) = (holder("a", &[None]), holder("b", &[Some(6)]));
    // 1000 bytes are there: below 80 % nothing is done.
    assert_eq!(plan(&[a.clone(), b.clone()], 1250), []);
    // The longest run, and not the full one with it.
    assert_eq!(merge(&[a.clone(), b.clone()], 1249), [2, 3, 4, 5, 6]);
    assert_eq!(merge(&[a.clone(), b], 1000), [2, 3, 4, 5, 6]);
    // What may be on its way is a place too.
    assert_eq!(
        merge(&[holder("a", &[None, Some(1), Some(2), Some(3)])], 1000),
        [4, 5, 6, 7, 8, 9, 10]
    );
    // What a person named stays, until it is that or nothing.
    let mut labelled = line(1, 10);
    labelled[5].labelled = true;
    let runs = |bound| match plan::plan(&labelled, std::slice::from_ref(&a), bound).pop() {
        Some(SpoolAction::Merge(run)) => epochs(&run),
        other => panic!("{other:?}"),
    };
    assert_eq!(runs(1200), [2, 3, 4, 5, 6]);
    assert_eq!(runs(1000), [2, 3, 4, 5, 6, 7, 8, 9, 10]);
}

#[test]
fn a_long_link_is_not_written_anew_for_every_short_one() {
    let mut entries = line(1, 6);
    entries[1].bytes = 10_000;
    let holders = [holder("a", &[None])];
    let run = |bound| match plan::plan(&entries, &holders, bound).pop() {
        Some(SpoolAction::Merge(run)) => epochs(&run),
        other => panic!("{other:?}"),
    };
    assert_eq!(run(12_000), [3, 4, 5, 6]);
    assert_eq!(run(10_600), [2, 3, 4, 5, 6]);
    // Two of a kind: not worth it before it has to be.
    let entries = [
        entry(1, None, 100),
        entry(2, Some(1), 100),
        entry(3, Some(2), 100),
    ];
    assert_eq!(plan::plan(&entries, &holders, 350), []);
    assert_eq!(
        plan::plan(&entries, &holders, 300),
        [SpoolAction::Merge(vec![at(2).name, at(3).name])]
    );
}

#[test]
fn when_nothing_fits_the_last_one_is_given_up_or_the_next_refused() {
    let give_up = |holder: &str| SpoolAction::GiveUp {
        holder: holder.into(),
    };
    let dropped = |epoch| SpoolAction::Drop(at(epoch).name);
    // One link each, so nothing to merge: a is behind, b is not.
    let entries = [
        entry(4, Some(3), 100),
        entry(5, Some(4), 100),
        entry(6, Some(5), 100),
    ];
    let (a, b) = (holder("a", &[Some(3)]), holder("b", &[Some(4), Some(5)]));
    assert_eq!(plan::plan(&entries, &[a, b], 300), [give_up("a"), dropped(4)]);
    // Alone, and behind a delta: the newest stays for it to be compared with.
    let alone = [entry(4, Some(3), 100), entry(5, Some(4), 200)];
    let waits = holder("a", &[Some(3), Some(4)]);
    assert_eq!(plan::plan(&alone, &[waits], 300), [give_up("a"), dropped(4)]);
    // All need the full one: another full one would be no shorter.
    let full = [entry(4, None, 100), entry(5, Some(4), 100)];
    let all = [holder("a", &[None, Some(4)]), holder("b", &[None, Some(4)])];
    assert_eq!(plan::plan(&full, &all, 200), [SpoolAction::Refuse]);
    // Up to date, and the newest alone is too much.
    assert_eq!(
        plan::plan(&full[..1], &[holder("a", &[Some(4)])], 100),
        [SpoolAction::Refuse]
    );
    // Nobody else has it: nothing is dropped.
    assert_eq!(plan::plan(&full, &[], 200), [SpoolAction::Refuse]);
    assert_eq!(plan::plan(&full, &[], 400), []);
}

/// The purely planned spool and its holders.
#[derive(Debug, Default)]
struct Model {
    entries: Vec<SpoolEntry>,
    epoch: u64,
    holders: Vec<ModelHolder>,
}

#[derive(Debug, Clone)]
struct ModelHolder {
    has: Option<Position>,
    possible: Vec<Option<Position>>,
    /// Sent and not yet arrived, or arrived and not yet acknowledged.
    on_the_way: Vec<SpoolEntry>,
}

#[derive(Debug, Clone)]
enum Op {
    Take { full: bool, bytes: u64, labelled: bool },
    Send(usize),
    Arrive(usize),
    Acknowledge(usize),
    Reconnect(usize),
    Plan { bound: u64, shrink: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (prop::bool::weighted(0.1), 1u64..200, prop::bool::weighted(0.1))
            .prop_map(|(full, bytes, labelled)| Op::Take { full, bytes, labelled }),
        4 => (0usize..3).prop_map(Op::Send),
        2 => (0usize..3).prop_map(Op::Arrive),
        2 => (0usize..3).prop_map(Op::Acknowledge),
        1 => (0usize..3).prop_map(Op::Reconnect),
        3 => (200u64..3000, 0u64..100).prop_map(|(bound, shrink)| Op::Plan { bound, shrink }),
    ]
}

/// Whether a holder at `position` is brought to the newest.
fn reaches(entries: &[SpoolEntry], position: &Option<Position>) -> bool {
    let mut position = position.clone();
    for _ in 0..=entries.len() {
        match plan::next(entries, position.as_ref()) {
            NextEntry::UpToDate => return true,
            NextEntry::NeedFull => return false,
            NextEntry::Segment(entry) => {
                assert!(
                    entry.parent.is_none() || entry.parent == position,
                    "it cannot take this"
                );
                position = Some(entry.at.clone());
            }
        }
    }
    panic!("it is sent the same ones again and again");
}

impl Model {
    fn take(&mut self, full: bool, bytes: u64, labelled: bool) {
        self.epoch += 1;
        let parent = self
            .entries
            .last()
            .filter(|_| !full)
            .map(|entry| entry.at.clone());
        // The very first is a delta too, now and then: of what was restored.
        let parent = parent.or_else(|| (self.entries.is_empty() && !full).then(|| at(0)));
        self.entries.push(SpoolEntry {
            at: at(self.epoch),
            parent,
            bytes,
            labelled,
        });
    }

    fn holder(&mut self, op: &Op) {
        let (Op::Send(h) | Op::Arrive(h) | Op::Acknowledge(h) | Op::Reconnect(h)) = op else {
            return;
        };
        let holder = &mut self.holders[*h];
        match op {
            Op::Send(_) => {
                let after = holder
                    .on_the_way
                    .last()
                    .map(|entry| entry.at.clone())
                    .or(holder.has.clone());
                if let NextEntry::Segment(entry) = plan::next(&self.entries, after.as_ref()) {
                    holder.possible.push(Some(entry.at.clone()));
                    holder.on_the_way.push(entry.clone());
                }
            }
            Op::Arrive(_) => {
                if let Some(next) = holder
                    .on_the_way
                    .iter()
                    .find(|entry| Some(&entry.at.name) > holder.has.as_ref().map(|at| &at.name))
                {
                    assert!(next.parent.is_none() || next.parent == holder.has);
                    holder.has = Some(next.at.clone());
                }
            }
            Op::Acknowledge(_) => {
                let Some(has) = holder.has.clone() else { return };
                holder.on_the_way.retain(|entry| entry.at.name > has.name);
                holder
                    .possible
                    .retain(|at| at.as_ref().is_some_and(|at| at.name >= has.name));
            }
            Op::Reconnect(_) => {
                holder.on_the_way.clear();
                holder.possible = vec![holder.has.clone()];
            }
            Op::Take { .. } | Op::Plan { .. } => {}
        }
    }

    fn positions(&self) -> Vec<HolderPosition> {
        let position = |(h, holder): (usize, &ModelHolder)| HolderPosition {
            holder: h.to_string(),
            possible: holder.possible.clone(),
        };
        self.holders.iter().enumerate().map(position).collect()
    }

    fn find(&self, name: &SegmentName) -> usize {
        self.entries
            .iter()
            .position(|entry| entry.at.name == *name)
            .unwrap()
    }

    /// Plans and does, until there is nothing to do; returns who was given up, and whether the end was a refusal.
    fn make_room(&mut self, bound: u64, shrink: u64) -> (Vec<String>, bool) {
        let mut given_up = Vec::new();
        for _ in 0..1000 {
            let actions = plan::plan(&self.entries, &self.positions(), bound);
            if actions.is_empty() {
                return (given_up, false);
            }
            let newest = self.entries.last().unwrap().at.clone();
            for action in actions {
                match action {
                    SpoolAction::Drop(name) => {
                        assert_ne!(name, newest.name, "the newest is dropped");
                        let i = self.find(&name);
                        self.entries.remove(i);
                    }
                    SpoolAction::Merge(run) => {
                        assert!(run.len() >= 2);
                        let run: Vec<usize> = run.iter().map(|name| self.find(name)).collect();
                        for pair in run.windows(2) {
                            assert_eq!(
                                self.entries[pair[1]].parent.as_ref(),
                                Some(&self.entries[pair[0]].at)
                            );
                        }
                        let sizes = run.iter().map(|i| self.entries[*i].bytes);
                        let (sum, most) = (sizes.clone().sum::<u64>(), sizes.max().unwrap());
                        let last = *run.last().unwrap();
                        self.entries[last].parent = self.entries[run[0]].parent.clone();
                        self.entries[last].bytes = most + (sum - most) * shrink / 100;
                        run[..run.len() - 1]
                            .iter()
                            .rev()
                            .for_each(|i| drop(self.entries.remove(*i)));
                    }
                    SpoolAction::GiveUp { holder } => given_up.push(holder),
                    SpoolAction::Refuse => return (given_up, true),
                }
            }
        }
        panic!("it never ends");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Wherever the holders may be: who is not given up can still be brought to the newest by what is left.
    #[test]
    fn who_is_not_given_up_can_be_served(ops in prop::collection::vec(op(), 1..120), holders in 0usize..4) {
        let unknown = ModelHolder { has: None, possible: vec![None], on_the_way: Vec::new() };
        let mut model = Model { holders: vec![unknown; holders], ..Model::default() };
        if let Some(restored) = model.holders.get_mut(2) {
            // One that has what the VM was restored from.
            restored.has = Some(at(0));
            restored.possible = vec![Some(at(0))];
        }
        for op in ops {
            match op {
                Op::Take { full, bytes, labelled } => model.take(full, bytes, labelled),
                Op::Send(h) | Op::Arrive(h) | Op::Acknowledge(h) | Op::Reconnect(h) if h >= holders => {}
                Op::Send(_) | Op::Arrive(_) | Op::Acknowledge(_) | Op::Reconnect(_) => model.holder(&op),
                Op::Plan { bound, shrink } => {
                    let before = model.entries.clone();
                    let (given_up, refused) = model.make_room(bound, shrink);
                    let used: u64 = model.entries.iter().map(|entry| entry.bytes).sum();
                    prop_assert!(refused || holders == 0 || used * 100 <= bound * 95, "{} of {}", used, bound);
                    prop_assert_eq!(before.last().map(|e| &e.at), model.entries.last().map(|e| &e.at));
                    if holders == 0 {
                        prop_assert_eq!(&before, &model.entries);
                    }
                    for (h, holder) in model.holders.iter().enumerate() {
                        if given_up.contains(&h.to_string()) {
                            continue;
                        }
                        // Also from where it really is, which is one of the places it may be.
                        prop_assert!(holder.possible.contains(&holder.has));
                        for place in &holder.possible {
                            prop_assert!(
                                !reaches(&before, place) || reaches(&model.entries, place),
                                "{} at {:?} is stranded: {:?}", h, place, model.entries
                            );
                        }
                    }
                }
            }
        }
    }
}
