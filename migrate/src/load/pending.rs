//! The pages of which a load has met changes and not yet what they are changes of.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use segment::{PageCheck, SegmentName};

/// A change that waits for its base.
#[derive(Debug, Clone)]
pub(super) struct Change {
    /// What the newest of the page's changes has to come to.
    pub(super) check: PageCheck,
    /// Where that one was met.
    pub(super) link: SegmentName,
}

#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Whether there ever was one: a chain without changes does not come near the mutex. Links follow each other
    /// through a join of the threads, so a relaxed store is seen by the next link, and within one link every page is
    /// met once.
    any: AtomicBool,
    /// A mutex, as threads share a link's frames; held for a look-up.
    pages: Mutex<BTreeMap<u64, Change>>,
}

impl Pending {
    fn pages(&self) -> MutexGuard<'_, BTreeMap<u64, Change>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a change of `page` met in `link`; whether it is the page's first, which is its newest.
    pub(super) fn note(&self, page: u64, check: PageCheck, link: &SegmentName) -> bool {
        self.any.store(true, Ordering::Relaxed);
        let mut first = false;
        self.pages().entry(page).or_insert_with(|| {
            first = true;
            Change {
                check,
                link: link.clone(),
            }
        });
        first
    }

    /// Calls `f` with `pages` in runs: each page that waits alone, with its change, and the others together.
    ///
    /// # Errors
    /// The first of `f`.
    pub(super) fn take<E>(
        &self,
        pages: Range<u64>,
        mut f: impl FnMut(Range<u64>, Option<Change>) -> Result<(), E>,
    ) -> Result<(), E> {
        if !self.any.load(Ordering::Relaxed) {
            return f(pages, None);
        }
        let mut from = pages.start;
        while from < pages.end {
            let next = {
                let mut waiting = self.pages();
                let next = waiting.range(from..pages.end).next().map(|(page, _)| *page);
                next.and_then(|page| Some((page, waiting.remove(&page)?)))
            };
            let Some((page, change)) = next else { break };
            if from < page {
                f(from..page, None)?;
            }
            f(page..page + 1, Some(change))?;
            from = page + 1;
        }
        if from < pages.end {
            f(from..pages.end, None)
        } else {
            Ok(())
        }
    }

    /// One that still waits.
    pub(super) fn any(&self) -> Option<(u64, Change)> {
        self.pages().pop_first()
    }
}
