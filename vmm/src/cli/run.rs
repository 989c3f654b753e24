//! `vmm run`.

use std::path::PathBuf;

use clap::Args;
use segment::VmId;

use super::host::{self, Audience, Host};
use super::logging::Log;
use super::options::{Keeping, Manner, RunDir, absolute};
use super::{CliError, Outcome, devices, on_runtime, rundir, size};
use crate::api::instance::{Identity, Origin};
use crate::config::{BalloonConfig, BootSourceConfig, DriveConfig, NetworkConfig, VmConfig, VsockConfig};
use crate::cpuid::baseline::CpuModel;

/// Runs a new VM. In the foreground its console is on standard input and output: on a terminal, Ctrl-A x ends the
/// VM and Ctrl-A Ctrl-A is one Ctrl-A for the guest.
#[derive(Debug, Args)]
#[command(
    after_help = "On a terminal, Ctrl-A x ends the VM and Ctrl-A Ctrl-A is one Ctrl-A for the \
                        guest.\nExit status: 0 the guest ended or was stopped, 1 an error, 3 fenced, 4 the guest cannot go \
                        on.\nExamples:\n  vmm run --name web --kernel vmlinuz --memory 512M --cpus 2\n  \
                        vmm run --name web --kernel vmlinuz --protect-to 10.0.0.2:7000,10.0.0.3:7000 --detach\n  \
                        vmm run --api-sock /tmp/vm.sock    # waits for Firecracker-style requests"
)]
pub(super) struct Run {
    /// The VM's id: 1 to 64 of a-z, 0-9, '.', '_' and '-'
    #[arg(long, alias = "id")]
    name: Option<String>,
    /// Linux bzImage (a distribution's `vmlinuz`), or ELF64 kernel with a PVH entry note
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line [default: console=ttyS0 reboot=k panic=1]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Memory, like 256M or 4G (powers of 1024: 256M is 256 MiB) [default: 128M]
    #[arg(long, value_name = "SIZE", value_parser = size::mib)]
    memory: Option<u64>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u8>,
    /// The CPU the guest sees: host, or baseline:x86-64-v2, -v3 or -v4, which unlike hosts can share [default: host]
    #[arg(long, value_name = "MODEL", value_parser = cpu_model)]
    cpu: Option<CpuModel>,
    /// A disk: a name and a raw image, like root=disk.raw; with ,ro the guest may only read it. Can be given again
    #[arg(long, value_name = "NAME=FILE[,ro]", value_parser = devices::drive)]
    disk: Vec<DriveConfig>,
    /// A network card: a name and a TAP interface, like 0=tap0; with ,mac=06:00:ac:10:00:02 its address. Can be given
    /// again
    #[arg(long, value_name = "NAME=TAP[,mac=MAC]", value_parser = devices::card)]
    net: Vec<NetworkConfig>,
    /// A source of entropy
    #[arg(long)]
    rng: bool,
    /// Stream sockets between the guest, whose address is CID (from 3 on), and a Unix socket of this host
    /// [default PATH: RUN_DIR/NAME/vsock]
    #[arg(long, value_name = "CID[=PATH]", value_parser = devices::vsock)]
    vsock: Option<VsockConfig>,
    /// A balloon, by which the guest gives back memory it has no use for, and as much as SIZE from the start on (`vmm
    /// balloon` changes it)
    #[arg(long, value_name = "SIZE", value_parser = devices::balloon, num_args = 0..=1, default_missing_value = "0M")]
    balloon: Option<BalloonConfig>,
    /// Configuration in the JSON of Firecracker's file; options given here go before it
    #[arg(long, alias = "config-file", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    keeping: Keeping,
    #[command(flatten)]
    run_dir: RunDir,
    /// Path of the control socket [default: RUN_DIR/NAME/api.sock]. Without a kernel, wait there for requests
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// Configure only: wait for InstanceStart on the control socket (`vmm resume` sends it)
    #[arg(long)]
    no_start: bool,
    #[command(flatten)]
    manner: Manner,
}

impl Run {
    pub(super) fn run(self) -> Result<Outcome, CliError> {
        if self.manner.detach && !self.manner.detached_child {
            // What is wrong on its face is said here already.
            self.host()?;
            return super::detach::detach();
        }
        let audience = self.audience();
        let log = Log::start(if audience == Audience::Terminal {
            "warn"
        } else {
            "info"
        })
        .map_err(CliError::Said)?;
        let result = self.host().and_then(|host| on_runtime(host.run(&log)));
        result.or_else(|error| host::tell_failure(audience, error))
    }

    fn audience(&self) -> Audience {
        if self.manner.detached_child {
            Audience::Parent { detached: true }
        } else {
            Audience::Terminal
        }
    }

    fn host(&self) -> Result<Host, CliError> {
        let config = self.config()?;
        let named = host::name(self.name.as_deref(), &config)?;
        let waits = config.boot_source.is_none() || self.no_start;
        if config.boot_source.is_none() && self.api_sock.is_none() {
            // Nobody could configure it.
            config.boot()?;
        }
        let anonymous = named.is_none();
        let name = match named {
            Some(name) => name,
            // As Firecracker, which needs no name either.
            None if self.api_sock.is_some() => VmId::new(&format!("anonymous-{}", std::process::id()))?,
            None => {
                return Err(CliError::Said(
                    "the VM has no name: give it one with --name, by which it is found, protected and restored".into(),
                ));
            }
        };
        let run_dir = self.run_dir.path();
        let nameless = anonymous && config.store.is_none();
        let console_log = match (&self.manner.console_log, self.audience()) {
            (Some(log), _) => Some(absolute(log)),
            (None, Audience::Parent { .. }) => Some(run_dir.join(name.as_str()).join("console.log")),
            (None, Audience::Terminal) => None,
        };
        Ok(Host {
            identity: Identity {
                store: self.keeping.store(&name, &config),
                store_budget: self.keeping.budget(),
                generation: None,
                trust: self.keeping.trust.clone(),
                second_copy: false,
                keys: self.keeping.keys()?,
                vsock: rundir::vsock(&run_dir, &name),
                name,
            },
            start: (!waits).then_some((Origin::Boot, true)),
            config,
            run_dir,
            api_sock: self.api_sock.as_deref().map(absolute),
            console_log,
            audience: self.audience(),
            over_older: false,
            nameless,
        })
    }

    fn config(&self) -> Result<VmConfig, CliError> {
        let mut config = self
            .config
            .as_deref()
            .map(VmConfig::read)
            .transpose()?
            .unwrap_or_default();
        if let Some(kernel) = &self.kernel {
            let before = config.boot_source.take();
            let (initrd_path, boot_args) =
                before.map_or((None, None), |before| (before.initrd_path, before.boot_args));
            config.boot_source = Some(BootSourceConfig {
                kernel_image_path: kernel.clone(),
                initrd_path,
                boot_args,
            });
        }
        match &mut config.boot_source {
            Some(source) => {
                source.initrd_path = self.initrd.clone().or_else(|| source.initrd_path.take());
                source.boot_args = self.cmdline.clone().or_else(|| source.boot_args.take());
            }
            None if self.initrd.is_some() || self.cmdline.is_some() => {
                return Err(CliError::Said(
                    "--initrd and --cmdline are for a kernel: give one with --kernel".into(),
                ));
            }
            None => {}
        }
        config.machine_config.mem_size_mib = self.memory.unwrap_or(config.machine_config.mem_size_mib);
        if let Some(cpu) = self.cpu {
            config.machine_config.cpu = Some(cpu.to_string());
        }
        config.machine_config.vcpu_count = self.cpus.unwrap_or(config.machine_config.vcpu_count);
        config.drives.extend(self.disk.iter().cloned());
        config.network_interfaces.extend(self.net.iter().cloned());
        if self.rng {
            config.entropy.get_or_insert_default();
        }
        config.vsock = self.vsock.clone().or(config.vsock);
        config.balloon = self.balloon.clone().or(config.balloon);
        self.keeping.apply(&mut config)?;
        config.validate()?;
        Ok(config)
    }
}

fn cpu_model(name: &str) -> Result<CpuModel, String> {
    name.parse()
}
