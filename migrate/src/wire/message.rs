//! The messages of the handshake and of the replication flow, and the table of frame types.

use std::fmt;

use minicbor::decode::{self, Decoder};
use minicbor::encode::{self, Encoder, Write};
use minicbor::{Decode, Encode};
use segment::{CheckpointId, Digest, Generation, SegmentName, VmId};

use super::value::WireValue;
use super::{Call, MAX_CALL_BYTES, MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES, MAX_REPLY_BYTES, Reply, WireError};

macro_rules! frames {
    ($($number:literal $name:ident ($body:ty) max $max:expr, $doc:literal;)*) => {
        /// What a frame carries.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum FrameType {
            /// A piece of a segment's file, as raw bytes.
            Chunk,
            $(#[doc = $doc] $name,)*
        }

        impl FrameType {
            /// Every type.
            pub const ALL: &[Self] = &[Self::Chunk, $(Self::$name),*];

            /// The type of a number, where this build knows it.
            #[must_use]
            pub fn from_number(number: u8) -> Option<Self> {
                match number {
                    CHUNK_NUMBER => Some(Self::Chunk),
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Its number on the wire.
            #[must_use]
            pub fn number(self) -> u8 {
                match self { Self::Chunk => CHUNK_NUMBER, $(Self::$name => $number),* }
            }

            /// Its name in messages to people.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { Self::Chunk => "Chunk", $(Self::$name => stringify!($name)),* }
            }

            /// The most its payload may take.
            #[must_use]
            pub fn max_bytes(self) -> u32 {
                match self { Self::Chunk => MAX_CHUNK_BYTES, $(Self::$name => $max),* }
            }
        }

        /// One message.
        #[derive(Clone, PartialEq, Eq)]
        pub enum Message {
            /// A piece of a segment's file.
            Chunk(Vec<u8>),
            $(#[doc = $doc] $name($body),)*
        }

        impl Message {
            /// Its type.
            #[must_use]
            pub fn kind(&self) -> FrameType {
                match self { Self::Chunk(_) => FrameType::Chunk, $(Self::$name(_) => FrameType::$name),* }
            }

            /// Puts the payload behind what is in `out`.
            pub(super) fn encode_payload(&self, out: &mut Vec<u8>) {
                match self {
                    Self::Chunk(bytes) => out.extend_from_slice(bytes),
                    $(Self::$name(body) => put(body, out),)*
                }
            }

            /// Reads the payload of a frame whose header was checked.
            ///
            /// # Errors
            /// When it is not that message, or bytes are left over after it.
            pub fn decode(kind: FrameType, payload: Vec<u8>) -> Result<Self, WireError> {
                match kind {
                    FrameType::Chunk => Ok(Self::Chunk(payload)),
                    $(FrameType::$name => Ok(Self::$name(take(kind.name(), &payload)?)),)*
                }
            }
        }

        impl fmt::Debug for Message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    // Never the content: it is guest memory.
                    Self::Chunk(bytes) => write!(f, "Chunk({} bytes)", bytes.len()),
                    $(Self::$name(body) => body.fmt(f),)*
                }
            }
        }
    };
}

const CHUNK_NUMBER: u8 = 16;

frames! {
    1 Hello(Hello) max MAX_MESSAGE_BYTES, "The first frame of who connects.";
    2 Welcome(Welcome) max MAX_MESSAGE_BYTES, "The answer of who listens.";
    3 Reject(Reject) max MAX_MESSAGE_BYTES, "The connection is refused or ended, and why.";
    4 Ping(Ping) max MAX_MESSAGE_BYTES, "Says that the sender lives; every side sends it when it has nothing else to say.";
    10 Open(Open) max MAX_MESSAGE_BYTES, "An owner begins to ship a VM under its generation.";
    11 Position(Position) max MAX_MESSAGE_BYTES, "The generation is promised; this is what the holder has.";
    12 Offer(Offer) max MAX_MESSAGE_BYTES, "A segment comes, in chunks of this stream.";
    13 Accept(Accept) max MAX_MESSAGE_BYTES, "The holder has reserved the room for it.";
    14 Have(Ack) max MAX_MESSAGE_BYTES, "The holder has the checkpoint already, durably.";
    15 Refuse(Refuse) max MAX_MESSAGE_BYTES, "The holder does not take the segment, and why.";
    17 End(End) max MAX_MESSAGE_BYTES, "All chunks of the stream were sent.";
    18 Abort(Abort) max MAX_MESSAGE_BYTES, "No more chunks of the stream come, and it shall be forgotten.";
    19 Stored(Ack) max MAX_MESSAGE_BYTES, "The segment is stored durably.";
    20 Fenced(Fenced) max MAX_MESSAGE_BYTES, "The holder has promised a higher generation.";
    21 Renew(Renew) max MAX_MESSAGE_BYTES, "The owner asks for time: its guest runs under the generation it opened with.";
    22 Granted(Granted) max MAX_MESSAGE_BYTES, "The holder lets nobody else in for the length of the lease.";
    23 Released(Released) max MAX_MESSAGE_BYTES, "The owner's guest stands still for good: nobody has to wait for its lease.";
    32 Call(Box<Call>) max MAX_CALL_BYTES, "A question to a registry or an agent.";
    33 Reply(Box<Reply>) max MAX_REPLY_BYTES, "Its answer, on the call's stream.";
}

fn put<T: Encode<()>>(body: &T, out: &mut Vec<u8>) {
    // A Vec takes everything, and no message of ours has a value that its encoder refuses.
    let encoded = minicbor::encode(body, out);
    debug_assert!(encoded.is_ok(), "a message that cannot be encoded");
}

fn take<T: for<'b> Decode<'b, ()>>(what: &'static str, payload: &[u8]) -> Result<T, WireError> {
    let mut decoder = Decoder::new(payload);
    let body = decoder
        .decode()
        .map_err(|source| WireError::Decode { what, source })?;
    match payload.len() - decoder.position() {
        0 => Ok(body),
        left => Err(WireError::Trailing { what, left }),
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Purpose {
    /// An owner ships a VM's segments.
    #[n(0)]
    Ship,
    /// Calls: registry, other agents, the command line.
    #[n(1)]
    Call,
}

/// The first frame of who connects.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    /// The oldest protocol version it speaks.
    #[n(0)]
    pub min_version: u16,
    /// The newest protocol version it speaks.
    #[n(1)]
    pub max_version: u16,
    /// The cluster it belongs to; empty for the only one of this machine.
    #[n(2)]
    pub cluster: String,
    /// What the connection is for.
    #[n(3)]
    pub purpose: Purpose,
    /// Who connects, for messages and logs.
    #[n(4)]
    pub name: String,
}

/// The answer of who listens.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Welcome {
    /// The version that both speak from here on.
    #[n(0)]
    pub version: u16,
    /// The node's name.
    #[n(1)]
    pub node: String,
    /// Where the registry is, as HOST:PORT; absent when this agent itself keeps it.
    #[n(2)]
    pub registry: Option<String>,
    /// The node's software, for messages.
    #[n(3)]
    pub software: String,
}

/// Why a connection is refused or ended. An unknown code is a plain refusal.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Reject {
    /// What kind of refusal: see the constants.
    #[n(0)]
    pub code: u16,
    /// In words.
    #[n(1)]
    pub why: String,
}

impl Reject {
    /// No version that both speak.
    pub const VERSION: u16 = 1;
    /// Another cluster's node.
    pub const CLUSTER: u16 = 2;
    /// Too many connections.
    pub const BUSY: u16 = 3;
    /// A frame that must not come there, or cannot be read.
    pub const PROTOCOL: u16 = 4;
    /// The node stops.
    pub const STOPPING: u16 = 5;
    /// A newer connection of the same owner took over.
    pub const SUPERSEDED: u16 = 6;
    /// The node failed.
    pub const FAILED: u16 = 7;
}

macro_rules! empty {
    ($($(#[$doc:meta])* $name:ident),*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
        #[cbor(map)]
        pub struct $name {}
    )*};
}
empty! {
    /// Says that its sender lives.
    Ping,
    /// All chunks of the stream were sent.
    End,
    /// The stream is given up.
    Abort,
    /// The room is reserved.
    Accept,
    /// The owner's guest stands still for good.
    Released
}

/// The owner asks for time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Renew {
    /// Counted by the owner.
    #[n(0)]
    pub seq: u64,
}

/// The holder lets nobody else in for the length of the lease, from when it received the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Granted {
    /// The question's number.
    #[n(0)]
    pub seq: u64,
}

/// A checkpoint by name and identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode, serde::Serialize)]
#[cbor(map)]
pub struct Held {
    /// Its name.
    #[cbor(n(0), with = "crate::wire::value")]
    #[serde(serialize_with = "super::text")]
    pub name: SegmentName,
    /// Which state it is.
    #[cbor(n(1), with = "crate::wire::value")]
    #[serde(serialize_with = "super::text")]
    pub checkpoint: CheckpointId,
}

/// An owner begins to ship a VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Open {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// The generation it owns it under.
    #[cbor(n(1), with = "crate::wire::value")]
    pub generation: Generation,
    /// Who it is, for messages and logs.
    #[n(2)]
    pub owner: String,
    /// How long the lease is that it will ask for; absent when it asks for none. Kept durably with the promise.
    #[n(3)]
    pub lease_ttl_ms: Option<u64>,
}

/// The holder has promised the generation.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Position {
    /// The generation that is promised.
    #[cbor(n(0), with = "crate::wire::value")]
    pub generation: Generation,
    /// The newest checkpoint of the VM whose chain is whole at the holder.
    #[n(1)]
    pub newest: Option<Held>,
}

/// A segment comes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Offer {
    /// The generation of the owner, which may be higher than the one in the name.
    #[cbor(n(0), with = "crate::wire::value")]
    pub generation: Generation,
    /// The checkpoint's name.
    #[cbor(n(1), with = "crate::wire::value")]
    pub name: SegmentName,
    /// The checkpoint's identity.
    #[cbor(n(2), with = "crate::wire::value")]
    pub checkpoint: CheckpointId,
    /// The root digest of the file that comes.
    #[cbor(n(3), with = "crate::wire::value")]
    pub digest: Digest,
    /// The length of the file that comes.
    #[n(4)]
    pub bytes: u64,
    /// The checkpoint it stands on; absent for a full one.
    #[n(5)]
    pub parent: Option<Held>,
    /// When the guest was stopped for it, in nanoseconds of Unix time.
    #[n(6)]
    pub created_unix_ns: u64,
}

impl Offer {
    /// The checkpoint by name and identity.
    #[must_use]
    pub fn held(&self) -> Held {
        Held {
            name: self.name.clone(),
            checkpoint: self.checkpoint,
        }
    }
}

/// A checkpoint is stored durably at the holder, and so is every one it stands on.
///
/// An agent makes one only from a [`crate::protocol::Proof`], which only a store can give.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ack {
    /// The generation of the connection.
    #[cbor(n(0), with = "crate::wire::value")]
    pub(crate) generation: Generation,
    #[n(1)]
    pub(crate) held: Held,
    #[cbor(n(2), with = "crate::wire::value")]
    pub(crate) digest: Digest,
}

impl Ack {
    /// The generation it was stored under.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// What is stored.
    #[must_use]
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// The root digest of the file that is stored.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

/// Why a holder does not take a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefuseReason {
    /// Its budget is used up.
    Full,
    /// It has another checkpoint under that name.
    DuplicateName,
    /// What came is not a whole segment, or not the one that was offered.
    Invalid,
    /// It lacks the checkpoint that this one stands on.
    MissingParent,
    /// Its disk failed.
    Failed,
    /// A reason of a newer version.
    Other(u64),
}

impl WireValue for RefuseReason {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        e.u64(match *self {
            Self::Full => 1,
            Self::DuplicateName => 2,
            Self::Invalid => 3,
            Self::MissingParent => 4,
            Self::Failed => 5,
            Self::Other(code) => code,
        })?
        .ok()
    }
    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        Ok(match d.u64()? {
            1 => Self::Full,
            2 => Self::DuplicateName,
            3 => Self::Invalid,
            4 => Self::MissingParent,
            5 => Self::Failed,
            code => Self::Other(code),
        })
    }
}

/// The holder does not take a segment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Refuse {
    /// The generation of the connection.
    #[cbor(n(0), with = "crate::wire::value")]
    pub generation: Generation,
    /// What kind of refusal.
    #[cbor(n(1), with = "crate::wire::value")]
    pub reason: RefuseReason,
    /// In words.
    #[n(2)]
    pub why: String,
}

/// The holder has promised a higher generation.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Fenced {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// The generation that was asked for.
    #[cbor(n(1), with = "crate::wire::value")]
    pub asked: Generation,
    /// The generation that is promised.
    #[cbor(n(2), with = "crate::wire::value")]
    pub current: Generation,
}
