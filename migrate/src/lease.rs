//! Until when an owner may run its guest, and when nobody else may have let it: pure.
//!
//! ```text
//!   owner                         registry, holders                       candidate
//!   renew (sent at t) ----------> noted at t' >= t
//!     <------------------------- answer
//!   may run until t + ttl         lets nobody in until t' + guard         raise -> seal -> wait what is left -> run
//! ```
//!
//! An owner may run its guest while its lease in the registry holds, *or* while `ack_quorum` holders have granted it time:
//! a registry that is away stops no guest, and neither do holders that are. A candidate ends both: after the raise the
//! registry renews no more, and of the holders it seals `holders - ack_quorum + 1`, so that fewer than the quorum can
//! still have a grant out. What was granted before has to run out, by the clock of who granted it, before the candidate
//! starts the guest.
//!
//! Invariants: the owner counts from when it *sent* the renewal that was answered and the grantor from when it received
//! it, so the owner's end is never the later one; a grantor waits longer than the lease by the most that two clocks may
//! run apart ([`LeaseTerms::guard`]); a renewal that was not answered counts for nothing.
//!
//! What it never does: no clock, no socket. Times are durations since any fixed instant of a clock that goes on while
//! the host is suspended (`CLOCK_BOOTTIME`); the times of different hosts are never compared.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use segment::Generation;

/// How far two clocks may run apart while a lease lasts, in parts per thousand.
pub const MAX_DRIFT_PER_MILLE: u32 = 10;
/// The shortest lease.
pub const MIN_TTL: Duration = Duration::from_millis(50);
/// The longest lease: a holder that restarts grants nobody else anything for as long.
pub const MAX_TTL: Duration = Duration::from_secs(60);

/// How long a lease is and how often it is renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseTerms {
    /// How long one renewal lasts.
    pub ttl: Duration,
    /// How often it is renewed: several times in a `ttl`.
    pub renew_every: Duration,
}

/// Why terms cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    /// The length.
    #[error("a lease of {ttl:?}: {MIN_TTL:?} to {MAX_TTL:?} is possible")]
    Ttl {
        /// What was asked for.
        ttl: Duration,
    },
    /// The pace.
    #[error(
        "a lease of {ttl:?} renewed every {renew_every:?}: it has to be renewed at least three times in its length"
    )]
    Pace {
        /// The length.
        ttl: Duration,
        /// The pace.
        renew_every: Duration,
    },
}

impl LeaseTerms {
    /// A hiccup of two seconds is none: the renewal before it is at most 0.4 s old when it begins.
    pub const DEFAULT: Self = Self {
        ttl: Duration::from_millis(2_500),
        renew_every: Duration::from_millis(400),
    };
    /// For a healthy LAN: decided within 300 ms.
    pub const FAST: Self = Self {
        ttl: Duration::from_millis(240),
        renew_every: Duration::from_millis(40),
    };

    /// Checks them.
    ///
    /// # Errors
    /// [`TermsError`] saying what is possible.
    pub fn check(self) -> Result<Self, TermsError> {
        let Self { ttl, renew_every } = self;
        if !(MIN_TTL..=MAX_TTL).contains(&ttl) {
            return Err(TermsError::Ttl { ttl });
        }
        if renew_every.is_zero() || renew_every.saturating_mul(3) > ttl {
            return Err(TermsError::Pace { ttl, renew_every });
        }
        Ok(self)
    }

    /// How long a grantor lets nobody else in after it received a renewal: the lease, and what the clocks may differ by.
    #[must_use]
    pub fn guard(self) -> Duration {
        self.ttl + self.ttl * MAX_DRIFT_PER_MILLE / 1000
    }
}

impl fmt::Display for LeaseTerms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ttl, renew) = (self.ttl.as_millis(), self.renew_every.as_millis());
        write!(f, "ttl={ttl}ms,renew={renew}ms")
    }
}

impl FromStr for LeaseTerms {
    type Err = String;

    /// A profile, `default` or `fast`, or `ttl=2500ms,renew=400ms`.
    fn from_str(text: &str) -> Result<Self, String> {
        let terms = match text {
            "default" => Self::DEFAULT,
            "fast" => Self::FAST,
            own => {
                let of = |name: &str| {
                    own.split(',').find_map(|part| {
                        let millis = part
                            .trim()
                            .strip_prefix(name)?
                            .strip_prefix('=')?
                            .strip_suffix("ms")?;
                        millis.parse().ok().map(Duration::from_millis)
                    })
                };
                match (of("ttl"), of("renew"), own.split(',').count()) {
                    (Some(ttl), Some(renew_every), 2) => Self { ttl, renew_every },
                    _ => {
                        return Err(format!(
                            "{text:?} is no profile of detection: use default, fast, or ttl=2500ms,renew=400ms"
                        ));
                    }
                }
            }
        };
        terms.check().map_err(|e| e.to_string())
    }
}

impl Default for LeaseTerms {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Why an owner may not run its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lapse {
    /// It was never let.
    Never,
    /// Someone refused it as stale: final.
    Fenced {
        /// Who.
        by: String,
        /// The generation that is promised there.
        current: Generation,
    },
    /// Neither the registry nor enough holders have answered for the length of the lease.
    Expired {
        /// For how long it has had no lease.
        ago: Duration,
        /// How many holders' grants still hold.
        grants: usize,
        /// How many would be needed.
        quorum: usize,
    },
}

impl fmt::Display for Lapse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("neither the registry nor enough holders have let it run yet"),
            Self::Fenced { by, current } => {
                write!(f, "{by} has promised generation {current} to another owner")
            }
            Self::Expired { ago, grants, quorum } => write!(
                f,
                "its lease ran out {} ms ago: the registry did not renew it, and {grants} of the {quorum} holders that \
                 are needed answered",
                ago.as_millis()
            ),
        }
    }
}

/// Whether an owner may run its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Until then (not including it).
    MayRun {
        /// The end, by the owner's clock.
        until: Duration,
    },
    /// It has to stand still.
    MustStop(Lapse),
}

/// A set of holders, and how many of them make a quorum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Electors {
    /// Their addresses.
    pub holders: Vec<String>,
    /// How many of them have to grant time.
    pub quorum: usize,
}

impl Electors {
    /// The holders of a record, and its ack quorum.
    #[must_use]
    pub fn new(holders: &[String], ack_quorum: u32) -> Self {
        Self {
            holders: holders.to_vec(),
            // A quorum of none would let an owner run without anyone.
            quorum: ack_quorum.max(1) as usize,
        }
    }
}

/// The owner's own account of its lease.
///
/// While the holder set changes there are two sets of electors, and it takes a quorum of each: whichever of the two a
/// candidate reads in the registry, the holders it seals have granted all that the owner counts on.
#[derive(Debug, Clone)]
pub struct OwnerLease {
    terms: LeaseTerms,
    electors: Vec<Electors>,
    /// When the last renewal that was answered was sent.
    registry: Option<Duration>,
    /// When the last question was sent that the holder answered.
    holders: BTreeMap<String, Duration>,
    fenced: Option<(String, Generation)>,
}

impl OwnerLease {
    /// An owner that nobody has let run yet.
    #[must_use]
    pub fn new(terms: LeaseTerms, electors: Electors) -> Self {
        Self {
            terms,
            electors: vec![electors],
            registry: None,
            holders: BTreeMap::new(),
            fenced: None,
        }
    }

    /// The terms.
    #[must_use]
    pub fn terms(&self) -> LeaseTerms {
        self.terms
    }

    /// From now on it takes a quorum of each of these sets. What was granted before counts by the new rule too.
    pub fn elect(&mut self, electors: Vec<Electors>) {
        self.holders
            .retain(|holder, _| electors.iter().any(|of| of.holders.contains(holder)));
        self.electors = electors;
    }

    /// The registry answered the renewal that was sent then.
    pub fn renewed(&mut self, sent: Duration) {
        self.registry = self.registry.max(Some(sent));
    }

    /// The holder answered the renewal that was sent then.
    pub fn granted(&mut self, holder: &str, sent: Duration) {
        if self
            .electors
            .iter()
            .any(|of| of.holders.iter().any(|h| h == holder))
        {
            let last = self.holders.entry(holder.to_owned()).or_default();
            *last = (*last).max(sent);
        }
    }

    /// Someone refused it as stale. Final, whatever is answered after it.
    pub fn fence(&mut self, by: &str, current: Generation) {
        self.fenced.get_or_insert_with(|| (by.to_owned(), current));
    }

    /// When the questions were sent that the holders of a set answered.
    fn of<'a>(&'a self, electors: &'a Electors) -> impl Iterator<Item = Duration> + 'a {
        electors
            .holders
            .iter()
            .filter_map(|h| self.holders.get(h))
            .copied()
    }

    /// The end of the lease, as far as was answered.
    fn until(&self) -> Option<Duration> {
        // As long as the oldest of the quorum's newest grants holds.
        let granted = |electors: &Electors| {
            let mut sent: Vec<Duration> = self.of(electors).collect();
            sent.sort_unstable_by(|a, b| b.cmp(a));
            sent.get(electors.quorum.max(1) - 1).copied()
        };
        // `None` is the least: a set without a quorum grants nothing, and no sets do not either.
        let granted = self.electors.iter().map(granted).min().flatten();
        self.registry.max(granted).map(|sent| sent + self.terms.ttl)
    }

    /// Whether it may run its guest.
    #[must_use]
    pub fn verdict(&self, now: Duration) -> Verdict {
        if let Some((by, current)) = &self.fenced {
            return Verdict::MustStop(Lapse::Fenced {
                by: by.clone(),
                current: *current,
            });
        }
        match self.until() {
            None => Verdict::MustStop(Lapse::Never),
            Some(until) if now < until => Verdict::MayRun { until },
            Some(until) => {
                // Of the set that lacks most, as it is what keeps the guest.
                let grants = |of: &Electors| self.of(of).filter(|sent| now < *sent + self.terms.ttl).count();
                let worst = self.electors.iter().map(|of| (grants(of), of.quorum));
                let (grants, quorum) = worst
                    .max_by_key(|(grants, quorum)| quorum.saturating_sub(*grants))
                    .unwrap_or_default();
                Verdict::MustStop(Lapse::Expired {
                    ago: now - until,
                    grants,
                    quorum,
                })
            }
        }
    }
}

/// A holder's account of what it granted one VM's owner.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Grant {
    until: Duration,
    heard: Option<Duration>,
}

impl Grant {
    /// A holder that has just started, and may have granted a lease of these terms at the last instant before it ended.
    #[must_use]
    pub fn after_restart(terms: LeaseTerms, now: Duration) -> Self {
        Self {
            until: now + terms.guard(),
            heard: None,
        }
    }

    /// The owner was heard and is granted time. To be called only under the generation that is promised.
    pub fn grant(&mut self, terms: LeaseTerms, now: Duration) {
        self.until = self.until.max(now + terms.guard());
        self.heard = self.heard.max(Some(now));
    }

    /// The owner says that its guest stands still for good: nothing needs to be waited for.
    pub fn release(&mut self) {
        self.until = Duration::ZERO;
    }

    /// How long nobody else may run the guest as far as this holder is concerned.
    #[must_use]
    pub fn remaining(&self, now: Duration) -> Duration {
        self.until.saturating_sub(now)
    }

    /// For how long the owner was not heard; `None` when never since the start.
    #[must_use]
    pub fn silent_for(&self, now: Duration) -> Option<Duration> {
        self.heard.map(|heard| now.saturating_sub(heard))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    const TERMS: LeaseTerms = LeaseTerms {
        ttl: ms(1000),
        renew_every: ms(100),
    };

    fn electors(holders: usize, quorum: usize) -> Electors {
        Electors {
            holders: (0..holders).map(|h| h.to_string()).collect(),
            quorum,
        }
    }

    fn may_run(lease: &OwnerLease, now: u64) -> bool {
        matches!(lease.verdict(ms(now)), Verdict::MayRun { .. })
    }

    #[test]
    fn the_registry_alone_or_a_quorum_alone_lets_it_run() {
        let mut lease = OwnerLease::new(TERMS, electors(3, 2));
        assert_eq!(lease.verdict(ms(0)), Verdict::MustStop(Lapse::Never));
        lease.renewed(ms(10));
        assert!(may_run(&lease, 1009));
        assert!(!may_run(&lease, 1010));
        lease.granted("0", ms(900));
        assert!(!may_run(&lease, 1010), "one holder is no quorum");
        lease.granted("2", ms(600));
        assert!(may_run(&lease, 1599), "as long as the older of the two grants");
        assert!(!may_run(&lease, 1600));
        lease.granted("9", ms(5000));
        lease.granted("0", ms(100));
        assert!(
            may_run(&lease, 1599),
            "an answer to an older renewal takes nothing away"
        );
        let Verdict::MustStop(lapse) = lease.verdict(ms(1700)) else {
            panic!("it lapsed")
        };
        assert_eq!(
            lapse,
            Lapse::Expired {
                ago: ms(100),
                grants: 1,
                quorum: 2
            }
        );
    }

    #[test]
    fn while_the_holders_change_it_takes_a_quorum_of_both_sets() {
        let of = |holders: &[&str], quorum| Electors {
            holders: holders.iter().map(|h| (*h).to_owned()).collect(),
            quorum,
        };
        let (old, new) = (of(&["a", "b"], 2), of(&["a", "c"], 2));
        let mut lease = OwnerLease::new(TERMS, old.clone());
        lease.granted("a", ms(100));
        lease.granted("b", ms(100));
        lease.granted("c", ms(500));
        assert!(
            may_run(&lease, 1099) && !may_run(&lease, 1100),
            "c does not count yet"
        );
        lease.elect(vec![old.clone(), new.clone()]);
        assert!(
            !may_run(&lease, 200),
            "whoever seals a or c would not know of b's grant"
        );
        lease.granted("c", ms(300));
        assert!(
            may_run(&lease, 1099) && !may_run(&lease, 1100),
            "the oldest of all that are needed"
        );
        lease.granted("a", ms(600));
        assert!(!may_run(&lease, 1100), "b's holds no longer");
        lease.elect(vec![new]);
        assert!(
            may_run(&lease, 1299) && !may_run(&lease, 1300),
            "b's is not needed any more"
        );
        lease.elect(vec![old]);
        assert!(
            !may_run(&lease, 650),
            "what b granted was forgotten with its vote"
        );
        lease.elect(Vec::new());
        assert!(!may_run(&lease, 650));
    }

    #[test]
    fn a_fence_is_final() {
        let mut lease = OwnerLease::new(TERMS, electors(1, 1));
        lease.granted("0", ms(0));
        lease.fence("birch", Generation(4));
        lease.fence("oak", Generation(5));
        lease.renewed(ms(10));
        let stopped = Verdict::MustStop(Lapse::Fenced {
            by: "birch".into(),
            current: Generation(4),
        });
        assert_eq!(lease.verdict(ms(11)), stopped);
    }

    #[test]
    fn terms_have_bounds() {
        for good in [LeaseTerms::DEFAULT, LeaseTerms::FAST, TERMS] {
            assert_eq!(good.check(), Ok(good));
        }
        let of = |ttl, renew_every| {
            LeaseTerms {
                ttl: ms(ttl),
                renew_every: ms(renew_every),
            }
            .check()
        };
        assert_eq!("fast".parse(), Ok(LeaseTerms::FAST));
        assert_eq!(TERMS.to_string().parse(), Ok(TERMS));
        for bad in [
            "",
            "slow",
            "ttl=1000ms",
            "ttl=1000ms,renew=900ms",
            "ttl=1s,renew=1ms",
            "ttl=1000ms,renew=100ms,x",
        ] {
            assert!(bad.parse::<LeaseTerms>().is_err(), "{bad:?} was taken");
        }
        assert!(matches!(of(10, 1), Err(TermsError::Ttl { .. })));
        assert!(matches!(of(61_000, 1), Err(TermsError::Ttl { .. })));
        assert!(matches!(of(1000, 0), Err(TermsError::Pace { .. })));
        assert!(matches!(of(1000, 334), Err(TermsError::Pace { .. })));
        // Two seconds after which renewals go on are no reason: the renewal in flight when they began still holds.
        let LeaseTerms { ttl, renew_every } = LeaseTerms::DEFAULT;
        assert!(ttl >= Duration::from_secs(2) + renew_every);
    }

    #[test]
    fn a_released_grant_needs_no_wait_and_a_restart_a_whole_one() {
        let mut grant = Grant::after_restart(TERMS, ms(50));
        assert_eq!(grant.remaining(ms(50)), TERMS.guard());
        grant.grant(TERMS, ms(60));
        assert_eq!(grant.silent_for(ms(100)), Some(ms(40)));
        grant.release();
        assert_eq!(grant.remaining(ms(60)), ms(0));
    }

    /// One message: who it goes to (the registry is `None`), when it is sent, how long it and its answer take, and
    /// whether the answer comes.
    type Renewal = (Option<usize>, u64, u64, u64, bool);

    fn renewals(holders: usize) -> impl Strategy<Value = Vec<Renewal>> {
        let to = prop_oneof![1 => Just(None), 2 => (0..holders).prop_map(Some)];
        prop::collection::vec(
            (to, 0..3000u64, 0..300u64, 0..300u64, prop::bool::weighted(0.8)),
            0..40,
        )
    }

    proptest! {
        /// The oracle walks time: at no instant may the owner run and a candidate that did all that the rules ask.
        #[test]
        fn nobody_is_let_in_while_the_owner_may_run(
            (holders, quorum, renewals) in (1..5usize).prop_flat_map(|n| (Just(n), 1..=n, renewals(n))),
            raised in 0..3000u64,
            sealed_at in prop::collection::vec(0..400u64, 5),
            skip in 0..5usize,
            slow_owner in 0..=MAX_DRIFT_PER_MILLE,
        ) {
            let seals = crate::failover::seals_needed(holders, quorum);
            // The candidate seals any set of that size, at its own pace after the raise.
            let sealed: Vec<(usize, u64)> =
                (0..seals).map(|k| ((k + skip) % holders, raised + sealed_at[k])).collect();
            let mut owner = OwnerLease::new(TERMS, electors(holders, quorum));
            let mut grants = vec![Grant::default(); holders];
            let mut registry = Grant::default();
            let mut ordered = renewals;
            ordered.sort_by_key(|r| r.1 + r.2);
            for (to, sent, there, back, answered) in ordered {
                let received = sent + there;
                let refused = match to {
                    None => received >= raised,
                    Some(h) => sealed.iter().any(|(s, at)| *s == h && received >= *at),
                };
                if refused { continue; }
                match to {
                    None => registry.grant(TERMS, ms(received)),
                    Some(h) => grants[h].grant(TERMS, ms(received)),
                }
                // An answer counts whenever it comes: what matters is when the renewal was sent.
                let _ = back;
                if answered {
                    match to {
                        None => owner.renewed(ms(sent)),
                        Some(h) => owner.granted(&h.to_string(), ms(sent)),
                    }
                }
            }
            let waited = sealed.iter().map(|(h, at)| ms(*at) + grants[*h].remaining(ms(*at)));
            let start = waited.chain([ms(raised) + registry.remaining(ms(raised))]).max().unwrap_or_default();
            // The owner's clock may be slower than the candidates': a lease lasts longer by theirs.
            if let Verdict::MayRun { until } = owner.verdict(ms(0)) {
                let sent = until - TERMS.ttl;
                let until = sent + TERMS.ttl + TERMS.ttl * slow_owner / 1000;
                prop_assert!(until <= start, "the owner runs until {until:?} and the candidate from {start:?}");
            }
        }
    }
}
