//! Everything after the capture: encoding, stores, shipping, registry, failover, loading, and the standby agent.
//!
//! ```text
//! Source -> Captured -> Segment -> local store -> (wire) -> Stored -> Registered -> LoadPlan -> Target
//!                                      ^                      |
//!                                      +-------- Ack ---------+
//! ```
//!
//! Nothing here opens /dev/kvm or knows what a register is: a VM is its [`checkpoint::Source`] and
//! [`load::Target`], and the agent *spawns* `vmm restore`.

#![forbid(unsafe_code)]

pub mod agent;
pub mod ca;
pub mod checkpoint;
pub mod clock;
pub mod crashsafe;
pub mod detect;
pub mod failover;
pub mod global;
pub mod image;
pub mod keyfile;
pub mod lease;
pub mod load;
mod mutex;
pub mod openmetrics;
pub mod placement;
pub mod process;
pub mod protect;
pub mod protocol;
pub mod registry;
pub mod regular;
pub mod seal;
pub mod shipper;
pub mod spool;
pub mod store;
pub mod transport;
pub mod wire;

pub use segment;
