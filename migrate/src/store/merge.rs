//! One segment of several, in place.
//!
//! ```text
//! a <- b <- c        write temp(a+b+c), named c    sync    rename over c    sync folder    unlink a, b
//! crash before the rename: a, b, c as before (temp is removed at the next open)
//! crash after it:          c holds all of a..c; a and b are whole segments that nothing needs, to be dropped later
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;

use segment::SegmentName;

use super::incoming::{Incoming, Quota, check_free};
use super::{Entry, FsStore, StoreError, lock};

impl FsStore {
    /// Merges links that follow each other into one segment, which has the name and identity of the newest; the others
    /// are removed, except those something outside the run builds on. A run that begins with a full segment becomes a
    /// full segment (a fold). `names` may be in any order; one alone is left as it is.
    ///
    /// The result may go beyond the budget while the run is still there.
    ///
    /// # Errors
    /// [`StoreError::NotARun`], [`StoreError::NotHeld`], [`StoreError::Merge`], [`StoreError::DiskFull`], and what the
    /// disk says. Until the result has its name everything stays as it was.
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
        self.check_writable()?;
        let run = self.run(names)?;
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            return Err(StoreError::NothingToMerge);
        };
        if run.len() == 1 {
            return Ok(Some(last.clone()));
        }
        check_free(self, run.iter().map(|entry| entry.bytes).sum())?;
        let readers = run
            .iter()
            .map(|entry| self.open_segment(&entry.name))
            .collect::<Result<Vec<_>, _>>()?;
        let mut incoming = Incoming::new(self, &last.name, 0, Quota::Exempt, last.name.generation)?;
        let merged = segment::merge(&readers, &mut incoming, level).map(|(_, summary)| summary);
        if let Err(source) = merged {
            return Err(incoming.take_failure().unwrap_or_else(|| StoreError::Merge {
                first: first.name.clone(),
                last: last.name.clone(),
                source: Box::new(source),
            }));
        }
        let entry = Entry::of(&incoming.reader()?);
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
        // without a durable name the old ones must stay.
        if let Err(error) = self.disk.sync_parent(&path) {
            tracing::warn!(%error, segment = %last.name, "merged, and the old segments are kept");
            return Ok(Some(entry));
        }
        self.remove_merged(&run);
        Ok(Some(entry))
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
