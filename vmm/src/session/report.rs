//! What a session tells of itself: plain data, as the control API shows it.

use migrate::placement::Policy;
use migrate::shipper::{HolderState, HolderStatus};
use serde::{Deserialize, Serialize};

/// Where copies of a VM go, and how often.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Protection {
    /// Addresses (`HOST:PORT`) of the standby agents that hold copies; chosen by `policy` when left out.
    #[serde(default)]
    pub holders: Vec<String>,
    /// Milliseconds from the start of one checkpoint to the start of the next.
    #[serde(default = "default_every_ms")]
    pub every_ms: u64,
    /// How many holders must have a checkpoint for it to be committed; a majority when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ack_quorum: Option<usize>,
    /// The agents that answer for the registry (`HOST:PORT`, or several separated by commas); asked of the holders when
    /// left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// What holders are chosen by: `replicas`, `ack_quorum`, and where wanted `labels` (like `zone!=`), `spread` and
    /// `min_free_bytes`. The VM's holders are replaced by it when they are gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub policy: Option<Policy>,
    /// Whether the guest runs under a lease, so that it stands still before another host may run it; `manual` when left
    /// out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<FailoverMode>,
    /// How fast a lost owner is noticed: `default`, `fast`, or like `ttl=2500ms,renew=400ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detect: Option<String>,
    /// What becomes of the process when its lease ran out: `standby` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_lapse: Option<OnLapse>,
}

/// What becomes of an owner whose lease ran out: its guest stands still.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum, utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum OnLapse {
    /// It waits: the guest goes on when the lease is renewed, which shows that nobody has taken it over.
    #[default]
    Standby,
    /// It ends at once, as one that was fenced.
    Stop,
}

/// How a VM is taken over.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum, utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum FailoverMode {
    /// The guest runs under a lease of the registry or of enough holders, and stands still without one.
    Auto,
    /// The guest runs without a lease, until it is refused as stale.
    #[default]
    Manual,
}

fn default_every_ms() -> u64 {
    200
}

/// One checkpoint that was taken.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CheckpointReport {
    /// Its name, `<vm>/<generation>/<epoch>`.
    pub name: String,
    /// `full` or `delta`.
    pub kind: String,
    /// How long the guest stood still, in microseconds.
    pub stop_us: u64,
    /// How long encoding and storing took after that, in microseconds.
    pub encode_us: u64,
    /// Pages with content.
    pub data_pages: u64,
    /// Pages that became zero.
    pub zero_pages: u64,
    /// Bytes of the pages.
    pub raw_bytes: u64,
    /// Bytes of the segment.
    pub stored_bytes: u64,
    /// The segment's digest.
    pub digest: String,
}

/// What a VM is doing, for `vmm ps`, `vmm inspect` and the control API.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SessionStatus {
    /// The VM's id.
    pub name: String,
    /// The generation this process owns.
    pub generation: u64,
    /// `running`, `paused`, `fenced`, `ended`, `failed` or `stopped`.
    pub state: String,
    /// Why, where there is more to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// This process.
    pub pid: u32,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// MiB of memory.
    pub memory_mib: u64,
    /// Milliseconds since the VM was made in this process.
    pub up_ms: u64,
    /// What it was restored from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restored_from: Option<String>,
    /// The newest checkpoint taken here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub newest: Option<CheckpointReport>,
    /// The newest checkpoint that the ack quorum has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub committed: Option<String>,
    /// Checkpoints taken in this process.
    pub checkpoints: u64,
    /// Bytes of changed pages in them.
    pub raw_bytes: u64,
    /// Bytes of their segments.
    pub stored_bytes: u64,
    /// Bytes sent to holders.
    pub shipped_bytes: u64,
    /// The last thing that went wrong with a checkpoint, and has not gone right since.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The folder of the local store.
    pub store: String,
    /// Bytes in the local store.
    pub store_bytes: u64,
    /// Its bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_budget: Option<u64>,
    /// Protection, if it is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protection: Option<ProtectionStatus>,
}

/// How a VM was stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StopReport {
    /// Nothing of it is lost with this host: its last state is committed, or it was not protected.
    pub committed: bool,
    /// What did not go as it should, in words: which holder lacks what, for a start.
    pub problems: Vec<String>,
}

impl StopReport {
    /// Nothing went wrong.
    pub(super) fn clean() -> Self {
        Self {
            committed: true,
            problems: Vec::new(),
        }
    }

    /// Which holder lacks what.
    pub(super) fn add_lacking(&mut self, shipping: &migrate::shipper::ShipStatus) {
        let Some(newest) = &shipping.newest else {
            return;
        };
        for holder in shipping
            .holders
            .iter()
            .filter(|h| h.acked.as_ref() < Some(newest))
        {
            let report = HolderReport::from(holder);
            let node = report.node.map(|node| format!(" ({node})")).unwrap_or_default();
            let has = report
                .acked
                .map_or("has nothing".to_owned(), |acked| format!("has {acked}"));
            let why = report.why.map(|why| format!(": {why}")).unwrap_or_default();
            self.problems.push(format!(
                "holder {}{node} lacks the last checkpoint, {newest}: it {has}, and is {}{why}",
                report.address, report.state
            ));
        }
    }
}

/// How protection stands.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ProtectionStatus {
    /// Milliseconds between checkpoints.
    pub every_ms: u64,
    /// Holders needed for a commit.
    pub ack_quorum: usize,
    /// The agent that keeps the registry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// How it is taken over.
    #[serde(default)]
    pub failover: FailoverMode,
    /// How fast a lost owner is noticed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detect: Option<String>,
    /// What becomes of it without a lease.
    #[serde(default)]
    pub on_lapse: OnLapse,
    /// Each holder.
    pub holders: Vec<HolderReport>,
}

/// How one holder stands.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HolderReport {
    /// Its address.
    pub address: String,
    /// Its node name, once it has said it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// `connecting`, `synchronising`, `up-to-date`, `unreachable`, `refused` or `fenced`.
    pub state: String,
    /// Why, where there is more to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The newest checkpoint it has stored durably.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acked: Option<String>,
    /// Checkpoints it lacks.
    pub lag_epochs: u64,
    /// Their bytes.
    pub lag_bytes: u64,
    /// Bytes sent to it.
    pub bytes_sent: u64,
}

impl From<&HolderStatus> for HolderReport {
    fn from(status: &HolderStatus) -> Self {
        let (state, why) = match &status.state {
            HolderState::Connecting => ("connecting", None),
            HolderState::Synchronising => ("synchronising", None),
            HolderState::UpToDate => ("up-to-date", None),
            HolderState::Unreachable { why } => ("unreachable", Some(why.clone())),
            HolderState::Refused { why } => ("refused", Some(why.clone())),
            HolderState::Fenced { current } => {
                ("fenced", Some(format!("it has promised generation {current}")))
            }
        };
        Self {
            address: status.address.clone(),
            node: status.node.clone(),
            state: state.into(),
            why,
            acked: status.acked.as_ref().map(ToString::to_string),
            lag_epochs: status.lag_epochs,
            lag_bytes: status.lag_bytes,
            bytes_sent: status.bytes_sent,
        }
    }
}
