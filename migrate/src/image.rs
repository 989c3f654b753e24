//! A VM's memory and disks as they were at one checkpoint, uncompressed, ready to be run on.
//!
//! ```text
//! build:    chain of E  --load-->  memfd, disk files            at = E
//! advance:  at = none   E+1's frames, oldest link first         at = E+1
//!           '---- a crash, damage: the image is of no use ----'
//! ```
//!
//! Memory is a memfd that cannot change its size: who takes the VM over maps it, and the guest runs on it. A disk is a
//! file, which gets its name then. Neither is copied, so a taken image is gone.
//!
//! Invariants: `at` names the one checkpoint whose state the spaces hold, and nothing while they are between two; it is
//! the identity that counts, name and checkpoint id, since what holds a state is written anew by merges. A link is
//! applied once, and only to the state it is a change of: what it holds may be a change of the page's content (XOR),
//! which cannot be applied twice. Each frame is checked against its digest before a page of it is written.
//!
//! What it never does: it repairs nothing, and nothing of it outlives the process: an image is made anew from the store.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;
use segment::{
    FormatError, FrameBuf, Kind, PageCheck, PageIndex, RunData, SegmentName, SegmentReader, Space, SpaceId,
    xor_into,
};

use crate::load::{LoadError, LoadPlan, LoadStats, Target, TargetError};
use crate::store::{FsStore, Lease, MAX_CHAIN_LINKS, StoreError};
use crate::wire::Held;

#[cfg(test)]
mod tests;

/// How often the way from a checkpoint back to the image's is walked that is being merged meanwhile.
const MAX_WALKS: u32 = 10;
/// Links that an image is brought forward by at most; from further back it is made anew.
const MAX_STEPS: usize = 512;
/// Zeros written at a time, where a file cannot make holes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why an image is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The system refused memory or a file.
    #[error("{what} for an image of {tip}")]
    Make {
        /// What was to be done.
        what: &'static str,
        /// The checkpoint.
        tip: SegmentName,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The spaces are none that an image can have.
    #[error("{tip} has no memory of a size that an image can have")]
    Spaces {
        /// The checkpoint.
        tip: SegmentName,
    },
    /// The chain could not be loaded.
    #[error("make an image")]
    Load(#[from] LoadError),
    /// It was being brought forward when something failed: its content is no state of the VM.
    #[error("the image is between two checkpoints")]
    Between,
    /// What it is at is not what the checkpoint stands on.
    #[error("{tip} does not stand on {at}, or too many links lie between")]
    NotOnTheWay {
        /// Where it should go.
        tip: SegmentName,
        /// Where it is.
        at: SegmentName,
    },
    /// The checkpoint has other address spaces.
    #[error("{name} has other address spaces than the image")]
    OtherSpaces {
        /// The checkpoint.
        name: SegmentName,
    },
    /// A link cannot be read.
    #[error("read {name}")]
    Segment {
        /// The link.
        name: SegmentName,
        /// Which part, and why.
        #[source]
        source: FormatError,
    },
    /// The store does not give a link.
    #[error("open a link")]
    Store(#[from] StoreError),
    /// A page could not be written or read back.
    #[error("apply {name} to page {page} of space {space}")]
    Page {
        /// The link.
        name: SegmentName,
        /// The space.
        space: SpaceId,
        /// The page.
        page: u64,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Whoever asked wants it no more.
    #[error("it was broken off")]
    BrokenOff,
}

/// Whether to go on; asked between frames.
pub type GoOn<'a> = &'a (dyn Fn() -> bool + Sync);

/// One address space.
#[derive(Debug)]
struct Part {
    space: Space,
    file: File,
    /// Where a disk's file is, to be given another name; it goes with the image while it is there.
    path: Option<PathBuf>,
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // It has another name when the image was taken.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What an image takes when every page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImageSize {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of disks.
    pub disks: u64,
}

impl ImageSize {
    /// Of a VM with these spaces.
    #[must_use]
    pub fn of(spaces: &[Space]) -> Self {
        let sum = |memory: bool| {
            spaces
                .iter()
                .filter(|space| (space.id == SpaceId::MEMORY) == memory)
                .fold(0u64, |sum, space| sum.saturating_add(space.bytes()))
        };
        Self {
            memory: sum(true),
            disks: sum(false),
        }
    }
}

/// An image. See the [module](self).
#[derive(Debug)]
pub struct Image {
    parts: Vec<Part>,
    at: Option<Held>,
    /// Keeps what it is at in the store: what comes next has to be seen to stand on it.
    lease: Option<Lease>,
}

/// An image, given away.
#[derive(Debug)]
pub struct TakenImage {
    /// What it is at.
    pub at: Held,
    /// The guest's memory, as long as its space.
    pub memory: File,
    /// The disks' names and files; the files go when this is dropped before they have other names.
    pub disks: Vec<(String, PathBuf)>,
    _parts: Vec<Part>,
}

impl Image {
    /// The state of `tip`, from its chain in `store`, with disks as files in `dir` whose names begin with `stem`.
    ///
    /// # Errors
    /// [`ImageError`]; nothing is left then.
    pub fn build(
        store: &Arc<FsStore>,
        tip: &SegmentName,
        (dir, stem): (&Path, &str),
        go_on: GoOn<'_>,
    ) -> Result<(Self, LoadStats), ImageError> {
        let plan = LoadPlan::new(store, tip)?;
        let manifest = plan.manifest();
        let at = Held {
            name: manifest.name.clone(),
            checkpoint: manifest.checkpoint,
        };
        let mut image = Self::empty(tip, plan.spaces(), dir, stem)?;
        let target = Guarded { image: &image, go_on };
        let loaded = plan.load_into(&target, 1);
        if !go_on() {
            return Err(ImageError::BrokenOff);
        }
        let stats = loaded?;
        image.arrive(store, at);
        Ok((image, stats))
    }

    fn empty(tip: &SegmentName, spaces: &[Space], dir: &Path, stem: &str) -> Result<Self, ImageError> {
        let refused = |what| {
            let tip = tip.clone();
            move |source| ImageError::Make { what, tip, source }
        };
        let bytes_of = |space: &Space| space.pages.checked_mul(space.page_bytes.into());
        let mut parts = Vec::new();
        for space in spaces {
            let bytes = bytes_of(space).filter(|bytes| i64::try_from(*bytes).is_ok());
            let Some(bytes) = bytes.filter(|bytes| *bytes > 0) else {
                return Err(ImageError::Spaces { tip: tip.clone() });
            };
            let (file, path) = if space.id == SpaceId::MEMORY {
                (memory(bytes).map_err(refused("take memory"))?, None)
            } else {
                let path = dir.join(format!("{stem}-{}.raw", space.id));
                std::fs::create_dir_all(dir).map_err(refused("make a folder"))?;
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(&path)
                    .map_err(refused("make a disk's file"))?;
                (file, Some(path))
            };
            let is_disk = path.is_some();
            let part = Part {
                space: space.clone(),
                file,
                path,
            };
            if is_disk {
                part.file.set_len(bytes).map_err(refused("size a disk's file"))?;
            }
            parts.push(part);
        }
        if !parts.iter().any(|part| part.path.is_none()) {
            return Err(ImageError::Spaces { tip: tip.clone() });
        }
        Ok(Self {
            parts,
            at: None,
            lease: None,
        })
    }

    /// The checkpoint whose state it is; none when it is of no use.
    #[must_use]
    pub fn at(&self) -> Option<&Held> {
        self.at.as_ref()
    }

    /// Its address spaces' sizes.
    #[must_use]
    pub fn size(&self) -> ImageSize {
        let spaces: Vec<Space> = self.parts.iter().map(|part| part.space.clone()).collect();
        ImageSize::of(&spaces)
    }

    /// Brings it to `tip`, link by link, and tells how many there were. When `go_on` says no, or a link cannot be read,
    /// it stands at a whole checkpoint, or [nowhere](Self::at) when that was within a link.
    ///
    /// # Errors
    /// [`ImageError::NotOnTheWay`] when `tip` does not stand on what it is at (a newer full checkpoint, another
    /// generation's branch): nothing was changed. Any other: as [`Self::at`] says.
    pub fn advance(
        &mut self,
        store: &Arc<FsStore>,
        tip: &Held,
        go_on: GoOn<'_>,
    ) -> Result<usize, ImageError> {
        let at = self.at.clone().ok_or(ImageError::Between)?;
        if at == *tip {
            return Ok(0);
        }
        let links = way(store, &at, tip)?;
        let mut buf = FrameBuf::new();
        for (done, (held, reader)) in links.iter().rev().enumerate() {
            if !go_on() {
                return match done {
                    0 => Err(ImageError::BrokenOff),
                    done => Ok(done),
                };
            }
            if reader
                .manifest()
                .spaces
                .iter()
                .ne(self.parts.iter().map(|p| &p.space))
            {
                return Err(ImageError::OtherSpaces {
                    name: held.name.clone(),
                });
            }
            // From here on it is neither the one nor the other, until all of the link is in.
            self.at = None;
            self.apply(&held.name, reader, &mut buf)?;
            self.arrive(store, held.clone());
        }
        Ok(links.len())
    }

    /// Gives it away, when it is at exactly `wanted`.
    ///
    /// # Errors
    /// The image, as it was.
    pub fn take(self, wanted: &Held) -> Result<TakenImage, Self> {
        if self.at.as_ref() != Some(wanted) {
            return Err(self);
        }
        let memory = self
            .parts
            .iter()
            .find(|part| part.path.is_none())
            .map(|part| part.file.try_clone());
        let Some(Ok(memory)) = memory else {
            return Err(self);
        };
        let disk = |part: &Part| Some((part.space.name.clone(), part.path.clone()?));
        let disks = self.parts.iter().filter_map(disk).collect();
        Ok(TakenImage {
            at: wanted.clone(),
            memory,
            disks,
            _parts: self.parts,
        })
    }

    fn arrive(&mut self, store: &Arc<FsStore>, at: Held) {
        // The next before the last: in between nothing of the way can go. Without one it may have to be made anew.
        self.lease = store.lease_parent(&at.name).ok();
        self.at = Some(at);
    }

    fn apply(
        &self,
        name: &SegmentName,
        reader: &SegmentReader<File>,
        buf: &mut FrameBuf,
    ) -> Result<(), ImageError> {
        let damaged = |source| ImageError::Segment {
            name: name.clone(),
            source,
        };
        for i in 0..reader.index().len() {
            let space = reader.index()[i].space;
            // The reader has checked every entry against the manifest, whose spaces these are.
            let Some(part) = self.part(space) else { continue };
            let frame = reader.read_frame(i, buf).map_err(damaged)?;
            for (pages, data) in frame.runs() {
                let first = pages.start;
                let page_error = |page| {
                    let name = name.clone();
                    move |source| ImageError::Page {
                        name,
                        space,
                        page,
                        source,
                    }
                };
                match data {
                    RunData::Zero => part.zero(pages).map_err(page_error(first))?,
                    RunData::Data(data) => part.write(first, data).map_err(page_error(first))?,
                    RunData::Changes { xor, checks } => {
                        let size = part.space.page_bytes as usize;
                        let mut content = vec![0; size];
                        for ((page, xor), check) in pages.zip(xor.chunks_exact(size)).zip(checks) {
                            part.read(page, &mut content).map_err(page_error(page))?;
                            xor_into(&mut content, xor);
                            if PageCheck::of(&content) != PageCheck(*check) {
                                let what = format!("page {page} of space {space} as a change of the image's");
                                return Err(damaged(FormatError::Digest { what: what.into() }));
                            }
                            part.write(page, &content).map_err(page_error(page))?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn part(&self, space: SpaceId) -> Option<&Part> {
        self.parts.iter().find(|part| part.space.id == space)
    }
}

impl Part {
    /// Where `pages` pages from `first` on are, when they are inside.
    fn offset(&self, first: u64, bytes: u64) -> io::Result<u64> {
        let size = u64::from(self.space.page_bytes);
        let at = first.checked_mul(size);
        let end = at.and_then(|at| at.checked_add(bytes));
        match (at, end) {
            (Some(at), Some(end)) if end <= self.space.bytes() => Ok(at),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "page {first} and {bytes} bytes on are outside the space's {} pages",
                    self.space.pages
                ),
            )),
        }
    }

    fn write(&self, first: u64, data: &[u8]) -> io::Result<()> {
        self.file
            .write_all_at(data, self.offset(first, data.len() as u64)?)
    }

    fn read(&self, first: u64, data: &mut [u8]) -> io::Result<()> {
        self.file
            .read_exact_at(data, self.offset(first, data.len() as u64)?)
    }

    /// Makes holes: what is zero takes no memory.
    fn zero(&self, pages: Range<u64>) -> io::Result<()> {
        let length = pages
            .end
            .saturating_sub(pages.start)
            .saturating_mul(self.space.page_bytes.into());
        if length == 0 {
            return Ok(());
        }
        let mut at = self.offset(pages.start, length)?;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, punch, at, length) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let end = at + length;
                while at < end {
                    let some = &ZEROS[..(end - at).min(ZEROS.len() as u64) as usize];
                    self.file.write_all_at(some, at)?;
                    at += some.len() as u64;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The links from `tip` back to the one that stands on `at`, newest first, as their own files tell.
fn way(store: &Arc<FsStore>, at: &Held, tip: &Held) -> Result<Vec<(Held, SegmentReader<File>)>, ImageError> {
    let mut tries = 1;
    loop {
        match walk(store, at, tip) {
            // Merged into a newer link meanwhile: the next walk sees that one.
            Err(ImageError::Store(StoreError::NotHeld { .. }))
                if tries < MAX_WALKS && store.chain(&tip.name).is_ok() =>
            {
                tries += 1;
            }
            walked => return walked,
        }
    }
}

fn walk(store: &Arc<FsStore>, at: &Held, tip: &Held) -> Result<Vec<(Held, SegmentReader<File>)>, ImageError> {
    let not_on_the_way = || ImageError::NotOnTheWay {
        tip: tip.name.clone(),
        at: at.name.clone(),
    };
    let mut links = Vec::new();
    let mut next = tip.clone();
    while next != *at {
        if links.len() >= MAX_STEPS.min(MAX_CHAIN_LINKS) {
            return Err(not_on_the_way());
        }
        let reader = store.open_segment(&next.name)?;
        let manifest = reader.manifest();
        if manifest.checkpoint != next.checkpoint {
            return Err(not_on_the_way());
        }
        let parent = match &manifest.kind {
            // It says what every page is, and not what changed.
            Kind::Full => return Err(not_on_the_way()),
            Kind::Delta {
                parent,
                parent_checkpoint,
            } => Held {
                name: parent.clone(),
                checkpoint: *parent_checkpoint,
            },
        };
        links.push((std::mem::replace(&mut next, parent), reader));
    }
    Ok(links)
}

/// Memory that cannot change its size.
fn memory(bytes: u64) -> io::Result<File> {
    let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, bytes)?;
    // Who maps it relies on that.
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(fd))
}

/// An image that is being filled, for as long as it is wanted.
struct Guarded<'a> {
    image: &'a Image,
    go_on: GoOn<'a>,
}

impl Guarded<'_> {
    fn part(&self, space: SpaceId) -> Result<&Part, TargetError> {
        if !(self.go_on)() {
            return Err(TargetError::new("it was broken off"));
        }
        let part = self.image.part(space);
        part.ok_or_else(|| TargetError::new(format!("the image has no address space {space}")))
    }
}

impl Target for Guarded<'_> {
    fn write(&self, space: SpaceId, first: PageIndex, data: &[u8]) -> Result<(), TargetError> {
        self.part(space)?.write(first.0, data).map_err(TargetError::new)
    }

    fn read(&self, space: SpaceId, first: PageIndex, data: &mut [u8]) -> Result<(), TargetError> {
        self.part(space)?.read(first.0, data).map_err(TargetError::new)
    }
}
