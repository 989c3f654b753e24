//! Which pages of a segment have the content of an earlier one.
//!
//! A table of bounded size from a hash of some of a page's bytes to the last page that had it. The hash only names a
//! candidate: whether the contents are the same is for the caller to compare. A page may refer to
//! [`limits::MAX_SAME_FRAMES`] frames beside its own at most, counted over the frame it is in, so that reading a frame
//! never means reading many.

use crate::{PageIndex, limits};

/// The most entries of the table: 24 MiB of memory.
const MAX_SLOTS: u64 = 1 << 20;
/// Samples of a page that are hashed.
const SAMPLES: usize = 8;

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    hash: u64,
    page: u64,
    frame: u32,
}

/// Finds pages that are the same. One for one space of one segment.
#[derive(Debug)]
pub struct SamePages {
    slots: Vec<Slot>,
    /// The frame that is being filled; 0 before the first.
    frame: u32,
    /// The frames before it that its pages refer to.
    sources: Vec<u32>,
}

impl SamePages {
    /// For a space of which `pages` pages are stored.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let slots = pages.clamp(1, MAX_SLOTS).next_power_of_two();
        Self {
            // At most MAX_SLOTS.
            slots: vec![Slot::default(); slots as usize],
            frame: 0,
            sources: Vec::new(),
        }
    }

    /// Pages from here on go into another frame.
    pub fn next_frame(&mut self) {
        // At most MAX_FRAMES, which the writer holds.
        self.frame = self.frame.saturating_add(1);
        self.sources.clear();
    }

    /// The page that `page`, whose content has `hash`, is the same as. `same` compares with a candidate. When there
    /// is none and `whole` says that the page will be stored whole, later ones may be the same as it.
    pub fn find(
        &mut self,
        page: PageIndex,
        hash: u64,
        whole: bool,
        same: impl FnOnce(PageIndex) -> bool,
    ) -> Option<PageIndex> {
        // Zero is an empty slot.
        let hash = hash.max(1);
        let mask = self.slots.len() as u64 - 1;
        let slot = &mut self.slots[(hash & mask) as usize];
        if slot.hash == hash && same(PageIndex(slot.page)) {
            let known = slot.frame == self.frame || self.sources.contains(&slot.frame);
            if known || self.sources.len() < limits::MAX_SAME_FRAMES {
                if !known {
                    self.sources.push(slot.frame);
                }
                return Some(PageIndex(slot.page));
            }
        }
        if whole {
            // The nearer one is the better one to refer to.
            *slot = Slot {
                hash,
                page: page.0,
                frame: self.frame,
            };
        }
        None
    }
}

/// A hash of some of a page's bytes, cheap beside reading all of them; `None` when those are all zero, as they are in
/// a zero page.
#[must_use]
pub fn sample(bytes: &[u8]) -> Option<u64> {
    const MULTIPLY: u64 = 0x9e37_79b9_7f4a_7c15;
    let (words, _) = bytes.as_chunks::<16>();
    let stride = (words.len() / SAMPLES).max(1);
    let (mut hash, mut any) = (0u64, 0u128);
    for (at, word) in words.iter().step_by(stride).enumerate() {
        let word = u128::from_le_bytes(*word);
        any |= word;
        let mixed = (word as u64 ^ (word >> 64) as u64 ^ at as u64).wrapping_mul(MULTIPLY);
        hash = (hash ^ mixed).rotate_left(29).wrapping_mul(MULTIPLY);
    }
    (any != 0).then_some(hash ^ hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_refers_to_few_others() {
        let mut pages = SamePages::new(1000);
        for page in 0..20 {
            pages.next_frame();
            assert_eq!(pages.find(PageIndex(page), 100 + page, true, |_| true), None);
        }
        pages.next_frame();
        let found = (0..20)
            .filter(|n| pages.find(PageIndex(20 + n), 100 + n, false, |_| true).is_some())
            .count();
        assert_eq!(found, limits::MAX_SAME_FRAMES);
        // Those it refers to already it may refer to again.
        assert!(pages.find(PageIndex(50), 100, false, |_| true).is_some());
        pages.next_frame();
        assert!(pages.find(PageIndex(60), 119, false, |_| true).is_some());
        assert!(pages.find(PageIndex(61), 119, false, |_| false).is_none());
    }

    #[test]
    fn samples_of_zero_are_none() {
        assert_eq!(sample(&[0; 4096]), None);
        assert_eq!(sample(&[]), None);
        let mut page = [0; 4096];
        page[0] = 1;
        assert!(sample(&page).is_some());
        assert_ne!(sample(&page), sample(&[7; 4096]));
    }
}
