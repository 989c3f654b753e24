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
    find(inner, owner).await == Some(Process::Gone)
}

/// What became of a process; `None` when no agent of its host answers.
async fn find(inner: &Inner, owner: &OwnerProcess) -> Option<Process> {
    if let Some(here) = process::look(owner) {
        return Some(here);
    }
    let listed = tokio::time::timeout(LOOK_DEADLINE, inner.registry.list_nodes(None, MAX_ASKED)).await;
    let Ok(Ok((nodes, _))) = listed else { return None };
    ask_all(inner, &nodes, owner).await
}

/// The owner's host, as far as its agent, and the registry of that, tell.
pub(super) async fn of(inner: &Inner, process: &OwnerProcess, owner: &str) -> Host {
    if let Some(here) = process::look(process) {
        return Host::Answers(here);
    }
    let listed = tokio::time::timeout(LOOK_DEADLINE, inner.registry.list_nodes(None, MAX_ASKED)).await;
    let Ok(Ok((nodes, _))) = listed else {
        return Host::Unknown;
    };
    if let Some(process) = ask_all(inner, &nodes, process).await {
        return Host::Answers(process);
    }
    match nodes.iter().find(|node| node.name == owner) {
        Some(node) if node.is_alive() => Host::Silent,
        Some(_) => Host::LeaseGone,
        None => Host::Unknown,
    }
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
