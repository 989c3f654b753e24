//! Frames over a stream of bytes.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};

use super::{ByteStream, TransportError, explain, within};
use crate::wire::{FrameHeader, HEADER_BYTES, Message, Reject, WireError, encode_frame};

/// What is read ahead: several small frames in one system call; a chunk goes past it.
const READ_AHEAD_BYTES: usize = 64 << 10;

/// A frame that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Its transfer or call.
    pub stream: u32,
    /// What it carries.
    pub message: Message,
}

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    from: BufReader<R>,
    peer: String,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// From `from`; `peer` is who sends, for messages.
    pub fn new(from: R, peer: &str) -> Self {
        Self {
            from: BufReader::with_capacity(READ_AHEAD_BYTES, from),
            peer: peer.to_owned(),
        }
    }

    /// The next frame. Not to be dropped half-way: a frame would be cut.
    ///
    /// # Errors
    /// When the stream ends or breaks, or what comes is not a frame.
    pub async fn next(&mut self) -> Result<Incoming, TransportError> {
        self.next_of(u32::MAX).await
    }

    /// The next frame, of at most `max` bytes of payload: for a peer that has not said yet what it wants.
    ///
    /// # Errors
    /// As [`FrameReader::next`], and when it is longer.
    pub async fn next_of(&mut self, max: u32) -> Result<Incoming, TransportError> {
        let mut head = [0; HEADER_BYTES];
        self.from
            .read_exact(&mut head)
            .await
            .map_err(|e| self.broken(e))?;
        let wire = |source| TransportError::Wire {
            peer: self.peer.clone(),
            source,
        };
        let header = FrameHeader::parse(&head).map_err(wire)?;
        if header.len > max {
            return Err(wire(WireError::TooLong {
                what: header.kind.name(),
                len: header.len.into(),
                max,
            }));
        }
        // The length was checked against the limit of its type.
        let mut payload = Vec::with_capacity(header.len as usize);
        let got = (&mut self.from)
            .take(header.len.into())
            .read_to_end(&mut payload)
            .await;
        match got {
            Ok(n) if n == header.len as usize => {}
            Ok(_) => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
            Err(e) => return Err(self.broken(e)),
        }
        let wire = |source| TransportError::Wire {
            peer: self.peer.clone(),
            source,
        };
        let message = Message::decode(header.kind, payload).map_err(wire)?;
        Ok(Incoming {
            stream: header.stream,
            message,
        })
    }

    /// What it reads from; what was read ahead is lost.
    pub(super) fn into_inner(self) -> R {
        self.from.into_inner()
    }

    fn broken(&self, source: io::Error) -> TransportError {
        let peer = self.peer.clone();
        // In TLS 1.3 who connects hears only here that its certificate was refused.
        if let Some(why) = explain::handshake(&source, &peer) {
            return TransportError::Untrusted { peer, why };
        }
        match source.kind() {
            io::ErrorKind::UnexpectedEof => TransportError::Closed { peer },
            _ => TransportError::Io { peer, source },
        }
    }
}

/// Writes frames.
#[derive(Debug)]
pub struct FrameWriter<W> {
    to: W,
    peer: String,
    buffer: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// To `to`; `peer` is who reads, for messages.
    pub fn new(to: W, peer: &str) -> Self {
        Self {
            to,
            peer: peer.to_owned(),
            buffer: Vec::new(),
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// When it is longer than its type may be, or the stream breaks.
    pub async fn send(&mut self, stream: u32, message: &Message) -> Result<(), TransportError> {
        self.buffer.clear();
        encode_frame(stream, message, &mut self.buffer).map_err(|source| TransportError::Wire {
            peer: self.peer.clone(),
            source,
        })?;
        let sent = async {
            self.to.write_all(&self.buffer).await?;
            // TLS keeps the rest of what the socket did not take at once.
            self.to.flush().await
        };
        let sent = sent.await;
        // A large answer must not be kept for the life of the connection.
        self.buffer.shrink_to(READ_AHEAD_BYTES);
        sent.map_err(|source| TransportError::Io {
            peer: self.peer.clone(),
            source,
        })
    }

    /// Sends bytes that are frames already.
    ///
    /// # Errors
    /// When the stream breaks.
    pub async fn send_encoded(&mut self, frames: &[u8]) -> Result<(), TransportError> {
        let sent = async {
            self.to.write_all(frames).await?;
            self.to.flush().await
        };
        sent.await.map_err(|source| TransportError::Io {
            peer: self.peer.clone(),
            source,
        })
    }

    /// Ends the stream in this direction; what was sent arrives.
    pub async fn finish(&mut self) {
        // The peer may be gone already; then there is nothing to end.
        let _ = self.to.shutdown().await;
    }
}

/// Both directions to one peer.
#[derive(Debug)]
pub struct Link<S> {
    /// From the peer.
    pub reader: FrameReader<ReadHalf<S>>,
    /// To the peer.
    pub writer: FrameWriter<WriteHalf<S>>,
}

impl<S: ByteStream> Link<S> {
    /// Over `stream`; `peer` is who is at its other end, for messages.
    pub fn new(stream: S, peer: &str) -> Self {
        let (read, write) = tokio::io::split(stream);
        Self {
            reader: FrameReader::new(read, peer),
            writer: FrameWriter::new(write, peer),
        }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.reader.peer
    }

    /// Refuses the peer, in words; it may be gone already.
    pub async fn reject(&mut self, code: u16, why: &str) {
        let reject = Message::Reject(Reject {
            code,
            why: why.chars().take(1000).collect(),
        });
        let peer = self.reader.peer.clone();
        let telling = async {
            self.writer.send(0, &reject).await?;
            self.writer.finish().await;
            Ok(())
        };
        let _ = within(&peer, "take the refusal", super::PING_EVERY, telling).await;
    }
}
