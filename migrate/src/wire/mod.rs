//! Frames: what nodes and owners say to each other, as bytes.
//!
//! ```text
//!  0      4     5      6         8          12         16
//!  | USF1 | type | flags | reserved | stream | length | payload: CBOR, or the raw bytes of a chunk |
//!    4      1      1       2          4        4        length bytes, all numbers little-endian
//! ```
//!
//! `stream` is the number of a transfer or of a call; 0 where there is none. Flags and the reserved bytes are 0 and a
//! frame where they are not is refused, so that they can get a meaning. The bytes and every message are laid down in
//! `docs/protocol.md`.
//!
//! Invariants: the length is checked against the limit of the frame's type before memory is taken for it; a message
//! is a CBOR map that fills its payload exactly; keys a reader does not know are skipped, so that a newer node may
//! add fields. Nothing read makes this module panic.
//!
//! What it never does: it has no socket and no clock, and does not know which frame may come when (see `protocol`).

mod call;
mod message;
mod takeover;
pub mod value;

pub use call::*;
pub use message::*;
pub use takeover::*;

/// The oldest protocol version this build speaks.
pub const MIN_VERSION: u16 = 1;
/// The newest protocol version this build speaks.
pub const MAX_VERSION: u16 = 2;
/// The first version with `Renew`, `Granted` and `Released`.
pub const LEASE_VERSION: u16 = 2;

/// The first bytes of every frame.
pub const MAGIC: [u8; 4] = *b"USF1";
/// The length of a frame's header.
pub const HEADER_BYTES: usize = 16;
/// The most a chunk of a segment carries.
pub const MAX_CHUNK_BYTES: u32 = 1 << 20;
/// The most of a message of the replication flow or the handshake.
pub const MAX_MESSAGE_BYTES: u32 = 4 << 10;
/// The most of a call to a registry or an agent.
pub const MAX_CALL_BYTES: u32 = 1 << 20;
/// The most of an answer to a call.
pub const MAX_REPLY_BYTES: u32 = 4 << 20;

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The first bytes are not a frame's.
    #[error("the peer does not speak this protocol (its frame begins with {found:02x?})")]
    Magic {
        /// What stands there.
        found: [u8; 4],
    },
    /// The type is none this build knows.
    #[error("a frame of unknown type {kind}: the peer is newer than the version it agreed to")]
    UnknownType {
        /// The type's number.
        kind: u8,
    },
    /// Flags or reserved bytes are set.
    #[error("a {what} frame with flags this version does not know")]
    Flags {
        /// The type's name.
        what: &'static str,
    },
    /// The payload is longer than its type may be.
    #[error("a {what} frame of {len} bytes: at most {max} are allowed")]
    TooLong {
        /// The type's name.
        what: &'static str,
        /// The length it claims.
        len: u64,
        /// The most that is allowed.
        max: u32,
    },
    /// The payload is not the message it should be.
    #[error("decode a {what} frame")]
    Decode {
        /// The type's name.
        what: &'static str,
        /// What is wrong with it.
        #[source]
        source: minicbor::decode::Error,
    },
    /// Bytes are left over after the message.
    #[error("a {what} frame with {left} bytes after its message")]
    Trailing {
        /// The type's name.
        what: &'static str,
        /// How many.
        left: usize,
    },
}

/// The checked header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What it carries.
    pub kind: FrameType,
    /// The number of the transfer or call; 0 where there is none.
    pub stream: u32,
    /// The length of the payload.
    pub len: u32,
}

impl FrameHeader {
    /// Checks the first bytes of a frame.
    ///
    /// # Errors
    /// When they are no frame's, or the frame is longer than its type may be.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let [
            m0,
            m1,
            m2,
            m3,
            kind,
            flags,
            r0,
            r1,
            s0,
            s1,
            s2,
            s3,
            l0,
            l1,
            l2,
            l3,
        ] = *bytes;
        let found = [m0, m1, m2, m3];
        if found != MAGIC {
            return Err(WireError::Magic { found });
        }
        let kind = FrameType::from_number(kind).ok_or(WireError::UnknownType { kind })?;
        if [flags, r0, r1] != [0; 3] {
            return Err(WireError::Flags { what: kind.name() });
        }
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        if len > kind.max_bytes() {
            return Err(WireError::TooLong {
                what: kind.name(),
                len: len.into(),
                max: kind.max_bytes(),
            });
        }
        Ok(Self {
            kind,
            stream: u32::from_le_bytes([s0, s1, s2, s3]),
            len,
        })
    }

    /// Its bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let ([m0, m1, m2, m3], kind) = (MAGIC, self.kind.number());
        let [s0, s1, s2, s3] = self.stream.to_le_bytes();
        let [l0, l1, l2, l3] = self.len.to_le_bytes();
        [m0, m1, m2, m3, kind, 0, 0, 0, s0, s1, s2, s3, l0, l1, l2, l3]
    }
}

/// Puts the bytes of a frame behind what is in `out`; `out` is as it was when it fails.
///
/// # Errors
/// [`WireError::TooLong`] when the message is longer than its type may be.
pub fn encode_frame(stream: u32, message: &Message, out: &mut Vec<u8>) -> Result<(), WireError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    message.encode_payload(out);
    let kind = message.kind();
    let payload = out.len() - start - HEADER_BYTES;
    match u32::try_from(payload) {
        Ok(len) if len <= kind.max_bytes() => {
            let header = FrameHeader { kind, stream, len }.to_bytes();
            out[start..start + HEADER_BYTES].copy_from_slice(&header);
            Ok(())
        }
        _ => {
            out.truncate(start);
            Err(WireError::TooLong {
                what: kind.name(),
                len: payload as u64,
                max: kind.max_bytes(),
            })
        }
    }
}

/// For serde: as its text.
pub(crate) fn text<T: std::fmt::Display, S: serde::Serializer>(v: &T, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(v)
}

/// For serde: from its text, or null.
pub(crate) fn maybe_from_text<'de, T, D>(d: D) -> Result<Option<T>, D::Error>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
    D: serde::Deserializer<'de>,
{
    let text: Option<String> = serde::Deserialize::deserialize(d)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom))
        .transpose()
}

/// For serde: as its text, or null.
pub(crate) fn text_or_null<T: std::fmt::Display, S: serde::Serializer>(
    v: &Option<T>,
    s: S,
) -> Result<S::Ok, S::Error> {
    match v {
        Some(v) => s.collect_str(v),
        None => s.serialize_none(),
    }
}

/// For serde: as the number it is.
pub(crate) fn number<S: serde::Serializer>(v: &segment::Generation, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_u64(v.0)
}

#[cfg(test)]
mod tests;
