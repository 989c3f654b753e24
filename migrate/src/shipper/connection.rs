//! One connection to a holder: a task that reads frames, and one that writes messages and streams segments.
//!
//! Segments are streamed one after the other in the order they were given, so that a holder has stored what a segment
//! stands on before it begins with it. Only pings and what is said of the lease go past one that is being streamed.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use crate::protocol::SenderEvent;
use crate::store::StoreError;
use crate::transport::{FrameWriter, Identity, Link, Stream, TransportError, connect, in_full};
use crate::wire::{Abort, End, FrameHeader, FrameType, HEADER_BYTES, Message, Offer, Purpose};

/// How much of a segment is sent as one chunk.
const CHUNK_BYTES: usize = 512 << 10;

/// What goes out.
#[derive(Debug)]
pub(super) enum Out {
    /// A message.
    Message { stream: u32, message: Message },
    /// A segment's file, as chunks and `End`.
    Segment { transfer: u32, file: File, bytes: u64 },
    /// No more of a segment than `Abort`.
    Cancel { transfer: u32 },
}

/// What the holder's task hears of a connection.
#[derive(Debug)]
pub(super) enum Heard {
    /// It is up; this is the node's name, the version that both speak, and where things are put to go out.
    Up {
        connection: u64,
        node: String,
        version: u16,
        out: mpsc::UnboundedSender<Out>,
    },
    /// For the sender.
    Event(SenderEvent),
    /// What the spool has, and its file, kept open until it was streamed.
    Segment { ticket: u64, offer: Offer, file: File },
    /// The spool's disk failed.
    NoSegment { ticket: u64, error: StoreError },
}

/// Connects, and reads and writes until one of them fails; then says `Lost`.
pub(super) async fn run(
    address: String,
    identity: Identity,
    connection: u64,
    heard: mpsc::Sender<Heard>,
    sent: Arc<AtomicU64>,
) {
    let why = match talk(&address, &identity, connection, &heard, &sent).await {
        Ok(()) => "closed".to_owned(),
        Err(Ended::Transport(e)) => in_full(&e),
        Err(Ended::File { transfer, source }) => {
            let why = format!("read the file of transfer {transfer}: {source}");
            let failed = SenderEvent::StreamFailed {
                connection,
                why: why.clone(),
            };
            // When the holder's task is gone there is no one to tell.
            let _ = heard.send(Heard::Event(failed)).await;
            why
        }
    };
    let jitter = crate::registry::random_id()[0];
    let _ = heard
        .send(Heard::Event(SenderEvent::Lost {
            connection,
            why,
            jitter,
        }))
        .await;
}

/// Why a connection ended.
enum Ended {
    Transport(TransportError),
    File { transfer: u32, source: std::io::Error },
}

impl From<TransportError> for Ended {
    fn from(e: TransportError) -> Self {
        Self::Transport(e)
    }
}

async fn talk(
    address: &str,
    identity: &Identity,
    connection: u64,
    heard: &mpsc::Sender<Heard>,
    sent: &AtomicU64,
) -> Result<(), Ended> {
    let (link, welcome) = connect(address, identity, Purpose::Ship).await?;
    let Link { mut reader, writer } = link;
    // Bounded by the sender's window and by its pings while it waits for a sign of life.
    let (out, outgoing) = mpsc::unbounded_channel();
    if heard
        .send(Heard::Up {
            connection,
            node: welcome.node,
            version: welcome.version,
            out,
        })
        .await
        .is_err()
    {
        return Ok(());
    }
    let reading = async {
        loop {
            let frame = reader.next().await?;
            let event = SenderEvent::Frame {
                connection,
                stream: frame.stream,
                message: frame.message,
            };
            if heard.send(Heard::Event(event)).await.is_err() {
                return Ok(());
            }
        }
    };
    let mut writing = Writing {
        connection,
        writer,
        outgoing,
        queue: VecDeque::new(),
        cancelled: HashSet::new(),
        heard,
        sent,
        buffer: vec![0; HEADER_BYTES + CHUNK_BYTES],
    };
    tokio::select! {
        ended = reading => ended,
        ended = writing.run() => ended,
    }
}

struct Writing<'a> {
    connection: u64,
    writer: FrameWriter<tokio::io::WriteHalf<Stream>>,
    outgoing: mpsc::UnboundedReceiver<Out>,
    /// Taken from `outgoing` while a segment was streamed.
    queue: VecDeque<Out>,
    cancelled: HashSet<u32>,
    heard: &'a mpsc::Sender<Heard>,
    sent: &'a AtomicU64,
    buffer: Vec<u8>,
}

impl Writing<'_> {
    async fn run(&mut self) -> Result<(), Ended> {
        loop {
            let next = match self.queue.pop_front() {
                Some(next) => next,
                None => match self.outgoing.recv().await {
                    Some(next) => next,
                    None => {
                        self.writer.finish().await;
                        return Ok(());
                    }
                },
            };
            match next {
                Out::Message { stream, message } => self.writer.send(stream, &message).await?,
                Out::Segment {
                    transfer,
                    file,
                    bytes,
                } => self.segment(transfer, file, bytes).await?,
                // What was streamed whole is not taken back; the holder ignores the rest.
                Out::Cancel { transfer } => self.writer.send(transfer, &Message::Abort(Abort {})).await?,
            }
        }
    }

    async fn segment(&mut self, transfer: u32, file: File, bytes: u64) -> Result<(), Ended> {
        let file = Arc::new(file);
        let mut at = 0;
        while at < bytes {
            self.look_up().await?;
            if self.cancelled.remove(&transfer) {
                self.writer.send(transfer, &Message::Abort(Abort {})).await?;
                return Ok(());
            }
            // At most CHUNK_BYTES, so the casts are exact.
            let len = (bytes - at).min(CHUNK_BYTES as u64) as usize;
            let header = FrameHeader {
                kind: FrameType::Chunk,
                stream: transfer,
                len: len as u32,
            };
            let mut buffer = std::mem::take(&mut self.buffer);
            let from = file.clone();
            let read = tokio::task::spawn_blocking(move || {
                buffer[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
                let read = from.read_exact_at(&mut buffer[HEADER_BYTES..HEADER_BYTES + len], at);
                (buffer, read)
            });
            let (buffer, read) = read.await.map_err(|e| Ended::File {
                transfer,
                source: std::io::Error::other(e),
            })?;
            self.buffer = buffer;
            read.map_err(|source| Ended::File { transfer, source })?;
            self.writer
                .send_encoded(&self.buffer[..HEADER_BYTES + len])
                .await?;
            at += len as u64;
            self.sent.fetch_add(len as u64, Ordering::Relaxed);
            let progress = SenderEvent::Progress {
                connection: self.connection,
            };
            let _ = self.heard.send(Heard::Event(progress)).await;
        }
        self.writer.send(transfer, &Message::End(End {})).await?;
        Ok(())
    }

    /// Takes what came meanwhile: pings and what is said of the lease go out at once, cancellations are noted, the rest waits.
    async fn look_up(&mut self) -> Result<(), Ended> {
        while let Ok(out) = self.outgoing.try_recv() {
            match out {
                Out::Message {
                    stream,
                    message: message @ (Message::Ping(_) | Message::Renew(_) | Message::Released(_)),
                } => {
                    self.writer.send(stream, &message).await?;
                }
                Out::Cancel { transfer } => {
                    let queued = |o: &Out| matches!(o, Out::Segment { transfer: t, .. } if *t == transfer);
                    if let Some(at) = self.queue.iter().position(queued) {
                        // In its place, so that it stays behind its offer.
                        self.queue[at] = Out::Cancel { transfer };
                    } else {
                        self.cancelled.insert(transfer);
                    }
                }
                other @ (Out::Message { .. } | Out::Segment { .. }) => self.queue.push_back(other),
            }
        }
        Ok(())
    }
}
