//! Carries the [plan](super::collect) out: drops what nothing needs, merges what is only a link.
//!
//! Safe at every instant: a merge publishes its result, durably, before what went into it can be dropped; drops go
//! children first, each only when nothing stands on it and nobody has leased it *at that moment*, whatever the plan
//! saw. A checkpoint that arrives meanwhile leases its parent, and is not in any plan before it is complete.

use std::collections::BTreeSet;
use std::sync::Arc;

use segment::{KeyId, SegmentName, VmId};

use super::collect::{CollectAction, CollectRules, plan_collect};
use super::merge::Others;
use super::{FsStore, KeepPolicy, Lineage, Pace, StoreError, lock};

/// Rounds of one call: a bound for a store in which nothing ever fits.
const MAX_ROUNDS: usize = 1000;

/// How to collect.
#[derive(Debug, Clone)]
pub struct CollectOptions {
    /// The most links of a chain, the full segment included.
    pub max_links: u32,
    /// Room is short: free everything that can be.
    pub short_of_room: bool,
    /// The zstd level of what is merged.
    pub level: i32,
    /// How fast to read.
    pub pace: Pace,
}

/// What a collection did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collected {
    /// Segments dropped.
    pub dropped: u64,
    /// Bytes they took.
    pub freed_bytes: u64,
    /// Merges, folds among them.
    pub merges: u64,
    /// Something is left for later, because a restore reads the store now.
    pub postponed: bool,
}

impl FsStore {
    /// Raised by every change of the segments of `vm`.
    #[must_use]
    pub fn revision(&self, vm: &VmId) -> u64 {
        self.index().revision(vm)
    }

    /// Whether [`Self::collect`] would do something. Touches no file.
    #[must_use]
    pub fn wants_collecting(
        &self,
        vm: &VmId,
        policy: &KeepPolicy,
        pinned: &BTreeSet<SegmentName>,
        options: &CollectOptions,
    ) -> bool {
        !self.index().keeps_all(vm) && !self.plan_collect(vm, policy, pinned, options).is_empty()
    }

    /// Drops and merges of `vm` what neither `policy` nor `pinned`, a lease or a reader needs. The newest complete
    /// checkpoint and what came after it always stay. What is encrypted with a key that is not here is dropped as anything,
    /// and never merged.
    ///
    /// # Errors
    /// What the disk says, and when a segment to be merged is damaged. What was not done is done by a later call.
    pub fn collect(
        self: &Arc<Self>,
        vm: &VmId,
        policy: &KeepPolicy,
        pinned: &BTreeSet<SegmentName>,
        options: &CollectOptions,
    ) -> Result<Collected, StoreError> {
        self.check_writable()?;
        let mut done = Collected::default();
        for _ in 0..MAX_ROUNDS {
            if self.index().keeps_all(vm) || options.pace.is_stopped() {
                break;
            }
            let run = {
                // Nothing is quarantined between the plan and its drops: that could make an older point the newest.
                let _one = lock(&self.housekeeping);
                let mut actions = self.plan_collect(vm, policy, pinned, options);
                match actions.pop() {
                    None => break,
                    Some(CollectAction::Merge(run)) => run,
                    Some(drop @ CollectAction::Drop(_)) => {
                        actions.push(drop);
                        if !self.drop_planned(vm, actions, &mut done)? {
                            break;
                        }
                        continue;
                    }
                }
            };
            if !self.merge_planned(&run, options)? {
                done.postponed = true;
                break;
            }
            done.merges += 1;
        }
        Ok(done)
    }

    fn plan_collect(
        &self,
        vm: &VmId,
        policy: &KeepPolicy,
        pinned: &BTreeSet<SegmentName>,
        options: &CollectOptions,
    ) -> Vec<CollectAction> {
        let (lineage, leased) = {
            let index = self.index();
            (Lineage::new(index.entries(vm)), index.pinned(vm))
        };
        let kept = policy.keep(&lineage.points());
        let pinned = pinned.union(&leased).cloned().collect();
        let rules = CollectRules {
            kept: &kept,
            pinned: &pinned,
            max_links: options.max_links,
            short_of_room: options.short_of_room,
        };
        let mut actions = plan_collect(&lineage, &rules);
        let missing = self.missing_key(&lineage, &actions);
        match missing {
            None => drop(lock(&self.unmergeable).remove(vm)),
            Some(key) => {
                // It stays as it is: whoever has the key can merge it.
                actions.clear();
                if lock(&self.unmergeable).insert(vm.clone(), key) != Some(key) {
                    tracing::info!(%vm, %key, "links that are encrypted are not merged: their key is not here");
                }
            }
        }
        actions
    }

    /// The key that the plan's merge needs and that is not here.
    fn missing_key(&self, lineage: &Lineage, actions: &[CollectAction]) -> Option<KeyId> {
        let keys = self.keys();
        let Some(CollectAction::Merge(run)) = actions.last() else {
            return None;
        };
        let mut entries = lineage.entries().iter().filter(|entry| run.contains(&entry.name));
        entries.find_map(|entry| entry.missing_key(&keys))
    }

    /// Drops, in order; whether any could be.
    fn drop_planned(
        &self,
        vm: &VmId,
        actions: Vec<CollectAction>,
        done: &mut Collected,
    ) -> Result<bool, StoreError> {
        let Some(_alone) = self.without_readers()? else {
            done.postponed = true;
            return Ok(false);
        };
        let gate = self.gate(vm);
        let _open = lock(&gate);
        let mut folders = BTreeSet::new();
        let mut dropped = 0;
        for action in actions {
            let CollectAction::Drop(name) = action else {
                continue;
            };
            // Out of the index first: from here on nobody can lease it or begin to build on it.
            let Some(entry) = self.index().remove_unneeded(&name) else {
                continue;
            };
            let path = self.segment_path(&name);
            if let Err(error) = self.disk.unlink(&path) {
                self.index().insert(entry);
                return Err(self.disk_error(error));
            }
            tracing::debug!(segment = %name, bytes = entry.bytes, "dropped: nothing needs it");
            folders.extend(path.parent().map(ToOwned::to_owned));
            dropped += 1;
            done.freed_bytes += entry.bytes;
        }
        // After a power cut some may be back: whole segments that the next plan drops again.
        for folder in folders {
            self.disk.sync_dir(&folder).map_err(|e| self.disk_error(e))?;
        }
        done.dropped += dropped;
        Ok(dropped > 0)
    }

    /// Merges; false when a reader came in the way.
    fn merge_planned(
        self: &Arc<Self>,
        run: &[SegmentName],
        options: &CollectOptions,
    ) -> Result<bool, StoreError> {
        let mut failed = None;
        let publish = || match self.without_readers() {
            Ok(alone) => alone,
            Err(error) => {
                failed = Some(error);
                None
            }
        };
        let merged = self.rewrite(run, options.level, &options.pace, publish, Others::Kept);
        if let Some(error) = failed {
            return Err(error);
        }
        match merged {
            Ok(entry) => {
                if let (Some(entry), Some(first)) = (&entry, run.first()) {
                    tracing::debug!(%first, into = %entry.name, links = run.len(), bytes = entry.bytes, "merged");
                }
                Ok(entry.is_some())
            }
            // Something was merged or removed by hand meanwhile: the next plan sees what is left.
            Err(StoreError::NotARun { .. } | StoreError::NotHeld { .. }) => Ok(true),
            Err(e) => Err(e),
        }
    }
}
