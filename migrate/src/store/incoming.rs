//! A segment on its way into a store.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use rustix::fs::statvfs;
use segment::{Generation, SegmentName, SegmentReader, Summary};

use super::pace::{Pace, Paced};
use super::{Entry, FsStore, MAX_SEGMENT_BYTES, StoreError, Stored, check_promise, flat, lock};
use crate::crashsafe::{DiskError, Temp, is_full};

/// What segments leave free on the disk: a promise has to find room on a disk that is full for segments, or nobody could
/// take over.
const KEPT_FREE_BYTES: u64 = 8 << 20;
/// By how much a growing reservation grows.
const GROW_BYTES: u64 = 1 << 20;

/// Whose bytes they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quota {
    /// A peer announced the length: not a byte more.
    Exact,
    /// Our own encoder writes it: as long as there is room.
    Growing,
    /// A merge, which makes room: not counted.
    Exempt,
}

/// A temporary file, and a share of the budget. Dropped without [`commit`](Self::commit), both are gone.
pub struct Incoming {
    store: Arc<FsStore>,
    name: SegmentName,
    /// The generation of who writes it.
    writer: Generation,
    temp: Temp,
    quota: Quota,
    reserved: u64,
    at: u64,
    /// Why a write was refused: it reaches the caller through an `io::Error`, which does not have the words.
    failure: Option<StoreError>,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("name", &self.name)
            .field("reserved", &self.reserved)
            .finish_non_exhaustive()
    }
}

impl Incoming {
    pub(super) fn new(
        store: &Arc<FsStore>,
        name: &SegmentName,
        bytes: u64,
        quota: Quota,
        writer: Generation,
    ) -> Result<Self, StoreError> {
        check_free(store, bytes)?;
        reserve(store, bytes)?;
        let temp = store
            .disk
            .temp(&store.dir.join("tmp"), &flat(name))
            .map_err(|e| {
                store.index().release(bytes);
                store.disk_error(e)
            })?;
        Ok(Self {
            store: store.clone(),
            name: name.clone(),
            writer,
            temp,
            quota,
            reserved: bytes,
            at: 0,
            failure: None,
        })
    }

    /// The name it was begun with.
    #[must_use]
    pub fn name(&self) -> &SegmentName {
        &self.name
    }

    /// Why a write was refused, when one was: takes the reason out.
    pub fn take_failure(&mut self) -> Option<StoreError> {
        self.failure.take()
    }

    /// Verifies every byte of it, makes it durable and gives it its name.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] and [`StoreError::OtherName`] when it is not a whole segment of its name,
    /// [`StoreError::Fenced`] when a higher generation was promised meanwhile, [`StoreError::DuplicateName`] when the
    /// name was taken by another checkpoint meanwhile, and what the disk says. When the very same checkpoint was
    /// stored meanwhile, that is no error: the proof is that of what is held.
    pub fn commit(self) -> Result<Stored, StoreError> {
        let entry = self.check()?;
        self.publish(entry)
    }

    /// Verifies every byte of it; what it is.
    pub(super) fn check(&self) -> Result<Entry, StoreError> {
        let reader = self.open()?;
        reader.verify().map_err(|source| StoreError::Damaged {
            name: self.name.clone(),
            source,
        })?;
        Ok(Entry::of(&reader))
    }

    /// The same for what this process has just encoded itself: what it wrote is `summary`, so the frames are not read
    /// back.
    pub(crate) fn commit_written(self, summary: &Summary) -> Result<Stored, StoreError> {
        let entry = Entry::of(&self.open()?);
        if entry.digest != summary.digest {
            let source = segment::FormatError::Digest { what: "file".into() };
            return Err(StoreError::Damaged {
                name: self.name.clone(),
                source,
            });
        }
        self.publish(entry)
    }

    fn open(&self) -> Result<SegmentReader<Paced<&File>>, StoreError> {
        self.open_at(&Pace::unlimited())
    }

    fn open_at(&self, pace: &Pace) -> Result<SegmentReader<Paced<&File>>, StoreError> {
        let reader =
            SegmentReader::open_with(pace.of(self.temp.file()), &self.store.keys()).map_err(|source| {
                StoreError::Damaged {
                    name: self.name.clone(),
                    source,
                }
            })?;
        let found = &reader.manifest().name;
        if *found != self.name {
            return Err(StoreError::OtherName {
                expected: self.name.clone(),
                found: found.clone(),
            });
        }
        Ok(reader)
    }

    /// Gives it its name: `entry` is what is in it, and was checked.
    pub(super) fn publish(mut self, entry: Entry) -> Result<Stored, StoreError> {
        let store = self.store.clone();
        let to_error = |e| store.disk_error(e);
        // Before the gate: this is what takes long, and other names of the VM need not wait for it.
        self.temp.sync().map_err(to_error)?;

        let gate = store.gate(&self.name.vm);
        let _open = lock(&gate);
        check_promise(&store.index(), &self.name, self.writer)?;
        if let Some(held) = store.get(&self.name) {
            return same_checkpoint(&entry, held);
        }
        let path = store.segment_path(&self.name);
        for folder in [path.parent().and_then(|p| p.parent()), path.parent()]
            .into_iter()
            .flatten()
        {
            // Not asked of the disk: a folder that is there may have been made by a call that could not sync it.
            if !store.index().has_folder(folder) {
                store.disk.create_dir(folder).map_err(to_error)?;
                store.index().add_folder(folder.to_owned());
            }
        }
        match self.temp.rename_new(&path) {
            Ok(()) => {}
            Err(e) if e.source.kind() == io::ErrorKind::AlreadyExists => return self.meet_stranger(entry),
            Err(e) => return Err(to_error(e)),
        }
        // When this fails the name is visible and nobody was told: it is met again as a stranger, or at the next open.
        store.disk.sync_parent(&path).map_err(to_error)?;
        Ok(self.enter(entry))
    }

    /// A file has the name, and the index does not know it: a commit before could not sync the folder, or someone put
    /// it there. The gate is held.
    fn meet_stranger(self, entry: Entry) -> Result<Stored, StoreError> {
        let path = self.store.segment_path(&self.name);
        let to_error = |e| self.store.disk_error(e);
        let damaged = |source| StoreError::Damaged {
            name: self.name.clone(),
            source,
        };
        let file = File::open(&path).map_err(|source| {
            to_error(DiskError {
                what: "open",
                path: path.clone(),
                source,
            })
        })?;
        let reader = SegmentReader::open(&file).map_err(damaged)?;
        let there = Entry::of(&reader);
        if there.name != entry.name || there.checkpoint != entry.checkpoint {
            let (held, offered) = (there.checkpoint, entry.checkpoint);
            return Err(StoreError::DuplicateName {
                name: self.name.clone(),
                held,
                offered,
            });
        }
        reader.verify().map_err(damaged)?;
        self.store.disk.sync_file(&path, &file).map_err(to_error)?;
        self.store.disk.sync_parent(&path).map_err(to_error)?;
        Ok(self.enter(there))
    }

    /// Tells the index. The name is durable.
    fn enter(mut self, entry: Entry) -> Stored {
        let mut index = self.store.index();
        index.release(std::mem::take(&mut self.reserved));
        index.insert(entry.clone());
        drop(index);
        // What was damaged is here again, sound.
        lock(&self.store.damaged).retain(|damaged| damaged.name != entry.name);
        Stored { entry }
    }

    /// Makes sure that `end` bytes may be written.
    fn cover(&mut self, end: u64) -> Result<(), StoreError> {
        if end <= self.reserved {
            return Ok(());
        }
        match self.quota {
            Quota::Exact => Err(StoreError::Overrun {
                name: self.name.clone(),
                announced: self.reserved,
            }),
            Quota::Exempt => Ok(()),
            Quota::Growing if end > MAX_SEGMENT_BYTES => Err(StoreError::TooLong {
                bytes: end,
                max: MAX_SEGMENT_BYTES,
            }),
            Quota::Growing => {
                let need = end - self.reserved;
                // In steps, so that not every write goes to the index; the last bit of the budget is usable too.
                let more = need.max(GROW_BYTES);
                let grown = match reserve(&self.store, more) {
                    Ok(()) => more,
                    Err(_) => reserve(&self.store, need).map(|()| need)?,
                };
                self.reserved += grown;
                Ok(())
            }
        }
    }

    pub(super) fn temp(&mut self) -> &mut Temp {
        &mut self.temp
    }

    /// The file under it.
    pub(super) fn file(&self) -> &File {
        self.temp.file()
    }

    /// What was written, to be read at a pace.
    pub(super) fn reader_at(&self, pace: &Pace) -> Result<SegmentReader<Paced<&File>>, StoreError> {
        self.open_at(pace)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.store.index().release(self.reserved);
    }
}

impl Write for Incoming {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if let Err(e) = self.cover(self.at.saturating_add(buf.len() as u64)) {
            let text = e.to_string();
            self.failure = Some(e);
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        }
        let written = self.temp.write(buf).inspect_err(|e| {
            if is_full(e) {
                let source = io::Error::from(e.kind());
                self.failure = Some(StoreError::DiskFull {
                    dir: self.store.dir.clone(),
                    free: None,
                    source: Some(source),
                });
            }
        })?;
        self.at += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.temp.flush()
    }
}

impl Read for Incoming {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.temp.read(buf)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Incoming {
    fn seek(&mut self, pos: SeekFrom) -> io::Result<u64> {
        self.at = self.temp.seek(pos)?;
        Ok(self.at)
    }
}

/// The answer to a checkpoint whose name is held: proof, when it is the same one.
fn same_checkpoint(offered: &Entry, held: Entry) -> Result<Stored, StoreError> {
    if held.checkpoint == offered.checkpoint {
        return Ok(Stored { entry: held });
    }
    let (name, held, offered) = (held.name, held.checkpoint, offered.checkpoint);
    Err(StoreError::DuplicateName { name, held, offered })
}

fn reserve(store: &FsStore, more: u64) -> Result<(), StoreError> {
    store
        .index()
        .reserve(more, store.budget)
        .map_err(|used| StoreError::Full {
            dir: store.dir.clone(),
            need: more,
            used,
            budget: store.budget.unwrap_or(u64::MAX),
        })
}

/// Refuses early what cannot fit on the disk: the end of a long transfer is a bad place to find out.
pub(super) fn check_free(store: &FsStore, bytes: u64) -> Result<(), StoreError> {
    let Ok(stat) = statvfs(&store.dir) else {
        return Ok(());
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if bytes.saturating_add(KEPT_FREE_BYTES) > free {
        return Err(StoreError::DiskFull {
            dir: store.dir.clone(),
            free: Some(free),
            source: None,
        });
    }
    Ok(())
}
