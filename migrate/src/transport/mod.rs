//! Connections: who may be reached how, frames over a byte stream, and the handshake.
//!
//! ```text
//! connects: Hello{versions, cluster, purpose, name} ->
//!           <- Welcome{version, node, registry} | Reject{code, why}     : listens
//! ```
//!
//! Everything above [`Link`] works over any stream of bytes. [`Identity`] makes one: TLS 1.3 with a certificate from
//! both sides, or plain TCP on loopback.
//!
//! Invariants: plain TCP only to and from loopback addresses, and only when it was asked for; every wait has a deadline.
//!
//! What it never does: it knows no VM and no segment, and it never retries (the pure senders decide that).

pub mod certificate;
mod client;
mod explain;
mod framed;
mod identity;
mod stream;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::wire::{
    Hello, MAX_MESSAGE_BYTES, MAX_VERSION, MIN_VERSION, Message, Purpose, Reject, Welcome, WireError,
};

pub use certificate::{CertRole, Certificate, NodeIdentity};
pub use client::{CallError, Client};
pub use framed::{FrameReader, FrameWriter, Incoming, Link};
pub use identity::{DEFAULT_TLS_DIR, Identity, IdentityArgs, Peer};
pub use stream::Stream;
pub use tls::{CA_FILE, CERT_FILE, KEY_FILE, ROLES_FILE, TlsError};

/// How long a connection may take to come up.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the other side may take to greet.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a side that has nothing to say says that it lives.
pub const PING_EVERY: Duration = Duration::from_secs(1);
/// How long a side may be silent before it is given up.
pub const DEAD_AFTER: Duration = Duration::from_secs(6);
/// The most texts of a greeting, in bytes.
const MAX_NAME_BYTES: usize = 255;

/// A stream of bytes to a peer.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> ByteStream for T {}

/// Why a connection failed.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The address is none, or its name has none.
    #[error("the address {address} cannot be used: write it as HOST:PORT")]
    Address {
        /// As it was given.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Plain TCP beyond this host.
    #[error(
        "refused to {doing} {address} with --insecure-plaintext, without TLS: what goes there is guest memory. Use a \
         certificate (--tls DIR, made by `standby ca issue`), or a loopback address (127.0.0.1 or [::1])"
    )]
    NotLoopback {
        /// As it was given.
        address: String,
        /// Listen on or connect to.
        doing: &'static str,
    },
    /// No certificate, and plain TCP was not asked for.
    #[error(
        "this process has no certificate: make one with `standby ca init DIR` and `standby ca issue NODE`, and name its \
         folder with --tls (or put it at /etc/understudy/tls). On loopback, --insecure-plaintext does without"
    )]
    NoIdentity,
    /// The certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The two do not believe each other's certificates.
    #[error("{why}")]
    Untrusted {
        /// The peer.
        peer: String,
        /// Which, why, and what to do.
        why: String,
    },
    /// One speaks TLS, the other does not.
    #[error(
        "{peer} speaks {theirs}, and this node {mine}: both need certificates, or --insecure-plaintext on loopback"
    )]
    Mixed {
        /// The peer.
        peer: String,
        /// What it speaks.
        theirs: &'static str,
        /// What this node speaks.
        mine: &'static str,
    },
    /// Nothing answers there.
    #[error("connect to {address}")]
    Connect {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The port cannot be had.
    #[error("listen on {address}: choose another with --listen, or stop what has it")]
    Listen {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer took too long.
    #[error("{peer} did not {what} within {} ms", after.as_millis())]
    Timeout {
        /// The peer.
        peer: String,
        /// What it should have done.
        what: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// The peer's bytes are no frames.
    #[error("talk to {peer}")]
    Wire {
        /// The peer.
        peer: String,
        /// What is wrong with them.
        #[source]
        source: WireError,
    },
    /// The connection broke.
    #[error("the connection to {peer} broke")]
    Io {
        /// The peer.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer ended the connection.
    #[error("{peer} closed the connection")]
    Closed {
        /// The peer.
        peer: String,
    },
    /// The peer refuses.
    #[error("{peer} refuses: {why}")]
    Rejected {
        /// The peer.
        peer: String,
        /// One of the constants of [`Reject`].
        code: u16,
        /// In its words.
        why: String,
    },
    /// The peer sent a frame that must not come there.
    #[error("{peer} sent {got} where {expected} was due")]
    Unexpected {
        /// The peer.
        peer: String,
        /// What came.
        got: &'static str,
        /// What was due.
        expected: &'static str,
    },
    /// No version that both speak.
    #[error(
        "{peer} speaks protocol versions {min} to {max}, this build {MIN_VERSION} to {MAX_VERSION}: update the older"
    )]
    Version {
        /// The peer.
        peer: String,
        /// Its oldest.
        min: u16,
        /// Its newest.
        max: u16,
    },
}

impl TransportError {
    /// The error and its causes in one line.
    #[must_use]
    pub fn in_full(&self) -> String {
        in_full(self)
    }
}

/// An error and its causes in one line, for where there is no place for a chain: a log, an answer to a peer.
#[must_use]
pub fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(c) = cause {
        text = format!("{text}: {c}");
        cause = c.source();
    }
    text
}

/// Resolves `address`; with `loopback` it may be nothing else.
async fn resolve(
    address: &str,
    doing: &'static str,
    loopback: bool,
) -> Result<Vec<SocketAddr>, TransportError> {
    let unusable = |source| TransportError::Address {
        address: address.to_owned(),
        source,
    };
    let found: Vec<_> = tokio::net::lookup_host(address)
        .await
        .map_err(unusable)?
        .collect();
    if found.is_empty() {
        return Err(unusable(io::Error::other("the name has no address")));
    }
    // All of them: which one would be used is not ours to choose.
    if loopback && found.iter().any(|a| !a.ip().is_loopback()) {
        return Err(TransportError::NotLoopback {
            address: address.to_owned(),
            doing,
        });
    }
    Ok(found)
}

/// The host of HOST:PORT, without the brackets of an IPv6 address.
fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

/// `future`, or [`TransportError::Timeout`] after `after`.
///
/// # Errors
/// The future's, or that it took too long.
pub async fn within<T>(
    peer: &str,
    what: &'static str,
    after: Duration,
    future: impl Future<Output = Result<T, TransportError>>,
) -> Result<T, TransportError> {
    match tokio::time::timeout(after, future).await {
        Ok(result) => result,
        Err(_) => Err(TransportError::Timeout {
            peer: peer.to_owned(),
            what,
            after,
        }),
    }
}

/// The highest version that both speak.
#[must_use]
pub fn agree(mine: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let version = mine.1.min(theirs.1);
    (version >= mine.0 && version >= theirs.0).then_some(version)
}

/// Greets who listens at the other end of `link`.
///
/// # Errors
/// When it refuses, or does not answer in time.
pub async fn greet<S: ByteStream>(
    link: &mut Link<S>,
    purpose: Purpose,
    cluster: &str,
    name: &str,
) -> Result<Welcome, TransportError> {
    let hello = Hello {
        min_version: MIN_VERSION,
        max_version: MAX_VERSION,
        cluster: cut(cluster),
        purpose,
        name: cut(name),
    };
    let peer = link.peer().to_owned();
    within(&peer, "greet back", HANDSHAKE_TIMEOUT, async {
        link.writer.send(0, &Message::Hello(hello)).await?;
        let welcome = match link.reader.next().await?.message {
            Message::Welcome(welcome) => welcome,
            Message::Reject(Reject { code, why }) => {
                return Err(TransportError::Rejected {
                    peer: peer.clone(),
                    code,
                    why,
                });
            }
            other => {
                let got = other.kind().name();
                return Err(TransportError::Unexpected {
                    peer: peer.clone(),
                    got,
                    expected: "Welcome",
                });
            }
        };
        if !(MIN_VERSION..=MAX_VERSION).contains(&welcome.version) {
            let (min, max) = (welcome.version, welcome.version);
            return Err(TransportError::Version {
                peer: peer.clone(),
                min,
                max,
            });
        }
        Ok(welcome)
    })
    .await
}

/// Connects to the agent at `address` for `purpose`, as `identity`: what it says of itself must be what its
/// certificate says.
///
/// # Errors
/// When nothing answers there, it refuses, or it is not to be trusted.
pub async fn connect(
    address: &str,
    identity: &Identity,
    purpose: Purpose,
) -> Result<(Link<Stream>, Welcome), TransportError> {
    let (stream, peer) = identity.dial(address).await?;
    let mut link = Link::new(stream, address);
    let welcome = greet(&mut link, purpose, "", identity.name()).await?;
    match peer {
        Peer::Node(node) if node.name != welcome.node => Err(TransportError::Untrusted {
            peer: address.to_owned(),
            why: format!(
                "{address} calls itself {}, and its certificate is {}'s: start it with its own certificate",
                welcome.node, node.name
            ),
        }),
        Peer::Node(_) | Peer::Anyone => Ok((link, welcome)),
    }
}

/// Waits for the greeting of who connected, and checks it; the caller answers with [`Welcome`] or rejects.
///
/// # Errors
/// When it does not greet in time, or must be refused (it was told so then).
pub async fn expect_hello<S: ByteStream>(
    link: &mut Link<S>,
    cluster: &str,
) -> Result<(Hello, u16), TransportError> {
    let peer = link.peer().to_owned();
    // No longer than a greeting: who connects has not said yet what for.
    let greeting = link.reader.next_of(MAX_MESSAGE_BYTES);
    let first = match within(&peer, "greet", HANDSHAKE_TIMEOUT, greeting).await {
        Err(error @ TransportError::Wire { .. }) => {
            link.reject(Reject::PROTOCOL, &in_full(&error)).await;
            return Err(error);
        }
        other => other?,
    };
    let Message::Hello(hello) = first.message else {
        let got = first.message.kind().name();
        let why = format!("{got} came where Hello was due");
        link.reject(Reject::PROTOCOL, &why).await;
        return Err(TransportError::Unexpected {
            peer,
            got,
            expected: "Hello",
        });
    };
    let (min, max) = (hello.min_version, hello.max_version);
    let Some(version) = agree((MIN_VERSION, MAX_VERSION), (min, max)) else {
        let why = format!(
            "this node speaks protocol versions {MIN_VERSION} to {MAX_VERSION}, you {min} to {max}: update the older"
        );
        link.reject(Reject::VERSION, &why).await;
        return Err(TransportError::Version { peer, min, max });
    };
    if hello.cluster != cluster {
        let why = format!(
            "this node belongs to cluster {cluster:?}, you to {:?}",
            hello.cluster
        );
        link.reject(Reject::CLUSTER, &why).await;
        return Err(TransportError::Rejected {
            peer,
            code: Reject::CLUSTER,
            why,
        });
    }
    Ok((hello, version))
}

/// At most what a greeting takes of a text.
fn cut(text: &str) -> String {
    let mut end = text.len().min(MAX_NAME_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests;
