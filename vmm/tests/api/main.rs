//! The control API in this process: real guests behind a real socket, asked by the client and by bare bytes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says so")]

mod bounds;
mod life;
mod snapshots;
mod support;
