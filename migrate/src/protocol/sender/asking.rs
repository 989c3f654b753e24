//! The lease that an owner asks of one holder: when the next question is due, and which answer is to which.

use std::collections::VecDeque;
use std::time::Duration;

use super::SenderAction;
use crate::lease::LeaseTerms;
use crate::wire::{Message, Released, Renew};

/// The most questions without an answer that are remembered; the answer to an older one would be of no use any more.
const MAX_OPEN: usize = 64;

/// What was asked on this connection.
#[derive(Debug)]
pub(super) struct Asking {
    terms: Option<LeaseTerms>,
    /// When the next question is due; none while the holder has not promised the generation on this connection.
    due: Option<Duration>,
    /// The guest stands still for good.
    released: bool,
    seq: u64,
    /// The questions without an answer, and when they were sent.
    open: VecDeque<(u64, Duration)>,
}

impl Asking {
    pub(super) fn new(terms: Option<LeaseTerms>) -> Self {
        Self {
            terms,
            due: None,
            released: false,
            seq: 0,
            open: VecDeque::new(),
        }
    }

    /// The holder has promised the generation; true when it is to be told that the guest stands still for good.
    pub(super) fn begin(&mut self, now: Duration) -> bool {
        if self.terms.is_some() && !self.released {
            self.due = Some(self.due.unwrap_or(now));
        }
        self.terms.is_some() && self.released
    }

    /// The connection is gone. What is answered to a question of it can never come.
    pub(super) fn lost(&mut self) {
        self.due = None;
        self.open.clear();
    }

    /// No more is asked for; true when the holder can be told.
    pub(super) fn release(&mut self) -> bool {
        self.released = true;
        self.open.clear();
        self.due.take().is_some()
    }

    pub(super) fn due(&self) -> Option<Duration> {
        self.due
    }

    /// The question that is due.
    pub(super) fn ask(&mut self, now: Duration) -> Option<SenderAction> {
        let terms = self.terms?;
        if self.due? > now {
            return None;
        }
        // From now, not from when it was due: after a standstill one question is enough.
        self.due = Some(now + terms.renew_every);
        self.seq += 1;
        if self.open.len() == MAX_OPEN {
            self.open.pop_front();
        }
        self.open.push_back((self.seq, now));
        Some(SenderAction::Send {
            stream: 0,
            message: Message::Renew(Renew { seq: self.seq }),
        })
    }

    /// When the question that is answered was sent; none of one that was forgotten.
    ///
    /// # Errors
    /// When it was never asked.
    pub(super) fn granted(&mut self, seq: u64) -> Result<Option<Duration>, ()> {
        if seq == 0 || seq > self.seq {
            return Err(());
        }
        while let Some((asked, sent)) = self.open.pop_front() {
            if asked == seq {
                return Ok(Some(sent));
            }
            if asked > seq {
                self.open.push_front((asked, sent));
                break;
            }
        }
        Ok(None)
    }
}

/// That the guest stands still for good.
pub(super) fn released() -> SenderAction {
    SenderAction::Send {
        stream: 0,
        message: Message::Released(Released {}),
    }
}
