//! The devices of a VM that is restored: their logical names bound to what this host has, and the disks filled.
//!
//! ```text
//! records (names) + --bind --check--> all missing names at once
//!                                     disks: new files --load--> checkpoint's content --publish--> the bound paths
//! ```
//!
//! A disk is written to a new file, which takes the place of what has its name only when it is whole: a restore that
//! fails leaves what was there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use migrate::crashsafe::{Disk as Files, DiskError as FileError, Temp, folder_of};

use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::disk::{Disk, DiskError, block_bytes};
use crate::devices::virtio::net::tap::{Tap, TapError};
use crate::devices::virtio::setup::{Backing, DISK, Devices, NET};
use crate::devices::virtio::state::{BlockState, DeviceState, VirtioState};
use crate::devices::virtio::vsock;
use crate::socket::{self, Socket, SocketError};

/// The folder, in a VM's store, of disks that were bound to no file.
const DISKS: &str = "disks";

/// What logical names mean on this host: `disk:root` a file, `net:0` a TAP interface, `vsock:0` a Unix socket.
#[derive(Debug, Clone, Default)]
pub struct Bindings {
    /// What somebody named for this VM: one of a device that it does not have is an error.
    pub named: BTreeMap<String, String>,
    /// What the host has for devices of these names, for VMs that have them.
    pub offered: BTreeMap<String, String>,
}

impl Bindings {
    /// With this Unix socket for the VM's stream sockets, where no other is named or offered.
    #[must_use]
    pub fn or_vsock(mut self, path: &Path) -> Self {
        let path = || path.to_string_lossy().into_owned();
        self.offered.entry(vsock::NAME.into()).or_insert_with(path);
        self
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.named
            .get(name)
            .or_else(|| self.offered.get(name))
            .map(String::as_str)
    }
}

impl<const N: usize> From<[(String, String); N]> for Bindings {
    fn from(named: [(String, String); N]) -> Self {
        Self {
            named: named.into(),
            offered: BTreeMap::new(),
        }
    }
}

/// Why the devices of a checkpoint cannot be had here.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Names without a binding.
    #[error(
        "the VM has devices that this host must provide: bind {} (a TAP interface for net:, the path of a socket for vsock:)",
        .names.iter().map(|name| format!("--bind {name}=..")).collect::<Vec<_>>().join(" ")
    )]
    Missing {
        /// All of them.
        names: Vec<String>,
    },
    /// Bindings of names that the VM does not have.
    #[error("the VM has no {}: it has {}", .names.join(", "), if .has.is_empty() { "no devices to bind".to_owned() } else { .has.join(", ") })]
    Unknown {
        /// All of them.
        names: Vec<String>,
        /// What it has.
        has: Vec<String>,
    },
    /// A disk's file.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk's new file.
    #[error("make the file of {name}")]
    File {
        /// The disk.
        name: String,
        /// What the system refused.
        #[source]
        source: FileError,
    },
    /// The folder for a disk's file.
    #[error("make files in the folder {path:?}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// What an image has of a disk.
    #[error("the image of {name} cannot be used: {why}")]
    Image {
        /// Of which.
        name: String,
        /// Why not.
        why: String,
    },
    /// A network card.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The socket of the stream sockets.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The balloon.
    #[error("make the balloon")]
    Balloon(#[source] std::io::Error),
}

/// A disk's file that has no name yet.
#[derive(Debug)]
pub(super) struct Filling {
    name: String,
    temp: Temp,
    to: PathBuf,
    /// What has the name now, locked: no VM may use it while it is about to go.
    _old: Option<Arc<Disk>>,
}

/// Checks that each name is bound that must be, and each that is bound is there.
pub(super) fn check(saved: &[VirtioState], bindings: &Bindings) -> Result<(), BindError> {
    let bindable = |state: &&VirtioState| match state.device {
        DeviceState::Block(_) | DeviceState::Net(_) | DeviceState::Vsock(_) => true,
        DeviceState::Rng | DeviceState::Balloon(_) => false,
    };
    let has: Vec<String> = saved
        .iter()
        .filter(bindable)
        .map(|state| state.name.clone())
        .collect();
    let unknown: Vec<String> = bindings
        .named
        .keys()
        .filter(|name| !has.contains(name))
        .cloned()
        .collect();
    if !unknown.is_empty() {
        return Err(BindError::Unknown { names: unknown, has });
    }
    let missing: Vec<String> = has
        .into_iter()
        .filter(|name| (name.starts_with(NET) || name == vsock::NAME) && bindings.get(name).is_none())
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(BindError::Missing { names: missing })
    }
}

/// Opens what this host has for the devices; a disk is a new file of its size, empty.
pub(super) fn prepare(
    saved: &[VirtioState],
    bindings: &Bindings,
    store: &Path,
    images: Option<&BTreeMap<String, PathBuf>>,
) -> Result<(Devices, Vec<Filling>), BindError> {
    if let Some(images) = images {
        // All of them: one that was left empty would be no state of the VM.
        let is_disk = |state: &&VirtioState| matches!(state.device, DeviceState::Block(_));
        let disks: BTreeSet<&String> = saved.iter().filter(is_disk).map(|state| &state.name).collect();
        if disks != images.keys().collect() {
            return Err(BindError::Image {
                name: "its disks".into(),
                why: format!("it has {:?}, and the VM has {disks:?}", images.keys()),
            });
        }
    }
    let mut filling = Vec::new();
    let mut backings = Vec::new();
    for state in saved {
        backings.push(match &state.device {
            DeviceState::Block(block) => {
                let (disk, file) = new_disk(
                    &state.name,
                    block,
                    (bindings, store),
                    images.and_then(|images| images.get(&state.name)),
                )?;
                filling.push(file);
                Backing::Disk {
                    disk,
                    flush: block.flush,
                }
            }
            DeviceState::Net(net) => Backing::Net {
                name: state.name.clone(),
                tap: Tap::open(&state.name, bindings.get(&state.name).unwrap_or_default())?,
                mac: net.mac,
            },
            DeviceState::Rng => Backing::Rng,
            DeviceState::Balloon(balloon) => {
                Backing::Balloon(Balloon::from_state(balloon).map_err(BindError::Balloon)?)
            }
            DeviceState::Vsock(vsock) => Backing::Vsock {
                guest_cid: vsock.guest_cid,
                socket: Arc::new(Socket::bind(Path::new(
                    bindings.get(&state.name).unwrap_or_default(),
                ))?),
            },
        });
    }
    Ok((Devices::of(backings), filling))
}

fn new_disk(
    name: &str,
    block: &BlockState,
    (bindings, store): (&Bindings, &Path),
    image: Option<&PathBuf>,
) -> Result<(Arc<Disk>, Filling), BindError> {
    let (to, bound) = disk_file(name, bindings, store);
    // A file somebody named may be all there is of an older state: what replaces it is on the disk first.
    let files = if bound {
        Files::durable()
    } else {
        Files::unsynced()
    };
    let folder = folder_of(&to);
    if !folder.exists() {
        std::fs::create_dir_all(folder).map_err(|source| BindError::Folder {
            path: folder.to_owned(),
            source,
        })?;
    }
    let old = existing(name, &to)?;
    let refused = |source| BindError::File {
        name: name.to_owned(),
        source,
    };
    let temp = match image {
        Some(image) => from_image(name, image, &files, folder, block.bytes)?,
        None => {
            let stem = format!(".{}.{}", plain(name), std::process::id());
            files.temp(folder, &stem).map_err(refused)?
        }
    };
    // An image is of whole blocks.
    let sized = temp
        .file()
        .set_len(block.bytes)
        .and_then(|()| temp.file().try_clone());
    let file: File = sized.map_err(|source| {
        refused(FileError {
            what: "size",
            path: temp.path().to_owned(),
            source,
        })
    })?;
    let disk = Disk::from_file(name, &to, file, block.read_only)?;
    Ok((
        disk,
        Filling {
            name: name.to_owned(),
            temp,
            to,
            _old: old,
        },
    ))
}

/// An image's file of a disk, which is to be in `folder` without being copied.
fn from_image(name: &str, image: &Path, files: &Files, folder: &Path, bytes: u64) -> Result<Temp, BindError> {
    let unfit = |why: String| BindError::Image {
        name: name.to_owned(),
        why: format!("{}: {why}", image.display()),
    };
    let looked = std::fs::metadata(image).and_then(|at| Ok((at, std::fs::metadata(folder)?)));
    let (at, there) = looked.map_err(|e| unfit(e.to_string()))?;
    let whole = bytes.next_multiple_of(block_bytes(bytes).into());
    if !at.is_file() || at.len() != whole {
        return Err(unfit(format!(
            "it is no file of {whole} bytes, as the disk's blocks have, but has {}",
            at.len()
        )));
    }
    if at.dev() != there.dev() {
        return Err(unfit(format!(
            "it is on another file system than {}, where the disk is to be",
            folder.display()
        )));
    }
    files.adopt(image).map_err(|source| BindError::File {
        name: name.to_owned(),
        source,
    })
}

/// Where a disk's file goes, and whether somebody said so.
fn disk_file(name: &str, bindings: &Bindings, store: &Path) -> (PathBuf, bool) {
    match bindings.get(name) {
        Some(path) => (path.into(), true),
        None => (store.join(DISKS).join(format!("{}.raw", plain(name))), false),
    }
}

/// What [`prepare`] would fail at, all of it, in words; nothing is made.
pub(super) fn lacks(saved: &[VirtioState], bindings: &Bindings, store: &Path) -> Vec<String> {
    let mut lacks = Vec::new();
    let mut say = |error: BindError| lacks.push(super::chain(&error));
    if let Err(error) = check(saved, bindings) {
        say(error);
    }
    for state in saved {
        match (&state.device, bindings.get(&state.name)) {
            (DeviceState::Net(_), Some(tap)) => {
                if let Err(error) = Tap::open(&state.name, tap) {
                    say(error.into());
                }
            }
            (DeviceState::Block(_), _) => {
                let (to, _) = disk_file(&state.name, bindings, store);
                if let Err(error) = existing(&state.name, &to) {
                    say(error);
                }
                // The first folder that is there has to let the others, and the file, be made.
                let there = folder_of(&to).ancestors().find(|folder| folder.exists());
                let folder = there.unwrap_or(Path::new("."));
                if let Err(source) = may_write(folder) {
                    let path = folder.to_owned();
                    say(BindError::Folder { path, source });
                }
            }
            // Who answers there now may be the VM's own process, which is to be replaced.
            (DeviceState::Vsock(_), Some(path)) => {
                if let Err(error) = socket::check_length(Path::new(path)) {
                    say(error.into());
                }
            }
            (DeviceState::Net(_) | DeviceState::Vsock(_), None)
            | (DeviceState::Rng | DeviceState::Balloon(_), _) => {}
        }
    }
    lacks
}

fn may_write(folder: &Path) -> std::io::Result<()> {
    if !folder.is_dir() {
        return Err(std::io::ErrorKind::NotADirectory.into());
    }
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(folder, access).map_err(Into::into)
}

/// What has the name now, as long as no VM uses it.
fn existing(name: &str, path: &Path) -> Result<Option<Arc<Disk>>, BindError> {
    match std::fs::metadata(path) {
        Err(_) => Ok(None),
        Ok(found) if found.is_file() && found.len() == 0 => Ok(None),
        Ok(found) if found.is_file() => Ok(Some(Disk::open(name, path, false)?)),
        Ok(_) => Err(DiskError::Unfit {
            name: name.to_owned(),
            path: path.to_owned(),
            why: "it is no regular file, which a restored disk could take the place of in one step".into(),
        }
        .into()),
    }
}

/// A logical name as part of a file's name.
fn plain(name: &str) -> String {
    name.trim_start_matches(DISK)
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "._-".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect()
}

/// Gives the disks, which are whole now, their names.
pub(super) fn publish(filling: Vec<Filling>) -> Result<(), BindError> {
    for Filling { name, temp, to, _old } in filling {
        temp.replace(&to)
            .map_err(|source| BindError::File { name, source })?;
    }
    Ok(())
}
