//! What to keep, merge and drop, and what to ship next: pure.
//!
//! ```text
//!   off the main chain        the main chain: the newest, its parent, its parent, ...
//!   [o] <- [o] <- [o]         [m0] <- [m1] <- [m2] <- [m3] <- [m4 newest]
//!                                 ^0      ^1      ^2      ^3      ^4   places a holder can be at
//! ```
//!
//! A holder at place `i` needs `m_i` and all after it. One that has nothing, or only what is older than a full `m0`,
//! is at place 0; one whose checkpoint leads nowhere here is *lost*: only a new full checkpoint helps it.
//!
//! Where a holder is, is a set: what it said last and what has been sent to it since, as an acknowledgement may be on
//! its way or lost. A merge never swallows such a place, and a drop never goes beyond the first.

use std::collections::{HashMap, HashSet};

use segment::SegmentName;

use super::Position;
use crate::store::{Entry, GUEST_LABEL};

/// Above this share of the bound (in percent) what nobody needs for its newest state is dropped, and runs of small
/// segments are merged.
pub const SOFT_PERCENT: u64 = 80;
/// Above this share everything that can be merged is, and after that holders are given up.
pub const HARD_PERCENT: u64 = 95;
/// Between the two, a merge takes at least this many, so that bytes are not written anew for every epoch.
const SOFT_MIN_RUN: usize = 4;

/// One segment in the spool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolEntry {
    /// The checkpoint.
    pub at: Position,
    /// What it builds on; none when it is full.
    pub parent: Option<Position>,
    /// Length of its file.
    pub bytes: u64,
    /// Whether a person named it: then it is not merged into a later one while there is room.
    pub labelled: bool,
}

impl From<&Entry> for SpoolEntry {
    fn from(entry: &Entry) -> Self {
        let parent = entry.parent().map(|(name, checkpoint)| Position {
            name: name.clone(),
            checkpoint,
        });
        Self {
            at: Position::from(entry),
            parent,
            bytes: entry.bytes,
            labelled: entry
                .label
                .as_ref()
                .is_some_and(|label| !label.starts_with(GUEST_LABEL)),
        }
    }
}

/// Where a holder may be: every checkpoint that may be the newest it has; `None` among them: it may have nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HolderPosition {
    /// Who.
    pub holder: String,
    /// Where it may be. Empty counts as lost.
    pub possible: Vec<Option<Position>>,
}

/// One thing to do, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpoolAction {
    /// Remove it: no holder needs it.
    Drop(SegmentName),
    /// Merge these, oldest first, into the newest of them; then plan again.
    Merge(Vec<SegmentName>),
    /// What only this holder needs does not fit: it will need a new full checkpoint.
    GiveUp {
        /// Who.
        holder: String,
    },
    /// Nothing more can be freed: what does not fit is refused.
    Refuse,
}

/// The main chain, oldest first, and all else, oldest first.
struct Split<'a> {
    main: Vec<&'a SpoolEntry>,
    off: Vec<&'a SpoolEntry>,
}

impl<'a> Split<'a> {
    /// `entries` are in ascending order of their names.
    fn new(entries: &'a [SpoolEntry]) -> Self {
        let by_position: HashMap<&Position, &SpoolEntry> =
            entries.iter().map(|entry| (&entry.at, entry)).collect();
        let mut main = Vec::new();
        let mut next = entries.last();
        while let Some(entry) = next {
            main.push(entry);
            // Parents are older, so this ends; one that is not is not followed.
            let parent = entry.parent.as_ref().filter(|parent| parent.name < entry.at.name);
            next = parent.and_then(|parent| by_position.get(parent).copied());
        }
        main.reverse();
        let on_main: HashSet<&SegmentName> = main.iter().map(|entry| &entry.at.name).collect();
        let off = entries
            .iter()
            .filter(|entry| !on_main.contains(&entry.at.name))
            .collect();
        Self { main, off }
    }

    /// The place on the main chain of a holder that is at `position`; none when it is lost.
    fn place(&self, position: Option<&Position>) -> Option<usize> {
        let first = self.main.first()?;
        let Some(position) = position else {
            return first.parent.is_none().then_some(0);
        };
        if first.parent.as_ref() == Some(position) {
            return Some(0);
        }
        match self
            .main
            .binary_search_by(|entry| entry.at.name.cmp(&position.name))
        {
            Ok(at) if self.main[at].at == *position => Some(at + 1),
            _ => (first.parent.is_none() && position.name < first.at.name).then_some(0),
        }
    }
}

/// What to ship next to a holder whose newest whole checkpoint is `position`: what builds on it, else a full one that
/// is newer. `entries` are in ascending order of their names.
#[must_use]
pub fn next<'a>(entries: &'a [SpoolEntry], position: Option<&Position>) -> NextEntry<'a> {
    let Some(newest) = entries.last() else {
        return NextEntry::UpToDate;
    };
    if Some(&newest.at) == position {
        return NextEntry::UpToDate;
    }
    let split = Split::new(entries);
    // The main chain first: of two that build on one checkpoint it has the one that leads to the newest.
    let builds_on = |entry: &&&SpoolEntry| position.is_some() && entry.parent.as_ref() == position;
    if let Some(entry) = split
        .main
        .iter()
        .find(builds_on)
        .or_else(|| split.off.iter().find(builds_on))
    {
        return NextEntry::Segment(entry);
    }
    match split.place(position).and_then(|place| split.main.get(place)) {
        Some(entry) => NextEntry::Segment(entry),
        None => NextEntry::NeedFull,
    }
}

/// The answer of [`next`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextEntry<'a> {
    /// This one.
    Segment(&'a SpoolEntry),
    /// It has the newest, or there is none.
    UpToDate,
    /// Nothing here leads on from there.
    NeedFull,
}

/// What to do so that the entries stay within `bound` bytes and every holder can still be brought to the newest from
/// where it may be. `entries` are those of one VM, in ascending order of their names. Call it again after doing what
/// it says, until it says nothing more or [`SpoolAction::Refuse`].
#[must_use]
pub fn plan(entries: &[SpoolEntry], holders: &[HolderPosition], bound: u64) -> Vec<SpoolAction> {
    let used: u64 = entries.iter().map(|entry| entry.bytes).sum();
    let Some(newest) = entries.len().checked_sub(1) else {
        return Vec::new();
    };
    if holders.is_empty() {
        // Nobody else has them: they are all there is of this VM's past.
        return if above(used, HARD_PERCENT, bound) {
            vec![SpoolAction::Refuse]
        } else {
            Vec::new()
        };
    }
    let split = Split::new(entries);
    // The newest stays, also when all have it: it is what a new holder is compared with.
    let last = split.main.len() - 1;
    debug_assert_eq!(split.main[last].at, entries[newest].at);
    let first_needed = |holder: &HolderPosition| {
        holder
            .possible
            .iter()
            .filter_map(|position| split.place(position.as_ref()))
            .min()
    };
    let keep_from = holders
        .iter()
        .filter_map(first_needed)
        .min()
        .unwrap_or(last)
        .min(last);

    let mut left = used;
    let mut actions = Vec::new();
    let mut drop = |entry: &SpoolEntry, left: &mut u64| {
        *left -= entry.bytes;
        actions.push(SpoolAction::Drop(entry.at.name.clone()));
    };
    // Off the main chain it is only a stop on the way, for those who are not past it. When room is short they go to
    // the newest without it.
    let stops_at = |entry: &SpoolEntry| {
        let mut places = holders.iter().flat_map(|holder| holder.possible.iter().flatten());
        places.any(|position| position.name < entry.at.name)
    };
    for entry in split.main[..keep_from]
        .iter()
        .chain(split.off.iter().filter(|entry| !stops_at(entry)))
    {
        drop(entry, &mut left);
    }
    for entry in split.off.iter().filter(|entry| stops_at(entry)) {
        if above(left, SOFT_PERCENT, bound) {
            drop(entry, &mut left);
        }
    }
    if !above(left, SOFT_PERCENT, bound) {
        return actions;
    }
    let hard = above(left, HARD_PERCENT, bound);
    let places = holders
        .iter()
        .flat_map(|holder| &holder.possible)
        .filter_map(|at| split.place(at.as_ref()));
    if let Some(run) = best_run(&split.main, keep_from, places, hard) {
        actions.push(SpoolAction::Merge(
            run.iter().map(|entry| entry.at.name.clone()).collect(),
        ));
        return actions;
    }
    if hard {
        let places: Vec<_> = holders
            .iter()
            .filter_map(|holder| Some((holder.holder.as_str(), first_needed(holder)?)))
            .collect();
        actions.extend(give_up(&split.main, &places));
    }
    actions
}

fn above(bytes: u64, percent: u64, bound: u64) -> bool {
    u128::from(bytes) * 100 > u128::from(bound) * u128::from(percent)
}

/// The run of links whose merging may bring most: between two places of holders, of two links at least.
fn best_run<'a, 'b>(
    main: &'b [&'a SpoolEntry],
    keep_from: usize,
    places: impl Iterator<Item = usize>,
    hard: bool,
) -> Option<&'b [&'a SpoolEntry]> {
    let mut cuts = vec![false; main.len() + 1];
    places.for_each(|place| cuts[place] = true);
    if !hard {
        main.iter()
            .enumerate()
            .filter(|(_, entry)| entry.labelled)
            .for_each(|(i, _)| cuts[i + 1] = true);
    }
    let mut best: Option<(u64, &[&SpoolEntry])> = None;
    let mut start = keep_from;
    for end in keep_from + 1..=main.len() {
        if !cuts[end] && end != main.len() {
            continue;
        }
        let run = worth_merging(&main[start..end], hard);
        start = end;
        // What may be saved: all but the longest, when all write the same pages.
        let bytes = |run: &[&SpoolEntry]| -> u64 { run.iter().map(|entry| entry.bytes).sum() };
        let longest = run.iter().map(|entry| entry.bytes).max().unwrap_or(0);
        let saving = bytes(run) - longest;
        if run.len() >= 2 && best.is_none_or(|(most, _)| saving > most) {
            best = Some((saving, run));
        }
    }
    best.map(|(_, run)| run)
}

/// The part of a run that is to be merged now; less than two: none.
fn worth_merging<'a, 'b>(mut run: &'b [&'a SpoolEntry], hard: bool) -> &'b [&'a SpoolEntry] {
    // A full segment is long: first what comes after it becomes one, then the two.
    if run.len() > 2 && run[0].parent.is_none() {
        run = &run[1..];
    }
    if hard {
        return run;
    }
    // A link longer than all after it would be written anew for little.
    while let Some((first, rest)) = run.split_first()
        && first.bytes > rest.iter().map(|entry| entry.bytes).sum()
    {
        run = rest;
    }
    if run.len() < SOFT_MIN_RUN { &[] } else { run }
}

/// Gives up those who are furthest behind, when that frees something; `places` are of those who are not lost.
fn give_up(main: &[&SpoolEntry], places: &[(&str, usize)]) -> Vec<SpoolAction> {
    let last = main.len() - 1;
    let Some(behind) = places.iter().map(|(_, place)| *place).min() else {
        return vec![SpoolAction::Refuse];
    };
    let others = places
        .iter()
        .map(|(_, place)| *place)
        .filter(|place| *place > behind)
        .min();
    let next = others.unwrap_or(last).min(last);
    // All of them need the full one: a new one would not be shorter, and nobody would be helped.
    let all_need_full = others.is_none() && behind == 0 && main[0].parent.is_none();
    if next <= behind || all_need_full {
        return vec![SpoolAction::Refuse];
    }
    let given_up = places.iter().filter(|(_, place)| *place == behind);
    let mut actions: Vec<_> = given_up
        .map(|(holder, _)| SpoolAction::GiveUp {
            holder: (*holder).to_owned(),
        })
        .collect();
    actions.extend(
        main[behind..next]
            .iter()
            .map(|entry| SpoolAction::Drop(entry.at.name.clone())),
    );
    actions
}
