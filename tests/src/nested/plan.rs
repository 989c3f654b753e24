//! What happens when, in the life of the emulated hosts. Pure: events in, actions out.
//!
//! ```text
//! Booting --all ready--> Running --status--> Ending --all ended--> over
//! ```
//!
//! A host other than the first may end while the command runs: its test may have killed it.

use std::time::{Duration, Instant};

/// The exit code when the time is up, as of `timeout`.
pub(crate) const TIME_IS_UP: u8 = 124;
/// The exit code when a host failed.
pub(crate) const HOST_FAILED: u8 = 125;

/// How long each phase may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) boot: Duration,
    pub(crate) command: Duration,
    /// The command without output.
    pub(crate) silence: Duration,
    pub(crate) end: Duration,
}

#[derive(Debug)]
pub(crate) enum Event {
    /// A host is up.
    Ready { host: usize },
    /// The command has said something.
    Output,
    /// The command has ended.
    Status { code: u8 },
    /// A host's QEMU has ended.
    Ended { host: usize },
    /// The deadline has passed.
    TimeIsUp,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Let the command run.
    Run,
    /// Let all hosts finish.
    End,
    /// All is done.
    Finish { code: u8 },
    /// The hosts are of no use, and nothing of the command has run: they may be started anew.
    NotUp { why: String },
    /// Give up.
    Fail { code: u8, why: String },
}

#[derive(Debug)]
enum Phase {
    Booting,
    Running { until: Instant },
    Ending { code: u8 },
}

#[derive(Debug)]
pub(crate) struct Plan {
    phase: Phase,
    ready: Vec<bool>,
    ended: Vec<bool>,
    limits: Limits,
    deadline: Instant,
}

impl Plan {
    pub(crate) fn new(hosts: usize, limits: Limits, now: Instant) -> Self {
        Self {
            phase: Phase::Booting,
            ready: vec![false; hosts],
            ended: vec![false; hosts],
            limits,
            deadline: now + limits.boot,
        }
    }

    /// When [`Event::TimeIsUp`] is due.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(crate) fn step(&mut self, event: &Event, now: Instant) -> Vec<Action> {
        match (&self.phase, event) {
            (Phase::Booting, Event::Ready { host }) => {
                self.ready[host - 1] = true;
                if !self.ready.iter().all(|ready| *ready) {
                    return Vec::new();
                }
                let until = now + self.limits.command;
                self.phase = Phase::Running { until };
                self.deadline = until.min(now + self.limits.silence);
                vec![Action::Run]
            }
            (Phase::Booting, Event::Ended { host }) => not_up(format!("host {host} ended before it was up")),
            (Phase::Booting, Event::TimeIsUp) => {
                let late = self.ready.iter().position(|ready| !ready).map_or(0, |at| at + 1);
                not_up(format!(
                    "host {late} was not up within {} s",
                    self.limits.boot.as_secs()
                ))
            }
            (Phase::Booting, Event::Output | Event::Status { .. }) => {
                failed(format!("{event:?} before the command was started"))
            }
            (Phase::Running { until }, Event::Output) => {
                self.deadline = (*until).min(now + self.limits.silence);
                Vec::new()
            }
            (Phase::Running { .. }, Event::Status { code }) => {
                self.phase = Phase::Ending { code: *code };
                self.deadline = now + self.limits.end;
                vec![Action::End]
            }
            (Phase::Running { .. }, Event::Ended { host: 1 }) => {
                failed("host 1 ended while the command ran on it".into())
            }
            // Host N: killed by the test, perhaps. Its restart would be a new `ready`, which says nothing new.
            (Phase::Running { .. } | Phase::Ending { .. }, Event::Ready { .. }) => Vec::new(),
            (Phase::Running { .. }, Event::Ended { host }) => {
                self.ended[host - 1] = true;
                Vec::new()
            }
            (Phase::Running { until }, Event::TimeIsUp) => {
                let why = if now >= *until {
                    format!("the command took longer than {} s", self.limits.command.as_secs())
                } else {
                    format!("the command was silent for {} s", self.limits.silence.as_secs())
                };
                vec![Action::Fail {
                    code: TIME_IS_UP,
                    why,
                }]
            }
            // The rest of the output, while the hosts end.
            (Phase::Ending { .. }, Event::Output | Event::Status { .. }) => Vec::new(),
            (Phase::Ending { code }, Event::Ended { host }) => {
                self.ended[host - 1] = true;
                if self.ended.iter().all(|ended| *ended) {
                    vec![Action::Finish { code: *code }]
                } else {
                    Vec::new()
                }
            }
            (Phase::Ending { code }, Event::TimeIsUp) => failed(format!(
                "the command ended with {code}, but the hosts did not power off within {} s",
                self.limits.end.as_secs()
            )),
        }
    }
}

fn not_up(why: String) -> Vec<Action> {
    vec![Action::NotUp { why }]
}

fn failed(why: String) -> Vec<Action> {
    vec![Action::Fail {
        code: HOST_FAILED,
        why,
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        boot: Duration::from_secs(10),
        command: Duration::from_secs(100),
        silence: Duration::from_secs(30),
        end: Duration::from_secs(5),
    };

    fn code(actions: &[Action]) -> Option<u8> {
        match actions {
            [Action::Fail { code, .. }] => Some(*code),
            _ => None,
        }
    }

    #[test]
    fn the_command_runs_once_all_are_up_and_its_status_is_the_end() {
        let now = Instant::now();
        let mut plan = Plan::new(2, LIMITS, now);
        assert_eq!(plan.step(&Event::Ready { host: 2 }, now), []);
        assert_eq!(plan.step(&Event::Ready { host: 1 }, now), [Action::Run]);
        assert_eq!(plan.step(&Event::Output, now), []);
        assert_eq!(
            plan.step(&Event::Ended { host: 2 }, now),
            [],
            "a test may kill host 2"
        );
        assert_eq!(plan.step(&Event::Status { code: 7 }, now), [Action::End]);
        assert_eq!(plan.step(&Event::Output, now), []);
        assert_eq!(
            plan.step(&Event::Ended { host: 1 }, now),
            [Action::Finish { code: 7 }]
        );
    }

    #[test]
    fn a_host_that_fails_is_told_from_a_command_that_hangs() {
        let now = Instant::now();
        let mut plan = Plan::new(1, LIMITS, now);
        assert_eq!(plan.deadline(), now + LIMITS.boot);
        for event in [Event::TimeIsUp, Event::Ended { host: 1 }] {
            let actions = plan.step(&event, plan.deadline());
            assert!(
                matches!(&actions[..], [Action::NotUp { .. }]),
                "nothing has run yet: {actions:?}"
            );
        }
        plan.step(&Event::Ready { host: 1 }, now);
        let silent = now + LIMITS.silence;
        assert_eq!(plan.deadline(), silent);
        assert_eq!(code(&plan.step(&Event::TimeIsUp, silent)), Some(TIME_IS_UP));
        assert_eq!(
            code(&plan.step(&Event::Ended { host: 1 }, now)),
            Some(HOST_FAILED)
        );
        // Output keeps it going, to the limit for all of it.
        for second in (0..100).step_by(20) {
            plan.step(&Event::Output, now + Duration::from_secs(second));
        }
        assert_eq!(plan.deadline(), now + LIMITS.command);
        plan.step(&Event::Status { code: 0 }, now);
        assert_eq!(
            code(&plan.step(&Event::TimeIsUp, now + LIMITS.end)),
            Some(HOST_FAILED)
        );
    }
}
