//! Guest memory that the guest does not need for now: its host memory is given back, and it reads as zero.
//!
//! The order is what makes it safe for a checkpoint. A page is *first* made a hole and *then* marked as changed: a
//! capture that is under way either copies it before, and finds the mark after, or finds the hole. A page that was a
//! hole already changes nothing, and is not marked.
//!
//! Reading a hole would fill it with a page of zeros; [`GuestRam::holes`] tells without reading.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::{GuestRam, PAGE_BYTES};

const PAGE: u64 = PAGE_BYTES as u64;

/// Pages that may be holes where there was content once: a hint, a bit a page.
#[derive(Debug)]
pub(super) struct Discarded(Box<[AtomicU64]>);

impl Discarded {
    pub(super) fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, page: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(page / 64).ok()?)
    }

    fn set(&self, pages: Range<u64>) {
        for page in pages {
            if let Some(word) = self.word(page) {
                word.fetch_or(1 << (page % 64), Ordering::AcqRel);
            }
        }
    }

    fn clear(&self, page: u64) {
        if let Some(word) = self.word(page) {
            word.fetch_and(!(1 << (page % 64)), Ordering::AcqRel);
        }
    }

    fn has(&self, page: u64) -> bool {
        self.word(page)
            .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
    }
}

impl GuestRam {
    /// Makes the whole pages in `bytes` bytes of guest memory from `address` on zero, and gives their host memory back.
    /// What is not the guest's memory is left out. Returns how many pages had content.
    ///
    /// # Errors
    /// The system's error; nothing that was not discarded is marked.
    pub fn discard(&self, address: u64, bytes: u64) -> Result<u64, rustix::io::Errno> {
        let end = address.saturating_add(bytes);
        let mut had = 0;
        for (slot, region) in self.slots.iter().zip(self.memory.iter()) {
            let to = end.min(slot.guest_address + slot.bytes) / PAGE * PAGE;
            // Not beyond a slot's end, where rounding up could wrap.
            let from = address.max(slot.guest_address).min(to).next_multiple_of(PAGE);
            if from >= to {
                continue;
            }
            let in_slot = from - slot.guest_address;
            let first = slot.first_page + in_slot / PAGE;
            let pages = first..first + (to - from) / PAGE;
            // What is filled from here on is filled by somebody who marks it.
            let filled = self.populated_in(&pages)?;
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, punch, pages.start * PAGE, to - from)?;
            for run in filled {
                had += run.end - run.start;
                self.discarded.set(run.clone());
                let offset = (run.start - slot.first_page) * PAGE;
                // Both fit: the region is mapped.
                let (offset, length) = (offset as usize, ((run.end - run.start) * PAGE) as usize);
                region.get_mmap().bitmap().mark_dirty(offset, length);
            }
        }
        Ok(had)
    }

    /// The runs in `pages` that have content.
    fn populated_in(&self, pages: &Range<u64>) -> Result<Vec<Range<u64>>, rustix::io::Errno> {
        let end = pages.end * PAGE;
        let mut at = pages.start * PAGE;
        let mut runs = Vec::new();
        while at < end {
            let start = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) if start < end => start,
                Ok(_) | Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error),
            };
            at = seek(&self.file, SeekFrom::Hole(start))?.min(end);
            runs.push(start / PAGE..at.div_ceil(PAGE));
        }
        Ok(runs)
    }

    /// Tells which pages are holes, in ascending order.
    #[must_use]
    pub fn holes(&self) -> Holes<'_> {
        Holes {
            ram: self,
            known: 0..0,
        }
    }
}

/// Which pages are holes: at the time of the answer, or since an earlier answer of the same object.
#[derive(Debug)]
pub struct Holes<'a> {
    ram: &'a GuestRam,
    known: Range<u64>,
}

impl Holes<'_> {
    /// Whether a page is known to be a hole, and so zero. A page that never had content may be called none.
    pub fn has(&mut self, page: u64) -> bool {
        if self.known.contains(&page) {
            return true;
        }
        if !self.ram.discarded.has(page) {
            return false;
        }
        let data = match seek(&self.ram.file, SeekFrom::Data(page * PAGE)) {
            Ok(data) => data / PAGE,
            Err(rustix::io::Errno::NXIO) => self.ram.pages(),
            // It is read then, which is right in any case.
            Err(_) => page,
        };
        self.known = page..data;
        if data == page {
            self.ram.discarded.clear(page);
        }
        data > page
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::layout::HIGH_RAM_START;

    fn filled(bytes: u64, pages: impl Iterator<Item = u64>) -> GuestRam {
        let ram = GuestRam::new(bytes).unwrap();
        for page in pages {
            ram.write_pages(page, &[7; PAGE_BYTES]).unwrap();
        }
        ram
    }

    fn marked(ram: &GuestRam) -> Vec<u64> {
        let mut marked = Vec::new();
        for (slot, region) in ram.slots().iter().zip(ram.memory().iter()) {
            let bits = |page: &u64| region.get_mmap().bitmap().dirty_at((page * PAGE) as usize);
            let dirty = (0..slot.pages()).filter(bits);
            marked.extend(dirty.map(|page| slot.first_page + page));
        }
        marked
    }

    #[test]
    fn what_is_discarded_is_zero_a_hole_and_marked_where_it_had_content() {
        let ram = filled(4 << 20, (3..6).chain(9..12));
        // From the middle of page 4 to the middle of page 11: whole pages only.
        assert_eq!(ram.discard(4 * PAGE + 100, 7 * PAGE).unwrap(), 3);
        assert_eq!(ram.populated().unwrap(), [3..5, 11..12]);
        assert_eq!(marked(&ram), [5, 9, 10]);
        let mut holes = ram.holes();
        let found: Vec<u64> = (0..20).filter(|page| holes.has(*page)).collect();
        assert_eq!(found, [5, 6, 7, 8, 9, 10]);
        assert_eq!(ram.populated().unwrap(), [3..5, 11..12], "looking fills nothing");
        // Used again it is none.
        ram.memory().write_obj(1u8, GuestAddress(9 * PAGE)).unwrap();
        let mut holes = ram.holes();
        let found: Vec<u64> = (0..20).filter(|page| holes.has(*page)).collect();
        assert_eq!(found, [5, 6, 7, 8, 10]);
        let mut page = [1; PAGE_BYTES];
        ram.read_pages(5, &mut page);
        assert_eq!(page, [0; PAGE_BYTES]);
    }

    #[test]
    fn only_the_guests_memory_is_discarded() {
        let ram = filled(4 << 30, 786_431..786_434);
        // Over the hole for devices: the last page below it, the first above.
        let bytes = HIGH_RAM_START + PAGE - (786_431 * PAGE);
        assert_eq!(ram.discard(786_431 * PAGE, bytes).unwrap(), 2);
        let left: Vec<u64> = ram.populated().unwrap().into_iter().flatten().collect();
        assert_eq!(left, [786_433]);
        assert_eq!(marked(&ram), [786_431, 786_432]);
        assert_eq!(ram.discard(u64::MAX - 5, u64::MAX).unwrap(), 0);
        assert_eq!(ram.discard(3 << 30, 1 << 30).unwrap(), 0);
        assert_eq!(ram.discard(1 << 50, 1 << 50).unwrap(), 0);
        assert_eq!(ram.discard(0, u64::MAX).unwrap(), 1);
        assert!(ram.populated().unwrap().is_empty());
    }
}
