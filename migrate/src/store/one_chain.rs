//! Reading one chain out of a store that may hold thousands: no other file is opened.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use segment::{SegmentName, SegmentReader, VmId};

use super::scan::{self, Content};
use super::{DamagedFile, FsStore, MAX_CHAIN_LINKS, StoreError};

/// How often a chain is followed anew because a file of it went away under way: merges make it shorter each time.
const MAX_WALKS: usize = 8;

/// How a walk ended.
enum Walk {
    Whole,
    /// It cannot become whole by walking again.
    Broken,
    /// A link went away after the folder was listed: it was merged into a newer one, which has to be read again. (A
    /// merge replaces the newer file first, so a link that was not listed was missing before.)
    Gone,
}

impl FsStore {
    /// Opens the store in `dir` for reading, with no more in view than the chain of `tip`, or of the newest checkpoint
    /// of `vm` whose chain is whole. Also while another process writes it.
    ///
    /// # Errors
    /// [`StoreError::NoStore`], and what the disk says. That the chain is not whole is for [`Self::chain`] to say.
    pub fn open_chain(dir: &Path, vm: &VmId, tip: Option<&SegmentName>) -> Result<Arc<Self>, StoreError> {
        let mut store = Self::unread(dir)?;
        let segments = dir.join("segments");
        // Of several tips, what was read for one serves the next: links that were broken stay broken.
        let mut seen = HashMap::new();
        let mut walks = 0;
        'anew: loop {
            let mut names = scan::names_of(&segments, vm)?;
            names.sort_by_key(|name| std::cmp::Reverse(name.position()));
            let listed: HashSet<_> = names.iter().cloned().collect();
            for tip in tip.map_or(names, |tip| vec![tip.clone()]) {
                match store.walk_files(&tip, &listed, &mut seen)? {
                    Walk::Whole => return Ok(Arc::new(store)),
                    Walk::Broken => {}
                    Walk::Gone if walks < MAX_WALKS => {
                        walks += 1;
                        seen.clear();
                        store.index = Mutex::default();
                        continue 'anew;
                    }
                    Walk::Gone => {}
                }
            }
            break;
        }
        // What there is of it: the caller's question for the chain names what is missing.
        Ok(Arc::new(store))
    }

    /// Opens one segment of the store in `dir`, and looks at nothing it stands on.
    ///
    /// # Errors
    /// [`StoreError::NoStore`], [`StoreError::NotHeld`], [`StoreError::Damaged`], and what the disk says.
    pub fn open_one(dir: &Path, name: &SegmentName) -> Result<SegmentReader<File>, StoreError> {
        let store = Self::unread(dir)?;
        let path = store.segment_path(name);
        let file = crate::regular::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => StoreError::NotHeld {
                name: name.clone(),
                dir: dir.to_owned(),
            },
            _ => StoreError::Io {
                what: "open",
                path,
                source,
            },
        })?;
        let damaged = |source| StoreError::Damaged {
            name: name.clone(),
            source,
        };
        let reader = SegmentReader::open(file).map_err(damaged)?;
        let found = &reader.manifest().name;
        if found != name {
            return Err(StoreError::OtherName {
                expected: name.clone(),
                found: found.clone(),
            });
        }
        Ok(reader)
    }

    /// Reads the links of `tip` from their files, as far as they go.
    fn walk_files(
        &mut self,
        tip: &SegmentName,
        listed: &HashSet<SegmentName>,
        seen: &mut HashMap<SegmentName, bool>,
    ) -> Result<Walk, StoreError> {
        let mut next = Some(tip.clone());
        for _ in 0..MAX_CHAIN_LINKS {
            let Some(name) = next else {
                return Ok(Walk::Whole);
            };
            match seen.get(&name) {
                Some(true) => {}
                Some(false) => return Ok(Walk::Broken),
                None => {
                    let path = self.segment_path(&name);
                    let Some(found) = scan::read_one(&name, &path)? else {
                        if listed.contains(&name) {
                            return Ok(Walk::Gone);
                        }
                        seen.insert(name, false);
                        return Ok(Walk::Broken);
                    };
                    let good = match found.content {
                        Content::Good(entry) => {
                            self.index().insert(entry);
                            true
                        }
                        Content::Damaged(why) | Content::Newer { why, .. } => {
                            self.unusable(DamagedFile {
                                name: name.clone(),
                                path,
                                moved_to: None,
                                why,
                            });
                            false
                        }
                    };
                    seen.insert(name.clone(), good);
                    if !good {
                        return Ok(Walk::Broken);
                    }
                }
            }
            next = self
                .get(&name)
                .and_then(|entry| entry.parent().map(|(parent, _)| parent.clone()));
        }
        Ok(Walk::Broken)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::load::LoadPlan;
    use crate::store::Durability;
    use crate::store::fixture::{chain, name, put, vm};

    #[test]
    fn a_pipe_anywhere_in_a_store_is_waited_for_by_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let names = chain("web", 2);
        let store = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
        for (name, bytes) in &names {
            put(&store, name, bytes).unwrap();
        }
        drop(store);
        let pipe = |at: &str| {
            let path = dir.path().join(at);
            // What is there has made room for it.
            let _ = fs::remove_file(&path);
            let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
            assert!(made.success(), "{at}");
        };
        for at in ["segments/y", "segments/web/y", "segments/web/1/y"] {
            pipe(at);
            let store = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
            assert_eq!(store.all().len(), 2, "{at}");
            drop(store);
            assert_eq!(
                FsStore::open_read_only(dir.path()).unwrap().all().len(),
                2,
                "{at}"
            );
            let one = FsStore::open_chain(dir.path(), &vm("web"), None).unwrap();
            assert_eq!(one.all().len(), 2, "{at}");
        }
        // Where it takes the place of something that is needed, that is said.
        for at in ["policies/web", "readers"] {
            pipe(at);
            let error = FsStore::open(dir.path(), None, Durability::Durable).unwrap_err();
            assert!(matches!(error, StoreError::Io { .. }), "{error}");
            assert_eq!(FsStore::open_read_only(dir.path()).unwrap().all().len(), 2);
            fs::remove_file(dir.path().join(at)).unwrap();
        }
    }

    #[test]
    fn no_file_but_those_of_the_chain_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let store = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
        for (name, bytes) in chain("web", 4) {
            put(&store, &name, &bytes).unwrap();
        }
        for (name, bytes) in chain("db", 2) {
            put(&store, &name, &bytes).unwrap();
        }
        // A pipe where nobody writes: whoever opens it waits for ever.
        let pipe = dir.path().join("segments/db/1/3.seg");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        let newest = FsStore::open_chain(dir.path(), &vm("web"), None).unwrap();
        assert_eq!(
            newest.newest_complete(&vm("web")).map(|e| e.name),
            Some(name("web/1/4"))
        );
        assert_eq!(newest.all().len(), 4);
        let third = FsStore::open_chain(dir.path(), &vm("web"), Some(&name("web/1/3"))).unwrap();
        assert_eq!(third.all().len(), 3);
        assert_eq!(LoadPlan::new(&third, &name("web/1/3")).unwrap().links(), 3);

        // A damaged link: the newest whole one is older; the one that was named is told as not whole.
        fs::write(dir.path().join("segments/web/1/3.seg"), b"junk").unwrap();
        let newest = FsStore::open_chain(dir.path(), &vm("web"), None).unwrap();
        assert_eq!(
            newest.newest_complete(&vm("web")).map(|e| e.name),
            Some(name("web/1/2"))
        );
        let broken = FsStore::open_chain(dir.path(), &vm("web"), Some(&name("web/1/4"))).unwrap();
        assert!(LoadPlan::new(&broken, &name("web/1/4")).is_err());
        // The pipe itself is no segment, and nobody waits for it.
        let piped = FsStore::open_chain(dir.path(), &vm("db"), None).unwrap();
        assert_eq!(
            piped.newest_complete(&vm("db")).map(|e| e.name),
            Some(name("db/1/2"))
        );
    }
}
