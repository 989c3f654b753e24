//! The machine as `migrate` sees it: a [`Source`] of checkpoints and a [`Target`] of loaded pages.
//!
//! A delta stops the guest for the state and a copy of the changed pages. A *full* checkpoint stops it no longer:
//!
//! ```text
//! guest runs   copy all populated pages to a shadow
//!              copy what changed meanwhile, again and again, while that shrinks
//! guest stops  save the state, copy the last changes      <- the same short stop as a delta
//! guest runs   encode from the shadow
//! ```

use std::sync::{Arc, Mutex, PoisonError, Weak};

use migrate::checkpoint::{CaptureKind, Captured, CapturedPages, PageBytes, PageReader, Source, SourceError};
use migrate::load::{Target, TargetError};
use segment::{CheckpointId, PageIndex, Space, SpaceId};

use crate::control::{Buffers, ControlError, VmHandle};
use crate::devices::virtio::disk::{Disk, DiskCapture};
use crate::memory::{GuestRam, PAGE_BYTES, Shadow};
use crate::{random, state};

/// The name of address space 0.
pub const MEMORY_SPACE: &str = "memory";
/// A round of copying that leaves fewer pages than this ends the rounds: one more costs as much as it saves.
const SMALL_ROUND: usize = 256;
/// A guest that writes faster than it can be copied ends the rounds too.
const MAX_ROUNDS: usize = 8;
const ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Address space 0 of a guest with this RAM.
#[must_use]
pub fn memory_space(ram: &GuestRam) -> Space {
    Space {
        id: SpaceId::MEMORY,
        name: MEMORY_SPACE.into(),
        page_bytes: PAGE_BYTES as u32,
        pages: ram.pages(),
    }
}

/// The address space of the disk that is the `index`th of a machine's, from 0.
#[must_use]
pub fn disk_space(index: usize, disk: &Disk) -> Space {
    Space {
        // A machine has at most MAX_VIRTIO_SLOTS disks.
        id: SpaceId(1 + index as u16),
        name: disk.name().into(),
        page_bytes: disk.block_bytes(),
        pages: disk.blocks(),
    }
}

/// Checkpoints of a machine.
#[derive(Debug)]
pub struct VmSource {
    vm: VmHandle,
    /// The guest's restarts that the newest full capture knows of.
    restarts: u64,
    /// Buffers come back when a stored capture is dropped, on whatever thread that is; held for a swap.
    spare: Arc<Mutex<Buffers>>,
    /// The disks' part of the last capture, as long as that is there.
    disks: Vec<Weak<DiskCapture>>,
}

/// A disk's captured blocks, read when they are encoded.
struct DiskPages(Arc<DiskCapture>);

impl PageReader for DiskPages {
    fn read(&self, pages: &[PageIndex], to: &mut [u8]) -> std::io::Result<()> {
        let blocks: Vec<u64> = pages.iter().map(|page| page.0).collect();
        self.0.read(&blocks, to)
    }
}

impl VmSource {
    /// Checkpoints of `vm`.
    #[must_use]
    pub fn new(vm: VmHandle) -> Self {
        Self {
            restarts: vm.restarts(),
            vm,
            spare: Arc::default(),
            disks: Vec::new(),
        }
    }

    fn buffers(&self) -> Buffers {
        std::mem::take(&mut *self.spare.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The captured address spaces: memory, and the disks, whose blocks are looked for now that the guest runs.
    fn spaces(&mut self, memory: CapturedPages, disks: Vec<DiskCapture>) -> Vec<CapturedPages> {
        let disks: Vec<Arc<DiskCapture>> = disks.into_iter().map(Arc::new).collect();
        self.disks = disks.iter().map(Arc::downgrade).collect();
        let disks = disks
            .into_iter()
            .enumerate()
            .map(|(index, capture)| CapturedPages {
                space: disk_space(index, capture.disk()),
                pages: capture.blocks().into_iter().map(PageIndex).collect(),
                data: PageBytes::deferred(DiskPages(capture)),
            });
        std::iter::once(memory).chain(disks).collect()
    }

    fn delta(&mut self) -> Result<Captured, ControlError> {
        // Before the dirty set is taken: nothing after that may fail.
        let checkpoint = new_checkpoint_id()?;
        let stopped = self.vm.stop_and_copy(self.buffers(), false)?;
        let (pages, places) = with_zeros(&stopped.pages, &stopped.zeros);
        let data = Lent {
            buffers: Buffers {
                pages: stopped.pages,
                bytes: stopped.bytes,
            },
            home: Arc::clone(&self.spare),
        };
        let memory = CapturedPages {
            space: memory_space(self.vm.ram()),
            pages,
            data: match places {
                Some(places) => PageBytes::placed(data, places),
                None => PageBytes::new(data),
            },
        };
        Ok(Captured {
            checkpoint,
            created_unix_ns: stopped.unix_ns,
            full: false,
            records: state::to_records(&stopped.state),
            spaces: self.spaces(memory, stopped.disks),
            stopped: stopped.stopped,
        })
    }

    fn full(&mut self) -> Result<Captured, ControlError> {
        let checkpoint = new_checkpoint_id()?;
        let vm = self.vm.clone();
        let ram = Arc::clone(vm.ram());
        vm.start_logging()?;
        // What is dirty now is covered by the copy of everything; taken first, so that the rounds see only what
        // changes from here on.
        let mut taken = Taken {
            vm: &vm,
            pages: 0..ram.pages(),
            armed: true,
        };
        vm.take_dirty()?;
        let mut shadow = Shadow::new(&ram).map_err(|e| ControlError::Memory(e.to_string()))?;
        let populated = ram
            .populated()
            .map_err(|e| ControlError::Memory(format!("find the guest's pages: {e}")))?;
        for run in &populated {
            shadow.copy(&ram, run.clone());
        }
        let mut pages = PageSet::new(ram.pages());
        populated
            .into_iter()
            .flatten()
            .for_each(|page| pages.insert(page));
        let mut last = usize::MAX;
        for _ in 0..MAX_ROUNDS {
            let dirty = vm.take_dirty()?;
            let mut holes = ram.holes();
            for &page in &dirty {
                match holes.has(page) {
                    true => shadow.write(page, &ZERO_PAGE),
                    false => shadow.copy(&ram, page..page + 1),
                }
                pages.insert(page);
            }
            if dirty.len() < SMALL_ROUND || dirty.len() >= last {
                break;
            }
            last = dirty.len();
        }
        let stopped = vm.stop_and_copy(self.buffers(), true)?;
        for (&page, bytes) in stopped.pages.iter().zip(stopped.bytes.chunks_exact(PAGE_BYTES)) {
            shadow.write(page, bytes);
            pages.insert(page);
        }
        for &page in &stopped.zeros {
            shadow.write(page, &ZERO_PAGE);
            pages.insert(page);
        }
        // From here on the capture carries the set, and `put_back` returns it.
        taken.armed = false;
        *self.spare.lock().unwrap_or_else(PoisonError::into_inner) = Buffers {
            pages: stopped.pages,
            bytes: stopped.bytes,
        };
        let memory = CapturedPages {
            space: memory_space(&ram),
            pages: pages.into_ascending(),
            data: PageBytes::sparse(shadow),
        };
        Ok(Captured {
            checkpoint,
            created_unix_ns: stopped.unix_ns,
            full: true,
            records: state::to_records(&stopped.state),
            spaces: self.spaces(memory, stopped.disks),
            stopped: stopped.stopped,
        })
    }
}

/// Pages with bytes and pages that are zero, as one ascending list; and where the bytes of each are among those that
/// are there, when there is a zero one.
fn with_zeros(pages: &[u64], zeros: &[u64]) -> (Vec<PageIndex>, Option<Vec<Option<u32>>>) {
    if zeros.is_empty() {
        return (pages.iter().copied().map(PageIndex).collect(), None);
    }
    // A guest has at most 2^28 pages.
    let there = pages.iter().zip(0u32..).map(|(&page, at)| (page, Some(at)));
    let mut all: Vec<_> = there.chain(zeros.iter().map(|&page| (page, None))).collect();
    all.sort_unstable_by_key(|(page, _)| *page);
    let (pages, places) = all.into_iter().map(|(page, at)| (PageIndex(page), at)).unzip();
    (pages, Some(places))
}

/// Rule 4 for a full capture that fails on the way: every page counts as changed again.
struct Taken<'a> {
    vm: &'a VmHandle,
    pages: std::ops::Range<u64>,
    armed: bool,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.vm.put_back(vec![self.pages.clone()]);
        }
    }
}

/// A set of pages.
struct PageSet(Vec<u64>);

impl PageSet {
    fn new(pages: u64) -> Self {
        Self(vec![0; pages.div_ceil(64) as usize])
    }

    fn insert(&mut self, page: u64) {
        self.0[(page / 64) as usize] |= 1 << (page % 64);
    }

    fn into_ascending(self) -> Vec<PageIndex> {
        let count: u32 = self.0.iter().map(|word| word.count_ones()).sum();
        let mut pages = Vec::with_capacity(count as usize);
        for (index, mut bits) in self.0.into_iter().enumerate() {
            while bits != 0 {
                pages.push(PageIndex(index as u64 * 64 + u64::from(bits.trailing_zeros())));
                bits &= bits - 1;
            }
        }
        pages
    }
}

/// A delta's buffers, on loan to a capture.
struct Lent {
    buffers: Buffers,
    home: Arc<Mutex<Buffers>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffers.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.home.lock().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut self.buffers);
    }
}

/// 16 bytes from the kernel's random source.
fn new_checkpoint_id() -> Result<CheckpointId, ControlError> {
    let id = random::bytes().map_err(|e| ControlError::Memory(format!("draw a checkpoint id: {e}")))?;
    Ok(CheckpointId(id))
}

impl Source for VmSource {
    fn capture(&mut self, kind: CaptureKind) -> Result<Captured, SourceError> {
        // After a restart nearly every page has changed: a delta would copy them while the guest stands still, and a
        // full capture does it while it runs. A restart from here on is in the dirty set, whatever is captured.
        let restarts = self.vm.restarts();
        let captured = match kind {
            CaptureKind::Delta if restarts == self.restarts => self.delta(),
            CaptureKind::Full | CaptureKind::Delta => self.full(),
        }
        .map_err(SourceError::new)?;
        self.restarts = restarts;
        Ok(captured)
    }

    fn put_back(&mut self, captured: &Captured) {
        let memory = captured
            .spaces
            .iter()
            .filter(|space| space.space.id == SpaceId::MEMORY);
        let pages = memory.flat_map(|space| &space.pages);
        self.vm.put_back(pages.map(|page| page.0..page.0 + 1).collect());
        self.disks
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|disk| disk.put_back());
    }

    fn fence(&mut self, reason: &str) {
        if let Err(error) = self.vm.fence(reason) {
            tracing::error!(%error, reason, "fence the guest");
        }
    }
}

/// The memory and the disks of a machine that is being restored.
#[derive(Debug)]
pub struct MachineTarget<'a> {
    /// Address space 0.
    pub ram: &'a GuestRam,
    /// Those from 1 on.
    pub disks: &'a [Arc<Disk>],
}

impl MachineTarget<'_> {
    /// The disk of an address space; `None` is memory.
    fn disk(&self, space: SpaceId) -> Result<Option<&Disk>, TargetError> {
        let Some(index) = usize::from(space.0).checked_sub(1) else {
            return Ok(None);
        };
        let disk = self.disks.get(index).map(|disk| Some(&**disk));
        disk.ok_or_else(|| TargetError::new(format!("this VM has no address space {}", space.0)))
    }
}

impl Target for MachineTarget<'_> {
    fn write(&self, space: SpaceId, first: PageIndex, data: &[u8]) -> Result<(), TargetError> {
        match self.disk(space)? {
            None => self.ram.write_pages(first.0, data).map_err(TargetError::new),
            Some(disk) => disk.load(first.0, data).map_err(TargetError::new),
        }
    }

    fn read(&self, space: SpaceId, first: PageIndex, data: &mut [u8]) -> Result<(), TargetError> {
        // Its own page numbers: it has written them before, which was refused when they were outside.
        match self.disk(space)? {
            None => {
                self.ram.read_pages(first.0, data);
                Ok(())
            }
            Some(disk) => disk.loaded(first.0, data).map_err(TargetError::new),
        }
    }
}
