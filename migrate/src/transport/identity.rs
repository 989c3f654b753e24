//! Who this process is to other nodes, and who a peer has proved to be.
//!
//! ```text
//!            Identity::tls(DIR)         TLS 1.3, both certificates of one authority         Peer::Node{name, roles}
//! process ----------------------> Stream <=======================================> Stream ---------------------->
//!            Identity::plaintext        plain TCP, loopback only, --insecure-plaintext      Peer::Anyone
//! ```
//!
//! Invariants: without a certificate nothing is spoken beyond this host; one end that speaks TLS and one that does not
//! refuse each other with a word about it; a peer's name and roles are its certificate's.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::certificate::{CertRole, Certificate, CertificateError, NodeIdentity};
use super::tls::{Tls, TlsFolder};
use super::{
    CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT, Link, Stream, TransportError, explain, host_of, resolve, within,
};
use crate::wire::{MAGIC, Reject};

/// Where a node's certificate is when nothing else is said.
pub const DEFAULT_TLS_DIR: &str = "/etc/understudy/tls";
/// The variable that names it.
const TLS_VARIABLE: &str = "UNDERSTUDY_TLS";
/// The first byte of every TLS connection.
const TLS_HANDSHAKE: u8 = 0x16;
/// How long a peer that was refused may take to take it in.
const LINGER: Duration = Duration::from_secs(1);
/// How much of what it still sends is read, so that the refusal is not lost.
const LINGER_BYTES: u64 = 64 << 10;

/// Who this process is.
#[derive(Clone)]
pub struct Identity {
    name: Arc<str>,
    way: Way,
}

#[derive(Clone)]
enum Way {
    Plaintext,
    Tls(Arc<TlsFolder>),
}

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// A process on this host, over plain TCP: whoever may connect to loopback may do everything here.
    Anyone,
    /// Who holds this certificate.
    Node(NodeIdentity),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anyone => f.write_str("a process on this host"),
            Self::Node(node) => f.write_str(&node.name),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = match &self.way {
            Way::Plaintext => "plaintext".to_owned(),
            Way::Tls(folder) => folder.dir.display().to_string(),
        };
        write!(f, "Identity({}, {way})", self.name)
    }
}

/// How a process is told who it is: flags of `standby` and `vmm`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct IdentityArgs {
    /// Folder of this node's certificate: cert.pem, key.pem, ca.pem (`standby ca issue`) [default: $UNDERSTUDY_TLS, or
    /// /etc/understudy/tls where that is]
    #[arg(long, value_name = "DIR", global = true)]
    pub tls: Option<PathBuf>,
    /// Speak plain TCP, to and from this host's loopback addresses only: whoever can connect may do everything
    #[arg(long, global = true, conflicts_with = "tls")]
    pub insecure_plaintext: bool,
}

impl IdentityArgs {
    /// The identity they mean; `name` is what a process without a certificate calls itself.
    ///
    /// # Errors
    /// When there is no certificate, or it cannot be used.
    pub fn identity(&self, name: &str) -> Result<Identity, TransportError> {
        if self.insecure_plaintext {
            return Ok(Identity::plaintext(name));
        }
        let default = Path::new(DEFAULT_TLS_DIR);
        let named = std::env::var_os(TLS_VARIABLE).filter(|dir| !dir.is_empty());
        match &self.tls.clone().or(named.map(PathBuf::from)) {
            Some(dir) => Identity::tls(dir),
            None if default.is_dir() => Identity::tls(default),
            None => Err(TransportError::NoIdentity),
        }
    }
}

impl Identity {
    /// Without a certificate: for loopback only. `name` is for the other end's log.
    #[must_use]
    pub fn plaintext(name: &str) -> Self {
        Self {
            name: name.into(),
            way: Way::Plaintext,
        }
    }

    /// By the certificate in `dir`. Its files are read again when they change.
    ///
    /// # Errors
    /// When it cannot be used, or does not hold now.
    pub fn tls(dir: &Path) -> Result<Self, TransportError> {
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        let folder = TlsFolder::open(&dir)?;
        Ok(Self {
            name: folder.current().me.node.name.as_str().into(),
            way: Way::Tls(Arc::new(folder)),
        })
    }

    /// The node's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The certificate; none without TLS.
    #[must_use]
    pub fn certificate(&self) -> Option<Certificate> {
        match &self.way {
            Way::Plaintext => None,
            Way::Tls(folder) => Some(folder.current().me.clone()),
        }
    }

    /// Looks at the certificate's files now instead of within a second.
    pub fn reload(&self) {
        match &self.way {
            Way::Plaintext => {}
            Way::Tls(folder) => folder.reload(),
        }
    }

    /// The flags by which another process on this host is the same node.
    #[must_use]
    pub fn flags(&self) -> Vec<std::ffi::OsString> {
        match &self.way {
            Way::Plaintext => vec!["--insecure-plaintext".into()],
            Way::Tls(folder) => vec!["--tls".into(), folder.dir.clone().into()],
        }
    }

    /// Listens on `address`; without a certificate it has to be a loopback one.
    ///
    /// # Errors
    /// When it cannot be had.
    pub async fn listen(&self, address: &str) -> Result<TcpListener, TransportError> {
        let found = resolve(address, "listen on", matches!(self.way, Way::Plaintext)).await?;
        TcpListener::bind(found.as_slice())
            .await
            .map_err(|source| TransportError::Listen {
                address: address.to_owned(),
                source,
            })
    }

    /// Connects to the agent at `address` (HOST:PORT), and finds out who it is.
    ///
    /// # Errors
    /// When nothing answers within [`CONNECT_TIMEOUT`], or there is no trust between the two.
    pub async fn dial(&self, address: &str) -> Result<(Stream, Peer), TransportError> {
        let refused = |source| TransportError::Connect {
            address: address.to_owned(),
            source,
        };
        let connecting = async {
            let found = resolve(address, "connect to", matches!(self.way, Way::Plaintext)).await?;
            TcpStream::connect(found.as_slice()).await.map_err(refused)
        };
        let stream = within(address, "take the connection", CONNECT_TIMEOUT, connecting).await?;
        // An acknowledgement must not wait for a full packet.
        stream.set_nodelay(true).map_err(refused)?;
        match &self.way {
            Way::Plaintext => Ok((Stream::Plain(stream), Peer::Anyone)),
            Way::Tls(folder) => {
                let greeting = connect(folder.current(), stream, address);
                within(address, "finish the TLS handshake", HANDSHAKE_TIMEOUT, greeting).await
            }
        }
    }

    /// Takes a connection from `address`, and finds out who it is.
    ///
    /// # Errors
    /// When there is no trust between the two (the other end was told so), or it takes longer than
    /// [`HANDSHAKE_TIMEOUT`].
    pub async fn accept(&self, stream: TcpStream, address: &str) -> Result<(Stream, Peer), TransportError> {
        let taking = async {
            stream.set_nodelay(true).map_err(|source| TransportError::Io {
                peer: address.to_owned(),
                source,
            })?;
            let mut first = [0];
            let peeked = stream.peek(&mut first).await;
            let speaks = match peeked {
                Ok(n) => first.into_iter().take(n).next(),
                Err(source) => {
                    return Err(TransportError::Io {
                        peer: address.to_owned(),
                        source,
                    });
                }
            };
            match &self.way {
                Way::Plaintext if speaks == Some(TLS_HANDSHAKE) => {
                    Err(mixed(stream, address, "TLS", "plain TCP").await)
                }
                Way::Plaintext => Ok((Stream::Plain(stream), Peer::Anyone)),
                Way::Tls(_) if speaks == Some(MAGIC[0]) => {
                    Err(mixed(stream, address, "plain TCP", "TLS").await)
                }
                Way::Tls(folder) => accept(folder.current(), stream, address).await,
            }
        };
        within(address, "finish the TLS handshake", HANDSHAKE_TIMEOUT, taking).await
    }
}

/// Tells a peer that the two speak differently, in plain TCP: it may be able to read it.
async fn mixed(stream: TcpStream, peer: &str, theirs: &'static str, mine: &'static str) -> TransportError {
    let why = format!(
        "this node speaks {mine}, you speak {theirs}: both need certificates (--tls DIR), or on one host \
         --insecure-plaintext on both"
    );
    let mut link = Link::new(stream, peer);
    link.reject(Reject::PROTOCOL, &why).await;
    drain(link.reader.into_inner()).await;
    TransportError::Mixed {
        peer: peer.to_owned(),
        theirs,
        mine,
    }
}

/// Reads what a refused peer still sends: a socket that is closed with bytes unread takes the refusal with it.
async fn drain(from: impl tokio::io::AsyncRead + Unpin) {
    let mut rest = from.take(LINGER_BYTES);
    // However it ends, it ends.
    let _ = tokio::time::timeout(LINGER, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
}

async fn connect(tls: Arc<Tls>, stream: TcpStream, address: &str) -> Result<(Stream, Peer), TransportError> {
    let host = host_of(address);
    let name = ServerName::try_from(host.to_owned()).map_err(|e| TransportError::Address {
        address: address.to_owned(),
        source: io::Error::other(e),
    })?;
    let connected = TlsConnector::from(tls.client.clone()).connect(name, stream).await;
    let stream = connected.map_err(|source| untrusted(source, address))?;
    let stream = TlsStream::Client(stream);
    let node = who(&tls, &stream, address)?;
    if !node.has(CertRole::Store) && !node.has(CertRole::Execute) {
        return Err(TransportError::Untrusted {
            peer: address.to_owned(),
            why: format!(
                "the certificate of {address} is of {}, which is no agent: it has neither the role store nor execute",
                node.name
            ),
        });
    }
    Ok((Stream::Tls(Box::new(stream)), Peer::Node(node)))
}

async fn accept(tls: Arc<Tls>, stream: TcpStream, address: &str) -> Result<(Stream, Peer), TransportError> {
    let accepting = TlsAcceptor::from(tls.server.clone())
        .accept(stream)
        .into_fallible();
    let stream = match accepting.await {
        Ok(stream) => TlsStream::Server(stream),
        Err((source, mut stream)) => {
            // rustls has written an alert that says why; it must arrive.
            let _ = stream.shutdown().await;
            drain(stream).await;
            return Err(untrusted(source, address));
        }
    };
    let node = who(&tls, &stream, address)?;
    Ok((Stream::Tls(Box::new(stream)), Peer::Node(node)))
}

/// Who holds the certificate at the other end, and that it is of this cluster.
fn who(tls: &Tls, stream: &TlsStream<TcpStream>, address: &str) -> Result<NodeIdentity, TransportError> {
    let untrusted = |why: String| TransportError::Untrusted {
        peer: address.to_owned(),
        why,
    };
    let (_, session) = stream.get_ref();
    let shown = session.peer_certificates().and_then(|chain| chain.first());
    let Some(shown) = shown else {
        return Err(untrusted(format!("{address} shows no certificate")));
    };
    let node = tls.node(shown).map_err(|e: CertificateError| {
        untrusted(format!("{address} cannot be known by its certificate: {e}"))
    })?;
    match (&node.cluster, &tls.me.node.cluster) {
        (Some(theirs), Some(mine)) if theirs != mine => Err(untrusted(format!(
            "{address} is {} of cluster {theirs}, and this node is of cluster {mine}: is the address right?",
            node.name
        ))),
        _ => Ok(node),
    }
}

fn untrusted(source: io::Error, peer: &str) -> TransportError {
    let peer = peer.to_owned();
    match explain::handshake(&source, &peer) {
        Some(why) => TransportError::Untrusted { peer, why },
        None if source.kind() == io::ErrorKind::UnexpectedEof => TransportError::Untrusted {
            why: format!(
                "{peer} closed the connection in the TLS handshake: is it an agent, and not run with --insecure-plaintext?"
            ),
            peer,
        },
        None => TransportError::Io { peer, source },
    }
}
