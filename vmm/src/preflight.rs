//! Whether this host can run a saved machine: everything it lacks, found without running or loading anything.
//!
//! A restore finds the same things one at a time and stops at the first. Here a throwaway VM is asked for all of
//! them: CPU features against what KVM offers, each MSR by setting it, the rest by looking.

use kvm_ioctls::Cap;

use crate::cpuid;
use crate::kvm::{self, KvmError};
use crate::memory::GuestRam;
use crate::vcpu::msrs;
use crate::vcpu::state::{TscFit, fit_xsave, tsc_fit};
use crate::vm::{MachineState, VmError, set_slots};

/// Something this host lacks for a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lack {
    /// A CPU feature the guest was shown, by name.
    Feature(String),
    /// A model-specific register, by number, that is not there or does not take the guest's value.
    Msr(u32),
    /// The TSC runs at another speed and cannot be scaled.
    TscFrequency {
        /// The guest's, in kHz.
        saved: u32,
        /// This host's, in kHz.
        host: u32,
    },
    /// The register areas that the guest uses are larger than this host's KVM takes.
    Xsave {
        /// Bytes saved.
        saved: usize,
        /// Bytes this host takes.
        host: usize,
    },
    /// More vCPUs than this host's KVM gives a VM.
    Vcpus {
        /// The guest's.
        saved: u8,
        /// The host's most.
        host: usize,
    },
    /// Memory.
    Memory {
        /// Bytes the guest has.
        needed: u64,
        /// Bytes that are available here.
        available: u64,
    },
    /// A device or a name that must be bound, in words.
    Device(String),
    /// The key that a link of the chain is encrypted with, in words. What else is lacking is not known then.
    Key(String),
}

impl std::fmt::Display for Lack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Feature(name) => write!(f, "CPU feature: {name}"),
            Self::Msr(index) => match msrs::name(*index) {
                Some(name) => write!(f, "MSR {index:#x} ({name}) with the guest's value"),
                None => write!(f, "MSR {index:#x} with the guest's value"),
            },
            Self::TscFrequency { saved, host } => write!(
                f,
                "TSC scaling: the guest's TSC runs at {saved} kHz, this host's at {host} kHz"
            ),
            Self::Xsave { saved, host } => write!(
                f,
                "room for the guest's extended registers: {saved} bytes, this host's KVM takes {host}"
            ),
            Self::Vcpus { saved, host } => write!(
                f,
                "vCPUs: the guest has {saved}, this host's KVM gives at most {host}"
            ),
            Self::Memory { needed, available } => write!(
                f,
                "memory: the guest has {} MiB, {} MiB are available",
                needed >> 20,
                available >> 20
            ),
            Self::Device(what) => write!(f, "device: {what}"),
            Self::Key(what) => write!(f, "key: {what}"),
        }
    }
}

/// All that this host lacks for the machine; empty: it can run it.
///
/// # Errors
/// [`VmError`] when /dev/kvm cannot be asked at all.
pub fn check(saved: &MachineState) -> Result<Vec<Lack>, VmError> {
    let mut lacks = Vec::new();
    let kvm = kvm::open()?;
    let most = kvm.get_max_vcpus();
    if usize::from(saved.config.vcpus) > most {
        lacks.push(Lack::Vcpus {
            saved: saved.config.vcpus,
            host: most,
        });
    }
    if let Some(state) = saved.vcpus.first() {
        let vm = kvm
            .create_vm()
            .map_err(KvmError::ioctl("KVM_CREATE_VM", "/dev/kvm"))?;
        vm.create_irq_chip()
            .map_err(KvmError::ioctl("KVM_CREATE_IRQCHIP", "a VM to probe with"))?;
        // Address space, not memory: writing an MSR that holds a guest address makes KVM look it up.
        let ram = GuestRam::new(saved.config.memory_bytes)?;
        set_slots(&vm, &ram, false)?;
        let vcpu = vm
            .create_vcpu(0)
            .map_err(KvmError::ioctl("KVM_CREATE_VCPU", "a VM to probe with"))?;
        let supported = cpuid::supported(&kvm)?;
        let offered = cpuid::offered(&supported, &vcpu)?;
        lacks.extend(
            cpuid::missing(&state.cpuid, &offered)
                .into_iter()
                .map(Lack::Feature),
        );
        let host = vcpu
            .get_tsc_khz()
            .map_err(KvmError::ioctl("KVM_GET_TSC_KHZ", "a VM to probe with"))?;
        if tsc_fit(state.tsc_khz, host, kvm.check_extension(Cap::TscControl)) == TscFit::Impossible {
            lacks.push(Lack::TscFrequency {
                saved: state.tsc_khz,
                host,
            });
        }
        let takes = kvm::xsave_bytes(&vm);
        if fit_xsave(&state.xsave, takes).is_err() {
            lacks.push(Lack::Xsave {
                saved: state.xsave.len(),
                host: takes,
            });
        }
        // MSRs depend on CPUID, and EFER on the control registers; a CPUID that KVM refuses is one with features
        // already named above.
        if let Ok(entries) = cpuid::to_kvm(&state.cpuid)
            && vcpu.set_cpuid2(&entries).is_ok()
        {
            let _ = vcpu.set_sregs(&state.sregs);
            lacks.extend(msrs::refused(&vcpu, &state.msrs).into_iter().map(Lack::Msr));
        }
    }
    if let Some(available) = available_memory()
        && available < saved.config.memory_bytes
    {
        lacks.push(Lack::Memory {
            needed: saved.config.memory_bytes,
            available,
        });
    }
    Ok(lacks)
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
