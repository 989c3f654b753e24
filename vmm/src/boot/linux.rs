//! The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst): long mode, the first 4 GiB mapped to
//! themselves, flat segments, RSI pointing at `boot_params`, entry 0x200 bytes into the loaded kernel.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};

use super::{BootError, Entry, Initrd, Kernel, Loaded, Room, flat_segments, write, write_gdt};
use crate::layout::{COMMAND_LINE, HIGH_MEMORY, PAGE_TABLES, RSDP, ZERO_PAGE, memory_map};

/// The first protocol with `init_size`, by which the kernel's end is known (Linux 2.6.33); `xloadflags` is checked
/// beside it.
const LEAST_PROTOCOL: u16 = 0x20a;
/// `xloadflags`: there is an entry for long mode.
const XLF_KERNEL_64: u16 = 1;
/// `loadflags`: what is loaded belongs at 1 MiB, not at 64 KiB.
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry, from the start of what is loaded.
const ENTRY_64: u64 = 0x200;
/// "Some loader without a number of its own".
const LOADER_UNKNOWN: u8 = 0xff;

/// Loads a bzImage at 1 MiB; gives its setup header.
pub(super) fn load(room: Room<'_>, kernel: &mut Kernel<'_>) -> Result<Loaded<setup_header>, BootError> {
    let mut header = setup_header::default();
    kernel.header(header.as_mut_slice(), 0x1f1)?;
    let version = header.version;
    if version < LEAST_PROTOCOL || header.loadflags & LOADED_HIGH == 0 {
        return Err(kernel.not(format!(
            "its boot protocol is {}.{:02}, older than 2.10",
            version >> 8,
            version & 0xff
        )));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(kernel.not("it has no 64-bit entry"));
    }
    let file_bytes = kernel.file.metadata().map_err(|e| kernel.read(e))?.len();
    // It decompresses itself to its preferred address and needs `init_size` bytes from there on.
    let end = u64::max(
        HIGH_MEMORY.saturating_add(file_bytes),
        header.pref_address.saturating_add(header.init_size.into()),
    );
    kernel.fits(end, room)?;
    let at = Some(GuestAddress(HIGH_MEMORY));
    BzImage::load(room.memory, at, &mut kernel.file, at).map_err(|e| kernel.not(e.to_string()))?;
    Ok(Loaded { boot: header, end })
}

/// Writes `boot_params`, the page tables and the GDT; gives the entry. `command_line` is its length in bytes.
pub(super) fn write_boot_data(
    room: Room<'_>,
    header: &setup_header,
    initrd: Option<Initrd>,
    command_line: usize,
) -> Result<Entry, BootError> {
    let most = header.cmdline_size;
    if u32::try_from(command_line).map_or(true, |bytes| bytes > most) {
        let why = format!("has {command_line} bytes; this kernel takes at most {most}");
        return Err(BootError::CommandLine { why });
    }
    let mut params = boot_params {
        hdr: *header,
        acpi_rsdp_addr: RSDP,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.code32_start = HIGH_MEMORY as u32;
    if let Some(initrd) = initrd {
        // Low RAM: both below 4 GiB.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.bytes as u32;
    }
    let map = memory_map(room.bytes);
    params.e820_entries = map.len() as u8;
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.address,
            size: range.bytes,
            r#type: range.kind as u32,
        };
    }
    write(room.memory, "the zero page", ZERO_PAGE, params.as_slice())?;
    write(room.memory, "the page tables", PAGE_TABLES, &page_tables())?;
    write_gdt(room.memory, &GDT_ENTRIES)?;
    Ok(Entry::Linux(HIGH_MEMORY + ENTRY_64))
}

/// The first 4 GiB mapped to themselves with pages of 2 MiB: one table of each upper level, then four directories.
fn page_tables() -> Vec<u8> {
    const TABLE: u64 = 0x1000;
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let mut entries = vec![0u64; 6 * 512];
    entries[0] = (PAGE_TABLES + TABLE) | PRESENT_WRITABLE;
    for (gib, entry) in (0u64..4).zip(&mut entries[512..]) {
        *entry = (PAGE_TABLES + (2 + gib) * TABLE) | PRESENT_WRITABLE;
    }
    for (number, entry) in (0u64..).zip(&mut entries[1024..]) {
        *entry = (number << 21) | PRESENT_WRITABLE | LARGE;
    }
    entries.iter().flat_map(|e| e.to_le_bytes()).collect()
}

/// The protocol wants code at 0x10 and data at 0x18; the task segment is what an x86 must have.
const GDT_ENTRIES: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];

/// The general registers.
pub(super) fn regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE,
        rflags: 2,
        ..Default::default()
    }
}

/// The special registers: `reset` is what KVM gives a fresh vCPU.
pub(super) fn sregs(reset: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        selector: 0x10,
        l: 1,
        ..Default::default()
    };
    let mut sregs = reset;
    flat_segments(&mut sregs, code, 0x18, 0x20, size_of_val(&GDT_ENTRIES));
    sregs.cr0 = 0x8000_0011; // PG, PE, ET
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0x500; // LMA, LME
    sregs
}
