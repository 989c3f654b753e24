//! Whether an answer is of the registry that was asked before, and not from its past.
//!
//! A registry's history is a number that only rises. An etcd that was restored from a snapshot, or a registry file that
//! was put back, begins again below what was seen: what it says of owners and holders is over, and acting on it could
//! undo a failover. It is refused until a person says that it is meant.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use minicbor::{Decode, Encode};

use super::RegistryError;

/// Where an answer stands in the history of a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Stamp {
    /// Which registry: drawn when it was made.
    #[n(0)]
    pub registry: u64,
    /// Raised by every change.
    #[n(1)]
    pub revision: u64,
    /// Raised by every election of an etcd; 0 of an embedded one.
    #[n(2)]
    pub term: u64,
}

/// The newest that was seen of a registry.
#[derive(Debug, Default)]
// Read before and written after every request; held for moments.
pub struct Seen(Mutex<Option<Stamp>>);

impl Seen {
    /// Beginning with what was seen by an earlier process.
    #[must_use]
    pub fn from(stamp: Option<Stamp>) -> Self {
        Self(Mutex::new(stamp))
    }

    fn newest(&self) -> MutexGuard<'_, Option<Stamp>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest. What is asked after this was taken must not be answered from before it.
    #[must_use]
    pub fn floor(&self) -> Option<Stamp> {
        *self.newest()
    }

    /// Takes note of an answer to a question that was asked when `floor` was the newest.
    ///
    /// # Errors
    /// [`RegistryError::Past`] when it is of another registry or from before `floor`.
    pub fn note(&self, address: &str, floor: Option<Stamp>, stamp: Stamp) -> Result<(), RegistryError> {
        if let Some(floor) = floor {
            let past = |why: String| {
                Err(RegistryError::Past {
                    address: address.to_owned(),
                    why,
                })
            };
            if floor.registry != stamp.registry {
                return past(format!(
                    "it is registry {:016x}, and this was registry {:016x} until now",
                    stamp.registry, floor.registry
                ));
            }
            if stamp.revision < floor.revision || stamp.term < floor.term {
                return past(format!(
                    "it is at revision {} of term {}, and revision {} of term {} was seen before",
                    stamp.revision, stamp.term, floor.revision, floor.term
                ));
            }
        }
        let mut newest = self.newest();
        match &mut *newest {
            Some(known) if known.registry == stamp.registry => {
                known.revision = known.revision.max(stamp.revision);
                known.term = known.term.max(stamp.term);
            }
            // Another one was noted first, by a question that was asked at the same time.
            Some(_) => {}
            None => *newest = Some(stamp),
        }
        Ok(())
    }
}

/// The most bytes of a remembered stamp.
const MAX_FILE_BYTES: u64 = 200;

/// What an earlier process wrote down; none when there is nothing, or nothing that can be read.
#[must_use]
pub fn recall(path: &Path) -> Option<Stamp> {
    let text = crate::regular::read_text(path, MAX_FILE_BYTES).ok()?;
    let mut words = text.split_whitespace();
    let registry = u64::from_str_radix(words.next()?, 16).ok()?;
    let revision = words.next()?.parse().ok()?;
    let term = words.next()?.parse().ok()?;
    Some(Stamp {
        registry,
        revision,
        term,
    })
}

/// The text that [`recall`] reads.
#[must_use]
pub fn written(stamp: Stamp) -> String {
    format!("{:016x} {} {}\n", stamp.registry, stamp.revision, stamp.term)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(registry: u64, revision: u64, term: u64) -> Stamp {
        Stamp {
            registry,
            revision,
            term,
        }
    }

    #[test]
    fn an_answer_from_the_past_is_refused() {
        let seen = Seen::default();
        seen.note("r", seen.floor(), at(1, 10, 2)).unwrap();
        let early = seen.floor();
        seen.note("r", seen.floor(), at(1, 20, 3)).unwrap();
        // Asked before the newest was seen: it may be older than that.
        seen.note("r", early, at(1, 15, 2)).unwrap();
        assert_eq!(seen.floor(), Some(at(1, 20, 3)));
        for past in [at(1, 19, 3), at(1, 30, 2), at(2, 30, 9)] {
            let refused = seen.note("r", seen.floor(), past).unwrap_err();
            assert!(matches!(refused, RegistryError::Past { .. }), "{refused}");
        }
        assert_eq!(seen.floor(), Some(at(1, 20, 3)));
    }

    #[test]
    fn what_was_seen_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seen");
        assert_eq!(recall(&path), None);
        std::fs::write(&path, written(at(u64::MAX, 7, 2))).unwrap();
        assert_eq!(recall(&path), Some(at(u64::MAX, 7, 2)));
        std::fs::write(&path, "nonsense").unwrap();
        assert_eq!(recall(&path), None);
    }
}
