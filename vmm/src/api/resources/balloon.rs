//! The balloon, in Firecracker's shape: configured before the start, resized while the VM runs.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::fault::{Body, Fault, FaultMessage};
use crate::api::instance::Instance;
use crate::config::BalloonConfig;
use crate::devices::virtio::balloon::{Balloon, Statistic};
use crate::devices::virtio::state::BalloonState;

type App = State<Arc<Instance>>;
type Done = Result<StatusCode, Fault>;

/// Another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// MiB that the guest is to give.
    pub amount_mib: u32,
}

/// Another time between sets of the guest's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    /// Seconds. From 0 to another number and back is possible before the start only.
    pub stats_polling_interval_s: u16,
}

/// The balloon's size, and the guest's numbers as far as it gives them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonStats {
    /// Pages of 4 KiB that the guest is to give.
    pub target_pages: u32,
    /// Pages that it has given.
    pub actual_pages: u32,
    /// The same in MiB.
    pub target_mib: u32,
    /// The same in MiB.
    pub actual_mib: u32,
    /// Bytes swapped in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Page faults that took I/O.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Other page faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes that nothing uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// Bytes there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Bytes that could be had without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Bytes of file caches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Huge pages that were given out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
}

impl From<&Balloon> for BalloonStats {
    fn from(balloon: &Balloon) -> Self {
        let state = balloon.state();
        let numbers = balloon.statistics();
        Self {
            target_pages: state.target_pages,
            actual_pages: state.actual_pages,
            target_mib: BalloonState::mib(state.target_pages),
            actual_mib: BalloonState::mib(state.actual_pages),
            swap_in: numbers.get(Statistic::SwapIn),
            swap_out: numbers.get(Statistic::SwapOut),
            major_faults: numbers.get(Statistic::MajorFaults),
            minor_faults: numbers.get(Statistic::MinorFaults),
            free_memory: numbers.get(Statistic::FreeMemory),
            total_memory: numbers.get(Statistic::TotalMemory),
            available_memory: numbers.get(Statistic::AvailableMemory),
            disk_caches: numbers.get(Statistic::DiskCaches),
            hugetlb_allocations: numbers.get(Statistic::HugetlbAllocations),
            hugetlb_failures: numbers.get(Statistic::HugetlbFailures),
        }
    }
}

fn none() -> Fault {
    Fault::bad("This VM has no balloon: give it one before it starts, with --balloon or PUT /balloon.")
}

/// The balloon of the VM that runs.
fn balloon(app: &Instance) -> Result<Balloon, Fault> {
    app.started()?.vm().balloon().cloned().ok_or_else(none)
}

#[utoipa::path(put, path = "/balloon", tag = "firecracker", request_body = BalloonConfig,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put(State(app): App, Body(balloon): Body<BalloonConfig>) -> Done {
    super::devices::change(&app, |config| config.balloon = Some(balloon))
}

#[utoipa::path(get, path = "/balloon", tag = "firecracker",
    responses((status = 200, body = BalloonConfig), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn get(State(app): App) -> Result<Json<BalloonConfig>, Fault> {
    match app.session() {
        Some(_) => Ok(Json(BalloonConfig::of(&balloon(&app)?.state()))),
        None => app.config().balloon.map(Json).ok_or_else(none),
    }
}

#[utoipa::path(patch, path = "/balloon", tag = "firecracker", request_body = BalloonUpdate,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn patch(State(app): App, Body(update): Body<BalloonUpdate>) -> Done {
    let balloon = balloon(&app)?;
    let memory_mib = app.started()?.vm().config().memory_bytes >> 20;
    if u64::from(update.amount_mib) > memory_mib {
        return Err(Fault::bad(format!(
            "amount_mib: {} MiB, and the guest has {memory_mib}",
            update.amount_mib
        )));
    }
    balloon.set_target(update.amount_mib);
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(get, path = "/balloon/statistics", tag = "firecracker",
    responses((status = 200, body = BalloonStats), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn statistics(State(app): App) -> Result<Json<BalloonStats>, Fault> {
    let balloon = balloon(&app)?;
    if balloon.state().stats_interval_s == 0 {
        return Err(Fault::bad(
            "The guest's numbers are not asked for: set stats_polling_interval_s before the start.",
        ));
    }
    Ok(Json(BalloonStats::from(&balloon)))
}

#[utoipa::path(patch, path = "/balloon/statistics", tag = "firecracker", request_body = BalloonStatsUpdate,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn patch_statistics(
    State(app): App,
    Body(update): Body<BalloonStatsUpdate>,
) -> Done {
    let balloon = balloon(&app)?;
    if (balloon.state().stats_interval_s == 0) != (update.stats_polling_interval_s == 0) {
        return Err(Fault::bad(
            "Whether the guest's numbers are asked for can be changed before the start only.",
        ));
    }
    balloon.set_interval(update.stats_polling_interval_s);
    Ok(StatusCode::NO_CONTENT)
}
