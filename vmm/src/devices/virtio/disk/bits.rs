//! A set of numbers below a bound, a bit each. A fresh one costs nothing until it is written: the kernel zeroes its
//! memory page by page.

#[derive(Debug, Default)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    pub(super) fn new(bound: u64) -> Self {
        Self(vec![0; usize::try_from(bound.div_ceil(64)).unwrap_or(usize::MAX)])
    }

    pub(super) fn get(&self, at: u64) -> bool {
        self.0
            .get((at / 64) as usize)
            .is_some_and(|word| word & (1 << (at % 64)) != 0)
    }

    pub(super) fn set(&mut self, at: u64) {
        if let Some(word) = self.0.get_mut((at / 64) as usize) {
            *word |= 1 << (at % 64);
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            // Not written where nothing is added: most of it is untouched memory.
            if *more != 0 {
                *word |= more;
            }
        }
    }

    /// The numbers in it, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> {
        self.0
            .iter()
            .enumerate()
            .filter(|(_, word)| **word != 0)
            .flat_map(|(index, &word)| {
                (0..64u64)
                    .filter(move |bit| word & (1 << bit) != 0)
                    .map(move |bit| index as u64 * 64 + bit)
            })
    }
}
