//! Calls to an agent: one connection, one question at a time.

use std::time::Duration;

use super::{ByteStream, DEAD_AFTER, Identity, Link, Stream, TransportError, connect, greet, within};
use crate::wire::{Call, End, Failure, Fenced, Message, Purpose, Reply, Welcome};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection failed; whether the agent did what it was asked is not known.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The agent refuses, or failed.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The agent has promised a higher generation.
    #[error("{peer} has promised generation {} for VM {}: {} is over", fenced.current, fenced.vm, fenced.asked)]
    Fenced {
        /// The agent.
        peer: String,
        /// What it says.
        fenced: Fenced,
    },
    /// The answer is to another question.
    #[error("{peer} answered something else")]
    Mismatch {
        /// The agent.
        peer: String,
    },
}

/// A connection for calls.
#[derive(Debug)]
pub struct Client<S = Stream> {
    link: Link<S>,
    welcome: Welcome,
    last: u32,
}

impl Client {
    /// Connects to the agent at `address` (HOST:PORT) as `identity`.
    ///
    /// # Errors
    /// When nothing answers there, it refuses, or it is not to be trusted.
    pub async fn connect(address: &str, identity: &Identity) -> Result<Self, TransportError> {
        let (link, welcome) = connect(address, identity, Purpose::Call).await?;
        Ok(Self {
            link,
            welcome,
            last: 0,
        })
    }
}

impl<S: ByteStream> Client<S> {
    /// Over a stream that is there already.
    ///
    /// # Errors
    /// When the other end refuses, or does not answer.
    pub async fn over(stream: S, peer: &str, name: &str) -> Result<Self, TransportError> {
        let mut link = Link::new(stream, peer);
        let welcome = greet(&mut link, Purpose::Call, "", name).await?;
        Ok(Self {
            link,
            welcome,
            last: 0,
        })
    }

    /// What the agent said of itself.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &str {
        self.link.peer()
    }

    /// Asks, and waits for the answer. The agent says that it lives while it works: only silence ends the wait early.
    ///
    /// # Errors
    /// When the agent refuses or fails, is silent for too long, or takes longer than `deadline`. After a failure of
    /// the transport the connection is not to be used again.
    pub async fn call(&mut self, call: Call, deadline: Duration) -> Result<Reply, CallError> {
        self.last = self.last.wrapping_add(1);
        let stream = self.last;
        let peer = self.link.peer().to_owned();
        let question = Message::Call(Box::new(call));
        let sent = self.link.writer.send(stream, &question);
        within(&peer, "take the question", deadline, sent).await?;
        self.answer(stream, deadline).await
    }

    /// Asks with a file that follows in pieces; `next` gives them, none at the end. As [`Self::call`] otherwise.
    ///
    /// # Errors
    /// As [`Self::call`], and what `next` says.
    pub async fn call_with_file(
        &mut self,
        call: Call,
        mut next: impl FnMut() -> std::io::Result<Option<Vec<u8>>>,
        deadline: Duration,
    ) -> Result<Reply, CallError> {
        self.last = self.last.wrapping_add(1);
        let stream = self.last;
        let peer = self.link.peer().to_owned();
        let writer = &mut self.link.writer;
        writer.send(stream, &Message::Call(Box::new(call))).await?;
        while let Some(piece) = next().map_err(|e| Failure {
            why: format!("read what is to be sent: {e}"),
        })? {
            within(
                &peer,
                "take the next piece",
                DEAD_AFTER,
                writer.send(stream, &Message::Chunk(piece)),
            )
            .await?;
        }
        writer.send(stream, &Message::End(End {})).await?;
        self.answer(stream, deadline).await
    }

    /// Waits for the answer on `stream`.
    async fn answer(&mut self, stream: u32, deadline: Duration) -> Result<Reply, CallError> {
        let peer = self.link.peer().to_owned();
        let link = &mut self.link;
        let answer = within(&peer, "answer", deadline, async {
            loop {
                let incoming = within(&peer, "say that it lives", DEAD_AFTER, link.reader.next()).await?;
                match incoming.message {
                    Message::Reply(reply) if incoming.stream == stream => return Ok(*reply),
                    Message::Ping(_) => {}
                    other => return Err(unexpected(&peer, &other, "Reply")),
                }
            }
        });
        match answer.await? {
            Reply::Failed(failure) => Err(failure.into()),
            Reply::Fenced(fenced) => Err(CallError::Fenced { peer, fenced }),
            reply => Ok(reply),
        }
    }

    /// The next piece of the file that was asked for by the last call; none at its end.
    ///
    /// # Errors
    /// When the transport fails, or the agent gives up.
    pub async fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, CallError> {
        let peer = self.link.peer().to_owned();
        loop {
            let next = within(&peer, "send the next piece", DEAD_AFTER, self.link.reader.next()).await?;
            match next.message {
                Message::Chunk(bytes) if next.stream == self.last => return Ok(Some(bytes)),
                Message::End(_) if next.stream == self.last => return Ok(None),
                Message::Reply(reply) if next.stream == self.last => match *reply {
                    Reply::Failed(failure) => return Err(failure.into()),
                    _ => return Err(CallError::Mismatch { peer }),
                },
                Message::Ping(_) => {}
                other => return Err(unexpected(&peer, &other, "Chunk").into()),
            }
        }
    }
}

fn unexpected(peer: &str, other: &Message, expected: &'static str) -> TransportError {
    match other {
        Message::Reject(reject) => TransportError::Rejected {
            peer: peer.to_owned(),
            code: reject.code,
            why: reject.why.clone(),
        },
        other => TransportError::Unexpected {
            peer: peer.to_owned(),
            got: other.kind().name(),
            expected,
        },
    }
}
