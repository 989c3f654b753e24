//! The proof of failover, run on every change.
//!
//! ```text
//!   migrate::failover::Plan, migrate::lease, migrate::detect,        the product's own decisions, which have neither
//!   migrate::registry::rules, migrate::store::promise         clock nor socket nor disk
//!                    |
//!          parts: a holder, the registry
//!              |                  |
//!   model: every interleaving    sim: seeded histories of many hosts, with losses, delays, duplicates, drifting
//!   at small sizes, by           clocks, slow and torn disks, and crashes at every step
//!   stateright
//! ```
//!
//! Both are also run with one rule deliberately broken ([`Rules`]), and have to find out.
//!
//! What it never does: no clock, no thread of its own, no randomness but what a seed gives.

pub mod model;
pub mod parts;
mod shown;
pub mod sim;

pub use shown::Shown;

/// The rules that make failover safe; one is broken at a time, to see that it is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rules {
    /// A holder refuses what is below its promise.
    pub holders_fence: bool,
    /// A takeover waits until the owner before has to stand still.
    pub takeover_waits: bool,
    /// An owner counts its time from when it asked, not from when it was answered.
    pub counts_from_asking: bool,
    /// A holder that restarts takes for granted what it may have granted before.
    pub restart_remembers: bool,
}

impl Rules {
    /// As the product has them.
    pub const SOUND: Self = Self {
        holders_fence: true,
        takeover_waits: true,
        counts_from_asking: true,
        restart_remembers: true,
    };
}
