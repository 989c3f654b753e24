//! What an agent knows at one moment, of itself and of each VM that it holds: gathered whole, then told.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use segment::{SegmentName, VmId};

use super::super::Inner;
use super::{MAX_TOLD_VMS, Metrics};
use crate::image::ImageSize;
use crate::mutex::lock;
use crate::openmetrics::{BYTES, Labelled, SECONDS, counter, each, gauge};

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) uptime: Duration,
    pub(super) resident_bytes: u64,
    pub(super) connections: u64,
    pub(super) sessions: u64,
    pub(super) segments: u64,
    pub(super) used_bytes: u64,
    pub(super) budget_bytes: Option<u64>,
    pub(super) damaged_files: u64,
    pub(super) store_problem: bool,
    pub(super) verified: Option<Duration>,
    pub(super) lease_held: bool,
    pub(super) renewed: Option<Duration>,
    pub(super) registry_reachable: bool,
    pub(super) hot_wanted: u64,
    pub(super) hot_ready: u64,
    pub(super) hot_size: ImageSize,
    pub(super) global: Option<SeenGlobal>,
    pub(super) held: u64,
    /// At most [`MAX_TOLD_VMS`], by name.
    pub(super) vms: Vec<SeenVm>,
}

/// What was done with the global store since the agent started.
#[derive(Debug)]
pub(super) struct SeenGlobal {
    pub(super) points: u64,
    pub(super) bytes: u64,
    pub(super) failures: u64,
    pub(super) well: bool,
}

/// What is known of one VM.
#[derive(Debug, Default)]
pub(super) struct SeenVm {
    pub(super) vm: String,
    pub(super) segments: u64,
    pub(super) bytes: u64,
    pub(super) newest: Option<SeenNewest>,
    /// Generation and epoch.
    pub(super) committed: Option<(u64, u64)>,
    pub(super) shipping: bool,
    /// Links that its image lacks; none when it has no image that a takeover could use.
    pub(super) image_behind: Option<u64>,
    pub(super) drill: Option<(bool, Duration)>,
    pub(super) global_lag: Option<Duration>,
}

/// The newest checkpoint that is whole here.
#[derive(Debug)]
pub(super) struct SeenNewest {
    pub(super) generation: u64,
    pub(super) epoch: u64,
    pub(super) age: Duration,
    pub(super) links: u64,
}

/// How long ago something of Unix time was. What a clock calls the future was now.
fn ago(then: Duration) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(then)
}

/// The memory of this process that is resident, in bytes; 0 when the kernel does not say.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Option<u64> = text.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

impl Seen {
    /// Looks at everything once. Blocks for moments.
    pub(super) fn of(inner: &Inner, metrics: &Metrics) -> Self {
        let vms = inner.store.vms();
        let (hot_wanted, hot_ready, hot_size) = inner.hot.images();
        let behind = inner.global.as_ref().map(|global| global.behind());
        let behind = behind.unwrap_or_default();
        let told = vms.iter().take(MAX_TOLD_VMS);
        let told = told.map(|vm| SeenVm::of(inner, metrics, vm, &behind)).collect();
        let (lease_held, renewed, registry_reachable) = {
            let membership = lock(&metrics.membership);
            let renewed = membership.renewed.map(|at| at.elapsed());
            let holds = !membership.lost && renewed.is_some_and(|age| age < metrics.lease_ttl);
            (holds, renewed, !membership.registry_away)
        };
        Self {
            uptime: metrics.since.elapsed(),
            resident_bytes: resident_bytes(),
            connections: inner.connections.load(Ordering::Relaxed).into(),
            sessions: inner.sessions.count() as u64,
            segments: inner.store.count() as u64,
            used_bytes: inner.store.used_bytes(),
            budget_bytes: inner.store.budget(),
            damaged_files: inner.store.damaged().len() as u64,
            store_problem: inner.housekeeper.problem().is_some(),
            verified: inner
                .housekeeper
                .checked_at()
                .map(|at| ago(Duration::from_secs(at))),
            lease_held,
            renewed,
            registry_reachable,
            hot_wanted: hot_wanted as u64,
            hot_ready: hot_ready as u64,
            hot_size,
            global: inner.global.as_ref().map(|global| {
                let (points, bytes, failures, well) = global.counts();
                SeenGlobal {
                    points,
                    bytes,
                    failures,
                    well,
                }
            }),
            held: vms.len() as u64,
            vms: told,
        }
    }
}

impl SeenVm {
    fn of(inner: &Inner, metrics: &Metrics, vm: &VmId, behind: &BTreeMap<VmId, Duration>) -> Self {
        let held = inner.store.sum(vm);
        let image = inner.hot.standing(vm).0;
        let newest = held.newest.as_ref().map(|(entry, _)| &entry.name);
        let image_behind = image
            .zip(newest)
            .map(|(at, newest)| links_behind(inner, &at, newest));
        let committed = lock(&metrics.committed).get(vm).cloned();
        Self {
            vm: vm.to_string(),
            segments: held.segments as u64,
            bytes: held.bytes,
            newest: held.newest.as_ref().map(|(entry, links)| SeenNewest {
                generation: entry.name.generation.0,
                epoch: entry.name.epoch.0,
                age: ago(Duration::from_nanos(entry.created_unix_ns)),
                links: (*links).into(),
            }),
            committed: committed.map(|name| (name.generation.0, name.epoch.0)),
            shipping: inner.sessions.owner(vm).is_some(),
            image_behind,
            drill: inner.drills.last(vm).map(|last| {
                let age = ago(Duration::from_millis(last.at_unix_ms));
                (last.failed.is_none(), age)
            }),
            global_lag: behind.get(vm).copied(),
        }
    }
}

impl Labelled for SeenVm {
    const LABEL: &'static str = "vm";

    fn label(&self) -> &str {
        &self.vm
    }
}

/// How many links of the newest chain an image lacks that is at `at`; all of them when it is on another branch.
fn links_behind(inner: &Inner, at: &SegmentName, newest: &SegmentName) -> u64 {
    if at == newest {
        return 0;
    }
    let chain = inner.store.chain(newest).unwrap_or_default();
    let here = chain.iter().position(|link| link.name == *at);
    chain.len().saturating_sub(here.map_or(0, |here| here + 1)) as u64
}

impl Collector for Seen {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let e = &mut encoder;
        self.agent(e)?;
        self.store(e)?;
        self.cluster(e)?;
        self.standby(e)?;
        self.each_vm(e)
    }
}

impl Seen {
    fn agent(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut build = e.encode_descriptor("build", "The version of this agent.", None, MetricType::Info)?;
        build.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;
        gauge(
            e,
            ("uptime", SECONDS),
            "Since the agent began.",
            self.uptime.as_secs_f64(),
        )?;
        gauge(
            e,
            ("resident_memory", BYTES),
            "Memory of this process that is resident.",
            self.resident_bytes,
        )?;
        gauge(
            e,
            ("connections", None),
            "Connections of peers that are known.",
            self.connections,
        )?;
        gauge(
            e,
            ("sessions", None),
            "VMs whose owners ship here now.",
            self.sessions,
        )
    }

    fn store(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        gauge(
            e,
            ("store_segments", None),
            "Segments that are stored.",
            self.segments,
        )?;
        gauge(e, ("store_used", BYTES), "Their bytes.", self.used_bytes)?;
        if let Some(budget) = self.budget_bytes {
            gauge(e, ("store_budget", BYTES), "The most that they may take.", budget)?;
        }
        gauge(
            e,
            ("store_damaged_files", None),
            "Files that were found damaged and set aside, and were not repaired since.",
            self.damaged_files,
        )?;
        gauge(
            e,
            ("store_collect_failing", None),
            "1 when the store could not be collected the last time.",
            u64::from(self.store_problem),
        )?;
        if let Some(verified) = self.verified {
            gauge(
                e,
                ("store_verified_age", SECONDS),
                "Since every stored segment was last read and checked.",
                verified.as_secs_f64(),
            )?;
        }
        gauge(e, ("vms_held", None), "VMs that have segments here.", self.held)?;
        gauge(
            e,
            ("vms_untold", None),
            "Those of them of which no metric of single VMs tells, as there are too many.",
            self.held - self.vms.len() as u64,
        )
    }

    fn cluster(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        gauge(
            e,
            ("registry_reachable", None),
            "1 when the registry answered the last time.",
            u64::from(self.registry_reachable),
        )?;
        gauge(
            e,
            ("node_lease_held", None),
            "1 while this node's lease is held: else it counts as gone.",
            u64::from(self.lease_held),
        )?;
        if let Some(age) = self.renewed {
            gauge(
                e,
                ("node_lease_renewal_age", SECONDS),
                "Since the lease was last renewed.",
                age.as_secs_f64(),
            )?;
        }
        let Some(global) = &self.global else { return Ok(()) };
        gauge(
            e,
            ("global_reachable", None),
            "1 when the global store could be kept the last time.",
            u64::from(global.well),
        )?;
        counter(
            e,
            ("global_uploaded_points", None),
            "Restore points uploaded.",
            global.points,
        )?;
        counter(e, ("global_uploaded", BYTES), "Their bytes.", global.bytes)?;
        counter(
            e,
            ("global_failures", None),
            "Attempts to keep the global store that failed, for all VMs or for one.",
            global.failures,
        )
    }

    fn standby(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        gauge(
            e,
            ("hot_vms", None),
            "VMs held here that are to have an image.",
            self.hot_wanted,
        )?;
        gauge(
            e,
            ("hot_images", None),
            "Images that a takeover could use now.",
            self.hot_ready,
        )?;
        gauge(
            e,
            ("hot_memory", BYTES),
            "The most memory that images take.",
            self.hot_size.memory,
        )?;
        gauge(
            e,
            ("hot_disk", BYTES),
            "The most disk that images take.",
            self.hot_size.disks,
        )
    }

    fn each_vm(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let vms = &self.vms;
        each(e, ("vm_segments", None), "Segments held.", vms, |vm| {
            Some(vm.segments)
        })?;
        each(e, ("vm_stored", BYTES), "Their bytes.", vms, |vm| Some(vm.bytes))?;
        each(
            e,
            ("vm_shipping", None),
            "1 while its owner ships here.",
            vms,
            |vm| Some(u64::from(vm.shipping)),
        )?;
        self.newest_of_each(e)?;
        each(
            e,
            ("vm_image_behind_links", None),
            "Links that its image lacks to the newest checkpoint; absent when no image could be used.",
            vms,
            |vm| vm.image_behind,
        )?;
        each(
            e,
            ("vm_drill_passed", None),
            "1 when its last test restore here succeeded.",
            vms,
            |vm| Some(u64::from(vm.drill?.0)),
        )?;
        each(e, ("vm_drill_age", SECONDS), "Since that.", vms, |vm| {
            Some(vm.drill?.1.as_secs_f64())
        })?;
        each(
            e,
            ("vm_global_lag", SECONDS),
            "For how long the global store lacks the newest committed checkpoint and got none.",
            vms,
            |vm| Some(vm.global_lag?.as_secs_f64()),
        )
    }

    fn newest_of_each(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let vms = &self.vms;
        each(
            e,
            ("vm_newest_age", SECONDS),
            "Since the guest was stopped for the newest checkpoint that is whole here.",
            vms,
            |vm| Some(vm.newest.as_ref()?.age.as_secs_f64()),
        )?;
        each(e, ("vm_newest_generation", None), "Its generation.", vms, |vm| {
            Some(vm.newest.as_ref()?.generation)
        })?;
        each(e, ("vm_newest_epoch", None), "Its epoch.", vms, |vm| {
            Some(vm.newest.as_ref()?.epoch)
        })?;
        each(
            e,
            ("vm_chain_links", None),
            "Segments that a restore of it reads.",
            vms,
            |vm| Some(vm.newest.as_ref()?.links),
        )?;
        each(
            e,
            ("vm_committed_generation", None),
            "Generation of the newest checkpoint that the registry called committed when it was last listed.",
            vms,
            |vm| Some(vm.committed?.0),
        )?;
        each(e, ("vm_committed_epoch", None), "Its epoch.", vms, |vm| {
            Some(vm.committed?.1)
        })
    }
}
