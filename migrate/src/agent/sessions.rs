//! Which owner ships which VM to this agent now.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use segment::{Generation, VmId};
use tokio::sync::mpsc;

#[derive(Debug)]
struct Line {
    id: u64,
    generation: Generation,
    owner: String,
    kick: mpsc::UnboundedSender<Generation>,
}

/// The connections that ship, one for each VM at most.
#[derive(Debug, Default, Clone)]
pub(super) struct Sessions {
    // Shared by the connections' tasks, which enter, leave and kick each other; held for moments.
    lines: Arc<Mutex<(u64, HashMap<VmId, Line>)>>,
}

impl Sessions {
    fn lines(&self) -> MutexGuard<'_, (u64, HashMap<VmId, Line>)> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection has had its generation promised: an older one of the VM is told.
    pub(super) fn enter(
        &self,
        vm: &VmId,
        generation: Generation,
        owner: &str,
        kick: mpsc::UnboundedSender<Generation>,
    ) -> Session {
        let mut lines = self.lines();
        lines.0 += 1;
        let id = lines.0;
        let line = Line {
            id,
            generation,
            owner: owner.to_owned(),
            kick,
        };
        if let Some(old) = lines.1.insert(vm.clone(), line) {
            // It may have ended by itself.
            let _ = old.kick.send(generation);
        }
        Session {
            sessions: self.clone(),
            vm: vm.clone(),
            id,
        }
    }

    /// `generation` was promised: an owner of a lower one is told at once.
    pub(super) fn sealed(&self, vm: &VmId, generation: Generation) {
        if let Some(line) = self.lines().1.get(vm)
            && line.generation < generation
        {
            let _ = line.kick.send(generation);
        }
    }

    /// How many VMs are shipped here now.
    pub(super) fn count(&self) -> usize {
        self.lines().1.len()
    }

    /// Who ships the VM now.
    pub(super) fn owner(&self, vm: &VmId) -> Option<String> {
        self.lines().1.get(vm).map(|line| line.owner.clone())
    }
}

/// A connection's place; leaves it when dropped.
#[derive(Debug)]
pub(super) struct Session {
    sessions: Sessions,
    vm: VmId,
    id: u64,
}

impl Session {
    pub(super) fn vm(&self) -> &VmId {
        &self.vm
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut lines = self.sessions.lines();
        if lines.1.get(&self.vm).is_some_and(|line| line.id == self.id) {
            lines.1.remove(&self.vm);
        }
    }
}
