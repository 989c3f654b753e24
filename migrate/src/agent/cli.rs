//! The command line of `standby`.

mod cluster;
mod config;
mod global;
mod store;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use segment::{SegmentName, VmId};
use tokio::signal::unix::{SignalKind, signal};

use super::systemd::Systemd;
use super::{Agent, AgentConfig, AgentError, HotStandby, Housekeeping, Offer, VmPattern, view};
use crate::ca::{CaCommand, CaError};
use crate::keyfile::{KeyCommand, KeyFileArgs, KeyFileError};
use crate::placement::LabelRule;
use crate::protect::DEFAULT_MAX_LINKS;
use crate::registry::{EtcdAccess, NodeRecord, Registry, RegistryAddr, RegistryError, Role, VmRecord};
use crate::store::KeepPolicy;
use crate::transport::{CallError, CertRole, Client, Identity, IdentityArgs, TransportError, in_full};
use crate::wire::{
    Call, ForgetCall, KeepCall, ListCall, MAX_PAGE_SEGMENTS, NameCall, Nothing, PromoteCall, Reply,
    SegmentBrief,
};

/// How long an agent may take for what reads only.
const READ_DEADLINE: Duration = Duration::from_secs(30);
/// How long a promote may take.
const PROMOTE_DEADLINE: Duration = Duration::from_secs(600);

/// Keeps a standby of protected VMs: stores their checkpoints, and runs them when their host is gone.
#[derive(Debug, Parser)]
#[command(name = "standby", version)]
pub struct Cli {
    /// The agent to ask.
    #[arg(
        long,
        global = true,
        env = "STANDBY_AGENT",
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:7400"
    )]
    agent: String,
    #[command(flatten)]
    identity: IdentityArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this host.
    Serve(Box<ServeArgs>),
    /// Make certificates for the nodes of a cluster.
    #[command(subcommand)]
    Ca(CaCommand),
    /// Make and rotate the keys that segments are encrypted with.
    #[command(subcommand)]
    Key(KeyCommand),
    /// List the segments an agent holds; of one VM: its restore points.
    Ls {
        /// Only those of this VM.
        vm: Option<VmId>,
        /// The restore points in the agent's global store instead, with the bytes of their whole chains.
        #[arg(long)]
        global: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say which restore points of a VM are kept, or show it.
    Keep(store::Keep),
    /// Write a restore point as one full segment, so that a restore reads no chain.
    Fold(store::Fold),
    /// Read stored segments again, check every byte, and fetch damaged ones from other holders.
    Verify(store::Verify),
    /// Write a restore point with all it stands on to one file.
    Export(store::Export),
    /// Take a restore point from a file that `export` made: checked whole before anything is stored.
    Import(store::Import),
    /// Say which nodes hold a VM, and why: the choice and each refusal.
    Explain(cluster::Explain),
    /// Run a copy of a VM at the agent's host for a while, without a network, to see that a takeover would work.
    Drill(cluster::Drill),
    /// Tell what happened to a VM: owners, takeovers, with times and reasons.
    History(cluster::History),
    /// Give a node no more segments, and have those it has copied to others.
    Drain(cluster::Drain),
    /// Let a node that was drained take segments again.
    Join(cluster::Join),
    /// Take a node that holds nothing any more out of the cluster.
    Leave(cluster::Leave),
    /// Show one segment.
    Show {
        /// Its name: VM/GENERATION/EPOCH.
        segment: SegmentName,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a VM on the agent's host, from its newest committed checkpoint. Its owner until now is fenced.
    Promote {
        /// The VM.
        vm: VmId,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// Only say what would be done.
        #[arg(long)]
        dry_run: bool,
        /// Go on from the newest checkpoint that is there, even if a later one was committed and is lost: everything
        /// the guest did after it is gone for ever, though others may have seen it. Only when its holders are gone for
        /// good.
        #[arg(long)]
        accept_loss: bool,
        /// Take it over though too few holders answer to fence its owner. If that owner still runs somewhere, the VM runs
        /// twice and both act on the world; and what only the missing holders have is lost. Only when its host is off for
        /// certain, and the missing holders are gone for good.
        #[arg(long)]
        force: bool,
    },
    /// Show the agent, the nodes and the VMs.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Forget a stopped VM: its record, and its segments at the agent and its other holders.
    Forget {
        /// The VM.
        vm: VmId,
        /// Also when it is recorded as running: for when its host is gone for good and it is not wanted any more.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// A file with these options (TOML): `listen = "10.0.0.1:7400"`. What is on the command line wins.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to listen.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7400")]
    listen: String,
    /// The address by which others reach it [default: the one it listens on]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// The directory for segments, the registry and what runs here.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// This node's name, unique in the cluster [default: the certificate's; without one, the host's name].
    #[arg(long)]
    name: Option<String>,
    /// What this node does [default: what its certificate allows; without one, execute,store].
    #[arg(long, value_delimiter = ',')]
    roles: Vec<Role>,
    /// Where the registry is: `embedded` (this agent keeps it), HOST:PORT of the agent that does, or
    /// etcd://HOST:PORT,HOST:PORT,HOST:PORT.
    #[arg(long, value_name = "embedded|HOST:PORT|etcd://..", default_value = "embedded")]
    registry: RegistryAddr,
    /// The most that segments may take, like 20G [default: what the disk has].
    #[arg(long, value_name = "SIZE")]
    budget: Option<ByteSize>,
    /// Which restore points are kept, like last=50,hourly=24,daily=7; also weekly, monthly, yearly. `standby keep VM`
    /// says otherwise for one VM. The newest, labelled ones (of a guest's own the newest 16) and those in use are always kept.
    #[arg(long, value_name = "POLICY", default_value = "all")]
    keep: KeepPolicy,
    /// The most links that a restore has to read, the full segment included: longer chains are folded.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_LINKS + 1, value_parser = clap::value_parser!(u32).range(2..=65536))]
    max_links: u32,
    /// How often every stored segment is read again and checked, like 24h; `never`.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = every)]
    verify_every: Every,
    /// The most bytes a second that are read to merge and to verify in the background, like 64M.
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    background_rate: ByteSize,
    /// The vmm binary [default: the one beside this binary, or in the PATH].
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Take this name over from a node that is gone for good.
    #[arg(long)]
    replace: bool,
    /// Folder of the control sockets of the VMs it takes over, for `vmm ps --run-dir DIR` [default: DATA/run].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// How long a VM that is taken over may take to run before it is ended, like 2min [default: by its size].
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    restore_timeout: Option<Duration>,
    /// What a device of the VMs it takes over is on this host: [VM/]net:NAME=TAP, [VM/]disk:NAME=FILE or
    /// [VM/]vsock:0=PATH, where {vm} is the VM's name. Without VM/ for all that have such a device. A disk without one gets a file under DATA. May be
    /// given more than once.
    #[arg(long, value_name = "[VM/]NAME=WHAT")]
    bind: Vec<Offer>,
    /// How often a copy of each running VM that it holds is run here for 5 s, without a network, like 24h: that a takeover
    /// would work, and how long it would take; `never`. One at a time.
    #[arg(long, value_name = "TIME", default_value = "never", value_parser = every)]
    drill_every: Every,
    /// VMs of which it keeps an image, uncompressed and up to date, that a takeover here runs on at once: web, db-*, all.
    /// What is named first comes first. May be given more than once [default: none].
    #[arg(long, value_name = "VMS", value_delimiter = ',')]
    hot: Vec<VmPattern>,
    /// The most memory that the images may take, like 16G: the sizes of the guests' memories [default: half of the host's].
    #[arg(long, value_name = "SIZE", requires = "hot")]
    hot_memory: Option<ByteSize>,
    /// The most that their disks may take in DATA/hot [default: half of what is free there at the start].
    #[arg(long, value_name = "SIZE", requires = "hot")]
    hot_disk: Option<ByteSize>,
    /// A label of this node that placement chooses by, like zone=a. May be given more than once.
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// How long after its last sign of life this node counts as gone.
    #[arg(long, value_name = "TIME", default_value = "6s")]
    lease: humantime::Duration,
    /// How long a holder of a VM may be gone before another takes its place.
    #[arg(long, value_name = "TIME", default_value = "5min")]
    replace_after: humantime::Duration,
    /// The authority that the certificates of etcd's servers are signed by (PEM): TLS is spoken with them.
    #[arg(long, value_name = "FILE")]
    etcd_ca: Option<PathBuf>,
    /// This node's certificate for etcd (PEM).
    #[arg(long, value_name = "FILE")]
    etcd_cert: Option<PathBuf>,
    /// The key of that certificate (PEM).
    #[arg(long, value_name = "FILE")]
    etcd_key: Option<PathBuf>,
    /// The user for etcd.
    #[arg(long, value_name = "NAME")]
    etcd_user: Option<String>,
    /// The file whose first line is that user's password.
    #[arg(long, value_name = "FILE")]
    etcd_password_file: Option<PathBuf>,
    #[command(flatten)]
    global: global::Global,
    #[command(flatten)]
    keys: KeyFileArgs,
    /// Where to answer `GET /metrics` (OpenMetrics text, plain HTTP, for everyone who reaches it) [default: nowhere].
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<String>,
}

/// KEY=VALUE.
fn label(text: &str) -> Result<(String, String), String> {
    match text.parse::<LabelRule>() {
        Ok(LabelRule::Is(key, value)) => Ok((key, value)),
        Ok(_) => Err(format!("{text:?} is no label: use KEY=VALUE")),
        Err(error) => Err(error.to_string()),
    }
}

/// How often something is done, if ever.
#[derive(Debug, Clone, Copy)]
struct Every(Option<Duration>);

fn every(text: &str) -> Result<Every, String> {
    if text == "never" {
        return Ok(Every(None));
    }
    match humantime::parse_duration(text) {
        Ok(every) if every >= Duration::from_secs(1) => Ok(Every(Some(every))),
        Ok(_) => Err("it has to be a second at least, or `never`".into()),
        Err(e) => Err(format!("{e}: write it like 24h or 30min, or `never`")),
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error("no agent answers at {address}: start one with `standby serve`, or name it with --agent")]
    NoAgent {
        address: String,
        #[source]
        source: Box<TransportError>,
    },
    #[error(
        "the certificate is of node {certificate}, not of {name}: leave --name out, or name its own folder with --tls"
    )]
    OtherName { name: String, certificate: String },
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("the agent answered something else: is it of another version?")]
    Mismatch,
    #[error("{bad} segments are bad and were not repaired: what to do is above")]
    Damaged { bad: u64 },
    #[error("the last drill of {vm} failed at {nodes}: as it is, it could not be taken over there")]
    DrillFailed { vm: VmId, nodes: String },
    #[error("{what}")]
    System {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("write the answer as JSON")]
    Json(#[from] serde_json::Error),
}

impl Cli {
    /// Does what was asked; messages go to the standard error.
    #[must_use]
    pub fn run(self) -> ExitCode {
        let threads = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let done = threads
            .map_err(|source| CliError::System {
                what: "start threads",
                source,
            })
            .and_then(|runtime| runtime.block_on(self.dispatch()));
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {}", in_full(&error));
                ExitCode::FAILURE
            }
        }
    }

    async fn dispatch(self) -> Result<(), CliError> {
        if let Command::Ca(command) = self.command {
            print(&command.run()?);
            return Ok(());
        }
        if let Command::Key(command) = self.command {
            print(&command.run()?);
            return Ok(());
        }
        if let Command::Serve(args) = self.command {
            return serve(*args, &self.identity).await;
        }
        let agent = Agency {
            address: self.agent,
            identity: self.identity.identity("standby")?,
        };
        match self.command {
            Command::Serve(_) | Command::Ca(_) | Command::Key(_) => Ok(()),
            Command::Ls { vm, global, json } => ls(&agent, vm, global, json).await,
            Command::Keep(keep) => keep.run(&agent).await,
            Command::Explain(explain) => explain.run(&agent).await,
            Command::Drill(drill) => drill.run(&agent).await,
            Command::History(history) => history.run(&agent).await,
            Command::Drain(drain) => drain.run(&agent).await,
            Command::Join(join) => join.run(&agent).await,
            Command::Leave(leave) => leave.run(&agent).await,
            Command::Fold(fold) => fold.run(&agent).await,
            Command::Verify(verify) => verify.run(&agent).await,
            Command::Export(export) => export.run(&agent).await,
            Command::Import(import) => import.run(&agent).await,
            Command::Show { segment, json } => show(&agent, segment, json).await,
            Command::Promote {
                vm,
                json,
                dry_run,
                accept_loss,
                force,
            } => {
                let call = PromoteCall {
                    vm,
                    dry_run,
                    accept_loss,
                    force,
                };
                promote(&agent, call, json).await
            }
            Command::Status { json } => status(&agent, json).await,
            Command::Forget { vm, force } => forget(&agent, vm, force).await,
        }
    }

    /// Whether this process is the agent itself, which logs what it does.
    #[must_use]
    pub fn serves(&self) -> bool {
        matches!(self.command, Command::Serve(_))
    }
}

async fn serve(args: ServeArgs, identity: &IdentityArgs) -> Result<(), CliError> {
    let host = || {
        std::fs::read_to_string("/proc/sys/kernel/hostname")
            .map(|n| n.trim().to_owned())
            .map_err(|source| CliError::System {
                what: "find the host's name: give one with --name",
                source,
            })
    };
    let wanted = args.name.clone().map_or_else(host, Ok)?;
    let identity = identity.identity(&wanted)?;
    if let Some(name) = args.name.filter(|name| *name != identity.name()) {
        return Err(CliError::OtherName {
            name,
            certificate: identity.name().to_owned(),
        });
    }
    // Before anything is opened: a signal that comes while the agent starts ends it cleanly too.
    let signals = |kind| {
        signal(kind).map_err(|source| CliError::System {
            what: "listen to signals",
            source,
        })
    };
    let mut hangup = signals(SignalKind::hangup())?;
    let (mut term, mut int) = (
        signals(SignalKind::terminate())?,
        signals(SignalKind::interrupt())?,
    );
    let roles = match (args.roles, identity.certificate()) {
        (roles, _) if !roles.is_empty() => roles,
        (_, None) => vec![Role::Execute, Role::Store],
        (_, Some(certificate)) => {
            let of = |(role, cert)| certificate.node.has(cert).then_some(role);
            let both = [(Role::Execute, CertRole::Execute), (Role::Store, CertRole::Store)];
            both.into_iter().filter_map(of).collect()
        }
    };
    let own = identity.clone();
    let config = AgentConfig {
        listen: args.listen,
        advertise: args.advertise,
        data: args.data,
        identity,
        roles,
        registry: args.registry,
        budget: args.budget.map(|b| b.as_u64()),
        vmm: args.vmm,
        replace: args.replace,
        run_dir: args.run_dir,
        restore_timeout: args.restore_timeout,
        housekeeping: Housekeeping {
            keep: args.keep,
            max_links: args.max_links,
            verify_every: args.verify_every.0,
            rate: Some(args.background_rate.as_u64()),
        },
        labels: args.label.into_iter().collect(),
        etcd: EtcdAccess {
            ca: args.etcd_ca,
            cert: args.etcd_cert,
            key: args.etcd_key,
            user: args.etcd_user,
            password_file: args.etcd_password_file,
        },
        lease_ttl: args.lease.into(),
        replace_after: args.replace_after.into(),
        offers: args.bind,
        drill_every: args.drill_every.0,
        hot: HotStandby {
            vms: args.hot,
            memory: args.hot_memory.map(|size| size.as_u64()),
            disk: args.hot_disk.map(|size| size.as_u64()),
        },
        global: args.global.options(),
        metrics: args.metrics,
        key_file: args.keys.key_file,
    };
    let agent = Agent::start(config).await?;
    // For scripts that wait for it, and that let the system choose the port.
    print(&format!("listening on {}", agent.address()));
    if let Some(address) = agent.metrics_address() {
        print(&format!("metrics at http://{address}/metrics"));
    }
    let systemd = Systemd::from_env();
    systemd.say("READY=1");
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = hangup.recv() => {
                own.reload();
                agent.reload_keys();
            }
            () = systemd.next_sign() => systemd.say("WATCHDOG=1"),
        }
    }
    systemd.say("STOPPING=1");
    tracing::info!("the agent ends; VMs it started go on");
    agent.stop().await;
    Ok(())
}

/// Which agent is asked, and by whom.
struct Agency {
    address: String,
    identity: Identity,
}

async fn connect(agent: &Agency) -> Result<Client, CliError> {
    Client::connect(&agent.address, &agent.identity)
        .await
        .map_err(|source| match source {
            source @ (TransportError::Connect { .. } | TransportError::Timeout { .. }) => CliError::NoAgent {
                address: agent.address.clone(),
                source: Box::new(source),
            },
            other => CliError::Call(other.into()),
        })
}

/// All segments an agent holds, or those of one VM.
async fn list(client: &mut Client, vm: Option<VmId>, global: bool) -> Result<Vec<SegmentBrief>, CliError> {
    let mut segments: Vec<SegmentBrief> = Vec::new();
    loop {
        let after = segments.last().map(|s| s.name.clone());
        let call = ListCall {
            vm: vm.clone(),
            after,
            limit: MAX_PAGE_SEGMENTS,
        };
        let call = match global {
            true => Call::GlobalList(call),
            false => Call::List(call),
        };
        let Reply::List(page) = client.call(call, READ_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        let end = !page.more || page.segments.is_empty();
        segments.extend(page.segments);
        if end {
            return Ok(segments);
        }
    }
}

async fn ls(agent: &Agency, vm: Option<VmId>, global: bool, json: bool) -> Result<(), CliError> {
    let mut client = connect(agent).await?;
    let segments = list(&mut client, vm.clone(), global).await?;
    if json {
        return print_json(&segments.iter().map(view::segment_json).collect::<Vec<_>>());
    }
    if global {
        print(&view::segments(&segments, "the global store"));
        return Ok(());
    }
    let mut text = view::segments(&segments, &client.welcome().node);
    if let Some(vm) = vm {
        let ask = KeepCall {
            vm: vm.clone(),
            policy: None,
            only_here: true,
        };
        let Reply::Kept(report) = client.call(Call::Keep(ask), READ_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        let Reply::Status(status) = client.call(Call::Status(Nothing {}), READ_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        text = view::points(&vm, &text, &report, &status);
    }
    print(&text);
    Ok(())
}

async fn show(agent: &Agency, name: SegmentName, json: bool) -> Result<(), CliError> {
    let mut client = connect(agent).await?;
    let Reply::Show(detail) = client.call(Call::Show(NameCall { name }), READ_DEADLINE).await? else {
        return Err(CliError::Mismatch);
    };
    match json {
        true => print_json(&detail)?,
        false => print(&view::segment(&detail)),
    }
    Ok(())
}

async fn promote(agent: &Agency, call: PromoteCall, json: bool) -> Result<(), CliError> {
    let mut client = connect(agent).await?;
    let Reply::Promoted(report) = client.call(Call::Promote(call), PROMOTE_DEADLINE).await? else {
        return Err(CliError::Mismatch);
    };
    match json {
        true => print_json(&view::promote_json(&report))?,
        false => print(&view::promote(&report, &client.welcome().node)),
    }
    Ok(())
}

async fn forget(agent: &Agency, vm: VmId, force: bool) -> Result<(), CliError> {
    let mut client = connect(agent).await?;
    let call = Call::Forget(ForgetCall {
        vm: vm.clone(),
        force,
        only_here: false,
        wait_ms: None,
    });
    let terminal = std::io::stderr().is_terminal();
    loop {
        let Reply::Forgotten(report) = client.call(call.clone(), READ_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        if report.left == 0 {
            if terminal {
                eprint!("\r\x1b[K");
            }
            print(&view::forgotten(&vm, &report));
            return Ok(());
        }
        if terminal {
            eprint!(
                "\r\x1b[K{vm}: {} segments left (it goes on by itself)",
                report.left
            );
        }
    }
}

async fn status(agent: &Agency, json: bool) -> Result<(), CliError> {
    let mut client = connect(agent).await?;
    let Reply::Status(status) = client.call(Call::Status(Nothing {}), READ_DEADLINE).await? else {
        return Err(CliError::Mismatch);
    };
    let registry = client
        .welcome()
        .registry
        .clone()
        .unwrap_or_else(|| agent.address.clone());
    // The agent's own state is worth showing when the registry is away.
    let cluster = match &status.registry_problem {
        None => Some(cluster(&Registry::remote(&registry, &agent.identity)).await?),
        Some(_) => None,
    };
    let (nodes, vms) = cluster.unwrap_or_default();
    match json {
        true => print_json(&serde_json::json!({ "agent": status, "nodes": nodes, "vms": vms }))?,
        false => print(&view::status(&status, &nodes, &vms)),
    }
    Ok(())
}

async fn cluster(registry: &Registry) -> Result<(Vec<NodeRecord>, Vec<VmRecord>), CliError> {
    Ok((registry.all_nodes().await?, registry.all_vms().await?))
}

fn print_json(value: &impl serde::Serialize) -> Result<(), CliError> {
    print(&serde_json::to_string_pretty(value)?);
    Ok(())
}

/// To the standard output; a reader that went away (`| head`) is no failure.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", text.trim_end());
    let _ = out.flush();
}
