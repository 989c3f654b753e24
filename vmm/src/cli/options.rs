//! Options that `run` and `restore` share.

use std::path::{Path, PathBuf};

use clap::Args;
use migrate::keyfile::{KeyFileArgs, KeyFileError};
use migrate::placement::{LabelRule, Policy};
use migrate::transport::IdentityArgs;
use segment::{Keyring, VmId};

use super::{CliError, rundir, size};
use crate::config::{StoreConfig, VmConfig};
use crate::session::{FailoverMode, OnLapse, Protection};

/// Where the VMs of this host are found.
#[derive(Debug, Clone, Args)]
pub(super) struct RunDir {
    /// Folder of the control sockets, one folder a VM [default: $XDG_RUNTIME_DIR/understudy, /run/understudy for
    /// root, else /tmp/understudy-UID]
    #[arg(long, env = "UNDERSTUDY_RUN_DIR", value_name = "DIR", hide_env = true)]
    run_dir: Option<PathBuf>,
}

impl RunDir {
    pub(super) fn path(&self) -> PathBuf {
        rundir::run_dir(self.run_dir.as_deref())
    }
}

/// Where checkpoints go.
#[derive(Debug, Clone, Args)]
pub(super) struct Keeping {
    /// Folder of the VM's own checkpoints [default: $XDG_STATE_HOME/understudy/vms/NAME, for root
    /// /var/lib/understudy/vms/NAME]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// The most that folder may hold, like 10G (powers of 1024)
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    store_budget: Option<u64>,
    /// Memory for pages as they were last stored, like 256M: a page written again is then stored as a change of what
    /// it was, which is much shorter [default: none]
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    delta_cache: Option<u64>,
    /// Standby agents that hold copies
    #[arg(long, value_name = "HOST:PORT,..", value_delimiter = ',')]
    protect_to: Vec<String>,
    /// Standby agents that hold copies are chosen among the registry's nodes, and replaced when they are gone
    #[arg(long, conflicts_with = "protect_to", requires = "registry")]
    protect: bool,
    /// How many nodes hold copies, with --protect [default: 2]
    #[arg(long, value_name = "N", requires = "protect")]
    replicas: Option<u32>,
    /// What each of them must be labelled, with --protect: KEY=VALUE, KEY!=VALUE, KEY!= (another than this host's
    /// node), KEY. May be given more than once
    #[arg(long, value_name = "RULE", requires = "protect")]
    label: Vec<LabelRule>,
    /// The label whose values they are spread over, with --protect
    #[arg(long, value_name = "KEY", requires = "protect")]
    spread: Option<String>,
    /// What each must have free, with --protect, like 10G
    #[arg(long, value_name = "SIZE", value_parser = size::bytes, requires = "protect")]
    min_free: Option<u64>,
    /// Time from one checkpoint to the next, when protected [default: 200ms]
    #[arg(long, value_name = "TIME", value_parser = size::millis)]
    every: Option<u64>,
    /// How many holders must have a checkpoint for it to count [default: a majority]
    #[arg(long, value_name = "N")]
    ack_quorum: Option<usize>,
    /// The agents that answer for the registry [default: the ones the holders name]
    #[arg(long, value_name = "HOST:PORT,..")]
    registry: Option<String>,
    /// Whether the guest runs under a lease and stands still when neither the registry nor enough holders renew it, so
    /// that no other host runs it at the same time [default: manual]
    #[arg(long, value_enum, value_name = "HOW")]
    failover: Option<FailoverMode>,
    /// How long that lease is: default (2.5 s), fast (240 ms, for a healthy LAN), or like ttl=2500ms,renew=400ms
    #[arg(long, value_name = "PROFILE")]
    detect: Option<String>,
    /// What becomes of the process when that lease ran out: it waits for another one, or ends as if it was fenced
    /// [default: standby]
    #[arg(long, value_enum, value_name = "WHAT")]
    on_lapse: Option<OnLapse>,
    #[command(flatten)]
    key_file: KeyFileArgs,
    #[command(flatten)]
    pub(super) trust: IdentityArgs,
}

impl Keeping {
    /// Puts what was given into a configuration; what was not stays as it is there.
    pub(super) fn apply(&self, config: &mut VmConfig) -> Result<(), CliError> {
        if let Some(path) = &self.store {
            let budget_bytes = config.store.as_ref().and_then(|store| store.budget_bytes);
            config.store = Some(StoreConfig {
                path: path.clone(),
                budget_bytes,
            });
        }
        if let (Some(store), Some(budget)) = (&mut config.store, self.store_budget) {
            store.budget_bytes = Some(budget);
        }
        if let Some(bytes) = self.delta_cache {
            config.checkpoints.delta_cache_bytes = bytes;
        }
        let holders: Vec<String> = self
            .protect_to
            .iter()
            .map(|holder| holder.trim().to_owned())
            .collect();
        if holders.iter().any(String::is_empty) {
            return Err(CliError::Said(format!(
                "--protect-to {:?} names an empty holder: give HOST:PORT of each standby agent, with commas between, or \
                 leave the option out for a VM that is not protected",
                self.protect_to.join(",")
            )));
        }
        if !holders.is_empty() {
            let before = config.protection.take();
            config.protection = Some(Protection {
                holders,
                every_ms: before.as_ref().map_or(200, |before| before.every_ms),
                ack_quorum: before.as_ref().and_then(|before| before.ack_quorum),
                registry: before.as_ref().and_then(|before| before.registry.clone()),
                policy: None,
                failover: before.as_ref().and_then(|before| before.failover),
                detect: before.as_ref().and_then(|before| before.detect.clone()),
                on_lapse: before.and_then(|before| before.on_lapse),
            });
        }
        if self.protect {
            let usual = Policy::of(self.replicas.unwrap_or(2));
            let policy = Policy {
                ack_quorum: self.ack_quorum.map_or(usual.ack_quorum, |quorum| quorum as u32),
                labels: self.label.clone(),
                spread: self.spread.clone(),
                min_free_bytes: self.min_free.unwrap_or(0),
                ..usual
            };
            policy.check().map_err(CliError::Said)?;
            config.protection = Some(Protection {
                holders: Vec::new(),
                every_ms: config.protection.as_ref().map_or(200, |before| before.every_ms),
                ack_quorum: None,
                registry: None,
                policy: Some(policy),
                failover: config.protection.as_ref().and_then(|before| before.failover),
                detect: config
                    .protection
                    .as_ref()
                    .and_then(|before| before.detect.clone()),
                on_lapse: config.protection.as_ref().and_then(|before| before.on_lapse),
            });
        }
        match &mut config.protection {
            Some(protection) => {
                protection.every_ms = self.every.unwrap_or(protection.every_ms);
                protection.ack_quorum = self.ack_quorum.or(protection.ack_quorum);
                protection.failover = self.failover.or(protection.failover);
                protection.on_lapse = self.on_lapse.or(protection.on_lapse);
                protection.detect = self.detect.clone().or_else(|| protection.detect.take());
                protection.registry = self.registry.clone().or_else(|| protection.registry.take());
            }
            None if self.every.is_some()
                || self.ack_quorum.is_some()
                || self.registry.is_some()
                || self.failover.is_some()
                || self.detect.is_some()
                || self.on_lapse.is_some() =>
            {
                return Err(CliError::Said(
                    "--every, --ack-quorum, --registry, --failover, --detect and --on-lapse say how a VM is protected: say to where with \
                     --protect-to HOST:PORT, or have holders chosen with --protect"
                        .into(),
                ));
            }
            None => {}
        }
        Ok(())
    }

    /// The store's bound, for a store whose folder is not in the configuration.
    pub(super) fn budget(&self) -> Option<u64> {
        self.store_budget
    }

    /// What checkpoints are encrypted with.
    pub(super) fn keys(&self) -> Result<Keyring, KeyFileError> {
        self.key_file.keys()
    }

    /// The store's folder.
    pub(super) fn store(&self, name: &VmId, config: &VmConfig) -> PathBuf {
        config
            .store
            .as_ref()
            .map_or_else(|| rundir::default_store(name), |store| store.path.clone())
    }
}

/// How the process runs.
#[derive(Debug, Clone, Args)]
pub(super) struct Manner {
    /// Go on in the background, the console in a file, and return when the VM runs
    #[arg(long)]
    pub(super) detach: bool,
    /// Add what the guest says to this file
    #[arg(long, value_name = "FILE")]
    pub(super) console_log: Option<PathBuf>,
    /// This is the process that went on in the background.
    #[arg(long, hide = true)]
    pub(super) detached_child: bool,
}

/// The path as it is from every folder.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
