//! What is left of many samples: median, minimum, maximum, 99th percentile.

use std::time::Duration;

/// Measurements of one thing, in the order they were made.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

/// What is shown of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Half of the samples are at most this (of an even number: the mean of the two in the middle).
    pub median: f64,
    /// The smallest sample that 99 % of all do not exceed (nearest rank: of fewer than 100, the largest).
    pub p99: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many there are.
    pub n: usize,
}

impl Samples {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds a time, in microseconds.
    pub fn push_us(&mut self, time: Duration) {
        self.push(time.as_secs_f64() * 1e6);
    }

    /// Adds a time, in milliseconds.
    pub fn push_ms(&mut self, time: Duration) {
        self.push(time.as_secs_f64() * 1e3);
    }

    /// Adds a rate in MB (10^6 bytes) a second.
    pub fn push_rate(&mut self, bytes: u64, time: Duration) {
        self.push(bytes as f64 / 1e6 / time.as_secs_f64().max(1e-9));
    }

    /// Adds `f` as often as asked.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn collect<E>(n: usize, f: impl FnMut(usize) -> Result<f64, E>) -> Result<Self, E> {
        (0..n).map(f).collect::<Result<_, E>>().map(Self)
    }

    /// What is shown of them; nothing when there are none.
    #[must_use]
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let n = sorted.len();
        // ceil(0.99 n), in integers: 0.99 is no binary fraction.
        let rank = (n * 99).div_ceil(100).max(1);
        Some(Summary {
            median: (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
            p99: sorted[rank - 1],
            min,
            max,
            n,
        })
    }

    /// The median; 0 of none.
    #[must_use]
    pub fn median(&self) -> f64 {
        self.summary().map_or(0.0, |summary| summary.median)
    }

    /// The mean; 0 of none.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = u32>) -> Summary {
        Samples(values.into_iter().map(f64::from).collect())
            .summary()
            .expect("there are samples")
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_ones() {
        assert_eq!(of([3, 1, 2]).median, 2.0);
        assert_eq!(of([4, 1, 2, 3]).median, 2.5);
        assert_eq!(of([7]).median, 7.0);
    }

    #[test]
    fn the_99th_percentile_is_the_nearest_rank() {
        assert_eq!(of((1..=100).rev()).p99, 99.0);
        assert_eq!(of(1..=1000).p99, 990.0);
        assert_eq!(of(1..=101).p99, 100.0);
        assert_eq!(of(1..=5).p99, 5.0, "of few samples it is the largest");
    }

    #[test]
    fn smallest_largest_and_count() {
        let summary = of([5, 9, 2]);
        assert_eq!((summary.min, summary.max, summary.n), (2.0, 9.0, 3));
        assert_eq!(Samples::default().summary(), None);
    }
}
