//! Chance, clocks, and what is on its way.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Duration;

use super::world::Event;

/// How far a host's clock may run from true time, in millionths. Two of them are then within one percent.
const MAX_DRIFT_PPM: u64 = 4_500;

/// Numbers that a seed gives (SplitMix64).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not 0.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.number() % n.max(1) as u64) as usize
    }

    /// In so many of a thousand cases.
    pub(super) fn per_mille(&mut self, n: u64) -> bool {
        self.number() % 1000 < n
    }

    /// Up to `most`.
    pub(super) fn time(&mut self, most: Duration) -> Duration {
        Duration::from_micros(self.number() % (most.as_micros() as u64 + 1))
    }
}

/// A host's clock: somewhere, and a little fast or slow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    offset: Duration,
    /// Millionths of a true second in one of its own.
    rate_ppm: u64,
}

impl Clock {
    pub(super) fn new(random: &mut Random) -> Self {
        Self {
            offset: random.time(Duration::from_secs(1_000_000)),
            rate_ppm: 1_000_000 - MAX_DRIFT_PPM + random.number() % (2 * MAX_DRIFT_PPM + 1),
        }
    }

    /// What it shows.
    pub(super) fn at(&self, now: Duration) -> Duration {
        let micros = now.as_nanos() * u128::from(self.rate_ppm) / 1_000_000;
        self.offset + Duration::from_nanos(micros as u64)
    }

    /// How long so much of its time is.
    pub(super) fn lasts(&self, time: Duration) -> Duration {
        let nanos = (time.as_nanos() * 1_000_000).div_ceil(u128::from(self.rate_ppm));
        Duration::from_nanos(nanos as u64)
    }
}

/// Where messages come from and go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Place {
    Host(usize),
    Registry,
}

/// What is to happen, by time; of the same instant, what was put in first.
#[derive(Debug, Default)]
pub(super) struct Queue {
    heap: BinaryHeap<Reverse<(Duration, u64, Box<Event>)>>,
    last: u64,
}

impl Queue {
    pub(super) fn push(&mut self, at: Duration, event: Event) {
        self.last += 1;
        self.heap.push(Reverse((at, self.last, Box::new(event))));
    }

    pub(super) fn pop(&mut self) -> Option<(Duration, Event)> {
        let Reverse((at, _, event)) = self.heap.pop()?;
        Some((at, *event))
    }
}

/// The ways between places.
#[derive(Debug, Default)]
pub(super) struct Net {
    /// Cut in this direction.
    pub(super) cut: BTreeSet<(Place, Place)>,
    /// In how many of a thousand cases a message is lost, or comes twice.
    pub(super) loses: u64,
    /// The longest that a message is usually on its way.
    pub(super) delay: Duration,
    /// The longest that one is on its way now and then.
    pub(super) rarely: Duration,
}

impl Net {
    /// When a message arrives that is sent now, for each time that it does.
    pub(super) fn arrivals(&self, random: &mut Random, from: Place, to: Place) -> Vec<Duration> {
        if from == to {
            return vec![Duration::from_micros(10)];
        }
        if self.cut.contains(&(from, to)) || random.per_mille(self.loses) {
            return Vec::new();
        }
        let copies = 1 + usize::from(random.per_mille(self.loses));
        let mut arrivals = Vec::with_capacity(copies);
        for _ in 0..copies {
            let most = if random.per_mille(20) {
                self.rarely
            } else {
                self.delay
            };
            arrivals.push(Duration::from_micros(50) + random.time(most));
        }
        arrivals
    }

    pub(super) fn cut(&mut self, from: Place, to: Place) {
        self.cut.insert((from, to));
    }

    pub(super) fn heal(&mut self) {
        self.cut.clear();
    }
}
