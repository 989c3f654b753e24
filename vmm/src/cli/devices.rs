//! Devices on the command line.

use std::path::PathBuf;

use crate::config::{DriveConfig, NetworkConfig};

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

/// `disk:NAME=FILE` or `net:NAME=TAP`.
pub(super) fn binding(text: &str) -> Result<(String, String), String> {
    let (name, what) = named(text)?;
    if !name.starts_with("disk:") && !name.starts_with("net:") {
        return Err(format!("{name:?} is no logical name: disk:NAME or net:NAME"));
    }
    Ok((name.into(), what.into()))
}
