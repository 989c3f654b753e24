//! Who reads: what is leased is neither dropped nor merged away.
//!
//! - Inside the process that writes the store, a [`Lease`] names the links of a chain: a transfer to another holder, a
//!   delta on its way in whose parent must stay.
//! - Another process that opened the store for reading (`vmm restore`) holds the file `readers` locked together with
//!   all other readers, by flock, so a reader that dies leaves nothing behind. The collector changes files only while
//!   it has that lock alone.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use segment::{SegmentName, VmId};

use super::{ChainError, FsStore, StoreError};

/// The file that readers lock.
const READERS: &str = "readers";

/// Keeps the links of a chain in the store for as long as it lives.
#[derive(Debug)]
pub struct Lease {
    store: Arc<FsStore>,
    links: Vec<SegmentName>,
}

/// Another process' store stays as it is for as long as this lives.
#[derive(Debug, Clone)]
pub struct Reading(#[expect(dead_code, reason = "the lock ends when the last clone is dropped")] Arc<File>);

impl Lease {
    /// Whether `name` is one of what it keeps.
    #[must_use]
    pub fn covers(&self, name: &SegmentName) -> bool {
        self.links.contains(name)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.store.index().unpin(&self.links);
    }
}

impl FsStore {
    /// Keeps `tip` and all it stands on from being collected, until the lease is dropped.
    ///
    /// # Errors
    /// When the chain is not whole here; nothing is kept then.
    pub fn lease(self: &Arc<Self>, tip: &SegmentName) -> Result<Lease, ChainError> {
        // Looked up and pinned under one lock: in between nothing can go.
        let mut index = self.index();
        let links: Vec<SegmentName> = index.chain(tip)?.into_iter().map(|entry| entry.name).collect();
        index.pin(&links);
        drop(index);
        Ok(Lease {
            store: self.clone(),
            links,
        })
    }

    /// Keeps `name` from being dropped, and so what it stands on, for what is about to stand on it. Links below it may
    /// still be merged. Takes as long for any chain.
    ///
    /// # Errors
    /// When it is not here.
    pub fn lease_parent(self: &Arc<Self>, name: &SegmentName) -> Result<Lease, ChainError> {
        let mut index = self.index();
        if index.get(name).is_none() {
            return Err(ChainError::Missing {
                link: name.clone(),
                wanted_by: name.clone(),
            });
        }
        let links = vec![name.clone()];
        index.pin(&links);
        drop(index);
        Ok(Lease {
            store: self.clone(),
            links,
        })
    }

    /// What keeps the files of a store that was opened for reading where they are; none when this process writes it.
    #[must_use]
    pub fn reading(&self) -> Option<Reading> {
        match self.lock {
            Some(_) => None,
            None => self.readers.clone().map(Reading),
        }
    }

    /// Whether something of `vm` is leased now.
    #[must_use]
    pub fn is_leased(&self, vm: &VmId) -> bool {
        !self.index().pinned(vm).is_empty()
    }

    /// Makes sure that no other process reads the store, for as long as the result lives; none when one does.
    pub(super) fn without_readers(&self) -> Result<Option<WithoutReaders<'_>>, StoreError> {
        let Some(file) = &self.readers else {
            return Ok(Some(WithoutReaders(None)));
        };
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(WithoutReaders(Some(file)))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(StoreError::Io {
                what: "lock",
                path: self.dir.join(READERS),
                source: e.into(),
            }),
        }
    }
}

/// No other process reads the store now.
pub(super) struct WithoutReaders<'a>(Option<&'a File>);

impl Drop for WithoutReaders<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.0 {
            // It ends with the file at the latest.
            let _ = flock(file, FlockOperation::Unlock);
        }
    }
}

/// The file for the one who writes.
pub(super) fn for_writer(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join(READERS);
    // Only to make it: what is there is opened as below.
    let made = OpenOptions::new().write(true).create_new(true).open(&path);
    let opened = match made {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e),
        Ok(_) | Err(_) => crate::regular::open(&path),
    };
    opened.map_err(|source| StoreError::Io {
        what: "open",
        path,
        source,
    })
}

/// The file, locked by a reader; none in a store that no collector has ever worked in, or that cannot be locked.
pub(super) fn for_reader(dir: &Path) -> Option<File> {
    let file = crate::regular::open(&dir.join(READERS)).ok()?;
    // Waits while the collector renames a file or removes some: milliseconds.
    flock(&file, FlockOperation::LockShared).ok()?;
    Some(file)
}
