//! What is below the guests' `main`: the assembly entry, faults, panics and CPUID.

use crate::port;
use crate::serial::{Serial, say};
use core::arch::global_asm;
use core::panic::PanicInfo;
use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering};

global_asm!(include_str!("entry.s"));

/// One CPUID leaf as asked at level 0: what the monitor set for this guest. At level 3 a host without VMX or
/// SVM lets the instruction through to its own processor.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct CpuidAnswer {
    pub(crate) leaf: u32,
    pub(crate) eax: u32,
    pub(crate) ebx: u32,
    pub(crate) ecx: u32,
    pub(crate) edx: u32,
}

const CPUID_ANSWERS: usize = 6;

unsafe extern "C" {
    static cpuid_answers: [CpuidAnswer; CPUID_ANSWERS];
    static image_end: u8;
}

/// The answer to one of the leaves that `entry.s` asks; all zero for any other.
pub(crate) fn cpuid(leaf: u32) -> CpuidAnswer {
    // SAFETY: `entry.s` defines exactly this array, and wrote it last before any Rust code ran.
    let answers = unsafe { &cpuid_answers };
    answers
        .iter()
        .find(|answer| answer.leaf == leaf)
        .copied()
        .unwrap_or_default()
}

/// The first address after the image, a multiple of the page size.
pub(crate) fn end_of_image() -> u64 {
    (&raw const image_end).addr() as u64
}

/// Every exception of the guest ends here, at level 3 with a fresh stack.
#[unsafe(no_mangle)]
extern "C" fn report_fault(vector: u64, error: u64, rip: u64, address: u64) -> ! {
    static REPORTING: AtomicBool = AtomicBool::new(false);
    // A fault while reporting one: say nothing more.
    if !REPORTING.swap(true, Ordering::Relaxed) {
        say!(
            Serial::new(),
            "\nFAULT vector={vector} rip={rip:#x} err={error:#x} cr2={address:#x}"
        );
    }
    port::stop()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!(Serial::new(), "\nPANIC {info}");
    port::stop()
}

/// Copies plain bytes out of memory that the loader filled.
///
/// # Safety
/// `address .. address + size_of::<T>()` must be mapped and hold a valid `T`.
pub(crate) unsafe fn read_at<T: Copy>(address: u64) -> T {
    // SAFETY: the caller's; `read_unaligned` asks for no alignment.
    unsafe { ptr::read_unaligned(ptr::with_exposed_provenance(address as usize)) }
}
