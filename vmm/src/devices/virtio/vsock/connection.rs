//! One stream between the guest and a process of the host.
//!
//! ```text
//! host opens   Requested --response--> Open          guest opens   Open (its request was answered at once)
//! Open: each side may end either direction; both ended and all delivered, or anything against the rules: gone
//! ```
//!
//! The guest may send as much as [`ROOM_BYTES`] ahead of what the host's process has taken, and is cut off when it sends
//! more. What is for the guest stays in the host's socket until the guest has room.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::packet::{Header, NO_RECEIVE, NO_SEND, Op};

/// What a connection holds of what the guest sent and the host's process has not taken.
pub(super) const ROOM_BYTES: u32 = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The guest was asked, and has not answered.
    Requested,
    /// Both may send.
    Open,
}

/// What the guest is to be told of a connection, as soon as it has buffers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Owed {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) credit: bool,
    /// Flags of a shutdown.
    pub(super) shutdown: u32,
}

/// A connection is over: the guest is told so, unless it was the one who said it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Over {
    pub(super) tell_guest: bool,
}

const CUT_OFF: Over = Over { tell_guest: true };

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) id: u64,
    pub(super) stream: Arc<UnixStream>,
    pub(super) state: State,
    pub(super) owed: Owed,
    /// From the guest, not taken yet.
    waiting: VecDeque<u8>,
    /// Bytes the host's process has taken, and as of what the guest was told.
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest; what it says it has taken, and its room.
    sent: u32,
    guest_taken: u32,
    guest_room: u32,
    /// The guest will send no more.
    guest_quiet: bool,
    /// The guest will receive no more.
    guest_deaf: bool,
    /// The host's process will send no more.
    host_quiet: bool,
}

impl Connection {
    /// A connection whose first packet from the guest was `first`, if the guest opened it.
    pub(super) fn new(id: u64, stream: Arc<UnixStream>, first: Option<&Header>) -> Self {
        let opened = first.is_some();
        let mut connection = Self {
            id,
            stream,
            state: if opened { State::Open } else { State::Requested },
            owed: Owed {
                request: !opened,
                response: opened,
                ..Owed::default()
            },
            waiting: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_taken: 0,
            guest_room: 0,
            guest_quiet: false,
            guest_deaf: false,
            host_quiet: false,
        };
        if let Some(header) = first {
            connection.hear(header);
        }
        connection
    }

    /// Every packet of the guest says what room it has.
    fn hear(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_taken = header.fwd_cnt;
    }

    /// How many bytes the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        self.guest_room
            .saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// Whether bytes for the guest are to be waited for.
    pub(super) fn reads(&self) -> bool {
        self.state == State::Open && !self.host_quiet && !self.guest_deaf && self.credit() > 0
    }

    /// Whether bytes for the host's process wait.
    pub(super) fn writes(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Bytes held for the host's process.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.waiting.len()
    }

    /// A packet of the guest.
    pub(super) fn packet(&mut self, header: &Header, data: &[u8], host_port: u32) -> Result<(), Over> {
        self.hear(header);
        match (self.state, header.op) {
            (_, Some(Op::Reset)) => return Err(Over { tell_guest: false }),
            (State::Requested, Some(Op::Response)) => {
                self.state = State::Open;
                let line = format!("OK {host_port}\n");
                // A new socket has room for it.
                match (&*self.stream).write(line.as_bytes()) {
                    Ok(count) if count == line.len() => {}
                    Ok(_) | Err(_) => return Err(CUT_OFF),
                }
            }
            (State::Open, Some(Op::Data)) => {
                if self.guest_quiet || self.waiting.len() + data.len() > ROOM_BYTES as usize {
                    return Err(CUT_OFF);
                }
                self.waiting.extend(data);
                self.flush()?;
            }
            (State::Open, Some(Op::Shutdown)) => {
                self.guest_quiet |= header.flags & NO_SEND != 0;
                self.guest_deaf |= header.flags & NO_RECEIVE != 0;
                if self.guest_deaf {
                    // The process learns of it at its next write; it may be gone already.
                    let _ = self.stream.shutdown(Shutdown::Read);
                }
                self.flush()?;
            }
            (State::Open, Some(Op::CreditUpdate)) => {}
            (State::Open, Some(Op::CreditRequest)) => self.owed.credit = true,
            (
                State::Requested,
                Some(Op::Request | Op::Shutdown | Op::Data | Op::CreditUpdate | Op::CreditRequest) | None,
            )
            | (State::Open, Some(Op::Request | Op::Response) | None) => return Err(CUT_OFF),
        }
        Ok(())
    }

    /// Gives the host's process what it takes.
    pub(super) fn flush(&mut self) -> Result<(), Over> {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            match (&*self.stream).write(front) {
                Ok(0) => return Err(CUT_OFF),
                Ok(count) => {
                    self.waiting.drain(..count);
                    // At most the room, so it fits.
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Err(CUT_OFF),
            }
        }
        // Told before the guest thinks that it has no room, and not for every packet.
        self.owed.credit |= self.forwarded.wrapping_sub(self.told) >= ROOM_BYTES / 2;
        if self.guest_quiet && self.waiting.is_empty() {
            if self.guest_deaf || self.host_quiet {
                return Err(CUT_OFF);
            }
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Bytes for the guest, no more than it has room for. 0: the process has ended its direction.
    pub(super) fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let room = to.len().min(self.credit() as usize);
        let count = (&*self.stream).read(&mut to[..room])?;
        self.sent = self.sent.wrapping_add(count as u32);
        Ok(count)
    }

    /// The host's process has ended its direction, or is gone altogether.
    pub(super) fn host_ended(&mut self, gone: bool) -> Result<(), Over> {
        self.host_quiet = true;
        self.owed.shutdown |= NO_SEND;
        if gone {
            self.owed.shutdown |= NO_RECEIVE;
        }
        if self.guest_quiet && self.waiting.is_empty() {
            return Err(CUT_OFF);
        }
        Ok(())
    }

    /// What the guest is to be told next: operation and flags.
    pub(super) fn next_owed(&mut self) -> Option<(Op, u32)> {
        let owed = &mut self.owed;
        if std::mem::take(&mut owed.request) {
            return Some((Op::Request, 0));
        }
        if std::mem::take(&mut owed.response) {
            return Some((Op::Response, 0));
        }
        // After the data that was sent before it, which is already in the guest's hands.
        match std::mem::take(&mut owed.shutdown) {
            0 => {}
            flags => return Some((Op::Shutdown, flags)),
        }
        std::mem::take(&mut owed.credit).then_some((Op::CreditUpdate, 0))
    }

    /// Room and bytes taken, for a packet that is sent now.
    pub(super) fn say_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.owed.credit = false;
        (ROOM_BYTES, self.forwarded)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The file may stay open for a moment, where it is waited for; the process learns of the end now.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
