//! Digests: blake3 in key-derivation mode, a context for each use, so that no digest can stand in for another.

use std::sync::LazyLock;

use crate::Digest;

const ROOT: &str = "understudy segment v1 root";
const HEADER: &str = "understudy segment v1 header";
const FRAME: &str = "understudy segment v1 frame";
const PAGE: &str = "understudy segment v1 page";
const MANIFEST: &str = "understudy segment v1 manifest";
const RECORDS: &str = "understudy segment v1 records in memory";

/// The hasher of the root digest.
pub(crate) fn root() -> blake3::Hasher {
    blake3::Hasher::new_derive_key(ROOT)
}

/// A hasher for the stored records alone. Its digest is never written: a reader keeps it from opening to decoding,
/// so that a source that changes in between is noticed.
pub(crate) fn records() -> blake3::Hasher {
    blake3::Hasher::new_derive_key(RECORDS)
}

/// The digest of a manifest's bytes: what frames and records are encrypted as part of.
pub(crate) fn of_manifest(bytes: &[u8]) -> Digest {
    finish(blake3::Hasher::new_derive_key(MANIFEST).update(bytes))
}

/// The digest of a header's bytes before it.
pub(crate) fn of_header(bytes: &[u8]) -> Digest {
    finish(blake3::Hasher::new_derive_key(HEADER).update(bytes))
}

/// The digest of a frame as stored.
pub(crate) fn of_frame(stored: &[u8]) -> Digest {
    finish(blake3::Hasher::new_derive_key(FRAME).update(stored))
}

/// The hasher of a page's check; making one costs as much as hashing a short page.
pub(crate) fn page(content: &[u8]) -> Digest {
    static HASHER: LazyLock<blake3::Hasher> = LazyLock::new(|| blake3::Hasher::new_derive_key(PAGE));
    finish(HASHER.clone().update(content))
}

/// What a hasher came to.
pub(crate) fn finish(hasher: &blake3::Hasher) -> Digest {
    Digest(*hasher.finalize().as_bytes())
}
