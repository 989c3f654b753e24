//! Pages as they were last stored, so that a page written again can be stored as a change.
//!
//! What a cache has of a page is its content at one checkpoint, the one stored last ([`DeltaCache::is_at`]): a page that
//! is in no later checkpoint has not changed since. So it only moves on when a checkpoint is *stored*, and a delta on
//! any other checkpoint does not use it.
//!
//! Memory: within the bound it was made with, but for some 100 bytes a page of bookkeeping. When it is full, the pages
//! stay that are written often (a clock: a page survives one round for each time it was written again). A full
//! checkpoint fills free room and drives nothing out.

use std::collections::HashMap;

use segment::{CheckpointId, PageIndex, Space, SpaceId, is_zero};

use super::Captured;

/// One page.
struct Slot {
    key: (SpaceId, PageIndex),
    content: Box<[u8]>,
    /// Written since the hand came by.
    again: bool,
}

/// See the [module](self).
#[derive(Default)]
pub(super) struct DeltaCache {
    /// The most bytes of pages.
    bound: usize,
    bytes: usize,
    at: Option<CheckpointId>,
    slots: Vec<Slot>,
    places: HashMap<(SpaceId, PageIndex), usize>,
    hand: usize,
}

impl std::fmt::Debug for DeltaCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the content: it is a guest's memory.
        f.debug_struct("DeltaCache")
            .field("bound", &self.bound)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl DeltaCache {
    /// An empty cache that never holds more than `bound` bytes of pages.
    pub(super) fn new(bound: usize) -> Self {
        Self {
            bound,
            ..Self::default()
        }
    }

    /// Whether it holds pages as they were at `checkpoint`.
    pub(super) fn is_at(&self, checkpoint: CheckpointId) -> bool {
        self.at == Some(checkpoint)
    }

    /// The page as it was then. Never a zero page: a change of zero is the page itself.
    pub(super) fn base(&self, space: SpaceId, page: PageIndex) -> Option<&[u8]> {
        let place = self.places.get(&(space, page))?;
        self.slots.get(*place).map(|slot| &*slot.content)
    }

    /// Moves on to `captured`, which was stored; `parent` is what it is a delta of.
    pub(super) fn stored(&mut self, captured: &Captured, parent: Option<CheckpointId>) {
        if self.bound == 0 {
            return;
        }
        if parent.is_none_or(|parent| !self.is_at(parent)) {
            self.clear();
        }
        for space in &captured.spaces {
            for (at, &page) in space.pages.iter().enumerate() {
                match space.page(at) {
                    Some(content) => self.put(&space.space, page, content, captured.full),
                    // It has changed, and what it is now was not kept.
                    None => self.forget(&(space.space.id, page)),
                }
            }
        }
        self.at = Some(captured.checkpoint);
    }

    fn clear(&mut self) {
        self.slots.clear();
        self.places.clear();
        (self.bytes, self.hand, self.at) = (0, 0, None);
    }

    fn put(&mut self, space: &Space, page: PageIndex, content: &[u8], only_free: bool) {
        let key = (space.id, page);
        let zero = is_zero(content);
        if let Some(&place) = self.places.get(&key) {
            if zero {
                self.remove(place);
            } else if let Some(slot) = self.slots.get_mut(place) {
                slot.content.copy_from_slice(content);
                slot.again = true;
            }
            return;
        }
        if zero || content.len() > self.bound {
            return;
        }
        while self.bytes + content.len() > self.bound {
            if only_free {
                return;
            }
            self.drop_one();
        }
        self.bytes += content.len();
        self.places.insert(key, self.slots.len());
        self.slots.push(Slot {
            key,
            content: content.into(),
            again: false,
        });
    }

    fn forget(&mut self, key: &(SpaceId, PageIndex)) {
        if let Some(&place) = self.places.get(key) {
            self.remove(place);
        }
    }

    /// Drops the first page from the hand on that was not written again.
    fn drop_one(&mut self) {
        loop {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let Some(slot) = self.slots.get_mut(self.hand) else {
                return;
            };
            if !std::mem::take(&mut slot.again) {
                return self.remove(self.hand);
            }
            self.hand += 1;
        }
    }

    fn remove(&mut self, place: usize) {
        let slot = self.slots.swap_remove(place);
        self.bytes -= slot.content.len();
        self.places.remove(&slot.key);
        // The last one has moved here.
        if let Some(moved) = self.slots.get(place) {
            self.places.insert(moved.key, place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CapturedPages, PageBytes};
    use super::*;

    const PAGE: usize = 512;

    fn captured(id: u8, full: bool, pages: &[(u64, u8)]) -> Captured {
        Captured {
            checkpoint: CheckpointId([id; 16]),
            created_unix_ns: 0,
            full,
            records: Vec::new(),
            spaces: vec![CapturedPages {
                space: Space {
                    id: SpaceId::MEMORY,
                    name: "memory".into(),
                    page_bytes: PAGE as u32,
                    pages: 1000,
                },
                pages: pages.iter().map(|(page, _)| PageIndex(*page)).collect(),
                data: PageBytes::new(
                    pages
                        .iter()
                        .flat_map(|(_, byte)| [*byte; PAGE])
                        .collect::<Vec<_>>(),
                ),
            }],
            stopped: std::time::Duration::ZERO,
        }
    }

    fn base(cache: &DeltaCache, page: u64) -> Option<u8> {
        cache.base(SpaceId::MEMORY, PageIndex(page)).map(|bytes| bytes[0])
    }

    const fn id(n: u8) -> Option<CheckpointId> {
        Some(CheckpointId([n; 16]))
    }

    #[test]
    fn it_holds_pages_as_they_were_stored_last() {
        let mut cache = DeltaCache::new(10 * PAGE);
        cache.stored(&captured(1, true, &[(1, 1), (2, 2), (3, 0)]), None);
        assert!(cache.is_at(CheckpointId([1; 16])));
        assert_eq!(
            [1, 2, 3, 4].map(|page| base(&cache, page)),
            [Some(1), Some(2), None, None]
        );
        cache.stored(&captured(2, false, &[(1, 0), (2, 9), (4, 4)]), id(1));
        assert_eq!(
            [1, 2, 3, 4].map(|page| base(&cache, page)),
            [None, Some(9), None, Some(4)]
        );
        // A delta on something else: nothing it has is known to be as it was then.
        cache.stored(&captured(3, false, &[(7, 7)]), id(1));
        assert_eq!([2, 4, 7].map(|page| base(&cache, page)), [None, None, Some(7)]);
    }

    #[test]
    fn its_bound_holds_and_what_is_written_often_stays() {
        let mut cache = DeltaCache::new(4 * PAGE);
        cache.stored(
            &captured(1, true, &[(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]),
            None,
        );
        assert_eq!(cache.bytes, 4 * PAGE);
        assert_eq!(base(&cache, 5), None, "a full checkpoint drives nothing out");
        for n in 2..40u8 {
            // Page 2 each time, and one that is never written again.
            cache.stored(&captured(n, false, &[(2, n), (100 + u64::from(n), n)]), id(n - 1));
            assert!(cache.bytes <= 4 * PAGE && cache.slots.len() == cache.places.len());
            assert_eq!(base(&cache, 2), Some(n));
        }
        assert_eq!(base(&cache, 1), None);
    }

    #[test]
    fn a_page_that_was_not_kept_is_forgotten() {
        struct Elsewhere;
        impl super::super::PageReader for Elsewhere {
            fn read(&self, _: &[PageIndex], to: &mut [u8]) -> std::io::Result<()> {
                to.fill(5);
                Ok(())
            }
        }
        let mut cache = DeltaCache::new(10 * PAGE);
        cache.stored(&captured(1, true, &[(1, 1), (2, 2)]), None);
        let mut next = captured(2, false, &[(2, 0)]);
        next.spaces[0].data = PageBytes::deferred(Elsewhere);
        cache.stored(&next, id(1));
        assert_eq!([1, 2].map(|page| base(&cache, page)), [Some(1), None]);
    }

    #[test]
    fn without_room_it_holds_nothing() {
        let mut cache = DeltaCache::new(0);
        cache.stored(&captured(1, true, &[(1, 1)]), None);
        assert!(!cache.is_at(CheckpointId([1; 16])));
        let mut cache = DeltaCache::new(PAGE - 1);
        cache.stored(&captured(1, true, &[(1, 1)]), None);
        assert_eq!(base(&cache, 1), None);
    }
}
