//! The standby daemon: keeps segments durably for owners elsewhere, and runs their VMs when they are gone.
//!
//! ```text
//!                     +-- Ship: replicate (Receiver, disk thread) --+
//!   accept -- Hello --+                                             +--> FsStore DATA/store
//!                     +-- Call: calls -- promote -- spawn vmm ------+--> Registry DATA/registry.redb or HOST:PORT
//! ```
//!
//! Invariants: what was acknowledged is durable; one process per data directory (the store's lock); connections, what
//! each may queue and what each may send are bounded; a VM it starts is a process of its own that outlives it.
//!
//! What it never does: it never opens /dev/kvm, and it promotes nothing that nobody asked it to.

mod calls;
pub mod cli;
mod forget;
mod gather;
mod housekeep;
mod keep;
mod member;
mod promote;
mod replicate;
mod sessions;
mod spawn;
mod view;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::places::{Place, Places};
use crate::registry::{
    AccessError, Embedded, Etcd, EtcdAccess, NodeRecord, OpenError, Registry, RegistryAddr, RegistryError,
    Remote, Role, random_id, recall,
};
use crate::store::{Durability, FsStore, StoreError};
use crate::transport::{ByteStream, Link, TransportError, expect_hello, in_full, listen};
use crate::wire::{Message, Purpose, Reject, Welcome};
use member::Member;
use sessions::Sessions;

pub use housekeep::Housekeeping;
pub use member::LEASE_TTL;
pub use spawn::find_vmm;

/// The most connections at once.
pub const MAX_CONNECTIONS: usize = 256;
/// The longest name of a node, in bytes.
pub const MAX_NODE_NAME_BYTES: usize = 64;
/// How long the end waits for connections.
const SHUTDOWN: Duration = Duration::from_secs(2);
/// How long accepting pauses after it failed (too many open files).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// How to run an agent.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Where to listen, HOST:PORT.
    pub listen: String,
    /// The data directory.
    pub data: PathBuf,
    /// The node's name.
    pub name: String,
    /// What it does.
    pub roles: Vec<Role>,
    /// Where the registry is.
    pub registry: RegistryAddr,
    /// The most bytes its segments may take.
    pub budget: Option<u64>,
    /// The `vmm` binary; found beside this one or in the PATH when absent.
    pub vmm: Option<PathBuf>,
    /// Take the name over from a node that is gone for good.
    pub replace: bool,
    /// Where the VMs it starts have their control sockets; `run` in the data directory when absent.
    pub run_dir: Option<PathBuf>,
    /// How long a VM that is taken over may take to run; by the length of its chain when absent.
    pub restore_timeout: Option<Duration>,
    /// What it keeps, and how it looks after that.
    pub housekeeping: Housekeeping,
    /// What placement chooses by.
    pub labels: BTreeMap<String, String>,
    /// How an etcd is reached that does not let everyone in.
    pub etcd: EtcdAccess,
    /// How long after its last sign of life the node counts as gone.
    pub lease_ttl: Duration,
}

/// Why an agent did not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The name is none.
    #[error(
        "{name:?} is no name for a node: use 1 to {MAX_NODE_NAME_BYTES} of letters, digits, '.', '_' and '-'"
    )]
    Name {
        /// As it was given.
        name: String,
    },
    /// The data directory cannot be used.
    #[error("use the data directory {}", path.display())]
    Data {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The registry cannot be opened.
    #[error(transparent)]
    Registry(#[from] OpenError),
    /// What etcd is reached with cannot be read.
    #[error(transparent)]
    Etcd(#[from] AccessError),
    /// The registry refuses this node.
    #[error("the registry refuses this node: {0}")]
    Refused(RegistryError),
    /// The port cannot be had.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// What the connections share.
#[derive(Debug)]
struct Inner {
    name: String,
    address: String,
    roles: Vec<Role>,
    data: PathBuf,
    store: Arc<FsStore>,
    registry: Registry,
    registry_addr: RegistryAddr,
    vmm: Option<PathBuf>,
    run_dir: PathBuf,
    restore_timeout: Option<Duration>,
    sessions: Sessions,
    promotes: promote::UnderWay,
    forgetting: forget::Forgetting,
    /// Held while stored bytes are checked for another agent.
    verifying: tokio::sync::Mutex<()>,
    housekeeper: housekeep::Housekeeper,
    connections: AtomicU32,
    stop: watch::Receiver<bool>,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    inner: Arc<Inner>,
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
    joining: JoinHandle<()>,
    keeping: JoinHandle<()>,
}

impl Agent {
    /// Opens the store and the registry, listens, and joins the cluster.
    ///
    /// # Errors
    /// When any of it fails; nothing runs then.
    pub async fn start(config: AgentConfig) -> Result<Self, AgentError> {
        let AgentConfig {
            listen: wanted,
            data,
            name,
            roles,
            registry,
            budget,
            vmm,
            replace,
            run_dir,
            restore_timeout,
            housekeeping,
            labels,
            etcd: access,
            lease_ttl,
        } = config;
        check_name(&name)?;
        let usable = |source| AgentError::Data {
            path: data.clone(),
            source,
        };
        fs::create_dir_all(&data).map_err(usable)?;
        // The store's lock comes first: it keeps a second agent away from all that is in DATA.
        let store = {
            let dir = data.join("store");
            blocking(move || FsStore::open(&dir, budget, Durability::Durable)).await?
        };
        for damaged in store.damaged() {
            tracing::error!(file = %damaged.path.display(), why = %damaged.why, "a stored segment is damaged: set aside");
        }
        let id = node_id(&data).map_err(usable)?;
        let seen = recall(&data.join(member::SEEN));
        let backend = match &registry {
            RegistryAddr::Embedded => {
                let path = data.join("registry.redb");
                Registry::after(blocking(move || Embedded::open(&path)).await?, seen)
            }
            RegistryAddr::Agent(address) => Registry::after(Remote::new(address, &name), seen),
            RegistryAddr::Etcd(etcd) => Registry::after(Etcd::new(etcd, &access)?, seen),
        };
        let listener = listen(&wanted).await?;
        let address = listener.local_addr().map_err(usable)?.to_string();

        let node = NodeRecord {
            name: name.clone(),
            address: address.clone(),
            id,
            roles: roles.iter().map(Role::to_string).collect(),
            labels,
            joined_unix_ms: 0,
            total_bytes: None,
            free_bytes: None,
            draining: None,
            alive: None,
        };
        let housekeeper = housekeep::Housekeeper::new(housekeeping, &data).map_err(usable)?;
        let lease = member::join(&backend, &node, replace, lease_ttl).await?;
        let (stop, stopped) = watch::channel(false);
        let inner = Arc::new(Inner {
            name,
            address,
            roles,
            run_dir: run_dir.unwrap_or_else(|| data.join("run")),
            restore_timeout,
            data,
            store,
            registry: backend.clone(),
            registry_addr: registry,
            vmm,
            sessions: Sessions::default(),
            promotes: promote::UnderWay::default(),
            forgetting: forget::Forgetting::default(),
            verifying: tokio::sync::Mutex::default(),
            housekeeper,
            connections: AtomicU32::new(0),
            stop: stopped,
        });
        let keeping = tokio::spawn(housekeep::run(inner.clone()));
        let member = Member {
            inner: inner.clone(),
            node,
            replace,
            ttl: lease_ttl,
        };
        let joining = tokio::spawn(member.keep(lease));
        let accepting = tokio::spawn(accept(inner.clone(), listener));
        tracing::info!(node = %inner.name, address = %inner.address, registry = %inner.registry_addr, "agent up");
        Ok(Self {
            inner,
            stop,
            accepting,
            joining,
            keeping,
        })
    }

    /// Where it listens, as HOST:PORT.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.inner.address
    }

    /// Its registry.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    /// Its store.
    #[must_use]
    pub fn store(&self) -> &Arc<FsStore> {
        &self.inner.store
    }

    /// Ends the connections and releases the port and the store; VMs it started go on.
    pub async fn stop(mut self) {
        let _ = self.stop.send(true);
        self.inner.housekeeper.stop();
        let _ = tokio::time::timeout(SHUTDOWN, self.keeping).await;
        // Gives the lease back, so that everyone knows at once.
        if tokio::time::timeout(SHUTDOWN, &mut self.joining).await.is_err() {
            self.joining.abort();
        }
        let _ = self.accepting.await;
        // The disks' threads hold the store: they end when their connections did.
        let released = async {
            while Arc::strong_count(&self.inner.store) > 1 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let _ = tokio::time::timeout(SHUTDOWN, released).await;
    }
}

/// Runs something that waits for the disk outside of the tasks.
async fn blocking<T: Send + 'static, E: Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // It panicked; that is not to be hidden.
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

fn check_name(name: &str) -> Result<(), AgentError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > MAX_NODE_NAME_BYTES || !name.bytes().all(allowed) {
        return Err(AgentError::Name {
            name: name.chars().take(80).collect(),
        });
    }
    Ok(())
}

/// The id of the data directory, made when there is none.
fn node_id(data: &Path) -> io::Result<[u8; 16]> {
    let path = data.join("node-id");
    let read = |text: String| -> Option<[u8; 16]> {
        let number = u128::from_str_radix(text.trim(), 16).ok()?;
        Some(number.to_be_bytes())
    };
    match fs::read_to_string(&path) {
        Ok(text) => read(text).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} is damaged: remove it", path.display()),
            )
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let id = random_id();
            // Not worth a crash-safe write: lost, the node is a new one at its old address.
            fs::write(&path, format!("{:032x}\n", u128::from_be_bytes(id)))?;
            Ok(id)
        }
        Err(e) => Err(e),
    }
}

async fn accept(inner: Arc<Inner>, listener: TcpListener) {
    let places = Places::new(MAX_CONNECTIONS);
    let mut connections = JoinSet::new();
    let mut stop = inner.stop.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.changed() => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let Some(place) = places.try_enter(&peer.ip().to_string()) else {
            tracing::warn!(%peer, "refused: {MAX_CONNECTIONS} connections are at work");
            tokio::spawn(async move {
                let why = format!("{MAX_CONNECTIONS} connections are at work here: try again later");
                Link::new(stream, "peer").reject(Reject::BUSY, &why).await;
            });
            continue;
        };
        let (inner, mut stop, peer) = (inner.clone(), stop.clone(), peer.to_string());
        connections.spawn(async move {
            inner.connections.fetch_add(1, Ordering::Relaxed);
            tokio::select! {
                () = greeted(&inner, stream, &peer, &place) => {}
                () = place.given_away() => tracing::debug!(peer, "idle: its place was given to another"),
                _ = stop.changed() => {}
            }
            inner.connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
    drop(listener);
    // All of them: their tasks end by `stop`.
    let all = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(SHUTDOWN, all).await;
}

async fn greeted(inner: &Arc<Inner>, stream: TcpStream, peer: &str, place: &Place) {
    if let Err(error) = stream.set_nodelay(true) {
        return tracing::debug!(peer, %error, "a connection broke at once");
    }
    if let Err(error) = serve(inner, stream, peer, place).await {
        tracing::debug!(peer, error = %in_full(&error), "a connection ended");
    }
}

async fn serve<S: ByteStream>(
    inner: &Arc<Inner>,
    stream: S,
    peer: &str,
    place: &Place,
) -> Result<(), TransportError> {
    let mut link = Link::new(stream, peer);
    let (hello, version) = expect_hello(&mut link, "").await?;
    let welcome = Welcome {
        version,
        node: inner.name.clone(),
        registry: match &inner.registry_addr {
            RegistryAddr::Embedded | RegistryAddr::Etcd(_) => None,
            RegistryAddr::Agent(address) => Some(address.clone()),
        },
        software: software(),
    };
    link.writer.send(0, &Message::Welcome(welcome)).await?;
    match hello.purpose {
        Purpose::Ship => {
            // An owner that is silent is dead, and its connection ended by that.
            let _busy = place.busy();
            replicate::serve(inner.clone(), link).await;
            Ok(())
        }
        Purpose::Call => calls::serve(inner.clone(), link, place).await,
    }
}

/// What this build calls itself.
fn software() -> String {
    concat!("standby ", env!("CARGO_PKG_VERSION")).to_owned()
}
