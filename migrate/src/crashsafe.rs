//! The only code that renames, syncs and unlinks.
//!
//! ```text
//! temp()  write..  sync()      rename_new() / rename_over()      sync_dir()
//!   |        |        |                    |                         |
//!   |   bytes in the  |               visible under            visible after
//!   |   page cache    |               its real name            a power cut
//!   |             on the disk
//!   unlinked on drop until it is renamed
//! ```
//!
//! Invariants: what can be seen under its real name is complete, because the rename comes after the last write, and
//! after the sync when this [`Disk`] is [durable](Disk::durable). A failed sync is never tried again: the kernel may
//! have thrown the dirty pages away and say "clean" the next time, so the file is given up.
//!
//! It never decides what to write, and never reads a directory.
//!
//! Tests put a [`Fault`] under it, which sees every step before it is made, and can refuse it and all that follow as
//! a crash would.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

/// What the system refused, and on which path.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}", path.display())]
pub struct DiskError {
    /// What was being done.
    pub what: &'static str,
    /// To what.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

impl DiskError {
    pub(crate) fn new(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the reason is that there is no room.
    #[must_use]
    pub fn is_full(&self) -> bool {
        is_full(&self.source)
    }
}

/// Whether `error` says that the disk, or the user's share of it, has no room.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// One change to the disk, about to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step<'a> {
    /// A folder is made.
    CreateDir(&'a Path),
    /// A temporary file is made.
    CreateTemp(&'a Path),
    /// Bytes are written to it.
    Write(&'a Path, usize),
    /// A file's content is made durable.
    SyncFile(&'a Path),
    /// A file gets a name nothing had.
    RenameNew(&'a Path, &'a Path),
    /// A file takes the place of another.
    RenameOver(&'a Path, &'a Path),
    /// A file loses its name.
    Unlink(&'a Path),
    /// A folder's names are made durable.
    SyncDir(&'a Path),
}

/// Sees every step before it is made, and may refuse it.
pub(crate) trait Fault: Send + Sync {
    /// Called before the step; an error is reported as if the system had given it.
    fn before(&self, step: Step<'_>) -> io::Result<()>;
}

/// How files are made, named and removed: durably or not.
#[derive(Clone)]
pub struct Disk {
    sync: bool,
    fault: Option<Arc<dyn Fault>>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("sync", &self.sync)
            .finish_non_exhaustive()
    }
}

/// Tells temporary files of one process apart. The store's lock keeps other processes away.
static NEXT_TEMP: AtomicU64 = AtomicU64::new(0);

/// Opens a folder; what is none is not waited for.
fn open_dir(dir: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::DIRECTORY.bits();
    OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(flags).unwrap_or_default())
        .open(dir)
}

impl Disk {
    /// Every step is on the disk before it returns.
    #[must_use]
    pub fn durable() -> Self {
        Self {
            sync: true,
            fault: None,
        }
    }

    /// Nothing waits for the disk: what is done survives the process and not the host.
    #[must_use]
    pub fn unsynced() -> Self {
        Self {
            sync: false,
            fault: None,
        }
    }

    /// The same, with syncing on whatever it was.
    #[must_use]
    pub fn made_durable(&self) -> Self {
        Self {
            sync: true,
            fault: self.fault.clone(),
        }
    }

    #[cfg(test)]
    pub(crate) fn with_fault(mut self, fault: Arc<dyn Fault>) -> Self {
        self.fault = Some(fault);
        self
    }

    fn before(&self, step: Step<'_>) -> io::Result<()> {
        self.fault.as_ref().map_or(Ok(()), |fault| fault.before(step))
    }

    /// Makes a folder inside one that exists, unless it is there already; its name is synced either way, because
    /// whoever made it may have crashed before that.
    ///
    /// # Errors
    /// What the system says.
    pub fn create_dir(&self, path: &Path) -> Result<(), DiskError> {
        self.make_dir(path)?;
        self.sync_parent(path)
    }

    /// Makes folders in `dir` unless they are there, with one sync for all.
    ///
    /// # Errors
    /// What the system says.
    pub fn create_dirs(&self, dir: &Path, names: &[&str]) -> Result<(), DiskError> {
        for name in names {
            self.make_dir(&dir.join(name))?;
        }
        self.sync_dir(dir)
    }

    fn make_dir(&self, path: &Path) -> Result<(), DiskError> {
        let made = self
            .before(Step::CreateDir(path))
            .and_then(|()| fs::create_dir(path));
        match made {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            other => other.map_err(DiskError::new("create the folder", path))?,
        }
        Ok(())
    }

    /// Makes a new file `<stem>.<number>` in `dir`, for reading and writing.
    ///
    /// # Errors
    /// What the system says.
    pub fn temp(&self, dir: &Path, stem: &str) -> Result<Temp, DiskError> {
        self.temp_of(dir, stem, 0o666)
    }

    /// The same for a secret: its owner's alone from the first instant on, so that nobody else has it open when that comes.
    ///
    /// # Errors
    /// As [`Self::temp`].
    pub fn secret_temp(&self, dir: &Path, stem: &str) -> Result<Temp, DiskError> {
        self.temp_of(dir, stem, 0o600)
    }

    /// `mode`: what the process's mask leaves of it.
    fn temp_of(&self, dir: &Path, stem: &str, mode: u32) -> Result<Temp, DiskError> {
        let path = dir.join(format!("{stem}.{}", NEXT_TEMP.fetch_add(1, Ordering::Relaxed)));
        let file = self
            .before(Step::CreateTemp(&path))
            .and_then(|()| {
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(mode)
                    .open(&path)
            })
            .map_err(DiskError::new("create the temporary file", &path))?;
        Ok(Temp {
            disk: self.clone(),
            file,
            path,
            state: TempState::Dirty,
        })
    }

    /// Takes a file that is there over as a temporary one, which goes when it gets no other name.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::InvalidInput`] when it is no file.
    pub fn adopt(&self, path: &Path) -> Result<Temp, DiskError> {
        let opened = || {
            if !fs::metadata(path)?.is_file() {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            OpenOptions::new().read(true).write(true).open(path)
        };
        Ok(Temp {
            disk: self.clone(),
            file: opened().map_err(DiskError::new("open", path))?,
            path: path.to_owned(),
            state: TempState::Dirty,
        })
    }

    /// Writes a small file whole or not at all, in the place of what was there: as `<stem>.<number>` in `dir` first.
    ///
    /// # Errors
    /// What the system says; what was there is there still.
    pub fn write(&self, dir: &Path, stem: &str, to: &Path, bytes: &[u8]) -> Result<(), DiskError> {
        let mut temp = self.temp(dir, stem)?;
        temp.write_all(bytes).map_err(DiskError::new("write", to))?;
        temp.replace(to)
    }

    /// Makes the content of a file durable that is there already.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync_file(&self, path: &Path, file: &File) -> Result<(), DiskError> {
        if !self.sync {
            return Ok(());
        }
        self.before(Step::SyncFile(path))
            .and_then(|()| file.sync_all())
            .map_err(DiskError::new("sync", path))
    }

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync_dir(&self, dir: &Path) -> Result<(), DiskError> {
        if !self.sync {
            return Ok(());
        }
        self.before(Step::SyncDir(dir))
            .and_then(|()| open_dir(dir)?.sync_all())
            .map_err(DiskError::new("sync the folder", dir))
    }

    /// Makes the name of `path` durable, or its absence.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync_parent(&self, path: &Path) -> Result<(), DiskError> {
        self.sync_dir(folder_of(path))
    }

    /// Takes a file's name away. Who has it open can still read it. Not durable before [`Self::sync_parent`].
    ///
    /// # Errors
    /// What the system says.
    pub fn unlink(&self, path: &Path) -> Result<(), DiskError> {
        self.before(Step::Unlink(path))
            .and_then(|()| fs::remove_file(path))
            .map_err(DiskError::new("remove", path))
    }

    /// Gives a file another name that nothing has, durably.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::AlreadyExists`] when there is something.
    pub fn move_aside(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        self.rename_new(from, to)?;
        // The new name first: in between it has both, which is better than none.
        self.sync_parent(to)?;
        self.sync_parent(from)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        self.before(Step::RenameNew(from, to))
            .and_then(
                |()| match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
                    // A file system that cannot refuse to replace: a hard link can.
                    Err(Errno::INVAL | Errno::NOSYS) => {
                        fs::hard_link(from, to)?;
                        fs::remove_file(from)
                    }
                    other => other.map_err(io::Error::from),
                },
            )
            .map_err(DiskError::new("create", to))
    }
}

/// The folder that a file is in: the current one of a bare name.
#[must_use]
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TempState {
    /// Written to since the last sync.
    Dirty,
    /// Its content is as durable as its disk makes things.
    Synced,
    /// It has its real name: it is no longer temporary.
    Named,
}

/// A file that has no name yet that anyone would look for. It is unlinked on drop, until it has one.
#[derive(Debug)]
pub struct Temp {
    disk: Disk,
    file: File,
    path: PathBuf,
    state: TempState,
}

impl Temp {
    /// The open file. Write through the [`Temp`], not through this.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes what was written durable. A file whose sync failed must not be published.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&mut self) -> Result<(), DiskError> {
        self.disk.sync_file(&self.path, &self.file)?;
        self.state = TempState::Synced;
        Ok(())
    }

    /// Gives it a name that nothing has. Not durable before [`Disk::sync_parent`].
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::AlreadyExists`] when there is something, and then the temporary file is
    /// still there to be tried again.
    pub fn rename_new(&mut self, to: &Path) -> Result<(), DiskError> {
        self.settle()?;
        self.disk.rename_new(&self.path, to)?;
        self.state = TempState::Named;
        Ok(())
    }

    /// Puts it in the place of what has the name, in one step. Not durable before [`Disk::sync_parent`].
    ///
    /// # Errors
    /// What the system says; what had the name has it still.
    pub fn rename_over(&mut self, to: &Path) -> Result<(), DiskError> {
        self.settle()?;
        self.disk
            .before(Step::RenameOver(&self.path, to))
            .and_then(|()| fs::rename(&self.path, to))
            .map_err(DiskError::new("replace", to))?;
        self.state = TempState::Named;
        Ok(())
    }

    /// Syncs it, gives it a name that nothing has, and syncs the folder.
    ///
    /// # Errors
    /// As [`Self::rename_new`]. When the last sync fails the name may be visible, and may or may not survive.
    pub fn publish(mut self, to: &Path) -> Result<(), DiskError> {
        self.rename_new(to)?;
        self.disk.sync_parent(to)
    }

    /// Syncs it, puts it in the place of what has the name, and syncs the folder.
    ///
    /// # Errors
    /// As [`Self::rename_over`]. When the last sync fails either content may survive, and each is whole.
    pub fn replace(mut self, to: &Path) -> Result<(), DiskError> {
        self.rename_over(to)?;
        self.disk.sync_parent(to)
    }

    /// Content before name: a name that survives without its content would be a half-written file.
    fn settle(&mut self) -> Result<(), DiskError> {
        match self.state {
            TempState::Dirty => self.sync(),
            TempState::Synced | TempState::Named => Ok(()),
        }
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        match self.state {
            // Best effort: what stays behind is removed when the store is opened again.
            TempState::Dirty | TempState::Synced => drop(self.disk.unlink(&self.path)),
            TempState::Named => {}
        }
    }
}

impl Read for Temp {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.file.read(buf)
    }
}

impl Write for Temp {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.disk.before(Step::Write(&self.path, buf.len()))?;
        self.state = TempState::Dirty;
        self.file.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Temp {
    fn seek(&mut self, pos: SeekFrom) -> io::Result<u64> {
        self.file.seek(pos)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_secret_is_its_owners_alone_before_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let temp = Disk::durable().secret_temp(dir.path(), "t").unwrap();
        assert_eq!(
            temp.file().metadata().unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_name_is_never_taken_twice_and_a_dropped_file_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::durable();
        let write = |bytes: &[u8]| {
            let mut temp = disk.temp(dir.path(), "t").unwrap();
            temp.write_all(bytes).unwrap();
            temp
        };
        let to = dir.path().join("a");
        write(b"first").publish(&to).unwrap();
        let refused = write(b"second").publish(&to).unwrap_err();
        assert_eq!(refused.source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&to).unwrap(), b"first");
        write(b"third").replace(&to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"third");
        drop(write(b"dropped"));
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "a temporary file stayed behind"
        );
    }

    #[test]
    fn an_existing_folder_is_no_error_and_a_file_in_its_place_is() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::durable();
        disk.create_dir(&dir.path().join("d")).unwrap();
        disk.create_dir(&dir.path().join("d")).unwrap();
        fs::write(dir.path().join("f"), b"").unwrap();
        assert!(disk.create_dir(&dir.path().join("f")).is_err());
    }
}
