//! Pages to encode, store and ship, without a guest around them.

use anyhow::{Context as _, Result};
use migrate::checkpoint::{Captured, CapturedPages, EncodeOptions, EncodePool, PageBytes};
use segment::{
    CheckpointId, Epoch, FRAME_PAGES, Generation, Kind, Manifest, PageIndex, SegmentName, Space, SpaceId,
    is_zero,
};
use std::io::Cursor;
use std::sync::Arc;
use vmm::memory::PAGE_BYTES;

/// Bytes of page data that go into one frame of a segment.
pub(crate) const FRAME_BYTES: usize = FRAME_PAGES * PAGE_BYTES;

/// Bytes of pages that several captures share.
#[derive(Debug, Clone)]
pub(crate) struct Bytes(pub(crate) Arc<Vec<u8>>);

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The captured pages of address space 0 that are not zero, back to back.
pub(crate) fn content(captured: &Captured) -> Bytes {
    let mut all = Vec::new();
    for space in captured
        .spaces
        .iter()
        .filter(|space| space.space.id == SpaceId::MEMORY)
    {
        let bytes = space.data.as_ref();
        for (at, page) in space.pages.iter().enumerate() {
            let at = if space.data.is_sparse() {
                page.0 as usize
            } else {
                at
            };
            let page = &bytes[at * PAGE_BYTES..][..PAGE_BYTES];
            if !is_zero(page) {
                all.extend_from_slice(page);
            }
        }
    }
    Bytes(Arc::new(all))
}

/// A full checkpoint of a guest whose memory is just these bytes, under this name, and its manifest.
pub(crate) fn full(name: &SegmentName, bytes: &Bytes) -> (Captured, Manifest) {
    let pages = (bytes.0.len() / PAGE_BYTES) as u64;
    let space = Space {
        id: SpaceId::MEMORY,
        name: "memory".into(),
        page_bytes: PAGE_BYTES as u32,
        pages,
    };
    let mut identity = [0; 16];
    identity[..8].copy_from_slice(&name.epoch.0.to_le_bytes());
    let checkpoint = CheckpointId(identity);
    let captured = Captured {
        checkpoint,
        created_unix_ns: 0,
        full: true,
        records: Vec::new(),
        spaces: vec![CapturedPages {
            space: space.clone(),
            pages: (0..pages).map(PageIndex).collect(),
            data: PageBytes::new(bytes.clone()),
        }],
        stopped: std::time::Duration::ZERO,
    };
    let manifest = Manifest {
        name: name.clone(),
        checkpoint,
        kind: Kind::Full,
        links: 0,
        created_unix_ns: 0,
        producer: "bench".into(),
        spaces: vec![space],
        first_epoch: None,
        label: None,
        encryption: None,
    };
    (captured, manifest)
}

/// A name for a segment.
pub(crate) fn name(vm: &str, epoch: u64) -> Result<SegmentName> {
    let vm = vm.parse().with_context(|| format!("name a VM {vm}"))?;
    Ok(SegmentName::new(vm, Generation(1), Epoch(epoch)))
}

/// The bytes of a whole segment with these pages.
pub(crate) fn segment(name: &SegmentName, bytes: &Bytes) -> Result<Vec<u8>> {
    let (captured, manifest) = full(name, bytes);
    let pool = EncodePool::new(EncodeOptions { level: 1, threads: 1 });
    let (out, _) = pool
        .encode(&captured, &manifest, Cursor::new(Vec::new()))
        .context("encode a segment")?;
    Ok(out.into_inner())
}
