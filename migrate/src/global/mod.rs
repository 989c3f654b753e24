//! Restore points in a store that outlives every node: an S3-compatible bucket, or a shared folder.
//!
//! ```text
//! PREFIX/<vm>/points/<generation>-<epoch>                       one restore point: the links of its chain
//! PREFIX/<vm>/data/<generation>-<epoch>-<upload>/<part>         a link's file, in parts of 16 MiB
//!
//! Uploader:   the links' parts ... then the point             every object is made, never replaced
//! collect():  a point ... then the parts that no point names
//! ```
//!
//! Numbers are of 20 digits, so that the order of the keys is the order of the states.
//!
//! Invariants:
//! - A point that is there is whole: what it names was there before it, and goes after it.
//! - Every object is made by a conditional put. A name that is taken by another checkpoint is an error that says so.
//! - Parts belong to one upload, whose id is random: two nodes that upload the same state at the same time do not
//!   touch each other's; one of them makes the point, and the other's parts are collected.
//! - An upload takes up what an earlier one has stored only from the newest point, which every policy keeps, and from
//!   its own last try; it makes its point within half of the [grace](collect::Grace) from the first part, or gives up. What nothing names, and points that no policy keeps, are removed only
//!   after they were seen so for the whole of it, by one clock of one process: no decision compares two clocks.
//! - Everything that is read is untrusted: lengths are bounded before memory is taken, names and positions are checked,
//!   and a segment is verified as one from any other peer is.
//!
//! What it never does: it decides nothing about what is committed, and nothing waits for it.

mod addr;
mod bucket;
mod chain;
pub mod collect;
mod error;
mod fetch;
mod read;
#[cfg(test)]
mod tests;
mod upload;

pub use addr::{AddrError, GlobalAddr, GlobalArgs};
pub use bucket::{Bucket, Place};
pub use chain::{ChainRecord, LinkRecord};
pub use error::{GlobalError, Trouble};
pub use fetch::{Checked, fetch, verify};
pub use read::{Found, Remote};
pub(crate) use upload::blocking;
pub use upload::{Begun, Uploaded, Uploader};

/// The most bytes of one object of a link's file.
pub const PART_BYTES: u64 = 16 << 20;
/// The most restore points of one VM that are looked at.
pub const MAX_POINTS: usize = 100_000;
/// The most objects of one VM that are listed.
const MAX_OBJECTS: usize = 4_000_000;
