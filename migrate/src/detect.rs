//! Whether a VM's owner is gone, and why: pure.
//!
//! ```text
//!   registry: the record, its lease --+
//!   this holder's own view -----------+--> judge() --> Well | Wait | Down(cause)
//!   the other holders' views ---------+
//!   the owner's host: its agent ------+
//! ```
//!
//! A VM is taken for lost when its lease in the registry is gone *and* so many holders have not heard its owner for as
//! long that they could be sealed; or at once when the agent of its own host has seen its process end. A registry that
//! does not answer decides nothing, and neither does a candidate that hears nobody: it may be the one that is cut off.
//!
//! Invariants: a verdict `Down` is a reason to try, never a licence to run: whether the guest may run is decided by the
//! raise and the seal ([`crate::failover`]), and from when on by the grants that have to run out ([`crate::lease`]).
//!
//! What it never does: no clock, no socket, no randomness.

use std::fmt;
use std::time::Duration;

use minicbor::{Decode, Encode};
use serde::Serialize;

use crate::failover::seals_needed;
use crate::lease::LeaseTerms;
use crate::registry::{LeaseState, VmRecord, VmState};

/// What the agent of the owner's host says of its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Process {
    /// It is there and is scheduled.
    #[n(0)]
    Alive,
    /// It is there and was stopped (SIGSTOP, a debugger).
    #[n(1)]
    Stopped,
    /// It is there and waits for a disk that does not answer.
    #[n(2)]
    DiskHung,
    /// It has ended.
    #[n(3)]
    Gone,
}

/// What is known of the owner's host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Its agent answers.
    Answers(Process),
    /// Its agent does not answer, and its lease as a node holds.
    Silent,
    /// Its agent does not answer, and its lease as a node is gone.
    LeaseGone,
    /// No agent is known there.
    Unknown,
}

/// One holder's view of the owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HolderView {
    /// It has not heard the owner for so long.
    SilentFor(Duration),
    /// It has not heard it since it started, this long ago.
    NeverHeard {
        /// How long the holder has been up.
        up: Duration,
    },
    /// The holder does not answer.
    Unreachable,
}

/// What a candidate knows at one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// What the registry says of the VM; `None` when it does not answer.
    pub registry: Option<RegistrySight>,
    /// Each holder's view, the candidate's own among them.
    pub holders: Vec<HolderView>,
    /// The owner's host.
    pub host: Host,
}

/// What the registry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegistrySight {
    /// Whether the VM is meant to run.
    pub state: VmState,
    /// For how long the candidate has seen its lease unchanged; `None` when it has not watched it yet.
    pub lease_silent_for: Option<Duration>,
    /// It holds a lease for much longer than it was asked to, so that it cannot tell in time that the lease ran out.
    pub coarse: bool,
    /// The ack quorum.
    pub ack_quorum: usize,
    /// Its generation was raised, and nobody has run it under that one yet: see [`is_being_taken_over`].
    pub taking_over: bool,
}

/// Whether a VM is being taken over, or that was broken off.
///
/// A raise takes away that the VM was leased, and its owner leases it again before its guest runs. One that is stopped and
/// was leased under its generation was stopped on purpose.
#[must_use]
pub fn is_being_taken_over(record: &VmRecord) -> bool {
    record.state == VmState::Stopped && record.owner_lease() == LeaseState::Never
}

/// After how long without a change a takeover is taken for broken off: longer than one takes. (Should it be under
/// way all the same, one of the two is refused, as always.)
#[must_use]
pub fn broken_off_after(terms: LeaseTerms) -> Duration {
    terms.ttl.saturating_mul(10).max(Duration::from_secs(10))
}

/// Why a VM needs another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Its process ended, and its host is well.
    ProcessGone,
    /// Its process was stopped from outside.
    ProcessStopped,
    /// Its process waits for a disk.
    DiskHung,
    /// Its process runs, and reaches neither the registry nor the holders.
    Unheard,
    /// Its host is gone, or cut off from everyone: from outside the two look the same.
    HostLost,
    /// Its host's agent is gone, or cut off, and its lease has not run out yet.
    AgentSilent,
    /// Its owner is lost, and nothing is known of its host.
    OwnerLost,
    /// A takeover of it was broken off after it had ended the owner before.
    BrokenOff,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ProcessGone => "its process ended",
            Self::ProcessStopped => "its process was stopped from outside (SIGSTOP)",
            Self::DiskHung => "its process waits for a disk that does not answer",
            Self::Unheard => "its process runs, and reaches neither the registry nor the holders",
            Self::HostLost => "its host is gone, or cut off from everyone",
            Self::AgentSilent => "it and the agent of its host are not heard",
            Self::OwnerLost => "it is not heard",
            Self::BrokenOff => "a takeover was broken off and has left it stopped",
        })
    }
}

/// Why nothing is done yet, though not all is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doubt {
    /// The registry does not answer.
    RegistryAway,
    /// The lease was not watched for long enough, or it holds.
    LeaseHolds,
    /// Holders hear the owner: the registry, or the way to it, is what is wrong.
    HoldersHear,
    /// Too few holders answer to know, or to seal.
    HoldersAway,
    /// Someone is taking it over.
    TakingOver,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RegistryAway => "the registry does not answer, so nothing can be decided",
            Self::LeaseHolds => "holders do not hear the owner, and its lease in the registry holds",
            Self::HoldersHear => "the owner's lease in the registry is gone, and holders hear it",
            Self::HoldersAway => "too few holders answer to take the VM over",
            Self::TakingOver => "another node is taking the VM over",
        })
    }
}

/// What to think of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// Nothing is to be done.
    Well,
    /// Something is wrong, and nothing is to be done yet.
    Wait(Doubt),
    /// It should be taken over.
    Down(Cause),
}

/// Judges what a candidate sees.
#[must_use]
pub fn judge(sight: &Sight, terms: LeaseTerms) -> Judgement {
    let Some(registry) = sight.registry else {
        return Judgement::Wait(Doubt::RegistryAway);
    };
    let needed = seals_needed(sight.holders.len(), registry.ack_quorum);
    let answering = sight
        .holders
        .iter()
        .filter(|view| **view != HolderView::Unreachable)
        .count();
    match registry.state {
        VmState::Stopped => return stopped(registry, answering >= needed, terms),
        VmState::Running => {}
    }
    if sight.host == Host::Answers(Process::Gone) {
        // Nobody has to be waited for: what ended runs nothing. It may be that too few could be sealed.
        return match answering >= needed {
            true => Judgement::Down(Cause::ProcessGone),
            false => Judgement::Wait(Doubt::HoldersAway),
        };
    }
    let silent = sight.holders.iter().filter(|view| deaf(**view, terms)).count();
    let lease_gone = registry
        .lease_silent_for
        .is_some_and(|silent| silent >= terms.guard());
    // Where the registry cannot tell in time, the holders have to agree, all that answer, and so many that the owner can
    // commit nothing without them. (Should it be well all the same, it is stopped by the raise like any other.)
    let agreed = registry.coarse && silent == answering && silent >= needed.max(registry.ack_quorum);
    match (lease_gone || agreed, silent >= needed) {
        (true, true) => Judgement::Down(cause(sight.host)),
        (true, false) if answering < needed => Judgement::Wait(Doubt::HoldersAway),
        (true, false) => Judgement::Wait(Doubt::HoldersHear),
        (false, true) => Judgement::Wait(Doubt::LeaseHolds),
        (false, false) => Judgement::Well,
    }
}

/// A VM that is stopped: on purpose, or by a takeover that did not come to its end.
fn stopped(registry: RegistrySight, enough: bool, terms: LeaseTerms) -> Judgement {
    let unchanged = registry
        .lease_silent_for
        .is_some_and(|time| time >= broken_off_after(terms));
    match registry.taking_over {
        false => Judgement::Well,
        true if !unchanged => Judgement::Wait(Doubt::TakingOver),
        true if enough => Judgement::Down(Cause::BrokenOff),
        true => Judgement::Wait(Doubt::HoldersAway),
    }
}

/// Whether a holder has not heard the owner for the length of a lease.
fn deaf(view: HolderView, terms: LeaseTerms) -> bool {
    match view {
        HolderView::SilentFor(time) | HolderView::NeverHeard { up: time } => time >= terms.guard(),
        HolderView::Unreachable => false,
    }
}

fn cause(host: Host) -> Cause {
    match host {
        Host::Answers(Process::Gone) => Cause::ProcessGone,
        Host::Answers(Process::Stopped) => Cause::ProcessStopped,
        Host::Answers(Process::DiskHung) => Cause::DiskHung,
        Host::Answers(Process::Alive) => Cause::Unheard,
        Host::Silent => Cause::AgentSilent,
        Host::LeaseGone => Cause::HostLost,
        Host::Unknown => Cause::OwnerLost,
    }
}

/// What decides whose turn it is to try first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Standing {
    /// It has the newest checkpoint that any candidate is known to have.
    pub newest: bool,
    /// It has an image: nothing has to be loaded.
    pub hot: bool,
    /// How many VMs it runs, turned round: fewer is better.
    pub free: std::cmp::Reverse<usize>,
    /// Its name, turned round: the last word, the same for everyone.
    pub name: std::cmp::Reverse<String>,
}

/// How many other candidates are to be let try first. Two that think they are first are no danger: the
/// compare-and-swap lets one of them through.
#[must_use]
pub fn turn(mine: &Standing, others: &[Standing]) -> usize {
    others.iter().filter(|other| *other > mine).count()
}

/// How long a candidate with so many before it waits after the verdict, so that the first is not disturbed.
#[must_use]
pub fn head_start(turn: usize, terms: LeaseTerms) -> Duration {
    // The first decides within a renewal's time; a candidate that fails is followed by the next soon enough.
    terms
        .renew_every
        .saturating_mul(u32::try_from(turn).unwrap_or(u32::MAX).saturating_mul(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cmp::Reverse;

    const TERMS: LeaseTerms = LeaseTerms::DEFAULT;
    const LONG: Duration = Duration::from_secs(5);
    const SHORT: Duration = Duration::from_millis(100);

    fn sight(lease: Duration, holders: &[HolderView], host: Host) -> Sight {
        Sight {
            registry: Some(RegistrySight {
                state: VmState::Running,
                lease_silent_for: Some(lease),
                coarse: false,
                ack_quorum: 2,
                taking_over: false,
            }),
            holders: holders.to_vec(),
            host,
        }
    }

    const DEAF: HolderView = HolderView::SilentFor(LONG);
    const HEARS: HolderView = HolderView::SilentFor(SHORT);
    const AWAY: HolderView = HolderView::Unreachable;

    #[test]
    fn both_the_lease_and_the_holders_have_to_agree() {
        let judged = |lease, holders: &[_]| judge(&sight(lease, holders, Host::LeaseGone), TERMS);
        assert_eq!(
            judged(LONG, &[DEAF, DEAF, HEARS]),
            Judgement::Down(Cause::HostLost)
        );
        assert_eq!(
            judged(LONG, &[DEAF, DEAF, AWAY]),
            Judgement::Down(Cause::HostLost)
        );
        assert_eq!(
            judged(LONG, &[DEAF, HEARS, HEARS]),
            Judgement::Wait(Doubt::HoldersHear)
        );
        assert_eq!(
            judged(LONG, &[DEAF, AWAY, AWAY]),
            Judgement::Wait(Doubt::HoldersAway)
        );
        assert_eq!(
            judged(SHORT, &[DEAF, DEAF, DEAF]),
            Judgement::Wait(Doubt::LeaseHolds)
        );
        assert_eq!(judged(SHORT, &[HEARS, HEARS, HEARS]), Judgement::Well);
    }

    #[test]
    fn where_the_registry_is_slow_all_who_answer_have_to_agree() {
        let judged = |holders: &[_]| {
            let mut seen = sight(SHORT, holders, Host::Silent);
            if let Some(registry) = &mut seen.registry {
                registry.coarse = true;
            }
            judge(&seen, TERMS)
        };
        assert_eq!(judged(&[DEAF, DEAF, AWAY]), Judgement::Down(Cause::AgentSilent));
        assert_eq!(judged(&[DEAF, DEAF, HEARS]), Judgement::Wait(Doubt::LeaseHolds));
        assert_eq!(
            judged(&[DEAF, AWAY, AWAY]),
            Judgement::Well,
            "one holder's word is not enough to seal"
        );
        // One of two could be sealed; the owner may commit with the other still, so its word is needed.
        assert_eq!(judged(&[DEAF, AWAY]), Judgement::Wait(Doubt::LeaseHolds));
    }

    #[test]
    fn a_hiccup_of_two_seconds_is_none() {
        let hiccup = Duration::from_secs(2) + TERMS.renew_every;
        let silent = HolderView::SilentFor(hiccup);
        let judged = judge(&sight(hiccup, &[silent; 3], Host::Answers(Process::Alive)), TERMS);
        assert_eq!(judged, Judgement::Well);
    }

    #[test]
    fn a_process_that_ended_is_not_waited_for() {
        let gone = Host::Answers(Process::Gone);
        let judged = |holders: &[_]| judge(&sight(SHORT, holders, gone), TERMS);
        assert_eq!(judged(&[HEARS, HEARS, AWAY]), Judgement::Down(Cause::ProcessGone));
        assert_eq!(judged(&[HEARS, AWAY, AWAY]), Judgement::Wait(Doubt::HoldersAway));
    }

    #[test]
    fn nothing_is_decided_without_the_registry_or_for_a_vm_that_was_stopped() {
        let mut seen = sight(LONG, &[DEAF; 3], Host::Answers(Process::Gone));
        seen.registry = None;
        assert_eq!(judge(&seen, TERMS), Judgement::Wait(Doubt::RegistryAway));
        let mut stopped = sight(LONG, &[DEAF; 3], Host::Answers(Process::Gone));
        if let Some(registry) = &mut stopped.registry {
            registry.state = VmState::Stopped;
        }
        assert_eq!(judge(&stopped, TERMS), Judgement::Well);
        let mut unwatched = sight(LONG, &[DEAF; 3], Host::LeaseGone);
        if let Some(registry) = &mut unwatched.registry {
            registry.lease_silent_for = None;
        }
        assert_eq!(judge(&unwatched, TERMS), Judgement::Wait(Doubt::LeaseHolds));
    }

    #[test]
    fn a_takeover_that_was_broken_off_is_gone_on_with() {
        let judged = |taking_over, unchanged, holders: &[_]| {
            let mut seen = sight(unchanged, holders, Host::Unknown);
            if let Some(registry) = &mut seen.registry {
                registry.state = VmState::Stopped;
                registry.taking_over = taking_over;
            }
            judge(&seen, TERMS)
        };
        let long = broken_off_after(TERMS);
        assert_eq!(judged(false, long, &[DEAF; 3]), Judgement::Well);
        assert_eq!(
            judged(true, SHORT, &[DEAF; 3]),
            Judgement::Wait(Doubt::TakingOver)
        );
        assert_eq!(
            judged(true, long, &[DEAF, HEARS, AWAY]),
            Judgement::Down(Cause::BrokenOff)
        );
        assert_eq!(
            judged(true, long, &[DEAF, AWAY, AWAY]),
            Judgement::Wait(Doubt::HoldersAway)
        );
    }

    #[test]
    fn a_holder_that_has_just_started_knows_nothing_yet() {
        let fresh = HolderView::NeverHeard { up: SHORT };
        let old = HolderView::NeverHeard { up: LONG };
        let judged = |view| judge(&sight(LONG, &[DEAF, view, AWAY], Host::Silent), TERMS);
        assert_eq!(judged(fresh), Judgement::Wait(Doubt::HoldersHear));
        assert_eq!(judged(old), Judgement::Down(Cause::AgentSilent));
    }

    #[test]
    fn one_candidate_is_first_whoever_counts() {
        let standing = |newest, hot, vms, name: &str| Standing {
            newest,
            hot,
            free: Reverse(vms),
            name: Reverse(name.to_owned()),
        };
        let all = [
            standing(true, true, 5, "birch"),
            standing(true, false, 0, "alder"),
            standing(true, true, 5, "cedar"),
            standing(false, true, 0, "elm"),
        ];
        let turns: Vec<usize> = (0..all.len())
            .map(|me| {
                let mut others = all.to_vec();
                let mine = others.remove(me);
                turn(&mine, &others)
            })
            .collect();
        assert_eq!(turns, vec![0, 2, 1, 3]);
        assert_eq!(head_start(0, TERMS), Duration::ZERO);
        assert!(head_start(1, TERMS) < head_start(3, TERMS));
    }
}
