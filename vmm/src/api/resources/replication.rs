//! Own resources: status, checkpoints, protection, stop.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use migrate::protect::CheckpointRequest;
use migrate::store::GUEST_LABEL;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::fault::{Body, Fault, FaultMessage};
use crate::api::instance::{Instance, unhurried};
use crate::session::{CheckpointReport, Protection, SessionStatus, StopReport};

type App = State<Arc<Instance>>;

/// The longest time that holders can be given at a stop.
pub const MAX_DRAIN_MS: u64 = 600_000;
/// What they are given unless told otherwise.
pub const DEFAULT_DRAIN_MS: u64 = 5_000;

/// A checkpoint to take.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeCheckpoint {
    /// Every page, though the changes would do.
    #[serde(default)]
    pub full: bool,
    /// A name for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

/// A checkpoint in the local store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StoredCheckpoint {
    /// `<vm>/<generation>/<epoch>`.
    pub name: String,
    /// `full` or `delta`.
    pub kind: String,
    /// What a delta is a change of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Its label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// When the guest was stopped for it, in nanoseconds since 1970.
    pub created_unix_ns: u64,
    /// Bytes of its file.
    pub bytes: u64,
    /// Its digest.
    pub digest: String,
}

/// How to stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Milliseconds that the holders are given to get what they lack, up to 600,000.
    #[serde(default = "default_drain")]
    pub drain_ms: u64,
}

fn default_drain() -> u64 {
    DEFAULT_DRAIN_MS
}

#[utoipa::path(get, path = "/status", tag = "understudy",
    responses((status = 200, body = SessionStatus), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn status(State(app): App) -> Result<Json<SessionStatus>, Fault> {
    Ok(Json(app.started()?.status()))
}

#[utoipa::path(get, path = "/checkpoints", tag = "understudy",
    responses((status = 200, body = Vec<StoredCheckpoint>), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn checkpoints(State(app): App) -> Result<Json<Vec<StoredCheckpoint>>, Fault> {
    let stored = app.started()?.stored().into_iter().map(|entry| StoredCheckpoint {
        kind: if entry.kind.is_full() { "full" } else { "delta" }.into(),
        parent: entry.parent().map(|(parent, _)| parent.to_string()),
        name: entry.name.to_string(),
        created_unix_ns: entry.created_unix_ns,
        bytes: entry.bytes,
        digest: entry.digest.to_string(),
        label: entry.label,
    });
    Ok(Json(stored.collect()))
}

#[utoipa::path(post, path = "/checkpoints", tag = "understudy", request_body = TakeCheckpoint,
    responses((status = 200, body = CheckpointReport), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn take_checkpoint(
    State(app): App,
    Body(TakeCheckpoint { full, label }): Body<TakeCheckpoint>,
) -> Result<Json<CheckpointReport>, Fault> {
    if label.as_ref().is_some_and(|label| label.starts_with(GUEST_LABEL)) {
        return Err(Fault::bad(format!(
            "a label that begins with {GUEST_LABEL:?} is one that the guest gave: choose another"
        )));
    }
    let session = app.started()?;
    unhurried(async move { Ok(Json(session.checkpoint(CheckpointRequest { full, label }).await?)) }).await
}

#[utoipa::path(get, path = "/protection", tag = "understudy",
    responses((status = 200, body = Protection), (status = 404, body = FaultMessage)))]
pub(in crate::api) async fn protection(State(app): App) -> Result<Json<Protection>, Fault> {
    let protection = match app.session() {
        None => app.config().protection,
        Some(session) => session.status().protection.map(|status| Protection {
            holders: status.holders.into_iter().map(|holder| holder.address).collect(),
            every_ms: status.every_ms,
            ack_quorum: Some(status.ack_quorum),
            registry: status.registry,
            policy: None,
            failover: Some(status.failover),
            detect: status.detect,
            on_lapse: Some(status.on_lapse),
        }),
    };
    protection
        .map(Json)
        .ok_or_else(|| Fault::absent(format!("VM {} is not protected", app.identity().name)))
}

#[utoipa::path(put, path = "/protection", tag = "understudy", request_body = Protection,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put_protection(
    State(app): App,
    Body(protection): Body<Protection>,
) -> Result<StatusCode, Fault> {
    protect(app, Some(protection)).await
}

#[utoipa::path(delete, path = "/protection", tag = "understudy",
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn delete_protection(State(app): App) -> Result<StatusCode, Fault> {
    protect(app, None).await
}

async fn protect(app: Arc<Instance>, protection: Option<Protection>) -> Result<StatusCode, Fault> {
    let Some(session) = app.session() else {
        app.configure(|config| {
            config.protection = protection;
            Ok(())
        })?;
        return Ok(StatusCode::NO_CONTENT);
    };
    unhurried(async move {
        session.protect(protection.clone()).await?;
        app.reconfigure(|config| config.protection = protection);
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

#[utoipa::path(put, path = "/stop", tag = "understudy", request_body = Stop,
    responses((status = 200, body = StopReport), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn stop(
    State(app): App,
    Body(Stop { drain_ms }): Body<Stop>,
) -> Result<Json<StopReport>, Fault> {
    if drain_ms > MAX_DRAIN_MS {
        return Err(Fault::bad(format!(
            "drain_ms: {drain_ms} is more than {MAX_DRAIN_MS} (ten minutes)"
        )));
    }
    let report = app.stop(Duration::from_millis(drain_ms)).await?;
    // One that was never started has lost nothing.
    Ok(Json(report.unwrap_or(StopReport {
        committed: true,
        problems: Vec::new(),
    })))
}
