//! The control API: HTTP/1.1 and JSON over a Unix socket, one socket a VM.
//!
//! ```text
//! client --> server (socket, bounds) --> routes --> resources --> Instance --> Session (the machine, its checkpoints)
//! ```
//!
//! Where Firecracker's public API has a resource, this one has the same path, verb and field names, `204 No Content`
//! for what succeeded without an answer, and `{"fault_message": ".."}` for what did not. What it lacks answers in
//! that shape that it is not there. `docs/api.md` compares them field by field; [`openapi`] describes this one.
//!
//! What it never does: it holds no lock while a guest boots or a checkpoint is taken, and it does not cut an
//! operation short because a client went away.

pub mod client;
pub mod fault;
pub mod instance;
pub mod openapi;
mod places;
pub mod resources;
pub mod routes;
pub mod server;

pub use client::Client;
pub use instance::Instance;
pub use server::Server;

/// The longest request body. Firecracker's is 51,200 bytes.
pub const MAX_BODY_BYTES: usize = 64 << 10;
