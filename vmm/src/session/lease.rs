//! Keeps the guest's leash: time from the registry and the holders in, the guest stopped when it runs out.
//!
//! ```text
//!   registry: renewed --+                     +--> leash: until when (looked at by vCPUs and the outbox)
//!   holders:  granted --+--> OwnerLease ------+
//!   anyone:   fenced ---+                     +--> the guest is stopped, and goes on with the next renewal
//! ```
//!
//! A thread of its own, so that the guest is stopped in time whatever the runtime's threads do. Whether the guest may
//! run is the rule in [`migrate::lease`]; this has the clock.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use migrate::clock::boottime;
use migrate::lease::{Electors, Lapse, LeaseTerms, OwnerLease, Verdict};
use segment::{Generation, VmId};
use tokio::sync::watch;

use super::SessionError;
use super::report::OnLapse;
use crate::control::VmHandle;

/// A guest takes a moment to be stopped: that begins this part of the lease before its end. (What is left of the default
/// lease is still enough that a hiccup of two seconds is none.)
const EARLY: u32 = 25;
/// How long it waits for news when there is nothing to be done by time alone.
const IDLE: Duration = Duration::from_secs(60);

/// What is heard.
#[derive(Debug)]
pub(super) enum News {
    /// A holder answered what was asked then.
    Granted { holder: String, sent: Duration },
    /// The registry answered what was asked then.
    Renewed { sent: Duration },
    /// It takes a quorum of each of these from now on.
    Electors { version: u64, sets: Vec<Electors> },
    /// Someone refused this owner as stale.
    Fenced { by: String, current: Generation },
}

/// The thread, from outside; it has ended when this is dropped, and leaves the leash as it is.
#[derive(Debug)]
pub(super) struct LeaseKeeper {
    news: Option<Sender<News>>,
    thread: Option<JoinHandle<()>>,
}

impl LeaseKeeper {
    /// Begins to count; the guest is let run as soon as the first time is granted.
    pub(super) fn start(
        name: VmId,
        vm: VmHandle,
        terms: LeaseTerms,
        electors: Electors,
        adopted: watch::Sender<u64>,
        on_lapse: OnLapse,
    ) -> Result<Self, SessionError> {
        let (news, inbox) = channel();
        let thread = Thread {
            name,
            vm,
            lease: OwnerLease::new(terms, electors),
            adopted,
            adopting: 0,
            on_lapse,
            lapsed: false,
        };
        let thread = Builder::new()
            .name("lease".into())
            .spawn(move || thread.serve(&inbox))
            .map_err(SessionError::Thread)?;
        Ok(Self {
            news: Some(news),
            thread: Some(thread),
        })
    }

    pub(super) fn tell(&self, news: News) {
        if let Some(to) = &self.news {
            // A thread that is gone has seen the fence.
            let _ = to.send(news);
        }
    }
}

impl Drop for LeaseKeeper {
    fn drop(&mut self) {
        self.news = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by itself.
            let _ = thread.join();
        }
    }
}

struct Thread {
    name: VmId,
    vm: VmHandle,
    lease: OwnerLease,
    /// Who waits for the electors to be counted by.
    adopted: watch::Sender<u64>,
    /// The version of those that were heard last.
    adopting: u64,
    on_lapse: OnLapse,
    /// The guest was stopped for want of a lease.
    lapsed: bool,
}

impl Thread {
    fn serve(mut self, inbox: &Receiver<News>) {
        loop {
            let Some(wait) = self.look() else { return };
            // After the look: only now the leash is as short as the new rule has it.
            self.adopted.send_replace(self.adopting);
            match inbox.recv_timeout(wait) {
                Ok(news) => self.hear(news),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while let Ok(news) = inbox.try_recv() {
                self.hear(news);
            }
        }
    }

    fn hear(&mut self, news: News) {
        match news {
            News::Granted { holder, sent } => self.lease.granted(&holder, sent),
            News::Electors { version, sets } => {
                self.lease.elect(sets);
                self.adopting = version;
            }
            News::Renewed { sent } => self.lease.renewed(sent),
            News::Fenced { by, current } => self.lease.fence(&by, current),
        }
    }

    /// Does what follows now; returns for how long nothing else does, or nothing when it is over.
    fn look(&mut self) -> Option<Duration> {
        let now = boottime();
        let leash = self.vm.leash();
        let early = self.lease.terms().ttl / EARLY;
        match self.lease.verdict(now + early) {
            Verdict::MayRun { until } => {
                leash.until(until);
                if std::mem::take(&mut self.lapsed) {
                    tracing::info!(vm = %self.name, "the lease is renewed: the guest goes on");
                    if let Err(error) = self.vm.renewed() {
                        tracing::error!(vm = %self.name, %error, "the guest cannot go on after its lease was renewed");
                    }
                }
                Some(until.saturating_sub(now + early))
            }
            Verdict::MustStop(lapse @ Lapse::Expired { .. }) => {
                let reason = lapse.to_string();
                if self.on_lapse == OnLapse::Stop {
                    tracing::error!(vm = %self.name, %reason, "the guest is stopped for good");
                    leash.cut();
                    if let Err(error) = self.vm.fence(&reason) {
                        tracing::error!(vm = %self.name, %error, "stop the guest whose lease ran out");
                    }
                    return None;
                }
                if !std::mem::replace(&mut self.lapsed, true) {
                    tracing::error!(vm = %self.name, %reason, "the guest is stopped until it has a lease again");
                    if let Err(error) = self.vm.lapse(&reason) {
                        tracing::error!(vm = %self.name, %error, "stop the guest whose lease ran out");
                    }
                }
                Some(IDLE)
            }
            Verdict::MustStop(Lapse::Never) => Some(IDLE),
            Verdict::MustStop(Lapse::Fenced { .. }) => {
                leash.cut();
                None
            }
        }
    }
}
