//! Reading the TSC and finding its frequency.
//!
//! In this order: `tsc_khz=` on the command line; the timing leaf 0x40000010 of KVM and VMware; CPUID 0x15 and
//! 0x16; three measurements of 4 ms against channel 2 of the PIT; 2 GHz. A later source is only asked when the
//! earlier ones are absent, and the measurement is bounded, so a monitor without a PIT does not hang the guest.

use crate::clock::Timeline;
use crate::port::{self, in8, out8};
use crate::rt::cpuid;

const HYPERVISOR_PRESENT: u32 = 1 << 31;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const TIMING_LEAF: u32 = 0x4000_0010;

/// Used when nothing tells the frequency of the TSC.
const DEFAULT_KHZ: u64 = 2_000_000;

/// No processor's TSC is slower or faster than this: other answers are disbelieved.
const PLAUSIBLE_KHZ: core::ops::Range<u64> = 100_000..20_000_000;

pub(crate) fn read() -> u64 {
    // SAFETY: CR4.TSD is clear, so level 3 may read the TSC.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The guest's clock.
pub(crate) struct Clock {
    timeline: Timeline,
}

impl Clock {
    pub(crate) fn new(khz_override: Option<u64>) -> Self {
        let khz = khz_override
            .or_else(khz_from_cpuid)
            .or_else(khz_from_pit)
            .unwrap_or(DEFAULT_KHZ);
        Self {
            timeline: Timeline::new(khz, read()),
        }
    }

    /// Microseconds that the guest has been running since the clock was made.
    pub(crate) fn now_us(&mut self) -> u64 {
        self.timeline.observe(read())
    }

    /// Idles until `deadline_us`.
    pub(crate) fn wait_until(&mut self, deadline_us: u64) {
        loop {
            let left = deadline_us.saturating_sub(self.now_us());
            if left == 0 {
                return;
            }
            port::idle(left);
        }
    }
}

fn plausible(khz: u64) -> Option<u64> {
    PLAUSIBLE_KHZ.contains(&khz).then_some(khz)
}

fn khz_from_cpuid() -> Option<u64> {
    let under_hypervisor = cpuid(1).ecx & HYPERVISOR_PRESENT != 0;
    if under_hypervisor
        && cpuid(HYPERVISOR_LEAF).eax >= TIMING_LEAF
        && let Some(khz) = plausible(cpuid(TIMING_LEAF).eax.into())
    {
        return Some(khz);
    }
    let highest = cpuid(0).eax;
    if highest >= 0x15 {
        let ratio = cpuid(0x15);
        if ratio.eax != 0 && ratio.ebx != 0 && ratio.ecx != 0 {
            let hz = u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax);
            if let Some(khz) = plausible(hz / 1000) {
                return Some(khz);
            }
        }
    }
    if highest >= 0x16 {
        plausible(u64::from(cpuid(0x16).eax & 0xffff) * 1000)
    } else {
        None
    }
}

/// The median of three measurements: one alone is off by whatever else the host did meanwhile.
fn khz_from_pit() -> Option<u64> {
    let mut khz = [measure_by_pit()?, measure_by_pit()?, measure_by_pit()?];
    khz.sort_unstable();
    plausible(khz[1])
}

/// Counts TSC ticks while channel 2 of the PIT counts down 4 ms.
fn measure_by_pit() -> Option<u64> {
    const PIT_HZ: u64 = 1_193_182;
    const WINDOW_MS: u64 = 4;
    const COUNT: u64 = PIT_HZ * WINDOW_MS / 1000;
    const CHANNEL_2: u16 = 0x42;
    const MODE: u16 = 0x43;
    const GATE: u16 = 0x61;
    const OUTPUT_HIGH: u8 = 1 << 5;
    /// A read of the gate port is an exit of a tenth of a microsecond at the very least: well over 4 ms.
    const MAX_POLLS: u32 = 100_000;

    out8(GATE, in8(GATE) & !0x03 | 0x01); // speaker off, gate on
    out8(MODE, 0b1011_0000); // channel 2, low byte then high byte, mode 0: the output goes high at zero
    out8(CHANNEL_2, COUNT as u8);
    out8(CHANNEL_2, (COUNT >> 8) as u8);
    let start = read();
    if in8(GATE) & OUTPUT_HIGH != 0 {
        return None; // high before it counted: there is no PIT, only a bus that reads as ones
    }
    for _ in 0..MAX_POLLS {
        if in8(GATE) & OUTPUT_HIGH != 0 {
            return Some(read().wrapping_sub(start) / WINDOW_MS);
        }
    }
    None
}
