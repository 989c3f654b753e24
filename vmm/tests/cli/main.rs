//! The real binary, with real guests on /dev/kvm.

mod configured;
mod foreground;
mod manage;
mod refused;
mod restored;
mod support;
mod terminal;
