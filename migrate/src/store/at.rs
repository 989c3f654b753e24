//! Which restore point a person means: by time, by age, or by number.
//!
//! ```text
//! 2026-11-24T09:30:00Z   the newest at or before it     -10m, -2h30m   so long ago, the same
//! 42                     epoch 42 (of the newest generation that has it)       3/42   of generation 3
//! ```

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use segment::{Epoch, Generation, SegmentName, VmId};

use super::{GUEST_LABEL, Point};

/// A moment in a VM's life, as a person writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Moment {
    /// A time, in nanoseconds of Unix time.
    Time(u64),
    /// So long before now.
    Ago(Duration),
    /// A checkpoint by its numbers.
    Number(Option<Generation>, Epoch),
    /// A label, of a person or of the guest.
    Label(String),
}

/// What a label is written behind.
const LABEL: &str = "label=";

/// Why there is no such restore point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MomentError {
    /// The text is none.
    #[error(
        "{0:?} is no moment: write a time like 2026-11-24T09:30:00Z (with an offset or Z), an age like -10m, a checkpoint \
         like 42 or 3/42, or label= and a label"
    )]
    Text(String),
    /// Nothing is that old.
    #[error("{vm} has no restore point at or before {wanted}: the oldest is {oldest}")]
    TooEarly {
        /// The VM.
        vm: VmId,
        /// The time, as text.
        wanted: String,
        /// The oldest point, with its time.
        oldest: String,
    },
    /// The checkpoint is not a restore point here.
    #[error("{vm} has no complete checkpoint {wanted} here")]
    NoNumber {
        /// The VM.
        vm: VmId,
        /// As it was written.
        wanted: String,
    },
    /// Nothing is called so.
    #[error("{vm} has no restore point here with the label {wanted:?}")]
    NoLabel {
        /// The VM.
        vm: VmId,
        /// The label.
        wanted: String,
    },
    /// There is no point at all.
    #[error("{0} has no restore point here")]
    Nothing(VmId),
}

impl FromStr for Moment {
    type Err = MomentError;

    fn from_str(text: &str) -> Result<Self, MomentError> {
        let bad = || MomentError::Text(text.chars().take(80).collect());
        if let Some(label) = text.strip_prefix(LABEL) {
            return Ok(Self::Label(label.to_owned()));
        }
        if let Some(age) = text.strip_prefix('-') {
            let age = humantime::parse_duration(age).map_err(|_| bad())?;
            return Ok(Self::Ago(age));
        }
        let number = |text: &str| text.parse::<u64>().ok();
        if let Some(epoch) = number(text) {
            return Ok(Self::Number(None, Epoch(epoch)));
        }
        if let Some((generation, epoch)) = text.split_once('/')
            && let (Some(generation), Some(epoch)) = (number(generation), number(epoch))
        {
            return Ok(Self::Number(Some(Generation(generation)), Epoch(epoch)));
        }
        // A time without an offset would mean another moment on another host.
        let at: jiff::Timestamp = text.parse().map_err(|_| bad())?;
        u64::try_from(at.as_nanosecond())
            .map(Self::Time)
            .map_err(|_| bad())
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(at) => f.write_str(&time(*at)),
            Self::Ago(age) => write!(f, "{} ago", humantime::format_duration(*age)),
            Self::Number(Some(generation), epoch) => write!(f, "{generation}/{epoch}"),
            Self::Number(None, epoch) => write!(f, "{epoch}"),
            Self::Label(label) => write!(f, "{LABEL}{label}"),
        }
    }
}

/// A point in time, in nanoseconds of Unix time, as text.
fn time(unix_ns: u64) -> String {
    jiff::Timestamp::from_nanosecond(unix_ns.into())
        .map_or_else(|_| format!("{unix_ns} ns"), |at| format!("{at:.3}"))
}

impl Moment {
    /// Now, in nanoseconds of Unix time.
    #[must_use]
    pub fn now() -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
    }

    /// The restore point that is meant, of all of `vm`'s: the newest taken at or before a time, the one with the
    /// numbers, or the newest with the label. Of several taken at one time the newest by its numbers.
    ///
    /// # Errors
    /// When there is none, saying what there is.
    pub fn choose<'a>(
        &self,
        vm: &VmId,
        points: &'a [Point],
        now_unix_ns: u64,
    ) -> Result<&'a Point, MomentError> {
        let newest = |fits: &dyn Fn(&Point) -> bool| {
            let fitting = points.iter().filter(|point| fits(point));
            fitting.max_by_key(|point| point.name.position())
        };
        let until = match self {
            Self::Number(generation, epoch) => {
                let fits = |name: &SegmentName| {
                    name.epoch == *epoch && generation.is_none_or(|g| name.generation == g)
                };
                return newest(&|point| fits(&point.name)).ok_or_else(|| MomentError::NoNumber {
                    vm: vm.clone(),
                    wanted: self.to_string(),
                });
            }
            Self::Label(wanted) => {
                // A person's first: a guest must not lead them elsewhere by taking their words.
                let person = newest(&|point| point.label.as_deref() == Some(wanted));
                let guest = |point: &Point| {
                    let label = point
                        .label
                        .as_deref()
                        .and_then(|label| label.strip_prefix(GUEST_LABEL));
                    label == Some(wanted)
                };
                return person
                    .or_else(|| newest(&guest))
                    .ok_or_else(|| MomentError::NoLabel {
                        vm: vm.clone(),
                        wanted: wanted.clone(),
                    });
            }
            Self::Time(at) => *at,
            Self::Ago(age) => {
                let age = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
                now_unix_ns.saturating_sub(age)
            }
        };
        let oldest = points.iter().min_by_key(|point| point.created_unix_ns);
        let Some(oldest) = oldest else {
            return Err(MomentError::Nothing(vm.clone()));
        };
        // By time first: what was taken latest before the moment; by position among equals.
        let fitting = points.iter().filter(|point| point.created_unix_ns <= until);
        fitting
            .max_by_key(|point| (point.created_unix_ns, point.name.position()))
            .ok_or_else(|| MomentError::TooEarly {
                vm: vm.clone(),
                wanted: time(until),
                oldest: format!("{}, taken at {}", oldest.name, time(oldest.created_unix_ns)),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn point(generation: u64, epoch: u64, seconds: u64) -> Point {
        Point {
            name: SegmentName::new(VmId::new("web").unwrap(), Generation(generation), Epoch(epoch)),
            created_unix_ns: seconds * SECOND,
            label: None,
        }
    }

    #[test]
    fn the_newest_at_or_before_is_taken() {
        let vm = VmId::new("web").unwrap();
        let points = [
            point(1, 1, 100),
            point(1, 2, 200),
            point(2, 1, 300),
            point(2, 2, 400),
        ];
        let chosen = |text: &str| {
            let moment: Moment = text.parse().unwrap();
            moment
                .choose(&vm, &points, 500 * SECOND)
                .map(|point| (point.name.generation.0, point.name.epoch.0))
        };
        assert_eq!(chosen("1970-01-01T00:03:20Z"), Ok((1, 2)));
        assert_eq!(chosen("1970-01-01T01:03:19+01:00"), Ok((1, 1)));
        assert_eq!(chosen("-100s"), Ok((2, 2)));
        assert_eq!(chosen("-1m 41s"), Ok((2, 1)));
        assert_eq!(chosen("2"), Ok((2, 2)));
        assert_eq!(chosen("1/2"), Ok((1, 2)));
        let refused = [
            chosen("1970-01-01T00:00:01Z"),
            chosen("-1h"),
            chosen("3"),
            chosen("3/1"),
        ];
        for refused in refused {
            assert!(refused.unwrap_err().to_string().contains("web"));
        }
        for text in [
            "",
            "-",
            "yesterday",
            "2026-11-24",
            "2026-11-24T09:30:00",
            "1/x",
            "-5",
            "1969-01-01T00:00:00Z",
        ] {
            assert!(text.parse::<Moment>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_label_names_the_newest_that_has_it() {
        let vm = VmId::new("web").unwrap();
        let labelled = |epoch, label: &str| Point {
            label: Some(label.to_owned()),
            ..point(1, epoch, epoch)
        };
        let points = [
            labelled(1, "before the upgrade"),
            labelled(2, "guest: saved"),
            labelled(3, "before the upgrade"),
            labelled(4, "guest: before the upgrade"),
            point(1, 5, 5),
        ];
        let chosen = |text: &str| {
            let moment: Moment = text.parse().unwrap();
            moment.choose(&vm, &points, 0).map(|point| point.name.epoch.0)
        };
        assert_eq!(chosen("label=before the upgrade"), Ok(3));
        assert_eq!(chosen("label=saved"), Ok(2));
        assert_eq!(chosen("label=guest: saved"), Ok(2));
        for none in ["label=", "label=before"] {
            let error = chosen(none).unwrap_err().to_string();
            assert!(error.contains("no restore point here with the label"), "{error}");
        }
    }

    /// Against looking at every point in turn.
    #[test]
    fn a_clock_that_was_set_back_is_no_obstacle() {
        let vm = VmId::new("web").unwrap();
        let points = [
            point(1, 1, 100),
            point(1, 2, 300),
            point(1, 3, 200),
            point(1, 4, 250),
        ];
        for until in 0..400 {
            let chosen = Moment::Time(until * SECOND).choose(&vm, &points, 0).ok();
            let mut expected: Option<&Point> = None;
            for point in points.iter().filter(|p| p.created_unix_ns <= until * SECOND) {
                if expected.is_none_or(|e| e.created_unix_ns <= point.created_unix_ns) {
                    expected = Some(point);
                }
            }
            assert_eq!(chosen, expected);
        }
    }
}
