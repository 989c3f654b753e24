//! Port I/O, and the two ports that are a convention between the guests and the monitor.

use core::arch::asm;

/// Writing a 32-bit number of microseconds here lets the monitor put the vCPU to sleep for up to that long.
/// (`hlt` would need privilege level 0.) A monitor that does not know the port ignores the write.
pub(crate) const IDLE: u16 = 0x0d80;

/// The longest sleep one write to [`IDLE`] may ask for. A monitor that wants to stop the vCPU never waits
/// longer than this, even if it cannot interrupt the sleep.
pub(crate) const IDLE_MAX_US: u64 = 100_000;

const KEYBOARD_CONTROLLER: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;
/// The monitor's ACPI sleep control register, and "off" in it: sleep type 5 and the enable bit.
const SLEEP_CONTROL: u16 = 0x600;
const SLEEP_OFF: u8 = (5 << 2) | (1 << 5);

pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: the guest owns the whole machine; no device it writes to can touch its memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

pub(crate) fn out32(port: u16, value: u32) {
    // SAFETY: as for `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) }
}

pub(crate) fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as for `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Asks the monitor to sleep for `us` microseconds at most. It may return at once: look at the clock again.
pub(crate) fn idle(us: u64) {
    // The cast cannot cut: the bound is far below 2^32.
    out32(IDLE, us.min(IDLE_MAX_US) as u32);
    // Where the port is unknown this is a busy loop, and each turn of it an exit: slow it down a little.
    for _ in 0..64 {
        core::hint::spin_loop();
    }
}

/// Asks for a reset through the keyboard controller, and idles where nobody listens.
pub(crate) fn reset() -> ! {
    out8(KEYBOARD_CONTROLLER, PULSE_RESET);
    loop {
        idle(IDLE_MAX_US);
    }
}

/// Ends the guest: switches the machine off; where that port means nothing, asks for a reset through the keyboard
/// controller, which other monitors take for a clean stop; idles for ever where nobody listens.
pub(crate) fn stop() -> ! {
    out8(SLEEP_CONTROL, SLEEP_OFF);
    reset()
}
