//! Devices, in Firecracker's shapes: configured before the start.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;

use crate::api::fault::{Body, Fault, FaultMessage};
use crate::api::instance::Instance;
use crate::config::{DriveConfig, EntropyConfig, NetworkConfig, VmConfig, VsockConfig};

type App = State<Arc<Instance>>;
type Done = Result<StatusCode, Fault>;

fn same_id(path: &str, body: &str) -> Result<(), Fault> {
    if path == body {
        return Ok(());
    }
    Err(Fault::bad(format!(
        "The id from the path [{path}] does not match the id from the body [{body}]!"
    )))
}

/// Puts a device in, in place of one of the same id, when all of them together are still fine.
pub(super) fn change(app: &Instance, with: impl FnOnce(&mut VmConfig)) -> Done {
    app.configure(|config| {
        let mut new = config.clone();
        with(&mut new);
        new.devices()?;
        *config = new;
        Ok(())
    })?;
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(put, path = "/drives/{drive_id}", tag = "firecracker", request_body = DriveConfig,
    params(("drive_id" = String, Path, description = "the drive")),
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put_drive(
    State(app): App,
    Path(id): Path<String>,
    Body(drive): Body<DriveConfig>,
) -> Done {
    same_id(&id, &drive.drive_id)?;
    drive.device()?;
    // As Firecracker: a file that is not there is refused here already.
    if let Some(path) = &drive.path_on_host
        && let Err(error) = std::fs::metadata(path)
    {
        return Err(Fault::bad(format!("drives.path_on_host: open {path:?}: {error}")));
    }
    change(&app, |config| {
        match config.drives.iter_mut().find(|old| old.drive_id == id) {
            Some(old) => *old = drive,
            None => config.drives.push(drive),
        }
    })
}

#[utoipa::path(put, path = "/network-interfaces/{iface_id}", tag = "firecracker", request_body = NetworkConfig,
    params(("iface_id" = String, Path, description = "the card")),
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put_network(
    State(app): App,
    Path(id): Path<String>,
    Body(card): Body<NetworkConfig>,
) -> Done {
    same_id(&id, &card.iface_id)?;
    change(&app, |config| {
        match config
            .network_interfaces
            .iter_mut()
            .find(|old| old.iface_id == id)
        {
            Some(old) => *old = card,
            None => config.network_interfaces.push(card),
        }
    })
}

#[utoipa::path(put, path = "/entropy", tag = "firecracker", request_body = EntropyConfig,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put_entropy(State(app): App, Body(entropy): Body<EntropyConfig>) -> Done {
    change(&app, |config| config.entropy = Some(entropy))
}

#[utoipa::path(put, path = "/vsock", tag = "firecracker", request_body = VsockConfig,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn put_vsock(State(app): App, Body(vsock): Body<VsockConfig>) -> Done {
    change(&app, |config| config.vsock = Some(vsock))
}
