//! Which restore points a policy keeps: pure.
//!
//! ```text
//! last=50,hourly=24,daily=7
//!  |       |         the newest point of each of the 7 newest days that have one
//!  |       the newest point of each of the 24 newest hours that have one
//!  the 50 newest points
//! ```
//!
//! Points are ordered by generation and epoch, never by their times: a clock that was set back reorders nothing. Hours,
//! days (from midnight), weeks (from Monday), months and years are those of UTC. The rules add up: a point is kept when
//! any rule keeps it, when a person has labelled it, and when it is the newest. Of those that the guest itself has
//! labelled the newest [`GUEST_KEPT`] are kept so: a guest must not fill the disks of its holders.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::str::FromStr;

use segment::SegmentName;

/// What a label begins with that the guest gave. No person's does.
pub const GUEST_LABEL: &str = "guest: ";
/// How many of the points that a guest has labelled are kept whatever the policy says: the newest.
pub const GUEST_KEPT: usize = 16;
/// The most points one rule may keep.
const MAX_RULE: u32 = 1_000_000;
/// The longest policy, in bytes.
pub(super) const MAX_POLICY_BYTES: usize = 256;

const NS_PER_HOUR: u64 = 3_600_000_000_000;
const HOURS_PER_DAY: u64 = 24;

/// A checkpoint that can be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its name.
    pub name: SegmentName,
    /// When the guest was stopped for it, in nanoseconds of Unix time.
    pub created_unix_ns: u64,
    /// What a person called it, or, behind [`GUEST_LABEL`], the guest.
    pub label: Option<String>,
}

/// Who gave a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Person,
    Guest,
}

impl Point {
    fn labelled_by(&self) -> Option<By> {
        let label = self.label.as_deref()?;
        Some(if label.starts_with(GUEST_LABEL) {
            By::Guest
        } else {
            By::Person
        })
    }
}

/// How many restore points of which kind are kept. Without any rule, all are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct KeepPolicy {
    counts: [u32; RULES.len()],
}

/// A rule of a policy, in the order they are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Last,
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
}

const RULES: [(Rule, &str); 6] = [
    (Rule::Last, "last"),
    (Rule::Hourly, "hourly"),
    (Rule::Daily, "daily"),
    (Rule::Weekly, "weekly"),
    (Rule::Monthly, "monthly"),
    (Rule::Yearly, "yearly"),
];

/// Why a text is no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Nothing is in it.
    #[error("an empty policy keeps nothing: write one like last=50,hourly=24,daily=7, or all")]
    Empty,
    /// Longer than any policy.
    #[error("a policy of {0} bytes: the most is {MAX_POLICY_BYTES}")]
    TooLong(usize),
    /// A part is not a rule.
    #[error(
        "{0:?} is no rule of a policy: write RULE=NUMBER with last, hourly, daily, weekly, monthly or yearly, like \
         last=50,hourly=24,daily=7, or all"
    )]
    Rule(String),
    /// A number is out of range.
    #[error("{0:?}: the number has to be from 1 to {MAX_RULE}")]
    Number(String),
    /// A rule is there twice.
    #[error("the rule {0} is there twice")]
    Twice(&'static str),
}

impl KeepPolicy {
    /// Keeps every point.
    pub const ALL: Self = Self {
        counts: [0; RULES.len()],
    };

    /// Whether every point is kept.
    #[must_use]
    pub fn is_all(&self) -> bool {
        *self == Self::ALL
    }

    /// The points that are kept, of all of one VM's. `points` may be in any order.
    #[must_use]
    pub fn keep(&self, points: &[Point]) -> BTreeSet<SegmentName> {
        if self.is_all() {
            return points.iter().map(|point| point.name.clone()).collect();
        }
        let mut newest_first: Vec<&Point> = points.iter().collect();
        newest_first.sort_by_key(|point| std::cmp::Reverse(point.name.position()));
        let mut kept: BTreeSet<SegmentName> = newest_first
            .iter()
            .enumerate()
            .filter(|(i, point)| *i == 0 || point.labelled_by() == Some(By::Person))
            .map(|(_, point)| point.name.clone())
            .collect();
        let by_guest = newest_first
            .iter()
            .filter(|point| point.labelled_by() == Some(By::Guest));
        kept.extend(by_guest.take(GUEST_KEPT).map(|point| point.name.clone()));
        for ((rule, _), count) in RULES.iter().zip(self.counts) {
            let mut seen = HashSet::new();
            for point in &newest_first {
                if seen.len() >= count as usize {
                    break;
                }
                if seen.insert(rule.bucket(point)) {
                    kept.insert(point.name.clone());
                }
            }
        }
        kept
    }
}

impl Rule {
    /// Points of one bucket stand for each other.
    fn bucket(self, point: &Point) -> (u64, u64) {
        let hours = point.created_unix_ns / NS_PER_HOUR;
        let days = hours / HOURS_PER_DAY;
        let date = || {
            // Every u64 of nanoseconds is a date: they end in 2554.
            let at = jiff::Timestamp::from_nanosecond(point.created_unix_ns.into()).unwrap_or_default();
            at.to_zoned(jiff::tz::TimeZone::UTC).date()
        };
        match self {
            Self::Last => (point.name.generation.0, point.name.epoch.0),
            Self::Hourly => (hours, 0),
            Self::Daily => (days, 0),
            // 1970 began on a Thursday, three days after a Monday.
            Self::Weekly => ((days + 3) / 7, 0),
            Self::Monthly => (
                date().year().unsigned_abs().into(),
                date().month().unsigned_abs().into(),
            ),
            Self::Yearly => (date().year().unsigned_abs().into(), 0),
        }
    }
}

impl FromStr for KeepPolicy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        if text.len() > MAX_POLICY_BYTES {
            return Err(PolicyError::TooLong(text.len()));
        }
        let text = text.trim();
        if text == "all" {
            return Ok(Self::ALL);
        }
        if text.is_empty() {
            return Err(PolicyError::Empty);
        }
        let mut policy = Self::ALL;
        for part in text.split(',').map(str::trim) {
            let unknown = || PolicyError::Rule(part.to_owned());
            let (rule, number) = part.split_once('=').ok_or_else(unknown)?;
            let at = RULES
                .iter()
                .position(|(_, name)| *name == rule.trim())
                .ok_or_else(unknown)?;
            let number = number
                .trim()
                .parse()
                .ok()
                .filter(|number| (1..=MAX_RULE).contains(number))
                .ok_or_else(|| PolicyError::Number(part.to_owned()))?;
            if policy.counts[at] != 0 {
                return Err(PolicyError::Twice(RULES[at].1));
            }
            policy.counts[at] = number;
        }
        Ok(policy)
    }
}

impl fmt::Display for KeepPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_all() {
            return f.write_str("all");
        }
        let mut comma = "";
        for ((_, name), count) in RULES.iter().zip(self.counts).filter(|(_, count)| *count > 0) {
            write!(f, "{comma}{name}={count}")?;
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use segment::{Epoch, Generation, VmId};

    use super::*;

    fn point(generation: u64, epoch: u64, created_unix_ns: u64, label: Option<&str>) -> Point {
        Point {
            name: SegmentName::new(VmId::new("web").unwrap(), Generation(generation), Epoch(epoch)),
            created_unix_ns,
            label: label.map(str::to_owned),
        }
    }

    /// By the words of the manual: groups of points, the newest of each, the newest so many groups.
    fn oracle(points: &[Point], counts: [u32; 6]) -> BTreeSet<SegmentName> {
        let date = |p: &Point| {
            let at = jiff::Timestamp::from_nanosecond(p.created_unix_ns.into()).unwrap();
            at.to_zoned(jiff::tz::TimeZone::UTC)
        };
        let group = |rule: usize, p: &Point| match rule {
            0 => p.name.to_string(),
            1 => date(p).strftime("%Y-%m-%d %H").to_string(),
            2 => date(p).strftime("%Y-%m-%d").to_string(),
            3 => date(p).strftime("%G-W%V").to_string(),
            4 => date(p).strftime("%Y-%m").to_string(),
            _ => date(p).strftime("%Y").to_string(),
        };
        let mut kept: BTreeSet<_> = points
            .iter()
            .filter(|p| p.label.as_deref() == Some("mine"))
            .map(|p| p.name.clone())
            .collect();
        let mut guests: Vec<_> = points
            .iter()
            .filter(|p| p.label.as_deref() == Some("guest: its own"))
            .map(|p| p.name.clone())
            .collect();
        guests.sort_by_key(SegmentName::position);
        kept.extend(guests.into_iter().rev().take(GUEST_KEPT));
        kept.extend(
            points
                .iter()
                .map(|p| p.name.clone())
                .max_by_key(SegmentName::position),
        );
        for (rule, count) in counts.into_iter().enumerate() {
            let mut groups: BTreeMap<String, SegmentName> = BTreeMap::new();
            for p in points {
                let newest = groups.entry(group(rule, p)).or_insert_with(|| p.name.clone());
                if p.name.position() > newest.position() {
                    *newest = p.name.clone();
                }
            }
            let mut newest: Vec<_> = groups.into_values().collect();
            newest.sort_by_key(SegmentName::position);
            kept.extend(newest.into_iter().rev().take(count as usize));
        }
        kept
    }

    proptest! {
        #[test]
        fn what_is_kept_is_what_the_manual_says(
            counts in prop::array::uniform6(0_u32..6),
            // Hours apart, and some back in time.
            steps in prop::collection::vec((-3_i64..200, any::<bool>(), 0_u8..20), 1..120),
        ) {
            prop_assume!(counts.iter().any(|count| *count > 0));
            let mut hours: i64 = 480_000;
            let (mut generation, mut points) = (1, Vec::new());
            for (epoch, (step, next_generation, label)) in steps.into_iter().enumerate() {
                hours += step * i64::from(step % 3 == 0) + i64::from(step % 5 == 0);
                generation += u64::from(next_generation && epoch % 7 == 0);
                let at = hours as u64 * NS_PER_HOUR / 2 + 7;
                let label = match label {
                    0 => Some("mine"),
                    1..8 => Some("guest: its own"),
                    _ => None,
                };
                points.push(point(generation, epoch as u64, at, label));
            }
            let policy = KeepPolicy { counts };
            prop_assert_eq!(policy.keep(&points), oracle(&points, counts));
            points.reverse();
            prop_assert_eq!(policy.keep(&points), oracle(&points, counts));
            prop_assert_eq!(policy.to_string().parse::<KeepPolicy>().unwrap(), policy);
        }
    }

    #[test]
    fn a_policy_is_read_and_written() {
        let policy: KeepPolicy = "daily=7, last=50,hourly=24".parse().unwrap();
        assert_eq!(policy.to_string(), "last=50,hourly=24,daily=7");
        assert!("all".parse::<KeepPolicy>().unwrap().is_all());
        for bad in [
            "",
            "last",
            "last=0",
            "last=-1",
            "last=1,last=2",
            "often=3",
            "last=9999999",
            "last=1,,daily=1",
        ] {
            let refused = bad.parse::<KeepPolicy>().unwrap_err().to_string();
            assert!(!refused.is_empty(), "{bad}");
        }
        assert!(matches!(
            "x".repeat(300).parse::<KeepPolicy>(),
            Err(PolicyError::TooLong(300))
        ));
    }

    #[test]
    fn everything_is_kept_without_a_rule_and_nothing_of_nothing() {
        let points = [point(1, 1, 0, None), point(1, 2, 0, None)];
        assert_eq!(KeepPolicy::ALL.keep(&points).len(), 2);
        assert_eq!("last=1".parse::<KeepPolicy>().unwrap().keep(&[]).len(), 0);
    }
}
