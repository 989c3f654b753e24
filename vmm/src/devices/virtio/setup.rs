//! From what a user gives a VM to devices in slots.
//!
//! ```text
//! DeviceConfig (paths, TAPs) --open()--> Backing (open files) --attach()--> devices in slots, new or with their state
//! VirtioState (names) + Binding ---------------^
//! ```
//!
//! Whatever can be wrong on this host (a file that is locked, a TAP that is missing) is found by `open`, before there
//! is a machine. A device's slot is its place in the list.

use std::path::PathBuf;
use std::sync::Arc;

use super::balloon::{Balloon, BalloonDevice, BalloonOptions};
use super::block::Block;
use super::disk::{Disk, DiskError};
use super::net::tap::{Tap, TapError};
use super::net::{Mac, Net, random_mac};
use super::rng::Rng;
use super::state::VirtioState;
use super::vsock::Vsock;
use super::{Device, Transport};
use crate::bus::Attached;
use crate::devices::DeviceStateError;
use crate::layout::{MAX_VIRTIO_SLOTS, VirtioSlot};
use crate::leash::Leash;
use crate::memory::GuestRam;
use crate::socket::{Socket, SocketError};

/// What a disk's logical name begins with.
pub const DISK: &str = "disk:";
/// What a network card's logical name begins with.
pub const NET: &str = "net:";

/// A device a VM is to have, and what of this host it stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceConfig {
    /// A disk.
    Disk {
        /// Its logical name without `disk:`.
        name: String,
        /// The raw image.
        path: PathBuf,
        /// The guest may not write.
        read_only: bool,
        /// The guest's flushes reach the host's storage.
        flush: bool,
    },
    /// A network card.
    Net {
        /// Its logical name without `net:`.
        name: String,
        /// The host's TAP interface.
        tap: String,
        /// Its hardware address; `None` draws one.
        mac: Option<Mac>,
    },
    /// Entropy.
    Rng,
    /// Stream sockets.
    Vsock {
        /// The guest's address.
        guest_cid: u32,
        /// The Unix socket.
        path: PathBuf,
    },
    /// A balloon.
    Balloon(BalloonOptions),
}

/// A device's part of this host, open.
#[derive(Debug, Clone)]
pub enum Backing {
    /// A disk.
    Disk {
        /// Its file.
        disk: Arc<Disk>,
        /// The guest's flushes reach the host's storage.
        flush: bool,
    },
    /// A network card.
    Net {
        /// Its logical name.
        name: String,
        /// The host's end.
        tap: Tap,
        /// Its hardware address.
        mac: Mac,
    },
    /// Entropy.
    Rng,
    /// Stream sockets.
    Vsock {
        /// The guest's address.
        guest_cid: u32,
        /// The host's end.
        socket: Arc<Socket>,
    },
    /// A balloon.
    Balloon(Balloon),
}

/// Why a VM cannot have its devices.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Too many.
    #[error("{count} devices: a VM can have {MAX_VIRTIO_SLOTS}")]
    TooMany {
        /// What was asked for.
        count: usize,
    },
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A network card.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The socket of the stream sockets.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A balloon.
    #[error("make the balloon")]
    Balloon(#[source] std::io::Error),
    /// No random bytes for a hardware address.
    #[error("draw a hardware address for {name}")]
    Random {
        /// The device.
        name: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A device could not be made.
    #[error(transparent)]
    Device(#[from] DeviceStateError),
}

/// The devices of a VM on this host.
#[derive(Debug, Clone, Default)]
pub struct Devices(Vec<Backing>);

impl Devices {
    /// Devices that are open already.
    #[must_use]
    pub fn of(backings: Vec<Backing>) -> Self {
        Self(backings)
    }

    /// Opens what the devices of a new VM stand on.
    ///
    /// # Errors
    /// [`SetupError`] naming the device.
    pub fn open(configs: &[DeviceConfig]) -> Result<Self, SetupError> {
        if configs.len() > MAX_VIRTIO_SLOTS {
            return Err(SetupError::TooMany { count: configs.len() });
        }
        configs.iter().map(open).collect::<Result<_, _>>().map(Self)
    }

    /// The disks, in the order of their slots: each is an address space.
    pub fn disks(&self) -> impl Iterator<Item = &Arc<Disk>> {
        self.0.iter().filter_map(|backing| match backing {
            Backing::Disk { disk, .. } => Some(disk),
            Backing::Net { .. } | Backing::Rng | Backing::Vsock { .. } | Backing::Balloon(_) => None,
        })
    }

    /// Where the stream sockets meet, if there are any.
    #[must_use]
    pub fn vsock(&self) -> Option<PathBuf> {
        self.0.iter().find_map(|backing| match backing {
            Backing::Vsock { socket, .. } => Some(socket.path().to_owned()),
            Backing::Disk { .. } | Backing::Net { .. } | Backing::Rng | Backing::Balloon(_) => None,
        })
    }

    /// The devices in their slots: new ones, or with their states, in the same order. They are heard as long as `leash`
    /// lets them.
    ///
    /// # Errors
    /// [`SetupError`] naming the device.
    pub fn attach(
        &self,
        ram: &Arc<GuestRam>,
        leash: &Leash,
        saved: Option<&[VirtioState]>,
    ) -> Result<Vec<Attached>, SetupError> {
        let slots = (0..).map_while(VirtioSlot::new);
        self.0
            .iter()
            .zip(slots)
            .enumerate()
            .map(|(index, (backing, slot))| {
                let device = device(backing, ram, leash)?;
                let transport = match saved.and_then(|saved| saved.get(index)) {
                    Some(state) => Transport::from_state(device, state, ram)?,
                    None => Transport::new(device, ram)?,
                };
                Ok(Attached {
                    slot,
                    device: Arc::new(transport),
                    disk: match backing {
                        Backing::Disk { disk, .. } => Some(Arc::clone(disk)),
                        _ => None,
                    },
                    balloon: match backing {
                        Backing::Balloon(balloon) => Some(balloon.clone()),
                        _ => None,
                    },
                })
            })
            .collect()
    }
}

fn open(config: &DeviceConfig) -> Result<Backing, SetupError> {
    Ok(match config {
        DeviceConfig::Disk {
            name,
            path,
            read_only,
            flush,
        } => Backing::Disk {
            disk: Disk::open(&format!("{DISK}{name}"), path, *read_only)?,
            flush: *flush,
        },
        DeviceConfig::Net { name, tap, mac } => {
            let name = format!("{NET}{name}");
            let tap = Tap::open(&name, tap)?;
            let mac = match mac {
                Some(mac) => *mac,
                None => random_mac().map_err(|source| SetupError::Random {
                    name: name.clone(),
                    source,
                })?,
            };
            Backing::Net { name, tap, mac }
        }
        DeviceConfig::Rng => Backing::Rng,
        DeviceConfig::Vsock { guest_cid, path } => Backing::Vsock {
            guest_cid: *guest_cid,
            socket: Arc::new(Socket::bind(path)?),
        },
        DeviceConfig::Balloon(options) => {
            Backing::Balloon(Balloon::new(*options).map_err(SetupError::Balloon)?)
        }
    })
}

fn device(backing: &Backing, ram: &Arc<GuestRam>, leash: &Leash) -> Result<Box<dyn Device>, SetupError> {
    Ok(match backing {
        Backing::Disk { disk, flush } => {
            let block = Block::new(Arc::clone(disk), *flush).map_err(|e| DeviceStateError {
                device: "virtio",
                why: format!("start the threads of {}: {e}", disk.name()),
            })?;
            Box::new(block)
        }
        Backing::Net { name, tap, mac } => Box::new(Net::new(name, *mac, tap).under(leash.clone())),
        Backing::Rng => Box::new(Rng::default()),
        Backing::Vsock { guest_cid, socket } => {
            Box::new(Vsock::new(*guest_cid, Arc::clone(socket), leash.clone()))
        }
        Backing::Balloon(balloon) => Box::new(BalloonDevice::new(balloon, ram).map_err(SetupError::Balloon)?),
    })
}
