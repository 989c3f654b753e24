//! What is said of a VM in its history, which the registry keeps: for people, and never waited for by anything that a
//! guest waits for.

use std::sync::Arc;
use std::time::Duration;

use segment::{Generation, VmId};

use super::Inner;
use crate::registry::HistoryEntry;
use crate::wire::{Failure, PhaseTime, PromoteReport};

/// How long the registry is tried.
const DEADLINE: Duration = Duration::from_secs(10);

/// The owner of a VM is taken for lost.
pub(super) const OWNER_LOST: &str = "owner-lost";
/// A VM was taken over without anyone's word.
pub(super) const TAKEN_OVER: &str = "taken-over";
/// It was to be, and was not.
pub(super) const NOT_TAKEN_OVER: &str = "not-taken-over";
/// A VM was promoted by a person's word.
const PROMOTED: &str = "promoted";
/// It was to be, and was not.
const NOT_PROMOTED: &str = "not-promoted";

/// Writes it down as soon as the registry answers.
pub(super) fn note(inner: &Arc<Inner>, vm: &VmId, entry: HistoryEntry) {
    let (inner, vm) = (inner.clone(), vm.clone());
    tokio::spawn(async move {
        match tokio::time::timeout(DEADLINE, inner.registry.note(&vm, entry)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%vm, %error, "the VM's history lacks an entry"),
            Err(_) => tracing::warn!(%vm, deadline = ?DEADLINE, "the VM's history lacks an entry: no answer"),
        }
    });
}

/// One time of an entry.
pub(super) fn time(phase: &str, time: Duration) -> PhaseTime {
    PhaseTime {
        phase: phase.to_owned(),
        us: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
    }
}

/// What came of a promote that a person asked for under this generation.
pub(super) fn promoted(
    inner: &Arc<Inner>,
    vm: &VmId,
    before: Generation,
    result: &Result<PromoteReport, Failure>,
) {
    let entry = match result {
        Ok(report) if report.dry_run => return,
        Ok(report) => HistoryEntry {
            times: report.phases.clone(),
            ..HistoryEntry::new(report.generation, &inner.name, PROMOTED, how(report))
        },
        Err(failure) => HistoryEntry::new(before, &inner.name, NOT_PROMOTED, failure.why.clone()),
    };
    note(inner, vm, entry);
}

/// How a takeover went, in words.
pub(super) fn how(report: &PromoteReport) -> String {
    let mut out = format!("in {} ms", report.total_us / 1000);
    if let Some(from) = &report.resumed_from {
        out += &format!(", from {}", from.name);
    }
    for note in &report.notes {
        out += &format!("; {note}");
    }
    out
}
