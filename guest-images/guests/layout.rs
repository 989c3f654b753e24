//! Which memory is free, and how page numbers map to it. Pure arithmetic; `memory.rs` touches the memory.

use crate::content::PAGE_BYTES;

/// Half of what four-level paging can map, and all that the one table of directory pointers covers.
pub(crate) const MAX_ADDRESS: u64 = 512 << 30;
pub(crate) const GIB: u64 = 1 << 30;
const MAX_FREE_RANGES: usize = 16;

/// A half-open range of physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// Free RAM as page-aligned, ascending, disjoint ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FreeMemory {
    ranges: [Range; MAX_FREE_RANGES],
    count: usize,
}

impl FreeMemory {
    /// All whole pages of `ram` at or above `floor`. Ranges beyond the first sixteen are left alone.
    pub(crate) fn new(ram: &[Range], floor: u64) -> Self {
        let mut free = Self {
            ranges: [Range::default(); MAX_FREE_RANGES],
            count: 0,
        };
        let mut floor = floor;
        // Repeatedly the lowest range that still reaches above the floor: the map need not be sorted.
        while free.count < MAX_FREE_RANGES {
            let lowest = ram
                .iter()
                .map(|range| Range {
                    start: range.start.max(floor).next_multiple_of(PAGE_BYTES),
                    end: range.end.min(MAX_ADDRESS) & !(PAGE_BYTES - 1),
                })
                .filter(|range| range.start < range.end)
                .min_by_key(|range| range.start);
            let Some(range) = lowest else { break };
            free.ranges[free.count] = range;
            free.count += 1;
            floor = range.end;
        }
        free
    }

    pub(crate) fn ranges(&self) -> &[Range] {
        &self.ranges[..self.count]
    }

    pub(crate) fn pages(&self) -> u64 {
        self.ranges()
            .iter()
            .map(|range| (range.end - range.start) / PAGE_BYTES)
            .sum()
    }

    /// Cuts `pages` contiguous pages off the start of the first range that has them.
    pub(crate) fn take(&mut self, pages: u64) -> Option<u64> {
        let bytes = pages * PAGE_BYTES;
        let range = self.ranges[..self.count]
            .iter_mut()
            .find(|range| range.end - range.start >= bytes)?;
        let start = range.start;
        range.start += bytes;
        Some(start)
    }

    /// The address of the page numbered `page` among the free ones.
    pub(crate) fn address(&self, page: u64) -> Option<u64> {
        let mut left = page;
        for range in self.ranges() {
            let pages = (range.end - range.start) / PAGE_BYTES;
            if left < pages {
                return Some(range.start + left * PAGE_BYTES);
            }
            left -= pages;
        }
        None
    }

    /// True if some free page lies in the GiB numbered `gib`.
    pub(crate) fn reaches(&self, gib: u64) -> bool {
        self.ranges()
            .iter()
            .any(|range| range.start < (gib + 1) * GIB && range.end > gib * GIB)
    }
}
