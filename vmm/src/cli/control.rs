//! `vmm pause`, `resume`, `stop`, `checkpoint`: one request to a VM that runs.

use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::options::RunDir;
use super::rundir::{Found, Place};
use super::{CliError, Outcome, devices, print, print_json, size};
use crate::api::Client;
use crate::api::client::{ClientError, DEFAULT_DEADLINE};
use crate::api::resources::balloon::{BalloonStats, BalloonUpdate};
use crate::api::resources::machine::{Action, ActionType, InstanceInfo, VmState, VmStateChange};
use crate::api::resources::replication::{DEFAULT_DRAIN_MS, Stop as StopRequest, TakeCheckpoint};
use crate::session::{CheckpointReport, StopReport};

/// How long a checkpoint of a large guest may take.
const CHECKPOINT_DEADLINE: Duration = Duration::from_secs(3600);
/// How long a guest may take to boot or to agree with the registry.
const START_DEADLINE: Duration = Duration::from_secs(300);

/// Which VM.
#[derive(Debug, Clone, Args)]
pub(super) struct Target {
    /// The VM's name
    name: String,
    #[command(flatten)]
    run_dir: RunDir,
}

impl Target {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A client of it.
    pub(super) fn client(&self) -> Result<Client, CliError> {
        let base = self.run_dir.path();
        find(&base, &self.name).map(|found| Client::new(found.socket()))
    }
}

/// A VM of this host that runs.
pub(super) fn find(base: &Path, name: &str) -> Result<Found, CliError> {
    let unknown = || {
        CliError::Said(format!(
            "no VM named {name} runs here (in {base:?}): `vmm ps` lists those that do"
        ))
    };
    segment::VmId::new(name).map_err(|_| unknown())?;
    let found = Found::at(base, name).ok_or_else(unknown)?;
    if found.alive {
        return Ok(found);
    }
    let how = match &found.note {
        Some(note) => match &note.reason {
            Some(reason) => format!("it {} ({reason})", past(&note.state)),
            None => format!("it {}", past(&note.state)),
        },
        None => "its process is gone".to_owned(),
    };
    Err(CliError::Said(format!(
        "VM {name} does not run any more: {how}. `vmm restore --name {name}` runs its newest checkpoint, `vmm stop \
         {name}` removes what it left in {:?}",
        found.dir
    )))
}

fn past(state: &str) -> String {
    match state {
        "fenced" => "was fenced".into(),
        "stopped" => "was stopped".into(),
        other => other.into(),
    }
}

/// Makes a VM stand still.
#[derive(Debug, Args)]
pub(super) struct Pause {
    #[command(flatten)]
    target: Target,
}

impl Pause {
    pub(super) async fn run(self) -> Result<Outcome, CliError> {
        self.target
            .client()?
            .patch(
                "/vm",
                &VmStateChange {
                    state: VmState::Paused,
                },
            )
            .await?;
        Ok(Outcome::Done)
    }
}

/// Lets a VM go on; starts one that is configured and waits for that.
#[derive(Debug, Args)]
pub(super) struct Resume {
    #[command(flatten)]
    target: Target,
}

impl Resume {
    pub(super) async fn run(self) -> Result<Outcome, CliError> {
        let client = self.target.client()?.with_deadline(START_DEADLINE);
        let info: InstanceInfo = client.get("/").await?;
        if info.state == "Not started" {
            client
                .put(
                    "/actions",
                    &Action {
                        action_type: ActionType::InstanceStart,
                    },
                )
                .await?;
        } else {
            client
                .patch(
                    "/vm",
                    &VmStateChange {
                        state: VmState::Resumed,
                    },
                )
                .await?;
        }
        Ok(Outcome::Done)
    }
}

/// Ends a VM. Of one that has ended already, removes what it left in the run folder.
#[derive(Debug, Args)]
pub(super) struct Stop {
    #[command(flatten)]
    target: Target,
    /// How long the holders of a protected VM are given to get its last checkpoint [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = size::millis)]
    drain: Option<u64>,
}

impl Stop {
    pub(super) async fn run(self) -> Result<Outcome, CliError> {
        let base = self.target.run_dir.path();
        let name = self.target.name();
        if Found::at(&base, name).is_some_and(|found| !found.alive) {
            // Taking the name clears the folder, and giving it back removes it.
            if let Ok(vm) = segment::VmId::new(name) {
                drop(Place::take(&base, &vm, false)?);
                return print(
                    format!("{name}: had ended; what it left in the run folder is removed\n").as_bytes(),
                );
            }
        }
        let drain_ms = self.drain.unwrap_or(DEFAULT_DRAIN_MS);
        let deadline = DEFAULT_DEADLINE + Duration::from_millis(drain_ms);
        let client = self.target.client()?.with_deadline(deadline);
        let report = match client.put_for("/stop", &StopRequest { drain_ms }).await {
            Ok(report) => Some(report),
            // It ended while it was asked to.
            Err(ClientError::Http { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let ended = wait_for_the_end(&base, name).await?;
        report.map_or(Ok(()), |report| tell_stop(name, &report))?;
        Ok(ended)
    }
}

/// Says what went wrong at a stop: a failure when the last state is not committed.
pub(super) fn tell_stop(name: &str, report: &StopReport) -> Result<(), CliError> {
    if report.committed {
        for problem in &report.problems {
            eprintln!("warning: VM {name} is stopped and committed, but {problem}");
        }
        return Ok(());
    }
    Err(CliError::Said(format!(
        "VM {name} is stopped, and its last state is not committed: {}",
        report.problems.join("; ")
    )))
}

/// Returns when the name is free again: whoever starts the VM anew at once must not find it taken.
async fn wait_for_the_end(base: &Path, name: &str) -> Result<Outcome, CliError> {
    const TURN: Duration = Duration::from_millis(5);
    const TURNS: u32 = 2_000;
    for _ in 0..TURNS {
        if !Found::at(base, name).is_some_and(|found| found.alive) {
            return Ok(Outcome::Done);
        }
        tokio::time::sleep(TURN).await;
    }
    Err(CliError::Said(format!(
        "VM {name} is stopped, and its process has not ended yet: `vmm ps` shows it"
    )))
}

/// Takes a checkpoint of a VM, into its store and on to its holders.
#[derive(Debug, Args)]
pub(super) struct Checkpoint {
    #[command(flatten)]
    target: Target,
    /// Every page, though the changes would do
    #[arg(long)]
    full: bool,
    /// A name for it
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// Print all of the report, as JSON
    #[arg(long)]
    json: bool,
}

impl Checkpoint {
    pub(super) async fn run(self) -> Result<Outcome, CliError> {
        let client = self.target.client()?.with_deadline(CHECKPOINT_DEADLINE);
        let request = TakeCheckpoint {
            full: self.full,
            label: self.label,
        };
        let report: CheckpointReport = client.post("/checkpoints", &request).await?;
        if self.json {
            return print_json(&report);
        }
        let text = format!(
            "{}: {}, {} pages, {} as {}, the guest stood still for {}\n",
            report.name,
            report.kind,
            report.data_pages + report.zero_pages,
            size::show_bytes(report.raw_bytes),
            size::show_bytes(report.stored_bytes),
            humantime::format_duration(Duration::from_micros(report.stop_us)),
        );
        print(text.as_bytes())
    }
}

/// Shows how much memory a VM's guest has given back, or asks it to give so much
#[derive(Debug, Args)]
pub(super) struct Balloon {
    #[command(flatten)]
    target: Target,
    /// What it is to give, like 256M; 0M lets it have all of its memory again
    #[arg(value_name = "SIZE", value_parser = devices::balloon_mib)]
    size: Option<u32>,
    /// Print all that is known, as JSON
    #[arg(long)]
    json: bool,
}

impl Balloon {
    pub(super) async fn run(self) -> Result<Outcome, CliError> {
        let client = self.target.client()?;
        if let Some(amount_mib) = self.size {
            client.patch("/balloon", &BalloonUpdate { amount_mib }).await?;
        }
        let stats: BalloonStats = client.get("/balloon/statistics").await?;
        if self.json {
            return print_json(&stats);
        }
        let mib = |bytes: Option<u64>| bytes.map_or("?".to_owned(), |bytes| (bytes >> 20).to_string());
        let text = format!(
            "given back {} MiB of {} MiB asked for; of its {} MiB {} MiB are free\n",
            stats.actual_mib,
            stats.target_mib,
            mib(stats.total_memory),
            mib(stats.free_memory)
        );
        print(text.as_bytes())
    }
}
