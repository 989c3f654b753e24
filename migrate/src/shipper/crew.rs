//! The tasks of the holders: they come and go as the holder set changes.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::holder::Holder;
use super::{Shared, View};
use crate::protocol::SenderConfig;

/// One holder's task.
#[derive(Debug)]
struct Hand {
    at: usize,
    task: JoinHandle<()>,
    dismiss: watch::Sender<bool>,
}

/// What each of them listens to.
#[derive(Debug)]
pub(super) struct Signals {
    /// A new segment is in the spool.
    pub(super) notify: watch::Sender<u64>,
    /// The guest stands still for good.
    pub(super) release: watch::Sender<bool>,
    /// It is over.
    pub(super) stop: watch::Sender<bool>,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Crew {
    handle: Handle,
    shared: Arc<Shared>,
    sender: SenderConfig,
    signals: Signals,
    // Changed by who changes the holders and emptied at the end; held for moments.
    hands: Mutex<Vec<Hand>>,
}

impl Crew {
    pub(super) fn new(handle: Handle, shared: Arc<Shared>, sender: SenderConfig, signals: Signals) -> Self {
        Self {
            handle,
            shared,
            sender,
            signals,
            hands: Mutex::default(),
        }
    }

    /// Ships to the holder with this number.
    pub(super) fn start(&self, at: usize, address: &str) {
        let holder = Holder::new(self.shared.clone(), at, address.to_owned(), self.sender.clone());
        let (dismiss, dismissed) = watch::channel(false);
        let Signals {
            notify,
            release,
            stop,
        } = &self.signals;
        let (notify, release, mut stop) = (notify.subscribe(), release.subscribe(), stop.subscribe());
        let both = dismiss.clone();
        let task = self.handle.spawn(async move {
            let run = holder.run(notify, release, dismissed);
            let mut run = std::pin::pin!(run);
            tokio::select! {
                () = &mut run => return,
                // Ended, or nobody is there any more to end it.
                _ = stop.changed() => {}
            }
            let _ = both.send(true);
            run.await;
        });
        let mut hands = self.hands.lock().unwrap_or_else(PoisonError::into_inner);
        hands.push(Hand { at, task, dismiss });
    }

    /// Ships to one more, who does not count yet; its number.
    pub(super) fn learn(&self, address: &str) -> usize {
        self.shared.spool.add_holder(address);
        // Both have a line for each holder ever, in the same order; only the keeper adds to them.
        let at = self.shared.ledger().learn(address);
        self.shared.views().push(View::new());
        self.start(at, address);
        at
    }

    /// Ships to it no more.
    pub(super) fn dismiss(&self, at: usize) {
        let address = self.shared.ledger().address(at).to_owned();
        if let Some(view) = self.shared.views().get_mut(at) {
            view.left = true;
        }
        let mut hands = self.hands.lock().unwrap_or_else(PoisonError::into_inner);
        hands.retain(|hand| {
            if hand.at == at {
                let _ = hand.dismiss.send(true);
            }
            hand.at != at
        });
        drop(hands);
        self.shared.spool.remove_holder(&address);
    }

    /// The tasks, to be waited for.
    pub(super) fn take(&self) -> Vec<JoinHandle<()>> {
        let mut hands = self.hands.lock().unwrap_or_else(PoisonError::into_inner);
        hands.drain(..).map(|hand| hand.task).collect()
    }
}
