//! What the holders' answers prove: pure.
//!
//! Let `best` be the newest whole checkpoint among the answers. A holder *counts* when it remembers what it has ever
//! acknowledged, and that is no more than `best`. A committed checkpoint was acknowledged by `ack_quorum` holders, so
//! when `holders - ack_quorum + 1` holders count, one of them acknowledged it, and it is no newer than `best`. The
//! registry's record is a second, independent floor: it lags, but what it names was committed.

use segment::SegmentName;

use super::{Holding, seals_needed};
use crate::registry::VmRecord;
use crate::wire::SegmentBrief;

/// Holders that answered, and holders that did not.
#[derive(Debug, Clone, Default)]
pub(super) struct Answers {
    pub(super) heard: Vec<(String, Holding)>,
    pub(super) failed: Vec<(String, String)>,
}

/// A checkpoint to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) tip: Box<SegmentBrief>,
    /// Where its links may be: those that have all of it first.
    pub(super) from: Vec<String>,
}

/// What follows from the answers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// More answers may still decide it.
    Wait,
    /// Too few holders answered to fence the old owner.
    TooFew,
    /// There never was anything.
    Nothing,
    /// Nothing that was committed can be newer.
    Go(Choice),
    /// Nobody has all of this one, but together they may: it has to be tried. When it fails, what is missing, and
    /// what could be run at that loss.
    Assemble {
        choice: Choice,
        why: String,
        best: Option<Choice>,
    },
    /// What was committed is not here, or may not be.
    Loss { why: String, best: Option<Choice> },
}

impl Answers {
    pub(super) fn verdict(&self, record: &VmRecord) -> Verdict {
        let holders = record.holders.len();
        let needed = seals_needed(holders, record.ack_quorum as usize);
        let open = holders.saturating_sub(self.heard.len() + self.failed.len());
        let best = newest(self.heard.iter().filter_map(|(_, h)| h.newest.as_ref()));
        if self.heard.len() >= needed && self.proves(best, record, needed) {
            return match best {
                Some(tip) => Verdict::Go(self.choice(tip)),
                None if open > 0 => Verdict::Wait,
                None => Verdict::Nothing,
            };
        }
        if open > 0 {
            return Verdict::Wait;
        }
        if self.heard.len() < needed {
            return Verdict::TooFew;
        }
        let why = self.missing(best, record);
        let best = best.map(|tip| self.choice(tip));
        let dangling = newest(self.heard.iter().filter_map(|(_, h)| h.dangling.as_ref()));
        match dangling {
            Some(tip) if self.proves(Some(tip), record, needed) => Verdict::Assemble {
                choice: self.choice(tip),
                why,
                best,
            },
            _ => Verdict::Loss { why, best },
        }
    }

    /// The newest of those that answered, whatever it proves.
    pub(super) fn newest(&self) -> Option<Choice> {
        newest(self.heard.iter().filter_map(|(_, h)| h.newest.as_ref())).map(|tip| self.choice(tip))
    }

    /// Whether nothing newer than `best` can have been committed.
    fn proves(&self, best: Option<&SegmentBrief>, record: &VmRecord, needed: usize) -> bool {
        let within = |name: &SegmentName| best.is_some_and(|b| name.position() <= b.name.position());
        let counts = |holding: &&Holding| holding.forgot.is_none() && holding.had.as_ref().is_none_or(within);
        let counting = self.heard.iter().map(|(_, h)| h).filter(counts).count();
        counting >= needed && record.newest.as_ref().is_none_or(|held| within(&held.name))
    }

    /// What `best` lacks, in words.
    fn missing(&self, best: Option<&SegmentBrief>, record: &VmRecord) -> String {
        let beyond = |name: &SegmentName| best.is_none_or(|b| name.position() > b.name.position());
        let mut why = Vec::new();
        if let Some(held) = record.newest.as_ref().filter(|held| beyond(&held.name)) {
            why.push(format!("the registry has {} as committed", held.name));
        }
        for (holder, holding) in &self.heard {
            if let Some(forgot) = &holding.forgot {
                why.push(format!("{holder} cannot tell what it had: {forgot}"));
            } else if let Some(had) = holding.had.as_ref().filter(|had| beyond(had)) {
                why.push(format!(
                    "{holder} once stored {had} and has lost it or a part of it"
                ));
            }
        }
        why.join("; ")
    }

    fn choice(&self, tip: &SegmentBrief) -> Choice {
        let has = |holding: &Holding| holding.newest.as_ref().is_some_and(|b| b.held() == tip.held());
        let (all, some): (Vec<_>, Vec<_>) = self.heard.iter().partition(|(_, holding)| has(holding));
        Choice {
            tip: Box::new(tip.clone()),
            from: all.into_iter().chain(some).map(|(h, _)| h.clone()).collect(),
        }
    }

    /// Who was not reached, and why.
    pub(super) fn failures(&self) -> String {
        if self.failed.is_empty() {
            return "none".to_owned();
        }
        let each: Vec<_> = self
            .failed
            .iter()
            .map(|(holder, why)| format!("{holder} ({why})"))
            .collect();
        each.join("; ")
    }
}

fn newest<'a>(briefs: impl Iterator<Item = &'a SegmentBrief>) -> Option<&'a SegmentBrief> {
    briefs.max_by_key(|b| b.name.position())
}
