//! `vmm ps`.

use std::time::Duration;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::options::RunDir;
use super::rundir::{Found, elsewhere};
use super::{CliError, Outcome, print, print_json, size};
use crate::api::Client;
use crate::api::client::ClientError;
use crate::api::resources::machine::InstanceInfo;
use crate::session::{HolderReport, SessionStatus};

/// How long a VM may take to say how it is.
const DEADLINE: Duration = Duration::from_secs(3);

/// Lists the VMs of this host. LAG is, for each holder and the worst first, checkpoints and bytes it lacks.
#[derive(Debug, Args)]
pub(super) struct Ps {
    /// As JSON, with all that is known
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    run_dir: RunDir,
}

/// One VM.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// As in the status; or `not started`, `no answer`, `dead`, or how it ended.
    state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    socket: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<SessionStatus>,
}

impl Ps {
    pub(super) async fn run(self) -> Result<Outcome, CliError> {
        let found = Found::all(&self.run_dir.path())?;
        // All at once: one that does not answer holds up no other.
        let asked: Vec<_> = found.into_iter().map(|found| tokio::spawn(row(found))).collect();
        let mut rows = Vec::with_capacity(asked.len());
        for row in asked {
            rows.push(
                row.await
                    .map_err(|_| CliError::Said("a VM could not be asked for its status".into()))?,
            );
        }
        if self.json {
            return print_json(&rows);
        }
        let elsewhere = elsewhere(&self.run_dir.path());
        print(format!("{}\n{}{}", table(&rows), notes(&rows), told(&elsewhere)).as_bytes())
    }
}

/// Where the VMs are that have another run folder: those an agent has taken over, above all.
fn told(elsewhere: &[Found]) -> String {
    let mut text = String::new();
    for found in elsewhere {
        let base = found.dir.parent().unwrap_or(&found.dir).display();
        text.push_str(&format!(
            "\n{} runs with another run folder: vmm ps --run-dir {base}",
            found.name
        ));
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

/// What there is to say beyond the table: why a VM does not run, what is wrong with its checkpoints or holders.
fn notes(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let status = row.status.as_ref();
        let problem = status.and_then(|status| status.problem.as_ref());
        let holders = status
            .and_then(|status| status.protection.as_ref())
            .map(|protection| &protection.holders);
        let away = holders
            .into_iter()
            .flatten()
            .filter_map(|holder| Some(format!("{}: {}", holder.address, holder.why.as_ref()?)));
        for why in row.reason.iter().chain(problem).cloned().chain(away) {
            text.push_str(&format!("\n{}: {why}", row.name));
        }
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

async fn row(found: Found) -> Row {
    let socket = found.socket();
    let mut row = Row {
        name: found.name,
        state: String::new(),
        reason: None,
        socket: socket.display().to_string(),
        status: None,
    };
    if !found.alive {
        (row.state, row.reason) = match found.note {
            Some(note) => (note.state, note.reason),
            None => (
                "dead".into(),
                Some("its process is gone without a word: it was killed, or it crashed".into()),
            ),
        };
        return row;
    }
    let client = Client::new(socket).with_deadline(DEADLINE);
    match client.get::<SessionStatus>("/status").await {
        Ok(status) => {
            row.state.clone_from(&status.state);
            row.reason.clone_from(&status.reason);
            row.status = Some(status);
        }
        Err(ClientError::Refused { .. }) => match client.get::<InstanceInfo>("/").await {
            Ok(info) => row.state = info.state.to_lowercase(),
            Err(error) => no_answer(&mut row, &error),
        },
        Err(error) => no_answer(&mut row, &error),
    }
    row
}

fn no_answer(row: &mut Row, error: &ClientError) {
    // Its lock is held and its socket not there yet, or no more.
    row.state = if error.nobody_there() {
        "starting or ending"
    } else {
        "no answer"
    }
    .into();
    row.reason = Some(crate::session::chain(error));
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "NAME",
        "STATE",
        "CPUS",
        "MEMORY",
        "GENERATION",
        "COMMITTED",
        "LAG",
        "PID",
    ]);
    for row in rows {
        let Some(status) = &row.status else {
            table.add_row([&row.name, &row.state, "-", "-", "-", "-", "-", "-"]);
            continue;
        };
        table.add_row([
            status.name.clone(),
            row.state.clone(),
            status.vcpus.to_string(),
            size::show_bytes(status.memory_mib << 20),
            status.generation.to_string(),
            status.committed.as_deref().map_or("-", epoch).to_owned(),
            lag(status),
            status.pid.to_string(),
        ]);
    }
    for column in [2, 3, 4, 5, 7] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The last part of a checkpoint's name: VM and generation have columns of their own.
fn epoch(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn lag(status: &SessionStatus) -> String {
    let Some(protection) = &status.protection else {
        return "not protected".into();
    };
    let mut holders: Vec<&HolderReport> = protection.holders.iter().collect();
    holders.sort_by_key(|holder| std::cmp::Reverse((holder.lag_epochs, holder.lag_bytes)));
    holders.into_iter().map(one_lag).collect::<Vec<_>>().join(", ")
}

fn one_lag(holder: &HolderReport) -> String {
    let name = holder.node.as_ref().unwrap_or(&holder.address);
    let lacks = match holder.lag_epochs {
        0 => "0".to_owned(),
        epochs => format!("{epochs} ({})", size::show_bytes(holder.lag_bytes)),
    };
    match holder.state.as_str() {
        "up-to-date" | "synchronising" => format!("{name}: {lacks}"),
        state => format!("{name}: {lacks} {state}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(address: &str, state: &str, lag_epochs: u64, lag_bytes: u64) -> HolderReport {
        HolderReport {
            address: address.into(),
            node: None,
            state: state.into(),
            why: None,
            acked: None,
            lag_epochs,
            lag_bytes,
            bytes_sent: 0,
        }
    }

    #[test]
    fn the_worst_lag_comes_first() {
        let mut holders = [
            holder("a:1", "up-to-date", 0, 0),
            holder("b:1", "unreachable", 12, 3 << 20),
            holder("c:1", "synchronising", 2, 512),
        ];
        holders.sort_by_key(|holder| std::cmp::Reverse((holder.lag_epochs, holder.lag_bytes)));
        let shown: Vec<_> = holders.iter().map(one_lag).collect();
        assert_eq!(
            shown,
            ["b:1: 12 (3.0 MiB) unreachable", "c:1: 2 (512 B)", "a:1: 0"]
        );
        assert_eq!(epoch("web/3/42"), "42");
    }
}
