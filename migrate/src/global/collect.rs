//! What goes from the global store: points that no policy keeps, and parts that no point names.
//!
//! ```text
//! a point that is not kept            --seen so for the whole grace-->  the point is removed
//! parts that no point names           --seen so for the whole grace-->  the parts are removed
//! ```
//!
//! Why this is safe: an upload takes up parts only from the newest point, which every policy keeps, or from its own last
//! try, and makes its point within half of the grace since the first of them, or not at all. So when a point has not been kept for the grace, whoever took it for
//! the newest has made its own point, or never will; and parts that nothing has named for the grace belong to an upload
//! that has ended. The points are listed after the parts, so that a point made in between is seen. Times are of one clock
//! of one process: it begins anew with each process, which only makes things go later.
//!
//! What is removed first is the point; a crash in between leaves parts that nothing names.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use segment::{SegmentName, VmId};

use super::bucket::Stored;
use super::{Bucket, ChainRecord, GlobalError};
use crate::store::KeepPolicy;

/// How long something is seen as not needed before it is removed.
pub type Grace = Duration;

/// Since when each thing that is not needed was seen so: of one VM.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    points: HashMap<SegmentName, Duration>,
    parts: HashMap<Stored, Duration>,
}

/// What a collection did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Removed {
    /// Restore points that are there now.
    pub points: u64,
    /// Restore points that were removed.
    pub removed_points: u64,
    /// Objects of segments that were removed.
    pub removed_parts: u64,
}

/// Those of `unneeded` that were seen so for the grace; all are remembered, and what is needed again is forgotten. Pure.
fn ripe<T: Clone + Eq + std::hash::Hash + Ord>(
    seen: &mut HashMap<T, Duration>,
    unneeded: &BTreeSet<T>,
    now: Duration,
    grace: Grace,
) -> Vec<T> {
    seen.retain(|what, _| unneeded.contains(what));
    let mut ripe: Vec<T> = Vec::new();
    for what in unneeded {
        let since = *seen.entry(what.clone()).or_insert(now);
        if now.saturating_sub(since) >= grace {
            ripe.push(what.clone());
        }
    }
    ripe
}

/// Removes what is not needed any more of `vm`. `now` is of a clock that never goes back; `known` are records that were
/// read before (a point never changes), and takes up the others.
///
/// # Errors
/// What the store says; [`GlobalError::Damaged`] when a point cannot be read: what it needs is not known then, and no
/// part is removed.
pub async fn collect(
    bucket: &Bucket,
    vm: &VmId,
    policy: &KeepPolicy,
    seen: &mut Seen,
    known: &mut BTreeMap<SegmentName, ChainRecord>,
    now: Duration,
    grace: Grace,
) -> Result<Removed, GlobalError> {
    let mut removed = Removed::default();
    // Before the points: an upload makes its parts first.
    let stored = bucket.stored(vm).await?;
    let names = bucket.points(vm).await?;
    known.retain(|name, _| {
        names
            .binary_search_by_key(&name.position(), SegmentName::position)
            .is_ok()
    });
    let unread: Vec<_> = names
        .iter()
        .filter(|name| !known.contains_key(name))
        .cloned()
        .collect();
    for record in bucket.records(&unread).await? {
        known.insert(record.tip().name.clone(), record);
    }
    let points: Vec<_> = known.values().map(ChainRecord::point).collect();
    let kept = policy.keep(&points);
    let unkept: BTreeSet<_> = known
        .keys()
        .filter(|name| !kept.contains(name))
        .cloned()
        .collect();
    let named: BTreeSet<Stored> = known.values().flat_map(named).collect();
    let unnamed: BTreeSet<_> = stored
        .keys()
        .filter(|stored| !named.contains(stored))
        .cloned()
        .collect();
    for name in ripe(&mut seen.points, &unkept, now, grace) {
        bucket.remove_point(&name).await?;
        known.remove(&name);
        removed.removed_points += 1;
    }
    for unnamed in ripe(&mut seen.parts, &unnamed, now, grace) {
        let parts = stored.get(&unnamed).map(Vec::as_slice).unwrap_or_default();
        bucket.remove_parts(&unnamed, parts).await?;
        removed.removed_parts += parts.len() as u64;
    }
    removed.points = known.len() as u64;
    Ok(removed)
}

/// What a point needs.
fn named(record: &ChainRecord) -> impl Iterator<Item = Stored> + '_ {
    record.links().iter().map(|link| Stored {
        name: link.name.clone(),
        upload: link.upload,
    })
}
