//! Which records changed lately: what a question for changes is answered from.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::request::{Changed, Changes};

/// The most changes that are kept; a question that goes further back is told that it does.
const MAX_KEPT: usize = 4096;

#[derive(Debug, Default)]
struct Log {
    /// Everything after this revision is in `kept`.
    from: u64,
    /// Up to where it is known.
    upto: u64,
    /// Each record's last change. By revision, for one transaction may change several.
    last: BTreeMap<Changed, u64>,
    kept: BTreeSet<(u64, Changed)>,
}

/// The changes of a registry that this process knows of.
#[derive(Debug)]
pub(super) struct ChangeLog {
    // Written by who changes or hears of changes, read by who asks; held for moments.
    log: Mutex<Log>,
    moved: watch::Sender<u64>,
}

impl ChangeLog {
    /// Knows of nothing before and at `revision`.
    pub(super) fn new(revision: u64) -> Self {
        let log = Log {
            from: revision,
            upto: revision,
            ..Log::default()
        };
        Self {
            log: Mutex::new(log),
            moved: watch::Sender::new(revision),
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // No half-done state between two statements that could panic.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A record changed at `revision`.
    pub(super) fn push(&self, revision: u64, changed: Changed) {
        let mut log = self.log();
        if let Some(before) = log.last.insert(changed.clone(), revision) {
            log.kept.remove(&(before, changed.clone()));
        }
        log.kept.insert((revision, changed));
        log.upto = log.upto.max(revision);
        while log.kept.len() > MAX_KEPT {
            if let Some((at, oldest)) = log.kept.pop_first() {
                log.last.remove(&oldest);
                log.from = log.from.max(at);
            }
        }
        let upto = log.upto;
        drop(log);
        self.moved.send_replace(upto);
    }

    /// Changes may have been missed: what was known before `revision` says nothing any more.
    pub(super) fn reset(&self, revision: u64) {
        let mut log = self.log();
        *log = Log {
            from: revision,
            upto: revision,
            ..Log::default()
        };
        drop(log);
        self.moved.send_replace(revision);
    }

    fn since(&self, after: u64) -> Changes {
        let log = self.log();
        let changed = log.kept.iter().filter(|(at, _)| *at > after);
        Changes {
            revision: log.upto,
            changed: changed.map(|(_, c)| c.clone()).collect(),
            // A question from ahead of us is of another history.
            complete: after >= log.from && after <= log.upto,
        }
    }

    /// What changed after `after`; waits for something, at most for `wait`.
    pub(super) async fn await_after(&self, after: u64, wait: Duration) -> Changes {
        let mut moved = self.moved.subscribe();
        let something = async {
            loop {
                moved.borrow_and_update();
                let changes = self.since(after);
                if !changes.changed.is_empty() || !changes.complete {
                    return changes;
                }
                if moved.changed().await.is_err() {
                    return changes;
                }
            }
        };
        match tokio::time::timeout(wait, something).await {
            Ok(changes) => changes,
            Err(_) => self.since(after),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: usize) -> Changed {
        Changed::Node { name: format!("{n}") }
    }

    #[test]
    fn each_record_is_told_once_and_gaps_are_told() {
        let log = ChangeLog::new(10);
        log.push(11, node(1));
        log.push(12, node(2));
        log.push(13, node(1));
        let changes = log.since(11);
        assert_eq!(changes.changed, [node(2), node(1)]);
        assert_eq!((changes.revision, changes.complete), (13, true));
        assert!(!log.since(9).complete);
        assert!(!log.since(14).complete);
        for n in 0..MAX_KEPT {
            log.push(100 + n as u64, node(1000 + n));
        }
        assert!(!log.since(11).complete);
        assert!(log.since(13).complete);
        log.reset(9000);
        assert!(!log.since(8000).complete);
    }

    #[tokio::test]
    async fn a_question_waits_for_a_change() {
        let log = std::sync::Arc::new(ChangeLog::new(0));
        let none = log.await_after(0, Duration::from_millis(1)).await;
        assert!(none.changed.is_empty() && none.complete);
        let asked = tokio::spawn({
            let log = log.clone();
            async move { log.await_after(0, Duration::from_secs(60)).await }
        });
        log.push(1, node(1));
        assert_eq!(asked.await.unwrap().changed, [node(1)]);
    }
}
