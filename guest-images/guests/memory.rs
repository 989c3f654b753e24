//! Access to free physical memory, which is mapped at its own address.
//!
//! Invariant: addresses handed to [`load`] and [`store`] come from a [`FreeMemory`] that [`map`] has seen, so they
//! are RAM, mapped, and outside of everything the compiler knows about.

use crate::layout::{FreeMemory, GIB, MAX_ADDRESS};
use core::ptr;

/// Present, writable, user, accessed, dirty.
const OPEN: u64 = 0x67;
const LARGE: u64 = 0x80;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;

unsafe extern "C" {
    static mut first_directory_pointers: [u64; ENTRIES as usize];
}

/// The 64-bit word at `address`. Volatile: what a monitor changed behind the guest's back must be seen.
pub(crate) fn load(address: u64) -> u64 {
    // SAFETY: the module's invariant; all callers use multiples of 8.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance(address as usize)) }
}

/// Writes the 64-bit word at `address`. Volatile, so that words are written in the order of the program.
pub(crate) fn store(address: u64, word: u64) {
    // SAFETY: the module's invariant; nothing the compiler knows lies there.
    unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut(address as usize), word) }
}

/// As [`load`], for 32 bits.
pub(crate) fn load32(address: u64) -> u32 {
    // SAFETY: as for `load`, with multiples of 4.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance(address as usize)) }
}

/// As [`store`], for 32 bits.
pub(crate) fn store32(address: u64, word: u32) {
    // SAFETY: as for `store`, with multiples of 4.
    unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut(address as usize), word) }
}

/// Maps all free memory beyond the first GiB (which `entry.s` mapped), taking the page directories out of
/// `free`. None if these do not fit below 1 GiB.
///
/// This runs at level 3, where it is fast; the tables are open to it. No TLB flush: entries only ever turn from
/// absent to present.
pub(crate) fn map(free: &mut FreeMemory) -> Option<()> {
    let before = free.clone();
    for gib in (1..MAX_ADDRESS / GIB).filter(|&gib| before.reaches(gib)) {
        let directory = free.take(1).filter(|&address| address < GIB)?;
        for entry in 0..ENTRIES {
            store(
                directory + entry * 8,
                gib * GIB + entry * LARGE_PAGE + (OPEN | LARGE),
            );
        }
        let pointers = &raw mut first_directory_pointers;
        // Linked last: from here on the processor may read the directory.
        store(pointers.addr() as u64 + gib * 8, directory + OPEN);
    }
    Some(())
}
