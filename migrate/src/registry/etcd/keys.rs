//! Where the records stand in etcd, and transactions on them.
//!
//! | Key | Value |
//! |---|---|
//! | `P/state/vm/ID` | a VM's record, without what changes with every checkpoint |
//! | `P/state/node/NAME` | a node's record |
//! | `P/state/owner/ID`, `P/state/alive/NAME` | the lease of an owner, of a node: bound to it, so that it goes with it |
//! | `P/data/tip/ID` | how many segments a VM has, and the newest: what a status shows |
//! | `P/data/segment/ID/GENERATION/EPOCH` | a segment's record; numbers of 16 hexadecimal digits, for the order |
//! | `P/data/history/ID` | what happened to a VM |
//! | `P/data/retired/ID` | the last generation of a forgotten VM |
//!
//! Only `state` is watched. Values are the same CBOR as in the embedded registry.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use minicbor::{Decode, Encode};
use segment::VmId;
use serde_json::{Value, json};

use super::gateway::number;
use crate::wire::Held;

/// A VM's segments in short.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Tip {
    #[n(0)]
    pub(super) newest: Option<Held>,
    #[n(1)]
    pub(super) count: u64,
}

/// The keys below one prefix.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
        }
    }

    pub(super) fn folder(&self, folder: &str) -> String {
        format!("{}/{folder}/", self.prefix)
    }

    pub(super) fn vm(&self, vm: &VmId) -> String {
        format!("{}/state/vm/{vm}", self.prefix)
    }

    pub(super) fn owner(&self, vm: &VmId) -> String {
        format!("{}/state/owner/{vm}", self.prefix)
    }

    pub(super) fn node(&self, name: &str) -> String {
        format!("{}/state/node/{name}", self.prefix)
    }

    pub(super) fn alive(&self, name: &str) -> String {
        format!("{}/state/alive/{name}", self.prefix)
    }

    pub(super) fn tip(&self, vm: &VmId) -> String {
        format!("{}/data/tip/{vm}", self.prefix)
    }

    pub(super) fn history(&self, vm: &VmId) -> String {
        format!("{}/data/history/{vm}", self.prefix)
    }

    pub(super) fn retired(&self, vm: &VmId) -> String {
        format!("{}/data/retired/{vm}", self.prefix)
    }

    pub(super) fn segments(&self, vm: &VmId) -> String {
        format!("{}/data/segment/{vm}/", self.prefix)
    }

    pub(super) fn segment(&self, vm: &VmId, (generation, epoch): (u64, u64)) -> String {
        format!("{}{generation:016x}/{epoch:016x}", self.segments(vm))
    }
}

/// The first key behind all that begin with `folder`, which ends with a slash.
pub(super) fn end_of(folder: &str) -> String {
    debug_assert!(folder.ends_with('/'));
    // '0' is the byte behind '/'.
    format!("{}0", &folder[..folder.len() - 1])
}

pub(super) fn base64(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

/// A key and its value, as they were read.
#[derive(Debug, Clone)]
pub(super) struct Kv {
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    /// The revision of its last change: what a transaction is guarded by.
    pub(super) revision: u64,
}

/// What one operation of a transaction answered.
#[derive(Debug, Clone, Default)]
pub(super) struct Range {
    pub(super) kvs: Vec<Kv>,
    pub(super) more: bool,
    pub(super) count: u64,
}

pub(super) fn range_of(value: &Value) -> Option<Range> {
    let kvs = match value.get("kvs") {
        None => Vec::new(),
        Some(kvs) => kvs.as_array()?.iter().map(kv_of).collect::<Option<_>>()?,
    };
    Some(Range {
        kvs,
        more: value["more"].as_bool().unwrap_or(false),
        count: number(&value["count"]).unwrap_or(0),
    })
}

pub(super) fn kv_of(value: &Value) -> Option<Kv> {
    let text = |v: &Value| match v {
        Value::Null => Some(Vec::new()),
        v => STANDARD.decode(v.as_str()?).ok(),
    };
    Some(Kv {
        key: String::from_utf8(text(&value["key"])?).ok()?,
        value: text(&value["value"])?,
        revision: number(&value["mod_revision"]).unwrap_or(0),
    })
}

/// The operations that follow when every key is as it was read.
#[derive(Debug, Default)]
pub(super) struct Txn {
    compare: Vec<Value>,
    then: Vec<Value>,
}

impl Txn {
    /// Only if the key's last change is this one; 0: only if there is no such key.
    pub(super) fn guard(mut self, key: &str, revision: u64) -> Self {
        self.compare.push(json!({
            "key": base64(key), "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string(),
        }));
        self
    }

    pub(super) fn put(self, key: &str, value: &[u8]) -> Self {
        self.put_leased(key, value, 0)
    }

    pub(super) fn put_leased(mut self, key: &str, value: &[u8], lease: u64) -> Self {
        self.then.push(json!({ "request_put": {
            "key": base64(key), "value": base64(value), "lease": lease.to_string(),
        }}));
        self
    }

    pub(super) fn delete(mut self, key: &str) -> Self {
        self.then
            .push(json!({ "request_delete_range": { "key": base64(key) } }));
        self
    }

    pub(super) fn delete_range(mut self, from: &str, end: &str) -> Self {
        self.then.push(json!({ "request_delete_range": {
            "key": base64(from), "range_end": base64(end),
        }}));
        self
    }

    pub(super) fn get(mut self, key: &str) -> Self {
        self.then.push(json!({ "request_range": { "key": base64(key) } }));
        self
    }

    pub(super) fn range(mut self, from: &str, end: &str, limit: u64) -> Self {
        self.then.push(json!({ "request_range": {
            "key": base64(from), "range_end": base64(end), "limit": limit.to_string(),
        }}));
        self
    }

    pub(super) fn keys_only(mut self, from: &str, end: &str, limit: u64) -> Self {
        self.then.push(json!({ "request_range": {
            "key": base64(from), "range_end": base64(end), "limit": limit.to_string(), "keys_only": true,
        }}));
        self
    }

    pub(super) fn count(mut self, folder: &str) -> Self {
        self.then.push(json!({ "request_range": {
            "key": base64(folder), "range_end": base64(end_of(folder)), "count_only": true,
        }}));
        self
    }

    pub(super) fn json(&self) -> Value {
        json!({ "compare": self.compare, "success": self.then })
    }
}
