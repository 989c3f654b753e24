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

/// Holders that answered, and holders that did not; and the global store, when it was needed.
#[derive(Debug, Clone, Default)]
pub(super) struct Answers {
    pub(super) heard: Vec<(String, Holding)>,
    pub(super) failed: Vec<(String, String)>,
    pub(super) global: Look,
}

/// What the global store has: only ever another copy, which proves nothing of what was committed.
#[derive(Debug, Clone, Default)]
pub(super) enum Look {
    #[default]
    NotAsked,
    Asked,
    Heard(Option<SegmentBrief>),
    Failed(String),
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
        let best = self.best();
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

    /// The newest whole one; of a holder rather than of the global store.
    fn best(&self) -> Option<&SegmentBrief> {
        let global = match &self.global {
            Look::Heard(brief) => brief.as_ref(),
            Look::NotAsked | Look::Asked | Look::Failed(_) => None,
        };
        let held = self.heard.iter().filter_map(|(_, h)| h.newest.as_ref());
        newest(global.into_iter().chain(held))
    }

    /// The newest of those that answered, whatever it proves.
    pub(super) fn newest(&self) -> Option<Choice> {
        self.best().map(|tip| self.choice(tip))
    }

    /// The answer of the global store.
    pub(super) fn looked(&mut self, result: Result<Option<SegmentBrief>, String>) {
        self.global = match result {
            Ok(brief) => Look::Heard(brief),
            Err(why) => Look::Failed(why),
        };
    }

    /// What is lost with a choice that only the global store has, when the registry knows of more.
    pub(super) fn global_behind(&self, choice: &Choice, record: &VmRecord) -> Option<String> {
        let held = self.heard.iter().filter_map(|(_, h)| h.newest.as_ref());
        let of_holder = held.into_iter().any(|brief| brief.held() == choice.tip.held());
        let committed = record.newest.as_ref().filter(|_| !of_holder)?;
        let behind = committed.name.position() > choice.tip.name.position();
        behind.then(|| {
            format!(
                "the registry has {} as committed, and the global store has no more than {}",
                committed.name, choice.tip.name
            )
        })
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
        let mut each: Vec<_> = self
            .failed
            .iter()
            .map(|(holder, why)| format!("{holder} ({why})"))
            .collect();
        if let Look::Failed(why) = &self.global {
            each.push(format!("the global store ({why})"));
        }
        match each.is_empty() {
            true => "none".to_owned(),
            false => each.join("; "),
        }
    }
}

fn newest<'a>(briefs: impl Iterator<Item = &'a SegmentBrief>) -> Option<&'a SegmentBrief> {
    briefs.max_by_key(|b| b.name.position())
}
