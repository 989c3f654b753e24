//! What a VM is restored from: a chain that is loaded into new memory, or an image that the guest runs on as it is.
//!
//! An image is the guest's memory in a memfd, and its disks in files, as they are at one checkpoint; whoever keeps it (an
//! agent, `docs/hot-standby.md`) says which. The machine's state comes from that checkpoint's segment, so both have to be
//! the same one, by the checkpoint's id. What is in the pages is for the keeper to answer for; what could harm this
//! process is checked: what kind of file it is, its size, and that it keeps that.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use migrate::load::LoadPlan;
use migrate::store::FsStore;
use segment::{CheckpointId, Manifest, Record, SegmentName, Space, SpaceId};

use super::{RestoreFrom, SessionConfig, SessionError, cores, load_plan};
use crate::boot::{BootError, kept};
use crate::devices::virtio::disk::Disk;
use crate::memory::{GuestRam, MemoryError};
use crate::replica::MachineTarget;
use crate::vm::{BoxedError, VmError};

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFiles {
    /// The guest's memory: a memfd that is sealed against changes of its size.
    pub memory: PathBuf,
    /// What it is the state of.
    pub checkpoint: CheckpointId,
    /// The disks, by their logical names: each gets the name that the disk has here.
    pub disks: BTreeMap<String, PathBuf>,
}

/// A checkpoint, about to be restored.
pub(super) enum Content {
    /// To be loaded.
    Chain(Box<LoadPlan>),
    /// There already.
    Image {
        manifest: Box<Manifest>,
        records: Vec<Record>,
        memory: File,
        disks: BTreeMap<String, PathBuf>,
    },
}

impl Content {
    pub(super) fn open(config: &SessionConfig, from: &RestoreFrom) -> Result<Self, SessionError> {
        let RestoreFrom::Image { dir, segment, image } = from else {
            return load_plan(config, from).map(|plan| Self::Chain(Box::new(plan)));
        };
        let unfit = |why: String| SessionError::Image {
            name: segment.clone(),
            path: image.memory.clone(),
            why,
        };
        // No other link of the chain is looked at.
        let damaged = |source| SessionError::Load(segment_error(segment, source));
        let reader = FsStore::open_one(dir, segment)?;
        let reader = reader.with_keys(&config.keys).map_err(damaged)?;
        let (manifest, records) = (reader.manifest().clone(), reader.records().map_err(damaged)?);
        if manifest.checkpoint != image.checkpoint {
            return Err(unfit(format!(
                "it is of checkpoint {}, and {segment} is checkpoint {}",
                image.checkpoint, manifest.checkpoint
            )));
        }
        Ok(Self::Image {
            manifest: Box::new(manifest),
            records,
            memory: open_file(&image.memory).map_err(|e| unfit(format!("open it: {e}")))?,
            disks: image.disks.clone(),
        })
    }

    pub(super) fn manifest(&self) -> &Manifest {
        match self {
            Self::Chain(plan) => plan.manifest(),
            Self::Image { manifest, .. } => manifest,
        }
    }

    pub(super) fn spaces(&self) -> &[Space] {
        &self.manifest().spaces
    }

    pub(super) fn records(&self) -> Result<Vec<Record>, SessionError> {
        match self {
            Self::Chain(plan) => Ok(plan.records()?),
            Self::Image { records, .. } => Ok(records.clone()),
        }
    }

    /// The files that disks have already.
    pub(super) fn disks(&self) -> Option<BTreeMap<String, PathBuf>> {
        match self {
            Self::Chain(_) => None,
            Self::Image { disks, .. } => {
                let mut disks = disks.clone();
                disks.remove(kept::NAME);
                Some(disks)
            }
        }
    }

    /// The address space of what the guest was booted from; a checkpoint of an older monitor has none.
    pub(super) fn booted_from(&self) -> Option<&Space> {
        let is_it = |space: &&Space| space.id != SpaceId::MEMORY && space.name == kept::NAME;
        self.spaces().last().filter(is_it)
    }

    /// What the guest was booted from, to be filled with the disks, behind them.
    pub(super) fn boot(&self) -> Result<Option<Arc<Disk>>, SessionError> {
        let Some(space) = self.booted_from() else {
            return Ok(None);
        };
        let kept = match self {
            Self::Chain(_) => kept::empty(space.bytes()),
            Self::Image { disks, .. } => {
                let Some(path) = disks.get(kept::NAME).cloned() else {
                    return Err(SessionError::Image {
                        name: self.manifest().name.clone(),
                        path: kept::NAME.into(),
                        why:
                            "the checkpoint has what the guest was booted from, and no image of it is named \
                              (--image-disk boot=FILE)"
                                .into(),
                    });
                };
                let file = open_file(&path).map_err(|source| BootError::Read {
                    what: kept::NAME,
                    path,
                    source,
                });
                file.and_then(kept::of_file)
            }
        };
        kept.map(Some)
            .map_err(|error| SessionError::Control(VmError::Boot(error).into()))
    }

    /// The guest's memory, before the vCPUs are restored.
    pub(super) fn memory(&self, bytes: u64) -> Result<GuestRam, MemoryError> {
        match self {
            Self::Chain(_) => GuestRam::new(bytes),
            Self::Image { memory, .. } => {
                let memory = memory.try_clone().map_err(|e| MemoryError::Image {
                    why: format!("it cannot be kept open: {e}"),
                })?;
                GuestRam::adopt(memory, bytes)
            }
        }
    }

    /// Makes the memory and the disks what they were.
    pub(super) fn fill(&self, ram: &GuestRam, disks: &[Arc<Disk>]) -> Result<(), BoxedError> {
        match self {
            Self::Chain(plan) => {
                plan.load_into(&MachineTarget { ram, disks }, cores())?;
            }
            Self::Image { .. } => ram.settle()?,
        }
        Ok(())
    }
}

fn segment_error(name: &SegmentName, source: segment::FormatError) -> migrate::load::LoadError {
    migrate::load::LoadError::Segment {
        name: name.clone(),
        source,
    }
}

/// A file for reading and writing; what is none is not opened.
fn open_file(path: &Path) -> std::io::Result<File> {
    // Looked at first, because opening a device may already do something; the second look is at what was opened.
    let is_file = |metadata: std::fs::Metadata| match metadata.is_file() {
        true => Ok(()),
        false => Err(std::io::Error::other("it is no regular file")),
    };
    is_file(std::fs::metadata(path)?)?;
    let file = File::options().read(true).write(true).open(path)?;
    is_file(file.metadata()?)?;
    Ok(file)
}
