//! End-to-end: what the tests, the demo and the benchmark share.
//!
//! They drive the real binaries as a user would: agents and VMs are processes, talked to over their sockets.

pub mod bench;
pub mod demo;
pub mod harness;
pub mod hosts;
pub mod nested;
