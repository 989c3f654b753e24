//! The PVH entry (Xen's docs/misc/pvh.pandoc): 32-bit protected mode, paging off, flat segments, EBX pointing at
//! `hvm_start_info`.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::{BootError, Initrd, Kernel, Loaded, Room, flat_segments, write, write_gdt};
use crate::layout::{COMMAND_LINE, HIGH_MEMORY, MODULES, RSDP, START_INFO, ZERO_PAGE, memory_map};

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;

/// Loads an ELF kernel; gives its entry.
pub(super) fn load(room: Room<'_>, kernel: &mut Kernel<'_>) -> Result<Loaded<u64>, BootError> {
    let end = kernel_end(kernel)?;
    kernel.fits(end, room)?;
    let loaded = Elf::load(
        room.memory,
        None,
        &mut kernel.file,
        Some(GuestAddress(HIGH_MEMORY)),
    )
    .map_err(|e| kernel.not(e.to_string()))?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) if entry.0 < end => Ok(Loaded { boot: entry.0, end }),
        PvhBootCapability::PvhEntryPresent(_) => Err(kernel.not("its PVH entry is outside it")),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Err(kernel.not("it has no PVH entry note"))
        }
    }
}

/// A program header.
struct Program {
    kind: u32,
    /// Where its bytes are in the file.
    offset: u64,
    /// Its guest physical address.
    start: u64,
    in_file: u64,
    in_memory: u64,
}

/// The program headers, and where they end in the file. Checks the class and machine, which the loader does not.
fn programs(kernel: &Kernel<'_>) -> Result<(Vec<Program>, u64), BootError> {
    const PROGRAM_HEADER_BYTES: u64 = 56;
    let mut header = [0; 64];
    kernel.header(&mut header, 0)?;
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if &header[..4] != b"\x7fELF" {
        return Err(kernel.not(match &header[..2] {
            b"MZ" => "it is an EFI image without a Linux setup header",
            b"\x1f\x8b" => "it is compressed",
            _ => "it has no ELF header",
        }));
    }
    if header[4] != 2 || header[5] != 1 || u16_at(18) != 62 {
        return Err(kernel.not("it is not ELF64 for x86-64"));
    }
    let mut offset = [0; 8];
    offset.copy_from_slice(&header[32..40]);
    let offset = u64::from_le_bytes(offset);
    let (mut programs, mut end) = (Vec::new(), header.len() as u64);
    for number in 0..u64::from(u16_at(56)) {
        let mut program = [0; PROGRAM_HEADER_BYTES as usize];
        let at = offset
            .checked_add(number * PROGRAM_HEADER_BYTES)
            .ok_or_else(|| kernel.not("its program headers are at an impossible offset"))?;
        kernel.header(&mut program, at)?;
        let u64_at = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&program[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        programs.push(Program {
            kind: u32::from_le_bytes([program[0], program[1], program[2], program[3]]),
            offset: u64_at(8),
            start: u64_at(24),
            in_file: u64_at(32),
            in_memory: u64_at(40),
        });
        end = end.max(at + PROGRAM_HEADER_BYTES);
    }
    Ok((programs, end))
}

/// How much of the file is of any use to a boot: what follows (symbols, debugging information) is not read.
pub(super) fn used_bytes(kernel: &Kernel<'_>) -> Result<u64, BootError> {
    let (programs, end) = programs(kernel)?;
    let ends = programs
        .iter()
        .map(|program| program.offset.saturating_add(program.in_file));
    Ok(ends.fold(end, u64::max))
}

/// The end of the last loaded part, BSS included: the loader copies file contents only and would not notice that
/// the zeroed rest lies outside the guest's memory.
fn kernel_end(kernel: &Kernel<'_>) -> Result<u64, BootError> {
    const PT_LOAD: u32 = 1;
    let mut end = 0;
    let (programs, _) = programs(kernel)?;
    for program in programs.into_iter().filter(|program| program.kind == PT_LOAD) {
        let Program {
            start,
            in_file,
            in_memory,
            ..
        } = program;
        let part = start.checked_add(in_memory.max(in_file));
        end = end.max(part.ok_or_else(|| kernel.not("a program header wraps around the address space"))?);
        if start < HIGH_MEMORY && in_memory > 0 {
            return Err(kernel.not("it loads below 1 MiB, where the boot data is"));
        }
    }
    if end == 0 {
        return Err(kernel.not("it has nothing to load"));
    }
    Ok(end)
}

/// Writes `hvm_start_info` and what it points to, and the GDT.
pub(super) fn write_boot_data(room: Room<'_>, initrd: Option<Initrd>) -> Result<(), BootError> {
    let memory = room.memory;
    let map = memory_map(room.bytes);
    let mut table = Vec::new();
    for range in &map {
        // hvm_memmap_table_entry: addr, size, type and a reserved word.
        let entry = [range.address, range.bytes, range.kind as u64];
        table.extend(entry.into_iter().flat_map(u64::to_le_bytes));
    }
    write(memory, "the memory map", ZERO_PAGE, &table)?;
    if let Some(initrd) = initrd {
        // hvm_modlist_entry: paddr, size, cmdline_paddr, reserved.
        let module: Vec<u8> = [initrd.address, initrd.bytes, 0, 0]
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect();
        write(memory, "the module list", MODULES, &module)?;
    }
    let modules = u32::from(initrd.is_some());
    let mut info = Vec::new();
    // hvm_start_info, version 1: magic, version, flags, nr_modules; modlist, cmdline, rsdp, memmap; entries, reserved.
    info.extend(
        [START_MAGIC, 1, 0, modules]
            .into_iter()
            .flat_map(u32::to_le_bytes),
    );
    let modlist = if modules > 0 { MODULES } else { 0 };
    info.extend(
        [modlist, COMMAND_LINE, RSDP, ZERO_PAGE]
            .into_iter()
            .flat_map(u64::to_le_bytes),
    );
    info.extend([map.len() as u32, 0].into_iter().flat_map(u32::to_le_bytes));
    write(memory, "hvm_start_info", START_INFO, &info)?;
    write_gdt(memory, &GDT_ENTRIES)
}

/// Flat 32-bit code and data, and the task segment an x86 must have.
const GDT_ENTRIES: [u64; 4] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
];

/// The general registers.
pub(super) fn regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rbx: START_INFO,
        rflags: 2,
        ..Default::default()
    }
}

/// The special registers: `reset` is what KVM gives a fresh vCPU.
pub(super) fn sregs(reset: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        selector: 0x8,
        db: 1,
        ..Default::default()
    };
    let mut sregs = reset;
    flat_segments(&mut sregs, code, 0x10, 0x18, size_of_val(&GDT_ENTRIES));
    sregs.cr0 = 0x11; // PE, ET
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs
}
