//! For the tests of this crate: a machine that is two arrays of bytes, and a target that is two more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use segment::{
    CheckpointId, Kind, Manifest, PageIndex, Record, SegmentName, SegmentReader, Space, SpaceId, Summary,
    VmId,
};

use crate::checkpoint::{
    CaptureKind, Captured, CapturedPages, EncodeError, EncodeOptions, EncodePool, PageBytes, PageReader,
    Source, SourceError,
};
use crate::load::{LoadPlan, Target, TargetError};
use crate::store::{FsStore, StoreError, Stored};

pub(crate) fn vm(id: &str) -> VmId {
    VmId::new(id).unwrap()
}

pub(crate) fn name(text: &str) -> SegmentName {
    text.parse().unwrap()
}

pub(crate) fn id(number: u64) -> CheckpointId {
    let mut bytes = [0xc0; 16];
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    CheckpointId(bytes)
}

/// Its spaces: memory of 4 KiB pages and a disk of 512-byte pages.
pub(crate) const MEMORY_PAGES: u64 = 300;
pub(crate) const DISK_PAGES: u64 = 700;

pub(crate) fn spaces() -> Vec<Space> {
    let space = |id, name: &str, page_bytes, pages| Space {
        id: SpaceId(id),
        name: name.into(),
        page_bytes,
        pages,
    };
    vec![
        space(0, "memory", 4096, MEMORY_PAGES),
        space(3, "disk0", 512, DISK_PAGES),
    ]
}

pub(crate) type Bytes = Vec<Vec<u8>>;

/// A machine that is bytes and, page by page, whether they changed.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) bytes: Bytes,
    pub(crate) dirty: Vec<Vec<bool>>,
    /// Captures taken: the identity of the next one.
    pub(crate) captures: u64,
    pub(crate) fail_next: bool,
    pub(crate) fenced: Option<String>,
    /// Hand a full capture over as the whole space.
    pub(crate) sparse: bool,
    /// The bytes at the last capture.
    pub(crate) at_capture: Bytes,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let bytes: Bytes = spaces()
            .iter()
            .map(|space| vec![0; space.bytes() as usize])
            .collect();
        let dirty = spaces()
            .iter()
            .map(|space| vec![false; space.pages as usize])
            .collect();
        Self {
            at_capture: bytes.clone(),
            bytes,
            dirty,
            captures: 0,
            fail_next: false,
            fenced: None,
            sparse: false,
        }
    }

    /// Writes to a page; 0 makes it zero, another number something that depends on it.
    pub(crate) fn write(&mut self, space: usize, page: u64, value: u8) {
        let size = spaces()[space].page_bytes as usize;
        let at = page as usize * size;
        for (i, byte) in self.bytes[space][at..at + size].iter_mut().enumerate() {
            *byte = if value == 0 { 0 } else { value ^ (i / 64) as u8 };
        }
        self.dirty[space][page as usize] = true;
    }

    pub(crate) fn capture_now(&mut self, full: bool) -> Captured {
        self.captures += 1;
        self.at_capture = self.bytes.clone();
        let captured = spaces().into_iter().enumerate().map(|(s, space)| {
            let pages: Vec<PageIndex> = (0..space.pages)
                .filter(|page| full || self.dirty[s][*page as usize])
                .map(PageIndex)
                .collect();
            let size = space.page_bytes as usize;
            let bytes = &self.bytes[s];
            let data = if s > 0 {
                PageBytes::deferred(WholeSpace {
                    bytes: bytes.clone(),
                    page_bytes: size,
                })
            } else if full && self.sparse {
                PageBytes::sparse(bytes.clone())
            } else {
                PageBytes::new(
                    pages
                        .iter()
                        .flat_map(|p| &bytes[p.0 as usize * size..][..size])
                        .copied()
                        .collect::<Vec<u8>>(),
                )
            };
            CapturedPages { space, pages, data }
        });
        let captured = Captured {
            checkpoint: id(self.captures),
            created_unix_ns: self.captures,
            full,
            records: vec![Record {
                tag: "cpu".into(),
                version: 1,
                critical: true,
                payload: vec![self.captures as u8],
            }],
            spaces: captured.collect(),
            stopped: Duration::from_micros(1),
        };
        self.dirty.iter_mut().for_each(|space| space.fill(false));
        captured
    }
}

/// A space whose pages are read late, as a disk's are.
struct WholeSpace {
    bytes: Vec<u8>,
    page_bytes: usize,
}

impl PageReader for WholeSpace {
    fn read(&self, pages: &[PageIndex], to: &mut [u8]) -> std::io::Result<()> {
        for (page, to) in pages.iter().zip(to.chunks_exact_mut(self.page_bytes)) {
            to.copy_from_slice(&self.bytes[page.0 as usize * self.page_bytes..][..self.page_bytes]);
        }
        Ok(())
    }
}

impl Source for Machine {
    fn capture(&mut self, kind: CaptureKind) -> Result<Captured, SourceError> {
        if std::mem::take(&mut self.fail_next) {
            return Err(SourceError::new("the dirty log could not be read"));
        }
        Ok(self.capture_now(kind == CaptureKind::Full))
    }

    fn put_back(&mut self, captured: &Captured) {
        for (s, space) in captured.spaces.iter().enumerate() {
            space
                .pages
                .iter()
                .for_each(|page| self.dirty[s][page.0 as usize] = true);
        }
    }

    fn fence(&mut self, reason: &str) {
        self.fenced = Some(reason.to_owned());
    }
}

pub(crate) fn manifest(
    name: &SegmentName,
    captured: &Captured,
    parent: Option<(&SegmentName, CheckpointId)>,
) -> Manifest {
    let kind = parent.map_or(Kind::Full, |(parent, checkpoint)| Kind::Delta {
        parent: parent.clone(),
        parent_checkpoint: checkpoint,
    });
    Manifest {
        name: name.clone(),
        checkpoint: captured.checkpoint,
        links: u32::from(!kind.is_full()),
        kind,
        created_unix_ns: captured.created_unix_ns,
        producer: "test".into(),
        spaces: spaces(),
        first_epoch: None,
        label: None,
        encryption: None,
    }
}

pub(crate) fn pool() -> EncodePool {
    EncodePool::new(EncodeOptions { level: 1, threads: 2 })
}

/// A chain `<vm>/1/1` (full) to `<vm>/1/<n>`, each link with a few pages of its own; the segments' bytes.
pub(crate) fn chain(vm: &str, links: u64) -> Vec<(SegmentName, Vec<u8>)> {
    let mut machine = Machine::new();
    let mut parent: Option<(SegmentName, CheckpointId)> = None;
    (1..=links)
        .map(|n| {
            machine.write(0, n % MEMORY_PAGES, n as u8);
            machine.write(0, 7, (n % 250) as u8 + 1);
            machine.write(1, n % DISK_PAGES, n as u8);
            if n > 2 {
                // Zero again, which only the delta says.
                machine.write(0, (n - 2) % MEMORY_PAGES, 0);
            }
            let captured = machine.capture_now(n == 1);
            let name = name(&format!("{vm}/1/{n}"));
            let of = manifest(&name, &captured, parent.as_ref().map(|(name, id)| (name, *id)));
            let (out, _) = pool()
                .encode(&captured, &of, std::io::Cursor::new(Vec::new()))
                .unwrap();
            parent = Some((name.clone(), captured.checkpoint));
            (name, out.into_inner())
        })
        .collect()
}

/// Another checkpoint under the name of `bytes`' one.
pub(crate) fn other_checkpoint(name: &SegmentName) -> Vec<u8> {
    let mut machine = Machine::new();
    machine.captures = 1_000_000;
    machine.write(0, 5, 5);
    let captured = machine.capture_now(true);
    let (out, _) = pool()
        .encode(
            &captured,
            &manifest(name, &captured, None),
            std::io::Cursor::new(Vec::new()),
        )
        .unwrap();
    out.into_inner()
}

/// Puts a segment's bytes as a holder does.
pub(crate) fn put(store: &Arc<FsStore>, name: &SegmentName, bytes: &[u8]) -> Result<Stored, StoreError> {
    use std::io::Write;
    let mut incoming = store.begin(name, bytes.len() as u64)?;
    for piece in bytes.chunks(1000) {
        if let Err(source) = incoming.write_all(piece) {
            return Err(incoming.take_failure().unwrap_or(StoreError::Io {
                what: "write",
                path: "?".into(),
                source,
            }));
        }
    }
    incoming.commit()
}

/// Encodes into a store.
pub(crate) fn encode_to(
    store: &Arc<FsStore>,
    name: &SegmentName,
    captured: &Captured,
) -> Result<(Stored, Summary), EncodeError> {
    encode_to_parent(store, name, captured, None)
}

/// The same of a change of a parent.
pub(crate) fn encode_to_parent(
    store: &Arc<FsStore>,
    name: &SegmentName,
    captured: &Captured,
    parent: Option<(&SegmentName, CheckpointId)>,
) -> Result<(Stored, Summary), EncodeError> {
    pool().encode_to_store(captured, &manifest(name, captured, parent), store)
}

/// A new machine's spaces.
#[derive(Debug)]
pub(crate) struct Fresh {
    spaces: Mutex<BTreeMap<SpaceId, FreshSpace>>,
}

#[derive(Debug)]
struct FreshSpace {
    page_bytes: usize,
    bytes: Vec<u8>,
    /// How often each page was written.
    writes: Vec<u32>,
}

impl Fresh {
    pub(crate) fn new() -> Self {
        let fresh = |space: Space| {
            let page_bytes = space.page_bytes as usize;
            let (bytes, writes) = (vec![0; space.bytes() as usize], vec![0; space.pages as usize]);
            (
                space.id,
                FreshSpace {
                    page_bytes,
                    bytes,
                    writes,
                },
            )
        };
        Self {
            spaces: Mutex::new(spaces().into_iter().map(fresh).collect()),
        }
    }

    pub(crate) fn into_bytes(self) -> Bytes {
        let spaces = self.spaces.into_inner().unwrap();
        for space in spaces.values() {
            assert!(
                space.writes.iter().all(|count| *count <= 1),
                "a page was written twice"
            );
        }
        spaces.into_values().map(|space| space.bytes).collect()
    }
}

impl Target for Fresh {
    fn write(&self, space: SpaceId, first: PageIndex, data: &[u8]) -> Result<(), TargetError> {
        let mut spaces = self.spaces.lock().unwrap();
        let space = spaces
            .get_mut(&space)
            .ok_or_else(|| TargetError::new("no such space"))?;
        let (first, pages) = (first.0 as usize, data.len() / space.page_bytes);
        assert_eq!(data.len() % space.page_bytes, 0, "a part of a page");
        let at = first * space.page_bytes;
        let to = space.bytes.get_mut(at..at + data.len());
        to.ok_or_else(|| TargetError::new("beyond the space"))?
            .copy_from_slice(data);
        space.writes[first..first + pages]
            .iter_mut()
            .for_each(|count| *count += 1);
        Ok(())
    }

    fn read(&self, space: SpaceId, first: PageIndex, data: &mut [u8]) -> Result<(), TargetError> {
        let mut spaces = self.spaces.lock().unwrap();
        let space = spaces
            .get_mut(&space)
            .ok_or_else(|| TargetError::new("no such space"))?;
        let (first, pages) = (first.0 as usize, data.len() / space.page_bytes);
        let at = first * space.page_bytes;
        let from = space.bytes.get(at..at + data.len());
        data.copy_from_slice(from.ok_or_else(|| TargetError::new("beyond the space"))?);
        // What was read may be written again.
        space.writes[first..first + pages].fill(0);
        Ok(())
    }
}

/// What a store loads as `tip`.
pub(crate) fn load(store: &FsStore, tip: &SegmentName) -> Bytes {
    let fresh = Fresh::new();
    LoadPlan::new(store, tip).unwrap().load_into(&fresh, 2).unwrap();
    fresh.into_bytes()
}

/// The content of one segment's bytes, for comparing: its identity.
pub(crate) fn checkpoint_of(bytes: &[u8]) -> CheckpointId {
    SegmentReader::open(bytes).unwrap().manifest().checkpoint
}
