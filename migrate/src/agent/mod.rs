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
//! What it never does: it never opens /dev/kvm, and it takes over nothing by itself but VMs that run under a lease.

mod authority;
#[cfg(test)]
mod authority_tests;
mod calls;
pub mod cli;
mod copy;
mod door;
mod drill;
mod drills;
mod forget;
mod gather;
mod global;
mod grants;
mod history;
mod host;
mod hot;
mod housekeep;
mod keep;
mod member;
mod metrics;
mod offer;
mod owners;
mod promote;
mod repair;
mod replicate;
mod sessions;
mod spawn;
mod systemd;
mod view;
mod watcher;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::keyfile::{self, KeyFileError};
use crate::registry::{
    AccessError, Embedded, Etcd, EtcdAccess, NodeRecord, OpenError, Registry, RegistryAddr, RegistryError,
    Remote, Role, random_id, recall,
};
use crate::store::{Durability, FsStore, Pace, StoreError};
use crate::transport::certificate::{MAX_NODE_NAME_BYTES, is_node_name};
use crate::transport::{CertRole, Identity, Peer, TransportError, in_full};
use crate::wire::Welcome;
use authority::{Asked, Denied, Owner, authorise, to_have_as_committed, whose};
use member::Member;
use sessions::Sessions;

pub use door::{MAX_CONNECTIONS, MAX_OF_NODE, MAX_STRANGERS};
pub use global::GlobalOptions;
pub use hot::{HotStandby, VmPattern};
pub use housekeep::Housekeeping;
pub use member::LEASE_TTL;
pub use offer::Offer;
pub use repair::REPLACE_AFTER;
pub use spawn::find_vmm;

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
    /// The address by which others reach it, when it is not the one it listens on.
    pub advertise: Option<String>,
    /// Who this node is; its name is the node's.
    pub identity: Identity,
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
    /// How long a holder of a VM may be gone before another takes its place.
    pub replace_after: Duration,
    /// What this host has for the devices of the VMs it takes over.
    pub offers: Vec<Offer>,
    /// How often each VM that it could take over is tried; none: only on request.
    pub drill_every: Option<Duration>,
    /// Which VMs it keeps images of.
    pub hot: HotStandby,
    /// Where committed checkpoints are kept for when no node is left.
    pub global: Option<GlobalOptions>,
    /// Where its metrics are to be had, HOST:PORT; nowhere when absent.
    pub metrics: Option<String>,
    /// The file with the keys of what it folds, keeps images of and takes over; without one it can do none of that with
    /// what is encrypted, and all else.
    pub key_file: Option<PathBuf>,
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
    /// It is to do what its certificate does not allow.
    #[error(
        "the certificate of {name} does not have the role {role}: issue one that has, or leave it out of --roles"
    )]
    Role {
        /// The node's name.
        name: String,
        /// The role.
        role: Role,
    },
    /// It is to do nothing.
    #[error(
        "the certificate of {name} has neither the role execute nor store: it is no agent's. Issue one with --role"
    )]
    NoRole {
        /// The node's name.
        name: String,
    },
    /// Nobody can reach it at the address it listens on.
    #[error("others cannot reach this node at {listen}: say the address they use with --advertise HOST:PORT")]
    Advertise {
        /// Where it listens.
        listen: String,
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
    /// The key file cannot be used.
    #[error(transparent)]
    Keys(#[from] KeyFileError),
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
    /// The port of the metrics cannot be had.
    #[error("serve metrics at {listen}: choose another HOST:PORT with --metrics")]
    Metrics {
        /// Where.
        listen: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What the connections share.
#[derive(Debug)]
struct Inner {
    name: String,
    address: String,
    identity: Identity,
    roles: Vec<Role>,
    data: PathBuf,
    store: Arc<FsStore>,
    registry: Registry,
    registry_addr: RegistryAddr,
    vmm: Option<PathBuf>,
    run_dir: PathBuf,
    restore_timeout: Option<Duration>,
    offers: Vec<Offer>,
    sessions: Sessions,
    owners: owners::Owners,
    forgetting: forget::Forgetting,
    promotes: promote::UnderWay,
    grants: grants::Grants,
    /// Held while stored bytes are checked for another agent.
    verifying: tokio::sync::Mutex<()>,
    housekeeper: housekeep::Housekeeper,
    hot: hot::Hot,
    drills: drills::Drills,
    connections: AtomicU32,
    /// The rate at which segments of other holders are copied here.
    copying: Pace,
    global: Option<global::Global>,
    metrics: metrics::Metrics,
    key_file: Option<PathBuf>,
    stop: watch::Receiver<bool>,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    inner: Arc<Inner>,
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
    joining: JoinHandle<()>,
    repairing: JoinHandle<()>,
    keeping: JoinHandle<()>,
    watching: JoinHandle<()>,
    drilling: JoinHandle<()>,
    uploading: JoinHandle<()>,
    /// Where the metrics are to be had, and who serves them.
    scraped: Option<(SocketAddr, JoinHandle<()>)>,
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
            advertise,
            identity,
            roles,
            registry,
            budget,
            vmm,
            replace,
            run_dir,
            restore_timeout,
            offers,
            housekeeping,
            labels,
            etcd: access,
            lease_ttl,
            replace_after,
            hot,
            drill_every,
            global,
            metrics,
            key_file,
        } = config;
        let name = identity.name().to_owned();
        check_name(&name)?;
        check_roles(&identity, &roles)?;
        let usable = |source| AgentError::Data {
            path: data.clone(),
            source,
        };
        let keys = keyfile::KeyFileArgs {
            key_file: key_file.clone(),
        };
        let keys = keys.keys()?;
        fs::create_dir_all(&data).map_err(usable)?;
        // The store's lock comes first: it keeps a second agent away from all that is in DATA.
        let store = {
            let dir = data.join("store");
            blocking(move || FsStore::open(&dir, budget, Durability::Durable)).await?
        };
        store.set_keys(keys);
        for damaged in store.damaged() {
            tracing::error!(file = %damaged.path.display(), why = %damaged.why, "a stored segment is damaged: set aside");
        }
        let grants = grants::Grants::open(&data).map_err(usable)?;
        let id = node_id(&data).map_err(usable)?;
        let seen = recall(&data.join(member::SEEN));
        let backend = match &registry {
            RegistryAddr::Embedded => {
                let path = data.join("registry.redb");
                Registry::after(blocking(move || Embedded::open(&path)).await?, seen)
            }
            RegistryAddr::Agent(address) => Registry::after(Remote::new(address, &identity), seen),
            RegistryAddr::Etcd(etcd) => Registry::after(Etcd::new(etcd, &access)?, seen),
        };
        let listener = identity.listen(&wanted).await?;
        let bound = listener.local_addr().map_err(usable)?;
        let metrics = match metrics {
            Some(wanted) => Some(metrics::listen(&wanted).await?),
            None => None,
        };
        let address = match advertise {
            Some(address) => address,
            None if bound.ip().is_unspecified() => return Err(AgentError::Advertise { listen: wanted }),
            None => bound.to_string(),
        };

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
        let (max_links, rate) = (housekeeping.max_links, housekeeping.rate);
        let copying = housekeeping
            .rate
            .map_or_else(Pace::unlimited, Pace::bytes_per_second);
        let housekeeper = housekeep::Housekeeper::new(housekeeping, &data).map_err(usable)?;
        let hot = hot::Hot::open(hot, &data).map_err(usable)?;
        let drills = drills::Drills::open(drill_every, &data);
        let lease = member::join(&backend, &node, replace, lease_ttl).await?;
        let (stop, stopped) = watch::channel(false);
        let owners = owners::Owners::new(data.join("owners"));
        let inner = Arc::new(Inner {
            name,
            address,
            identity,
            roles,
            run_dir: run_dir.unwrap_or_else(|| data.join("run")),
            restore_timeout,
            offers,
            data,
            store,
            registry: backend.clone(),
            registry_addr: registry,
            vmm,
            owners,
            sessions: Sessions::default(),
            forgetting: forget::Forgetting::default(),
            promotes: promote::UnderWay::default(),
            grants,
            verifying: tokio::sync::Mutex::default(),
            housekeeper,
            hot,
            drills,
            connections: AtomicU32::new(0),
            copying,
            global: global.map(|options| global::Global::new(options, max_links, rate)),
            metrics: metrics::Metrics::new(lease_ttl),
            key_file,
            stop: stopped,
        });
        inner.metrics.joined(lease.is_some());
        hot::start(&inner).map_err(|source| AgentError::Data {
            path: inner.data.clone(),
            source,
        })?;
        let uploading = tokio::spawn(global::run(inner.clone()));
        let watching = tokio::spawn(watcher::run(inner.clone()));
        let drilling = tokio::spawn(drills::run(inner.clone()));
        let keeping = tokio::spawn(housekeep::run(inner.clone()));
        let repairing = tokio::spawn(repair::run(inner.clone(), replace_after));
        let member = Member {
            inner: inner.clone(),
            node,
            replace,
            ttl: lease_ttl,
        };
        let joining = tokio::spawn(member.keep(lease));
        let accepting = tokio::spawn(door::accept(inner.clone(), listener));
        let scraped =
            metrics.map(|(listener, at)| (at, tokio::spawn(metrics::serve(inner.clone(), listener))));
        tracing::info!(node = %inner.name, address = %inner.address, registry = %inner.registry_addr, "agent up");
        Ok(Self {
            inner,
            stop,
            accepting,
            joining,
            keeping,
            repairing,
            watching,
            drilling,
            uploading,
            scraped,
        })
    }

    /// Where it listens, as HOST:PORT.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.inner.address
    }

    /// Where its metrics are to be had.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.scraped.as_ref().map(|(address, _)| *address)
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

    /// Reads the key file again; one that cannot be read is told in the log, and the keys stay as they were.
    pub fn reload_keys(&self) {
        let Some(path) = &self.inner.key_file else { return };
        match keyfile::read(path) {
            Ok(keys) => {
                tracing::info!(file = %path.display(), keys = keys.keys().len(), "the key file was read again");
                self.inner.store.set_keys(keys);
                // What could not be merged for want of a key may be now.
                self.inner.housekeeper.look_again();
            }
            Err(error) => {
                let error = in_full(&error);
                tracing::error!(%error, "the key file cannot be used: the keys stay as they were");
            }
        }
    }

    /// Ends the connections and releases the port and the store; VMs it started go on.
    pub async fn stop(mut self) {
        let _ = self.stop.send(true);
        self.repairing.abort();
        self.inner.copying.stop();
        self.inner.housekeeper.stop();
        self.inner.hot.stop();
        let agent = self.inner.clone();
        let _ = tokio::task::spawn_blocking(move || agent.hot.join()).await;
        if let Some(global) = &self.inner.global {
            global.stop();
        }
        self.uploading.abort();
        // A takeover that is under way has a task of its own.
        self.watching.abort();
        let _ = tokio::time::timeout(SHUTDOWN, self.drilling).await;
        let _ = tokio::time::timeout(SHUTDOWN, self.keeping).await;
        // Gives the lease back, so that everyone knows at once.
        if tokio::time::timeout(SHUTDOWN, &mut self.joining).await.is_err() {
            self.joining.abort();
        }
        let _ = self.accepting.await;
        if let Some((_, scraped)) = self.scraped {
            let _ = tokio::time::timeout(SHUTDOWN, scraped).await;
        }
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
    if !is_node_name(name) {
        return Err(AgentError::Name {
            name: name.chars().take(80).collect(),
        });
    }
    Ok(())
}

/// A node does what its certificate allows.
fn check_roles(identity: &Identity, roles: &[Role]) -> Result<(), AgentError> {
    let Some(certificate) = identity.certificate() else {
        return Ok(());
    };
    let allowed = |role: &Role| {
        certificate.node.has(match role {
            Role::Execute => CertRole::Execute,
            Role::Store => CertRole::Store,
        })
    };
    if roles.is_empty() {
        return Err(AgentError::NoRole {
            name: certificate.node.name.clone(),
        });
    }
    match roles.iter().find(|role| !allowed(role)) {
        Some(role) => Err(AgentError::Role {
            name: certificate.node.name.clone(),
            role: *role,
        }),
        None => Ok(()),
    }
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

/// What an agent says of itself.
fn welcome(inner: &Inner, version: u16) -> Welcome {
    Welcome {
        version,
        node: inner.name.clone(),
        registry: match &inner.registry_addr {
            RegistryAddr::Embedded | RegistryAddr::Etcd(_) => None,
            RegistryAddr::Agent(address) => Some(address.clone()),
        },
        software: software(),
    }
}

impl Inner {
    /// Whether `peer` may have what it asks; logged when it may not.
    async fn judge(&self, peer: &Peer, asked: Asked<'_>) -> Result<(), Denied> {
        let owner = match (peer, whose(asked)) {
            (Peer::Node(node), Some((vm, generation))) => {
                let unless_of = to_have_as_committed(asked).then_some(node.name.as_str());
                self.owners.of(&self.registry, vm, generation, unless_of).await
            }
            (Peer::Node(_), None) | (Peer::Anyone, _) => Owner::Unknown,
        };
        let verdict = authorise(&self.name, peer, asked, &owner);
        if let Err(Denied::Never(why)) = &verdict {
            tracing::warn!(%peer, why, "refused");
        }
        verdict
    }
}

/// What this build calls itself.
fn software() -> String {
    concat!("standby ", env!("CARGO_PKG_VERSION")).to_owned()
}
