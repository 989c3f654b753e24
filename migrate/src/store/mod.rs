//! Segments in a folder: the store of an owner (its spool) and of a holder.
//!
//! ```text
//! DIR/lock                                     flock: one process writes
//! DIR/tmp/<vm>-<generation>-<epoch>.<n>        on their way in; emptied when the store is opened
//! DIR/segments/<vm>/<generation>/<epoch>.seg   whole and verified
//! DIR/promises/<vm>                            the highest generation promised
//! DIR/acked/<vm>                               the newest checkpoint ever acknowledged
//! DIR/policies/<vm>                            what a user wants kept of it
//! DIR/damaged/                                 what was found unusable, for a person to look at
//! DIR/readers                                  flock: shared by processes that read, see [`lease`]
//!
//! begin() -> Incoming --write--> commit(): verify, sync, { promise still allows it? rename, sync folder } -> Stored
//! ```
//!
//! Invariants:
//! - What has its real name is whole. [`Stored`] is made only after that name is durable (for [`Durability::Durable`]).
//! - A name keeps its checkpoint: its bytes may be written anew (merged, folded), its [`CheckpointId`] stays.
//! - Once [`FsStore::promise`] has returned, nothing that an owner of a lower generation writes appears any more;
//!   promises never go back.
//! - Stored and reserved bytes stay within the budget. A merge may go beyond it for as long as it runs: it is what
//!   brings the bytes down.
//!
//! What it never does: it drops nothing that a [policy](KeepPolicy) keeps or a lease needs, it opens no socket, and it
//! never waits for another process.
//!
//! Two locks, each with its reason. The *index* is one mutex: every operation on it takes microseconds, every thread
//! of the agent needs the same view, and no file is written under it. A *gate* per VM is held while a name or a
//! promise is published, also across the sync: that is what makes "no lower owner after the promise" true.
//! Order: gate, then index. Neither is held while bytes are copied.

mod acked;
mod archive;
mod at;
mod collect;
mod collector;
mod error;
mod health;
mod incoming;
mod index;
mod keep;
mod lease;
mod lineage;
mod merge;
mod one_chain;
mod open;
mod pace;
mod policies;
mod promise;
mod scan;

#[cfg(test)]
mod collect_tests;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod encrypted_tests;
#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod syscall_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use segment::{
    CheckpointId, Digest, Epoch, Generation, KeyId, Keyring, Kind, ReadAt, SegmentName, SegmentReader,
    Summary, VmId, limits,
};

pub use archive::{ArchiveError, ArchiveWriter, Imported};
pub use at::{Moment, MomentError};
pub use collect::{CollectAction, CollectRules, plan_collect};
pub use collector::{CollectOptions, Collected};
pub use error::{ChainError, StoreError};
pub use health::{Health, SegmentCheck};
pub use incoming::Incoming;
pub use keep::{GUEST_KEPT, GUEST_LABEL, KeepPolicy, Point, PolicyError};
pub use lease::{Lease, Reading};
pub use lineage::Lineage;
pub use open::promised_in;
pub use pace::{Hurry, Pace, Paced};
pub use promise::{Promise, promise};

use crate::crashsafe::{Disk, DiskError};
use crate::mutex::lock;
use incoming::Quota;
use index::Index;

/// The most links a chain may have.
pub const MAX_CHAIN_LINKS: usize = 65_536;

/// The longest segment: the longest body, and a gigabyte for all that is around it.
pub const MAX_SEGMENT_BYTES: u64 = limits::MAX_BODY_BYTES + (1 << 30);

/// What must survive: the process, or the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A holder's store: what was acknowledged survives a power cut.
    Durable,
    /// The owner's own local store: the host's death loses it anyway, so nothing waits for the disk. Promises do.
    Spool,
}

/// One stored segment, as the index knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: SegmentName,
    /// The checkpoint it carries.
    pub checkpoint: CheckpointId,
    /// Full, or on which parent.
    pub kind: Kind,
    /// Deltas down to the full segment when it was taken, itself included; 0 when it was taken full.
    pub links: u32,
    /// Length of the file.
    pub bytes: u64,
    /// Its root digest.
    pub digest: Digest,
    /// When the guest was stopped for it.
    pub created_unix_ns: u64,
    /// The oldest epoch merged into it.
    pub first_epoch: Option<Epoch>,
    /// The user's label.
    pub label: Option<String>,
    /// The key that it is encrypted with; none when it is not.
    pub key: Option<KeyId>,
}

impl Entry {
    /// What `reader` has open.
    #[must_use]
    pub fn of<R: ReadAt>(reader: &SegmentReader<R>) -> Self {
        let manifest = reader.manifest();
        Self {
            name: manifest.name.clone(),
            checkpoint: manifest.checkpoint,
            kind: manifest.kind.clone(),
            links: manifest.links,
            bytes: reader.file_bytes(),
            digest: reader.digest(),
            created_unix_ns: manifest.created_unix_ns,
            first_epoch: manifest.first_epoch,
            label: manifest.label.clone(),
            key: manifest.encryption.map(|encryption| encryption.key),
        }
    }

    /// The key that it is encrypted with, where that is not among `keys`: its content cannot be read then.
    #[must_use]
    pub fn missing_key(&self, keys: &Keyring) -> Option<KeyId> {
        self.key.filter(|key| keys.get(*key).is_none())
    }

    /// The name and identity of the checkpoint this one is a change of; none when it is full.
    #[must_use]
    pub fn parent(&self) -> Option<(&SegmentName, CheckpointId)> {
        match &self.kind {
            Kind::Full => None,
            Kind::Delta {
                parent,
                parent_checkpoint,
            } => Some((parent, *parent_checkpoint)),
        }
    }
}

/// What a store holds of one VM, in sum.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldVm {
    /// How many segments.
    pub segments: usize,
    /// Their bytes.
    pub bytes: u64,
    /// The newest whose chain is whole, and the links of that.
    pub newest: Option<(Entry, u32)>,
}

/// Proof that a checkpoint is stored here as durably as this store promises. Only the store makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    entry: Entry,
}

impl Stored {
    /// What is stored.
    #[must_use]
    pub fn entry(&self) -> &Entry {
        &self.entry
    }
}

/// A file that could not be used: found when the store was opened, or later by a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedFile {
    /// The segment it should have been.
    pub name: SegmentName,
    /// Where it was.
    pub path: PathBuf,
    /// Where it is now; none when it was left where it was.
    pub moved_to: Option<PathBuf>,
    /// What is wrong with it.
    pub why: String,
}

/// A folder of segments. See the [module](self).
#[derive(Debug)]
pub struct FsStore {
    dir: PathBuf,
    budget: Option<u64>,
    disk: Disk,
    /// The locked file, when this process may write.
    lock: Option<File>,
    /// Locked together with the other readers, when this process only reads.
    readers: Option<Arc<File>>,
    /// Files that were set aside. A mutex of its own: nothing else is decided by them.
    damaged: Mutex<Vec<DamagedFile>>,
    index: Mutex<Index>,
    gates: Mutex<HashMap<VmId, Arc<Mutex<()>>>>,
    /// One collection or quarantine at a time: each decides by what the other changes. Taken before the gates.
    housekeeping: Mutex<()>,
    /// What users want kept of which VM. A mutex of its own: it is written by commands, not by the flow of segments.
    policies: Mutex<HashMap<VmId, KeepPolicy>>,
    /// What it encrypts with what it writes itself, and decrypts. Read by whoever opens a segment, written when the key
    /// file was read.
    keys: RwLock<Keyring>,
    /// VMs of which links should be merged that are encrypted with a key which is not there: one such key. For the status.
    unmergeable: Mutex<BTreeMap<VmId, KeyId>>,
}

impl FsStore {
    /// Where the store is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of all stored segments. What is reserved for segments on their way in is not counted.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.index().used()
    }

    /// The most bytes the store may take.
    #[must_use]
    pub fn budget(&self) -> Option<u64> {
        self.budget
    }

    /// What could not be used, and was set aside; what was repaired since is not among it.
    #[must_use]
    pub fn damaged(&self) -> Vec<DamagedFile> {
        lock(&self.damaged).clone()
    }

    /// Opens a temporary file for a segment of exactly `bytes` bytes, and sets that much of the budget aside.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], [`StoreError::AlreadyHeld`] (whose proof says which checkpoint is held),
    /// [`StoreError::TooLong`], [`StoreError::Full`], [`StoreError::DiskFull`].
    pub fn begin(self: &Arc<Self>, name: &SegmentName, bytes: u64) -> Result<Incoming, StoreError> {
        self.begin_under(name, bytes, name.generation)
    }

    /// The same on behalf of an owner of generation `writer`, which may be higher than the one in the name: a new
    /// owner ships, and a promoting node fetches, what an earlier generation has written. The promise is held against
    /// who writes. One who is older than the name cannot have it from its owner.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_under(
        self: &Arc<Self>,
        name: &SegmentName,
        bytes: u64,
        writer: Generation,
    ) -> Result<Incoming, StoreError> {
        self.check_begin(name, bytes, writer)?;
        Incoming::new(self, name, bytes, Quota::Exact, writer)
    }

    /// The same for a segment whose length is not known before it is written: the share of the budget grows with it.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_growing(self: &Arc<Self>, name: &SegmentName) -> Result<Incoming, StoreError> {
        self.check_begin(name, 0, name.generation)?;
        Incoming::new(self, name, 0, Quota::Growing, name.generation)
    }

    fn check_begin(&self, name: &SegmentName, bytes: u64, writer: Generation) -> Result<(), StoreError> {
        self.check_writable()?;
        if bytes > MAX_SEGMENT_BYTES {
            return Err(StoreError::TooLong {
                bytes,
                max: MAX_SEGMENT_BYTES,
            });
        }
        let index = self.index();
        check_promise(&index, name, writer)?;
        match index.get(name) {
            Some(held) => Err(StoreError::AlreadyHeld {
                stored: Box::new(Stored { entry: held.clone() }),
            }),
            None => Ok(()),
        }
    }

    /// What is held under `name`.
    #[must_use]
    pub fn get(&self, name: &SegmentName) -> Option<Entry> {
        self.index().get(name).cloned()
    }

    /// Proof that `name` is stored, when it is.
    #[must_use]
    pub fn stored(&self, name: &SegmentName) -> Option<Stored> {
        self.get(name).map(|entry| Stored { entry })
    }

    /// The VMs that have segments here.
    #[must_use]
    pub fn vms(&self) -> Vec<VmId> {
        self.index().vms()
    }

    /// The segments of one VM, oldest position first.
    #[must_use]
    pub fn entries(&self, vm: &VmId) -> Vec<Entry> {
        self.index().entries(vm)
    }

    /// How many segments there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.index().count()
    }

    /// What is held of one VM, in sum: no file is looked at, and the entries are not copied.
    #[must_use]
    pub fn sum(&self, vm: &VmId) -> HeldVm {
        self.index().sum(vm)
    }

    /// Every segment.
    #[must_use]
    pub fn all(&self) -> Vec<Entry> {
        self.index().all().cloned().collect()
    }

    /// The links of `tip`, the full segment first. Links fit by name and checkpoint.
    ///
    /// # Errors
    /// When one is not here or another checkpoint, and when there are too many.
    pub fn chain(&self, tip: &SegmentName) -> Result<Vec<Entry>, ChainError> {
        self.index().chain(tip)
    }

    /// The newest segment of `vm` whose chain is whole here.
    #[must_use]
    pub fn newest_complete(&self, vm: &VmId) -> Option<Entry> {
        self.index().newest_complete(vm).cloned()
    }

    /// The keys it has.
    #[must_use]
    pub fn keys(&self) -> Keyring {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Encrypts what it writes itself from now on with the first of `keys`, if there is one, and decrypts with all. What is
    /// received is stored as it comes, and needs none.
    pub fn set_keys(&self, keys: Keyring) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    /// VMs of which links would be merged, were the key there that they are encrypted with; each with one such key.
    #[must_use]
    pub fn unmergeable(&self) -> BTreeMap<VmId, KeyId> {
        lock(&self.unmergeable).clone()
    }

    /// Opens a segment for reading; what is encrypted is readable where the store [has the key](Self::set_keys).
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], [`StoreError::Damaged`], and what the disk says.
    pub fn open_segment(&self, name: &SegmentName) -> Result<SegmentReader<File>, StoreError> {
        let (file, _) = self.open_raw(name)?;
        SegmentReader::open_with(file, &self.keys()).map_err(|source| StoreError::Damaged {
            name: name.clone(),
            source,
        })
    }

    /// Opens the file of a segment; the entry is that of this very file (not so when the store was opened for reading
    /// and another process has merged it since). What is open stays readable, also when it is merged or removed.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], and what the disk says.
    pub fn open_raw(&self, name: &SegmentName) -> Result<(File, Entry), StoreError> {
        // Under the index's lock, because a merge replaces file and entry together under it.
        let index = self.index();
        let not_held = || StoreError::NotHeld {
            name: name.clone(),
            dir: self.dir.clone(),
        };
        let entry = index.get(name).ok_or_else(not_held)?;
        let path = self.segment_path(name);
        match crate::regular::open(&path) {
            Ok(file) => Ok((file, entry.clone())),
            // Removed in this moment, or by another process when this one only reads.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(not_held()),
            Err(source) => Err(StoreError::Io {
                what: "open",
                path,
                source,
            }),
        }
    }

    /// Removes a segment. Whether something builds on it is for the caller to know.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], and what the disk says.
    pub fn remove(&self, name: &SegmentName) -> Result<(), StoreError> {
        self.check_writable()?;
        let gate = self.gate(&name.vm);
        let _open = lock(&gate);
        if self.index().get(name).is_none() {
            return Err(StoreError::NotHeld {
                name: name.clone(),
                dir: self.dir.clone(),
            });
        }
        self.unlink(name)?;
        self.disk
            .sync_parent(&self.segment_path(name))
            .map_err(|e| self.disk_error(e))
    }

    /// Removes several segments of one VM in the order given, and waits for the disk once a folder. What is not held
    /// (any more) is passed over.
    ///
    /// # Errors
    /// What the disk says.
    pub fn remove_all(&self, names: &[SegmentName]) -> Result<(), StoreError> {
        self.check_writable()?;
        let mut folders: Vec<PathBuf> = Vec::new();
        for name in names {
            let gate = self.gate(&name.vm);
            let _open = lock(&gate);
            if self.index().get(name).is_none() {
                continue;
            }
            self.unlink(name)?;
            let path = self.segment_path(name);
            if !folders.iter().any(|folder| path.parent() == folder.parent()) {
                folders.push(path);
            }
        }
        for file in folders {
            self.disk.sync_parent(&file).map_err(|e| self.disk_error(e))?;
        }
        Ok(())
    }

    /// Takes a segment out of the folder and the index. The gate is held.
    fn unlink(&self, name: &SegmentName) -> Result<(), StoreError> {
        self.disk
            .unlink(&self.segment_path(name))
            .map_err(|e| self.disk_error(e))?;
        self.index().remove(name);
        Ok(())
    }

    /// Reads a segment from beginning to end, and checks every byte: without its key that they are those that were stored.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], [`StoreError::Damaged`], and what the disk says.
    pub fn verify(&self, name: &SegmentName) -> Result<Summary, StoreError> {
        let damaged = |source| StoreError::Damaged {
            name: name.clone(),
            source,
        };
        self.open_segment(name)?.verify().map_err(damaged)
    }

    /// The highest generation promised for `vm`; 0 when none is.
    #[must_use]
    pub fn promised(&self, vm: &VmId) -> Generation {
        self.index().promised(vm)
    }

    /// Promises to refuse every generation of `vm` below `generation`. The promise is on the disk when this returns,
    /// in every kind of store, and nothing lower appears after it.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when a higher one is promised already, and what the disk says; then it may or may not
    /// be promised, and can be asked for again.
    pub fn promise(&self, vm: &VmId, generation: Generation) -> Result<Generation, StoreError> {
        self.check_writable()?;
        let gate = self.gate(vm);
        let _open = lock(&gate);
        let current = self.promised(vm);
        match promise::promise(current, generation) {
            Promise::Refused => {
                return Err(StoreError::Fenced {
                    vm: vm.clone(),
                    asked: generation,
                    current,
                });
            }
            Promise::Stands => return Ok(current),
            Promise::Raise => {}
        }
        let disk = self.disk.made_durable();
        let to_error = |e| self.disk_error(e);
        let (stem, to) = (
            format!("promise-{vm}"),
            self.dir.join("promises").join(vm.as_str()),
        );
        disk.write(
            &self.dir.join("tmp"),
            &stem,
            &to,
            &promise::encode(vm, generation),
        )
        .map_err(to_error)?;
        // Durable: from here on it holds, and not before, as a promise that a crash can take back is none.
        self.index().set_promise(vm.clone(), generation);
        Ok(generation)
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        lock(&self.index)
    }

    fn gate(&self, vm: &VmId) -> Arc<Mutex<()>> {
        lock(&self.gates).entry(vm.clone()).or_default().clone()
    }

    fn check_writable(&self) -> Result<(), StoreError> {
        match self.lock {
            Some(_) => Ok(()),
            None => Err(StoreError::ReadOnly {
                dir: self.dir.clone(),
            }),
        }
    }

    fn disk_error(&self, error: DiskError) -> StoreError {
        StoreError::from_disk(&self.dir, error)
    }

    /// Where the file of `name` is, when it is held.
    #[must_use]
    pub fn segment_path(&self, name: &SegmentName) -> PathBuf {
        let mut path = self.dir.join("segments");
        path.extend([
            name.vm.as_str(),
            &name.generation.to_string(),
            &format!("{}{}", name.epoch, scan::ENDING),
        ]);
        path
    }
}

/// The links of `tip` among `entries`, the full segment first.
pub(crate) fn chain_of(
    entries: impl Iterator<Item = Entry>,
    tip: &SegmentName,
) -> Result<Vec<Entry>, ChainError> {
    let mut index = Index::default();
    entries.for_each(|entry| index.insert(entry));
    index.chain(tip)
}

/// A name as one path component.
fn flat(name: &SegmentName) -> String {
    format!("{}-{}-{}", name.vm, name.generation, name.epoch)
}

/// Refuses a writer whose generation is over.
fn check_promise(index: &Index, name: &SegmentName, writer: Generation) -> Result<(), StoreError> {
    let current = index.promised(&name.vm).max(name.generation);
    if promise::promise(current, writer) == Promise::Refused {
        return Err(StoreError::Fenced {
            vm: name.vm.clone(),
            asked: writer,
            current,
        });
    }
    Ok(())
}
