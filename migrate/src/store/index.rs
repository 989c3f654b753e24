//! What a store holds, in memory: pure, no file is touched here.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use segment::{CheckpointId, Epoch, Generation, Kind, SegmentName, VmId};

use super::{ChainError, Entry, HeldVm, MAX_CHAIN_LINKS};

/// The entries, the bytes they and the reservations take, and the promises.
#[derive(Debug, Default)]
pub(super) struct Index {
    vms: BTreeMap<VmId, BTreeMap<(Generation, Epoch), Entry>>,
    /// Bytes of the entries, and of files that are there and not understood.
    used: u64,
    /// Bytes promised to segments on their way in.
    reserved: u64,
    promises: HashMap<VmId, Generation>,
    /// The newest ever acknowledged, and whether a file says so too.
    acked: HashMap<VmId, (SegmentName, bool)>,
    /// Folders whose own names are durable.
    folders: HashSet<PathBuf>,
    /// How many entries name each as their parent.
    children: HashMap<SegmentName, u32>,
    /// How many leases are on each.
    pins: HashMap<SegmentName, u32>,
    /// VMs of which nothing may be dropped: whether a merge is durable is not known.
    keep_all: HashSet<VmId>,
    /// How often the entries of each VM changed.
    revisions: HashMap<VmId, u64>,
}

impl Index {
    pub(super) fn get(&self, name: &SegmentName) -> Option<&Entry> {
        self.vms.get(&name.vm)?.get(&name.position())
    }

    /// Puts an entry in; what had its name is replaced.
    pub(super) fn insert(&mut self, entry: Entry) {
        self.used = self.used.saturating_add(entry.bytes);
        self.changed(&entry.name.vm);
        if let Some((parent, _)) = entry.parent() {
            *self.children.entry(parent.clone()).or_default() += 1;
        }
        let old = self
            .vms
            .entry(entry.name.vm.clone())
            .or_default()
            .insert(entry.name.position(), entry);
        if let Some(old) = old {
            self.left(&old);
        }
    }

    fn changed(&mut self, vm: &VmId) {
        *self.revisions.entry(vm.clone()).or_default() += 1;
    }

    pub(super) fn revision(&self, vm: &VmId) -> u64 {
        self.revisions.get(vm).copied().unwrap_or(0)
    }

    /// Undoes the counting of an entry that is gone.
    fn left(&mut self, old: &Entry) {
        self.used = self.used.saturating_sub(old.bytes);
        self.changed(&old.name.vm);
        if let Some((parent, _)) = old.parent() {
            fewer(&mut self.children, parent);
        }
    }

    pub(super) fn remove(&mut self, name: &SegmentName) -> Option<Entry> {
        let segments = self.vms.get_mut(&name.vm)?;
        let old = segments.remove(&name.position())?;
        if segments.is_empty() {
            self.vms.remove(&name.vm);
        }
        self.left(&old);
        Some(old)
    }

    /// Takes an entry out, unless something stands on it or it is leased.
    pub(super) fn remove_unneeded(&mut self, name: &SegmentName) -> Option<Entry> {
        if self.children.contains_key(name) || self.pins.contains_key(name) {
            return None;
        }
        self.remove(name)
    }

    pub(super) fn pin(&mut self, names: &[SegmentName]) {
        for name in names {
            *self.pins.entry(name.clone()).or_default() += 1;
        }
    }

    pub(super) fn unpin(&mut self, names: &[SegmentName]) {
        names.iter().for_each(|name| fewer(&mut self.pins, name));
    }

    /// What of `vm` is leased.
    pub(super) fn pinned(&self, vm: &VmId) -> BTreeSet<SegmentName> {
        let of_vm = self.pins.keys().filter(|name| name.vm == *vm);
        of_vm.cloned().collect()
    }

    pub(super) fn keep_all(&mut self, vm: VmId) {
        self.keep_all.insert(vm);
    }

    pub(super) fn keeps_all(&self, vm: &VmId) -> bool {
        self.keep_all.contains(vm)
    }

    /// Counts a file that takes room and is no entry.
    pub(super) fn add_foreign(&mut self, bytes: u64) {
        self.used = self.used.saturating_add(bytes);
    }

    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Sets `more` bytes aside, or says how many are taken.
    pub(super) fn reserve(&mut self, more: u64, budget: Option<u64>) -> Result<(), u64> {
        let taken = self.used.saturating_add(self.reserved);
        if budget.is_some_and(|budget| taken.saturating_add(more) > budget) {
            return Err(taken);
        }
        self.reserved = self.reserved.saturating_add(more);
        Ok(())
    }

    pub(super) fn release(&mut self, bytes: u64) {
        debug_assert!(bytes <= self.reserved, "more is released than was reserved");
        self.reserved = self.reserved.saturating_sub(bytes);
    }

    pub(super) fn vms(&self) -> Vec<VmId> {
        self.vms.keys().cloned().collect()
    }

    pub(super) fn entries(&self, vm: &VmId) -> Vec<Entry> {
        self.vms
            .get(vm)
            .map(|segments| segments.values().cloned().collect())
            .unwrap_or_default()
    }

    /// How many entries there are.
    pub(super) fn count(&self) -> usize {
        self.vms.values().map(BTreeMap::len).sum()
    }

    /// What is held of `vm`, in sum.
    pub(super) fn sum(&self, vm: &VmId) -> HeldVm {
        let Some(segments) = self.vms.get(vm) else {
            return HeldVm::default();
        };
        let newest = segments.values().rev().find_map(|entry| {
            let links = self.walk(&entry.name).ok()?.len();
            Some((entry.clone(), u32::try_from(links).unwrap_or(u32::MAX)))
        });
        HeldVm {
            segments: segments.len(),
            bytes: segments.values().map(|entry| entry.bytes).sum(),
            newest,
        }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Entry> {
        self.vms.values().flat_map(BTreeMap::values)
    }

    pub(super) fn promised(&self, vm: &VmId) -> Generation {
        self.promises.get(vm).copied().unwrap_or_default()
    }

    pub(super) fn set_promise(&mut self, vm: VmId, generation: Generation) {
        self.promises.insert(vm, generation);
    }

    pub(super) fn acked(&self, vm: &VmId) -> Option<&SegmentName> {
        self.acked.get(vm).map(|(name, _)| name)
    }

    /// Whether there is a file with the mark of `vm`.
    pub(super) fn has_mark(&self, vm: &VmId) -> bool {
        self.acked.get(vm).is_some_and(|(_, on_disk)| *on_disk)
    }

    pub(super) fn set_acked(&mut self, name: SegmentName, on_disk: bool) {
        self.acked.insert(name.vm.clone(), (name, on_disk));
    }

    pub(super) fn forget_acked(&mut self, vm: &VmId) {
        self.acked.remove(vm);
    }

    pub(super) fn has_folder(&self, path: &Path) -> bool {
        self.folders.contains(path)
    }

    pub(super) fn add_folder(&mut self, path: PathBuf) {
        self.folders.insert(path);
    }

    /// The links of `tip`, full first.
    pub(super) fn chain(&self, tip: &SegmentName) -> Result<Vec<Entry>, ChainError> {
        let mut links = self.walk(tip)?;
        links.reverse();
        Ok(links.into_iter().cloned().collect())
    }

    /// The newest entry of `vm` whose chain is whole.
    pub(super) fn newest_complete(&self, vm: &VmId) -> Option<&Entry> {
        self.vms
            .get(vm)?
            .values()
            .rev()
            .find(|entry| self.walk(&entry.name).is_ok())
    }

    /// The links of `tip`, tip first.
    fn walk(&self, tip: &SegmentName) -> Result<Vec<&Entry>, ChainError> {
        let mut links: Vec<&Entry> = Vec::new();
        let mut seen = HashSet::new();
        let (mut link, mut wanted): (&SegmentName, Option<CheckpointId>) = (tip, None);
        loop {
            let wanted_by = || links.last().map_or(tip, |child| &child.name).clone();
            let Some(entry) = self.get(link) else {
                return Err(ChainError::Missing {
                    link: link.clone(),
                    wanted_by: wanted_by(),
                });
            };
            if let Some(wanted) = wanted
                && wanted != entry.checkpoint
            {
                let held = entry.checkpoint;
                return Err(ChainError::WrongCheckpoint {
                    link: link.clone(),
                    wanted_by: wanted_by(),
                    wanted,
                    held,
                });
            }
            if !seen.insert(link) {
                return Err(ChainError::Cycle {
                    tip: tip.clone(),
                    link: link.clone(),
                });
            }
            if links.len() >= MAX_CHAIN_LINKS {
                return Err(ChainError::TooLong {
                    tip: tip.clone(),
                    max: MAX_CHAIN_LINKS,
                });
            }
            links.push(entry);
            match &entry.kind {
                Kind::Full => return Ok(links),
                Kind::Delta {
                    parent,
                    parent_checkpoint,
                } => (link, wanted) = (parent, Some(*parent_checkpoint)),
            }
        }
    }
}

/// Counts one down; what comes to nothing is taken out.
fn fewer(counts: &mut HashMap<SegmentName, u32>, name: &SegmentName) {
    if let Some(count) = counts.get_mut(name) {
        *count -= 1;
        if *count == 0 {
            counts.remove(name);
        }
    }
}
