//! The manifest: what the segment is a checkpoint of. A CBOR map with numbered keys, so that a later minor version
//! can add keys and an earlier reader skips them.

use std::collections::BTreeSet;
use std::fmt;

use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};

use crate::error::{at_most, plain_text};
use crate::{CheckpointId, Encryption, Epoch, FormatError, KeyId, SegmentName, cbor, limits};

/// The number of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u16);

impl SpaceId {
    /// Guest memory. Each disk has one of the numbers above.
    pub const MEMORY: Self = Self(0);
}

impl fmt::Display for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An address space: `pages` pages of `page_bytes` bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    /// Its number.
    pub id: SpaceId,
    /// Its name: "memory", or a disk's.
    pub name: String,
    /// The size of its pages: a power of two from 512 to 1 MiB.
    pub page_bytes: u32,
    /// How many there are.
    pub pages: u64,
}

impl Space {
    /// Its size in bytes; the largest number when the fields are absurd.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages.saturating_mul(self.page_bytes.into())
    }

    /// Checks the space alone: its name, page size and size.
    pub(crate) fn validate(&self) -> Result<(), FormatError> {
        plain_text("space name", &self.name)?;
        if !self.page_bytes.is_power_of_two()
            || !(limits::MIN_PAGE_BYTES..=limits::MAX_PAGE_BYTES).contains(&self.page_bytes)
        {
            let why = format!(
                "pages of {} bytes: a power of two from 512 to 1 MiB is needed",
                self.page_bytes
            );
            return Err(FormatError::invalid(format!("space {}", self.id), why));
        }
        at_most(
            || format!("space {}", self.id),
            self.bytes(),
            limits::MAX_SPACE_BYTES,
        )
    }
}

/// Whether a segment stands alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Every page that is not zero is in it.
    Full,
    /// It holds what changed since its parent.
    Delta {
        /// The checkpoint it is a change of.
        parent: SegmentName,
        /// That checkpoint's identity.
        parent_checkpoint: CheckpointId,
    },
}

impl Kind {
    /// Whether it is [`Kind::Full`].
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full)
    }
}

/// What a segment is a checkpoint of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The name of the checkpoint.
    pub name: SegmentName,
    /// Its identity, in whatever encoding.
    pub checkpoint: CheckpointId,
    /// Full, or a delta and of what.
    pub kind: Kind,
    /// How many deltas there are down to the full segment, this one included: 0 when full. Counted when the
    /// checkpoint was taken: deltas merged since may have made the chain shorter.
    pub links: u32,
    /// When the guest was stopped for it: nanoseconds since 1970. For people; nothing is decided by it.
    pub created_unix_ns: u64,
    /// The program that took it, like "vmm 0.1.0".
    pub producer: String,
    /// The address spaces, in ascending order of their number.
    pub spaces: Vec<Space>,
    /// When several deltas were merged into this one: the first epoch it covers.
    pub first_epoch: Option<Epoch>,
    /// What a person called it.
    pub label: Option<String>,
    /// How its frames and records are encrypted, if they are.
    pub encryption: Option<Encryption>,
}

impl Manifest {
    /// The space with the number `id`.
    #[must_use]
    pub fn space(&self, id: SpaceId) -> Option<&Space> {
        let at = self.spaces.binary_search_by_key(&id, |space| space.id).ok()?;
        self.spaces.get(at)
    }

    /// Checks the rules that the fields' types cannot hold.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] or [`FormatError::TooLarge`], naming the field.
    pub fn validate(&self) -> Result<(), FormatError> {
        plain_text("producer", &self.producer)?;
        if let Some(label) = &self.label {
            plain_text("label", label)?;
        }
        at_most(
            || "number of spaces",
            self.spaces.len() as u64,
            limits::MAX_SPACES as u64,
        )?;
        self.spaces.iter().try_for_each(Space::validate)?;
        if !self.spaces.is_sorted_by(|a, b| a.id < b.id) {
            return Err(FormatError::invalid(
                "spaces",
                "their numbers have to ascend, each used once",
            ));
        }
        let names: BTreeSet<&str> = self.spaces.iter().map(|space| space.name.as_str()).collect();
        if names.len() != self.spaces.len() {
            return Err(FormatError::invalid("spaces", "two have the same name"));
        }
        match &self.kind {
            Kind::Full if self.links != 0 => Err(FormatError::invalid(
                "links",
                format!("{} in a full segment, not 0", self.links),
            )),
            Kind::Delta { .. } if self.links == 0 => Err(FormatError::invalid("links", "0 in a delta")),
            Kind::Delta { parent, .. } if parent.vm != self.name.vm => Err(FormatError::invalid(
                "parent",
                format!("{parent} is not of the same VM as {}", self.name),
            )),
            Kind::Delta { parent, .. } if parent.position() >= self.name.position() => Err(
                FormatError::invalid("parent", format!("{parent} is not earlier than {}", self.name)),
            ),
            Kind::Full | Kind::Delta { .. } => Ok(()),
        }
    }

    /// The CBOR of a valid manifest.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.validate()?;
        let name = self.name.to_string();
        let parent = match &self.kind {
            Kind::Full => None,
            Kind::Delta {
                parent,
                parent_checkpoint,
            } => Some((parent.to_string(), parent_checkpoint)),
        };
        let wire = Wire {
            name: &name,
            checkpoint: self.checkpoint.0.into(),
            parent: parent.as_ref().map(|(name, _)| name.as_str()),
            parent_checkpoint: parent.as_ref().map(|(_, id)| id.0.into()),
            links: self.links,
            created_unix_ns: self.created_unix_ns,
            producer: &self.producer,
            spaces: self.spaces.iter().map(SpaceWire::from).collect(),
            first_epoch: self.first_epoch.map(|epoch| epoch.0),
            label: self.label.as_deref(),
            key: self.encryption.map(|encryption| encryption.key.0.into()),
            salt: self.encryption.map(|encryption| encryption.salt.into()),
        };
        let bytes = minicbor::to_vec(&wire).map_err(|e| FormatError::invalid("manifest", e.to_string()))?;
        at_most(
            || "manifest",
            bytes.len() as u64,
            limits::MAX_MANIFEST_BYTES.into(),
        )?;
        Ok(bytes)
    }

    /// Reads and validates a manifest.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        cbor::check("manifest", bytes)?;
        let wire: Wire<'_> = minicbor::decode(bytes).map_err(|source| FormatError::Cbor {
            what: "manifest".into(),
            source: Box::new(source),
        })?;
        let kind = match (wire.parent, wire.parent_checkpoint) {
            (None, None) => Kind::Full,
            (Some(parent), Some(id)) => Kind::Delta {
                parent: name("parent", parent)?,
                parent_checkpoint: CheckpointId(id.into()),
            },
            (Some(_), None) => return Err(FormatError::invalid("parent", "its checkpoint id is missing")),
            (None, Some(_)) => return Err(FormatError::invalid("parent", "its name is missing")),
        };
        let encryption = match (wire.key, wire.salt) {
            (None, None) => None,
            (Some(key), Some(salt)) => Some(Encryption {
                key: KeyId(key.into()),
                salt: salt.into(),
            }),
            (Some(_), None) => return Err(FormatError::invalid("key", "its salt is missing")),
            (None, Some(_)) => return Err(FormatError::invalid("salt", "its key is missing")),
        };
        let manifest = Self {
            name: name("name", wire.name)?,
            checkpoint: CheckpointId(wire.checkpoint.into()),
            kind,
            links: wire.links,
            created_unix_ns: wire.created_unix_ns,
            producer: wire.producer.to_owned(),
            spaces: wire.spaces.iter().map(Space::from).collect(),
            first_epoch: wire.first_epoch.map(Epoch),
            label: wire.label.map(str::to_owned),
            encryption,
        };
        manifest.validate()?;
        Ok(manifest)
    }
}

fn name(what: &'static str, text: &str) -> Result<SegmentName, FormatError> {
    text.parse()
        .map_err(|why: crate::NameError| FormatError::invalid(what, why.to_string()))
}

/// The manifest as it is written. A key is never used again for something else.
#[derive(Encode, Decode)]
#[cbor(map)]
struct Wire<'a> {
    #[b(0)]
    name: &'a str,
    #[n(1)]
    checkpoint: ByteArray<16>,
    #[b(2)]
    parent: Option<&'a str>,
    #[n(3)]
    parent_checkpoint: Option<ByteArray<16>>,
    #[n(4)]
    links: u32,
    #[n(5)]
    created_unix_ns: u64,
    #[b(6)]
    producer: &'a str,
    #[b(7)]
    spaces: Vec<SpaceWire<'a>>,
    #[n(8)]
    first_epoch: Option<u64>,
    #[b(9)]
    label: Option<&'a str>,
    #[n(10)]
    key: Option<ByteArray<{ limits::KEY_ID_BYTES }>>,
    #[n(11)]
    salt: Option<ByteArray<{ limits::SALT_BYTES }>>,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SpaceWire<'a> {
    #[n(0)]
    id: u16,
    #[b(1)]
    name: &'a str,
    #[n(2)]
    page_bytes: u32,
    #[n(3)]
    pages: u64,
}

impl<'a> From<&'a Space> for SpaceWire<'a> {
    fn from(space: &'a Space) -> Self {
        Self {
            id: space.id.0,
            name: &space.name,
            page_bytes: space.page_bytes,
            pages: space.pages,
        }
    }
}

impl From<&SpaceWire<'_>> for Space {
    fn from(wire: &SpaceWire<'_>) -> Self {
        Self {
            id: SpaceId(wire.id),
            name: wire.name.to_owned(),
            page_bytes: wire.page_bytes,
            pages: wire.pages,
        }
    }
}
