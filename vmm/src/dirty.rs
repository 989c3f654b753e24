//! Which pages changed: KVM's log united with the pages the monitor wrote itself and with what a failed
//! checkpoint gave back.
//!
//! Reading KVM's log clears it (rule 4), so whatever is collected here and then not stored must come back through
//! [`DirtyTracker::put_back`].

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::VmFd;
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::kvm::{self, KvmError};
use crate::memory::{GuestRam, PAGE_BYTES, Slot};

/// Pages a word of a bitmap stands for.
const WORD_PAGES: usize = 64;

/// The pages of one region that the monitor wrote itself: a bit a page, and above it a bit a word, so that collecting a
/// few pages of a large guest does not look at all of its words while the guest stands still.
#[derive(Debug, Default)]
pub struct OwnWrites {
    words: Box<[AtomicU64]>,
    /// Bit `n % 64` of word `n / 64`: word `n` of `words` may be other than zero.
    summary: Box<[AtomicU64]>,
    pages: usize,
}

impl OwnWrites {
    /// For a region of so many bytes, nothing written.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let zeros = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        let pages = bytes.div_ceil(PAGE_BYTES);
        let words = pages.div_ceil(WORD_PAGES);
        Self {
            pages,
            words: zeros(words),
            summary: zeros(words.div_ceil(64)),
        }
    }

    /// Gives out each word that is not zero, ascending, and clears it.
    fn drain(&self, mut each: impl FnMut(usize, u64)) {
        for (at, summary) in self.summary.iter().enumerate() {
            // Looked at before it is swapped: a swap takes the cache line from whoever writes.
            if summary.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // The summary before the words: a writer sets its word first, so what is missed here is found next time.
            let mut bits = summary.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let word = at * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                each(word, self.words[word].swap(0, Ordering::AcqRel));
            }
        }
    }
}

impl<'a> WithBitmapSlice<'a> for OwnWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for OwnWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        // vm-memory checks an access before it marks it; a slice of a slice may wrap, and is then nowhere.
        let end = (offset.saturating_add(len - 1) / PAGE_BYTES + 1).min(self.pages);
        for page in offset / PAGE_BYTES..end {
            let word = page / WORD_PAGES;
            self.words[word].fetch_or(1 << (page % WORD_PAGES), Ordering::AcqRel);
            self.summary[word / 64].fetch_or(1 << (word % 64), Ordering::AcqRel);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES;
        self.words
            .get(page / WORD_PAGES)
            .is_some_and(|bits| bits.load(Ordering::Acquire) & (1 << (page % WORD_PAGES)) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

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
            region
                .get_mmap()
                .bitmap()
                .drain(|word, new| self.words[first + word] |= new);
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
            // Not written when it is zero: most of them are, and the guest stands still.
            if *word == 0 {
                continue;
            }
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
    fn own_writes_are_what_a_plain_set_says() {
        let mut runner = proptest::test_runner::TestRunner::default();
        let bytes = 5 << 20;
        let write = (0..bytes, 0usize..40_000);
        let writes = proptest::collection::vec(write, 0..60);
        runner
            .run(&writes, |writes| {
                let own = OwnWrites::new(bytes);
                let mut plain = std::collections::BTreeSet::new();
                for (offset, len) in writes {
                    let len = len.min(bytes - offset);
                    own.mark_dirty(offset, len);
                    plain.extend(
                        (offset..offset + len)
                            .step_by(PAGE_BYTES)
                            .map(|at| at / PAGE_BYTES),
                    );
                    plain.extend((len > 0).then(|| (offset + len - 1) / PAGE_BYTES));
                }
                for &page in &plain {
                    assert!(own.dirty_at(page * PAGE_BYTES + 7));
                }
                let mut drained = Vec::new();
                own.drain(|word, bits| {
                    drained.extend(
                        (0..WORD_PAGES)
                            .filter(|b| bits >> b & 1 == 1)
                            .map(|b| word * WORD_PAGES + b),
                    )
                });
                assert_eq!(drained, plain.into_iter().collect::<Vec<_>>());
                own.drain(|word, bits| panic!("word {word} ({bits:#x}) was given out twice"));
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn a_write_outside_is_nowhere() {
        let own = OwnWrites::new(3 * PAGE_BYTES);
        own.mark_dirty(usize::MAX - 5, 3);
        own.mark_dirty(0, 0);
        assert!(!own.dirty_at(usize::MAX));
        own.drain(|_, _| panic!("nothing was written"));
        own.mark_dirty(2 * PAGE_BYTES, usize::MAX);
        let mut drained = Vec::new();
        own.drain(|word, bits| drained.push((word, bits)));
        assert_eq!(drained, [(0, 0b100)], "a page beyond the end is none");
    }

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
