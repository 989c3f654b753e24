//! The registry of one machine: a redb file.
//!
//! Tables: `meta` (format), `nodes` (name), `vms` (id), `retired` (id -> last generation of a forgotten VM),
//! `segments` (id, generation, epoch). Values are CBOR maps with explicit keys, so that a newer build may add fields.

mod change;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use segment::{SegmentName, VmId};

use super::types::{MAX_PAGE_RECORDS, RegistryRequest, RegistryResponse, SegmentRecord, VmRecord, position};
use super::{Answer, Backend, RegistryError};
use change::Change;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const NODES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("nodes");
const VMS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("vms");
const RETIRED: TableDefinition<'_, &str, u64> = TableDefinition::new("retired");
const SEGMENTS: TableDefinition<'_, (&str, u64, u64), &[u8]> = TableDefinition::new("segments");
/// How many segment records each VM has: counting them would walk them all.
const COUNTS: TableDefinition<'_, &str, u64> = TableDefinition::new("counts");

/// The format of the tables.
const FORMAT: u64 = 1;
/// The most bytes of records in one answer, so that it fits into a frame whatever the records are.
const MAX_PAGE_BYTES: usize = 2 << 20;

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
        let init = || -> Result<u64, redb::Error> {
            let txn = db.begin_write()?;
            let found = {
                let mut meta = txn.open_table(META)?;
                let found = meta.get("format")?.map(|v| v.value());
                txn.open_table(NODES)?;
                txn.open_table(VMS)?;
                txn.open_table(RETIRED)?;
                txn.open_table(SEGMENTS)?;
                txn.open_table(COUNTS)?;
                if found.is_none() {
                    meta.insert("format", FORMAT)?;
                }
                found.unwrap_or(FORMAT)
            };
            txn.commit()?;
            Ok(found)
        };
        let found = init().map_err(|e| damaged(Box::new(e)))?;
        if found > FORMAT {
            return Err(OpenError::Newer {
                path: path.to_owned(),
                found,
            });
        }
        Ok(Self {
            db: Arc::new(db),
            path: Arc::new(path.to_owned()),
        })
    }

    /// Answers `request` in one transaction; blocks for the disk.
    ///
    /// # Errors
    /// What the request is refused for; nothing was changed then.
    pub fn apply(&self, request: RegistryRequest) -> Result<RegistryResponse, RegistryError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_millis() as u64);
        match request {
            RegistryRequest::ListNodes { after, limit } => {
                let txn = self.db.begin_read().map_err(storage)?;
                let table = txn.open_table(NODES).map_err(storage)?;
                let (nodes, more) = page(&table, after.as_deref(), limit)?;
                Ok(RegistryResponse::Nodes(nodes, more))
            }
            RegistryRequest::GetVm { vm } => {
                let txn = self.db.begin_read().map_err(storage)?;
                let table = txn.open_table(VMS).map_err(storage)?;
                read_vm(&table, &vm)?
                    .map(RegistryResponse::Vm)
                    .ok_or(RegistryError::NoSuchVm { vm })
            }
            RegistryRequest::ListVms { after, limit } => {
                let txn = self.db.begin_read().map_err(storage)?;
                let table = txn.open_table(VMS).map_err(storage)?;
                let (vms, more) = page(&table, after.as_ref().map(VmId::as_str), limit)?;
                Ok(RegistryResponse::Vms(vms, more))
            }
            RegistryRequest::ListSegments { vm, after, limit } => {
                self.list_segments(&vm, after.as_ref(), limit)
            }
            change => {
                let txn = self.db.begin_write().map_err(storage)?;
                let response = Change { txn: &txn, now }.apply(change)?;
                // Dropped without a commit, a transaction leaves no trace: a refusal changes nothing.
                txn.commit().map_err(storage)?;
                Ok(response)
            }
        }
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

impl Backend for Embedded {
    fn call(&self, request: RegistryRequest) -> Answer<'_> {
        let this = self.clone();
        Box::pin(async move {
            match tokio::task::spawn_blocking(move || this.apply(request)).await {
                Ok(answer) => answer,
                Err(e) => Err(RegistryError::Storage { why: e.to_string() }),
            }
        })
    }

    fn address(&self) -> String {
        self.path.display().to_string()
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

fn encode<T: minicbor::Encode<()>>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A Vec takes everything.
    let encoded = minicbor::encode(value, &mut bytes);
    debug_assert!(encoded.is_ok(), "a record that cannot be encoded");
    bytes
}

fn decode<T: for<'b> minicbor::Decode<'b, ()>>(bytes: &[u8]) -> Result<T, RegistryError> {
    minicbor::decode(bytes).map_err(|e| RegistryError::Storage {
        why: format!("a damaged record: {e}"),
    })
}

fn storage(e: impl std::fmt::Display) -> RegistryError {
    RegistryError::Storage { why: e.to_string() }
}
