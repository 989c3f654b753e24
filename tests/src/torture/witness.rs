//! What a VM's guests say and its owners report, held against what may be: pure.
//!
//! ```text
//!   each generation's console, in the order of writing --> heard() --+
//!   what owners and the registry report ----------> reported() etc. -+--> a refusal, with the reason
//! ```
//!
//! What it refuses:
//! - a word of a generation after the first word of a higher one, and one generation at two hosts: two VMs ran;
//! - a generation that went on from before what was committed under a lower one: an epoch was lost;
//! - a guest whose count is lower than it was when the checkpoint it goes on from was still to be taken: the same, by the
//!   guest's own word;
//! - a guest that found damage, and heartbeats that are not one after the other.
//!
//! What it never does: no clock, no thread, no file. That what is heard comes in the order of writing is for the reader to
//! see to (`ears.rs`).

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, bail, ensure};

/// How many of the newest generations' marks are kept.
const GENERATIONS_KEPT: u64 = 8;

/// Who speaks: a generation of the VM, on one host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Speaker {
    /// The generation.
    pub generation: u64,
    /// The host.
    pub host: String,
}

impl fmt::Display for Speaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {} at {}", self.generation, self.host)
    }
}

/// A checkpoint of the VM: its generation and epoch, which is the order they were taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    /// The generation.
    pub generation: u64,
    /// The epoch.
    pub epoch: u64,
}

impl Point {
    /// Of a checkpoint's name, `VM/GENERATION/EPOCH`.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        let mut parts = name.rsplit('/');
        let (epoch, generation) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        Some(Self { generation, epoch })
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.generation, self.epoch)
    }
}

/// A heartbeat of `churn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Beat {
    /// Its number.
    pub beat: u64,
    /// Pages written until then.
    pub writes: u64,
}

impl Beat {
    pub(super) fn of(line: &str) -> Result<Option<Self>> {
        let Some(words) = line.strip_prefix("churn ").filter(|l| l.starts_with("beat=")) else {
            return Ok(None);
        };
        let number = |name: &str| {
            let found = words
                .split(' ')
                .find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
            found.and_then(|number| number.parse::<u64>().ok())
        };
        // The last word: without it the line is not whole.
        let (Some(beat), Some(writes), Some(bad), Some(_)) =
            (number("beat"), number("writes"), number("bad"), number("up_ms"))
        else {
            bail!("a torn heartbeat: {line:?}");
        };
        ensure!(bad == 0, "the guest found damage: {line:?}");
        Ok(Some(Self { beat, writes }))
    }
}

#[derive(Debug, Default)]
struct Tongue {
    /// What was said of a line that is not whole yet.
    rest: Vec<u8>,
    /// Whether a whole line was said: the first may be the end of one that another generation began.
    lines: bool,
    first: Option<Beat>,
    last: Option<Beat>,
}

/// One VM's witness.
#[derive(Debug, Default)]
pub struct Witness {
    highest: Option<Speaker>,
    tongues: BTreeMap<u64, Tongue>,
    /// The newest committed checkpoint that was reported of each generation.
    committed: BTreeMap<u64, u64>,
    /// What each generation went on from.
    from: BTreeMap<u64, Point>,
    /// A checkpoint of at least this point was taken after the guest had said this.
    floors: BTreeMap<Point, Beat>,
    beats: u64,
    commits: u64,
}

impl Witness {
    /// The highest generation that was heard, and where.
    #[must_use]
    pub fn highest(&self) -> Option<&Speaker> {
        self.highest.as_ref()
    }

    /// Whether this is the first word of a generation above all that were heard.
    #[must_use]
    pub fn rises(&self, speaker: &Speaker) -> bool {
        self.highest
            .as_ref()
            .is_none_or(|h| speaker.generation > h.generation)
    }

    /// The last whole heartbeat of a generation.
    #[must_use]
    pub fn last_beat(&self, generation: u64) -> Option<Beat> {
        self.tongues.get(&generation)?.last
    }

    /// Heartbeats heard.
    #[must_use]
    pub fn beats(&self) -> u64 {
        self.beats
    }

    /// Commits that were reported, as often as a newer one was.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.commits
    }

    /// What a generation went on from, once that was reported.
    #[must_use]
    pub fn from(&self, generation: u64) -> Option<Point> {
        self.from.get(&generation).copied()
    }

    /// The guest of `speaker` was heard, after all that was given here before.
    ///
    /// # Errors
    /// When that may not be.
    pub fn heard(&mut self, speaker: &Speaker, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if let Some(highest) = &self.highest {
            ensure!(
                speaker.generation >= highest.generation,
                "TWO VMs RAN: {speaker} was heard after {highest}: {:?}",
                String::from_utf8_lossy(bytes)
            );
            ensure!(
                speaker.generation > highest.generation || speaker.host == highest.host,
                "TWO VMs RAN: {speaker}, and {highest}"
            );
        }
        if self.rises(speaker) {
            self.highest = Some(speaker.clone());
            let keep = speaker.generation.saturating_sub(GENERATIONS_KEPT);
            self.floors.retain(|point, _| point.generation >= keep);
            self.tongues.retain(|generation, _| *generation >= keep);
        }
        self.tongues
            .entry(speaker.generation)
            .or_default()
            .rest
            .extend(bytes);
        while let Some(line) = self.next_line(speaker.generation) {
            self.line(speaker, &line)?;
        }
        Ok(())
    }

    fn next_line(&mut self, generation: u64) -> Option<String> {
        let rest = &mut self.tongues.get_mut(&generation)?.rest;
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = rest.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim().to_owned())
    }

    fn line(&mut self, speaker: &Speaker, line: &str) -> Result<()> {
        let Some(tongue) = self.tongues.get_mut(&speaker.generation) else {
            return Ok(());
        };
        let first = !std::mem::replace(&mut tongue.lines, true);
        ensure!(
            !line.starts_with("BAD"),
            "{speaker}: the guest found damage: {line:?}"
        );
        let beat = match Beat::of(line) {
            Ok(beat) => beat,
            Err(error) => bail!("{speaker}: {error}"),
        };
        let Some(beat) = beat else {
            let known = line.starts_with("churn up ") || line.starts_with("churn filled ");
            ensure!(known || first, "{speaker} said what no guest says: {line:?}");
            return Ok(());
        };
        if let Some(last) = tongue.last {
            ensure!(
                beat.beat == last.beat + 1 && beat.writes >= last.writes,
                "{speaker}: after heartbeat {} ({} pages written) came {} ({})",
                last.beat,
                last.writes,
                beat.beat,
                beat.writes
            );
        }
        tongue.last = Some(beat);
        self.beats += 1;
        if tongue.first.is_none() {
            tongue.first = Some(beat);
            self.check_floor(speaker.generation)?;
        }
        Ok(())
    }

    /// The newest checkpoint taken by the owner of this generation is `newest`, and before it was asked its guest had said
    /// `said`. One may be on its way beyond that, which was perhaps taken before; the next was not.
    pub fn taken(&mut self, newest: Point, said: Beat) {
        let after = Point {
            epoch: newest.epoch + 2,
            ..newest
        };
        self.floors.entry(after).or_insert(said);
    }

    /// This checkpoint was reported as committed.
    ///
    /// # Errors
    /// When a later generation went on from before it.
    pub fn committed(&mut self, point: Point) -> Result<()> {
        let known = self.committed.entry(point.generation).or_default();
        if point.epoch > *known {
            *known = point.epoch;
            self.commits += 1;
        }
        self.check_commits()
    }

    /// A generation went on from this checkpoint.
    ///
    /// # Errors
    /// When later ones were committed before it, or it went on from two.
    pub fn went_on(&mut self, generation: u64, from: Point) -> Result<()> {
        ensure!(
            from.generation < generation,
            "generation {generation} went on from {from}, which is no earlier one's"
        );
        let known = *self.from.entry(generation).or_insert(from);
        ensure!(
            known == from,
            "generation {generation} went on from {known}, and from {from}"
        );
        self.check_commits()?;
        self.check_floor(generation)
    }

    fn check_commits(&self) -> Result<()> {
        for (generation, from) in &self.from {
            for (of, epoch) in self.committed.range(..generation) {
                let committed = Point {
                    generation: *of,
                    epoch: *epoch,
                };
                ensure!(
                    committed <= *from,
                    "A COMMITTED EPOCH IS LOST: generation {generation} went on from {from}, and {committed} was committed"
                );
            }
        }
        Ok(())
    }

    /// The newest mark among what a checkpoint stands on: what a generation took after the checkpoint that the next one went
    /// on from is no part of that.
    fn floor(&self, mut from: Point) -> Option<(Point, Beat)> {
        loop {
            let first = Point { epoch: 0, ..from };
            if let Some((point, beat)) = self.floors.range(first..=from).next_back() {
                return Some((*point, *beat));
            }
            from = *self.from.get(&from.generation)?;
        }
    }

    fn check_floor(&self, generation: u64) -> Result<()> {
        let first = self.tongues.get(&generation).and_then(|tongue| tongue.first);
        let (Some(first), Some(from)) = (first, self.from.get(&generation)) else {
            return Ok(());
        };
        let Some((point, floor)) = self.floor(*from) else {
            return Ok(());
        };
        ensure!(
            first.beat > floor.beat && first.writes >= floor.writes,
            "WORK IS LOST: generation {generation} went on from {from} with heartbeat {} ({} pages written), and before {point} \
             was taken the guest had said {} ({})",
            first.beat,
            first.writes,
            floor.beat,
            floor.writes
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(generation: u64, host: &str) -> Speaker {
        Speaker {
            generation,
            host: host.into(),
        }
    }

    fn point(generation: u64, epoch: u64) -> Point {
        Point { generation, epoch }
    }

    fn beat(beat: u64) -> String {
        format!(
            "churn beat={beat} writes={} verified=1 bad=0 regs=1 passes=0 up_ms=5\r\n",
            beat * 10
        )
    }

    /// A guest that was heard in generation 1 up to heartbeat 5, with 1/20 committed.
    fn heard() -> Witness {
        let mut witness = Witness::default();
        witness.heard(&at(1, "a"), b"churn up mib=4 pages=1\r\n").unwrap();
        for n in 1..=5 {
            witness.heard(&at(1, "a"), beat(n).as_bytes()).unwrap();
        }
        witness.committed(point(1, 20)).unwrap();
        witness
    }

    fn refusal(result: Result<()>) -> String {
        result.expect_err("it is refused").to_string()
    }

    #[test]
    fn a_takeover_that_goes_on_from_what_was_committed_is_well() {
        let mut witness = heard();
        witness.taken(point(1, 18), Beat { beat: 3, writes: 30 });
        // The end of a line that generation 1 had begun.
        witness.heard(&at(2, "b"), b"s=0 up_ms=17\n").unwrap();
        witness.heard(&at(2, "b"), beat(4).as_bytes()).unwrap();
        witness.went_on(2, point(1, 20)).unwrap();
        witness.heard(&at(2, "b"), beat(5).as_bytes()).unwrap();
        assert_eq!(witness.highest(), Some(&at(2, "b")));
        assert_eq!((witness.beats(), witness.commits()), (7, 1));
        // A number that no guest ran under is well too.
        witness.committed(point(2, 22)).unwrap();
        witness.heard(&at(5, "a"), beat(6).as_bytes()).unwrap();
        witness.went_on(5, point(2, 22)).unwrap();
    }

    #[test]
    fn a_word_of_a_generation_after_a_higher_ones_is_refused() {
        let mut witness = heard();
        witness.heard(&at(2, "b"), b"c").unwrap();
        let why = refusal(witness.heard(&at(1, "a"), b"c"));
        assert!(
            why.contains("TWO VMs RAN: generation 1 at a was heard after generation 2 at b"),
            "{why}"
        );
    }

    #[test]
    fn one_generation_at_two_hosts_is_refused() {
        let mut witness = heard();
        witness.heard(&at(2, "b"), b"churn").unwrap();
        let why = refusal(witness.heard(&at(2, "a"), b"churn"));
        assert!(why.contains("TWO VMs RAN"), "{why}");
    }

    #[test]
    fn a_committed_epoch_that_is_not_gone_on_from_is_refused_whichever_is_known_first() {
        let mut witness = heard();
        let why = refusal(witness.went_on(2, point(1, 19)));
        assert!(why.contains("A COMMITTED EPOCH IS LOST"), "{why}");
        let mut witness = heard();
        witness.went_on(2, point(1, 20)).unwrap();
        let why = refusal(witness.committed(point(1, 21)));
        assert!(why.contains("went on from 1/20, and 1/21 was committed"), "{why}");
    }

    #[test]
    fn a_count_from_before_the_checkpoint_is_refused_whichever_is_known_first() {
        for reported_first in [true, false] {
            let mut witness = heard();
            witness.taken(point(1, 18), Beat { beat: 4, writes: 40 });
            let why = if reported_first {
                witness.went_on(2, point(1, 20)).unwrap();
                refusal(witness.heard(&at(2, "b"), beat(4).as_bytes()))
            } else {
                witness.heard(&at(2, "b"), beat(4).as_bytes()).unwrap();
                refusal(witness.went_on(2, point(1, 20)))
            };
            assert!(why.contains("WORK IS LOST"), "{why}");
        }
        // The checkpoint after the newest may have been under way when the guest said it.
        let mut witness = heard();
        witness.taken(point(1, 19), Beat { beat: 4, writes: 40 });
        witness.went_on(2, point(1, 20)).unwrap();
        witness.heard(&at(2, "b"), beat(4).as_bytes()).unwrap();
    }

    #[test]
    fn what_an_owner_took_and_nobody_went_on_from_is_no_measure() {
        let mut witness = heard();
        witness.taken(point(1, 20), Beat { beat: 5, writes: 50 });
        witness.heard(&at(2, "b"), beat(3).as_bytes()).unwrap();
        witness.went_on(2, point(1, 20)).unwrap();
        // 1/22, after heartbeat 5, is not among what this stands on.
        witness.went_on(3, point(2, 1)).unwrap();
        witness.heard(&at(3, "a"), beat(4).as_bytes()).unwrap();
        // What the one before the last had said at its begin is.
        witness.taken(point(3, 1), Beat { beat: 4, writes: 40 });
        witness.went_on(4, point(3, 9)).unwrap();
        witness.went_on(5, point(4, 1)).unwrap();
        let why = refusal(witness.heard(&at(5, "b"), beat(4).as_bytes()));
        assert!(why.contains("before 3/3 was taken"), "{why}");
    }

    #[test]
    fn damage_and_heartbeats_out_of_order_are_refused() {
        for words in [
            "BAD page=3 write=2 kind=text why=stamp\n".to_owned(),
            beat(6).replace("bad=0", "bad=1"),
            beat(5),
            beat(7),
            "churn beat=6 writes=60 verified=1\n".to_owned(),
            "churn: ERROR no room\n".to_owned(),
        ] {
            let mut witness = heard();
            assert!(witness.heard(&at(1, "a"), words.as_bytes()).is_err(), "{words}");
        }
    }
}
