//! One segment of several, in place.
//!
//! ```text
//! a <- b <- c        write temp(a+b+c), named c    sync    rename over c    sync folder    unlink a, b
//! crash before the rename: a, b, c as before (temp is removed at the next open)
//! crash after it:          c holds all of a..c; a and b are whole segments that nothing needs, to be dropped later
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;

use segment::{Keyring, ReadAt, SegmentName, SegmentReader};

use super::incoming::{Incoming, Quota, check_free};
use super::pace::{Pace, Paced};
use super::{Entry, FsStore, StoreError, lock};
use crate::keyfile::random_salt;

/// The most segments that are merged at once: each is an open file and a frame in memory.
const MAX_PARTS: usize = 128;

/// What becomes of the run's segments but the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Others {
    /// They go, unless something else stands on them.
    Removed,
    /// They stay: they are points of their own, or the collector's to drop.
    Kept,
}

/// One input of a merge.
enum Part {
    Stored(SegmentName, Paced<File>),
    /// Several, merged already, and not published.
    Merged(Box<Incoming>),
}

impl Part {
    fn name(&self) -> &SegmentName {
        match self {
            Self::Stored(name, _) => name,
            Self::Merged(incoming) => incoming.name(),
        }
    }

    fn open<'a>(
        &'a self,
        pace: &Pace,
        keys: &Keyring,
    ) -> Result<SegmentReader<Box<dyn ReadAt + 'a>>, StoreError> {
        let source: Box<dyn ReadAt + 'a> = match self {
            Self::Stored(_, file) => Box::new(file),
            Self::Merged(incoming) => Box::new(pace.of(incoming.file())),
        };
        SegmentReader::open_with(source, keys).map_err(|source| StoreError::Damaged {
            name: self.name().clone(),
            source,
        })
    }
}

impl FsStore {
    /// Merges links that follow each other into one segment, which has the name and identity of the newest; the others
    /// are removed, except those something outside the run builds on. A run that begins with a full segment becomes a
    /// full segment (a fold). `names` may be in any order; one alone is left as it is.
    ///
    /// The result is encrypted with the first of the store's keys, if there is one. It may go beyond the budget while the run
    /// is still there.
    ///
    /// # Errors
    /// [`StoreError::NotARun`], [`StoreError::NotHeld`], [`StoreError::NoKey`], [`StoreError::Merge`],
    /// [`StoreError::DiskFull`], and what the disk says. Until the result has its name everything stays as it was.
    pub fn merge_into_newest(
        self: &Arc<Self>,
        names: &[SegmentName],
        level: i32,
    ) -> Result<Entry, StoreError> {
        let merged = self.merge_unless(names, level, || Some(()))?;
        merged.ok_or(StoreError::NothingToMerge)
    }

    /// The same, if `publish` still agrees when the result is ready: what it returns is held until the run is
    /// replaced. `None`: it did not, and everything is as it was.
    pub(crate) fn merge_unless<G>(
        self: &Arc<Self>,
        names: &[SegmentName],
        level: i32,
        publish: impl FnOnce() -> Option<G>,
    ) -> Result<Option<Entry>, StoreError> {
        self.rewrite(names, level, &Pace::unlimited(), publish, Others::Removed)
    }

    /// Writes the chain of `tip` as one full segment in its place. What it stood on stays, for whatever else stands on
    /// it: the [collector](Self::collect) removes what nothing needs.
    ///
    /// # Errors
    /// [`StoreError::Chain`] when it is not whole; else as [`Self::merge_into_newest`].
    pub fn fold(self: &Arc<Self>, tip: &SegmentName, level: i32, pace: &Pace) -> Result<Entry, StoreError> {
        let chain = self.chain(tip).map_err(|source| StoreError::Chain {
            tip: tip.clone(),
            source: Box::new(source),
        })?;
        let names: Vec<_> = chain.into_iter().map(|entry| entry.name).collect();
        let folded = self.rewrite(&names, level, pace, || Some(()), Others::Kept)?;
        folded.ok_or(StoreError::NothingToMerge)
    }

    /// Writes a run as one segment in the place of its newest.
    pub(super) fn rewrite<G>(
        self: &Arc<Self>,
        names: &[SegmentName],
        level: i32,
        pace: &Pace,
        publish: impl FnOnce() -> Option<G>,
        others: Others,
    ) -> Result<Option<Entry>, StoreError> {
        self.check_writable()?;
        let run = self.run(names)?;
        let Some(last) = run.last() else {
            return Err(StoreError::NothingToMerge);
        };
        if run.len() == 1 {
            return Ok(Some(last.clone()));
        }
        self.check_keys(&run)?;
        check_free(self, run.iter().map(|entry| entry.bytes).sum())?;
        let parts = run
            .iter()
            .map(|entry| self.part(&entry.name, pace))
            .collect::<Result<Vec<_>, _>>()?;
        let mut incoming = self.merge_parts(parts, last, level, pace)?;
        let entry = {
            // What takes the place of a state is read back whole first: there is no other copy of it here afterwards.
            let reader = incoming.reader_at(pace)?;
            let damaged = |source| StoreError::Damaged {
                name: last.name.clone(),
                source,
            };
            reader.verify().map_err(damaged)?;
            Entry::of(&reader)
        };
        let to_error = |e| self.disk_error(e);
        incoming.temp().sync().map_err(to_error)?;

        let gate = self.gate(&last.name.vm);
        let _open = lock(&gate);
        let Some(_agreed) = publish() else { return Ok(None) };
        self.check_unchanged(&run)?;
        let path = self.segment_path(&last.name);
        {
            // File and entry change together, for `open_raw`.
            let mut index = self.index();
            incoming.temp().rename_over(&path).map_err(to_error)?;
            index.insert(entry.clone());
        }
        // The point of no return: the newest now holds the run, so nothing below is a failure of the merge. But
        // without a durable name the old ones must stay, until the store is opened again.
        if let Err(error) = self.disk.sync_parent(&path) {
            tracing::warn!(%error, segment = %last.name, "merged, and the old segments are kept");
            self.index().keep_all(last.name.vm.clone());
            return Ok(Some(entry));
        }
        match others {
            Others::Removed => self.remove_merged(&run),
            Others::Kept => {}
        }
        Ok(Some(entry))
    }

    /// Refuses a run that cannot be read.
    fn check_keys(&self, run: &[Entry]) -> Result<(), StoreError> {
        let keys = self.keys();
        for entry in run {
            if let Some(key) = entry.missing_key(&keys) {
                return Err(StoreError::NoKey {
                    name: entry.name.clone(),
                    key,
                });
            }
        }
        Ok(())
    }

    fn part(&self, name: &SegmentName, pace: &Pace) -> Result<Part, StoreError> {
        let (file, _) = self.open_raw(name)?;
        Ok(Part::Stored(name.clone(), pace.of(file)))
    }

    /// Merges the parts into one that is not published. Many are merged in groups first, so that few files are open
    /// and little memory is taken at a time.
    fn merge_parts(
        self: &Arc<Self>,
        mut parts: Vec<Part>,
        last: &Entry,
        level: i32,
        pace: &Pace,
    ) -> Result<Incoming, StoreError> {
        while parts.len() > MAX_PARTS {
            let mut merged = Vec::with_capacity(parts.len().div_ceil(MAX_PARTS));
            let mut rest = parts.into_iter().peekable();
            while rest.peek().is_some() {
                let group: Vec<Part> = rest.by_ref().take(MAX_PARTS).collect();
                merged.push(match <[Part; 1]>::try_from(group) {
                    Ok([alone]) => alone,
                    Err(group) => Part::Merged(Box::new(self.merge_group(&group, level, pace)?)),
                });
            }
            parts = merged;
        }
        let incoming = self.merge_group(&parts, level, pace)?;
        debug_assert_eq!(incoming.name(), &last.name);
        Ok(incoming)
    }

    fn merge_group(
        self: &Arc<Self>,
        group: &[Part],
        level: i32,
        pace: &Pace,
    ) -> Result<Incoming, StoreError> {
        let (Some(first), Some(last)) = (group.first(), group.last()) else {
            return Err(StoreError::NothingToMerge);
        };
        let (first, last) = (first.name().clone(), last.name().clone());
        let keys = self.keys();
        let readers = group
            .iter()
            .map(|part| part.open(pace, &keys))
            .collect::<Result<Vec<_>, _>>()?;
        let mut incoming = Incoming::new(self, &last, 0, Quota::Exempt, last.generation)?;
        let merged = match keys.first() {
            Some(key) => segment::merge_encrypted(&readers, &mut incoming, level, key, random_salt()),
            None => segment::merge(&readers, &mut incoming, level),
        };
        match merged {
            Ok(_) => Ok(incoming),
            Err(source) => Err(incoming.take_failure().unwrap_or_else(|| StoreError::Merge {
                first,
                last,
                source: Box::new(source),
            })),
        }
    }

    /// The entries of `names`, oldest first, checked to be links that follow each other.
    fn run(&self, names: &[SegmentName]) -> Result<Vec<Entry>, StoreError> {
        let mut run = Vec::with_capacity(names.len());
        for name in names {
            let held = self.get(name);
            run.push(held.ok_or_else(|| StoreError::NotHeld {
                name: name.clone(),
                dir: self.dir.clone(),
            })?);
        }
        run.sort_by(|a, b| a.name.cmp(&b.name));
        for pair in run.windows(2) {
            let [older, newer] = [&pair[0], &pair[1]];
            if newer.parent() != Some((&older.name, older.checkpoint)) {
                let why = format!("{} does not build on {}", newer.name, older.name);
                return Err(StoreError::NotARun {
                    first: older.name.clone(),
                    last: newer.name.clone(),
                    why,
                });
            }
        }
        Ok(run)
    }

    fn check_unchanged(&self, run: &[Entry]) -> Result<(), StoreError> {
        let index = self.index();
        let Some(changed) = run.iter().find(|entry| index.get(&entry.name) != Some(*entry)) else {
            return Ok(());
        };
        Err(StoreError::NotARun {
            first: run[0].name.clone(),
            last: run[run.len() - 1].name.clone(),
            why: format!("{} was changed or removed meanwhile: try again", changed.name),
        })
    }

    /// Removes all but the newest, and what others build on. The gate is held.
    fn remove_merged(&self, run: &[Entry]) {
        let Some((_, old)) = run.split_last() else { return };
        let newest = &run[old.len()].name;
        let branches: BTreeSet<SegmentName> = {
            let index = self.index();
            let outside = |entry: &&Entry| !run.iter().any(|link| link.name == entry.name);
            index
                .all()
                .filter(outside)
                .filter_map(|entry| Some(entry.parent()?.0.clone()))
                .collect()
        };
        // A link someone builds on needs all the links before it too.
        let keep = old
            .iter()
            .rposition(|entry| branches.contains(&entry.name))
            .map_or(0, |last| last + 1);
        for entry in &old[keep..] {
            if let Err(error) = self.unlink(&entry.name) {
                tracing::warn!(%error, segment = %entry.name, into = %newest, "merged, and could not be removed");
            }
        }
        let folders: BTreeSet<_> = old
            .iter()
            .filter_map(|e| Some(self.segment_path(&e.name).parent()?.to_owned()))
            .collect();
        for folder in folders {
            if let Err(error) = self.disk.sync_dir(&folder) {
                tracing::warn!(%error, "removed segments may come back after a power cut");
            }
        }
    }
}
