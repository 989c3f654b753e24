//! What an operator watches: counters that are raised as things happen, and what the agent knows when it is asked.
//!
//! ```text
//! replicate, member, promote, drill, copy --count--> Metrics --+
//! store's index, sessions, images, drills, global --Seen::of---+--> OpenMetrics text --> GET /metrics
//! ```
//!
//! `docs/metrics.md` lists every metric; a test holds it to what is told here.
//!
//! Invariants: what is told of single VMs is told of [`MAX_TOLD_VMS`] at most, and how many are left out is a metric of its
//! own; a scrape looks at what is in memory and at this process, never at a segment.
//!
//! What it never does: it tells nothing that is in a guest, and nothing of it decides anything.

mod http;
mod seen;

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use segment::{SegmentName, VmId};
use tokio::time::Instant;

use super::Inner;
use crate::mutex::lock;
use crate::protocol::{CommitResult, ReceiverEvent};
use crate::registry::VmRecord;
use crate::store::Stored;
use crate::wire::{Message, RefuseReason};
use seen::Seen;

pub(super) use http::{listen, serve};

/// The most VMs of which each is told of by itself; of more, those whose names come first.
const MAX_TOLD_VMS: usize = 1000;
/// What every name begins with.
const PREFIX: &str = "understudy";
/// Takeovers are counted by how long they took at most, in seconds.
const TAKEOVER_SECONDS: [f64; 12] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];
/// Why segments are refused, as the label `reason` says it.
const REASONS: [&str; 7] = [
    "fenced",
    "full",
    "damaged",
    "duplicate_name",
    "missing_parent",
    "failed",
    "other",
];
/// How something ended, as the label `result` says it.
const RESULTS: [&str; 2] = [SUCCEEDED, FAILED];
const SUCCEEDED: &str = "succeeded";
const FAILED: &str = "failed";

/// One label.
type Label = [(&'static str, &'static str); 1];

/// How the node stands in the cluster.
#[derive(Debug, Default)]
struct Membership {
    renewed: Option<Instant>,
    lost: bool,
    registry_away: bool,
}

/// What is counted, and what is remembered to be told.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    since: Instant,
    received: Counter,
    received_bytes: Counter,
    acknowledged: Counter,
    refused: Family<Label, Counter>,
    leases_lost: Counter,
    takeovers_begun: Counter,
    takeovers: Family<Label, Counter>,
    takeover_seconds: Histogram,
    drills: Family<Label, Counter>,
    copying: Gauge,
    lease_ttl: Duration,
    /// Written by who renews the lease, read by scrapes; held for moments.
    membership: Mutex<Membership>,
    /// What the registry last called committed of the VMs that this node holds. Shared likewise.
    committed: Mutex<HashMap<VmId, SegmentName>>,
    /// One scrape at a time: a crowd of them costs no more than one.
    scraping: tokio::sync::Mutex<()>,
}

/// Counts what is under way while it is there.
#[derive(Debug)]
pub(super) struct UnderWay(Gauge);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// Nothing has happened yet. The node's lease is `lease_ttl` long.
    pub(super) fn new(lease_ttl: Duration) -> Self {
        let metrics = Self {
            registry: Registry::with_prefix(PREFIX),
            since: Instant::now(),
            received: Counter::default(),
            received_bytes: Counter::default(),
            acknowledged: Counter::default(),
            refused: Family::default(),
            leases_lost: Counter::default(),
            takeovers_begun: Counter::default(),
            takeovers: Family::default(),
            takeover_seconds: Histogram::new(TAKEOVER_SECONDS),
            drills: Family::default(),
            copying: Gauge::default(),
            lease_ttl,
            membership: Mutex::default(),
            committed: Mutex::default(),
            scraping: tokio::sync::Mutex::default(),
        };
        // All of them are there from the start, so that the first one is seen to be more than before.
        for reason in REASONS {
            drop(metrics.refused.get_or_create(&[("reason", reason)]));
        }
        for result in RESULTS {
            drop(metrics.takeovers.get_or_create(&[("result", result)]));
            drop(metrics.drills.get_or_create(&[("result", result)]));
        }
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register(
            "segments_received",
            "Segments that owners shipped here and that were stored",
            self.received.clone(),
        );
        registry.register_with_unit(
            "segments_received",
            "Their bytes",
            Unit::Bytes,
            self.received_bytes.clone(),
        );
        registry.register(
            "segments_acknowledged",
            "Segments whose owners were told that they are stored here, those included that were here already",
            self.acknowledged.clone(),
        );
        registry.register(
            "segments_refused",
            "Segments, or whole connections of owners (fenced), that were refused, by reason",
            self.refused.clone(),
        );
        registry.register(
            "node_leases_lost",
            "How often this node counted as gone",
            self.leases_lost.clone(),
        );
        registry.register(
            "takeovers_begun",
            "Takeovers that this node began, by itself or by a person's word",
            self.takeovers_begun.clone(),
        );
        registry.register(
            "takeovers",
            "Takeovers that this node ended, by result",
            self.takeovers.clone(),
        );
        registry.register_with_unit(
            "takeover_duration",
            "From the decision to the guest running, of takeovers that succeeded",
            Unit::Seconds,
            self.takeover_seconds.clone(),
        );
        registry.register("drills", "Test restores here, by result", self.drills.clone());
        registry.register(
            "copies_running",
            "VMs whose segments are being copied here from other holders",
            self.copying.clone(),
        );
        self
    }

    /// An owner's connection has come to something.
    pub(super) fn heard(&self, event: &ReceiverEvent<Stored>) {
        if let ReceiverEvent::Committed {
            result: CommitResult::Stored(stored),
            ..
        } = event
        {
            self.received.inc();
            self.received_bytes.inc_by(stored.entry().bytes);
        }
    }

    /// An owner is answered.
    pub(super) fn answered(&self, message: &Message) {
        let reason = match message {
            Message::Stored(_) | Message::Have(_) => {
                self.acknowledged.inc();
                return;
            }
            Message::Fenced(_) => "fenced",
            Message::Refuse(refuse) => match refuse.reason {
                RefuseReason::Full => "full",
                RefuseReason::Invalid => "damaged",
                RefuseReason::DuplicateName => "duplicate_name",
                RefuseReason::MissingParent => "missing_parent",
                RefuseReason::Failed => "failed",
                RefuseReason::Other(_) => "other",
            },
            _ => return,
        };
        self.refused.get_or_create(&[("reason", reason)]).inc();
    }

    /// The agent has begun, with a lease or without.
    pub(super) fn joined(&self, leased: bool) {
        *lock(&self.membership) = Membership {
            renewed: leased.then(Instant::now),
            lost: false,
            registry_away: !leased,
        };
    }

    /// The node's lease was taken or renewed.
    pub(super) fn renewed(&self) {
        self.joined(true);
    }

    /// The registry says that the node's lease is over.
    pub(super) fn lease_lost(&self) {
        self.leases_lost.inc();
        let mut membership = lock(&self.membership);
        membership.lost = true;
        membership.registry_away = false;
    }

    /// The registry did not answer.
    pub(super) fn registry_away(&self) {
        lock(&self.membership).registry_away = true;
    }

    /// This node takes a VM over.
    pub(super) fn takeover_begins(&self) {
        self.takeovers_begun.inc();
    }

    /// It did, or did not, after so long.
    pub(super) fn takeover_ended(&self, took: Duration, succeeded: bool) {
        self.takeovers
            .get_or_create(&[("result", result(succeeded))])
            .inc();
        if succeeded {
            self.takeover_seconds.observe(took.as_secs_f64());
        }
    }

    /// A test restore has ended.
    pub(super) fn drilled(&self, succeeded: bool) {
        self.drills.get_or_create(&[("result", result(succeeded))]).inc();
    }

    /// A VM's segments are copied here for as long as what is returned is there.
    pub(super) fn copying(&self) -> UnderWay {
        self.copying.inc();
        UnderWay(self.copying.clone())
    }

    /// The registry listed all VMs; this node is at `address`.
    pub(super) fn told(&self, address: &str, vms: &[VmRecord]) {
        let held = vms.iter().filter(|vm| vm.holders.iter().any(|h| h == address));
        let committed = held.filter_map(|vm| Some((vm.vm.clone(), vm.newest.as_ref()?.name.clone())));
        let committed = committed.collect();
        *lock(&self.committed) = committed;
    }

    /// All of it, as text. From a thread that may wait: for a moment, for those who work with what is asked.
    ///
    /// # Errors
    /// When there is no room for the text.
    fn text(&self, inner: &Inner) -> Result<String, std::fmt::Error> {
        self.with(Seen::of(inner, self))
    }

    fn with(&self, seen: Seen) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        let mut now = Registry::with_prefix(PREFIX);
        now.register_collector(Box::new(seen));
        encode_registry(&mut text, &now)?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

fn result(succeeded: bool) -> &'static str {
    if succeeded { SUCCEEDED } else { FAILED }
}

#[cfg(test)]
mod tests;
