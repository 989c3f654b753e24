//! Lists, in pages: of records as they are at one revision, with what is kept beside them.

use std::collections::BTreeMap;

use segment::{SegmentName, VmId};

use super::keys::{Kv, Txn, end_of};
use super::{Done, Inner, decode, id_of, living, place};
use crate::registry::embedded::MAX_PAGE_BYTES;
use crate::registry::request::RegistryResponse;
use crate::registry::types::{MAX_PAGE_RECORDS, NodeRecord, SegmentRecord, VmRecord};

/// Where a page begins.
fn from(folder: &str, after: Option<&str>) -> String {
    match after {
        // The first key behind it.
        Some(after) => format!("{folder}{after}\0"),
        None => folder.to_owned(),
    }
}

/// As many of the records as an answer may have bytes; and whether some were left.
fn fitting(kvs: &[Kv]) -> (&[Kv], bool) {
    let mut bytes = 0;
    let mut fits = |kv: &Kv| {
        bytes += kv.value.len();
        bytes <= MAX_PAGE_BYTES
    };
    // At least one: a page of none would have no end.
    let count = kvs.iter().take_while(|kv| fits(kv)).count().max(1);
    let count = count.min(kvs.len());
    (&kvs[..count], count < kvs.len())
}

impl Inner {
    pub(super) async fn list_vms(&self, after: Option<&VmId>, limit: u32) -> Done<RegistryResponse> {
        let limit = u64::from(limit.clamp(1, MAX_PAGE_RECORDS));
        let after = after.map(VmId::as_str);
        let folders = ["state/vm", "data/tip", "state/owner"].map(|f| self.keys.folder(f));
        let mut read = Txn::default();
        for folder in &folders {
            // What is beside a VM is there only as long as the VM: the first of them are those of the first VMs.
            read = read.range(&from(folder, after), &end_of(folder), limit);
        }
        let [vms, tips, leases] = self.read(&read).await?;
        let beside = |kvs: Vec<Kv>, folder: &str| -> BTreeMap<Option<VmId>, Kv> {
            kvs.into_iter().map(|kv| (id_of(&kv.key, folder), kv)).collect()
        };
        let tips = beside(tips.kvs, &folders[1]);
        let leases = beside(leases.kvs, &folders[2]);
        let (page, left) = fitting(&vms.kvs);
        let mut records = Vec::new();
        for kv in page {
            let id = id_of(&kv.key, &folders[0]);
            if id.is_none() {
                return Err(self.damaged("a VM's key"));
            }
            let found = self.found_vm(Some(kv), tips.get(&id), leases.get(&id))?;
            records.extend(found.record.map(|(record, _)| record));
        }
        Ok(RegistryResponse::Vms(records, left || vms.more))
    }

    pub(super) async fn list_nodes(&self, after: Option<&str>, limit: u32) -> Done<RegistryResponse> {
        let limit = u64::from(limit.clamp(1, MAX_PAGE_RECORDS));
        let folders = ["state/node", "state/alive"].map(|f| self.keys.folder(f));
        let mut read = Txn::default();
        for folder in &folders {
            read = read.range(&from(folder, after), &end_of(folder), limit);
        }
        let [nodes, leases] = self.read(&read).await?;
        let leases: BTreeMap<_, _> = leases
            .kvs
            .iter()
            .map(|kv| (kv.key.strip_prefix(&folders[1]), kv))
            .collect();
        let (page, left) = fitting(&nodes.kvs);
        let mut records: Vec<NodeRecord> = Vec::new();
        for kv in page {
            let lease = self.lease_of(leases.get(&kv.key.strip_prefix(&folders[0])).copied())?;
            records.push(living(decode(&kv.value)?, lease));
        }
        Ok(RegistryResponse::Nodes(records, left || nodes.more))
    }

    pub(super) async fn list_segments(
        &self,
        vm: &VmId,
        after: Option<&SegmentName>,
        limit: u32,
    ) -> Done<RegistryResponse> {
        let folder = self.keys.segments(vm);
        let begin = match after {
            Some(after) => format!("{}\0", self.keys.segment(vm, place(after))),
            None => folder.clone(),
        };
        let limit = u64::from(limit.clamp(1, MAX_PAGE_RECORDS));
        let read = Txn::default().range(&begin, &end_of(&folder), limit);
        let [segments] = self.read(&read).await?;
        let (page, left) = fitting(&segments.kvs);
        let records = page.iter().map(|kv| decode::<SegmentRecord>(&kv.value));
        Ok(RegistryResponse::Segments(
            records.collect::<Done<_>>()?,
            left || segments.more,
        ))
    }

    /// The VMs that name this address as a holder.
    pub(super) async fn held_at(&self, address: &str) -> Done<Vec<VmId>> {
        let folder = self.keys.folder("state/vm");
        let (mut begin, mut held) = (folder.clone(), Vec::new());
        loop {
            let read = Txn::default().range(&begin, &end_of(&folder), MAX_PAGE_RECORDS.into());
            let [page] = self.read(&read).await?;
            for kv in &page.kvs {
                let record: VmRecord = decode(&kv.value)?;
                if record.holders.iter().any(|h| h == address) {
                    held.push(record.vm);
                }
            }
            match page.kvs.last() {
                Some(last) if page.more => begin = format!("{}\0", last.key),
                Some(_) | None => return Ok(held),
            }
        }
    }
}
