//! What became of an owner's process: looked at here when it is one of this host, else asked of the other agents.
//!
//! Only "it has ended" cuts a wait short, and only an agent of the process's own host can say that: it has the host's
//! boot and the namespace in common with it.

use std::time::Duration;

use tokio::task::JoinSet;

use super::Inner;
use crate::detect::{Host, Process};
use crate::process;
use crate::registry::{NodeRecord, OwnerProcess};
use crate::transport::{Client, Identity};
use crate::wire::{Call, ProcessCall, Reply};

/// How long another agent may take to look.
const LOOK_DEADLINE: Duration = Duration::from_millis(500);
/// The most agents that are asked: of a larger cluster those of the names first in order.
const MAX_ASKED: u32 = 64;

/// Whether the process is known to have ended.
pub(super) async fn ended(inner: &Inner, owner: &OwnerProcess) -> bool {
    find(inner, owner).await.0 == Some(Process::Gone)
}

/// The owner's host, as far as its agent, and the registry of that, tell.
pub(super) async fn of(inner: &Inner, process: &OwnerProcess, owner: &str) -> Host {
    let (found, nodes) = find(inner, process).await;
    match (found, nodes.iter().find(|node| node.name == owner)) {
        (Some(process), _) => Host::Answers(process),
        (None, Some(node)) if node.is_alive() => Host::Silent,
        (None, Some(_)) => Host::LeaseGone,
        (None, None) => Host::Unknown,
    }
}

/// What became of a process, if an agent of its host answers; and the nodes, if they had to be asked.
async fn find(inner: &Inner, process: &OwnerProcess) -> (Option<Process>, Vec<NodeRecord>) {
    if let Some(here) = process::look(process) {
        return (Some(here), Vec::new());
    }
    let listed = tokio::time::timeout(LOOK_DEADLINE, inner.registry.list_nodes(None, MAX_ASKED)).await;
    let Ok(Ok((nodes, _))) = listed else {
        return (None, Vec::new());
    };
    (ask_all(inner, &nodes, process).await, nodes)
}

async fn ask_all(inner: &Inner, nodes: &[NodeRecord], owner: &OwnerProcess) -> Option<Process> {
    let mut asked = JoinSet::new();
    for node in nodes.iter().filter(|node| node.name != inner.name) {
        let asking = ask(node.address.clone(), inner.identity.clone(), *owner);
        asked.spawn(tokio::time::timeout(LOOK_DEADLINE, asking));
    }
    while let Some(answer) = asked.join_next().await {
        if let Ok(Ok(Some(process))) = answer {
            return Some(process);
        }
    }
    None
}

async fn ask(address: String, identity: Identity, process: OwnerProcess) -> Option<Process> {
    let mut client = Client::connect(&address, &identity).await.ok()?;
    let call = Call::Process(ProcessCall { process });
    match client.call(call, LOOK_DEADLINE).await {
        Ok(Reply::Process(report)) => report.process,
        Ok(_) | Err(_) => None,
    }
}
