//! Starting a guest from the beginning: an ELF kernel by its PVH entry.
//!
//! ```text
//! 0x00500  GDT                    0x20000  command line (to 0x2ffff)
//! 0x06000  hvm_start_info         1 MiB..  the kernel, where its program headers put it
//! 0x06040  module list            top      the initrd, page aligned, below 3 GiB
//! 0x07000  memory map
//! ```
//! The PVH entry (Xen's docs/misc/pvh.pandoc): 32-bit protected mode, paging off, flat segments, EBX pointing at
//! `hvm_start_info`.

use std::fs::File;
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi;
use crate::layout::{
    COMMAND_LINE, GDT, HIGH_MEMORY, LOW_RAM_END, MODULES, RSDP, START_INFO, VirtioSlot,
    ZERO_PAGE as MEMORY_MAP, memory_map,
};
use crate::memory::{GuestMemory, GuestRam, PAGE_BYTES};

/// The longest command line, in bytes, without its closing zero.
pub const MAX_COMMAND_LINE_BYTES: usize = 0xffff;
/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;

/// What a guest is started with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootSource {
    /// An ELF kernel with a PVH note.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
}

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("read {what} {path:?}")]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// It is no kernel.
    #[error(
        "{path:?} is not a kernel this monitor can start ({why}): give an ELF64 kernel with a PVH entry note, \
             such as an uncompressed Linux `vmlinux` built with CONFIG_PVH"
    )]
    NotAKernel {
        /// Its path.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// Kernel and initrd do not fit.
    #[error(
        "{memory} bytes of memory are too little for {what}, which needs memory up to {needs:#x}: give the \
             guest more with --memory"
    )]
    TooLittleMemory {
        /// What does not fit.
        what: &'static str,
        /// The guest's memory.
        memory: u64,
        /// The guest physical address it must reach.
        needs: u64,
    },
    /// The command line is too long or has a zero byte.
    #[error("the command line {why}")]
    CommandLine {
        /// What is wrong.
        why: String,
    },
    /// A write of boot data failed; cannot happen in memory of the least size.
    #[error("write {what} to guest memory")]
    Write {
        /// Which structure.
        what: &'static str,
        /// vm-memory's error.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Loads kernel, initrd and boot data for a machine of `vcpus` with devices in `slots`; returns the address of the first instruction.
///
/// # Errors
/// [`BootError`] naming the file and what is wrong with it.
pub fn load(ram: &GuestRam, source: &BootSource, vcpus: u8, slots: &[VirtioSlot]) -> Result<u64, BootError> {
    let memory = ram.memory();
    let low_end = ram.bytes().min(LOW_RAM_END);
    let (entry, kernel_end) = load_kernel(memory, &source.kernel, ram.bytes(), low_end)?;
    let initrd = source
        .initrd
        .as_deref()
        .map(|path| load_initrd(memory, path, kernel_end, low_end, ram.bytes()))
        .transpose()?;
    load_command_line(memory, &source.command_line)?;
    for (at, table) in acpi::tables(vcpus, slots) {
        write(memory, "an ACPI table", at, &table)?;
    }
    write_start_info(memory, ram.bytes(), initrd)?;
    write_gdt(memory)?;
    Ok(entry)
}

fn load_kernel(memory: &GuestMemory, path: &Path, bytes: u64, low_end: u64) -> Result<(u64, u64), BootError> {
    let not = |why: String| BootError::NotAKernel {
        path: path.to_owned(),
        why,
    };
    let read = |source| BootError::Read {
        what: "kernel",
        path: path.to_owned(),
        source,
    };
    // Looked at before it is opened: opening a pipe would wait for its other end.
    if !std::fs::metadata(path).map_err(read)?.is_file() {
        return Err(not("it is not a regular file".into()));
    }
    let mut file = File::open(path).map_err(read)?;
    let needs = kernel_end(&mut file).map_err(|e| match e {
        HeaderError::Io(source) if source.kind() != std::io::ErrorKind::UnexpectedEof => read(source),
        HeaderError::Io(_) => not("it ends inside its headers".into()),
        HeaderError::Not(why) => not(why.into()),
    })?;
    if needs > low_end {
        return Err(BootError::TooLittleMemory {
            what: "the kernel",
            memory: bytes,
            needs,
        });
    }
    let loaded = Elf::load(memory, None, &mut file, Some(GuestAddress(HIGH_MEMORY)))
        .map_err(|e| not(e.to_string()))?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) if entry.0 < needs => Ok((entry.0, needs)),
        PvhBootCapability::PvhEntryPresent(_) => Err(not("its PVH entry is outside it".into())),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Err(not("it has no PVH entry note".into()))
        }
    }
}

enum HeaderError {
    Io(std::io::Error),
    Not(&'static str),
}

/// The end of the last loaded part, BSS included: the loader copies file contents only and would not notice that
/// the zeroed rest lies outside the guest's memory. Checks the class and machine, which the loader does not.
fn kernel_end(file: &mut File) -> Result<u64, HeaderError> {
    use std::os::unix::fs::FileExt;
    const PROGRAM_HEADER_BYTES: u64 = 56;
    const PT_LOAD: u32 = 1;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).map_err(HeaderError::Io)?;
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if &header[..4] != b"\x7fELF" {
        return Err(HeaderError::Not(match &header[..2] {
            b"MZ" => "it is a bzImage or EFI image; extract its vmlinux",
            b"\x1f\x8b" => "it is compressed",
            _ => "it has no ELF header",
        }));
    }
    if header[4] != 2 || header[5] != 1 || u16_at(18) != 62 {
        return Err(HeaderError::Not("it is not ELF64 for x86-64"));
    }
    let mut offset = [0; 8];
    offset.copy_from_slice(&header[32..40]);
    let offset = u64::from_le_bytes(offset);
    let mut end = 0;
    for number in 0..u64::from(u16_at(56)) {
        let mut program = [0; PROGRAM_HEADER_BYTES as usize];
        let at = offset
            .checked_add(number * PROGRAM_HEADER_BYTES)
            .ok_or(HeaderError::Not(
                "its program headers are at an impossible offset",
            ))?;
        file.read_exact_at(&mut program, at).map_err(HeaderError::Io)?;
        let u64_at = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&program[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        if u32::from_le_bytes([program[0], program[1], program[2], program[3]]) != PT_LOAD {
            continue;
        }
        let (start, in_file, in_memory) = (u64_at(24), u64_at(32), u64_at(40));
        let part = start.checked_add(in_memory.max(in_file));
        end = end.max(part.ok_or(HeaderError::Not(
            "a program header wraps around the address space",
        ))?);
        if start < HIGH_MEMORY && in_memory > 0 {
            return Err(HeaderError::Not("it loads below 1 MiB, where the boot data is"));
        }
    }
    if end == 0 {
        return Err(HeaderError::Not("it has nothing to load"));
    }
    Ok(end)
}

fn load_initrd(
    memory: &GuestMemory,
    path: &Path,
    kernel_end: u64,
    low_end: u64,
    bytes: u64,
) -> Result<(u64, u64), BootError> {
    let read = |source| BootError::Read {
        what: "initrd",
        path: path.to_owned(),
        source,
    };
    if !std::fs::metadata(path).map_err(read)?.is_file() {
        return Err(read(std::io::Error::other("it is not a regular file")));
    }
    let mut file = File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    let floor = kernel_end.next_multiple_of(PAGE_BYTES as u64);
    let start = low_end
        .checked_sub(length)
        .map(|at| at & !(PAGE_BYTES as u64 - 1))
        .filter(|&at| at >= floor);
    let Some(start) = start else {
        let needs = floor.saturating_add(length);
        return Err(BootError::TooLittleMemory {
            what: "kernel and initrd",
            memory: bytes,
            needs,
        });
    };
    let count = usize::try_from(length).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, count)
        .map_err(|e| read(std::io::Error::other(e)))?;
    Ok((start, length))
}

fn load_command_line(memory: &GuestMemory, line: &str) -> Result<(), BootError> {
    if line.len() > MAX_COMMAND_LINE_BYTES {
        let why = format!("has {} bytes; at most {MAX_COMMAND_LINE_BYTES} fit", line.len());
        return Err(BootError::CommandLine { why });
    }
    if line.bytes().any(|b| b == 0) {
        return Err(BootError::CommandLine {
            why: "has a zero byte in it".into(),
        });
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    write(memory, "the command line", COMMAND_LINE, &bytes)
}

fn write_start_info(memory: &GuestMemory, bytes: u64, initrd: Option<(u64, u64)>) -> Result<(), BootError> {
    let map = memory_map(bytes);
    let mut table = Vec::new();
    for range in &map {
        // hvm_memmap_table_entry: addr, size, type and a reserved word.
        let entry = [range.address, range.bytes, range.kind as u64];
        table.extend(entry.into_iter().flat_map(u64::to_le_bytes));
    }
    write(memory, "the memory map", MEMORY_MAP, &table)?;
    if let Some((start, length)) = initrd {
        // hvm_modlist_entry: paddr, size, cmdline_paddr, reserved.
        let module: Vec<u8> = [start, length, 0, 0]
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
        [modlist, COMMAND_LINE, RSDP, MEMORY_MAP]
            .into_iter()
            .flat_map(u64::to_le_bytes),
    );
    info.extend([map.len() as u32, 0].into_iter().flat_map(u32::to_le_bytes));
    write(memory, "hvm_start_info", START_INFO, &info)
}

/// Flat 32-bit code and data, and the task segment an x86 must have.
const GDT_ENTRIES: [u64; 4] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
];

fn write_gdt(memory: &GuestMemory) -> Result<(), BootError> {
    let bytes: Vec<u8> = GDT_ENTRIES.iter().flat_map(|e| e.to_le_bytes()).collect();
    write(memory, "the GDT", GDT, &bytes)
}

fn write(memory: &GuestMemory, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|source| BootError::Write { what, source })
}

/// The general registers at the PVH entry.
#[must_use]
pub fn entry_regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rbx: START_INFO,
        rflags: 2,
        ..Default::default()
    }
}

/// The special registers at the PVH entry: `reset` is what KVM gives a fresh vCPU.
#[must_use]
pub fn entry_sregs(reset: kvm_sregs) -> kvm_sregs {
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let code = kvm_segment {
        selector: 0x8,
        type_: 11,
        ..data
    };
    let task = kvm_segment {
        selector: 0x18,
        type_: 11,
        limit: 0x67,
        present: 1,
        ..Default::default()
    };
    let mut sregs = reset;
    (sregs.cs, sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (code, data, data, data, data, data);
    sregs.tr = task;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&GDT_ENTRIES) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = 0x11; // PE, ET
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs
}
