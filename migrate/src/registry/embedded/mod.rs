//! The registry of one machine: a redb file.
//!
//! Tables: `meta` (format, id, revision), `nodes` (name), `vms` (id), `retired` (id -> last generation of a forgotten
//! VM), `segments` (id, generation, epoch), `counts` (of a VM's segments), `leases` (number), `history` (id). Values are CBOR maps with explicit keys, so that a newer build may add fields.

mod change;
mod leases;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use segment::{SegmentName, VmId};

use super::changes::ChangeLog;
use super::request::{RegistryRequest, RegistryResponse};
use super::seen::Stamp;
use super::types::{
    HistoryEntry, Lease, LeaseSubject, MAX_PAGE_RECORDS, MAX_WAIT_MS, NodeRecord, SegmentRecord, VmRecord,
    position,
};
use super::{Answer, Answered, Backend, RegistryError, random_id, rules};
use change::{Change, LeaseChange};
use leases::{Key, Leases};

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const NODES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("nodes");
const VMS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("vms");
const RETIRED: TableDefinition<'_, &str, u64> = TableDefinition::new("retired");
const SEGMENTS: TableDefinition<'_, (&str, u64, u64), &[u8]> = TableDefinition::new("segments");
/// The leases that were granted and not given back: number to whom and how long.
const LEASES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("leases");
/// How many segment records each VM has: counting them would walk them all.
const COUNTS: TableDefinition<'_, &str, u64> = TableDefinition::new("counts");
/// What happened to each VM.
const HISTORY: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("history");

/// The format of the tables.
const FORMAT: u64 = 1;
/// The most bytes of records in one answer, so that it fits into a frame whatever the records are.
pub(super) const MAX_PAGE_BYTES: usize = 2 << 20;
/// The shortest wait for changes: a lease that runs out this moment is looked at again just after it.
const MIN_WAIT: Duration = Duration::from_millis(2);

/// Why a registry file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("the registry {} is in use by another process: is an agent with this --data running already?", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// It is not a registry, or damaged.
    #[error(
        "the registry {} cannot be read: put a copy back, or move it away to begin with an empty one (the segments \
         are not in it; running VMs then have to be created again)",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It was written by a newer build.
    #[error("the registry {} has format {found}, and this build knows {FORMAT}: use a newer standby", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
}

/// The registry in a file of this process.
#[derive(Clone)]
pub struct Embedded {
    // Shared with the blocking threads that run the transactions; redb itself lets one write at a time.
    db: Arc<Database>,
    path: Arc<PathBuf>,
    id: u64,
    // Renewals change it without a transaction; transactions hold it until they are durable.
    leases: Arc<Mutex<Leases>>,
    log: Arc<ChangeLog>,
}

/// What is found in the file at the start.
struct Init {
    format: u64,
    id: u64,
    revision: u64,
    leases: Vec<(u64, Vec<u8>)>,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Embedded({})", self.path.display())
    }
}

impl Embedded {
    /// Opens or makes the registry at `path`.
    ///
    /// # Errors
    /// When another process has it, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let damaged = |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Damaged {
            path: path.to_owned(),
            source,
        };
        let opened = Database::create(path);
        let db = match opened {
            Ok(db) => db,
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
                return Err(OpenError::Locked {
                    path: path.to_owned(),
                });
            }
            Err(e) => return Err(damaged(Box::new(e))),
        };
        let init = || -> Result<Init, redb::Error> {
            let txn = db.begin_write()?;
            let found = {
                let mut meta = txn.open_table(META)?;
                txn.open_table(NODES)?;
                txn.open_table(VMS)?;
                txn.open_table(RETIRED)?;
                txn.open_table(SEGMENTS)?;
                txn.open_table(COUNTS)?;
                txn.open_table(HISTORY)?;
                let leases = txn.open_table(LEASES)?;
                let kept = leases
                    .iter()?
                    .map(|item| item.map(|(id, bytes)| (id.value(), bytes.value().to_vec())));
                let leases = kept.collect::<Result<_, _>>()?;
                let mut first = |key: &str, value: u64| -> Result<u64, redb::Error> {
                    if let Some(known) = meta.get(key)?.map(|v| v.value()) {
                        return Ok(known);
                    }
                    meta.insert(key, value)?;
                    Ok(value)
                };
                let random = random_id();
                Init {
                    format: first("format", FORMAT)?,
                    id: first("id", u64::from_le_bytes(std::array::from_fn(|i| random[i])))?,
                    revision: first("revision", 1)?,
                    leases,
                }
            };
            txn.commit()?;
            Ok(found)
        };
        let Init {
            format: found,
            id,
            revision,
            leases: kept,
        } = init().map_err(|e| damaged(Box::new(e)))?;
        if found > FORMAT {
            return Err(OpenError::Newer {
                path: path.to_owned(),
                found,
            });
        }
        let mut leases = Leases::default();
        for (lease, bytes) in kept {
            let record = decode(&bytes).map_err(|e| damaged(Box::new(e)))?;
            leases.grant(lease, record, Instant::now());
        }
        Ok(Self {
            db: Arc::new(db),
            path: Arc::new(path.to_owned()),
            id,
            leases: Arc::new(Mutex::new(leases)),
            log: Arc::new(ChangeLog::new(revision)),
        })
    }

    fn leases(&self) -> MutexGuard<'_, Leases> {
        // No half-done state between two statements that could panic.
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers `request` in one transaction; blocks for the disk.
    ///
    /// # Errors
    /// What the request is refused for; nothing was changed then.
    pub fn apply(&self, request: RegistryRequest) -> Result<RegistryResponse, RegistryError> {
        rules::check(&request)?;
        match request {
            RegistryRequest::ListNodes { after, limit } => {
                let txn = self.db.begin_read().map_err(storage)?;
                let table = txn.open_table(NODES).map_err(storage)?;
                let (mut nodes, more) = page::<NodeRecord>(&table, after.as_deref(), limit)?;
                let (leases, now) = (self.leases(), Instant::now());
                for node in &mut nodes {
                    let live = leases.live(&Key::Node(node.name.clone()), now);
                    node.alive = live.map(|(live, _)| live);
                }
                Ok(RegistryResponse::Nodes(nodes, more))
            }
            RegistryRequest::GetVm { vm } => {
                let txn = self.db.begin_read().map_err(storage)?;
                let table = txn.open_table(VMS).map_err(storage)?;
                let record = read_vm(&table, &vm)?.ok_or(RegistryError::NoSuchVm { vm })?;
                Ok(RegistryResponse::Vm(self.with_lease(record)))
            }
            RegistryRequest::ListVms { after, limit } => {
                let txn = self.db.begin_read().map_err(storage)?;
                let table = txn.open_table(VMS).map_err(storage)?;
                let (vms, more) = page(&table, after.as_ref().map(VmId::as_str), limit)?;
                let vms = vms.into_iter().map(|vm| self.with_lease(vm)).collect();
                Ok(RegistryResponse::Vms(vms, more))
            }
            RegistryRequest::ListSegments { vm, after, limit } => {
                self.list_segments(&vm, after.as_ref(), limit)
            }
            RegistryRequest::History { vm } => {
                let txn = self.db.begin_read().map_err(storage)?;
                let vms = txn.open_table(VMS).map_err(storage)?;
                read_vm(&vms, &vm)?.ok_or(RegistryError::NoSuchVm { vm: vm.clone() })?;
                let table = txn.open_table(HISTORY).map_err(storage)?;
                Ok(RegistryResponse::History(read_history(&table, &vm)?))
            }
            RegistryRequest::KeepAlive { subject, lease } => self.keep_alive(&subject, lease),
            RegistryRequest::AwaitChanges { .. } => Err(RegistryError::Invalid {
                why: "a question that waits among those that do not".into(),
            }),
            change => {
                let response = self.transact(|txn| txn.apply(change))?;
                Ok(match response {
                    RegistryResponse::Vm(record) => RegistryResponse::Vm(self.with_lease(record)),
                    RegistryResponse::Lease(lease, Some(record)) => {
                        RegistryResponse::Lease(lease, Some(self.with_lease(record)))
                    }
                    other => other,
                })
            }
        }
    }

    fn transact<T>(
        &self,
        work: impl FnOnce(&mut Change<'_>) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_millis() as u64);
        // Held until the change is durable: a renewal comes wholly before it or wholly after it.
        let mut leases = self.leases();
        let txn = self.db.begin_write().map_err(storage)?;
        let mut change = Change {
            txn: &txn,
            leases: &leases,
            now,
            changed: Vec::new(),
            lease_changes: Vec::new(),
        };
        let done = work(&mut change)?;
        let Change {
            changed,
            lease_changes,
            ..
        } = change;
        let revision = {
            let mut meta = txn.open_table(META).map_err(storage)?;
            let revision = meta.get("revision").map_err(storage)?.map_or(0, |v| v.value()) + 1;
            meta.insert("revision", revision).map_err(storage)?;
            revision
        };
        // Dropped without a commit, a transaction leaves no trace: a refusal changes nothing.
        txn.commit().map_err(storage)?;
        let now = Instant::now();
        for change in lease_changes {
            match change {
                LeaseChange::Grant(id, record) => leases.grant(id, record, now),
                LeaseChange::Remove(id) => leases.remove(id),
            }
        }
        drop(leases);
        for changed in changed {
            self.log.push(revision, changed);
        }
        Ok(done)
    }

    fn with_lease(&self, mut record: VmRecord) -> VmRecord {
        let leases = self.leases();
        let live = leases.live(&Key::Vm(record.vm.as_str().to_owned()), Instant::now());
        record.alive = match live {
            Some((live, LeaseSubject::Owner { generation, .. })) if *generation == record.generation => {
                Some(live)
            }
            Some(_) | None => None,
        };
        record
    }

    fn keep_alive(&self, subject: &LeaseSubject, lease: u64) -> Result<RegistryResponse, RegistryError> {
        // The lock first: no change of generation comes between the look at the record and the renewal.
        let mut leases = self.leases();
        let now = Instant::now();
        let record = match subject {
            LeaseSubject::Node { .. } => None,
            LeaseSubject::Owner { vm, generation } => {
                let txn = self.db.begin_read().map_err(storage)?;
                let table = txn.open_table(VMS).map_err(storage)?;
                let record = read_vm(&table, vm)?.ok_or(RegistryError::NoSuchVm { vm: vm.clone() })?;
                rules::owned(&record, *generation)?;
                Some(record)
            }
        };
        let gone = || RegistryError::LeaseGone {
            subject: subject.clone(),
        };
        let ttl_ms = match leases.get(lease, now) {
            Some(held) if held.subject == *subject => held.ttl_ms,
            Some(_) | None => return Err(gone()),
        };
        if !leases.renew(lease, now) {
            return Err(gone());
        }
        drop(leases);
        let record = record.map(|record| self.with_lease(record));
        Ok(RegistryResponse::Lease(Lease { id: lease, ttl_ms }, record))
    }

    /// Takes out what ran out, and tells those who wait for changes.
    fn expire(&self) -> Result<(), RegistryError> {
        let over = self.leases().expired(Instant::now());
        if over.is_empty() {
            return Ok(());
        }
        self.transact(|change| {
            // Renewed or removed meanwhile: looked at again, under the lock.
            let over = change.leases.expired(Instant::now());
            over.into_iter().try_for_each(|id| change.remove_lease(id))
        })
    }

    /// Waits for changes; a lease that runs out is one.
    async fn await_changes(&self, after: u64, wait: Duration) -> Result<RegistryResponse, RegistryError> {
        let end = Instant::now() + wait;
        loop {
            let this = self.clone();
            let next = blocking(move || this.expire().map(|()| this.leases().next())).await?;
            let next = next.map_or(end, |next| next.min(end));
            let left = next.saturating_duration_since(Instant::now());
            let changes = self.log.await_after(after, left.max(MIN_WAIT)).await;
            if !changes.changed.is_empty() || !changes.complete || Instant::now() >= end {
                return Ok(RegistryResponse::Changes(changes));
            }
        }
    }

    /// Where it stands now.
    fn stamp(&self) -> Result<Stamp, RegistryError> {
        let txn = self.db.begin_read().map_err(storage)?;
        let meta = txn.open_table(META).map_err(storage)?;
        let revision = meta.get("revision").map_err(storage)?.map_or(0, |v| v.value());
        Ok(Stamp {
            registry: self.id,
            revision,
            term: 0,
        })
    }

    fn list_segments(
        &self,
        vm: &VmId,
        after: Option<&SegmentName>,
        limit: u32,
    ) -> Result<RegistryResponse, RegistryError> {
        let txn = self.db.begin_read().map_err(storage)?;
        let table = txn.open_table(SEGMENTS).map_err(storage)?;
        let limit = limit.min(MAX_PAGE_RECORDS) as usize;
        let from = after.map_or((0, 0), position);
        let mut segments = Vec::new();
        let mut bytes = 0;
        for item in table
            .range((vm.as_str(), from.0, from.1)..=(vm.as_str(), u64::MAX, u64::MAX))
            .map_err(storage)?
        {
            let (key, value) = item.map_err(storage)?;
            let (_, generation, epoch) = key.value();
            if after.is_some_and(|a| position(a) == (generation, epoch)) {
                continue;
            }
            bytes += value.value().len();
            if segments.len() == limit || bytes > MAX_PAGE_BYTES {
                return Ok(RegistryResponse::Segments(segments, true));
            }
            segments.push(decode::<SegmentRecord>(value.value())?);
        }
        Ok(RegistryResponse::Segments(segments, false))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, RegistryError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(answer) => answer,
        Err(e) => Err(RegistryError::Storage { why: e.to_string() }),
    }
}

impl Backend for Embedded {
    fn call(&self, request: RegistryRequest) -> Answer<'_> {
        let this = self.clone();
        Box::pin(async move {
            let outcome = match request {
                RegistryRequest::AwaitChanges { after, wait_ms } => {
                    let wait = Duration::from_millis(wait_ms.min(MAX_WAIT_MS).into());
                    this.await_changes(after, wait).await
                }
                request => {
                    let this = this.clone();
                    blocking(move || this.apply(request)).await
                }
            };
            let stamp = blocking(move || this.stamp()).await.ok();
            Answered { outcome, stamp }
        })
    }

    fn address(&self) -> String {
        self.path.display().to_string()
    }
}

fn read_history(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    vm: &VmId,
) -> Result<Vec<HistoryEntry>, RegistryError> {
    match table.get(vm.as_str()).map_err(storage)? {
        Some(bytes) => decode(bytes.value()),
        None => Ok(Vec::new()),
    }
}

fn read_vm(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    vm: &VmId,
) -> Result<Option<VmRecord>, RegistryError> {
    match table.get(vm.as_str()).map_err(storage)? {
        Some(bytes) => decode(bytes.value()).map(Some),
        None => Ok(None),
    }
}

fn all_vms(table: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<Vec<VmRecord>, RegistryError> {
    let all = table.iter().map_err(storage)?;
    all.map(|item| decode(item.map_err(storage)?.1.value())).collect()
}

/// Records after `after`, at most `limit`, and whether there are more.
fn page<T: for<'b> minicbor::Decode<'b, ()>>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    after: Option<&str>,
    limit: u32,
) -> Result<(Vec<T>, bool), RegistryError> {
    let limit = limit.min(MAX_PAGE_RECORDS) as usize;
    let mut records = Vec::new();
    let mut bytes = 0;
    for item in table.range(after.unwrap_or("")..).map_err(storage)? {
        let (key, value) = item.map_err(storage)?;
        if after == Some(key.value()) {
            continue;
        }
        bytes += value.value().len();
        if records.len() == limit || bytes > MAX_PAGE_BYTES {
            return Ok((records, true));
        }
        records.push(decode(value.value())?);
    }
    Ok((records, false))
}

pub(super) fn encode<T: minicbor::Encode<()>>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A Vec takes everything.
    let encoded = minicbor::encode(value, &mut bytes);
    debug_assert!(encoded.is_ok(), "a record that cannot be encoded");
    bytes
}

pub(super) fn decode<T: for<'b> minicbor::Decode<'b, ()>>(bytes: &[u8]) -> Result<T, RegistryError> {
    minicbor::decode(bytes).map_err(|e| RegistryError::Storage {
        why: format!("a damaged record: {e}"),
    })
}

fn storage(e: impl std::fmt::Display) -> RegistryError {
    RegistryError::Storage { why: e.to_string() }
}
