//! What a restore point is made of: the record that is written last.
//!
//! ```text
//! "UNDRPNT1" | BLAKE3 of the rest (32) | CBOR: { 0: [ link, .. ] }    the full segment first
//! ```

use minicbor::{Decode, Encode};
use segment::{CheckpointId, Digest, SegmentName};

use crate::store::{Entry, MAX_CHAIN_LINKS, MAX_SEGMENT_BYTES, Point};
use crate::wire::{Held, SegmentBrief};

const MAGIC: &[u8; 8] = b"UNDRPNT1";
const HASH_BYTES: usize = 32;
/// The longest record: the longest chain, and each link in 256 bytes.
pub(super) const MAX_RECORD_BYTES: u64 = (MAX_CHAIN_LINKS as u64) * 256;
/// The longest label.
const MAX_LABEL_BYTES: usize = 1024;

/// One link, and where its file is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LinkRecord {
    /// Its name.
    #[cbor(n(0), with = "crate::wire::value")]
    pub name: SegmentName,
    /// Which state it is.
    #[cbor(n(1), with = "crate::wire::value")]
    pub checkpoint: CheckpointId,
    /// The root digest of the file.
    #[cbor(n(2), with = "crate::wire::value")]
    pub digest: Digest,
    /// Its length.
    #[n(3)]
    pub bytes: u64,
    /// When the guest was stopped for it, in nanoseconds of Unix time.
    #[n(4)]
    pub created_unix_ns: u64,
    /// The user's label.
    #[n(5)]
    pub label: Option<String>,
    /// Which upload stored it: a part of its key.
    #[cbor(n(6), with = "crate::wire::value")]
    pub upload: [u8; 16],
}

impl LinkRecord {
    /// Of a stored segment.
    #[must_use]
    pub fn of(entry: &Entry, upload: [u8; 16]) -> Self {
        Self {
            name: entry.name.clone(),
            checkpoint: entry.checkpoint,
            digest: entry.digest,
            bytes: entry.bytes,
            created_unix_ns: entry.created_unix_ns,
            label: entry.label.clone(),
            upload,
        }
    }

    /// Its name and identity.
    #[must_use]
    pub fn held(&self) -> Held {
        Held {
            name: self.name.clone(),
            checkpoint: self.checkpoint,
        }
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Body {
    #[n(0)]
    links: Vec<LinkRecord>,
}

/// A restore point: a whole chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainRecord {
    links: Vec<LinkRecord>,
}

impl ChainRecord {
    /// Of `links`, the full segment first.
    ///
    /// # Errors
    /// In words, when they cannot be a chain.
    pub fn new(links: Vec<LinkRecord>) -> Result<Self, String> {
        let Some(first) = links.first() else {
            return Err("it has no link".into());
        };
        if links.len() > MAX_CHAIN_LINKS {
            return Err(format!("it has {} links: at most {MAX_CHAIN_LINKS}", links.len()));
        }
        if let Some(link) = links.iter().find(|link| link.name.vm != first.name.vm) {
            return Err(format!("{} is of another VM", link.name));
        }
        if links
            .iter()
            .zip(&links[1..])
            .any(|(a, b)| a.name.position() >= b.name.position())
        {
            return Err("its links are not in order".into());
        }
        if let Some(link) = links
            .iter()
            .find(|link| link.bytes == 0 || link.bytes > MAX_SEGMENT_BYTES)
        {
            return Err(format!("{} would have {} bytes", link.name, link.bytes));
        }
        // For a terminal.
        let unfit = |label: &String| label.len() > MAX_LABEL_BYTES || label.contains(char::is_control);
        if links.iter().any(|link| link.label.as_ref().is_some_and(unfit)) {
            return Err("a label in it is too long, or not plain text".into());
        }
        Ok(Self { links })
    }

    /// The links, the full segment first; never none.
    #[must_use]
    pub fn links(&self) -> &[LinkRecord] {
        &self.links
    }

    /// The newest link: the state that it restores.
    #[must_use]
    pub fn tip(&self) -> &LinkRecord {
        // There is one: checked when it was made.
        &self.links[self.links.len() - 1]
    }

    /// The chain of one of its links, when it has it.
    #[must_use]
    pub fn up_to(&self, held: &Held) -> Option<Self> {
        let at = self
            .links
            .iter()
            .position(|link| link.name == held.name && link.checkpoint == held.checkpoint)?;
        Some(Self {
            links: self.links[..=at].to_vec(),
        })
    }

    /// Bytes of all links.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.links
            .iter()
            .fold(0, |sum, link| sum.saturating_add(link.bytes))
    }

    /// In short, as a holder lists what it has; the bytes are those of the whole chain.
    #[must_use]
    pub fn brief(&self) -> SegmentBrief {
        let tip = self.tip();
        let parent = self.links.len().checked_sub(2).map(|i| self.links[i].held());
        SegmentBrief {
            name: tip.name.clone(),
            checkpoint: tip.checkpoint,
            digest: tip.digest,
            bytes: self.bytes(),
            parent,
            created_unix_ns: tip.created_unix_ns,
            links: u32::try_from(self.links.len()).unwrap_or(u32::MAX),
            complete: true,
            label: tip.label.clone(),
        }
    }

    /// As a policy sees it.
    #[must_use]
    pub fn point(&self) -> Point {
        let tip = self.tip();
        Point {
            name: tip.name.clone(),
            created_unix_ns: tip.created_unix_ns,
            label: tip.label.clone(),
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; MAGIC.len() + HASH_BYTES];
        let body = Body {
            links: self.links.clone(),
        };
        // Into a vector, which takes everything.
        let _ = minicbor::encode(&body, &mut bytes);
        let hash = blake3::hash(&bytes[MAGIC.len() + HASH_BYTES..]);
        bytes[..MAGIC.len()].copy_from_slice(MAGIC);
        bytes[MAGIC.len()..MAGIC.len() + HASH_BYTES].copy_from_slice(hash.as_bytes());
        bytes
    }

    /// Reads it; `name` is what it is called.
    ///
    /// # Errors
    /// In words, when it is none, or of another name.
    pub fn decode(bytes: &[u8], name: &SegmentName) -> Result<Self, String> {
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or("it is no restore point of this form")?;
        let (hash, body) = rest.split_at_checked(HASH_BYTES).ok_or("it is cut off")?;
        if blake3::hash(body).as_bytes() != hash {
            return Err("its digest is not that of its content".into());
        }
        let mut decoder = minicbor::Decoder::new(body);
        let Body { links } = decoder.decode().map_err(|e| e.to_string())?;
        if decoder.position() != body.len() {
            return Err("there is something after its end".into());
        }
        let chain = Self::new(links)?;
        match chain.tip().name == *name {
            true => Ok(chain),
            false => Err(format!("it is {}", chain.tip().name)),
        }
    }
}
