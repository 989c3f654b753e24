//! What this holder has granted the owners of its VMs, and the length of their leases on the disk.
//!
//! ```text
//!   DATA/leases/<vm>     the longest lease its owners ask for, in milliseconds: written before the first is granted
//! ```
//!
//! Invariants: time is granted only under the generation that is promised, in one step with that look, so that a seal
//! that reads what is left after its promise has read all that can ever have been granted; and only a lease whose length
//! is on the disk, so that a holder that restarts lets nobody in for as long as it may have granted before.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use segment::{Generation, VmId};

use crate::clock::boottime;
use crate::crashsafe::{Disk, DiskError};
use crate::lease::{Grant, LeaseTerms, MAX_TTL, MIN_TTL};
use crate::regular;
use crate::store::FsStore;

/// More than a number of milliseconds takes.
const MAX_FILE_BYTES: u64 = 32;

#[derive(Debug, Default)]
struct Held {
    /// The length that is on the disk.
    durable: Duration,
    grant: Grant,
}

/// All grants.
#[derive(Debug)]
pub(super) struct Grants {
    dir: PathBuf,
    /// When this holder began.
    since: Duration,
    // Who notes and who forgets the length of a lease; over the disk.
    disk: Mutex<()>,
    // The connections' tasks grant, seals read; held for moments, and never over the disk.
    held: Mutex<HashMap<VmId, Held>>,
}

/// A lease of that length. (A grant knows nothing of the pace.)
fn terms(ttl: Duration) -> LeaseTerms {
    LeaseTerms {
        ttl,
        renew_every: ttl / 3,
    }
}

impl Grants {
    /// Those of a holder that begins now: what it may have granted before is taken for granted at this instant.
    pub(super) fn open(data: &Path) -> io::Result<Self> {
        let (dir, now) = (data.join("leases"), boottime());
        fs::create_dir_all(&dir)?;
        let mut held = HashMap::new();
        for file in fs::read_dir(&dir)? {
            let path = file?.path();
            let Some(Ok(vm)) = path.file_name().and_then(|name| name.to_str()).map(VmId::new) else {
                continue;
            };
            let ttl = read(&path).unwrap_or_else(|why| {
                tracing::error!(path = %path.display(), why, "the length of a lease cannot be read: taken for the longest");
                MAX_TTL
            });
            let grant = Grant::after_restart(terms(ttl), now);
            held.insert(vm, Held { durable: ttl, grant });
        }
        let held = Mutex::new(held);
        Ok(Self {
            dir,
            since: now,
            disk: Mutex::default(),
            held,
        })
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, HashMap<VmId, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the length of a lease durable; never less than it was. Blocks for the disk.
    pub(super) fn note(&self, vm: &VmId, ttl: Duration) -> Result<(), DiskError> {
        let _writing = self.writing();
        if self.held().get(vm).is_some_and(|held| held.durable >= ttl) {
            return Ok(());
        }
        let path = self.dir.join(vm.as_str());
        let text = format!("{}\n", ttl.as_millis());
        Disk::durable().write(&self.dir, &format!(".{vm}"), &path, text.as_bytes())?;
        let mut all = self.held();
        let held = all.entry(vm.clone()).or_default();
        held.durable = held.durable.max(ttl);
        Ok(())
    }

    /// The owner under this generation is heard and is granted time; false when the generation is not the promised one,
    /// or the length is not on the disk.
    pub(super) fn grant(&self, store: &FsStore, vm: &VmId, generation: Generation, ttl: Duration) -> bool {
        let mut all = self.held();
        // Within the lock: a seal promises first, and reads what was granted under the same lock after that.
        if store.promised(vm) != generation {
            return false;
        }
        match all.get_mut(vm).filter(|held| held.durable >= ttl) {
            Some(held) => {
                held.grant.grant(terms(ttl), boottime());
                true
            }
            None => false,
        }
    }

    /// The owner under this generation says that its guest stands still for good.
    pub(super) fn release(&self, store: &FsStore, vm: &VmId, generation: Generation) {
        let mut all = self.held();
        if store.promised(vm) == generation
            && let Some(held) = all.get_mut(vm)
        {
            held.grant.release();
        }
    }

    /// How long nobody else may run the guest yet as far as this holder is concerned. To be asked after the promise.
    pub(super) fn remaining(&self, vm: &VmId) -> Option<Duration> {
        let left = self.held().get(vm)?.grant.remaining(boottime());
        Some(left).filter(|left| !left.is_zero())
    }

    /// Nothing is held of the VM any more. What is still granted stays until it is granted no more. Blocks for the disk.
    pub(super) fn forget(&self, vm: &VmId) {
        let _writing = self.writing();
        {
            let mut all = self.held();
            if all
                .get(vm)
                .is_none_or(|held| !held.grant.remaining(boottime()).is_zero())
            {
                return;
            }
            // From memory first: without a length nothing is granted that a restart would not know of.
            all.remove(vm);
        }
        // One that is left behind makes a holder that restarts wait once more, and nothing else.
        if let Err(error) = fs::remove_file(self.dir.join(vm.as_str()))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%vm, %error, "the length of a forgotten VM's leases is left on the disk");
        }
    }

    /// For how long the owner was not heard, and whether it ever was since this holder began.
    pub(super) fn silent_for(&self, vm: &VmId) -> (Duration, bool) {
        let now = boottime();
        let silent = self.held().get(vm).and_then(|held| held.grant.silent_for(now));
        (silent.unwrap_or(now.saturating_sub(self.since)), silent.is_some())
    }
}

fn read(path: &Path) -> Result<Duration, String> {
    let text = regular::read_text(path, MAX_FILE_BYTES).map_err(|e| e.to_string())?;
    let ttl = text.trim().parse().map(Duration::from_millis);
    ttl.ok()
        .filter(|ttl| (MIN_TTL..=MAX_TTL).contains(ttl))
        .ok_or_else(|| format!("{text:?} is no length of a lease"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Durability;

    #[test]
    fn a_grant_is_only_for_the_promised_owner_and_outlives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let store = FsStore::open(&folder.path().join("store"), None, Durability::Durable).unwrap();
        let vm = VmId::new("web").unwrap();
        let (ttl, mine) = (Duration::from_secs(50), Generation(2));
        let grants = Grants::open(folder.path()).unwrap();
        store.promise(&vm, mine).unwrap();
        assert!(
            !grants.grant(&store, &vm, mine, ttl),
            "its length is not on the disk"
        );
        assert_eq!(grants.remaining(&vm), None);
        grants.note(&vm, ttl).unwrap();
        assert!(grants.grant(&store, &vm, mine, ttl));
        assert!(
            grants.remaining(&vm).unwrap() > ttl,
            "longer by what the clocks may differ"
        );

        store.promise(&vm, Generation(3)).unwrap();
        assert!(!grants.grant(&store, &vm, mine, ttl), "its generation is over");
        grants.release(&store, &vm, mine);
        assert!(
            grants.remaining(&vm).is_some(),
            "nor can it give back what is waited for"
        );

        let again = Grants::open(folder.path()).unwrap();
        assert!(
            again.remaining(&vm).is_some(),
            "it may have granted at its last instant"
        );
        again.release(&store, &vm, Generation(3));
        assert_eq!(again.remaining(&vm), None);

        again.forget(&vm);
        assert!(!folder.path().join("leases/web").exists());
        again.note(&vm, ttl).unwrap();
        assert!(again.grant(&store, &vm, Generation(3), ttl));
        again.forget(&vm);
        assert!(again.remaining(&vm).is_some(), "what is granted is not forgotten");
        fs::write(folder.path().join("leases/web"), "nonsense").unwrap();
        let damaged = Grants::open(folder.path()).unwrap();
        assert!(damaged.remaining(&vm).unwrap() > MAX_TTL);
    }
}
