//! A VM runs once: a restore that no registry has agreed to must not become a second copy by accident.
//!
//! A copy under another name is another VM and always fine. Under the VM's own name, and without protection, nobody is
//! asked who owns it. It goes on from its own store then, which one process at a time has, and from nothing else: files,
//! and stores of others, say nothing of where it runs. Nor does it go on from a store that has promised a generation of
//! it: that one is in the care of a cluster.

use std::path::{Path, PathBuf};

use migrate::store::{FsStore, promised_in};
use segment::{Generation, SegmentName};

use super::{RestoreFrom, SessionConfig, SessionError};

/// Refuses what could be a second copy.
pub(super) fn check(
    config: &SessionConfig,
    from: &RestoreFrom,
    tip: &SegmentName,
) -> Result<(), SessionError> {
    // With protection the registry is asked.
    if config.protection.is_some() || config.second_copy || tip.vm != config.name {
        return Ok(());
    }
    let sources = match from {
        RestoreFrom::Store { dir, .. } | RestoreFrom::Image { dir, .. } => vec![dir.clone()],
        RestoreFrom::Global { .. } => Vec::new(),
        RestoreFrom::Files(paths) => paths.iter().filter_map(|path| store_of(path)).collect(),
    };
    for dir in sources.iter().chain([&config.store]) {
        let generation = promised_in(dir, &config.name)?;
        if generation > Generation(0) {
            return Err(SessionError::InCare {
                vm: config.name.clone(),
                generation,
                dir: dir.clone(),
            });
        }
    }
    match from {
        // Locked when it is opened.
        RestoreFrom::Store { dir, .. } if same(dir, &config.store) => Ok(()),
        RestoreFrom::Store { .. }
        | RestoreFrom::Image { .. }
        | RestoreFrom::Files(_)
        | RestoreFrom::Global { .. } => Err(SessionError::SecondCopy {
            vm: config.name.clone(),
            own: config.store.clone(),
        }),
    }
}

/// A store keeps one VM; of another's folder the answer to "restore the newest" would be mixed up.
pub(super) fn check_own(config: &SessionConfig, store: &FsStore) -> Result<(), SessionError> {
    let vms = store.vms();
    match vms.first() {
        Some(other) if !vms.contains(&config.name) => Err(SessionError::StoreOfAnother {
            vm: config.name.clone(),
            other: other.clone(),
            dir: config.store.clone(),
        }),
        _ => Ok(()),
    }
}

/// The store that a segment file lies in: DIR of DIR/segments/VM/GENERATION/EPOCH.seg.
fn store_of(path: &Path) -> Option<PathBuf> {
    let path = std::fs::canonicalize(path).ok()?;
    let segments = path.ancestors().nth(3)?;
    (segments.file_name()? == "segments").then(|| segments.parent().map(Path::to_owned))?
}

fn same(one: &Path, other: &Path) -> bool {
    one == other
        || matches!((std::fs::canonicalize(one), std::fs::canonicalize(other)), (Ok(a), Ok(b)) if a == b)
}
