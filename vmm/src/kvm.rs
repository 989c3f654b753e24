//! /dev/kvm: opening it, what it must offer, and the ioctls that kvm-ioctls does not wrap.
//!
//! Every error names the ioctl, so that a log line can be looked up in the kernel's own documentation
//! (Documentation/virt/kvm/api.rst).

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

#[allow(missing_docs, unreachable_pub)] // The macros make public functions; the module keeps them in.
mod number {
    use super::*;
    ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
    ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}
use number::{
    KVM_CLEAR_DIRTY_LOG, KVM_GET_DEVICE_ATTR, KVM_GET_DIRTY_LOG, KVM_GET_XSAVE2, KVM_SET_DEVICE_ATTR,
    KVM_SET_XSAVE,
};

/// The smallest XSAVE area KVM hands out, and the size where `KVM_CAP_XSAVE2` is absent.
pub const XSAVE_MIN_BYTES: usize = 4096;
/// The largest XSAVE area that is believed: AMX needs about 11 KiB, and nothing larger is announced.
pub const XSAVE_MAX_BYTES: usize = 64 << 10;

/// What went wrong between us and /dev/kvm.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm is not there.
    #[error(
        "/dev/kvm does not exist: this machine has no KVM. Load kvm-intel or kvm-amd, enable virtualisation in \
         the firmware, or (inside a VM) enable nested virtualisation"
    )]
    Missing,
    /// /dev/kvm may not be opened by this user.
    #[error(
        "/dev/kvm may not be opened by this user: add the user to the group that owns it (usually `kvm`) and log \
         in again, or run as root"
    )]
    NotPermitted,
    /// /dev/kvm cannot be opened for another reason.
    #[error("open /dev/kvm")]
    Open(#[source] errno::Error),
    /// A capability that cannot be done without.
    #[error("this host's KVM lacks {0}: a newer Linux kernel is needed (5.17 or later is tested)")]
    Lacks(&'static str),
    /// An ioctl failed.
    #[error("{ioctl} failed on {on}")]
    Ioctl {
        /// Its name in the kernel's documentation.
        ioctl: &'static str,
        /// What it was called on: the VM, a vCPU by number, a slot.
        on: String,
        /// The system's error.
        #[source]
        source: errno::Error,
    },
    /// `KVM_GET_MSRS` or `KVM_SET_MSRS` stopped early.
    #[error("{ioctl} refused MSR {index:#x} on vCPU {vcpu}{value}: the host's CPU or KVM does not take it")]
    Msr {
        /// Which of the two.
        ioctl: &'static str,
        /// The first MSR that was refused.
        index: u32,
        /// The vCPU.
        vcpu: u8,
        /// " = value", for a set.
        value: String,
    },
}

impl KvmError {
    /// An adapter for `map_err`.
    pub(crate) fn ioctl(ioctl: &'static str, on: impl Into<String>) -> impl FnOnce(errno::Error) -> Self {
        let on = on.into();
        move |source| Self::Ioctl { ioctl, on, source }
    }
}

/// Opens /dev/kvm and checks that it offers what this monitor cannot do without.
///
/// # Errors
/// [`KvmError::Missing`], [`KvmError::NotPermitted`], [`KvmError::Open`], or [`KvmError::Lacks`].
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::NotPermitted,
        _ => KvmError::Open(e),
    })?;
    for (cap, name) in [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
        (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::Xsave, "KVM_CAP_XSAVE"),
        (Cap::Xcrs, "KVM_CAP_XCRS"),
        (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
        (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
        (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Lacks(name));
        }
    }
    Ok(kvm)
}

/// The size of a vCPU's XSAVE area, in bytes, from `KVM_CAP_XSAVE2`.
pub fn xsave_bytes(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2))
        .unwrap_or(0)
        .clamp(XSAVE_MIN_BYTES, XSAVE_MAX_BYTES)
}

/// `KVM_GET_XSAVE2` into a buffer of [`xsave_bytes`].
pub(crate) fn get_xsave(vcpu: &VcpuFd, buffer: &mut [u8]) -> Result<(), errno::Error> {
    assert!(
        buffer.len() >= XSAVE_MIN_BYTES,
        "own buffer of {} bytes is too small",
        buffer.len()
    );
    // SAFETY: the kernel writes as many bytes as KVM_CAP_XSAVE2 announced for this VM; every caller sizes the
    // buffer with `xsave_bytes` of the same VM, which is never below the 4096 of a VM without that capability.
    let ret = unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_XSAVE2(), buffer.as_mut_ptr()) };
    if ret == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}

/// `KVM_SET_XSAVE` from a buffer of at least [`xsave_bytes`] of this VM.
pub(crate) fn set_xsave(vcpu: &VcpuFd, buffer: &[u8]) -> Result<(), errno::Error> {
    assert!(
        buffer.len() >= XSAVE_MIN_BYTES,
        "own buffer of {} bytes is too small",
        buffer.len()
    );
    // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 announced for this VM; the caller has padded or
    // refused a saved area of another size before (vcpu/state.rs), and kvm_xsave has no alignment above 4.
    let ret = unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), buffer.as_ptr()) };
    if ret == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}

/// `KVM_GET_DIRTY_LOG` of one slot into `bitmap`, one bit a page; clears the log unless manual protect is on.
pub(crate) fn get_dirty_log(vm: &VmFd, slot: u32, bitmap: &mut [u64]) -> Result<(), errno::Error> {
    let mut log = kvm_dirty_log {
        slot,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: the kernel writes one bit for each page of the slot, rounded up to whole words; `dirty.rs` makes
    // each slot's bitmap of that size when the slot is made.
    let ret = unsafe { ioctl_with_mut_ref(vm, KVM_GET_DIRTY_LOG(), &mut log) };
    if ret == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}

/// `KVM_CLEAR_DIRTY_LOG` of a whole slot: write-protects again the pages whose bits are set in `bitmap`.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    pages: u64,
    bitmap: &mut [u64],
) -> Result<(), errno::Error> {
    let mut log = kvm_clear_dirty_log {
        slot,
        // The kernel takes a count that is a multiple of 64 unless it reaches the slot's end exactly.
        num_pages: u32::try_from(pages).map_err(|_| errno::Error::new(libc::EINVAL))?,
        first_page: 0,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: as for KVM_GET_DIRTY_LOG; here the kernel reads the bitmap.
    let ret = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) };
    if ret == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}

fn tsc_offset_attribute(value: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value as u64,
        flags: 0,
    }
}

/// The vCPU's `KVM_VCPU_TSC_OFFSET`: the guest's TSC less the host's (scaled, where it is). `None` before Linux 5.16.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: the kernel writes eight bytes to the address in the attribute, which is that of a live, exclusively
    // owned u64.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    (ret == 0).then_some(offset)
}

/// Sets the vCPU's `KVM_VCPU_TSC_OFFSET`.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), errno::Error> {
    let attribute = tsc_offset_attribute(&raw const offset);
    // SAFETY: the kernel reads eight bytes from the address in the attribute, which is that of a live u64.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    if ret == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}

/// The host's wall clock, in nanoseconds since 1970.
pub(crate) fn realtime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    u64::try_from(i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)).unwrap_or(0)
}

/// `KVM_SET_USER_MEMORY_REGION` with a slot of a [`GuestRam`](crate::memory::GuestRam).
pub(crate) fn set_memory_slot(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), errno::Error> {
    // SAFETY: the caller (`vm.rs`) passes a slot inside the mapping of the RAM that the machine owns, and drops the
    // VM before the RAM.
    unsafe { vm.set_user_memory_region(region) }
}

/// The thread id by which [`signal_thread`] finds the calling thread.
pub(crate) fn current_thread() -> i32 {
    // SAFETY: gettid takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// Sends `signal` to one thread of this process.
pub(crate) fn signal_thread(tid: i32, signal: i32) -> Result<(), errno::Error> {
    // SAFETY: getpid takes nothing and cannot fail.
    let pid = unsafe { libc::getpid() };
    // SAFETY: tgkill takes numbers only; a thread that is gone is an error, not undefined.
    let ret = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    if ret == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}
