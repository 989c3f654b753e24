//! What a guest was booted from, kept with it: its kernel, initrd and command line.
//!
//! A reboot boots the guest from here, whatever became of the files it was started with; and as this is an address
//! space of every full checkpoint, read-only and after the disks, so it does on whatever host it was restored.
//!
//! ```text
//! page 0     "USBOOT", version, lengths of the three, little endian
//! then       the command line, the kernel, the initrd, each from a page's start on, zeros between
//! ```

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};

use super::{BootError, BootSource, Kernel, MAX_COMMAND_LINE_BYTES, pvh};
use crate::devices::virtio::disk::Disk;
use crate::memory::PAGE_BYTES;

/// The address space's name. Those of disks begin with `disk:`.
pub const NAME: &str = "boot";
/// The most bytes of it: kernel and initrd fit below 4 GiB of memory.
pub const MAX_BYTES: u64 = 4 << 30;
const MAGIC: [u8; 8] = *b"USBOOT\0\x01";
/// Stands for an initrd that there is not.
const NONE: u64 = u64::MAX;

/// The length of something in whole pages.
fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE_BYTES as u64)
}

fn memfd() -> io::Result<File> {
    let fd = memfd_create("guest-boot", MemfdFlags::CLOEXEC)?;
    Ok(File::from(fd))
}

fn failed(source: io::Error) -> BootError {
    BootError::Kept { source }
}

fn as_space(file: File) -> Result<Arc<Disk>, BootError> {
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes > MAX_BYTES {
        return Err(failed(io::Error::other(format!(
            "it has {bytes} bytes; at most {MAX_BYTES} are possible"
        ))));
    }
    Disk::from_file(NAME, Path::new(NAME), file, true).map_err(|error| failed(io::Error::other(error)))
}

/// Keeps what a guest is booted from.
///
/// # Errors
/// [`BootError`] naming the file.
pub fn keep(source: &BootSource) -> Result<Arc<Disk>, BootError> {
    let line = source.command_line.as_bytes();
    let mut kept = memfd().map_err(failed)?;
    let mut at = PAGE_BYTES as u64;
    kept.seek(SeekFrom::Start(at)).map_err(failed)?;
    kept.write_all(line).map_err(failed)?;
    at += padded(line.len() as u64);
    let mut add = |what, path: &Path, most: u64| {
        let read = |source| BootError::Read {
            what,
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        kept.seek(SeekFrom::Start(at)).map_err(failed)?;
        let bytes = io::copy(&mut file.take(most), &mut kept).map_err(read)?;
        at += padded(bytes);
        Ok(bytes)
    };
    let kernel = add("kernel", &source.kernel, used_bytes(&source.kernel)?)?;
    let initrd = source.initrd.as_deref();
    let initrd = initrd.map(|path| add("initrd", path, MAX_BYTES)).transpose()?;
    let mut head = [0; 32];
    head[..8].copy_from_slice(&MAGIC);
    head[8..16].copy_from_slice(&(line.len() as u64).to_le_bytes());
    head[16..24].copy_from_slice(&kernel.to_le_bytes());
    head[24..].copy_from_slice(&initrd.unwrap_or(NONE).to_le_bytes());
    kept.rewind().map_err(failed)?;
    kept.write_all(&head).map_err(failed)?;
    kept.set_len(at).map_err(failed)?;
    as_space(kept)
}

/// How much of a kernel's file is kept.
fn used_bytes(path: &Path) -> Result<u64, BootError> {
    let kernel = Kernel::open(path)?;
    if kernel.is_bzimage()? {
        return Ok(MAX_BYTES);
    }
    pvh::used_bytes(&kernel)
}

/// One of so many bytes, to be filled from a checkpoint.
///
/// # Errors
/// [`BootError::Kept`].
pub fn empty(bytes: u64) -> Result<Arc<Disk>, BootError> {
    let file = memfd().map_err(failed)?;
    file.set_len(bytes).map_err(failed)?;
    as_space(file)
}

/// One that an image has in a file, which stays as it is.
///
/// # Errors
/// [`BootError::Kept`].
pub fn of_file(file: File) -> Result<Arc<Disk>, BootError> {
    as_space(file)
}

/// What was kept, as files to boot from; they are there as long as this is.
#[derive(Debug)]
pub struct Opened {
    source: BootSource,
    _files: Vec<File>,
}

impl Opened {
    /// What to boot.
    #[must_use]
    pub fn source(&self) -> &BootSource {
        &self.source
    }
}

/// Opens what was kept. It may come from a segment: nothing in it is believed.
///
/// # Errors
/// [`BootError::Kept`].
pub fn open(kept: &Disk) -> Result<Opened, BootError> {
    let invalid = |why: &str| failed(io::Error::new(io::ErrorKind::InvalidData, why));
    let mut head = [0; 32];
    kept.read(0, &mut head).map_err(failed)?;
    let number = |at: usize| {
        head[at..]
            .first_chunk()
            .map_or(NONE, |bytes| u64::from_le_bytes(*bytes))
    };
    if head[..8] != MAGIC {
        return Err(invalid("it does not begin as one does"));
    }
    let (line, kernel, initrd) = (
        number(8),
        number(16),
        Some(number(24)).filter(|bytes| *bytes != NONE),
    );
    if line > MAX_COMMAND_LINE_BYTES as u64 {
        return Err(invalid("its command line is too long"));
    }
    let mut at = PAGE_BYTES as u64;
    let mut text = vec![0; line as usize];
    kept.read(at, &mut text).map_err(failed)?;
    let command_line = String::from_utf8(text).map_err(|_| invalid("its command line is not UTF-8"))?;
    at += padded(line);
    let mut files = Vec::new();
    let mut part = |bytes: u64| -> Result<PathBuf, BootError> {
        if at.checked_add(bytes).is_none_or(|end| end > kept.bytes()) {
            return Err(invalid("a part of it is beyond its end"));
        }
        let file = memfd().map_err(failed)?;
        file.set_len(bytes).map_err(failed)?;
        let mut piece = vec![0; PAGE_BYTES * 64];
        let mut done = 0;
        while done < bytes {
            let count = (bytes - done).min(piece.len() as u64) as usize;
            kept.read(at + done, &mut piece[..count]).map_err(failed)?;
            // What is zero takes no memory: a length may be a lie.
            if piece[..count].iter().any(|&byte| byte != 0) {
                file.write_all_at(&piece[..count], done).map_err(failed)?;
            }
            done += count as u64;
        }
        at += padded(bytes);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        files.push(file);
        Ok(path.into())
    };
    let kernel = part(kernel)?;
    let initrd = initrd.map(&mut part).transpose()?;
    Ok(Opened {
        source: BootSource {
            kernel,
            initrd,
            command_line,
        },
        _files: files,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage, as far as this looks at it.
    fn kernel(fill: u8, bytes: usize) -> Vec<u8> {
        let mut kernel = vec![fill; bytes.max(0x206)];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        kernel
    }

    fn source(dir: &Path, kernel: &[u8], initrd: Option<&[u8]>, line: &str) -> BootSource {
        std::fs::write(dir.join("kernel"), kernel).unwrap();
        if let Some(initrd) = initrd {
            std::fs::write(dir.join("initrd"), initrd).unwrap();
        }
        BootSource {
            kernel: dir.join("kernel"),
            initrd: initrd.map(|_| dir.join("initrd")),
            command_line: line.into(),
        }
    }

    #[test]
    fn what_was_kept_is_there_when_its_files_are_gone() {
        let (kernel, initrd) = (kernel(7, 300_001), vec![9; 5_000]);
        for (initrd, line) in [
            (Some(&initrd[..]), "console=ttyS0"),
            (Some(&[][..]), ""),
            (None, &"x".repeat(MAX_COMMAND_LINE_BYTES)),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let kept = keep(&source(dir.path(), &kernel, initrd, line)).unwrap();
            drop(dir);
            // As a restore does.
            let copy = empty(kept.bytes()).unwrap();
            let mut all = vec![0; kept.bytes() as usize];
            kept.read(0, &mut all).unwrap();
            copy.load(0, &all).unwrap();
            let opened = open(&copy).unwrap();
            assert_eq!(opened.source().command_line, line);
            assert_eq!(std::fs::read(&opened.source().kernel).unwrap(), kernel);
            let there = opened
                .source()
                .initrd
                .as_ref()
                .map(|path| std::fs::read(path).unwrap());
            assert_eq!(there.as_deref(), initrd);
        }
    }

    #[test]
    fn of_an_elf_only_what_boots_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut whole = guest_images::TICKER.to_vec();
        whole.extend(vec![0x55; 3 << 20]);
        let kept = keep(&source(dir.path(), &whole, None, "")).unwrap();
        assert!(kept.bytes() < 1 << 20, "{}", kept.bytes());
        let opened = open(&kept).unwrap();
        let back = std::fs::read(&opened.source().kernel).unwrap();
        assert!(whole.starts_with(&back) && back.len() > 4096, "{}", back.len());
    }

    #[test]
    fn whatever_is_in_it_is_refused_or_opened() {
        let dir = tempfile::tempdir().unwrap();
        let kept = keep(&source(dir.path(), &kernel(1, 600), Some(&[2; 100]), "a=b")).unwrap();
        let mut whole = vec![0; kept.bytes() as usize];
        kept.read(0, &mut whole).unwrap();
        let opened = |content: &[u8]| {
            let space = empty(content.len() as u64).unwrap();
            space.load(0, content).unwrap();
            open(&space).map(drop).map_err(|error| format!("{error:?}"))
        };
        assert_eq!(opened(&whole), Ok(()));
        for (at, bytes, why) in [
            (0, &b"x"[..], "does not begin"),
            (7, &[2], "does not begin"),
            (8, &(MAX_COMMAND_LINE_BYTES as u64 + 1).to_le_bytes(), "too long"),
            (16, &u64::MAX.to_le_bytes(), "beyond its end"),
            (16, &20_000_u64.to_le_bytes(), "beyond its end"),
            (24, &20_000_u64.to_le_bytes(), "beyond its end"),
            (PAGE_BYTES, &[0xff], "not UTF-8"),
        ] {
            let mut broken = whole.clone();
            broken[at..at + bytes.len()].copy_from_slice(bytes);
            let error = opened(&broken).unwrap_err();
            assert!(error.contains(why), "{at}: {error}");
        }
        assert!(opened(&whole[..PAGE_BYTES]).is_err());
        assert!(empty(MAX_BYTES + 4096).is_err());
    }
}
