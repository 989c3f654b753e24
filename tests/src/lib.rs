//! End-to-end: what the tests, the demo and the benchmark share.
//!
//! They drive the real binaries as a user would: agents and VMs are processes, talked to over their sockets.

pub mod bench;
pub mod demo;
pub mod emulated;
/// A real etcd, as the tests of `migrate` start it too.
#[allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a helper of tests stops where something fails"
)]
#[path = "../../migrate/tests/net_common/etcd.rs"]
pub mod etcd;
pub mod harness;
pub mod hosts;
pub mod nested;
/// A real S3-compatible server, likewise.
#[allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a helper of tests stops where something fails"
)]
#[path = "../../migrate/tests/net_common/s3.rs"]
pub mod s3;
pub mod torture;
