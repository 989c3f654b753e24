//! Where everything is in the guest's physical address space, on its interrupt lines and on its ports: the one
//! place that hands out addresses.
//!
//! ```text
//! 0x0000_0500            GDT of the boot protocol       RAM
//! 0x0000_6000            hvm_start_info (PVH)           RAM
//! 0x0000_7000            zero page, memory map          RAM
//! 0x0000_9000..0xf000    page tables (64-bit protocol)  RAM
//! 0x0002_0000..0x3_0000  command line                   RAM
//! 0x0009_fc00..0x10_0000 reserved: the PC's hole. In it, in real memory that a checkpoint holds:
//!     0x000e_0000            RSDP, ACPI tables
//!     0x000e_f000            generation id (one page)
//!     0x000f_fff0            where a PC's processor begins after a reset: four instructions that ask for one
//! 0x0010_0000..          kernel, ..., initrd at the top of low RAM
//! ..0xc000_0000          end of low RAM
//! 0xd000_0000..          virtio-mmio windows, 4 KiB each
//! 0xfec0_0000            IOAPIC (KVM's, 24 pins)
//! 0xfee0_0000            local APICs
//! 0xfffb_c000..          KVM's identity map and TSS pages
//! 0x1_0000_0000..        high RAM
//! ```
//!
//! | line (GSI) | who |
//! |---|---|
//! | 0, 1, 2 | timer, keyboard, cascade |
//! | 4 | COM1 |
//! | 8 | CMOS clock |
//! | 9 | ACPI events (generic event device) |
//! | 5, 6, 7, 10..=23 | virtio slots, one each |
//!
//! A restored guest has the addresses of its checkpoint in its drivers: nothing here may change for a machine that
//! exists. New things get new places.

/// Where low RAM ends and the hole for devices begins.
pub const LOW_RAM_END: u64 = 3 << 30;
/// Where high RAM begins.
pub const HIGH_RAM_START: u64 = 4 << 30;

/// The global descriptor table a kernel is entered with.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH protocol.
pub const START_INFO: u64 = 0x6000;
/// The module list (initrd) of the PVH protocol.
pub const MODULES: u64 = 0x6040;
/// The memory map of the PVH protocol, or `boot_params` of the Linux protocol: a machine has one of the two.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the 64-bit protocol: six pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Where conventional memory ends.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The root pointer of the ACPI tables; a kernel that is not told where it is searches here.
pub const RSDP: u64 = 0xe_0000;
/// The ACPI tables.
pub const ACPI_TABLES: u64 = 0xe_0040;
/// One past the room for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0xe_f000;
/// The page that holds the VM generation id, 16 bytes at its start.
pub const GENERATION_ID: u64 = 0xe_f000;
/// What a kernel jumps to in real mode, when it knows no better way to reset.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where extended memory begins; a kernel may not begin below.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// KVM's IOAPIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// KVM's local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages below the BIOS that Intel's virtual 8086 mode needs; nothing else may be there.
pub const TSS_PAGES: usize = 0xfffb_d000;
/// One page beside them for the identity map that real mode needs without "unrestricted guest".
pub const IDENTITY_MAP: u64 = 0xfffb_c000;

/// COM1's interrupt line.
pub const SERIAL_GSI: u32 = 4;
/// The CMOS clock's interrupt line.
pub const RTC_GSI: u32 = 8;
/// The line of the generic event device, which tells of a new generation id. Edge triggered.
pub const EVENT_GSI: u32 = 9;

/// ACPI's sleep control register (port, 8 bits): a write of [`SLEEP_S5`] switches the machine off.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI's sleep status register (port, 8 bits). Reads as zero: the machine never wakes.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI's reset register (port, 8 bits): a write of [`RESET_VALUE`] resets the machine.
pub const RESET_PORT: u16 = 0x602;
/// Sleep type 5 in bits 4..2 and the enable bit 5.
pub const SLEEP_S5: u8 = (5 << 2) | (1 << 5);
/// What the reset register takes.
pub const RESET_VALUE: u8 = 1;

/// The first virtio-mmio window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// The size of a window, in bytes.
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;
/// The offset of `QueueNotify` in a window.
pub const VIRTIO_QUEUE_NOTIFY: u64 = 0x50;
/// Lines of the virtio slots, by slot. None is shared, and none is another device's.
const VIRTIO_GSIS: [u8; 17] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
/// How many virtio devices a machine can have.
pub const MAX_VIRTIO_SLOTS: usize = VIRTIO_GSIS.len();

/// A place for a virtio-mmio device: a window and an interrupt line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtioSlot(u8);

impl VirtioSlot {
    /// Slot `number`, if it is below [`MAX_VIRTIO_SLOTS`].
    #[must_use]
    pub fn new(number: u8) -> Option<Self> {
        (usize::from(number) < MAX_VIRTIO_SLOTS).then_some(Self(number))
    }

    /// Its number, from 0.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }

    /// The guest physical address of its window of [`VIRTIO_MMIO_BYTES`].
    #[must_use]
    pub fn address(self) -> u64 {
        VIRTIO_MMIO + u64::from(self.0) * VIRTIO_MMIO_BYTES
    }

    /// Its interrupt line. Edge triggered, active high.
    #[must_use]
    pub fn gsi(self) -> u32 {
        VIRTIO_GSIS[usize::from(self.0)].into()
    }
}

/// What a range of guest physical memory is to a kernel, by its number in an e820 and a PVH memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// A range of a kernel's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Its first guest physical address.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// The memory map of a guest with `bytes` of RAM, ascending.
#[must_use]
pub fn memory_map(bytes: u64) -> Vec<MemoryRange> {
    let low_end = bytes.min(LOW_RAM_END);
    let range = |address, end: u64, kind| MemoryRange {
        address,
        bytes: end.saturating_sub(address),
        kind,
    };
    let mut map = vec![
        range(0, CONVENTIONAL_END, MemoryKind::Ram),
        range(CONVENTIONAL_END, HIGH_MEMORY, MemoryKind::Reserved),
        range(HIGH_MEMORY, low_end, MemoryKind::Ram),
    ];
    if bytes > low_end {
        map.push(range(
            HIGH_RAM_START,
            HIGH_RAM_START + (bytes - low_end),
            MemoryKind::Ram,
        ));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_and_no_window_is_given_out_twice() {
        let taken = [0, 1, 2, SERIAL_GSI, RTC_GSI, EVENT_GSI];
        let slots: Vec<_> = (0..=u8::MAX).filter_map(VirtioSlot::new).collect();
        assert_eq!(slots.len(), MAX_VIRTIO_SLOTS);
        for slot in &slots {
            assert!(!taken.contains(&slot.gsi()) && slot.gsi() < 24, "{slot:?}");
            let same = slots
                .iter()
                .filter(|o| o.gsi() == slot.gsi() || o.address() == slot.address());
            assert_eq!(same.count(), 1, "{slot:?}");
            assert!(slot.address() >= LOW_RAM_END);
            assert!(slot.address() + VIRTIO_MMIO_BYTES <= u64::from(IOAPIC));
        }
    }

    #[test]
    fn the_map_has_all_the_memory_and_no_overlap() {
        for bytes in [4 << 20, 3 << 30, (3 << 30) + (1 << 20), 6 << 30, 1 << 40] {
            let map = memory_map(bytes);
            assert!(
                map.windows(2).all(|w| w[0].address + w[0].bytes <= w[1].address),
                "{map:?}"
            );
            let total: u64 = map.iter().map(|r| r.bytes).sum();
            assert_eq!(
                total, bytes,
                "low memory counts whole, the hole in it as reserved"
            );
        }
        assert_eq!(memory_map(6 << 30)[3].address, HIGH_RAM_START);
        assert_eq!(memory_map(6 << 30)[3].bytes, 3 << 30);
    }
}
