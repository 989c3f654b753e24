//! A disk's content on this host: a raw file, and which of its blocks a checkpoint still has to take.
//!
//! ```text
//! guest writes:  | mark dirty |                          | mark dirty, save old content of C |
//! file           A    B    C  ...                        C is written anew
//! stop ----------------------- freeze(): dirty -> to take, a fresh dirty set (no block is looked at)
//! checkpoint thread                 reads A, B from the file ...... C as it was saved
//! ```
//!
//! So the stop does not grow with what was written, and what is captured is the content of exactly that instant: a
//! write to a block that is still to be read first saves what is there. When too much would have to be saved, the
//! write waits for the reader.
//!
//! Invariants: a block's old content is read either from the file before any write to it, or from what the writer
//! saved, never after; a capture's dirty set comes back with [`DiskCapture::put_back`] (rule 4).
//!
//! What it never does: it does not know requests or queues, and it keeps no content of its own beyond what is saved.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock, seek};

mod bits;
#[cfg(test)]
mod tests;

use bits::Bits;

/// A disk's unit.
pub const SECTOR_BYTES: u64 = 512;
/// The largest disk: 64 TiB.
pub const MAX_DISK_BYTES: u64 = 64 << 40;
/// Old content that is kept for a checkpoint under way; beyond it writes wait for its reader.
const MAX_SAVED_BYTES: usize = 64 << 20;
/// Zeros written at a time, where the file cannot make holes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("open {path:?} for {name}")]
    Open {
        /// The disk.
        name: String,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Another VM has it.
    #[error(
        "{path:?} for {name} is in use by another VM (its file is locked): two VMs that write one disk destroy it. \
         Stop the other one, or give this one a copy"
    )]
    Locked {
        /// The disk.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// It is no file, or of no size a disk can have.
    #[error("{path:?} cannot be {name}: {why}")]
    Unfit {
        /// The disk.
        name: String,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// The size of the blocks in which a disk of `bytes` is tracked: small, so that a delta carries little more than what
/// was written, and larger for large disks, so that the map of the blocks stays small.
#[must_use]
pub fn block_bytes(bytes: u64) -> u32 {
    match bytes >> 30 {
        0..=64 => 4 << 10,
        65..=512 => 16 << 10,
        _ => 64 << 10,
    }
}

/// Which blocks a capture is to take.
#[derive(Debug, Clone)]
enum Wanted {
    /// Those that were dirty.
    Dirty(Arc<Bits>),
    /// Every block.
    All,
}

#[derive(Debug)]
struct Capture {
    number: u64,
    wanted: Wanted,
    /// Read by the checkpoint, or saved for it.
    done: Bits,
    /// Old content of blocks written since; `None` is zeros.
    saved: HashMap<u64, Option<Box<[u8]>>>,
    saved_bytes: usize,
    /// Old content that could not be read.
    failed: Option<String>,
}

impl Capture {
    fn pending(&self, block: u64) -> bool {
        !self.done.get(block)
            && match &self.wanted {
                Wanted::Dirty(set) => set.get(block),
                Wanted::All => true,
            }
    }
}

#[derive(Debug)]
struct Tracker {
    dirty: Bits,
    capture: Option<Capture>,
    captures: u64,
}

/// A disk's file. Shared by the threads that do its I/O and the checkpoint.
#[derive(Debug)]
pub struct Disk {
    name: String,
    file: File,
    bytes: u64,
    block_bytes: u32,
    read_only: bool,
    /// Held for marking, and while old content is read: by I/O threads and the checkpoint, never by a vCPU.
    tracker: Mutex<Tracker>,
    /// Saved content was taken, or the capture ended.
    room: Condvar,
}

impl Disk {
    /// The file at `path` as the disk `name`, locked against other VMs as long as it is open.
    ///
    /// # Errors
    /// [`DiskError`] naming the file.
    pub fn open(name: &str, path: &Path, read_only: bool) -> Result<Arc<Self>, DiskError> {
        let open = |source| DiskError::Open {
            name: name.to_owned(),
            path: path.to_owned(),
            source,
        };
        let kind = std::fs::metadata(path).map_err(open)?.file_type();
        let unfit = |why: &str| DiskError::Unfit {
            name: name.to_owned(),
            path: path.to_owned(),
            why: why.to_owned(),
        };
        use std::os::unix::fs::FileTypeExt;
        // Looked at before it is opened: opening a pipe would wait for its other end.
        if !kind.is_file() && !kind.is_block_device() {
            return Err(unfit("it is neither a regular file nor a block device"));
        }
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(open)?;
        Self::from_file(name, path, file, read_only)
    }

    /// An open file as a disk; `path` is for messages.
    ///
    /// # Errors
    /// [`DiskError`] naming the file.
    pub fn from_file(name: &str, path: &Path, file: File, read_only: bool) -> Result<Arc<Self>, DiskError> {
        let open = |source: rustix::io::Errno| DiskError::Open {
            name: name.to_owned(),
            path: path.to_owned(),
            source: source.into(),
        };
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        flock(&file, lock).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => DiskError::Locked {
                name: name.to_owned(),
                path: path.to_owned(),
            },
            error => open(error),
        })?;
        // By seeking: a block device has no length in its metadata.
        let bytes = seek(&file, SeekFrom::End(0)).map_err(open)?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) || bytes > MAX_DISK_BYTES {
            return Err(DiskError::Unfit {
                name: name.to_owned(),
                path: path.to_owned(),
                why: format!(
                    "its size of {bytes} bytes is not a multiple of 512 from 512 bytes to 64 TiB (a raw image is needed, \
                     not qcow2 or the like)"
                ),
            });
        }
        let block_bytes = block_bytes(bytes);
        Ok(Arc::new(Self {
            name: name.to_owned(),
            file,
            bytes,
            block_bytes,
            read_only,
            tracker: Mutex::new(Tracker {
                dirty: Bits::new(bytes.div_ceil(block_bytes.into())),
                capture: None,
                captures: 0,
            }),
            room: Condvar::new(),
        }))
    }

    /// Its logical name, like `disk:root`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The size of a tracked block.
    #[must_use]
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// How many blocks it has, the last perhaps not whole.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.bytes.div_ceil(self.block_bytes.into())
    }

    /// The guest may not write to it.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    fn lock(&self) -> MutexGuard<'_, Tracker> {
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the disk's end",
            )),
        }
    }

    /// Reads.
    ///
    /// # Errors
    /// The system's error, or that the range is not on the disk.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.check(offset, to.len() as u64)?;
        self.file.read_exact_at(to, offset)
    }

    /// Writes.
    ///
    /// # Errors
    /// The system's error, or that the range is not on the disk.
    pub fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check(offset, from.len() as u64)?;
        self.before_write(offset, from.len() as u64);
        self.file.write_all_at(from, offset)
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// The system's error.
    pub fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }

    /// Zeroes a range, and gives its room back if `unmap`.
    ///
    /// # Errors
    /// The system's error, or that the range is not on the disk.
    pub fn zero(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        self.check(offset, bytes)?;
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            // In pieces: of each the old content may have to be saved.
            let piece = (end - at).min(MAX_SAVED_BYTES as u64 / 4);
            self.before_write(at, piece);
            self.zero_piece(at, piece, unmap)?;
            at += piece;
        }
        Ok(())
    }

    fn zero_piece(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        match fallocate(&self.file, how, offset, bytes) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        let mut done = 0;
        while done < bytes {
            let count = (bytes - done).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..count as usize], offset + done)?;
            done += count;
        }
        Ok(())
    }

    /// Marks the blocks of a range, and saves what a capture still has to take of them.
    fn before_write(&self, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let size = u64::from(self.block_bytes);
        let blocks = offset / size..(offset + bytes).div_ceil(size);
        let mut tracker = self.lock();
        while let Some(capture) = &mut tracker.capture {
            let pending: Vec<u64> = blocks.clone().filter(|&block| capture.pending(block)).collect();
            if pending.is_empty() {
                break;
            }
            let more = pending.len() * self.block_bytes as usize;
            if capture.saved_bytes > 0 && capture.saved_bytes + more > MAX_SAVED_BYTES {
                // The reader takes saved blocks as it goes, and takes the capture away at its end.
                tracker = self.room.wait(tracker).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            for block in pending {
                match self.read_block(block) {
                    Ok(content) => {
                        capture.saved_bytes += content.as_ref().map_or(0, |bytes| bytes.len());
                        capture.saved.insert(block, content);
                    }
                    // The guest's write is not held up by it: the checkpoint fails, and the next takes the block.
                    Err(error) => {
                        capture.failed = Some(format!("read block {block} of {}: {error}", self.name))
                    }
                }
                capture.done.set(block);
            }
            break;
        }
        for block in blocks {
            tracker.dirty.set(block);
        }
    }

    /// A block's content, `None` when it is zero; behind the disk's end there are zeros.
    fn read_block(&self, block: u64) -> io::Result<Option<Box<[u8]>>> {
        let mut content = vec![0; self.block_bytes as usize];
        self.read_padded(block, &mut content)?;
        Ok(content
            .iter()
            .any(|&byte| byte != 0)
            .then(|| content.into_boxed_slice()))
    }

    /// Whole blocks from `first` on, zeros behind the disk's end.
    fn read_padded(&self, first: u64, to: &mut [u8]) -> io::Result<()> {
        let offset = first * u64::from(self.block_bytes);
        let there = usize::try_from(self.bytes.saturating_sub(offset))
            .unwrap_or(usize::MAX)
            .min(to.len());
        let (content, rest) = to.split_at_mut(there);
        rest.fill(0);
        self.file.read_exact_at(content, offset)
    }

    /// Puts blocks of a checkpoint in, before the guest runs; they are not dirty.
    ///
    /// # Errors
    /// The system's error, or that they are not on the disk.
    pub fn load(&self, first: u64, from: &[u8]) -> io::Result<()> {
        let beyond = || io::Error::new(io::ErrorKind::InvalidInput, "beyond the disk's end");
        let offset = first.checked_mul(self.block_bytes.into()).ok_or_else(beyond)?;
        let there = usize::try_from(self.bytes.saturating_sub(offset))
            .unwrap_or(usize::MAX)
            .min(from.len());
        let (content, rest) = from.split_at(there);
        if content.is_empty() || rest.len() >= self.block_bytes as usize || rest.iter().any(|&b| b != 0) {
            return Err(beyond());
        }
        self.file.write_all_at(content, offset)
    }

    /// Reads blocks that were put in.
    ///
    /// # Errors
    /// The system's error.
    pub fn loaded(&self, first: u64, to: &mut [u8]) -> io::Result<()> {
        self.read_padded(first, to)
    }

    /// Begins a capture of the disk as it is now: of what changed since the last one, or of everything. For a disk
    /// whose device is drained. Looks at no block.
    ///
    /// # Errors
    /// When one is under way.
    pub fn freeze(self: &Arc<Self>, full: bool) -> Result<DiskCapture, String> {
        let mut tracker = self.lock();
        if tracker.capture.is_some() {
            return Err(format!("a checkpoint of {} is still being written", self.name));
        }
        tracker.captures += 1;
        let number = tracker.captures;
        let taken = Arc::new(std::mem::replace(&mut tracker.dirty, Bits::new(self.blocks())));
        tracker.capture = Some(Capture {
            number,
            wanted: if full {
                Wanted::All
            } else {
                Wanted::Dirty(Arc::clone(&taken))
            },
            done: Bits::new(self.blocks()),
            saved: HashMap::new(),
            saved_bytes: 0,
            failed: None,
        });
        Ok(DiskCapture {
            disk: Arc::clone(self),
            number,
            taken,
            full,
        })
    }

    /// The blocks with data (half-open, ascending); all where the file system does not say.
    fn allocated(&self) -> Vec<std::ops::Range<u64>> {
        let size = u64::from(self.block_bytes);
        let (mut runs, mut at): (Vec<std::ops::Range<u64>>, u64) = (Vec::new(), 0);
        while at < self.bytes {
            let run = seek(&self.file, SeekFrom::Data(at))
                .and_then(|start| Ok(start..seek(&self.file, SeekFrom::Hole(start))?));
            match run {
                Ok(run) => {
                    let first = (run.start / size).max(runs.last().map_or(0, |last| last.end));
                    let end = run.end.min(self.bytes).div_ceil(size);
                    if first < end {
                        runs.push(first..end);
                    }
                    at = run.end.max(at + 1);
                }
                Err(rustix::io::Errno::NXIO) => return runs,
                Err(_) => return std::iter::once(0..self.blocks()).collect(),
            }
        }
        runs
    }
}

/// A capture under way. Its blocks are read once each; dropped, it is over.
#[derive(Debug)]
pub struct DiskCapture {
    disk: Arc<Disk>,
    number: u64,
    taken: Arc<Bits>,
    full: bool,
}

impl DiskCapture {
    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The blocks to be taken, ascending. Asked after the guest has gone on: it looks at the whole disk.
    #[must_use]
    pub fn blocks(&self) -> Vec<u64> {
        if !self.full {
            return self.taken.iter().collect();
        }
        // A block that is given back while the file is looked at was saved before; saved ones are read only later.
        let mut blocks: Vec<u64> = self.disk.allocated().into_iter().flatten().collect();
        let tracker = self.disk.lock();
        if let Some(capture) = self.of(&tracker) {
            blocks.extend(capture.saved.keys());
        }
        drop(tracker);
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    fn of<'a>(&self, tracker: &'a Tracker) -> Option<&'a Capture> {
        tracker
            .capture
            .as_ref()
            .filter(|capture| capture.number == self.number)
    }

    /// Reads blocks of [`DiskCapture::blocks`], ascending, each once.
    ///
    /// # Errors
    /// The system's error, or that a block was read before: what is there now is of another instant.
    pub fn read(&self, blocks: &[u64], to: &mut [u8]) -> io::Result<()> {
        let size = self.disk.block_bytes as usize;
        let mut guard = self.disk.lock();
        let capture = guard
            .capture
            .as_mut()
            .filter(|capture| capture.number == self.number)
            .ok_or_else(|| io::Error::other("the capture is over"))?;
        if let Some(why) = &capture.failed {
            return Err(io::Error::other(why.clone()));
        }
        let mut rest = to;
        for run in blocks.chunk_by(|a, b| a + 1 == *b) {
            let mut at = 0;
            while at < run.len() {
                if let Some(content) = capture.saved.remove(&run[at]) {
                    let (page, after) = rest.split_at_mut(size);
                    match content {
                        Some(content) => {
                            page.copy_from_slice(&content);
                            capture.saved_bytes -= size;
                        }
                        None => page.fill(0),
                    }
                    rest = after;
                    at += 1;
                    continue;
                }
                let count = run[at..]
                    .iter()
                    .take_while(|&&block| capture.pending(block))
                    .count();
                if count == 0 {
                    return Err(io::Error::other(format!("block {} is not to be taken", run[at])));
                }
                let (pages, after) = rest.split_at_mut(count * size);
                self.disk.read_padded(run[at], pages)?;
                for &block in &run[at..at + count] {
                    capture.done.set(block);
                }
                rest = after;
                at += count;
            }
        }
        drop(guard);
        self.disk.room.notify_all();
        Ok(())
    }

    /// Gives the set back: the checkpoint came to nothing, and the next delta must have these blocks (rule 4).
    pub fn put_back(&self) {
        self.disk.lock().dirty.add(&self.taken);
    }
}

impl Drop for DiskCapture {
    fn drop(&mut self) {
        let mut tracker = self.disk.lock();
        if self.of(&tracker).is_some() {
            tracker.capture = None;
        }
        drop(tracker);
        self.disk.room.notify_all();
    }
}
