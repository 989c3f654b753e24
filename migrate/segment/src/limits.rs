//! Every limit of the format. A reader checks a length against these before it takes memory for it, and a writer
//! refuses to write what a reader would refuse.

/// The length of the header.
pub const HEADER_BYTES: usize = 128;
/// The length of one entry of the index.
pub const ENTRY_BYTES: usize = 80;
/// The most a manifest may take.
pub const MAX_MANIFEST_BYTES: u32 = 64 << 10;
/// The most the records may take once decompressed.
pub const MAX_RECORDS_RAW_BYTES: u32 = 64 << 20;
/// The most the records may take as stored: zstd can make what does not compress a little longer.
pub const MAX_RECORDS_STORED_BYTES: u32 = 65 << 20;
/// The most records of one segment.
pub const MAX_RECORDS: usize = 4096;
/// The longest tag of a record.
pub const MAX_TAG_BYTES: usize = 64;
/// The length of a key.
pub const KEY_BYTES: usize = 32;
/// The length of what a key is called.
pub const KEY_ID_BYTES: usize = 8;
/// The length of what makes the key of one encoding of a segment.
pub const SALT_BYTES: usize = 32;
/// How much longer a frame, and the records, are where they are encrypted.
pub const TAG_BYTES: usize = 16;
/// The tag behind the index of a segment that is encrypted.
pub const INDEX_TAG_BYTES: usize = 32;
/// The longest text of a manifest: a space's name, the producer, the label.
pub const MAX_TEXT_BYTES: usize = 256;
/// The most address spaces: memory and 63 disks.
pub const MAX_SPACES: usize = 64;
/// The largest address space.
pub const MAX_SPACE_BYTES: u64 = 1 << 52;
/// The smallest page: a disk sector.
pub const MIN_PAGE_BYTES: u32 = 512;
/// The largest page.
pub const MAX_PAGE_BYTES: u32 = 1 << 20;
/// The most frames: 1 TiB of dirty 4 KiB pages, with an index of 320 MiB.
pub const MAX_FRAMES: u32 = 1 << 22;
/// The longest body.
pub const MAX_BODY_BYTES: u64 = 1 << 44;
/// The most page data of one frame.
pub const MAX_FRAME_DATA_BYTES: u32 = 1 << 20;
/// The most pages of one frame, zero pages included; so also the most runs.
pub const MAX_FRAME_PAGES: u32 = 4096;
/// The longest page table of a frame: a count, then a kind and three varints of at most 10 bytes for each run.
pub const MAX_TABLE_BYTES: u32 = 4 + MAX_FRAME_PAGES * 31;
/// The check of one page that is stored as a change.
pub const CHECK_BYTES: usize = 8;
/// The most one frame takes once decompressed.
pub const MAX_FRAME_RAW_BYTES: u32 =
    MAX_FRAME_DATA_BYTES + MAX_TABLE_BYTES + MAX_FRAME_PAGES * CHECK_BYTES as u32;
/// Other frames that the pages of one frame may be the same as: so many more are read for it at most.
pub const MAX_SAME_FRAMES: usize = 8;
/// How deep CBOR may nest.
pub const MAX_CBOR_DEPTH: usize = 8;

/// How many 4 KiB pages a writer puts into one frame: 256 KiB, where zstd and blake3 are near their best and one
/// page can still be fetched without reading much around it.
pub const FRAME_PAGES: usize = 64;

/// How many pages of `page_bytes` a writer puts into one frame: as many as make 256 KiB, and at least one.
#[must_use]
pub fn pages_per_frame(page_bytes: u32) -> usize {
    let frame_bytes = FRAME_PAGES * 4096;
    (frame_bytes / page_bytes.clamp(MIN_PAGE_BYTES, MAX_PAGE_BYTES) as usize).max(1)
}
