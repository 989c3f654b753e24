//! What the paths of the API stand for.

pub mod balloon;
pub mod console;
pub mod devices;
pub mod machine;
pub mod metrics;
pub mod replication;
pub mod snapshot;
