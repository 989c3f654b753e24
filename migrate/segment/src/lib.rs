//! The segment format: one checkpoint of a whole virtual machine as one immutable file.
//!
//! ```text
//! | header 128 | manifest (CBOR) | records (zstd of CBOR) | body: frames back to back | index: 80 bytes a frame |
//!      |                                                                                    |
//!      '-- root digest over header, manifest, records and index ----- a digest per frame ---'
//! ```
//!
//! [`FrameEncoder`] makes frames of pages, [`SegmentWriter`] makes a file of frames, [`SegmentReader`] verifies and
//! reads one, [`merge`] makes one segment of a chain. A [`Key`] encrypts what is in frames and records. The bytes are laid
//! down in `docs/segment-format.md`.
//!
//! Invariants: everything read is hostile. A length is checked against a limit of [`limits`] before memory is
//! taken for it, a digest before what it covers is decoded, and nothing read makes this crate panic.
//!
//! What it never does: it has no clock, no thread, no socket, no randomness and no `unsafe`; it does not sync or
//! rename files, and it does not know where segments are kept.
#![forbid(unsafe_code)]

mod cbor;
mod crypt;
mod digest;
mod encode;
mod error;
mod features;
mod frame;
mod header;
mod index;
pub mod limits;
mod manifest;
mod merge;
mod name;
mod reader;
mod records;
mod same;
mod source;
mod writer;

pub use crypt::{Cipher, Encryption, Key, KeyId, Keyring};
pub use encode::{EncodedFrame, Form, FrameEncoder, PageIn, is_zero, xor_into};
pub use error::{FormatError, MergeError, Place, WriteError};
pub use features::Features;
pub use frame::{Frame, FrameBuf, Page, PageCheck, RunData};
pub use header::{Header, read_prefix};
pub use index::{Codec, FrameEntry, PageIndex};
pub use limits::{FRAME_PAGES, HEADER_BYTES, pages_per_frame};
pub use manifest::{Kind, Manifest, Space, SpaceId};
pub use merge::{merge, merge_encrypted};
pub use name::{CheckpointId, Digest, Epoch, Generation, MAX_VM_ID_BYTES, NameError, SegmentName, VmId};
pub use reader::{PageContent, SegmentReader, Summary};
pub use records::Record;
pub use same::{SamePages, sample};
pub use source::ReadAt;
pub use writer::SegmentWriter;
