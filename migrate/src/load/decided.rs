//! One bit a page: whether a newer link has said what it is.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages of one piece. Pieces are made when they are first touched: an address space may be large and hardly used,
/// and its size is what a manifest says.
const PIECE_PAGES: u64 = 1 << 18;
const WORD_PAGES: u64 = u64::BITS as u64;

type Piece = Box<[AtomicU64]>;

#[derive(Debug)]
pub(super) struct Decided {
    pieces: Vec<OnceLock<Piece>>,
}

impl Decided {
    /// None of `pages` pages is decided.
    pub(super) fn new(pages: u64) -> Self {
        let pieces = pages.div_ceil(PIECE_PAGES);
        Self {
            pieces: (0..pieces).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Whether all of `pages` are decided.
    pub(super) fn all(&self, pages: Range<u64>) -> bool {
        words(pages).all(|(word, mask)| {
            let piece = self.pieces.get(piece_of(word)).and_then(OnceLock::get);
            piece.is_some_and(|piece| piece[word_in_piece(word)].load(Ordering::Relaxed) & mask == mask)
        })
    }

    /// Decides all of `pages`, and calls `free` with each run of those that were not. A page is given to one caller
    /// only, whatever the threads.
    ///
    /// # Errors
    /// The first error of `free`.
    pub(super) fn decide<E>(
        &self,
        pages: Range<u64>,
        mut free: impl FnMut(Range<u64>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut run: Option<Range<u64>> = None;
        for (word, mask) in words(pages) {
            // Beyond the space: the reader lets no such page through.
            let Some(piece) = self.pieces.get(piece_of(word)) else {
                break;
            };
            let piece =
                piece.get_or_init(|| (0..PIECE_PAGES / WORD_PAGES).map(|_| AtomicU64::new(0)).collect());
            // Relaxed: the bit is all there is to agree on. Links follow each other through a join of the threads.
            let mut bits = mask & !piece[word_in_piece(word)].fetch_or(mask, Ordering::Relaxed);
            while bits != 0 {
                let start = u64::from(bits.trailing_zeros());
                let length = u64::from((bits >> start).trailing_ones());
                // All 64 at once would be a shift too far.
                bits = if start + length == WORD_PAGES {
                    0
                } else {
                    bits >> (start + length) << (start + length)
                };
                let first = word * WORD_PAGES + start;
                match &mut run {
                    Some(run) if run.end == first => run.end = first + length,
                    _ => {
                        if let Some(done) = run.replace(first..first + length) {
                            free(done)?;
                        }
                    }
                }
            }
        }
        run.map_or(Ok(()), free)
    }
}

fn piece_of(word: u64) -> usize {
    usize::try_from(word / (PIECE_PAGES / WORD_PAGES)).unwrap_or(usize::MAX)
}

fn word_in_piece(word: u64) -> usize {
    // Below PIECE_PAGES / 64.
    (word % (PIECE_PAGES / WORD_PAGES)) as usize
}

/// The words that `pages` touches, each with the bits of its pages.
fn words(pages: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let last = if pages.is_empty() {
        0
    } else {
        pages.end.div_ceil(WORD_PAGES)
    };
    (pages.start / WORD_PAGES..last).map(move |word| {
        let base = word * WORD_PAGES;
        let from = pages.start.saturating_sub(base);
        let to = (pages.end - base).min(WORD_PAGES);
        (word, (u64::MAX >> (WORD_PAGES - (to - from))) << from)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain list of flags.
        #[test]
        fn as_a_list_of_flags(runs in prop::collection::vec((0u64..600, 1u64..200), 1..30)) {
            // Around the border of two pieces.
            let base = PIECE_PAGES - 300;
            let decided = Decided::new(PIECE_PAGES * 2);
            let mut flags = vec![false; 800];
            for (first, length) in runs {
                let pages = base + first..base + first + length;
                let here = first as usize..(first + length) as usize;
                prop_assert_eq!(decided.all(pages.clone()), flags[here.clone()].iter().all(|flag| *flag));
                let mut got = Vec::new();
                let mut last_end = None;
                decided.decide(pages.clone(), |free| {
                    assert_ne!(last_end, Some(free.start), "two runs that are one");
                    last_end = Some(free.end);
                    got.extend(free);
                    Ok::<_, ()>(())
                }).unwrap();
                let expected: Vec<u64> = here.clone().filter(|i| !flags[*i]).map(|i| base + i as u64).collect();
                prop_assert_eq!(got, expected);
                flags[here].fill(true);
                prop_assert!(decided.all(pages));
            }
        }
    }
}
