//! From a chain of segments to the pages of a new VM.
//!
//! ```text
//! newest   [ d d . z x . ]      d: data, written to the target     z: zero, nothing to write
//!          [ . d d d x . ]      a page that a newer link decided is skipped; a frame of only such pages is not read
//! full     [ d d d . d . ]      what no link has is zero
//! ```
//!
//! Newest first, so old versions of pages are mostly not even decompressed. One bit a page says "decided"; threads
//! share the frames of one link, and links come one after the other.
//!
//! A change (x) does not decide its page. The target's memory takes the changes up, XOR being the same in whatever
//! order, until a link has the page whole; then the newest change's check says whether it came out right.
//!
//! What it never does: it does not know what a register is, and it does not repair: a chain that does not fit is an
//! error that names the link.

mod decided;
mod error;
mod pending;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use segment::{
    CheckpointId, FormatError, FrameBuf, FrameEntry, KeyId, Keyring, Manifest, PageCheck, PageIndex, ReadAt,
    Record, RunData, SegmentName, SegmentReader, Space, SpaceId, xor_into,
};

use crate::checkpoint::MAX_THREADS;
use crate::store::{ChainError, Entry, FsStore, MAX_CHAIN_LINKS, Reading, StoreError, chain_of};
use decided::Decided;
pub use error::{LoadError, TargetError};
use pending::Pending;

/// With up to this many frames of a link no thread is started for it.
const INLINE_FRAMES: usize = 4;
/// Links kept open. Longer chains are opened again link by link, so that they do not run out of file descriptors.
const MAX_OPEN_LINKS: usize = 256;
/// How often a chain is walked that is being merged meanwhile.
const MAX_WALKS: u32 = 10;
/// The most pages of all spaces together: 16 TiB of 4 KiB pages.
pub const MAX_LOAD_PAGES: u64 = 1 << 32;

/// Where pages go: the address spaces of a VM that does not run yet. The monitor implements it.
pub trait Target: Sync {
    /// Writes whole pages of `space` from page `first` on. Called from several threads, for disjoint pages; a page never
    /// written is zero. A page is written again only after it was [read](Self::read).
    ///
    /// # Errors
    /// When the space is not there or the pages are not inside it.
    fn write(&self, space: SpaceId, first: PageIndex, data: &[u8]) -> Result<(), TargetError>;

    /// Reads whole pages back, as they were written (or zero): what was written may be the change of a page, which
    /// older changes are added to. Called as [`Self::write`] is, never for a page that another thread writes.
    ///
    /// # Errors
    /// As [`Self::write`].
    fn read(&self, space: SpaceId, first: PageIndex, data: &mut [u8]) -> Result<(), TargetError>;
}

/// What a load did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadStats {
    /// Links of the chain.
    pub segments: u64,
    /// Frames that were read and decoded.
    pub frames_read: u64,
    /// Frames with nothing that a newer link had not decided.
    pub frames_skipped: u64,
    /// Pages written to the target.
    pub pages_written: u64,
    /// Bytes written to the target.
    pub bytes_written: u64,
}

/// Where a link is read from.
pub(crate) enum Source {
    /// A file of this host.
    File(File),
    /// Wherever else.
    Remote(Box<dyn ReadAt + Send + Sync>),
}

impl ReadAt for Source {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(offset, buf),
            Self::Remote(remote) => remote.read_exact_at(offset, buf),
        }
    }

    fn len(&self) -> std::io::Result<u64> {
        match self {
            Self::File(file) => ReadAt::len(file),
            Self::Remote(remote) => remote.len(),
        }
    }
}

/// One segment of the chain.
#[derive(Debug)]
struct Link {
    /// The file; none of one that is read where it is, which stays open.
    path: Option<PathBuf>,
    entry: Entry,
    /// Open, unless the chain has too many files.
    reader: Option<SegmentReader<Source>>,
}

/// A whole chain, checked for fit, and ready to be loaded any number of times. Its files stay open, so that merging
/// and removing do not disturb it (beyond 256 links: only the newest stay open).
#[derive(Debug)]
pub struct LoadPlan {
    /// The newest first.
    links: Vec<Link>,
    manifest: Manifest,
    /// Links that are not open have to be where they are until they are loaded.
    reading: Option<Reading>,
    /// For those too.
    keys: Keyring,
}

impl LoadPlan {
    /// The chain of `tip` in `store`.
    ///
    /// # Errors
    /// [`LoadError::Chain`] when it is not whole, [`LoadError::SpacesDiffer`], and when a link cannot be opened.
    pub fn new(store: &FsStore, tip: &SegmentName) -> Result<Self, LoadError> {
        let mut tries = 1;
        loop {
            match Self::walk(store, tip) {
                // Merged into a newer link between the reading of that one and this: the next walk sees the merged
                // one. Merges only ever make a chain shorter, so this ends; the bound is for a broken disk.
                Err(LoadError::Store(StoreError::NotHeld { .. }))
                    if tries < MAX_WALKS && store.chain(tip).is_ok() =>
                {
                    tries += 1;
                }
                Err(LoadError::Store(e @ StoreError::NotHeld { .. })) => {
                    // The chain's own words name who wants the link.
                    store.chain(tip).map_err(|source| not_whole(tip, source))?;
                    return Err(LoadError::Store(e));
                }
                Ok(mut plan) => {
                    plan.reading = store.reading();
                    plan.keys = store.keys();
                    return Ok(plan);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Follows the parents from the files themselves, as each is when it is opened.
    fn walk(store: &FsStore, tip: &SegmentName) -> Result<Self, LoadError> {
        let mut next: Option<(SegmentName, Option<CheckpointId>)> = Some((tip.clone(), None));
        let mut child = tip.clone();
        let mut count = 0;
        Self::of_links(std::iter::from_fn(|| {
            let (name, wanted) = next.take()?;
            let broken = |source| not_whole(tip, source);
            count += 1;
            if count > MAX_CHAIN_LINKS {
                return Some(Err(broken(ChainError::TooLong {
                    tip: tip.clone(),
                    max: MAX_CHAIN_LINKS,
                })));
            }
            let link = match open_link(store, &name) {
                Ok(link) => link,
                Err(e) => return Some(Err(e)),
            };
            let held = link.entry.checkpoint;
            if let Some(wanted) = wanted.filter(|wanted| *wanted != held) {
                let wanted_by = child.clone();
                return Some(Err(broken(ChainError::WrongCheckpoint {
                    link: name,
                    wanted_by,
                    wanted,
                    held,
                })));
            }
            next = link
                .entry
                .parent()
                .map(|(name, checkpoint)| (name.clone(), Some(checkpoint)));
            child = name;
            Some(Ok(link))
        }))
    }

    /// One self-contained (full) segment in a file.
    ///
    /// # Errors
    /// As [`Self::from_files`].
    pub fn from_file(path: &Path) -> Result<Self, LoadError> {
        Self::from_files(&[path.to_owned()])
    }

    /// A chain in files, in any order; the newest is the tip.
    ///
    /// # Errors
    /// When one is no segment, when they are not one whole chain, and as [`Self::new`].
    pub fn from_files(paths: &[PathBuf]) -> Result<Self, LoadError> {
        Self::from_files_with(paths, &Keyring::default())
    }

    /// The same of files that may be encrypted with one of `keys`.
    ///
    /// # Errors
    /// As [`Self::from_files`].
    pub fn from_files_with(paths: &[PathBuf], keys: &Keyring) -> Result<Self, LoadError> {
        let mut by_name: HashMap<SegmentName, Link> = HashMap::new();
        for path in paths {
            let link = open_file(path, keys)?;
            if let Some(first) = by_name.insert(link.entry.name.clone(), link) {
                let (name, first) = (first.entry.name, first.path.unwrap_or_default());
                return Err(LoadError::SameName {
                    name,
                    first,
                    second: path.clone(),
                });
            }
        }
        let tip = by_name.keys().max().cloned().ok_or(LoadError::Nothing)?;
        let chain = chain_of(by_name.values().map(|link| link.entry.clone()), &tip)
            .map_err(|source| not_whole(&tip, source))?;
        let links: Vec<Link> = chain
            .iter()
            .rev()
            .filter_map(|entry| by_name.remove(&entry.name))
            .collect();
        if let Some(link) = by_name.into_values().next() {
            return Err(LoadError::NotInChain {
                path: link.path.unwrap_or_default(),
                name: link.entry.name,
                tip,
            });
        }
        let mut plan = Self::of_links(links.into_iter().map(Ok))?;
        plan.keys = keys.clone();
        Ok(plan)
    }

    /// A chain whose segments are open where they are: the full one first.
    ///
    /// # Errors
    /// When they are not one whole chain, and as [`Self::new`].
    pub(crate) fn of_remote(readers: Vec<SegmentReader<Source>>) -> Result<Self, LoadError> {
        let link = |reader: SegmentReader<Source>| Link {
            path: None,
            entry: Entry::of(&reader),
            reader: Some(reader),
        };
        let links: Vec<_> = readers.into_iter().map(link).collect();
        let tip = links.last().ok_or(LoadError::Nothing)?.entry.name.clone();
        chain_of(links.iter().map(|link| link.entry.clone()), &tip)
            .map_err(|source| not_whole(&tip, source))?;
        Self::of_links(links.into_iter().rev().map(Ok))
    }

    /// Checks the links, newest first, for fit.
    fn of_links(links: impl Iterator<Item = Result<Link, LoadError>>) -> Result<Self, LoadError> {
        let mut plan: Option<Self> = None;
        for link in links {
            let mut link = link?;
            let Some(plan) = &mut plan else {
                let Some(reader) = &link.reader else {
                    return Err(LoadError::Nothing);
                };
                let manifest = reader.manifest().clone();
                let pages = manifest
                    .spaces
                    .iter()
                    .fold(0u64, |sum, space| sum.saturating_add(space.pages));
                if pages > MAX_LOAD_PAGES {
                    return Err(LoadError::TooLarge {
                        tip: manifest.name,
                        pages,
                        max: MAX_LOAD_PAGES,
                    });
                }
                plan = Some(Self {
                    links: vec![link],
                    manifest,
                    reading: None,
                    keys: Keyring::default(),
                });
                continue;
            };
            if link
                .reader
                .as_ref()
                .is_some_and(|reader| reader.manifest().spaces != plan.manifest.spaces)
            {
                return Err(LoadError::SpacesDiffer {
                    link: link.entry.name,
                    tip: plan.manifest.name.clone(),
                });
            }
            if plan.links.len() >= MAX_OPEN_LINKS && link.path.is_some() {
                link.reader = None;
            }
            plan.links.push(link);
        }
        plan.ok_or(LoadError::Nothing)
    }

    /// The tip's manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// A link that is encrypted with a key that is not there, and that key: it cannot be loaded then.
    #[must_use]
    pub fn missing_key(&self) -> Option<(&SegmentName, KeyId)> {
        let closed = |link: &&Link| match &link.reader {
            Some(reader) => !reader.is_open(),
            None => link.entry.missing_key(&self.keys).is_some(),
        };
        let link = self.links.iter().find(closed)?;
        link.entry.key.map(|key| (&link.entry.name, key))
    }

    /// The tip's address spaces.
    #[must_use]
    pub fn spaces(&self) -> &[Space] {
        &self.manifest.spaces
    }

    /// The tip's device records.
    ///
    /// # Errors
    /// When they cannot be read or are damaged.
    pub fn records(&self) -> Result<Vec<Record>, LoadError> {
        let Some(tip) = self.links.first() else {
            return Err(LoadError::Nothing);
        };
        with_reader(tip, &self.keys, |reader| {
            reader.records().map_err(|source| LoadError::Segment {
                name: tip.entry.name.clone(),
                source,
            })
        })
    }

    /// Bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.links.iter().map(|link| link.entry.bytes).sum()
    }

    /// Links of the chain, the full one included.
    #[must_use]
    pub fn links(&self) -> usize {
        self.links.len()
    }

    /// Writes every page that is not zero to `target`, with up to `threads` threads. The target's spaces
    /// are those of [`Self::spaces`], and zero. After an error some pages are written and some are not.
    ///
    /// # Errors
    /// The first thing that is damaged, or that the target did not take.
    pub fn load_into<T: Target>(&self, target: &T, threads: usize) -> Result<LoadStats, LoadError> {
        let spaces = self.manifest.spaces.iter();
        let load = Load {
            target,
            spaces: spaces.map(|space| (space.id, Loading::new(space))).collect(),
            threads: threads.clamp(1, MAX_THREADS),
            counts: Counts::default(),
        };
        let mut buf = FrameBuf::new();
        for link in &self.links {
            with_reader(link, &self.keys, |reader| {
                load.link(&link.entry.name, reader, &mut buf)
            })?;
        }
        load.nothing_pending()?;
        Ok(load.counts.stats(self.links.len()))
    }
}

fn not_whole(tip: &SegmentName, source: ChainError) -> LoadError {
    let (tip, source) = (tip.clone(), Box::new(source));
    LoadError::Chain { tip, source }
}

fn open_link(store: &FsStore, name: &SegmentName) -> Result<Link, LoadError> {
    let (file, _) = store.open_raw(name).map_err(LoadError::Store)?;
    let reader =
        SegmentReader::open_with(Source::File(file), &store.keys()).map_err(|source| LoadError::Segment {
            name: name.clone(),
            source,
        })?;
    // The file's own, not the index's: a store opened for reading may be behind.
    Ok(Link {
        path: Some(store.segment_path(name)),
        entry: Entry::of(&reader),
        reader: Some(reader),
    })
}

fn open_file(path: &Path, keys: &Keyring) -> Result<Link, LoadError> {
    let file = crate::regular::open(path).map_err(|source| LoadError::Open {
        path: path.to_owned(),
        source,
    })?;
    let reader = SegmentReader::open_with(Source::File(file), keys).map_err(|source| LoadError::File {
        path: path.to_owned(),
        source,
    })?;
    Ok(Link {
        path: Some(path.to_owned()),
        entry: Entry::of(&reader),
        reader: Some(reader),
    })
}

/// Calls `f` with the link's reader, opening it when it is not.
fn with_reader<R>(
    link: &Link,
    keys: &Keyring,
    f: impl FnOnce(&SegmentReader<Source>) -> Result<R, LoadError>,
) -> Result<R, LoadError> {
    if let Some(reader) = &link.reader {
        return f(reader);
    }
    let Some(path) = &link.path else {
        return Err(LoadError::Nothing);
    };
    let again = open_file(path, keys)?;
    match &again.reader {
        Some(reader) if again.entry == link.entry => f(reader),
        Some(_) | None => Err(LoadError::Changed {
            name: link.entry.name.clone(),
        }),
    }
}

/// One run of [`LoadPlan::load_into`].
struct Load<'a, T> {
    target: &'a T,
    spaces: HashMap<SpaceId, Loading>,
    threads: usize,
    counts: Counts,
}

/// How far a space is.
struct Loading {
    page_bytes: usize,
    decided: Decided,
    /// The pages of which only changes have been met.
    pending: Pending,
}

impl Loading {
    fn new(space: &Space) -> Self {
        Self {
            page_bytes: space.page_bytes as usize,
            decided: Decided::new(space.pages),
            pending: Pending::default(),
        }
    }
}

#[derive(Default)]
struct Counts {
    read: AtomicU64,
    skipped: AtomicU64,
    pages: AtomicU64,
    bytes: AtomicU64,
}

impl Counts {
    fn stats(&self, links: usize) -> LoadStats {
        LoadStats {
            segments: links as u64,
            frames_read: self.read.load(Ordering::Relaxed),
            frames_skipped: self.skipped.load(Ordering::Relaxed),
            pages_written: self.pages.load(Ordering::Relaxed),
            bytes_written: self.bytes.load(Ordering::Relaxed),
        }
    }
}

impl<T: Target> Load<'_, T> {
    /// Loads what one link decides. All of it is done when this returns: the next link relies on it.
    fn link(
        &self,
        name: &SegmentName,
        reader: &SegmentReader<Source>,
        buf: &mut FrameBuf,
    ) -> Result<(), LoadError> {
        let frames = reader.index().len();
        if self.threads == 1 || frames <= INLINE_FRAMES {
            return (0..frames).try_for_each(|i| self.frame(name, reader, i, buf));
        }
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        // The first error; written once, when a thread gives up.
        let error: Mutex<Option<LoadError>> = Mutex::new(None);
        let work = |buf: &mut FrameBuf| {
            while !failed.load(Ordering::Relaxed) {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= frames {
                    break;
                }
                if let Err(e) = self.frame(name, reader, i, buf) {
                    failed.store(true, Ordering::Relaxed);
                    error
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .get_or_insert(e);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads.min(frames) {
                scope.spawn(|| work(&mut FrameBuf::new()));
            }
            work(buf);
        });
        error
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }

    fn frame(
        &self,
        name: &SegmentName,
        reader: &SegmentReader<Source>,
        i: usize,
        buf: &mut FrameBuf,
    ) -> Result<(), LoadError> {
        let damaged = |source| LoadError::Segment {
            name: name.clone(),
            source,
        };
        let entry: &FrameEntry = &reader.index()[i];
        // The reader has checked every entry against the manifest, whose spaces these are.
        let Some(Loading {
            page_bytes,
            decided,
            pending,
        }) = self.spaces.get(&entry.space)
        else {
            return Ok(());
        };
        if decided.all(entry.first_page.0..entry.end_page.0) {
            self.counts.skipped.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let frame = reader.read_frame(i, buf).map_err(damaged)?;
        self.counts.read.fetch_add(1, Ordering::Relaxed);
        let place = Place {
            name,
            space: entry.space,
            page_bytes: *page_bytes,
        };
        for (pages, data) in frame.runs() {
            let first = pages.start;
            // The bytes of some of the run's pages.
            let some = |some: &Range<u64>| {
                to_usize(some.start - first) * page_bytes..to_usize(some.end - first) * page_bytes
            };
            match data {
                RunData::Changes { xor, checks } => {
                    for (page, check) in pages.zip(checks) {
                        if !decided.all(page..page + 1) {
                            let first = pending.note(page, PageCheck(*check), name);
                            let xor = &xor[some(&(page..page + 1))];
                            self.change(&place, page, xor, first)?;
                        }
                    }
                }
                RunData::Zero => decided.decide(pages, |free| {
                    pending.take(free, |run, change| match change {
                        Some(change) => self.settle(&place, run.start, None, &change),
                        None => Ok(()),
                    })
                })?,
                RunData::Data(data) => decided.decide(pages, |free| {
                    pending.take(free, |run, change| {
                        let bytes = &data[some(&run)];
                        match change {
                            Some(change) => self.settle(&place, run.start, Some(bytes), &change),
                            None => self.write(&place, run.start, run.end - run.start, bytes),
                        }
                    })
                })?,
            }
        }
        Ok(())
    }

    /// Takes up a change: the page is what it was changed by so far. `first`: there is nothing yet.
    fn change(&self, place: &Place<'_>, page: u64, xor: &[u8], first: bool) -> Result<(), LoadError> {
        if first {
            return self.write(place, page, 1, xor);
        }
        let mut content = vec![0; xor.len()];
        self.read(place, page, &mut content)?;
        xor_into(&mut content, xor);
        self.write(place, page, 0, &content)
    }

    /// The page's changes have met what they are changes of: its content, or zero.
    fn settle(
        &self,
        place: &Place<'_>,
        page: u64,
        base: Option<&[u8]>,
        change: &pending::Change,
    ) -> Result<(), LoadError> {
        let mut content = vec![0; place.page_bytes];
        self.read(place, page, &mut content)?;
        if let Some(base) = base {
            xor_into(&mut content, base);
        }
        if PageCheck::of(&content) != change.check {
            let what = format!(
                "page {page} of space {} as a change of what {} has",
                place.space, place.name
            );
            return Err(LoadError::Segment {
                name: change.link.clone(),
                source: FormatError::Digest { what: what.into() },
            });
        }
        match base {
            Some(_) => self.write(place, page, 0, &content),
            None => Ok(()),
        }
    }

    /// Every change has met what it is a change of.
    fn nothing_pending(&self) -> Result<(), LoadError> {
        for (space, Loading { pending, .. }) in &self.spaces {
            if let Some((page, change)) = pending.any() {
                return Err(LoadError::NoBase {
                    name: change.link,
                    space: *space,
                    page: PageIndex(page),
                });
            }
        }
        Ok(())
    }

    /// Writes `bytes`, of which `pages` pages were not written before.
    fn write(&self, place: &Place<'_>, page: u64, pages: u64, bytes: &[u8]) -> Result<(), LoadError> {
        if pages > 0 {
            self.counts.pages.fetch_add(pages, Ordering::Relaxed);
            self.counts.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        self.target
            .write(place.space, PageIndex(page), bytes)
            .map_err(|source| place.failed(page, source))
    }

    fn read(&self, place: &Place<'_>, page: u64, bytes: &mut [u8]) -> Result<(), LoadError> {
        self.target
            .read(place.space, PageIndex(page), bytes)
            .map_err(|source| place.failed(page, source))
    }
}

/// What is being loaded, for errors.
struct Place<'a> {
    name: &'a SegmentName,
    space: SpaceId,
    page_bytes: usize,
}

impl Place<'_> {
    fn failed(&self, page: u64, source: TargetError) -> LoadError {
        LoadError::Target {
            name: self.name.clone(),
            space: self.space,
            page: PageIndex(page),
            source,
        }
    }
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
