//! Which pages changed: KVM's log united with the pages the monitor wrote itself and with what a failed
//! checkpoint gave back.
//!
//! Reading KVM's log clears it (rule 4), so whatever is collected here and then not stored must come back through
//! [`DirtyTracker::put_back`].

use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::kvm::{self, KvmError};
use crate::memory::{GuestRam, PAGE_BYTES, Slot};

/// The changed pages since the last collection.
#[derive(Debug)]
pub struct DirtyTracker {
    slots: Vec<Slot>,
    /// One bit a page of address space 0, in words of 64; a slot begins at a whole word.
    words: Vec<u64>,
    /// Scratch for one slot's log.
    log: Vec<u64>,
    /// Reads and clears are two steps (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
    manual_protect: bool,
}

impl DirtyTracker {
    /// A tracker for the slots of `ram`, nothing in it.
    #[must_use]
    pub fn new(ram: &GuestRam, manual_protect: bool) -> Self {
        let words = |pages: u64| pages.div_ceil(64) as usize;
        let largest = ram.slots().iter().map(Slot::pages).max().unwrap_or(0);
        Self {
            slots: ram.slots().to_vec(),
            words: vec![0; words(ram.pages())],
            log: vec![0; words(largest)],
            manual_protect,
        }
    }

    /// Adds what KVM's log and the monitor's own bitmap hold, and clears both.
    ///
    /// Call it with the guest stopped to get a set that belongs to one instant, or with the guest running to get
    /// one that errs on the side of too many.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]; what was added so far stays.
    pub fn collect(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<(), KvmError> {
        for slot in &self.slots {
            let count = slot.pages().div_ceil(64) as usize;
            let log = &mut self.log[..count];
            kvm::get_dirty_log(vm, slot.id, log).map_err(KvmError::ioctl(
                "KVM_GET_DIRTY_LOG",
                format!("memory slot {}", slot.id),
            ))?;
            if self.manual_protect && log.iter().any(|&word| word != 0) {
                kvm::clear_dirty_log(vm, slot.id, slot.pages(), log).map_err(KvmError::ioctl(
                    "KVM_CLEAR_DIRTY_LOG",
                    format!("memory slot {}", slot.id),
                ))?;
            }
            let first = (slot.first_page / 64) as usize;
            for (word, new) in self.words[first..first + count].iter_mut().zip(log.iter()) {
                *word |= new;
            }
        }
        self.collect_own(ram);
        Ok(())
    }

    /// Adds and clears the pages the monitor wrote itself.
    fn collect_own(&mut self, ram: &GuestRam) {
        for (slot, region) in self.slots.iter().zip(ram.memory().iter()) {
            debug_assert_eq!(slot.guest_address, region.start_addr().0);
            let first = (slot.first_page / 64) as usize;
            let own = region.get_mmap().bitmap().get_and_reset();
            for (word, new) in self.words[first..].iter_mut().zip(own) {
                *word |= new;
            }
        }
    }

    /// Adds pages of a checkpoint that could not be stored.
    pub fn put_back(&mut self, pages: impl Iterator<Item = u64>) {
        for page in pages {
            if let Some(word) = self.words.get_mut((page / 64) as usize) {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Moves the set out, ascending, to the end of `pages`, and leaves it empty.
    pub fn take(&mut self, mut each: impl FnMut(u64)) {
        for (index, word) in self.words.iter_mut().enumerate() {
            let mut bits = std::mem::take(word);
            while bits != 0 {
                each(index as u64 * 64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }
}

/// The page size KVM logs in is ours.
const _: () = assert!(PAGE_BYTES == 4096);

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn own_writes_and_put_back_pages_are_in_the_set() {
        let ram = GuestRam::new(4 << 30).unwrap();
        let mut dirty = DirtyTracker::new(&ram, false);
        ram.memory()
            .write_slice(&[1; 5000], GuestAddress(4096 * 10 + 4000))
            .unwrap();
        ram.memory()
            .write_obj(7u8, GuestAddress(crate::layout::HIGH_RAM_START))
            .unwrap();
        dirty.collect_own(&ram);
        dirty.put_back([3, 64, u64::MAX].into_iter());
        assert_eq!(dirty.count(), 6);
        let mut pages = Vec::new();
        dirty.take(|page| pages.push(page));
        assert_eq!(pages, vec![3, 10, 11, 12, 64, 786_432][..pages.len()].to_vec());
        assert_eq!(pages.len(), 6);
        dirty.collect_own(&ram);
        assert_eq!(dirty.count(), 0, "a set is handed out once");
    }
}
