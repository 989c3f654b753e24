//! How far a holder has ever acknowledged a VM: what it must not forget when it loses a segment.
//!
//! ```text
//!   0  8  magic "UNDSACK1"
//!   8  8  generation
//!  16  8  epoch
//!  24 32  digest of the bytes before it and the VM's id
//! ```
//!
//! The mark is written before the acknowledgement is sent, in place, and not synced: it survives the process. What a
//! power cut can take back of it is the last seconds, and the segments of those are durable under their own names. So
//! when a store is opened, a mark that is missing or cannot be read is made from the names that are there, and a file
//! that is found damaged raises it to the newest name of its VM. It never goes back, but by [`FsStore::forget_acked`].

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use segment::{Epoch, Generation, SegmentName, VmId};

use super::{DamagedFile, Entry, FsStore, MAX_CHAIN_LINKS, StoreError, lock};
use crate::crashsafe::DiskError;

const MAGIC: [u8; 8] = *b"UNDSACK1";
const CONTEXT: &str = "understudy store v1 acknowledged";
const RECORD_BYTES: usize = 56;
/// The folder of the marks.
pub(super) const FOLDER: &str = "acked";

fn encode(name: &SegmentName) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..8].copy_from_slice(&MAGIC);
    record[8..16].copy_from_slice(&name.generation.0.to_le_bytes());
    record[16..24].copy_from_slice(&name.epoch.0.to_le_bytes());
    let digest = digest(&name.vm, &record[..24]);
    record[24..].copy_from_slice(&digest);
    record
}

fn decode(vm: &VmId, bytes: &[u8]) -> Option<SegmentName> {
    let record = <&[u8; RECORD_BYTES]>::try_from(bytes).ok()?;
    if record[..8] != MAGIC || record[24..] != digest(vm, &record[..24]) {
        return None;
    }
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&record[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    Some(SegmentName::new(
        vm.clone(),
        Generation(number(8)),
        Epoch(number(16)),
    ))
}

fn digest(vm: &VmId, bytes: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new_derive_key(CONTEXT)
        .update(bytes)
        .update(vm.as_str().as_bytes())
        .finalize()
        .as_bytes()
}

impl FsStore {
    /// The newest checkpoint of `vm` that was ever acknowledged here, or could have been; what is stored now may be less.
    #[must_use]
    pub fn acked(&self, vm: &VmId) -> Option<SegmentName> {
        self.index().acked(vm).cloned()
    }

    /// Remembers that `name` is about to be acknowledged. Once this has returned, [`Self::acked`] never says less, also
    /// when the process is killed.
    ///
    /// # Errors
    /// What the disk says; then nothing may be acknowledged.
    pub fn note_acked(&self, name: &SegmentName) -> Result<(), StoreError> {
        self.check_writable()?;
        let gate = self.gate(&name.vm);
        let _open = lock(&gate);
        let known = self.index().has_mark(&name.vm);
        let acked = self
            .acked(&name.vm)
            .filter(|acked| acked.position() >= name.position());
        if known && acked.is_some() {
            return Ok(());
        }
        let newest = acked.unwrap_or_else(|| name.clone());
        let path = self.mark_path(&name.vm);
        let record = encode(&newest);
        let failed = |source| {
            self.disk_error(DiskError {
                what: "write the mark",
                path: path.clone(),
                source,
            })
        };
        if known {
            let file = File::options().write(true).open(&path).map_err(failed)?;
            file.write_all_at(&record, 0).map_err(failed)?;
        } else {
            // The first one: a name that a power cut leaves empty would say nothing.
            let disk = self.disk.made_durable();
            let stem = format!("acked-{}", name.vm);
            disk.write(&self.dir.join("tmp"), &stem, &path, &record)
                .map_err(|e| self.disk_error(e))?;
        }
        self.index().set_acked(newest, true);
        Ok(())
    }

    /// Forgets what was acknowledged of `vm`, for it is to be removed altogether.
    ///
    /// # Errors
    /// What the disk says.
    pub fn forget_acked(&self, vm: &VmId) -> Result<(), StoreError> {
        self.check_writable()?;
        let gate = self.gate(vm);
        let _open = lock(&gate);
        if self.index().has_mark(vm) {
            self.disk
                .unlink(&self.mark_path(vm))
                .map_err(|e| self.disk_error(e))?;
        }
        self.index().forget_acked(vm);
        Ok(())
    }

    /// Takes a segment that was found damaged out of the folder and the index, and remembers that it was there.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], and what the disk says.
    pub fn set_aside(&self, name: &SegmentName) -> Result<PathBuf, StoreError> {
        let moved = self.set_aside_if(name, |_| true, "set aside: another holder's copy takes its place")?;
        moved.ok_or_else(|| StoreError::NotHeld {
            name: name.clone(),
            dir: self.dir.clone(),
        })
    }

    /// The same, when it is still the one that is meant; none when it is gone, or another.
    pub(super) fn set_aside_if(
        &self,
        name: &SegmentName,
        is_meant: impl FnOnce(&Entry) -> bool,
        why: &str,
    ) -> Result<Option<PathBuf>, StoreError> {
        self.check_writable()?;
        let newest = self
            .entries(&name.vm)
            .pop()
            .map_or_else(|| name.clone(), |e| e.name);
        // Before it is gone, so that no instant is without its memory.
        self.note_acked(&newest)?;
        // Not while the collector drops: it may have planned by this one being the newest.
        let _one = lock(&self.housekeeping);
        let gate = self.gate(&name.vm);
        let _open = lock(&gate);
        if !self.get(name).is_some_and(|entry| is_meant(&entry)) {
            return Ok(None);
        }
        let path = self.segment_path(name);
        let moved_to = self.move_to_damaged(name, &path)?;
        self.index().remove(name);
        lock(&self.damaged).push(DamagedFile {
            name: name.clone(),
            path,
            moved_to: Some(moved_to.clone()),
            why: why.to_owned(),
        });
        Ok(Some(moved_to))
    }

    /// Checks every byte of the newest whole chain of `vm`, at most `max_bytes` of it, and sets aside what is damaged,
    /// until one is sound. What was set aside, in words.
    ///
    /// # Errors
    /// What the disk says of anything else than damage.
    pub fn verify_newest(&self, vm: &VmId, max_bytes: u64) -> Result<Vec<String>, StoreError> {
        let mut damaged = Vec::new();
        for _ in 0..MAX_CHAIN_LINKS {
            let Some(links) = self.newest_complete(vm).map(|newest| self.chain(&newest.name)) else {
                break;
            };
            let Ok(links) = links else {
                // It has changed since.
                continue;
            };
            if links.iter().map(|link| link.bytes).sum::<u64>() > max_bytes {
                break;
            }
            let before = damaged.len();
            for link in &links {
                damaged.extend(self.set_aside_if_damaged(&link.name)?);
            }
            if damaged.len() == before {
                break;
            }
        }
        Ok(damaged)
    }

    /// Checks every byte of a segment, and sets it aside when it is damaged: why, in words.
    ///
    /// # Errors
    /// What the disk says of anything else than damage.
    pub fn set_aside_if_damaged(&self, name: &SegmentName) -> Result<Option<String>, StoreError> {
        match self.verify(name) {
            Ok(_) => Ok(None),
            // Merged away or removed since: not damaged.
            Err(StoreError::NotHeld { .. }) => Ok(None),
            Err(error @ StoreError::Damaged { .. }) => {
                let why = super::scan::explain(&error);
                match self.set_aside_if(name, |_| true, &why) {
                    Ok(Some(path)) => {
                        tracing::error!(segment = %name, moved_to = %path.display(), %why, "a stored segment is damaged: set aside");
                        Ok(Some(why))
                    }
                    Ok(None) => Ok(None),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the marks of the VMs. `damaged` are those of which a file was just set aside: their marks are raised.
    pub(super) fn read_marks(&self, damaged: &[SegmentName]) -> Result<(), StoreError> {
        let dir = self.dir.join(FOLDER);
        let failed = |what: &'static str, path: PathBuf| move |source| StoreError::Io { what, path, source };
        let list = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            other => Some(other.map_err(failed("read the folder", dir.clone()))?),
        };
        for file in list.into_iter().flatten() {
            let path = file.map_err(failed("read the folder", dir.clone()))?.path();
            let Some(Ok(vm)) = path.file_name().and_then(|name| name.to_str()).map(VmId::new) else {
                continue;
            };
            let mut bytes = Vec::new();
            let file = crate::regular::open(&path).map_err(failed("open", path.clone()))?;
            file.take(RECORD_BYTES as u64 + 1)
                .read_to_end(&mut bytes)
                .map_err(failed("read", path.clone()))?;
            match decode(&vm, &bytes) {
                Some(name) => self.index().set_acked(name, true),
                None => {
                    tracing::warn!(%vm, path = %path.display(), "the mark is damaged: made anew from what is stored")
                }
            }
        }
        for vm in self.vms() {
            let known = self.index().has_mark(&vm);
            if !known && let Some(newest) = self.entries(&vm).pop() {
                self.index().set_acked(newest.name, false);
            }
        }
        for name in damaged {
            let newest = self.entries(&name.vm).pop().map(|e| e.name);
            let newest = newest.filter(|n| n.position() > name.position());
            let name = newest.unwrap_or_else(|| name.clone());
            self.note_acked(&name)?;
        }
        Ok(())
    }

    fn mark_path(&self, vm: &VmId) -> PathBuf {
        self.dir.join(FOLDER).join(vm.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Durability;
    use crate::store::fixture::{chain, name, put, vm};

    #[test]
    fn golden_bytes_and_every_bit_counts() {
        let record = encode(&name("web/3/9"));
        assert_eq!(&record[..24], b"UNDSACK1\x03\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0");
        assert_eq!(decode(&vm("web"), &record), Some(name("web/3/9")));
        for bit in 0..RECORD_BYTES * 8 {
            let mut flipped = record;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&vm("web"), &flipped), None, "bit {bit}");
        }
        for length in 0..RECORD_BYTES {
            assert_eq!(decode(&vm("web"), &record[..length]), None);
        }
        assert_eq!(decode(&vm("db"), &record), None);
    }

    #[test]
    fn a_mark_only_rises_and_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let open = || FsStore::open(dir.path(), None, Durability::Durable).unwrap();
        let store = open();
        assert_eq!(store.acked(&vm("web")), None);
        store.note_acked(&name("web/1/4")).unwrap();
        store.note_acked(&name("web/1/9")).unwrap();
        store.note_acked(&name("web/1/5")).unwrap();
        assert_eq!(store.acked(&vm("web")), Some(name("web/1/9")));
        drop(store);
        let store = open();
        assert_eq!(store.acked(&vm("web")), Some(name("web/1/9")));
        store.note_acked(&name("web/2/1")).unwrap();
        store.forget_acked(&vm("web")).unwrap();
        assert_eq!(store.acked(&vm("web")), None);
        drop(store);
        assert_eq!(open().acked(&vm("web")), None);
    }

    #[test]
    fn what_was_lost_is_remembered() {
        use std::os::unix::fs::FileExt;

        let dir = tempfile::tempdir().unwrap();
        let open = || FsStore::open(dir.path(), None, Durability::Durable).unwrap();
        let store = open();
        let segments = chain("web", 3);
        for (name, bytes) in &segments {
            put(&store, name, bytes).unwrap();
        }
        let newest = segments[2].0.clone();
        drop(store);
        let path = open().segment_path(&newest);
        let length = fs::metadata(&path).unwrap().len();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"rot", length / 2).unwrap();
        drop(file);
        // A mark that was never written, as after a power cut: made from the names.
        let _ = fs::remove_dir_all(dir.path().join(FOLDER));
        let store = open();
        let told = store.verify_newest(&newest.vm, u64::MAX).unwrap();
        assert!(told.len() == 1 || !store.damaged().is_empty(), "{told:?}");
        assert_eq!(
            store.newest_complete(&newest.vm).map(|e| e.name),
            Some(segments[1].0.clone())
        );
        assert_eq!(store.acked(&newest.vm), Some(newest.clone()));
        drop(store);
        let store = open();
        assert_eq!(store.acked(&newest.vm), Some(newest));
    }
}
