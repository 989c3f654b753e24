//! What the owner keeps of its own checkpoints, for holders that lag: the shell around [`plan`].
//!
//! ```text
//! protect loop --checkpoint--> store --next_for, pin--> shipper --> holder
//!      |                         ^                          |
//!      |                         | drop, merge              | note_acked, set_position
//!      +--- make_room, off the guest's path ---- Spool <----+
//! ```
//!
//! Invariants: a holder that is not given up can be brought to the newest checkpoint by what is in the store, from
//! wherever it may be; without holders nothing is dropped; the newest stays.
//!
//! A segment that is being shipped is safe in two ways. Its file is open, so dropping or merging it does not take the
//! bytes away. And the holder may soon *be* there, so [`Spool::pin`] notes that, and no merge swallows the place
//! until the holder says where it is.
//!
//! The bound has to hold a full checkpoint beside the newest one: with less, a holder that needs a full one never gets
//! it, and each try is refused by the store as too large.
//!
//! What it never does: it does not delay the guest, and it does not talk to holders.

pub mod plan;
#[cfg(test)]
mod plan_tests;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use segment::{CheckpointId, SegmentName, VmId};

use crate::store::{Entry, FsStore, StoreError};
use plan::{HolderPosition, NextEntry, SpoolAction, SpoolEntry};

/// How often one [`Spool::make_room`] plans: each time something is dropped or merged, so it ends by itself; this is
/// for a store that others fill at the same time.
const MAX_ROUNDS: usize = 64;

/// A checkpoint by name and identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Position {
    /// The name.
    pub name: SegmentName,
    /// The identity.
    pub checkpoint: CheckpointId,
}

impl From<&Entry> for Position {
    fn from(entry: &Entry) -> Self {
        Self {
            name: entry.name.clone(),
            checkpoint: entry.checkpoint,
        }
    }
}

/// What to ship next to a holder.
#[expect(
    clippy::large_enum_variant,
    reason = "made, matched and dropped, one for each segment shipped"
)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// This one.
    Segment(Entry),
    /// Nothing: it has the newest.
    UpToDate,
    /// Nothing here builds on what it has: a new full checkpoint is needed
    /// ([`Protector::request_full`](crate::protect::Protector::request_full)).
    NeedFull,
}

/// What [`Spool::make_room`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Room {
    /// Segments that no holder needs any more.
    pub dropped: usize,
    /// Segments that are now part of a later one.
    pub merged: usize,
    /// Holders that will need a new full checkpoint.
    pub given_up: Vec<String>,
    /// Nothing more can be freed: a checkpoint that does not fit will be refused by the store. Everything that is
    /// stored stays; a larger bound, or a holder that catches up, helps.
    pub full: bool,
}

/// One VM's checkpoints in its own host's store.
#[derive(Debug)]
pub struct Spool {
    store: Arc<FsStore>,
    vm: VmId,
    level: i32,
    /// Where the holders are. A mutex, as shippers and the one who makes room meet here; held for microseconds, and
    /// while a finished merge gets its name.
    state: Mutex<State>,
    /// Held by the one who makes room.
    making: Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    holders: BTreeMap<String, Vec<Option<Position>>>,
    /// The segments a running merge will swallow, and whether someone needs one of them after all.
    swallowing: Vec<Position>,
    cancelled: bool,
}

impl State {
    /// Notes that a holder may be at `position`.
    fn may_be_at(&mut self, holder: &str, position: Position) {
        self.cancelled |= self.swallowing.contains(&position);
        if let Some(possible) = self.holders.get_mut(holder)
            && !possible.contains(&Some(position.clone()))
        {
            possible.push(Some(position));
        }
    }
}

impl Spool {
    /// The spool of `vm` in `store`; merged segments are compressed at `level`.
    #[must_use]
    pub fn new(store: Arc<FsStore>, vm: VmId, level: i32) -> Arc<Self> {
        Arc::new(Self {
            store,
            vm,
            level,
            state: Mutex::default(),
            making: Mutex::default(),
        })
    }

    /// Says that `holder` is to get this VM's checkpoints. Until it says where it is, it may be anywhere among what is
    /// here now, and all of that is kept for it. A holder that is known already stays where it is.
    pub fn add_holder(&self, holder: &str) {
        // Under the lock, so that what is stored in between counts as new.
        let mut state = self.state();
        if state.holders.contains_key(holder) {
            return;
        }
        let mut possible = vec![None];
        for entry in self.entries() {
            possible.extend([Some(entry.at), entry.parent]);
        }
        possible.sort_by(|a, b| a.as_ref().map(|at| &at.name).cmp(&b.as_ref().map(|at| &at.name)));
        possible.dedup();
        state.cancelled = true;
        state.holders.insert(holder.to_owned(), possible);
    }

    /// Forgets a holder: nothing is kept for it any more.
    pub fn remove_holder(&self, holder: &str) {
        self.state().holders.remove(holder);
    }

    /// Who gets this VM's checkpoints.
    #[must_use]
    pub fn holders(&self) -> Vec<String> {
        self.state().holders.keys().cloned().collect()
    }

    /// The holder's newest whole checkpoint, as it says when it connects (`None`: it has nothing). Nothing is on its
    /// way to it at that moment. Adds the holder when it is not known.
    pub fn set_position(&self, holder: &str, position: Option<Position>) {
        let mut state = self.state();
        if let Some(at) = &position {
            state.cancelled |= state.swallowing.contains(at);
        }
        state.holders.insert(holder.to_owned(), vec![position]);
    }

    /// The holder has stored `acked` durably, and with it the chain below.
    pub fn note_acked(&self, holder: &str, acked: Position) {
        let mut state = self.state();
        state.may_be_at(holder, acked.clone());
        if let Some(possible) = state.holders.get_mut(holder) {
            possible.retain(|at| at.as_ref().is_some_and(|at| at.name >= acked.name));
        }
    }

    /// What to ship next to a holder whose newest whole checkpoint is `position` (or will be, when what is on its way
    /// has arrived).
    #[must_use]
    pub fn next_for(&self, position: Option<&Position>) -> Next {
        let entries = self.store.entries(&self.vm);
        let spooled: Vec<SpoolEntry> = entries.iter().map(SpoolEntry::from).collect();
        match plan::next(&spooled, position) {
            NextEntry::UpToDate => Next::UpToDate,
            NextEntry::NeedFull => Next::NeedFull,
            NextEntry::Segment(next) => match entries.into_iter().find(|entry| entry.name == next.at.name) {
                Some(entry) => Next::Segment(entry),
                None => Next::NeedFull,
            },
        }
    }

    /// Opens a segment for shipping to `holder`, and notes that the holder may have it from now on. The open file
    /// stays readable whatever is merged or dropped. The entry is that of this very file, so ship *its* length and
    /// digest, and check that its parent is still what the holder has: it may have been merged since
    /// [`next_for`](Self::next_for) named it.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`] when it was merged into a later one meanwhile: ask [`next_for`](Self::next_for) again.
    pub fn pin(&self, holder: &str, name: &SegmentName) -> Result<(File, Entry), StoreError> {
        // The lock is held across both: a merge publishes under it, so it either sees the holder there or came before.
        let mut state = self.state();
        let (file, entry) = self.store.open_raw(name)?;
        state.may_be_at(holder, Position::from(&entry));
        Ok((file, entry))
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Arc<FsStore> {
        &self.store
    }

    /// Whether [`make_room`](Self::make_room) would do something. Takes microseconds.
    #[must_use]
    pub fn wants_room(&self) -> bool {
        !self.plan().is_empty()
    }

    /// Drops what every holder has, and when the bound is near merges, and gives up. Reads and writes segments: call
    /// it from a thread nobody waits for.
    ///
    /// # Errors
    /// What the disk says. What was not done is tried again by the next call.
    pub fn make_room(&self) -> Result<Room, StoreError> {
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let mut room = Room::default();
        for _ in 0..MAX_ROUNDS {
            let actions = self.plan();
            if actions.is_empty() {
                break;
            }
            for action in actions {
                match action {
                    SpoolAction::Drop(name) => match self.store.remove(&name) {
                        Ok(()) => room.dropped += 1,
                        Err(StoreError::NotHeld { .. }) => {}
                        Err(e) => return Err(e),
                    },
                    SpoolAction::Merge(run) => {
                        if !self.merge(&run)? {
                            // Someone is being served from the run: the next call sees where it is then.
                            return Ok(room);
                        }
                        room.merged += run.len() - 1;
                    }
                    SpoolAction::GiveUp { holder } => {
                        tracing::warn!(vm = %self.vm, %holder, "the holder is too far behind: it needs a full checkpoint");
                        room.given_up.push(holder);
                    }
                    SpoolAction::Refuse => {
                        room.full = true;
                        return Ok(room);
                    }
                }
            }
        }
        Ok(room)
    }

    /// Merges a run, unless a holder turns up inside it meanwhile.
    fn merge(&self, run: &[SegmentName]) -> Result<bool, StoreError> {
        let Some((_, swallowed)) = run.split_last() else {
            return Ok(true);
        };
        {
            let mut state = self.state();
            state.swallowing = swallowed
                .iter()
                .filter_map(|name| self.store.get(name))
                .map(|e| Position::from(&e))
                .collect();
            // Where holders went between the planning and now.
            state.cancelled = state
                .holders
                .values()
                .flatten()
                .flatten()
                .any(|at| state.swallowing.contains(at));
        }
        let publish = || {
            let state = self.state();
            if state.cancelled { None } else { Some(state) }
        };
        let merged = self.store.merge_unless(run, self.level, publish);
        let mut state = self.state();
        state.swallowing.clear();
        state.cancelled = false;
        match merged {
            Ok(entry) => Ok(entry.is_some()),
            // Someone removed or merged one of them by hand: the next plan sees what is left.
            Err(StoreError::NotARun { .. } | StoreError::NotHeld { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn plan(&self) -> Vec<SpoolAction> {
        let entries = self.entries();
        let holders: Vec<HolderPosition> = self
            .state()
            .holders
            .iter()
            .map(|(holder, possible)| HolderPosition {
                holder: holder.clone(),
                possible: possible.clone(),
            })
            .collect();
        let own: u64 = entries.iter().map(|entry| entry.bytes).sum();
        // What other VMs take of the store is not ours to free.
        let others = self.store.used_bytes().saturating_sub(own);
        let bound = self
            .store
            .budget()
            .map_or(u64::MAX, |budget| budget.saturating_sub(others));
        plan::plan(&entries, &holders, bound)
    }

    fn entries(&self) -> Vec<SpoolEntry> {
        self.store
            .entries(&self.vm)
            .iter()
            .map(SpoolEntry::from)
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
