//! What is done to one VM's segments so that only what is kept takes room, and no chain is too long: pure.
//!
//! ```text
//! F <- s <- s <- K <- s <- s <- K <- K     K: kept; s: only a link, kept for what stands on it ("slack"); F: slack too
//! \__________ __/    \______ __/
//!   Merge: K is full     Merge: K is a delta of the K before
//! ```
//!
//! - What nothing that is kept stands on is dropped, children first, so that what is left is whole chains at any instant.
//! - Slack is merged into what follows it once it is worth the writing: a run is rewritten when all of it but its
//!   largest segment comes to half of that one, so a byte is rewritten a few times and slack takes at most about half
//!   of what is needed. When room is short, at once.
//! - A chain of more than `max_links` is made shorter: its slack is merged, the largest segment left alone; when there
//!   is none, a kept point in its middle is written as a full segment in place (a fold).
//!
//! Kept whatever the policy says: the newest complete point, everything after it (it may become complete), what is
//! pinned (running restores, transfers, the committed checkpoint of the registry), and what those stand on.

use std::collections::BTreeSet;

use segment::SegmentName;

use super::lineage::Lineage;

/// A run is not merged for fewer links than this, unless room is short.
const WORTHWHILE_LINKS: usize = 8;
/// From this many links on slack is merged, but for its largest segment, though that is not worth it by its bytes.
const MANY_LINKS: usize = 64;

/// What to go by.
#[derive(Debug, Clone, Copy)]
pub struct CollectRules<'a> {
    /// The points that the policy keeps.
    pub kept: &'a BTreeSet<SegmentName>,
    /// What must stay whatever the policy says.
    pub pinned: &'a BTreeSet<SegmentName>,
    /// The most links of a chain, the full segment included; at least 2.
    pub max_links: u32,
    /// Room is short: everything that can be freed is.
    pub short_of_room: bool,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CollectAction {
    /// Nothing kept stands on it.
    Drop(SegmentName),
    /// Write these links, oldest first, as one, in the place of the last; the others are dropped by a later plan.
    Merge(Vec<SegmentName>),
}

/// What is to be done next; empty when nothing is. Do it, and ask again with what is there then.
#[must_use]
pub fn plan_collect(lineage: &Lineage, rules: &CollectRules<'_>) -> Vec<CollectAction> {
    let state = State::new(lineage, rules);
    let drops = state.drops();
    if !drops.is_empty() {
        return drops;
    }
    state
        .worthwhile_run()
        .or_else(|| state.shorter_chain())
        .map(|run| CollectAction::Merge(run.iter().map(|i| lineage.entries()[*i].name.clone()).collect()))
        .into_iter()
        .collect()
}

struct State<'a> {
    lineage: &'a Lineage,
    rules: &'a CollectRules<'a>,
    /// Restore points that stay, and segments that may become some.
    kept: Vec<bool>,
    /// Those, and what they stand on.
    needed: Vec<bool>,
    /// How many needed segments stand directly on each.
    children: Vec<u32>,
}

impl<'a> State<'a> {
    fn new(lineage: &'a Lineage, rules: &'a CollectRules<'a>) -> Self {
        let entries = lineage.entries();
        let newest = lineage.newest_complete();
        let kept: Vec<bool> = entries
            .iter()
            .enumerate()
            .map(|(i, entry)| {
                // Without any complete point nothing is known to be superseded.
                newest.is_none_or(|newest| i >= newest)
                    || rules.kept.contains(&entry.name)
                    || rules.pinned.contains(&entry.name)
            })
            .collect();
        let (mut needed, mut children) = (kept.clone(), vec![0; kept.len()]);
        // Parents come before their children.
        for i in (0..entries.len()).rev() {
            if needed[i]
                && let Some(parent) = lineage.parent(i)
            {
                needed[parent] = true;
                children[parent] += 1;
            }
        }
        Self {
            lineage,
            rules,
            kept,
            needed,
            children,
        }
    }

    fn drops(&self) -> Vec<CollectAction> {
        let unneeded = (0..self.needed.len()).rev().filter(|i| !self.needed[*i]);
        unneeded
            .map(|i| CollectAction::Drop(self.lineage.entries()[i].name.clone()))
            .collect()
    }

    fn bytes(&self, i: usize) -> u64 {
        self.lineage.entries()[i].bytes
    }

    /// Only a link, and of nothing but the next one.
    fn is_slack(&self, i: usize) -> bool {
        self.needed[i] && !self.kept[i] && self.children[i] == 1
    }

    /// The slack right below `end`, oldest first, and `end`; only `end` when there is none.
    fn run_to(&self, end: usize) -> Vec<usize> {
        let mut run = vec![end];
        let mut at = end;
        while let Some(parent) = self.lineage.parent(at)
            && self.is_slack(parent)
        {
            run.push(parent);
            at = parent;
        }
        run.reverse();
        run
    }

    /// What is worth merging of the oldest run that has something.
    fn worthwhile_run(&self) -> Option<Vec<usize>> {
        // What is below a gap cannot be merged into a whole.
        let ends = (0..self.needed.len())
            .filter(|i| self.needed[*i] && !self.is_slack(*i) && self.lineage.links(*i) > 0);
        ends.map(|end| self.run_to(end))
            .find_map(|run| self.worthwhile_part(&run))
    }

    fn worthwhile_part(&self, run: &[usize]) -> Option<Vec<usize>> {
        let (_, slack) = run.split_last()?;
        let all: u64 = slack.iter().map(|i| self.bytes(*i)).sum();
        let largest = slack.iter().map(|i| self.bytes(*i)).max()?;
        let worth_it = slack.len() >= WORTHWHILE_LINKS && (all - largest).saturating_mul(2) >= largest;
        if worth_it || self.rules.short_of_room {
            return Some(run.to_vec());
        }
        self.slack_without_largest(slack)
            .filter(|part| part.len() >= MANY_LINKS)
    }

    /// What makes the longest chain shorter, when it is too long.
    fn shorter_chain(&self) -> Option<Vec<usize>> {
        let longest = (0..self.needed.len())
            .filter(|i| self.needed[*i])
            .max_by_key(|i| self.lineage.links(*i))?;
        let max_links = self.rules.max_links.max(2);
        if self.lineage.links(longest) <= max_links {
            return None;
        }
        let mut chain = vec![longest];
        while let Some(parent) = chain.last().and_then(|i| self.lineage.parent(*i)) {
            chain.push(parent);
        }
        chain.reverse();
        if let Some(run) = self.slack_without_largest(&chain) {
            return Some(run);
        }
        // No slack: so that half of the links are left, the chain begins anew there.
        let begin = chain.len() - (max_links as usize / 2).max(1);
        Some(chain[..=begin].to_vec())
    }

    /// The longest run of slack in `chain` whose largest segment is left out, when it has at least two links.
    fn slack_without_largest(&self, chain: &[usize]) -> Option<Vec<usize>> {
        let slack = chain.split(|i| !self.is_slack(*i));
        let cut = slack.flat_map(|run| {
            let largest = run.iter().max_by_key(|i| self.bytes(**i));
            run.split(move |i| Some(i) == largest)
        });
        let longest = cut.max_by_key(|run| run.len())?;
        (longest.len() >= 2).then(|| longest.to_vec())
    }
}
