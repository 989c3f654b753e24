//! A packet of the stream sockets between guest and host (virtio 1.2, section 5.10.6): 44 bytes, then data.
//!
//! | offset | bytes | | offset | bytes | |
//! |---:|---:|---|---:|---:|---|
//! | 0 | 8 | sender's CID | 30 | 2 | operation |
//! | 8 | 8 | receiver's CID | 32 | 4 | flags |
//! | 16 | 4 | sender's port | 36 | 4 | room the sender has for a connection |
//! | 20 | 4 | receiver's port | 40 | 4 | bytes the sender has taken of it |
//! | 24 | 4 | bytes of data | | | |
//! | 28 | 2 | kind: 1, a stream | | | |

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 44;
/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// A stream.
pub(super) const STREAM: u16 = 1;
/// Flag of [`Op::Shutdown`]: the sender will receive no more.
pub(super) const NO_RECEIVE: u32 = 1;
/// Flag of [`Op::Shutdown`]: the sender will send no more.
pub(super) const NO_SEND: u32 = 2;

/// What a packet asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    /// To connect.
    Request = 1,
    /// The connection is taken.
    Response = 2,
    /// There is no such connection, or no more.
    Reset = 3,
    /// The sender ends one direction, or both.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// How much room the sender has.
    CreditUpdate = 6,
    /// To be told how much room the receiver has.
    CreditRequest = 7,
}

impl Op {
    fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header. `op` is `None` where the number is no operation's: from a guest everything may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

fn at<const N: usize>(bytes: &[u8; HEADER_BYTES], offset: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[offset..offset + N]);
    field
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u32_at = |offset| u32::from_le_bytes(at(bytes, offset));
        Self {
            src_cid: u64::from_le_bytes(at(bytes, 0)),
            dst_cid: u64::from_le_bytes(at(bytes, 8)),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16::from_le_bytes(at(bytes, 28)),
            op: Op::from_number(u16::from_le_bytes(at(bytes, 30))),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put =
            |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.map_or(0, |op| op as u16).to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}
