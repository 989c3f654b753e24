//! The configuration of a VM: plain structs in the shape of Firecracker's configuration file, and their checks.
//!
//! ```text
//! JSON file, or PUT requests --serde--> VmConfig --validate()--> MachineConfig, BootSource
//! ```
//!
//! A field that nobody knows is refused by serde. A field that Firecracker has and this monitor does not is known
//! here, so that a configuration without it (`"pmem": []`, `"serial": null`) works and one that uses it is refused
//! by name: what a guest was promised is never left out in silence.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::boot::BootSource;
use crate::cpuid::baseline::CpuModel;
use crate::devices::virtio::setup::DeviceConfig;
use crate::memory::{MAX_MEMORY_BYTES, MIN_MEMORY_BYTES};
use crate::session::Protection;
use crate::vm::{MAX_VCPUS, MachineConfig};

mod devices;

pub use devices::{BalloonConfig, DriveConfig, EntropyConfig, NetworkConfig, VsockConfig};

/// The longest configuration file that is read.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The command line of a guest that is given none.
pub const DEFAULT_BOOT_ARGS: &str = "console=ttyS0 reboot=k panic=1";
/// MiB of memory of a guest that is given no size, as in Firecracker.
pub const DEFAULT_MEMORY_MIB: u64 = 128;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read the configuration file {path:?}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The file is longer than any configuration.
    #[error("the configuration file {path:?} is longer than {MAX_CONFIG_BYTES} bytes")]
    TooLong {
        /// Its path.
        path: PathBuf,
    },
    /// The file is not JSON of this form.
    #[error("{path:?} is not a configuration this monitor understands")]
    Form {
        /// Its path.
        path: PathBuf,
        /// Which line, and what was expected.
        #[source]
        source: serde_json::Error,
    },
    /// A field of Firecracker's that this monitor does not have.
    #[error("{field} is not supported by this version ({}){hint}", crate::PRODUCER)]
    Unsupported {
        /// Its name, as in the JSON.
        field: &'static str,
        /// What to write instead.
        hint: &'static str,
    },
    /// A value that cannot be.
    #[error("{field}: {why}")]
    Invalid {
        /// Its name, as in the JSON.
        field: &'static str,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// Nothing to boot.
    #[error(
        "no kernel is configured: give one with --kernel, in the configuration's boot-source.kernel_image_path, or PUT /boot-source"
    )]
    NoKernel,
}

/// What the guest boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSourceConfig {
    /// Path of a bzImage, or of an ELF64 kernel with a PVH entry note, on this host.
    #[schema(value_type = String)]
    pub kernel_image_path: PathBuf,
    /// Path of an initial RAM disk.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line; `console=ttyS0 reboot=k panic=1` when left out.
    #[serde(default)]
    pub boot_args: Option<String>,
}

/// The size of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineSettings {
    /// Number of vCPUs, 1 to 32.
    pub vcpu_count: u8,
    /// MiB of memory.
    pub mem_size_mib: u64,
    /// Simultaneous multithreading: only `false`.
    #[serde(default)]
    pub smt: bool,
    /// Taken and given back. Dirty pages are tracked from the first checkpoint on, whatever it says.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Only `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<String>,
    /// The CPU the guest is shown: `host`, `baseline:x86-64-v2`, `-v3` or `-v4`; `host` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Only `None`.
    #[serde(default = "no_huge_pages")]
    pub huge_pages: String,
}

fn no_huge_pages() -> String {
    "None".into()
}

impl Default for MachineSettings {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: DEFAULT_MEMORY_MIB,
            smt: false,
            track_dirty_pages: false,
            cpu_template: None,
            cpu: None,
            huge_pages: no_huge_pages(),
        }
    }
}

/// A change of some of [`MachineSettings`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineSettingsPatch {
    /// Number of vCPUs.
    pub vcpu_count: Option<u8>,
    /// MiB of memory.
    pub mem_size_mib: Option<u64>,
    /// Only `false`.
    pub smt: Option<bool>,
    /// See [`MachineSettings::track_dirty_pages`].
    pub track_dirty_pages: Option<bool>,
    /// Only `None`.
    pub cpu_template: Option<String>,
    /// See [`MachineSettings::cpu`].
    pub cpu: Option<String>,
    /// Only `None`.
    pub huge_pages: Option<String>,
}

impl MachineSettings {
    /// These settings with some changed.
    ///
    /// # Errors
    /// [`ConfigError`] when nothing would change, or the result cannot be.
    pub fn patched(&self, patch: MachineSettingsPatch) -> Result<Self, ConfigError> {
        if patch == MachineSettingsPatch::default() {
            return Err(invalid(
                "machine-config",
                "the request changes nothing: name a field",
            ));
        }
        let new = Self {
            vcpu_count: patch.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: patch.smt.unwrap_or(self.smt),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            cpu_template: patch.cpu_template.or_else(|| self.cpu_template.clone()),
            cpu: patch.cpu.or_else(|| self.cpu.clone()),
            huge_pages: patch.huge_pages.unwrap_or_else(|| self.huge_pages.clone()),
        };
        new.validate()?;
        Ok(new)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first that cannot be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpu_count) {
            let why = format!("{} vCPUs: a guest can have 1 to {MAX_VCPUS}", self.vcpu_count);
            return Err(invalid("machine-config.vcpu_count", why));
        }
        let bytes = self.mem_size_mib.checked_mul(1 << 20);
        if !bytes.is_some_and(|bytes| (MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes)) {
            let (least, most) = (MIN_MEMORY_BYTES >> 20, MAX_MEMORY_BYTES >> 20);
            let why = format!(
                "{} MiB of memory: a guest can have {least} to {most}",
                self.mem_size_mib
            );
            return Err(invalid("machine-config.mem_size_mib", why));
        }
        if self.smt {
            return Err(ConfigError::Unsupported {
                field: "machine-config.smt",
                hint: ": leave it out or false",
            });
        }
        if self
            .cpu_template
            .as_deref()
            .is_some_and(|template| template != "None")
        {
            let hint = ": leave it out or \"None\", and choose with machine-config.cpu what the guest sees";
            return Err(ConfigError::Unsupported {
                field: "machine-config.cpu_template",
                hint,
            });
        }
        self.model()?;
        if self.huge_pages != "None" {
            let hint = ": leave it out or \"None\"";
            return Err(ConfigError::Unsupported {
                field: "machine-config.huge_pages",
                hint,
            });
        }
        Ok(())
    }

    /// The CPU the guest is shown.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] when there is none of that name.
    fn model(&self) -> Result<CpuModel, ConfigError> {
        self.cpu
            .as_deref()
            .map_or(Ok(CpuModel::Host), str::parse)
            .map_err(|why| invalid("machine-config.cpu", why))
    }

    /// As the monitor takes it.
    #[must_use]
    pub fn machine(&self) -> MachineConfig {
        MachineConfig {
            memory_bytes: self.mem_size_mib << 20,
            vcpus: self.vcpu_count,
            // A name that is none was refused by `validate`.
            cpu: self.model().unwrap_or_default(),
        }
    }
}

/// Where the log goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// A file that the log is added to, instead of standard error.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub log_path: Option<PathBuf>,
    /// `Off`, `Trace`, `Debug`, `Info`, `Warning` or `Error`.
    #[serde(default)]
    pub level: Option<String>,
    /// Taken; the level is always shown.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Taken; the module is always shown.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Only lines from this module.
    #[serde(default)]
    pub module: Option<String>,
}

impl LoggerConfig {
    /// The level as `tracing` calls it, if one is given.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] when there is no such level.
    pub fn tracing_level(&self) -> Result<Option<&'static str>, ConfigError> {
        let Some(level) = &self.level else { return Ok(None) };
        let level = match level.to_ascii_lowercase().as_str() {
            "off" => "off",
            "trace" => "trace",
            "debug" => "debug",
            "info" => "info",
            "warning" | "warn" => "warn",
            "error" => "error",
            _ => {
                let why = format!("{level:?} is none of Off, Trace, Debug, Info, Warning and Error");
                return Err(invalid("logger.level", why));
            }
        };
        Ok(Some(level))
    }
}

/// Where metrics go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// A file; each `FlushMetrics` adds the VM's status to it as one line of JSON.
    #[schema(value_type = String)]
    pub metrics_path: PathBuf,
}

/// How checkpoints are written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// The most bytes of pages that are kept as they were last stored, so that a page written again is stored as a
    /// change; none when left out.
    #[serde(default)]
    pub delta_cache_bytes: u64,
}

impl CheckpointConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The local store of the VM's checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// Its folder.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// The most bytes it may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_bytes: Option<u64>,
}

/// The configuration of a VM: Firecracker's file, and `name`, `store` and `protection` beside.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    /// The VM's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it boots.
    #[serde(default)]
    pub boot_source: Option<BootSourceConfig>,
    /// Its size.
    #[serde(default)]
    pub machine_config: MachineSettings,
    /// Where the log goes.
    #[serde(default)]
    pub logger: Option<LoggerConfig>,
    /// Where metrics go.
    #[serde(default)]
    pub metrics: Option<MetricsConfig>,
    /// Where its checkpoints are kept on this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreConfig>,
    /// How its checkpoints are written.
    #[serde(default, skip_serializing_if = "CheckpointConfig::is_default")]
    pub checkpoints: CheckpointConfig,
    /// Where copies of it go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protection: Option<Protection>,
    /// Its disks.
    #[serde(default)]
    pub drives: Vec<DriveConfig>,
    /// Its network cards.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkConfig>,
    /// For a restored VM: what the logical names of its devices are on this host.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bindings: BTreeMap<String, String>,
    /// The same for whatever VM it is: what the host has for devices of these names, should the VM have them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub offers: BTreeMap<String, String>,
    /// Only empty.
    #[serde(default)]
    #[schema(value_type = Vec<Object>)]
    pub pmem: Vec<Value>,
    /// Stream sockets between the guest and the host.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// A source of entropy.
    #[serde(default)]
    pub entropy: Option<EntropyConfig>,
    /// A balloon: memory that the guest gives back.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// Only null.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub mmds_config: Option<Value>,
    /// Only null.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub cpu_config: Option<Value>,
    /// Only null.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub memory_hotplug: Option<Value>,
    /// Only null.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub serial: Option<Value>,
}

impl VmConfig {
    /// Reads a configuration file and checks it.
    ///
    /// # Errors
    /// [`ConfigError`] naming the file or the field.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        use std::io::Read;
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let mut text = Vec::new();
        let file = std::fs::File::open(path).map_err(read)?;
        file.take(MAX_CONFIG_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(read)?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLong {
                path: path.to_owned(),
            });
        }
        let config: Self = serde_json::from_slice(&text).map_err(|source| ConfigError::Form {
            path: path.to_owned(),
            source,
        })?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every field that is there. That there is a kernel is checked by [`VmConfig::boot`].
    ///
    /// # Errors
    /// [`ConfigError`] naming the first that cannot be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let used = |value: &Option<Value>| value.is_some();
        for (field, used) in [
            ("pmem", !self.pmem.is_empty()),
            ("mmds-config", used(&self.mmds_config)),
            ("cpu-config", used(&self.cpu_config)),
            ("memory-hotplug", used(&self.memory_hotplug)),
            ("serial", used(&self.serial)),
        ] {
            if used {
                return Err(ConfigError::Unsupported {
                    field,
                    hint: ": leave it out",
                });
            }
        }
        self.devices()?;
        if let Some(name) = &self.name {
            segment::VmId::new(name).map_err(|e| invalid("name", e.to_string()))?;
        }
        if let Some(logger) = &self.logger {
            logger.tracing_level()?;
        }
        self.machine_config.validate()
    }

    /// Its devices, in the order of their slots: disks, the root one first, then cards, then entropy, vsock, balloon.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first field that cannot be.
    pub fn devices(&self) -> Result<Vec<DeviceConfig>, ConfigError> {
        if let Some(balloon) = &self.balloon
            && u64::from(balloon.amount_mib) > self.machine_config.mem_size_mib
        {
            let why = format!(
                "{} MiB, and the guest has {}",
                balloon.amount_mib, self.machine_config.mem_size_mib
            );
            return Err(invalid("balloon.amount_mib", why));
        }
        devices::devices(
            &self.drives,
            &self.network_interfaces,
            self.entropy.as_ref(),
            self.vsock.as_ref(),
            self.balloon.as_ref(),
        )
    }

    /// What the guest boots. A root drive is added to its command line, as Firecracker does.
    ///
    /// # Errors
    /// [`ConfigError::NoKernel`].
    pub fn boot(&self) -> Result<BootSource, ConfigError> {
        let source = self.boot_source.as_ref().ok_or(ConfigError::NoKernel)?;
        Ok(BootSource {
            kernel: source.kernel_image_path.clone(),
            initrd: source.initrd_path.clone(),
            command_line: self.command_line(source),
        })
    }

    fn command_line(&self, source: &BootSourceConfig) -> String {
        let line = source.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS);
        match self.drives.iter().find(|drive| drive.is_root_device) {
            Some(root) if !line.split(' ').any(|word| word.starts_with("root=")) => {
                format!("{line} {}", root.root_argument())
            }
            Some(_) | None => line.to_owned(),
        }
    }
}

fn invalid(field: &'static str, why: impl Into<String>) -> ConfigError {
    ConfigError::Invalid {
        field,
        why: why.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<VmConfig, String> {
        let config: VmConfig = serde_json::from_str(text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config)
    }

    /// The form of the example in Firecracker's documentation, without its drive and network.
    const FILE: &str = r#"{
        "boot-source": {"kernel_image_path": "vmlinux.bin", "boot_args": "console=ttyS0", "initrd_path": null},
        "drives": [],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false,
                           "huge_pages": "None"},
        "cpu-config": null, "balloon": null, "network-interfaces": [], "vsock": null, "logger": null,
        "metrics": null, "mmds-config": null, "entropy": null, "pmem": [], "memory-hotplug": null
    }"#;

    #[test]
    fn firecrackers_file_is_taken() {
        let config = parse(FILE).unwrap();
        assert_eq!(
            config.machine_config.machine(),
            MachineConfig {
                memory_bytes: 1 << 30,
                vcpus: 2,
                cpu: CpuModel::Host,
            }
        );
        assert_eq!(config.boot().unwrap().command_line, "console=ttyS0");
        let again: VmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        for (json, names) in [
            (r#"{"drives": [{"drive_id": "rootfs"}]}"#, "path_on_host"),
            (
                r#"{"drives": [{"drive_id": "a b", "path_on_host": "x"}]}"#,
                "drive_id",
            ),
            (
                r#"{"drives": [{"drive_id": "a", "path_on_host": "x", "rate_limiter": {}}]}"#,
                "rate_limiter",
            ),
            (
                r#"{"network-interfaces": [{"iface_id": "eth0"}]}"#,
                "host_dev_name",
            ),
            (
                r#"{"network-interfaces": [{"iface_id": "0", "host_dev_name": "t", "guest_mac": "01:00:00:00:00:00"}]}"#,
                "guest_mac",
            ),
            (
                r#"{"vsock": {"guest_cid": 2, "uds_path": "v"}}"#,
                "vsock.guest_cid",
            ),
            (r#"{"vsock": {"uds_path": "v"}}"#, "guest_cid"),
            (r#"{"entropy": {"rate_limiter": {}}}"#, "rate_limiter"),
            (r#"{"balloon": {"amount_mib": 129}}"#, "balloon.amount_mib"),
            (
                r#"{"balloon": {"amount_mib": 1, "free_page_hinting": true}}"#,
                "free_page_hinting",
            ),
            (r#"{"mmds-config": {"network_interfaces": []}}"#, "mmds-config"),
            (
                r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "smt": true}}"#,
                "smt",
            ),
            (
                r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "T2"}}"#,
                "cpu_template",
            ),
            (
                r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "2M"}}"#,
                "huge_pages",
            ),
            (
                r#"{"machine-config": {"vcpu_count": 0, "mem_size_mib": 64}}"#,
                "vcpu_count",
            ),
            (
                r#"{"machine-config": {"vcpu_count": 33, "mem_size_mib": 64}}"#,
                "vcpu_count",
            ),
            (
                r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 1}}"#,
                "mem_size_mib",
            ),
            (
                r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 18446744073709551615}}"#,
                "mem_size_mib",
            ),
            (r#"{"logger": {"level": "Loud"}}"#, "logger.level"),
            (r#"{"name": "Not A Name"}"#, "name"),
            (r#"{"drivess": []}"#, "drivess"),
            (
                r#"{"boot-source": {"kernel_image_path": "k", "kernel": "x"}}"#,
                "`kernel`",
            ),
            (r#"{"protection": {"holders": ["a:1"], "every": 5}}"#, "`every`"),
        ] {
            let error = parse(json).expect_err(json);
            assert!(error.contains(names), "{json}: {error}");
        }
        parse(r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "None"}}"#)
            .unwrap();
    }

    #[test]
    fn a_patch_changes_what_it_names() {
        let old = MachineSettings::default();
        let patch: MachineSettingsPatch = serde_json::from_str(r#"{"mem_size_mib": 512}"#).unwrap();
        let new = old.patched(patch).unwrap();
        assert_eq!(
            new,
            MachineSettings {
                mem_size_mib: 512,
                ..old.clone()
            }
        );
        assert!(old.patched(MachineSettingsPatch::default()).is_err());
        assert!(
            old.patched(MachineSettingsPatch {
                smt: Some(true),
                ..Default::default()
            })
            .is_err()
        );
    }
}
