//! Commands about what a store keeps: `keep`, `fold`, `verify`, `export`, `import`.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use segment::{SegmentName, VmId};

use super::{Agency, CliError, READ_DEADLINE, connect, print, print_json};
use crate::agent::view;
use crate::crashsafe::Disk;
use crate::store::{ArchiveError, ArchiveWriter, KeepPolicy, Moment, MomentError, Point};
use crate::transport::{CallError, Client, in_full};
use crate::wire::{Call, Failure, FoldCall, KeepCall, NameCall, Nothing, Reply, VerifyCall};

/// How much of an archive is sent at a time.
const PIECE: u64 = 512 << 10;

/// How long an agent may read and write: a store can be large, and the agent says all the while that it lives.
const WORK_DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Debug, Args)]
pub(super) struct Keep {
    /// The VM.
    vm: VmId,
    /// Like last=50,hourly=24,daily=7 (also weekly, monthly, yearly); `all`; or `default` for the agent's own [default:
    /// only show what holds].
    policy: Option<String>,
    /// Only at this agent, and not at the VM's other holders.
    #[arg(long)]
    only_here: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Keep {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        // Here already: the words are better beside the command line.
        if let Some(policy) = self.policy.as_deref().filter(|policy| *policy != "default")
            && let Err(error) = policy.parse::<KeepPolicy>()
        {
            return Err(CliError::Call(CallError::Failed(Failure {
                why: error.to_string(),
            })));
        }
        let mut client = connect(agent).await?;
        let call = KeepCall {
            vm: self.vm.clone(),
            policy: self.policy,
            only_here: self.only_here,
        };
        // It asks the other holders in turn.
        let Reply::Kept(report) = client.call(Call::Keep(call), WORK_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        match self.json {
            true => print_json(&report)?,
            false => print(&view::kept(&self.vm, &report)),
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct Fold {
    /// The VM.
    vm: VmId,
    /// Which restore point: EPOCH, GENERATION/EPOCH, or a time [default: the newest complete one].
    epoch: Option<String>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Fold {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        let mut client = connect(agent).await?;
        let tip = match &self.epoch {
            None => None,
            Some(text) => Some(choose(&mut client, &format!("{}@{text}", self.vm)).await?),
        };
        let call = FoldCall { vm: self.vm, tip };
        let Reply::Folded(report) = client.call(Call::Fold(call), WORK_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        match self.json {
            true => print_json(&report)?,
            false => print(&view::folded(&report)),
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// Only this VM's segments [default: all].
    vm: Option<VmId>,
    /// Only so many segments, chosen at random.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    sample: Option<u32>,
    /// What is in the agent's global store instead, every byte of it. Nothing is repaired there.
    #[arg(long, conflicts_with = "sample")]
    global: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Verify {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        let mut client = connect(agent).await?;
        let call = VerifyCall {
            vm: self.vm,
            sample: self.sample,
        };
        let call = match self.global {
            true => Call::GlobalVerify(call),
            false => Call::Verify(call),
        };
        let Reply::Verified(report) = client.call(call, WORK_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        match self.json {
            true => print_json(&report)?,
            false => print(&view::verified(&report)),
        }
        match report.bad - report.repaired {
            0 => Ok(()),
            bad => Err(CliError::Damaged { bad }),
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct Export {
    /// A VM (its newest complete restore point), or a restore point: VM/GENERATION/EPOCH, VM@EPOCH, VM@TIME, VM@-10m.
    what: String,
    /// The file to make: a tar of the whole chain, with SHA256SUMS.
    file: PathBuf,
}

impl Export {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        let mut client = connect(agent).await?;
        let tip = choose(&mut client, &self.what).await?;
        let dir = match self.file.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            Some(_) | None => PathBuf::from("."),
        };
        if self.file.exists() {
            return Err(refuse(format!("{} is there already", self.file.display())));
        }
        let mut temp = Disk::durable()
            .temp(&dir, ".standby-export")
            .map_err(|e| refuse(in_full(&e)))?;
        let failed = |e: ArchiveError| refuse(in_full(&e));
        let mut archive = ArchiveWriter::new(&mut temp);
        let (mut next, mut links, mut bytes) = (Some(tip.clone()), 0_u64, 0);
        while let Some(name) = next {
            let call = Call::Fetch(NameCall { name: name.clone() });
            let Reply::Fetch(link) = client.call(call, READ_DEADLINE).await? else {
                return Err(CliError::Mismatch);
            };
            archive.begin(&name, link.bytes).map_err(failed)?;
            while let Some(piece) = client.next_chunk().await? {
                archive.write(&piece).map_err(failed)?;
            }
            archive.end().map_err(failed)?;
            (links, bytes) = (links + 1, bytes + link.bytes);
            next = link.parent.map(|parent| parent.name);
        }
        archive.finish().map_err(failed)?;
        temp.publish(&self.file).map_err(|e| refuse(in_full(&e)))?;
        print(&format!(
            "{tip}, {links} links, {}, is in {}; check it with: tar xf FILE && sha256sum -c SHA256SUMS",
            view::size(bytes),
            self.file.display()
        ));
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct Import {
    /// What `standby export` made.
    file: PathBuf,
}

impl Import {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        let mut file = crate::regular::open(&self.file)
            .map_err(|e| refuse(format!("open {}: {e}", self.file.display())))?;
        let mut client = connect(agent).await?;
        let next = || {
            let mut piece = Vec::new();
            (&mut file).take(PIECE).read_to_end(&mut piece)?;
            Ok(Some(piece).filter(|piece| !piece.is_empty()))
        };
        let call = Call::Import(Nothing {});
        let Reply::Imported(report) = client.call_with_file(call, next, WORK_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        print(&format!(
            "{} is here: {} links are new, {} were here already",
            report.segment.name, report.added, report.held
        ));
        Ok(())
    }
}

fn refuse(why: String) -> CliError {
    CliError::Call(CallError::Failed(Failure { why }))
}

/// The restore point that `what` names at an agent.
async fn choose(client: &mut Client, what: &str) -> Result<SegmentName, CliError> {
    if let Ok(name) = what.parse() {
        return Ok(name);
    }
    let (vm, moment) = match what.split_once('@') {
        Some((vm, moment)) => (vm, Some(moment)),
        None => (what, None),
    };
    let vm = VmId::new(vm).map_err(|e| refuse(e.to_string()))?;
    let segments = super::list(client, Some(vm.clone()), false).await?;
    let points: Vec<Point> = segments
        .into_iter()
        .filter(|segment| segment.complete)
        .map(|segment| Point {
            name: segment.name,
            created_unix_ns: segment.created_unix_ns,
            label: segment.label,
        })
        .collect();
    let moment = match moment {
        Some(moment) => moment.parse().map_err(|e: MomentError| refuse(e.to_string()))?,
        // The newest: whatever the clocks were.
        None => match points.iter().max_by_key(|point| point.name.position()) {
            Some(newest) => return Ok(newest.name.clone()),
            None => return Err(refuse(MomentError::Nothing(vm).to_string())),
        },
    };
    let moment: Moment = moment;
    let chosen = moment.choose(&vm, &points, Moment::now());
    chosen
        .map(|point| point.name.clone())
        .map_err(|e| refuse(e.to_string()))
}
