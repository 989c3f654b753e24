//! Opening a store: lock, clean up, read what is there.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use rustix::fs::{FlockOperation, flock};
use segment::{Generation, SegmentName, VmId};

use super::index::Index;
use super::scan::{self, Content};
use super::{DamagedFile, Durability, FsStore, StoreError, acked, flat, lease, lock, promise};
use crate::crashsafe::{Disk, DiskError};

/// How often an incoming name in `damaged/` is tried with another number.
const MAX_DAMAGED_NAMES: u32 = 1000;

/// The folders of a store.
const FOLDERS: [&str; 6] = [
    "tmp",
    "segments",
    "promises",
    acked::FOLDER,
    "policies",
    "damaged",
];

impl FsStore {
    /// Opens the store in `dir` for this process alone, and makes it when there is none. What was left half-way by a
    /// crash is removed; files that are no usable segments are moved to `damaged/` and [reported](Self::damaged).
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process has it, [`StoreError::DamagedPromise`], and what the disk says.
    pub fn open(dir: &Path, budget: Option<u64>, durability: Durability) -> Result<Arc<Self>, StoreError> {
        let disk = match durability {
            Durability::Durable => Disk::durable(),
            Durability::Spool => Disk::unsynced(),
        };
        Self::open_on(dir, budget, disk)
    }

    pub(crate) fn open_on(dir: &Path, budget: Option<u64>, disk: Disk) -> Result<Arc<Self>, StoreError> {
        fs::create_dir_all(dir).map_err(|source| StoreError::Io {
            what: "create",
            path: dir.into(),
            source,
        })?;
        let lock = take_lock(dir)?;
        // Promises are durable in every store, so the way to them is too.
        let durable = disk.made_durable();
        let to_error = |e| StoreError::from_disk(dir, e);
        durable.sync_parent(dir).map_err(to_error)?;
        durable.create_dirs(dir, &FOLDERS).map_err(to_error)?;
        empty(&dir.join("tmp"), &disk).map_err(to_error)?;

        let mut store = Self {
            dir: dir.to_owned(),
            budget,
            disk,
            lock: Some(lock),
            readers: Some(Arc::new(lease::for_writer(dir)?)),
            damaged: Mutex::default(),
            index: Mutex::default(),
            gates: Mutex::default(),
            housekeeping: Mutex::default(),
            policies: Mutex::default(),
            keys: RwLock::default(),
            unmergeable: Mutex::default(),
        };
        let folders = store.read_segments()?;
        // A crash may have come between a rename and the sync of its folder. What is seen now will be acknowledged
        // when it is offered again, so it has to be durable first. Cheap when nothing is outstanding.
        for folder in folders {
            store.disk.sync_dir(&folder).map_err(to_error)?;
            store.index().add_folder(folder);
        }
        durable.sync_dir(&dir.join("promises")).map_err(to_error)?;
        store.read_promises()?;
        let aside = store.damaged().into_iter().filter(|file| file.moved_to.is_some());
        store.read_marks(&aside.map(|file| file.name).collect::<Vec<_>>())?;
        store.read_policies()?;
        Ok(Arc::new(store))
    }

    /// Opens the store in `dir` for reading, also while another process writes it. It shows what was there when it
    /// was opened: a segment that is merged or removed later is then [not held](StoreError::NotHeld).
    ///
    /// # Errors
    /// [`StoreError::NoStore`], [`StoreError::DamagedPromise`], and what the disk says.
    pub fn open_read_only(dir: &Path) -> Result<Arc<Self>, StoreError> {
        let mut store = Self::unread(dir)?;
        store.read_segments()?;
        store.read_promises()?;
        Ok(Arc::new(store))
    }

    /// A store for reading, of which nothing has been looked at yet.
    pub(super) fn unread(dir: &Path) -> Result<Self, StoreError> {
        if !dir.join("segments").is_dir() {
            return Err(StoreError::NoStore { dir: dir.to_owned() });
        }
        Ok(Self {
            dir: dir.to_owned(),
            budget: None,
            disk: Disk::unsynced(),
            lock: None,
            // Before anything is looked at: from here on nothing of it is collected.
            readers: lease::for_reader(dir).map(Arc::new),
            damaged: Mutex::default(),
            index: Mutex::default(),
            gates: Mutex::default(),
            housekeeping: Mutex::default(),
            policies: Mutex::default(),
            keys: RwLock::default(),
            unmergeable: Mutex::default(),
        })
    }

    /// Remembers a file that is there and cannot be used.
    pub(super) fn unusable(&self, file: DamagedFile) {
        let DamagedFile {
            name,
            path,
            moved_to,
            why,
        } = &file;
        tracing::warn!(segment = %name, path = %path.display(), ?moved_to, %why, "unusable segment");
        lock(&self.damaged).push(file);
    }

    /// Fills the index; returns the folders the segments are in.
    fn read_segments(&mut self) -> Result<Vec<PathBuf>, StoreError> {
        let (found, folders) = scan::scan(&self.dir.join("segments"))?;
        let mut index = Index::default();
        for file in found {
            let (moved_to, why) = match file.content {
                Content::Good(entry) => {
                    index.insert(entry);
                    continue;
                }
                Content::Newer { why, bytes } => {
                    index.add_foreign(bytes);
                    (None, why)
                }
                Content::Damaged(why) if self.lock.is_none() => (None, why),
                Content::Damaged(why) => (Some(self.move_to_damaged(&file.name, &file.path)?), why),
            };
            self.unusable(DamagedFile {
                name: file.name,
                path: file.path,
                moved_to,
                why,
            });
        }
        self.index = Mutex::new(index);
        Ok(folders)
    }

    fn read_promises(&mut self) -> Result<(), StoreError> {
        let dir = self.dir.join("promises");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io {
                what: "read the promise",
                path,
                source,
            }
        };
        let list = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed(&dir))?,
        };
        for file in list {
            let path = file.map_err(failed(&dir))?.path();
            let Some(Ok(vm)) = path.file_name().and_then(|name| name.to_str()).map(VmId::new) else {
                tracing::warn!(path = %path.display(), "not a VM's promise: left alone");
                continue;
            };
            let file = crate::regular::open(&path).map_err(failed(&path))?;
            let generation = read_promise(&vm, &path, file)?;
            self.index().set_promise(vm, generation);
        }
        Ok(())
    }

    /// Moves a file out of the way; returns where to.
    pub(super) fn move_to_damaged(&self, name: &SegmentName, path: &Path) -> Result<PathBuf, StoreError> {
        let stem = flat(name);
        for n in 0..MAX_DAMAGED_NAMES {
            let to = self.dir.join("damaged").join(format!("{stem}.{n}"));
            match self.disk.move_aside(path, &to) {
                Ok(()) => return Ok(to),
                Err(e) if e.source.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(self.disk_error(e)),
            }
        }
        let source =
            io::Error::other("there are too many damaged files of this name: clear the folder \"damaged\"");
        Err(StoreError::Io {
            what: "move aside",
            path: path.to_owned(),
            source,
        })
    }
}

fn read_promise(vm: &VmId, path: &Path, file: File) -> Result<Generation, StoreError> {
    let mut bytes = Vec::new();
    // One byte more than a record is enough to see that it is not one.
    file.take(promise::RECORD_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| StoreError::Io {
            what: "read the promise",
            path: path.to_owned(),
            source,
        })?;
    promise::decode(vm, &bytes).map_err(|why| StoreError::DamagedPromise {
        path: path.to_owned(),
        why,
    })
}

/// The generation of `vm` that the store in `dir` has promised: of a VM in the care of a cluster it is not 0. No other
/// file is looked at.
///
/// # Errors
/// [`StoreError::DamagedPromise`], and what the disk says.
pub fn promised_in(dir: &Path, vm: &VmId) -> Result<Generation, StoreError> {
    let path = dir.join("promises").join(vm.as_str());
    match crate::regular::open(&path) {
        Ok(file) => read_promise(vm, &path, file),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Generation(0))
        }
        Err(source) => Err(StoreError::Io {
            what: "read the promise",
            path,
            source,
        }),
    }
}

/// Locks the store for this process, and leaves its number for whoever comes too late.
fn take_lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let failed = |source| StoreError::Io {
        what: "lock",
        path: path.clone(),
        source,
    };
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            // Only for the message: whatever cannot be read is left out.
            let _ = file.take(20).read_to_string(&mut pid);
            return Err(StoreError::Locked {
                dir: dir.to_owned(),
                pid: pid.trim().parse().ok(),
            });
        }
        Err(e) => return Err(failed(e.into())),
    }
    let write = |file: &mut File| -> io::Result<()> {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    // Also only for that message: on a full disk the store must open all the same.
    let _ = write(&mut file);
    Ok(file)
}

/// Removes every file in a folder.
fn empty(dir: &Path, disk: &Disk) -> Result<(), DiskError> {
    let failed = |source| DiskError {
        what: "empty the folder",
        path: dir.to_owned(),
        source,
    };
    for file in fs::read_dir(dir).map_err(failed)? {
        disk.unlink(&file.map_err(failed)?.path())?;
    }
    Ok(())
}
