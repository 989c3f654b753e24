//! What the loader hands over: `struct hvm_start_info` of the PVH boot protocol (Xen's
//! `public/arch-x86/hvm/start_info.h`), version 1.
//!
//! Everything wanted is copied out at once, because the structures lie in memory that the guest may use later.

use crate::layout::Range;
use crate::rt::read_at;

const MAGIC: u32 = 0x336e_c578;
const MEMORY_MAP_VERSION: u32 = 1;
const RAM: u32 = 1;

pub(crate) const MAX_COMMAND_LINE: usize = 2048;
const MAX_RANGES: usize = 64;
/// The loader's structures lie in the first GiB, which is all that is mapped at the start.
const MAPPED: u64 = 1 << 30;

#[derive(Clone, Copy)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct MemoryMapEntry {
    address: u64,
    bytes: u64,
    kind: u32,
    reserved: u32,
}

/// The command line and the RAM ranges, in the order the loader gave them.
pub(crate) struct Boot {
    command_line: [u8; MAX_COMMAND_LINE],
    command_line_bytes: usize,
    ram: [Range; MAX_RANGES],
    ram_ranges: usize,
}

/// Why the start info could not be used.
#[derive(Clone, Copy)]
pub(crate) enum BootError {
    NoStartInfo,
    CommandLineTooLong,
    CommandLineNotText,
}

impl BootError {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::NoStartInfo => "no PVH start info; boot this image through its PVH entry point",
            Self::CommandLineTooLong => "the command line is longer than 2047 bytes",
            Self::CommandLineNotText => "the command line is not UTF-8",
        }
    }
}

impl Boot {
    /// Reads the start info at `address`, as the loader passed it in EBX.
    pub(crate) fn read(address: u64) -> Result<Self, BootError> {
        if address == 0 || address >= MAPPED {
            return Err(BootError::NoStartInfo);
        }
        // SAFETY: mapped, as just checked; any bytes are a valid `StartInfo`.
        let info: StartInfo = unsafe { read_at(address) };
        if info.magic != MAGIC {
            return Err(BootError::NoStartInfo);
        }
        let mut boot = Self {
            command_line: [0; MAX_COMMAND_LINE],
            command_line_bytes: 0,
            ram: [Range::default(); MAX_RANGES],
            ram_ranges: 0,
        };
        boot.copy_command_line(info.command_line)?;
        if info.version >= MEMORY_MAP_VERSION && info.memory_map != 0 && info.memory_map < MAPPED {
            boot.copy_memory_map(info.memory_map, info.memory_map_entries);
        }
        Ok(boot)
    }

    fn copy_command_line(&mut self, address: u64) -> Result<(), BootError> {
        if address == 0 || address >= MAPPED {
            return Ok(());
        }
        for (at, slot) in (address..MAPPED).zip(&mut self.command_line) {
            // SAFETY: mapped, as the range says; any byte is a valid `u8`.
            let byte: u8 = unsafe { read_at(at) };
            if byte == 0 {
                return match core::str::from_utf8(&self.command_line[..self.command_line_bytes]) {
                    Ok(_) => Ok(()),
                    Err(_) => Err(BootError::CommandLineNotText),
                };
            }
            *slot = byte;
            self.command_line_bytes += 1;
        }
        Err(BootError::CommandLineTooLong)
    }

    fn copy_memory_map(&mut self, address: u64, entries: u32) {
        let stride = size_of::<MemoryMapEntry>() as u64;
        for at in (address..MAPPED - stride)
            .step_by(stride as usize)
            .take(entries as usize)
        {
            // SAFETY: mapped, as the range says; any bytes are a valid entry.
            let entry: MemoryMapEntry = unsafe { read_at(at) };
            if entry.kind == RAM && self.ram_ranges < MAX_RANGES {
                self.ram[self.ram_ranges] = Range {
                    start: entry.address,
                    end: entry.address.saturating_add(entry.bytes),
                };
                self.ram_ranges += 1;
            }
        }
    }

    pub(crate) fn command_line(&self) -> &str {
        core::str::from_utf8(&self.command_line[..self.command_line_bytes]).unwrap_or_default()
    }

    pub(crate) fn ram(&self) -> &[Range] {
        &self.ram[..self.ram_ranges]
    }
}
