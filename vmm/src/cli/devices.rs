//! Devices on the command line.

use std::path::PathBuf;

use super::size;
use crate::boot::kept;
use crate::config::{BalloonConfig, DriveConfig, NetworkConfig, VsockConfig};
use crate::devices::virtio::setup::DISK;

fn named(text: &str) -> Result<(&str, &str), String> {
    match text.split_once('=') {
        Some((name, rest)) if !name.is_empty() && !rest.is_empty() => Ok((name, rest)),
        Some(_) | None => Err("a name and what it is are needed, like root=disk.raw".into()),
    }
}

/// `NAME=FILE[,ro]`.
pub(super) fn drive(text: &str) -> Result<DriveConfig, String> {
    let (name, rest) = named(text)?;
    let (path, read_only) = match rest.strip_suffix(",ro") {
        Some(path) => (path, true),
        None => (rest, false),
    };
    Ok(DriveConfig {
        drive_id: name.into(),
        path_on_host: Some(PathBuf::from(path)),
        is_root_device: false,
        is_read_only: Some(read_only),
        partuuid: None,
        cache_type: None,
        io_engine: None,
        rate_limiter: None,
        socket: None,
    })
}

/// `NAME=TAP[,mac=MAC]`.
pub(super) fn card(text: &str) -> Result<NetworkConfig, String> {
    let (name, rest) = named(text)?;
    let (tap, mac) = match rest.split_once(",mac=") {
        Some((tap, mac)) => (tap, Some(mac.to_owned())),
        None => (rest, None),
    };
    Ok(NetworkConfig {
        iface_id: name.into(),
        host_dev_name: tap.into(),
        guest_mac: mac,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    })
}

/// `CID[=PATH]`.
pub(super) fn vsock(text: &str) -> Result<VsockConfig, String> {
    let (cid, path) = match text.split_once('=') {
        Some((_, "")) => return Err("a path is to follow the '=', like 3=/run/web.vsock".into()),
        Some((cid, path)) => (cid, Some(PathBuf::from(path))),
        None => (text, None),
    };
    let guest_cid = cid
        .parse()
        .map_err(|_| format!("{cid:?} is no CID: a number from 3 on, like 3 or 3=/run/web.vsock"))?;
    Ok(VsockConfig {
        guest_cid,
        uds_path: path,
        vsock_id: None,
    })
}

/// A size in MiB. The guest's numbers are asked for: `vmm balloon` shows them.
pub(super) fn balloon(text: &str) -> Result<BalloonConfig, String> {
    Ok(BalloonConfig {
        stats_polling_interval_s: 1,
        deflate_on_oom: true,
        ..BalloonConfig::sized(balloon_mib(text)?)
    })
}

/// A balloon's size in MiB, which may be none.
pub(super) fn balloon_mib(text: &str) -> Result<u32, String> {
    match text.trim_end_matches(|c: char| c.is_ascii_alphabetic()) {
        "0" => Ok(0),
        _ => u32::try_from(size::mib(text)?).map_err(|_| format!("{text} is more than any guest has")),
    }
}

/// `disk:NAME=FILE`, or `boot=FILE` for what the guest was booted from.
pub(super) fn image_file(text: &str) -> Result<(String, String), String> {
    let (name, file) = named(text)?;
    if name != kept::NAME && !name.starts_with(DISK) {
        return Err(format!("an image has no {name:?}: disk:NAME or {}", kept::NAME));
    }
    Ok((name.into(), file.into()))
}

/// `disk:NAME=FILE`, `net:NAME=TAP` or `vsock:0=PATH`.
pub(super) fn binding(text: &str) -> Result<(String, String), String> {
    let (name, what) = named(text)?;
    if !["disk:", "net:", "vsock:"]
        .iter()
        .any(|kind| name.starts_with(kind))
    {
        return Err(format!(
            "{name:?} is no logical name: disk:NAME, net:NAME or vsock:0"
        ));
    }
    Ok((name.into(), what.into()))
}
