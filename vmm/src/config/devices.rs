//! The devices of a configuration, in Firecracker's shapes, and what the monitor makes of them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{ConfigError, invalid};
use crate::devices::virtio::balloon::BalloonOptions;
use crate::devices::virtio::net::Mac;
use crate::devices::virtio::setup::DeviceConfig;
use crate::devices::virtio::state::BalloonState;
use crate::devices::virtio::vsock;
use crate::layout::MAX_VIRTIO_SLOTS;

/// The longest id of a device.
const MAX_ID_BYTES: usize = 32;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveConfig {
    /// Its id: its logical name is `disk:` and this.
    pub drive_id: String,
    /// A raw image on this host.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub path_on_host: Option<PathBuf>,
    /// The guest's root file system is on it: it is the first disk, and the kernel's command line says so.
    #[serde(default)]
    pub is_root_device: bool,
    /// The guest may not write to it.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// The partition of the root file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// `Writeback` (the default): the guest's flushes reach the storage; `Unsafe`: it is offered none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_type: Option<String>,
    /// `Sync` or `Async`: taken, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<String>,
    /// Only null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub rate_limiter: Option<Value>,
    /// Only null: there is no vhost-user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Its id: its logical name is `net:` and this.
    pub iface_id: String,
    /// A TAP interface of this host, which is there already.
    pub host_dev_name: String,
    /// Its hardware address; one is drawn when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Only null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub rx_rate_limiter: Option<Value>,
    /// Only null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub tx_rate_limiter: Option<Value>,
}

/// A source of entropy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {
    /// Only null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub rate_limiter: Option<Value>,
}

/// Stream sockets between the guest and the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address, from 3 on.
    pub guest_cid: u32,
    /// Path of the Unix socket on this host; `vsock` in the VM's run folder when left out.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub uds_path: Option<PathBuf>,
    /// Taken, without effect: Firecracker's own is without effect too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

impl VsockConfig {
    /// As the monitor takes it.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field.
    pub fn device(&self) -> Result<DeviceConfig, ConfigError> {
        if !vsock::CIDS.contains(&self.guest_cid) {
            let why = format!(
                "{} is no guest's address: {} to {}",
                self.guest_cid,
                vsock::CIDS.start,
                vsock::CIDS.end - 1
            );
            return Err(invalid("vsock.guest_cid", why));
        }
        Ok(DeviceConfig::Vsock {
            guest_cid: self.guest_cid,
            // Where it is left out, who hosts the VM has put one in before it is made.
            path: self.uds_path.clone().unwrap_or_default(),
        })
    }
}

/// A balloon: memory that the guest gives back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// MiB that the guest is to give.
    pub amount_mib: u32,
    /// The guest may take memory back when it has too little.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Seconds from one set of the guest's numbers to the next; 0: they are never asked for.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// The guest reports memory that it has no use for; true when left out.
    #[serde(default = "yes")]
    pub free_page_reporting: bool,
    /// Only `false`.
    #[serde(default)]
    pub free_page_hinting: bool,
}

fn yes() -> bool {
    true
}

impl BalloonConfig {
    /// One of that size, with nothing else said.
    #[must_use]
    pub fn sized(amount_mib: u32) -> Self {
        Self {
            amount_mib,
            deflate_on_oom: false,
            stats_polling_interval_s: 0,
            free_page_reporting: true,
            free_page_hinting: false,
        }
    }

    /// That of a balloon there is.
    #[must_use]
    pub fn of(state: &BalloonState) -> Self {
        Self {
            amount_mib: BalloonState::mib(state.target_pages),
            deflate_on_oom: state.deflate_on_oom,
            stats_polling_interval_s: state.stats_interval_s,
            free_page_reporting: state.reporting,
            free_page_hinting: false,
        }
    }

    /// As the monitor takes it.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field.
    pub fn device(&self) -> Result<DeviceConfig, ConfigError> {
        unsupported("balloon.free_page_hinting", self.free_page_hinting)?;
        Ok(DeviceConfig::Balloon(BalloonOptions {
            amount_mib: self.amount_mib,
            deflate_on_oom: self.deflate_on_oom,
            stats_interval_s: self.stats_polling_interval_s,
            reporting: self.free_page_reporting,
        }))
    }
}

fn unsupported(field: &'static str, used: bool) -> Result<(), ConfigError> {
    let hint = ": leave it out";
    if used {
        Err(ConfigError::Unsupported { field, hint })
    } else {
        Ok(())
    }
}

fn check_id(field: &'static str, id: &str) -> Result<(), ConfigError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if id.is_empty() || id.len() > MAX_ID_BYTES || !id.chars().all(fine) {
        let why = format!("{id:?} is no id: 1 to {MAX_ID_BYTES} of letters, digits, '.', '_' and '-'");
        return Err(invalid(field, why));
    }
    Ok(())
}

impl DriveConfig {
    /// As the monitor takes it.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field.
    pub fn device(&self) -> Result<DeviceConfig, ConfigError> {
        check_id("drives.drive_id", &self.drive_id)?;
        unsupported("drives.rate_limiter", self.rate_limiter.is_some())?;
        unsupported("drives.socket", self.socket.is_some())?;
        let Some(path) = self.path_on_host.clone() else {
            return Err(invalid(
                "drives.path_on_host",
                "is needed: the path of a raw image",
            ));
        };
        let flush = match self.cache_type.as_deref() {
            None | Some("Writeback") => true,
            Some("Unsafe") => false,
            Some(other) => {
                let why = format!("{other:?} is neither \"Writeback\" nor \"Unsafe\"");
                return Err(invalid("drives.cache_type", why));
            }
        };
        if !matches!(self.io_engine.as_deref(), None | Some("Sync" | "Async")) {
            return Err(invalid("drives.io_engine", "is neither \"Sync\" nor \"Async\""));
        }
        Ok(DeviceConfig::Disk {
            name: self.drive_id.clone(),
            path,
            read_only: self.is_read_only.unwrap_or(false),
            flush,
        })
    }

    /// What the kernel's command line has to say of a root drive.
    pub(super) fn root_argument(&self) -> String {
        let root = match &self.partuuid {
            Some(partition) => format!("PARTUUID={partition}"),
            None => "/dev/vda".into(),
        };
        let mode = if self.is_read_only.unwrap_or(false) {
            "ro"
        } else {
            "rw"
        };
        format!("root={root} {mode}")
    }
}

impl NetworkConfig {
    /// As the monitor takes it.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field.
    pub fn device(&self) -> Result<DeviceConfig, ConfigError> {
        check_id("network-interfaces.iface_id", &self.iface_id)?;
        unsupported(
            "network-interfaces.rx_rate_limiter",
            self.rx_rate_limiter.is_some(),
        )?;
        unsupported(
            "network-interfaces.tx_rate_limiter",
            self.tx_rate_limiter.is_some(),
        )?;
        let mac = self.guest_mac.as_deref().map(mac).transpose();
        Ok(DeviceConfig::Net {
            name: self.iface_id.clone(),
            tap: self.host_dev_name.clone(),
            mac: mac.map_err(|why| invalid("network-interfaces.guest_mac", why))?,
        })
    }
}

/// A hardware address like `06:00:ac:10:00:02`.
fn mac(text: &str) -> Result<Mac, String> {
    let no = || format!("{text:?} is no hardware address of one card, like 06:00:ac:10:00:02");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(no)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| no())?;
    }
    // A group's address is no card's.
    if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(no());
    }
    Ok(mac)
}

pub(super) fn devices(
    drives: &[DriveConfig],
    cards: &[NetworkConfig],
    entropy: Option<&EntropyConfig>,
    vsock: Option<&VsockConfig>,
    balloon: Option<&BalloonConfig>,
) -> Result<Vec<DeviceConfig>, ConfigError> {
    let twice = |ids: Vec<&str>| {
        let first = |(at, id): &(usize, &&str)| ids[..*at].contains(id);
        ids.iter().enumerate().find(first).map(|(_, id)| (*id).to_owned())
    };
    if let Some(id) = twice(drives.iter().map(|drive| drive.drive_id.as_str()).collect()) {
        return Err(invalid("drives.drive_id", format!("{id:?} is there twice")));
    }
    if let Some(id) = twice(cards.iter().map(|card| card.iface_id.as_str()).collect()) {
        return Err(invalid(
            "network-interfaces.iface_id",
            format!("{id:?} is there twice"),
        ));
    }
    if drives.iter().filter(|drive| drive.is_root_device).count() > 1 {
        return Err(invalid("drives.is_root_device", "is true of more than one drive"));
    }
    let (root, others): (Vec<_>, Vec<_>) = drives.iter().partition(|drive| drive.is_root_device);
    let mut all = root
        .into_iter()
        .chain(others)
        .map(DriveConfig::device)
        .chain(cards.iter().map(NetworkConfig::device))
        .collect::<Result<Vec<_>, _>>()?;
    if let Some(entropy) = entropy {
        unsupported("entropy.rate_limiter", entropy.rate_limiter.is_some())?;
        all.push(DeviceConfig::Rng);
    }
    if let Some(vsock) = vsock {
        all.push(vsock.device()?);
    }
    if let Some(balloon) = balloon {
        all.push(balloon.device()?);
    }
    if all.len() > MAX_VIRTIO_SLOTS {
        return Err(invalid(
            "drives",
            format!("{} devices: a VM can have {MAX_VIRTIO_SLOTS}", all.len()),
        ));
    }
    Ok(all)
}
