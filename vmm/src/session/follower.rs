//! What follows from the shipper's events: a commit is noted, a full checkpoint taken, a fenced guest paused.

use std::sync::{Arc, Mutex};

use migrate::shipper::ShipEvent;
use segment::{Generation, SegmentName, VmId};
use tokio::sync::{mpsc, watch};

use super::checkpoints::{Orders, Progress};
use super::lease::{LeaseKeeper, News};
use super::lock;
use crate::control::VmHandle;

/// Acts on what the shipper reports.
pub(super) struct Follower {
    pub(super) vm: VmHandle,
    pub(super) name: VmId,
    pub(super) generation: Generation,
    pub(super) orders: Orders,
    pub(super) progress: Arc<Mutex<Progress>>,
    pub(super) committed: watch::Sender<Option<SegmentName>>,
    /// Who counts the lease; absent when the guest runs without one.
    pub(super) lease: Option<LeaseKeeper>,
}

impl Follower {
    pub(super) async fn follow(self, mut events: mpsc::UnboundedReceiver<ShipEvent>) {
        while let Some(event) = events.recv().await {
            match event {
                ShipEvent::Committed { name, .. } => {
                    self.committed.send_replace(Some(name));
                    self.orders.tidy();
                }
                ShipEvent::Fenced { holder, current } => self.fenced(&holder, current).await,
                ShipEvent::Forgotten { registry } => self.forgotten(&registry),
                ShipEvent::Granted { holder, sent } => self.tell(News::Granted { holder, sent }),
                ShipEvent::Renewed { sent } => self.tell(News::Renewed { sent }),
                ShipEvent::Electors { version, sets } => self.tell(News::Electors { version, sets }),
                ShipEvent::NeedFull { holder } => {
                    tracing::info!(vm = %self.name, %holder, "the holder needs a full checkpoint");
                    self.orders.full();
                }
                ShipEvent::HolderUp {
                    holder,
                    node,
                    position,
                } => {
                    tracing::info!(vm = %self.name, %holder, %node, position = ?position, "holder up");
                }
                ShipEvent::HoldersChanged { holders, ack_quorum } => {
                    tracing::info!(vm = %self.name, ?holders, ack_quorum, "the holders changed");
                }
                ShipEvent::HolderDown { holder, why } => {
                    tracing::warn!(vm = %self.name, %holder, %why, "holder down; the guest runs on");
                }
            }
        }
    }

    fn tell(&self, news: News) {
        if let Some(lease) = &self.lease {
            lease.tell(news);
        }
    }

    /// Nobody can take the VM over any more, and another may be started under its name: what is shipped is for nothing.
    fn forgotten(&self, registry: &str) {
        let why = format!(
            "its protection has ended: the registry at {registry} does not know VM {0} any more (standby forget --force, \
             while it ran). The guest runs on, on this host alone. To protect it again: vmm checkpoint {0} --full, \
             vmm stop {0}, then vmm restore {0} --protect-to with its holders",
            self.name
        );
        if lock(&self.progress).forgotten.replace(why.clone()).is_none() {
            tracing::error!(vm = %self.name, "{why}");
            self.orders.every(None);
        }
    }

    /// Rule 9: refused as stale, the owner pauses its guest.
    async fn fenced(&self, holder: &str, current: Generation) {
        let reason = format!(
            "{holder} has promised generation {current} of VM {}, and this is generation {}: another host may run it now",
            self.name, self.generation
        );
        // At once, before anything is waited for.
        self.vm.leash().cut();
        self.tell(News::Fenced {
            by: holder.to_owned(),
            current,
        });
        let vm = self.vm.clone();
        let told = reason.clone();
        let paused = tokio::task::spawn_blocking(move || vm.fence(&told)).await;
        match paused {
            Ok(Ok(())) => tracing::error!(vm = %self.name, %reason, "fenced: the guest is paused for good"),
            Ok(Err(error)) => {
                tracing::error!(vm = %self.name, %reason, %error, "fenced, and the guest cannot be paused")
            }
            Err(error) => tracing::error!(vm = %self.name, %reason, %error, "fenced, and the pause failed"),
        }
        self.orders.every(None);
    }
}
