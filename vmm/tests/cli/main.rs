//! The real binary, with real guests on /dev/kvm.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says so")]

mod configured;
mod foreground;
mod manage;
mod refused;
mod restored;
mod support;
mod terminal;
