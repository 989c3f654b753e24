//! Encryption: what is in the frames and records of a segment, for those who have the key.
//!
//! ```text
//! segment key = blake3 derive_key(SEGMENT_KEY, key || salt)       AES-256-GCM over each frame, and over the records
//! index key   = blake3 derive_key(INDEX_KEY,   key || salt)       keyed blake3 over all that is not in a frame
//! ```
//!
//! A salt is for one encoding of one segment, so a segment key too, and what is encrypted under it is told apart by its
//! nonce: kind, space and first page, which no two frames of a segment share. What is authenticated beside it: the whole
//! manifest, and of the index entry all but where the frame is and its digest. The index's tag then says that these frames
//! are all of them, and in their places.
//!
//! What it never does: it makes no randomness (the caller gives the salt), and it shows no key.

use std::fmt;
use std::sync::Arc;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroizing;

use crate::error::Place;
use crate::limits::{ENTRY_BYTES, INDEX_TAG_BYTES, KEY_BYTES, KEY_ID_BYTES, SALT_BYTES, TAG_BYTES};
use crate::{Digest, FormatError, FrameEntry, Manifest, SegmentName, digest};

const KEY_ID: &str = "understudy key id v1";
const SEGMENT_KEY: &str = "understudy segment v1 key";
const INDEX_KEY: &str = "understudy segment v1 index key";

const KIND_FRAME: u8 = 1;
const KIND_RECORDS: u8 = 2;

/// What a key is called: the first bytes of a digest of it, which say nothing of the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; KEY_ID_BYTES]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

/// A key. Its bytes are overwritten when it goes, and no text shows them.
#[derive(Clone)]
pub struct Key {
    id: KeyId,
    bytes: Zeroizing<[u8; KEY_BYTES]>,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.id)
    }
}

impl Key {
    /// A key of these bytes, which have to be random.
    #[must_use]
    pub fn new(bytes: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let mut id = [0; KEY_ID_BYTES];
        id.copy_from_slice(&blake3::derive_key(KEY_ID, &*bytes)[..KEY_ID_BYTES]);
        Self { id: KeyId(id), bytes }
    }

    /// What it is called.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// Its bytes, for the file it is kept in.
    #[must_use]
    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.bytes
    }

    /// Says in `manifest` that its segment is encrypted with this key, and makes what encrypts it.
    ///
    /// `salt` is random, and for this one encoding: with one salt twice, two segments would give each other away.
    ///
    /// # Errors
    /// When the manifest breaks a rule.
    pub fn encrypt(
        &self,
        manifest: &mut Manifest,
        salt: [u8; SALT_BYTES],
    ) -> Result<Arc<Cipher>, FormatError> {
        let encryption = Encryption { key: self.id, salt };
        manifest.encryption = Some(encryption);
        let bytes = manifest.encode()?;
        Cipher::new(self, encryption, manifest.name.clone(), &bytes).map(Arc::new)
    }

    fn derive(&self, context: &str, salt: &[u8; SALT_BYTES]) -> Zeroizing<[u8; KEY_BYTES]> {
        let mut material = Zeroizing::new([0; KEY_BYTES + SALT_BYTES]);
        material[..KEY_BYTES].copy_from_slice(&*self.bytes);
        material[KEY_BYTES..].copy_from_slice(salt);
        Zeroizing::new(blake3::derive_key(context, &*material))
    }
}

/// The keys somebody has: the first is for what is written, all are for what is read. None is a keyring too.
#[derive(Debug, Clone, Default)]
pub struct Keyring(Arc<[Key]>);

impl Keyring {
    /// These keys; the first is the one to write with.
    #[must_use]
    pub fn new(keys: Vec<Key>) -> Self {
        Self(keys.into())
    }

    /// The key to write with.
    #[must_use]
    pub fn first(&self) -> Option<&Key> {
        self.0.first()
    }

    /// The key that is called so.
    #[must_use]
    pub fn get(&self, id: KeyId) -> Option<&Key> {
        self.0.iter().find(|key| key.id == id)
    }

    /// All of them.
    #[must_use]
    pub fn keys(&self) -> &[Key] {
        &self.0
    }
}

/// How a segment is encrypted, in its manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encryption {
    /// The key.
    pub key: KeyId,
    /// What makes the key of this one encoding of the segment.
    pub salt: [u8; SALT_BYTES],
}

/// Encrypts or decrypts one segment.
pub struct Cipher {
    segment_key: LessSafeKey,
    index_key: Zeroizing<[u8; KEY_BYTES]>,
    /// The digest of the manifest's bytes.
    manifest: Digest,
    encryption: Encryption,
    name: SegmentName,
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cipher({} with {})", self.name, self.encryption.key)
    }
}

impl Cipher {
    /// For the segment whose manifest's bytes are `manifest`.
    pub(crate) fn new(
        key: &Key,
        encryption: Encryption,
        name: SegmentName,
        manifest: &[u8],
    ) -> Result<Self, FormatError> {
        let derived = key.derive(SEGMENT_KEY, &encryption.salt);
        // A key of 32 bytes is what AES-256 takes, so this does not fail.
        let unbound = UnboundKey::new(&AES_256_GCM, &*derived)
            .map_err(|_| FormatError::invalid("segment key", "it is not one of AES-256"))?;
        Ok(Self {
            segment_key: LessSafeKey::new(unbound),
            index_key: key.derive(INDEX_KEY, &encryption.salt),
            manifest: digest::of_manifest(manifest),
            encryption,
            name,
        })
    }

    /// What it encrypts for.
    pub(crate) fn encryption(&self) -> Encryption {
        self.encryption
    }

    /// Whether it is for the segment whose manifest's bytes these are.
    pub(crate) fn is_of(&self, manifest: &[u8]) -> bool {
        self.manifest == digest::of_manifest(manifest)
    }

    /// Encrypts a frame; `entry` has all but its offset and digest, and its stored length is that of the result.
    pub(crate) fn seal_frame(&self, entry: &FrameEntry, bytes: &mut Vec<u8>) -> Result<(), FormatError> {
        self.seal(frame_nonce(entry), &self.frame_aad(entry), bytes)
    }

    /// Decrypts frame `i` where it is; what is before the tag is the frame.
    pub(crate) fn open_frame(
        &self,
        i: usize,
        entry: &FrameEntry,
        bytes: &mut [u8],
    ) -> Result<(), FormatError> {
        let what = || format!("frame {i}").into();
        self.open(what, frame_nonce(entry), &self.frame_aad(entry), bytes)
    }

    /// Encrypts the records, which are `raw_bytes` long once decompressed.
    pub(crate) fn seal_records(&self, raw_bytes: u32, bytes: &mut Vec<u8>) -> Result<(), FormatError> {
        let aad = self.records_aad(raw_bytes);
        self.seal(nonce(KIND_RECORDS, 0, 0), &aad, bytes)
    }

    /// Decrypts the records where they are; what is before the tag is theirs.
    pub(crate) fn open_records(&self, raw_bytes: u32, bytes: &mut [u8]) -> Result<(), FormatError> {
        let aad = self.records_aad(raw_bytes);
        self.open(|| "records".into(), nonce(KIND_RECORDS, 0, 0), &aad, bytes)
    }

    /// The tag behind the index, of the digest of header, manifest, records and entries.
    pub(crate) fn index_tag(&self, all: Digest) -> [u8; INDEX_TAG_BYTES] {
        *blake3::keyed_hash(&self.index_key, &all.0).as_bytes()
    }

    /// Checks that tag.
    pub(crate) fn check_index(&self, all: Digest, tag: [u8; INDEX_TAG_BYTES]) -> Result<(), FormatError> {
        // Both as what blake3 compares in constant time.
        let expected = blake3::keyed_hash(&self.index_key, &all.0);
        match expected == blake3::Hash::from_bytes(tag) {
            true => Ok(()),
            false => Err(self.forged("header, manifest, records or index".into())),
        }
    }

    fn seal(&self, nonce: Nonce, aad: &[u8], bytes: &mut Vec<u8>) -> Result<(), FormatError> {
        self.segment_key
            .seal_in_place_append_tag(nonce, Aad::from(aad), bytes)
            .map_err(|_| FormatError::invalid("encryption", "it is too long for AES-GCM"))
    }

    fn open(
        &self,
        what: impl FnOnce() -> Place,
        nonce: Nonce,
        aad: &[u8],
        bytes: &mut [u8],
    ) -> Result<(), FormatError> {
        match self.segment_key.open_in_place(nonce, Aad::from(aad), bytes) {
            Ok(_) => Ok(()),
            Err(_) => Err(self.forged(what())),
        }
    }

    fn forged(&self, what: Place) -> FormatError {
        FormatError::Forged {
            what,
            segment: self.name.clone(),
            key: self.encryption.key,
        }
    }

    fn frame_aad(&self, entry: &FrameEntry) -> Vec<u8> {
        let entry = entry.encode();
        // Not the offset, which nobody knows yet, nor the digest, which is of the result: the index's tag has both.
        [&self.manifest.0, &entry[..24], &entry[32..48]].concat()
    }

    fn records_aad(&self, raw_bytes: u32) -> Vec<u8> {
        [&self.manifest.0[..], &raw_bytes.to_le_bytes()].concat()
    }
}

fn frame_nonce(entry: &FrameEntry) -> Nonce {
    nonce(KIND_FRAME, entry.space.0, entry.first_page.0)
}

fn nonce(kind: u8, space: u16, first_page: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[0] = kind;
    bytes[2..4].copy_from_slice(&space.to_le_bytes());
    bytes[4..].copy_from_slice(&first_page.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

const _: () = assert!(TAG_BYTES == 16 && ENTRY_BYTES == 80 && NONCE_LEN == 12);
