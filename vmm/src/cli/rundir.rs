//! The run folder: where the VMs of this host have their control sockets, and how a name is taken.
//!
//! ```text
//! RUN_DIR/NAME/lock         locked by the VM's process for as long as it lives: that, and no file, takes the name
//! RUN_DIR/NAME/api.sock     its control socket, or a link to the one named by --api-sock
//! RUN_DIR/NAME/console.log  what the guest said, when detached
//! RUN_DIR/NAME/vmm.log      what the monitor logged, when detached
//! RUN_DIR/NAME/ended.json   how it ended, when that is worth knowing
//! ```
//!
//! A lock dies with its process, so nothing that a crash leaves behind can keep a name taken.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use segment::VmId;
use serde::{Deserialize, Serialize};

/// The control socket's name.
pub const SOCKET: &str = "api.sock";
/// The Unix socket of its stream sockets, in its folder.
const VSOCK: &str = "vsock";

/// Where the Unix socket of the stream sockets of `name` is, unless it is said.
#[must_use]
pub fn vsock(run_dir: &Path, name: &VmId) -> PathBuf {
    run_dir.join(name.as_str()).join(VSOCK)
}
const LOCK: &str = "lock";
const ENDED: &str = "ended.json";
/// How often a lock is tried whose folder is being taken away.
const MAX_TRIES: u32 = 100;
/// The longest note of an end that is read.
const MAX_NOTE_BYTES: u64 = 64 << 10;

/// Why a place in the run folder cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The name is taken.
    #[error(
        "a VM named {name} runs here already (its files are in {dir:?}): choose another --name, or end it with \
         `vmm stop {name}`"
    )]
    Taken {
        /// The name.
        name: VmId,
        /// Its folder.
        dir: PathBuf,
    },
    /// The folder belongs to someone else.
    #[error(
        "{dir:?} belongs to user {owner}, who could pose as your VMs: name another folder with --run-dir"
    )]
    Foreign {
        /// The folder.
        dir: PathBuf,
        /// Its owner's number.
        owner: u32,
    },
    /// The system refused.
    #[error("{what} {path:?}")]
    Io {
        /// What was done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PlaceError {
    move |source| PlaceError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// The run folder: `named`, or `$XDG_RUNTIME_DIR/understudy`, or `/run/understudy` for root, or a folder in `/tmp`.
#[must_use]
pub fn run_dir(named: Option<&Path>) -> PathBuf {
    if let Some(named) = named {
        return named.to_owned();
    }
    let user = rustix::process::geteuid();
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir).join("understudy"),
        None if user.is_root() => PathBuf::from("/run/understudy"),
        None => PathBuf::from(format!("/tmp/understudy-{}", user.as_raw())),
    }
}

/// The folder of a VM's local store: below `$XDG_STATE_HOME`, or `/var/lib` for root, or the home folder.
#[must_use]
pub fn default_store(name: &VmId) -> PathBuf {
    let set = |variable| {
        std::env::var_os(variable)
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from)
    };
    let base = match (set("XDG_STATE_HOME"), set("HOME")) {
        (Some(state), _) => state,
        (None, Some(home)) if !rustix::process::geteuid().is_root() => home.join(".local/state"),
        (None, _) => PathBuf::from("/var/lib"),
    };
    base.join("understudy/vms").join(name.as_str())
}

/// How a VM ended, for `vmm ps`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndNote {
    /// `ended`, `stopped`, `failed`, `fenced`.
    pub state: String,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A VM's folder, whose name this process has. What it leaves is decided at the end; dropped, it leaves nothing.
#[derive(Debug)]
pub struct Place {
    dir: PathBuf,
    lock: File,
    keep: bool,
}

impl Place {
    /// Takes the name `name` in the run folder `base`. What a process that is gone left there is removed.
    ///
    /// With `over_older`, a process that has the name and is still there is left to itself, with its folder renamed:
    /// the registry has made this one the owner, and the name is this one's.
    ///
    /// # Errors
    /// [`PlaceError`].
    pub fn take(base: &Path, name: &VmId, over_older: bool) -> Result<Self, PlaceError> {
        make_base(base)?;
        let dir = base.join(name.as_str());
        for _ in 0..MAX_TRIES {
            private_dir(&dir).map_err(io_error("make the folder", &dir))?;
            let path = dir.join(LOCK);
            let mut options = OpenOptions::new();
            let lock = match options
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
            {
                Ok(lock) => lock,
                // Another process took the folder away in between.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(io_error("open the lock", &path)(error)),
            };
            match try_lock(&lock) {
                Ok(()) if is_at(&lock, &path) => {
                    let place = Self {
                        dir,
                        lock,
                        keep: false,
                    };
                    place.clear().map_err(io_error("clear the folder", &place.dir))?;
                    return Ok(place);
                }
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) if over_older => {
                    let aside = base.join(format!("{name}.replaced-{}", std::process::id()));
                    std::fs::rename(&dir, &aside).map_err(io_error("move aside the folder", &dir))?;
                    tracing::warn!(%name, moved_to = ?aside, "an earlier process of this VM is still there");
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(PlaceError::Taken {
                        name: name.clone(),
                        dir,
                    });
                }
                Err(error) => return Err(io_error("lock", &path)(error.into())),
            }
        }
        let busy = io::Error::other("other processes take it away again and again");
        Err(io_error("take the folder", &dir)(busy))
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the socket findable by the VM's name when it is elsewhere.
    ///
    /// # Errors
    /// What the system says.
    pub fn link_socket(&self, socket: &Path) -> Result<(), PlaceError> {
        let link = self.dir.join(SOCKET);
        std::path::absolute(socket)
            .and_then(|socket| std::os::unix::fs::symlink(socket, &link))
            .map_err(io_error("link the socket as", &link))
    }

    /// Leaves the folder for people to look at, with a note of how it ended; nothing where another has the name by now.
    pub fn leave(mut self, note: &EndNote) {
        self.keep = true;
        if !self.is_mine() {
            return;
        }
        let written = serde_json::to_vec(note).map_err(io::Error::from);
        let path = self.dir.join(ENDED);
        if let Err(error) = written.and_then(|bytes| std::fs::write(&path, bytes)) {
            tracing::warn!(%error, ?path, "how the VM ended was not noted");
        }
        // Gone already is fine.
        let _ = std::fs::remove_file(self.dir.join(SOCKET));
    }

    /// Whether the folder is still this process's: it may have been moved aside and the name given to another.
    fn is_mine(&self) -> bool {
        is_at(&self.lock, &self.dir.join(LOCK))
    }

    /// Removes everything but the lock.
    fn clear(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_name() != LOCK && !entry.file_type()?.is_dir() {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.keep || !self.is_mine() {
            return;
        }
        if let Err(error) = self.clear() {
            tracing::debug!(%error, dir = ?self.dir, "clear the VM's folder");
        }
        // The lock last, and still held: nobody takes the name of a folder that is half gone.
        let _ = std::fs::remove_file(self.dir.join(LOCK));
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// Tries for as long as a look by [`Found::at`] could hold the lock; the VM's process holds it much longer.
fn try_lock(lock: &File) -> Result<(), rustix::io::Errno> {
    for _ in 0..10 {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(2)),
            other => return other,
        }
    }
    Err(rustix::io::Errno::WOULDBLOCK)
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(file), Ok(there)) => (file.dev(), file.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn private_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        other => other,
    }
}

/// Makes the run folder, and refuses one that another user (not root) could put things into.
fn make_base(base: &Path) -> Result<(), PlaceError> {
    DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(base)
        .map_err(io_error("make the run folder", base))?;
    let owner = std::fs::metadata(base)
        .map_err(io_error("look at the run folder", base))?
        .uid();
    if owner == rustix::process::geteuid().as_raw() || owner == 0 {
        return Ok(());
    }
    Err(PlaceError::Foreign {
        dir: base.to_owned(),
        owner,
    })
}

/// One VM's folder, as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The folder's name: the VM's.
    pub name: String,
    /// The folder.
    pub dir: PathBuf,
    /// Whether its process lives.
    pub alive: bool,
    /// How it ended, if it said so.
    pub note: Option<EndNote>,
}

impl Found {
    /// The control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    /// Looks at one folder; `None` when no VM was ever there.
    #[must_use]
    pub fn at(base: &Path, name: &str) -> Option<Self> {
        let dir = base.join(name);
        let lock = File::open(dir.join(LOCK)).ok()?;
        // A shared lock is had at once unless the VM's process holds its own.
        let alive = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_err();
        let note = if alive { None } else { read_note(&dir.join(ENDED)) };
        Some(Self {
            name: name.to_owned(),
            dir,
            alive,
            note,
        })
    }

    /// All in the run folder, by name.
    ///
    /// # Errors
    /// When the folder is there and cannot be read.
    pub fn all(base: &Path) -> Result<Vec<Self>, PlaceError> {
        let entries = match std::fs::read_dir(base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(io_error("read the run folder", base))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut found: Vec<Self> = names.filter_map(|name| Self::at(base, &name)).collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
}

/// Where VMs whose run folder is not the usual one leave a link to it, so that `vmm ps` can say where they are. One
/// folder a user, whatever the environment says: an agent and a person have different ones.
fn links() -> PathBuf {
    let uid = rustix::process::geteuid();
    match uid.is_root() {
        true => PathBuf::from("/run/understudy/elsewhere"),
        false => PathBuf::from(format!("/tmp/understudy-{}/elsewhere", uid.as_raw())),
    }
}

/// A link to a VM's folder; removed when it is dropped.
#[derive(Debug)]
pub struct Pointer(PathBuf);

impl Pointer {
    /// Leaves a link to `dir`, and removes those of VMs that are gone.
    ///
    /// # Errors
    /// What the system says; the VM can do without.
    pub fn leave(dir: &Path) -> io::Result<Self> {
        let links = links();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&links)?;
        let owner = std::fs::symlink_metadata(&links)?.uid();
        if owner != rustix::process::geteuid().as_raw() {
            let why = format!("{} belongs to user {owner}", links.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        for (link, found) in linked(&links) {
            if !found.is_some_and(|found| found.alive) {
                // Another may have removed it.
                let _ = std::fs::remove_file(link);
            }
        }
        let link = links.join(std::process::id().to_string());
        std::os::unix::fs::symlink(std::path::absolute(dir)?, &link)?;
        Ok(Self(link))
    }
}

impl Drop for Pointer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn linked(links: &Path) -> Vec<(PathBuf, Option<Found>)> {
    // Under /tmp anyone may have made a folder of this name.
    let own = std::fs::symlink_metadata(links)
        .is_ok_and(|m| m.is_dir() && m.uid() == rustix::process::geteuid().as_raw());
    if !own {
        return Vec::new();
    }
    let entries = std::fs::read_dir(links).into_iter().flatten().flatten();
    let look = |link: PathBuf| {
        let found = std::fs::read_link(&link).ok().and_then(|dir| {
            let name = dir.file_name()?.to_str()?.to_owned();
            Found::at(dir.parent()?, &name)
        });
        (link, found)
    };
    entries.map(|entry| look(entry.path())).collect()
}

/// The VMs of this user that run with another run folder than `base`.
pub fn elsewhere(base: &Path) -> Vec<Found> {
    let base = std::path::absolute(base).unwrap_or_else(|_| base.to_owned());
    let mut found: Vec<_> = linked(&links())
        .into_iter()
        .filter_map(|(_, found)| found)
        .filter(|found| found.alive && found.dir.parent() != Some(base.as_path()))
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn read_note(path: &Path) -> Option<EndNote> {
    use std::io::Read;
    let mut bytes = Vec::new();
    File::open(path)
        .ok()?
        .take(MAX_NOTE_BYTES)
        .read_to_end(&mut bytes)
        .ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> VmId {
        VmId::new("web").unwrap()
    }

    #[test]
    fn a_name_is_taken_once_and_free_again() {
        let base = tempfile::tempdir().unwrap();
        let place = Place::take(base.path(), &name(), false).unwrap();
        assert!(matches!(
            Place::take(base.path(), &name(), false),
            Err(PlaceError::Taken { .. })
        ));
        assert!(Found::at(base.path(), "web").unwrap().alive);
        drop(place);
        assert_eq!(Found::all(base.path()).unwrap(), []);
        Place::take(base.path(), &name(), false).unwrap();
    }

    #[test]
    fn what_a_crash_left_is_cleared() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("web");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join(LOCK), "").unwrap();
        std::fs::write(dir.join(SOCKET), "").unwrap();
        assert!(!Found::at(base.path(), "web").unwrap().alive);
        let place = Place::take(base.path(), &name(), false).unwrap();
        assert!(!dir.join(SOCKET).exists());
        drop(place);
        assert!(!dir.exists());
    }

    #[test]
    fn an_end_is_noted_until_the_name_is_taken_again() {
        let base = tempfile::tempdir().unwrap();
        let note = EndNote {
            state: "fenced".into(),
            reason: Some("generation 2".into()),
        };
        Place::take(base.path(), &name(), false).unwrap().leave(&note);
        let found = Found::at(base.path(), "web").unwrap();
        assert_eq!((found.alive, found.note), (false, Some(note)));
        drop(Place::take(base.path(), &name(), false).unwrap());
        assert_eq!(Found::at(base.path(), "web"), None);
    }

    #[test]
    fn an_old_owner_that_is_fenced_notes_nothing_where_the_new_one_is() {
        let base = tempfile::tempdir().unwrap();
        let old = Place::take(base.path(), &name(), false).unwrap();
        let new = Place::take(base.path(), &name(), true).unwrap();
        std::fs::write(new.dir().join(SOCKET), "").unwrap();
        old.leave(&EndNote {
            state: "fenced".into(),
            reason: None,
        });
        assert!(
            new.dir().join(SOCKET).exists(),
            "the new owner cannot be reached any more"
        );
        assert!(
            !new.dir().join(ENDED).exists(),
            "the new owner is said to have ended"
        );
    }

    #[test]
    fn a_new_owner_gets_the_name_and_the_old_one_does_no_harm() {
        let base = tempfile::tempdir().unwrap();
        let old = Place::take(base.path(), &name(), false).unwrap();
        let new = Place::take(base.path(), &name(), true).unwrap();
        std::fs::write(new.dir().join(SOCKET), "").unwrap();
        drop(old);
        assert!(new.dir().join(SOCKET).exists());
        assert_eq!(
            Found::all(base.path())
                .unwrap()
                .iter()
                .filter(|found| found.alive)
                .count(),
            1
        );
    }
}
