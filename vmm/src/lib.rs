//! The monitor: a minimal KVM VMM whose guests can be checkpointed and restored elsewhere.
#![deny(unsafe_code)]

pub mod acpi;
pub mod api;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod cpuid;
pub mod devices;
pub mod dirty;
#[allow(unsafe_code)]
pub mod kvm;
pub mod layout;
pub mod leash;
#[allow(unsafe_code)]
pub mod memory;
pub mod outbox;
pub mod preflight;
mod random;
pub mod replica;
pub mod session;
pub mod socket;
pub mod state;
#[allow(unsafe_code)]
pub mod vcpu;
pub mod vm;

/// Program and version, as segments and the control API name it.
pub const PRODUCER: &str = concat!("vmm ", env!("CARGO_PKG_VERSION"));
