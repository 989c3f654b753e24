//! Configuration and life of the machine, in Firecracker's shapes.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::fault::{Body, Fault, FaultMessage};
use crate::api::instance::{Instance, Origin, unhurried};
use crate::config::{
    BootSourceConfig, LoggerConfig, MachineSettings, MachineSettingsPatch, MetricsConfig, VmConfig,
};
use crate::control::RunState;
use crate::session::SessionStatus;

type App = State<Arc<Instance>>;
type Done = Result<StatusCode, Fault>;

/// What answers here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceInfo {
    /// The VM's id.
    pub id: String,
    /// `Not started`, `Running` or `Paused`. A VM that is fenced, has ended or was stopped counts as paused here;
    /// `/status` tells them apart.
    pub state: String,
    /// The version of this monitor.
    pub vmm_version: String,
    /// `Understudy`.
    pub app_name: String,
}

/// The version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// The version of this monitor, in the field where Firecracker's clients look.
    pub firecracker_version: String,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum ActionType {
    /// Boot the configured kernel.
    InstanceStart,
    /// Add the VM's status to the metrics file.
    FlushMetrics,
    /// Not there: the guest has no keyboard.
    SendCtrlAltDel,
}

/// An action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// Which.
    pub action_type: ActionType,
}

/// What the VM is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum VmState {
    /// Stand still.
    Paused,
    /// Run.
    Resumed,
}

/// A change of what the VM does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmStateChange {
    /// What it is to do.
    pub state: VmState,
}

#[utoipa::path(get, path = "/", tag = "firecracker", responses((status = 200, body = InstanceInfo)))]
pub(in crate::api) async fn info(State(app): App) -> Json<InstanceInfo> {
    let state = match app.session().map(|session| session.vm().state().borrow().clone()) {
        None => "Not started",
        Some(RunState::Running) => "Running",
        Some(
            RunState::Paused
            | RunState::Lapsed { .. }
            | RunState::Fenced { .. }
            | RunState::Ended(_)
            | RunState::Stopped,
        ) => "Paused",
    };
    Json(InstanceInfo {
        id: app.identity().name.to_string(),
        state: state.into(),
        vmm_version: env!("CARGO_PKG_VERSION").into(),
        app_name: "Understudy".into(),
    })
}

#[utoipa::path(get, path = "/version", tag = "firecracker", responses((status = 200, body = Version)))]
pub(in crate::api) async fn version() -> Json<Version> {
    Json(Version {
        firecracker_version: env!("CARGO_PKG_VERSION").into(),
    })
}

#[utoipa::path(get, path = "/vm/config", tag = "firecracker", responses((status = 200, body = VmConfig)))]
pub(in crate::api) async fn config(State(app): App) -> Json<VmConfig> {
    Json(VmConfig {
        name: Some(app.identity().name.to_string()),
        ..app.config()
    })
}

#[utoipa::path(get, path = "/machine-config", tag = "firecracker", responses((status = 200, body = MachineSettings)))]
pub(in crate::api) async fn machine(State(app): App) -> Json<MachineSettings> {
    Json(app.config().machine_config)
}

#[utoipa::path(put, path = "/machine-config", tag = "firecracker", request_body = MachineSettings,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put_machine(State(app): App, Body(settings): Body<MachineSettings>) -> Done {
    settings.validate()?;
    app.configure(|config| {
        config.machine_config = settings;
        Ok(())
    })?;
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(patch, path = "/machine-config", tag = "firecracker", request_body = MachineSettingsPatch,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn patch_machine(State(app): App, Body(patch): Body<MachineSettingsPatch>) -> Done {
    app.configure(|config| {
        config.machine_config = config.machine_config.patched(patch)?;
        Ok(())
    })?;
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(put, path = "/boot-source", tag = "firecracker", request_body = BootSourceConfig,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put_boot_source(State(app): App, Body(source): Body<BootSourceConfig>) -> Done {
    // As Firecracker: a file that cannot be opened is refused here already.
    can_be_read("kernel_image_path", &source.kernel_image_path)?;
    source
        .initrd_path
        .as_deref()
        .map_or(Ok(()), |path| can_be_read("initrd_path", path))?;
    app.configure(|config| {
        config.boot_source = Some(source);
        Ok(())
    })?;
    Ok(StatusCode::NO_CONTENT)
}

fn can_be_read(field: &str, path: &Path) -> Result<(), Fault> {
    match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(Fault::bad(format!("boot-source.{field}: open {path:?}: {error}"))),
    }
}

#[utoipa::path(put, path = "/actions", tag = "firecracker", request_body = Action,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn act(State(app): App, Body(action): Body<Action>) -> Done {
    match action.action_type {
        ActionType::InstanceStart => drop(app.start(Origin::Boot, true).await?),
        ActionType::FlushMetrics => {
            let Some(metrics) = app.config().metrics else {
                return Err(Fault::bad(
                    "there is no metrics file to flush to: PUT /metrics first",
                ));
            };
            flush_metrics(&metrics.metrics_path, &app.started()?.status())?;
        }
        ActionType::SendCtrlAltDel => {
            return Err(Fault::bad(format!(
                "SendCtrlAltDel is not supported by this version ({}): the guest has no keyboard. PUT /stop ends it",
                crate::PRODUCER
            )));
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(patch, path = "/vm", tag = "firecracker", request_body = VmStateChange,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn patch_vm(State(app): App, Body(change): Body<VmStateChange>) -> Done {
    let session = app.started()?;
    unhurried(async move {
        match change.state {
            VmState::Paused => session.pause().await?,
            VmState::Resumed => session.resume().await?,
        }
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

#[utoipa::path(put, path = "/logger", tag = "firecracker", request_body = LoggerConfig,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put_logger(State(app): App, Body(logger): Body<LoggerConfig>) -> Done {
    logger.tracing_level()?;
    app.set_log(&logger)?;
    app.reconfigure(|config| config.logger = Some(logger));
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(put, path = "/metrics", tag = "firecracker", request_body = MetricsConfig,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put_metrics(State(app): App, Body(metrics): Body<MetricsConfig>) -> Done {
    append(&metrics.metrics_path, b"")?;
    app.configure(|config| {
        config.metrics = Some(metrics);
        Ok(())
    })?;
    Ok(StatusCode::NO_CONTENT)
}

fn flush_metrics(path: &Path, status: &SessionStatus) -> Result<(), Fault> {
    let mut line =
        serde_json::to_vec(status).map_err(|e| Fault::bad(format!("write the metrics as JSON: {e}")))?;
    line.push(b'\n');
    append(path, &line)
}

fn append(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    use std::os::unix::fs::OpenOptionsExt;
    // A pipe without a reader must not hang the API.
    let mut options = std::fs::OpenOptions::new();
    options
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK);
    options
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(|error| Fault::bad(format!("write to the metrics file {path:?}: {error}")))
}
