//! Starting a guest from the beginning: a Linux bzImage by the 64-bit boot protocol, or an ELF kernel by its PVH
//! entry. The file says itself which it is.
//!
//! Both are given the same machine (layout.rs): a memory map, the ACPI tables, a command line and an initrd at the
//! top of low RAM. They differ in where that is written and in the registers of the first instruction.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi;
use crate::layout::{COMMAND_LINE, GDT, LOW_RAM_END, RESET_PORT, RESET_VALUE, RESET_VECTOR, VirtioSlot};
use crate::memory::{GuestMemory, GuestRam, PAGE_BYTES};

pub mod kept;
mod linux;
mod pvh;

/// The longest command line there is room for, in bytes, without its closing zero.
pub const MAX_COMMAND_LINE_BYTES: usize = 0xffff;

/// What a guest is started with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootSource {
    /// A bzImage, or an ELF kernel with a PVH note.
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
        "{path:?} is not a kernel this monitor can start ({why}): give a 64-bit Linux bzImage (a `vmlinuz` as \
         distributions have it), or an ELF64 kernel with a PVH entry note"
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
    /// What the guest was booted from cannot be kept, or not be read again.
    #[error(
        "what the guest is booted from (kernel, initrd, command line) cannot be kept for its next reboot, or not be read"
    )]
    Kept {
        /// Why not.
        #[source]
        source: std::io::Error,
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

/// How the first vCPU is to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32 bits, no paging, at this address.
    Pvh(u64),
    /// Linux: 64 bits, identity-mapped pages, at this address.
    Linux(u64),
}

impl Entry {
    /// The general registers.
    #[must_use]
    pub fn regs(self) -> kvm_regs {
        match self {
            Self::Pvh(address) => pvh::regs(address),
            Self::Linux(address) => linux::regs(address),
        }
    }

    /// The special registers: `reset` is what KVM gives a fresh vCPU.
    #[must_use]
    pub fn sregs(self, reset: kvm_sregs) -> kvm_sregs {
        match self {
            Self::Pvh(_) => pvh::sregs(reset),
            Self::Linux(_) => linux::sregs(reset),
        }
    }
}

/// A kernel in guest memory.
struct Loaded<B> {
    /// What its protocol wants to know of it.
    boot: B,
    /// One past the highest address it uses before it reads the memory map.
    end: u64,
}

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy)]
struct Initrd {
    address: u64,
    bytes: u64,
}

/// The memory a kernel is loaded into.
#[derive(Clone, Copy)]
struct Room<'a> {
    memory: &'a GuestMemory,
    /// All of the guest's RAM.
    bytes: u64,
    /// Where RAM that a kernel reaches without the memory map ends.
    low_end: u64,
}

/// Loads kernel, initrd and boot data for a machine of `vcpus` with devices in `slots`; returns where it begins.
///
/// # Errors
/// [`BootError`] naming the file and what is wrong with it.
pub fn load(
    ram: &GuestRam,
    source: &BootSource,
    vcpus: u8,
    slots: &[VirtioSlot],
) -> Result<Entry, BootError> {
    let room = Room {
        memory: ram.memory(),
        bytes: ram.bytes(),
        low_end: ram.bytes().min(LOW_RAM_END),
    };
    load_command_line(room.memory, &source.command_line)?;
    for (at, table) in acpi::tables(vcpus, slots) {
        write(room.memory, "an ACPI table", at, &table)?;
    }
    write(room.memory, "the reset vector", RESET_VECTOR, &reset_code())?;
    let initrd = |end| {
        let path = source.initrd.as_deref();
        path.map(|path| load_initrd(room, path, end)).transpose()
    };
    let mut kernel = Kernel::open(&source.kernel)?;
    if kernel.is_bzimage()? {
        let loaded = linux::load(room, &mut kernel)?;
        let initrd = initrd(loaded.end)?;
        linux::write_boot_data(room, &loaded.boot, initrd, source.command_line.len())
    } else {
        let loaded = pvh::load(room, &mut kernel)?;
        let initrd = initrd(loaded.end)?;
        pvh::write_boot_data(room, initrd)?;
        Ok(Entry::Pvh(loaded.boot))
    }
}

/// Real-mode code for the reset vector: `mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; hlt`. Linux takes that way
/// on a hardware-reduced machine without EFI (its reboot type "efi" falls back to "bios").
fn reset_code() -> [u8; 7] {
    let [low, high] = RESET_PORT.to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4]
}

/// A kernel's file.
struct Kernel<'a> {
    path: &'a Path,
    file: File,
}

/// Where a bzImage has its magic number, and which.
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;
const BZIMAGE_MAGIC: &[u8; 4] = b"HdrS";

impl<'a> Kernel<'a> {
    fn open(path: &'a Path) -> Result<Self, BootError> {
        let read = |source| BootError::Read {
            what: "kernel",
            path: path.to_owned(),
            source,
        };
        // Looked at before it is opened: opening a pipe would wait for its other end.
        if !std::fs::metadata(path).map_err(read)?.is_file() {
            return Err(BootError::NotAKernel {
                path: path.to_owned(),
                why: "it is not a regular file".into(),
            });
        }
        let file = File::open(path).map_err(read)?;
        Ok(Self { path, file })
    }

    fn not(&self, why: impl Into<String>) -> BootError {
        BootError::NotAKernel {
            path: self.path.to_owned(),
            why: why.into(),
        }
    }

    fn read(&self, source: std::io::Error) -> BootError {
        BootError::Read {
            what: "kernel",
            path: self.path.to_owned(),
            source,
        }
    }

    /// Reads `to.len()` bytes at `offset` of the file's headers.
    fn header(&self, to: &mut [u8], offset: u64) -> Result<(), BootError> {
        self.file.read_exact_at(to, offset).map_err(|e| {
            if e.kind() == std::io::ErrorKind::UnexpectedEof {
                self.not("it ends inside its headers")
            } else {
                self.read(e)
            }
        })
    }

    fn is_bzimage(&self) -> Result<bool, BootError> {
        let mut magic = [0; 4];
        match self.file.read_exact_at(&mut magic, BZIMAGE_MAGIC_OFFSET) {
            Ok(()) => Ok(&magic == BZIMAGE_MAGIC),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(self.read(e)),
        }
    }

    /// Refuses a kernel that uses memory up to `needs`, if there is not that much.
    fn fits(&self, needs: u64, room: Room<'_>) -> Result<(), BootError> {
        if needs > room.low_end {
            return Err(BootError::TooLittleMemory {
                what: "the kernel",
                memory: room.bytes,
                needs,
            });
        }
        Ok(())
    }
}

fn load_initrd(room: Room<'_>, path: &Path, kernel_end: u64) -> Result<Initrd, BootError> {
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
    let start = room
        .low_end
        .checked_sub(length)
        .map(|at| at & !(PAGE_BYTES as u64 - 1))
        .filter(|&at| at >= floor);
    let Some(start) = start else {
        let needs = floor.saturating_add(length);
        return Err(BootError::TooLittleMemory {
            what: "kernel and initrd",
            memory: room.bytes,
            needs,
        });
    };
    let count = usize::try_from(length).unwrap_or(usize::MAX);
    room.memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, count)
        .map_err(|e| read(std::io::Error::other(e)))?;
    Ok(Initrd {
        address: start,
        bytes: length,
    })
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

fn write_gdt(memory: &GuestMemory, entries: &[u64]) -> Result<(), BootError> {
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
    write(memory, "the GDT", GDT, &bytes)
}

fn write(memory: &GuestMemory, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|source| BootError::Write { what, source })
}

/// Flat segments at these selectors, and no interrupt table.
fn flat_segments(sregs: &mut kvm_sregs, code: kvm_segment, data: u16, task: u16, gdt_bytes: usize) {
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: data,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        type_: 11,
        present: 1,
        s: 1,
        g: 1,
        ..code
    };
    (sregs.cs, sregs.ds, sregs.es) = (code, data, data);
    (sregs.ss, sregs.fs, sregs.gs) = (data, data, data);
    sregs.tr = kvm_segment {
        selector: task,
        type_: 11,
        limit: 0x67,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (gdt_bytes - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

#[cfg(test)]
mod tests;
