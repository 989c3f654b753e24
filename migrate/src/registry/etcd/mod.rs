//! The registry of a cluster: etcd, through its JSON gateway.
//!
//! ```text
//!   request -- read its records (linearizable) -- rules -- one transaction guarded by their revisions
//!                        ^                                    |
//!                        +------ somebody changed one --------+
//! ```
//!
//! Invariants: nothing is decided by what was read without the transaction saying that it is still so; no read is
//! served by a member alone (they are all linearizable); an answer from the past is refused.
//!
//! A lease is etcd's own, with the key of its subject bound to it. A renewal counts only when, after it, the same member
//! answered a linearizable read in the same raft term: a leader that was deposed without knowing it may still say yes to
//! a renewal, but cannot answer that read. Whoever leads next holds every lease for its whole time from its election.

mod access;
mod gateway;
mod keys;
mod lease;
mod lists;
mod records;
mod watch;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use segment::{SegmentName, VmId};

use super::addr::{EtcdAccess, EtcdAddr};
use super::changes::ChangeLog;
use super::embedded::{decode, encode};
use super::request::{RegistryRequest, RegistryResponse};
use super::types::{LeaseRecord, LeaseSubject, LiveLease, MAX_WAIT_MS, NodeRecord, VmRecord};
use super::{Answer, Answered, Backend, RegistryError, rules};
use access::Access;
pub use access::AccessError;
use gateway::{Gateway, GatewayError, Said};
use keys::{Keys, Kv, Range, Tip, Txn, range_of};

/// How often a change is tried anew when others change the same records.
const MAX_TRIES: usize = 16;
/// How long a request may take in all.
const DEADLINE: Duration = Duration::from_secs(15);

type Done<T> = Result<T, RegistryError>;

/// A registry in etcd.
pub struct Etcd {
    inner: Arc<Inner>,
    // The task that hears of changes; begun when changes are first asked for.
    watching: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

struct Inner {
    gateway: Gateway,
    keys: Keys,
    log: ChangeLog,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Etcd({})", self.inner.gateway.address())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let watching = self.watching.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = watching.take() {
            task.abort();
        }
    }
}

impl Etcd {
    /// Of the etcd at `addr`. Connects when it is first asked.
    ///
    /// # Errors
    /// When a certificate, key or password cannot be read.
    pub fn new(addr: &EtcdAddr, access: &EtcdAccess) -> Result<Self, AccessError> {
        let inner = Inner {
            gateway: Gateway::new(addr, Access::read(access)?),
            keys: Keys::new(&addr.prefix),
            log: ChangeLog::new(0),
        };
        Ok(Self {
            inner: Arc::new(inner),
            watching: Mutex::new(None),
        })
    }

    fn watch(&self) {
        let mut watching = self.watching.lock().unwrap_or_else(PoisonError::into_inner);
        if watching.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) {
            *watching = Some(tokio::spawn(watch::run(Arc::clone(&self.inner))));
        }
    }
}

impl Backend for Etcd {
    fn call(&self, request: RegistryRequest) -> Answer<'_> {
        Box::pin(async move {
            let inner = &self.inner;
            let outcome = match request {
                RegistryRequest::AwaitChanges { after, wait_ms } => {
                    self.watch();
                    let wait = Duration::from_millis(wait_ms.min(MAX_WAIT_MS).into());
                    let changes = inner.log.await_after(after, wait).await;
                    Ok(RegistryResponse::Changes(changes))
                }
                request => match tokio::time::timeout(DEADLINE, inner.apply(request)).await {
                    Ok(outcome) => outcome,
                    Err(_) => Err(inner.away(format!("no answer within {} s", DEADLINE.as_secs()))),
                },
            };
            let stamp = match &outcome {
                Err(RegistryError::Unavailable { .. } | RegistryError::Past { .. }) => None,
                _ => inner.gateway.seen.floor(),
            };
            Answered { outcome, stamp }
        })
    }

    fn address(&self) -> String {
        self.inner.gateway.address().to_owned()
    }
}

/// What a transaction answered.
struct Committed {
    /// False: something was not as it was read, and nothing was done.
    done: bool,
    ranges: Vec<Range>,
    said: Said,
}

impl Inner {
    async fn apply(&self, request: RegistryRequest) -> Done<RegistryResponse> {
        rules::check(&request)?;
        if let Some(vm) = rules::vm_of(&request).cloned() {
            return self.change_vm(&vm, &request).await;
        }
        match request {
            RegistryRequest::JoinNode { node, replace } => self.join(node, replace).await,
            RegistryRequest::SetDraining { name, draining } => self.set_draining(&name, draining).await,
            RegistryRequest::LeaveNode { name, force } => self.leave(&name, force).await,
            RegistryRequest::ListNodes { after, limit } => self.list_nodes(after.as_deref(), limit).await,
            create @ RegistryRequest::CreateVm { .. } => self.create(create).await,
            RegistryRequest::GetVm { vm } => {
                let found = self.read_vm(&vm).await?;
                let (record, _) = found.record.ok_or(RegistryError::NoSuchVm { vm })?;
                Ok(RegistryResponse::Vm(record))
            }
            RegistryRequest::ListVms { after, limit } => self.list_vms(after.as_ref(), limit).await,
            RegistryRequest::ForgetVm { vm, force } => self.forget(&vm, force).await,
            RegistryRequest::Note { vm, entry } => self.note(&vm, entry).await,
            RegistryRequest::History { vm } => Ok(RegistryResponse::History(self.read_history(&vm).await?.0)),
            RegistryRequest::RegisterSegments {
                vm,
                generation,
                segments,
            } => self.register(&vm, generation, segments).await,
            RegistryRequest::ListSegments { vm, after, limit } => {
                self.list_segments(&vm, after.as_ref(), limit).await
            }
            RegistryRequest::GrantLease {
                subject,
                ttl_ms,
                lease,
            } => self.grant(subject, ttl_ms, lease).await,
            RegistryRequest::KeepAlive { subject, lease } => self.keep_alive(&subject, lease).await,
            RegistryRequest::RevokeLease { subject, lease } => self.revoke(&subject, lease).await,
            other @ (RegistryRequest::AwaitChanges { .. }
            | RegistryRequest::RaiseGeneration { .. }
            | RegistryRequest::SetHolders { .. }
            | RegistryRequest::SetSwap { .. }
            | RegistryRequest::SetFailover { .. }
            | RegistryRequest::SetVmState { .. }) => {
                rules::invalid(format!("a request in the wrong place: {other:.40?}"))
            }
        }
    }

    fn away(&self, why: String) -> RegistryError {
        RegistryError::Unavailable {
            address: self.gateway.address().to_owned(),
            why,
        }
    }

    fn error(&self, error: GatewayError) -> RegistryError {
        match error {
            GatewayError::Away(why) => self.away(why),
            GatewayError::Registry(error) => error,
            GatewayError::NotFound => RegistryError::Storage {
                why: "etcd lacks something that was just there".into(),
            },
            GatewayError::Exists => RegistryError::Storage {
                why: "etcd has something already that was just drawn".into(),
            },
        }
    }

    fn damaged(&self, what: &str) -> RegistryError {
        RegistryError::Storage {
            why: format!(
                "etcd at {} has {what} that cannot be read: does something else write below this prefix?",
                self.gateway.address()
            ),
        }
    }

    /// One transaction, at whichever member answers.
    async fn commit(&self, txn: &Txn) -> Done<Committed> {
        let said = self.gateway.keys("kv/txn", &txn.json()).await;
        self.committed(said.map_err(|e| self.error(e))?)
    }

    fn committed(&self, said: Said) -> Done<Committed> {
        let odd = || self.error(self.gateway.odd("an answer that is none"));
        let done = said.body["succeeded"].as_bool().unwrap_or(false);
        let responses = match said.body.get("responses") {
            None => &[],
            Some(all) => all.as_array().ok_or_else(odd)?.as_slice(),
        };
        let ranges = responses.iter().filter_map(|r| r.get("response_range"));
        let ranges = ranges.map(range_of).collect::<Option<_>>().ok_or_else(odd)?;
        Ok(Committed { done, ranges, said })
    }

    /// A transaction of reads only: each range, in order.
    async fn read<const N: usize>(&self, txn: &Txn) -> Done<[Range; N]> {
        let committed = self.commit(txn).await?;
        self.ranges(committed)
    }

    fn ranges<const N: usize>(&self, committed: Committed) -> Done<[Range; N]> {
        let odd = || self.error(self.gateway.odd("fewer answers than were asked for"));
        committed.ranges.try_into().map_err(|_| odd())
    }

    /// The lease that a key of leases stands for.
    fn lease_of(&self, kv: Option<&Kv>) -> Done<Option<(LeaseSubject, LiveLease)>> {
        let Some(kv) = kv else { return Ok(None) };
        let (record, lease) = split_lease(&kv.value).ok_or_else(|| self.damaged("a lease"))?;
        let live = LiveLease {
            lease,
            ttl_ms: record.ttl_ms,
        };
        Ok(Some((record.subject, live)))
    }
}

/// A lease's value: its number, then the record.
fn join_lease(lease: u64, record: &LeaseRecord) -> Vec<u8> {
    let mut bytes = lease.to_be_bytes().to_vec();
    bytes.extend(encode(record));
    bytes
}

fn split_lease(bytes: &[u8]) -> Option<(LeaseRecord, u64)> {
    let (number, record) = bytes.split_first_chunk::<8>()?;
    Some((decode(record).ok()?, u64::from_be_bytes(*number)))
}

/// A record as it is kept: without what changes with every checkpoint, and without the lease.
fn kept(record: &VmRecord) -> Vec<u8> {
    encode(&VmRecord {
        newest: None,
        alive: None,
        ..record.clone()
    })
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

/// The VM's record with what is kept beside it.
fn whole(mut record: VmRecord, tip: &Tip, lease: Option<(LeaseSubject, LiveLease)>) -> VmRecord {
    record.newest.clone_from(&tip.newest);
    record.alive = match lease {
        Some((LeaseSubject::Owner { vm, generation }, live))
            if vm == record.vm && generation == record.generation =>
        {
            Some(live)
        }
        Some(_) | None => None,
    };
    record
}

fn living(mut node: NodeRecord, lease: Option<(LeaseSubject, LiveLease)>) -> NodeRecord {
    node.alive = match lease {
        Some((LeaseSubject::Node { name, id }, live)) if name == node.name && id == node.id => Some(live),
        Some(_) | None => None,
    };
    node
}

/// A segment's place in the order of its VM's.
fn place(name: &SegmentName) -> (u64, u64) {
    super::types::position(name)
}

fn id_of(key: &str, folder: &str) -> Option<VmId> {
    VmId::new(key.strip_prefix(folder)?).ok()
}
