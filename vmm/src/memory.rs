//! Guest RAM: one memfd, mapped once, shown to KVM and to the loaders as one or two regions.
//!
//! ```text
//! guest physical   0 ........ 3 GiB | 3 GiB .. 4 GiB | 4 GiB ............
//!                  low RAM          | devices, APICs | high RAM
//! space 0 (memfd)  0 ........ 3 GiB                  | 3 GiB ............
//! ```
//!
//! A page of address space 0 is a page of the memfd: the hole below 4 GiB is not in it, so a page's index says
//! nothing about the layout and the layout can be rebuilt from the size alone.
//!
//! Copies in, copies out: nothing outside this file gets a reference into guest RAM, because the guest may write
//! it at any time. What the monitor writes on the guest's behalf goes through [`GuestMemory`], whose bitmap marks
//! the pages; KVM's log does not see those writes.

use std::fs::File;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use crate::dirty::OwnWrites;
use crate::layout::{HIGH_RAM_START, LOW_RAM_END};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, fcntl_get_seals, ftruncate,
    memfd_create, seek,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

mod discard;

pub use discard::Holes;

/// Bytes in a page of address space 0.
pub const PAGE_BYTES: usize = 4096;
/// The least memory a guest can be given: the boot structures and a small kernel need about this much.
pub const MIN_MEMORY_BYTES: u64 = 4 << 20;
/// The most memory a guest can be given.
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;

/// The view of guest RAM that loaders and devices use: guest physical addresses, checked, every write marked.
pub type GuestMemory = GuestMemoryMmap<OwnWrites>;

/// What went wrong with guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that cannot be.
    #[error("{bytes} bytes of guest memory: it must be a multiple of 1 MiB, from 4 MiB to 1 TiB")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The system refused.
    #[error("{call} for {bytes} bytes of guest memory: free memory on this host, or give the guest less")]
    Allocate {
        /// The system call.
        call: &'static str,
        /// The guest's size.
        bytes: u64,
        /// The system's error.
        #[source]
        source: rustix::io::Errno,
    },
    /// vm-memory refused a region; the text says why.
    #[error("map guest memory: {0}")]
    Map(String),
    /// What is to become the guest's memory cannot.
    #[error("the image cannot become the guest's memory: {why}")]
    Image {
        /// What is wrong with it.
        why: String,
    },
    /// Pages outside the guest's memory.
    #[error("pages {first}..{end} are outside the guest's memory of {pages} pages")]
    OutOfRange {
        /// The first page.
        first: u64,
        /// One past the last.
        end: u64,
        /// The guest's size.
        pages: u64,
    },
}

/// A contiguous run of guest physical memory: one KVM slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// KVM's number for it.
    pub id: u32,
    /// Its first guest physical address.
    pub guest_address: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// The page of address space 0 it begins at.
    pub first_page: u64,
}

impl Slot {
    /// Its length in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE_BYTES as u64
    }
}

/// The slots of a guest of `bytes`: one up to 3 GiB, two above.
#[must_use]
pub fn slots(bytes: u64) -> Vec<Slot> {
    let low = bytes.min(LOW_RAM_END);
    let mut slots = vec![Slot {
        id: 0,
        guest_address: 0,
        bytes: low,
        first_page: 0,
    }];
    if bytes > low {
        slots.push(Slot {
            id: 1,
            guest_address: HIGH_RAM_START,
            bytes: bytes - low,
            first_page: low / PAGE_BYTES as u64,
        });
    }
    slots
}

/// A mapping of a whole memfd, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is memory that belongs to the process, not to a thread; every access through it is a copy by
// raw pointer (see `GuestRam::read_page` and `GuestRam::write_pages`), never a reference.
unsafe impl Send for Mapping {}
// SAFETY: as above: shared access is copies, and races with the guest are what guest memory is.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and bytes are what mmap returned and was given; `GuestRam` drops the regions that point
        // into it first (field order), and nothing else keeps a pointer.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) } {
            tracing::error!(%error, "unmap guest memory");
        }
    }
}

/// A guest's RAM.
#[derive(Debug)]
pub struct GuestRam {
    // Dropped in this order: the regions point into the mapping.
    memory: GuestMemory,
    mapping: Mapping,
    file: File,
    slots: Vec<Slot>,
    /// Pages that were made holes, perhaps filled again since.
    discarded: discard::Discarded,
}

impl GuestRam {
    /// Fresh RAM of `bytes`, all zero.
    ///
    /// # Errors
    /// [`MemoryError::Size`] for a size out of bounds, [`MemoryError::Allocate`] when the system refuses.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        check_size(bytes)?;
        let refused = |call| move |source| MemoryError::Allocate { call, bytes, source };
        let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(refused("memfd_create"))?;
        ftruncate(&fd, bytes).map_err(refused("ftruncate"))?;
        // A file that cannot shrink cannot turn our copies into SIGBUS, whoever else gets to hold the fd.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(refused("fcntl(F_ADD_SEALS)"))?;
        Self::over(File::from(fd), bytes, MapFlags::SHARED)
    }

    /// RAM of `bytes` whose content is in `image` already: a memfd of that length that cannot change it. It is the
    /// guest's from here on, and nobody else may write it.
    ///
    /// Until [`Self::settle`] what is written goes to pages that are thrown away then: some of a vCPU's state makes KVM
    /// write to the guest's memory when it is restored, and the checkpoint was taken after the guest had seen that.
    ///
    /// # Errors
    /// [`MemoryError::Size`], [`MemoryError::Image`] when it is something else, [`MemoryError::Allocate`].
    pub fn adopt(image: File, bytes: u64) -> Result<Self, MemoryError> {
        check_size(bytes)?;
        let unfit = |why: String| MemoryError::Image { why };
        let metadata = image.metadata().map_err(|e| unfit(e.to_string()))?;
        if !metadata.is_file() || metadata.len() != bytes {
            return Err(unfit(format!(
                "it has {} bytes, and the guest's memory {bytes}",
                metadata.len()
            )));
        }
        let seals = fcntl_get_seals(&image).map_err(|e| unfit(format!("it is no memfd: {e}")))?;
        // A file that could shrink would turn our copies into SIGBUS.
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(unfit("its size is not sealed".into()));
        }
        if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            return Err(unfit("it is sealed against writing".into()));
        }
        Self::over(image, bytes, MapFlags::PRIVATE)
    }

    /// The image's content is the guest's memory from here on: what was written to it before is gone.
    ///
    /// # Errors
    /// [`MemoryError::Allocate`].
    pub fn settle(&self) -> Result<(), MemoryError> {
        let bytes = self.bytes();
        // SAFETY: it takes the place of our own mapping, which has this very range, and KVM is told by the kernel that its
        // pages went; nothing has a reference into it.
        let mapped = unsafe {
            mmap(
                self.mapping.base.as_ptr().cast(),
                self.mapping.bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED,
                self.file.as_fd(),
                0,
            )
        };
        mapped.map(drop).map_err(|source| MemoryError::Allocate {
            call: "mmap",
            bytes,
            source,
        })
    }

    /// A mapping of all of `file`, which has `bytes` bytes and keeps them.
    fn over(file: File, bytes: u64, how: MapFlags) -> Result<Self, MemoryError> {
        let length = usize::try_from(bytes).map_err(|_| MemoryError::Size { bytes })?;
        let refused = |call| move |source| MemoryError::Allocate { call, bytes, source };
        // SAFETY: a new mapping at an address of the kernel's choice, backed by a file of exactly this length.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                how | MapFlags::NORESERVE,
                file.as_fd(),
                0,
            )
        }
        .map_err(refused("mmap"))?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(MemoryError::Map("at address 0".into()))?;
        let mapping = Mapping { base, bytes: length };
        let slots = slots(bytes);
        let regions = slots
            .iter()
            .map(|slot| region(&mapping, &file, slot))
            .collect::<Result<Vec<_>, _>>()?;
        let memory = GuestMemory::from_regions(regions).map_err(|e| MemoryError::Map(e.to_string()))?;
        Ok(Self {
            memory,
            mapping,
            file,
            slots,
            discarded: discard::Discarded::new(bytes / PAGE_BYTES as u64),
        })
    }

    /// The view by guest physical address, for loaders and devices.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The slots KVM is to be given.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.mapping.bytes as u64
    }

    /// Pages of RAM.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_BYTES as u64
    }

    /// Where a slot begins in this process, for `KVM_SET_USER_MEMORY_REGION`.
    #[must_use]
    pub fn host_address(&self, slot: &Slot) -> u64 {
        self.mapping.base.as_ptr() as u64 + slot.first_page * PAGE_BYTES as u64
    }

    /// Copies pages `first..` out into `to`, whose length is a multiple of [`PAGE_BYTES`].
    ///
    /// # Panics
    /// If the pages are outside the RAM: page numbers to read come from our own bookkeeping.
    pub fn read_pages(&self, first: u64, to: &mut [u8]) {
        let offset = self
            .check(first, to.len())
            .expect("own page numbers are inside guest RAM");
        // SAFETY: `check` has shown offset + len to be inside the mapping; source and target do not overlap, for
        // no reference into the mapping exists. The guest may be writing: then the bytes are some mixture, and the
        // page is dirty in the log and will be copied again.
        let from = unsafe { self.mapping.base.as_ptr().add(offset) };
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    }

    /// Copies `from` into pages `first..`. Does not mark them as written: this is for restoring.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when the pages are outside the RAM: they may come from a segment.
    pub fn write_pages(&self, first: u64, from: &[u8]) -> Result<(), MemoryError> {
        let offset = self.check(first, from.len())?;
        // SAFETY: as for `read_pages`.
        let to = unsafe { self.mapping.base.as_ptr().add(offset) };
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    /// The runs of pages that have ever been written (half-open, ascending): the rest is a hole in the memfd, zero.
    ///
    /// This is right only because a restore fills the memfd before the guest runs: a guest that is loaded lazily
    /// has holes that are not zero (KVM-STATE.md, trap 15).
    ///
    /// # Errors
    /// The system's error from `lseek`.
    pub fn populated(&self) -> Result<Vec<std::ops::Range<u64>>, rustix::io::Errno> {
        let page = PAGE_BYTES as u64;
        let mut runs = Vec::new();
        let mut at = 0;
        loop {
            let start = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => return Ok(runs),
                Err(error) => return Err(error),
            };
            let end = seek(&self.file, SeekFrom::Hole(start))?;
            runs.push(start / page..end.div_ceil(page));
            at = end;
        }
    }

    /// Makes every page a hole again: all zero, as new. The guest must not run.
    ///
    /// # Errors
    /// The system's error from `fallocate`.
    pub fn clear(&self) -> Result<(), rustix::io::Errno> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, punch, 0, self.bytes())
    }

    /// The offset of `bytes` from page `first` on, if they are inside.
    fn check(&self, first: u64, bytes: usize) -> Result<usize, MemoryError> {
        let end = first.saturating_add((bytes as u64).div_ceil(PAGE_BYTES as u64));
        if end > self.pages() {
            return Err(MemoryError::OutOfRange {
                first,
                end,
                pages: self.pages(),
            });
        }
        // Inside the mapping, whose length is a usize.
        Ok(first as usize * PAGE_BYTES)
    }
}

fn check_size(bytes: u64) -> Result<(), MemoryError> {
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) || !bytes.is_multiple_of(1 << 20) {
        return Err(MemoryError::Size { bytes });
    }
    Ok(())
}

/// A private copy of guest RAM, page for page: memory is taken as pages are copied in, the rest reads as zero.
#[derive(Debug)]
pub struct Shadow(Mapping);

impl Shadow {
    /// Room for all of `ram`, nothing in it.
    ///
    /// # Errors
    /// [`MemoryError::Allocate`].
    pub fn new(ram: &GuestRam) -> Result<Self, MemoryError> {
        let length = ram.mapping.bytes;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|source| MemoryError::Allocate {
            call: "mmap",
            bytes: length as u64,
            source,
        })?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(MemoryError::Map("at address 0".into()))?;
        Ok(Self(Mapping { base, bytes: length }))
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is private to this object, readable, writable, zeroed and of this length; `&mut self`
        // makes the reference unique.
        unsafe { std::slice::from_raw_parts_mut(self.0.base.as_ptr(), self.0.bytes) }
    }

    /// Copies pages of `ram`, which may be running: a page that changes while it is copied is in the dirty log.
    ///
    /// # Panics
    /// If the pages are outside the RAM.
    pub fn copy(&mut self, ram: &GuestRam, pages: std::ops::Range<u64>) {
        let (start, end) = (pages.start as usize * PAGE_BYTES, pages.end as usize * PAGE_BYTES);
        ram.read_pages(pages.start, &mut self.bytes_mut()[start..end]);
    }

    /// Puts one page in.
    ///
    /// # Panics
    /// If the page is outside the RAM.
    pub fn write(&mut self, page: u64, bytes: &[u8]) {
        let start = page as usize * PAGE_BYTES;
        self.bytes_mut()[start..start + PAGE_BYTES].copy_from_slice(bytes);
    }
}

impl AsRef<[u8]> for Shadow {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: as for `bytes_mut`; `&self` excludes writers.
        unsafe { std::slice::from_raw_parts(self.0.base.as_ptr(), self.0.bytes) }
    }
}

fn region(mapping: &Mapping, file: &File, slot: &Slot) -> Result<GuestRegionMmap<OwnWrites>, MemoryError> {
    let refused = |e: &dyn std::fmt::Display| MemoryError::Map(e.to_string());
    let offset = slot.first_page * PAGE_BYTES as u64;
    let bytes = usize::try_from(slot.bytes).map_err(|e| refused(&e))?;
    let handle = file.try_clone().map_err(|e| refused(&e))?;
    // SAFETY: the slot lies inside the mapping by construction of `slots`.
    let start = unsafe { mapping.base.as_ptr().add(offset as usize) };
    let builder = MmapRegionBuilder::new_with_bitmap(bytes, OwnWrites::new(bytes))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(handle, offset));
    // SAFETY: the range is mapped, readable and writable, and outlives the region (`GuestRam`'s field order).
    let builder = unsafe { builder.with_raw_mmap_pointer(start) };
    let region = builder.build().map_err(|e| refused(&e))?;
    GuestRegionMmap::new(region, GuestAddress(slot.guest_address))
        .ok_or_else(|| MemoryError::Map("a slot ends beyond the address space".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn the_hole_is_not_in_the_space() {
        let two = slots(5 << 30);
        assert_eq!(two.len(), 2);
        assert_eq!(two[1].guest_address, HIGH_RAM_START);
        assert_eq!(two[1].first_page, LOW_RAM_END / 4096);
        assert_eq!(two[0].bytes + two[1].bytes, 5 << 30);
        assert_eq!(slots(3 << 30).len(), 1);
    }

    #[test]
    fn an_image_is_adopted_as_it_is_and_only_when_it_can_be() {
        use std::os::unix::fs::FileExt;
        let sealed = |bytes: u64, seals| {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let image = File::from(memfd_create("image", flags).unwrap());
            image.set_len(bytes).unwrap();
            fcntl_add_seals(&image, seals).unwrap();
            image
        };
        let (size, both) = (8 << 20, SealFlags::SHRINK | SealFlags::GROW);
        let image = sealed(size, both);
        image
            .write_all_at(&[7; PAGE_BYTES], 5 * PAGE_BYTES as u64)
            .unwrap();
        let ram = GuestRam::adopt(image.try_clone().unwrap(), size).unwrap();
        // As KVM does while vCPUs are restored.
        ram.write_pages(5, &[9; PAGE_BYTES]).unwrap();
        ram.write_pages(6, &[9; PAGE_BYTES]).unwrap();
        ram.settle().unwrap();
        let page = |page| {
            let mut bytes = [0; PAGE_BYTES];
            ram.read_pages(page, &mut bytes);
            bytes
        };
        assert_eq!((page(5), page(6)), ([7; PAGE_BYTES], [0; PAGE_BYTES]));
        ram.memory()
            .write_obj(3u8, GuestAddress(6 * PAGE_BYTES as u64))
            .unwrap();
        assert_eq!(page(6)[0], 3);
        // A hole that was looked at counts as written, and is zero.
        assert_eq!(ram.populated().unwrap(), vec![5..7]);
        let mut there = [0; 1];
        image.read_exact_at(&mut there, 6 * PAGE_BYTES as u64).unwrap();
        assert_eq!(there, [3], "the guest runs on the image");

        let refused = |image, size| GuestRam::adopt(image, size).unwrap_err().to_string();
        assert!(refused(sealed(size, both), 2 * size).contains("8388608 bytes"));
        assert!(refused(sealed(size, SealFlags::GROW), size).contains("not sealed"));
        assert!(refused(sealed(size, both | SealFlags::WRITE), size).contains("against writing"));
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        assert!(refused(file, size).contains("cannot become"));
        assert!(refused(sealed(1 << 20, both), 1 << 20).contains("4 MiB"));
    }

    #[test]
    fn both_views_are_one_memory() {
        let ram = GuestRam::new(4 << 30).unwrap();
        ram.memory()
            .write_slice(b"above the hole", GuestAddress(HIGH_RAM_START + 8192))
            .unwrap();
        let mut page = [0; PAGE_BYTES];
        ram.read_pages(LOW_RAM_END / 4096 + 2, &mut page);
        assert_eq!(&page[..14], b"above the hole");
        assert_eq!(
            ram.populated().unwrap(),
            vec![LOW_RAM_END / 4096 + 2..LOW_RAM_END / 4096 + 3]
        );
        ram.write_pages(7, &[9; 2 * PAGE_BYTES]).unwrap();
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(8 * 4096)).unwrap(), 9);
    }

    #[test]
    fn sizes_and_ranges_are_refused() {
        for bytes in [0, 1 << 20, (4 << 20) + 4096, u64::MAX] {
            assert!(
                matches!(GuestRam::new(bytes), Err(MemoryError::Size { .. })),
                "{bytes}"
            );
        }
        let ram = GuestRam::new(4 << 20).unwrap();
        assert!(ram.write_pages(1023, &[0; PAGE_BYTES]).is_ok());
        assert!(ram.write_pages(1024, &[0; PAGE_BYTES]).is_err());
        assert!(ram.write_pages(1023, &[0; 2 * PAGE_BYTES]).is_err());
        assert!(ram.write_pages(u64::MAX, &[0; PAGE_BYTES]).is_err());
    }
}
