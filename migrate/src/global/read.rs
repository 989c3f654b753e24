//! A restore point read where it is: by ranges, as far as they are needed.
//!
//! A chain is loaded newest first, and a frame whose pages a newer link decided is not read: so it does not come over
//! the network either, but for what lies in one block of 2 MiB with what does.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use segment::{Digest, Keyring, Manifest, ReadAt, SegmentName, SegmentReader, VmId};
use tokio::runtime::Runtime;

use super::bucket::part_bytes;
use super::{Bucket, ChainRecord, GlobalError, LinkRecord, PART_BYTES};
use crate::load::{LoadError, LoadPlan, Source};
use crate::mutex::lock;
use crate::store::{Moment, MomentError};
use crate::wire::Held;

/// What is read at a time. Divides a part.
const BLOCK_BYTES: u64 = 2 << 20;
/// Blocks that are kept for all files together: what threads work on at the same time, and a little more.
const MAX_BLOCKS: usize = 32;

/// Links that are opened at once.
const OPEN_AT_ONCE: usize = 16;

/// Which restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The newest.
    Newest,
    /// By its name.
    Name(SegmentName),
    /// The newest at or before a moment.
    At(Moment),
}

/// A global store for those who wait: it has threads of its own, so that any thread may read.
#[derive(Clone)]
pub struct Remote(Arc<Inner>);

struct Inner {
    bucket: Bucket,
    /// Taken out when the last is dropped, which may be inside another runtime.
    runtime: Option<Runtime>,
    /// Blocks, the last used at the end. Shared by the threads that load; held for moments, and never while reading.
    blocks: Mutex<VecDeque<(Key, Arc<Block>)>>,
    fetched: AtomicU64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.0.bucket)
    }
}

/// Which upload of which link, and which block of it.
type Key = ([u8; 16], SegmentName, u64);

/// A block, read by the first who needs it while the others wait for it.
#[derive(Debug, Default)]
struct Block(Mutex<Option<Arc<Vec<u8>>>>);

impl Remote {
    /// Of a bucket.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new(bucket: Bucket) -> Result<Self, GlobalError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("global")
            .enable_all()
            .build()
            .map_err(|e| GlobalError::Setup {
                place: bucket.to_string(),
                why: format!("no thread can be started: {e}"),
            })?;
        Ok(Self(Arc::new(Inner {
            bucket,
            runtime: Some(runtime),
            blocks: Mutex::default(),
            fetched: AtomicU64::new(0),
        })))
    }

    /// How many bytes of segments came so far.
    #[must_use]
    pub fn fetched_bytes(&self) -> u64 {
        self.0.fetched.load(Ordering::Relaxed)
    }

    /// Runs something there, and waits for it.
    fn wait<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, GlobalError>> + Send + 'static,
    ) -> Result<T, GlobalError> {
        let (done, result) = mpsc::sync_channel(1);
        let Some(runtime) = &self.0.runtime else {
            return Err(GlobalError::Stopped);
        };
        runtime.spawn(async move {
            let _ = done.send(work.await);
        });
        result.recv().unwrap_or(Err(GlobalError::Stopped))
    }

    /// The restore point that is meant.
    ///
    /// # Errors
    /// [`GlobalError`], also as the text of a [`MomentError`].
    pub fn find(&self, vm: &VmId, wanted: Found) -> Result<ChainRecord, GlobalError> {
        let (bucket, vm) = (self.0.bucket.clone(), vm.clone());
        self.wait(async move { bucket.find(&vm, wanted).await })
    }

    /// One link's file.
    #[must_use]
    pub fn file(&self, link: &LinkRecord) -> Box<dyn ReadAt + Send + Sync> {
        Box::new(RemoteFile {
            remote: self.clone(),
            link: link.clone(),
        })
    }

    /// The chain, ready to be loaded with `keys`. Nothing but headers, manifests, records and indices was read.
    ///
    /// # Errors
    /// When a link is damaged, or is not the one that the point names.
    pub fn plan(&self, chain: &ChainRecord, keys: &Keyring) -> Result<LoadPlan, LoadError> {
        let links = chain.links();
        let next = AtomicUsize::new(0);
        // By the threads that open them, each its own.
        let opened: Mutex<Vec<Option<SegmentReader<Source>>>> =
            Mutex::new(links.iter().map(|_| None).collect());
        let failed: Mutex<Option<LoadError>> = Mutex::new(None);
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= links.len() || lock(&failed).is_some() {
                    return;
                }
                let below = i.checked_sub(1).map(|i| &links[i]);
                match self.open(&links[i], below, keys) {
                    Ok(reader) => lock(&opened)[i] = Some(reader),
                    Err(error) => {
                        lock(&failed).get_or_insert(error);
                    }
                }
            }
        };
        // A request waits for the network: many at once.
        std::thread::scope(|scope| {
            for _ in 1..links.len().min(OPEN_AT_ONCE) {
                scope.spawn(work);
            }
            work();
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let opened = opened.into_inner().unwrap_or_else(PoisonError::into_inner);
        LoadPlan::of_remote(opened.into_iter().flatten().collect())
    }

    fn open(
        &self,
        link: &LinkRecord,
        below: Option<&LinkRecord>,
        keys: &Keyring,
    ) -> Result<SegmentReader<Source>, LoadError> {
        let reader = SegmentReader::open_with(Source::Remote(self.file(link)), keys).map_err(|source| {
            LoadError::Segment {
                name: link.name.clone(),
                source,
            }
        })?;
        let below = below.map(LinkRecord::held);
        self.check_link(link, below.as_ref(), reader.manifest(), reader.digest())
            .map_err(|source| LoadError::Global(Box::new(source)))?;
        Ok(reader)
    }

    /// A file is the segment that the point names, and stands on the link below it.
    pub(super) fn check_link(
        &self,
        link: &LinkRecord,
        below: Option<&Held>,
        manifest: &Manifest,
        digest: Digest,
    ) -> Result<(), GlobalError> {
        let stands = match &manifest.kind {
            segment::Kind::Full => None,
            segment::Kind::Delta {
                parent,
                parent_checkpoint,
            } => Some((parent, *parent_checkpoint)),
        };
        let why = if manifest.name != link.name
            || manifest.checkpoint != link.checkpoint
            || digest != link.digest
        {
            "it is not the segment that the restore point names"
        } else if stands != below.map(|below| (&below.name, below.checkpoint)) {
            "it does not stand on the link before it"
        } else {
            return Ok(());
        };
        Err(GlobalError::Damaged {
            object: link.name.to_string(),
            place: self.0.bucket.to_string(),
            why: why.into(),
        })
    }

    fn block(&self, link: &LinkRecord, block: u64) -> io::Result<Arc<Vec<u8>>> {
        let key = (link.upload, link.name.clone(), block);
        let cell = {
            let mut blocks = lock(&self.0.blocks);
            let at = blocks.iter().position(|(k, _)| *k == key);
            let cell = match at.and_then(|at| blocks.remove(at)) {
                Some((_, cell)) => cell,
                None => Arc::default(),
            };
            if blocks.len() >= MAX_BLOCKS {
                blocks.pop_front();
            }
            blocks.push_back((key, cell.clone()));
            cell
        };
        // Others that need the same block wait here; those that need another do not.
        let mut content = lock(&cell.0);
        if let Some(bytes) = &*content {
            return Ok(bytes.clone());
        }
        let at = block * BLOCK_BYTES;
        let (part, start) = (at / PART_BYTES, at % PART_BYTES);
        let end = (start + BLOCK_BYTES).min(part_bytes(link.bytes, part));
        let (bucket, of) = (self.0.bucket.clone(), link.clone());
        let bytes = self
            .wait(async move { bucket.read_part(&of, part, start..end).await })
            .map_err(io::Error::other)?;
        self.0.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let bytes = Arc::new(bytes);
        *content = Some(bytes.clone());
        Ok(bytes)
    }
}

/// One link's file, where it is.
struct RemoteFile {
    remote: Remote,
    link: LinkRecord,
}

impl ReadAt for RemoteFile {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.link.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let block = self.remote.block(&self.link, at / BLOCK_BYTES)?;
            let from = usize::try_from(at % BLOCK_BYTES).unwrap_or(usize::MAX);
            let there = block.get(from..).unwrap_or_default();
            let some = there.len().min(rest.len());
            if some == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (now, later) = rest.split_at_mut(some);
            now.copy_from_slice(&there[..some]);
            rest = later;
            at += some as u64;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.link.bytes)
    }
}

impl Bucket {
    /// The restore point of `vm` that is meant.
    ///
    /// # Errors
    /// [`GlobalError::Nothing`], [`GlobalError::NoPoint`], and what the store says.
    pub async fn find(&self, vm: &VmId, wanted: Found) -> Result<ChainRecord, GlobalError> {
        let names = self.points(vm).await?;
        let nothing = || GlobalError::Nothing {
            vm: vm.clone(),
            place: self.to_string(),
        };
        match wanted {
            Found::Name(name) => self.point(&name).await,
            Found::Newest => self.point(names.last().ok_or_else(nothing)?).await,
            Found::At(moment) => {
                let records = self.records(&names).await?;
                let points: Vec<_> = records.iter().map(ChainRecord::point).collect();
                let chosen = moment.choose(vm, &points, Moment::now());
                let name = match chosen {
                    Ok(point) => point.name.clone(),
                    Err(MomentError::Nothing(_)) => return Err(nothing()),
                    Err(error) => return Err(GlobalError::Moment(error)),
                };
                let found = records.into_iter().find(|record| record.tip().name == name);
                found.ok_or_else(nothing)
            }
        }
    }
}
