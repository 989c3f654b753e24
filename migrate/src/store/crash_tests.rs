//! A crash, or a power cut, at every step of a store's life; and a disk that is full at every step.
//!
//! The fault sees each change before it is made. From step N on it refuses all of them, as for a process that died
//! there. For a power cut it then takes back what nothing had made durable: names whose folder was not synced since,
//! and half of each file that was not synced. That is harsher than any file system: it shows a missing sync.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use segment::Generation;

use super::fixture::{Bytes, chain, load, name, other_checkpoint, put, vm};
use super::*;
use crate::crashsafe::{Fault, Step};

/// A change of a name that a power cut takes back.
#[derive(Debug)]
enum Undo {
    /// It was made here.
    Made(PathBuf),
    /// It was here and was replaced; a link to the old one is there.
    Replaced(PathBuf, PathBuf),
    /// It was here and was removed; a link to it is there.
    Removed(PathBuf, PathBuf),
}

/// How the end comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The process dies; the kernel writes everything in time.
    Crash,
    /// The power is cut: what was not synced is lost.
    PowerCut,
    /// The same, and removals that were not synced are kept all the same: file systems may order them so.
    PowerCutAfterRemovals,
}

#[derive(Debug, Default)]
struct Pending {
    steps: usize,
    dead: bool,
    /// With the folder whose sync makes it durable.
    names: Vec<(PathBuf, Undo)>,
    unsynced: HashSet<PathBuf>,
}

#[derive(Debug)]
struct CrashAt {
    step: usize,
    /// Where links to removed files are kept.
    side: PathBuf,
    state: Mutex<Pending>,
}

impl CrashAt {
    fn new(step: usize, side: &Path) -> Arc<Self> {
        Arc::new(Self {
            step,
            side: side.to_owned(),
            state: Mutex::default(),
        })
    }

    fn steps(&self) -> usize {
        self.state.lock().unwrap().steps
    }

    fn power_cut(&self, keep_removals: bool) {
        let mut state = self.state.lock().unwrap();
        for path in state.unsynced.drain() {
            if let Ok(file) = fs::OpenOptions::new().write(true).open(&path) {
                file.set_len(file.metadata().unwrap().len() / 2).unwrap();
            }
        }
        for (_, undo) in state.names.drain(..).rev() {
            match undo {
                Undo::Made(path) if path.is_dir() => fs::remove_dir_all(path).unwrap(),
                // Gone already, when a folder above it is.
                Undo::Made(path) => drop(fs::remove_file(path)),
                Undo::Removed(..) if keep_removals => {}
                Undo::Replaced(path, link) | Undo::Removed(path, link) => fs::rename(link, path).unwrap(),
            }
        }
    }
}

impl Pending {
    fn made(&mut self, path: &Path) {
        self.names
            .push((path.parent().unwrap().to_owned(), Undo::Made(path.to_owned())));
    }

    fn was(&mut self, path: &Path, side: &Path, undo: fn(PathBuf, PathBuf) -> Undo) {
        let link = side.join(self.steps.to_string());
        if fs::hard_link(path, &link).is_ok() {
            self.names
                .push((path.parent().unwrap().to_owned(), undo(path.to_owned(), link)));
        }
    }
}

impl Fault for CrashAt {
    fn before(&self, step: Step<'_>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.steps += 1;
        if state.dead || state.steps > self.step {
            state.dead = true;
            return Err(io::Error::other("crashed"));
        }
        match step {
            Step::CreateDir(path) if path.exists() => {}
            Step::CreateDir(path) => state.made(path),
            Step::CreateTemp(path) => {
                state.unsynced.insert(path.to_owned());
            }
            Step::Write(path, _) => {
                state.unsynced.insert(path.to_owned());
            }
            Step::SyncFile(path) => {
                state.unsynced.remove(path);
            }
            Step::RenameNew(from, to) => {
                if !to.exists() {
                    state.made(to);
                }
                if state.unsynced.remove(from) {
                    state.unsynced.insert(to.to_owned());
                }
            }
            Step::RenameOver(from, to) => {
                if to.exists() {
                    state.was(to, &self.side, Undo::Replaced);
                } else {
                    state.made(to);
                }
                if state.unsynced.remove(from) {
                    state.unsynced.insert(to.to_owned());
                }
            }
            Step::Unlink(path) => {
                state.was(path, &self.side, Undo::Removed);
                state.unsynced.remove(path);
            }
            Step::SyncDir(dir) => state.names.retain(|(folder, _)| folder != dir),
        }
        Ok(())
    }
}

/// What the store said yes to.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// Segments it has, by the script.
    stored: Vec<SegmentName>,
    /// Segments it was told to remove or merge away.
    going: Vec<SegmentName>,
    /// Segments it said it removed.
    gone: Vec<SegmentName>,
    promised: Generation,
    promise_asked: Generation,
    /// Each is told on standard output too, for a parent that outlives this process.
    pub(super) aloud: bool,
}

/// One thing that it said, or was told.
#[derive(Debug, Clone, Copy)]
pub(super) enum Word {
    Stored,
    Going,
    Gone,
    Back,
    Asked,
    Promised,
}

const WORDS: [(&str, Word); 6] = [
    ("stored", Word::Stored),
    ("going", Word::Going),
    ("gone", Word::Gone),
    ("back", Word::Back),
    ("asked", Word::Asked),
    ("promised", Word::Promised),
];

impl Said {
    fn note(&mut self, word: Word, what: &str) {
        match word {
            Word::Stored => self.stored.push(name(what)),
            Word::Going => self.going.push(name(what)),
            Word::Gone => self.gone.push(name(what)),
            Word::Back => self.going.retain(|going| *going != name(what)),
            Word::Asked => self.promise_asked = Generation(what.parse().unwrap()),
            Word::Promised => self.promised = Generation(what.parse().unwrap()),
        }
        if self.aloud {
            let (said, _) = WORDS[word as usize];
            // In one piece, and not through the test harness.
            let line = format!("{said} {what}\n");
            rustix::io::write(rustix::stdio::stdout(), line.as_bytes()).unwrap();
        }
    }

    /// What a process said that told it aloud.
    pub(super) fn heard(text: &str) -> Self {
        let mut said = Self::default();
        for line in text.lines() {
            if let Some((word, what)) = line.split_once(' ')
                && let Some((_, word)) = WORDS.iter().find(|(known, _)| *known == word)
            {
                said.note(*word, what);
            }
        }
        said
    }
}

pub(super) type Segments = Vec<(SegmentName, Vec<u8>)>;
pub(super) type Script = fn(&Arc<FsStore>, &Segments, &mut Said) -> Result<(), StoreError>;

/// A store that is folded and collected while it is filled; ends at the first error.
pub(super) fn live_and_collect(
    store: &Arc<FsStore>,
    segments: &Segments,
    said: &mut Said,
) -> Result<(), StoreError> {
    let keep: KeepPolicy = "last=3".parse().unwrap();
    let options = CollectOptions {
        max_links: 4,
        short_of_room: false,
        level: 1,
        pace: Pace::unlimited(),
    };
    store.set_policy(&vm("web"), Some(keep))?;
    let mut taken = 0;
    for part in [4, 3, 2] {
        for (name, bytes) in &segments[taken..taken + part] {
            put(store, name, bytes)?;
            said.note(Word::Stored, &name.to_string());
        }
        taken += part;
        if part == 4 {
            store.fold(&name("web/1/3"), 1, &Pace::unlimited())?;
        }
        for (name, _) in &segments[..taken - 3] {
            said.note(Word::Going, &name.to_string());
        }
        for short_of_room in [false, true] {
            let options = CollectOptions {
                short_of_room,
                ..options.clone()
            };
            store.collect(&vm("web"), &keep, &BTreeSet::new(), &options)?;
        }
        // Fails when the crash came in between and was survived so far: a merge whose folder could not be synced.
        store.set_policy(&vm("web"), Some(keep))?;
        assert_eq!(store.all().len(), 3);
    }
    // What was dropped comes back from an archive.
    let archive = super::archive::archive_of(&segments[..3]);
    let imported = store.import(archive.as_slice()).map_err(|error| match error {
        ArchiveError::Store(error) => error,
        // A write that the crash refused.
        ArchiveError::Io { what, source } => StoreError::Io {
            what,
            path: "the archive".into(),
            source,
        },
        error => panic!("{error}"),
    })?;
    assert_eq!(imported.added, 3);
    for (name, _) in &segments[..3] {
        said.note(Word::Back, &name.to_string());
    }
    Ok(())
}

/// A store's life; ends at the first error.
pub(super) fn live(store: &Arc<FsStore>, segments: &Segments, said: &mut Said) -> Result<(), StoreError> {
    let promise = |said: &mut Said, generation: u64| {
        said.note(Word::Asked, &generation.to_string());
        let promised = store.promise(&vm("web"), Generation(generation))?;
        said.note(Word::Promised, &promised.to_string());
        Ok::<_, StoreError>(())
    };
    promise(said, 1)?;
    for (name, bytes) in segments {
        put(store, name, bytes)?;
        said.note(Word::Stored, &name.to_string());
    }
    let run = ["web/1/2", "web/1/3", "web/1/4"].map(name);
    for merged in &run[..2] {
        said.note(Word::Going, &merged.to_string());
    }
    // What was merged away may come back: it is whole, and a merge is done when the newest is.
    store.merge_into_newest(&run, 1)?;
    promise(said, 2)?;
    let next = name("web/2/1");
    put(store, &next, &other_checkpoint(&next))?;
    said.note(Word::Stored, &next.to_string());
    said.note(Word::Going, &next.to_string());
    store.remove(&next)?;
    said.note(Word::Gone, &next.to_string());
    promise(said, 3)
}

/// What must be true of a store that is opened after that.
pub(super) fn check(dir: &Path, said: &Said, oracle: &BTreeMap<SegmentName, Bytes>, end: End, context: &str) {
    let store = FsStore::open(dir, None, Durability::Durable).unwrap_or_else(|e| panic!("{context}: {e}"));
    assert_eq!(
        store.damaged(),
        [],
        "{context}: something half-written can be seen"
    );
    assert_eq!(fs::read_dir(dir.join("tmp")).unwrap().count(), 0, "{context}");
    for entry in store.all() {
        store
            .verify(&entry.name)
            .unwrap_or_else(|e| panic!("{context}: {e}"));
    }
    for stored in &said.stored {
        if said.going.contains(stored) {
            continue;
        }
        assert!(
            store.get(stored).is_some(),
            "{context}: {stored} was acknowledged and is gone"
        );
        let content = load(&store, stored);
        assert_eq!(content, oracle[stored], "{context}: {stored} has another content");
    }
    if end != End::Crash {
        for gone in &said.gone {
            assert_eq!(store.get(gone), None, "{context}: {gone} was removed and is back");
        }
    }
    let promised = store.promised(&vm("web"));
    assert!(
        (said.promised..=said.promise_asked).contains(&promised),
        "{context}: promised {promised}"
    );
    // And it works on.
    let next = name("web/9/1");
    put(&store, &next, &other_checkpoint(&next)).unwrap();
    store.promise(&vm("web"), Generation(9)).unwrap();
}

/// On a file system in memory where there is one: the syncs are the fault's to watch, not the disk's to make.
pub(super) fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

pub(super) fn oracle(segments: &Segments) -> BTreeMap<SegmentName, Bytes> {
    let dir = tempdir();
    let store = FsStore::open(dir.path(), None, Durability::Spool).unwrap();
    let next = name("web/2/1");
    let all = segments
        .iter()
        .cloned()
        .chain([(next.clone(), other_checkpoint(&next))]);
    all.map(|(name, bytes)| {
        put(&store, &name, &bytes).unwrap();
        let content = load(&store, &name);
        (name, content)
    })
    .collect()
}

fn crash_everywhere(disk: &Disk, end: End, script: Script, links: u64) {
    let segments = chain("web", links);
    let oracle = oracle(&segments);
    let mut step = 0;
    loop {
        let dir = tempdir();
        let (data, side) = (dir.path().join("data"), dir.path().join("side"));
        fs::create_dir_all(&side).unwrap();
        fs::create_dir_all(&data).unwrap();
        let crash = CrashAt::new(step, &side);
        let mut said = Said::default();
        let opened = FsStore::open_on(&data, None, disk.clone().with_fault(crash.clone()));
        let lived = opened.and_then(|store| script(&store, &segments, &mut said));
        match end {
            End::Crash => {}
            End::PowerCut => crash.power_cut(false),
            End::PowerCutAfterRemovals => crash.power_cut(true),
        }
        check(&data, &said, &oracle, end, &format!("step {step}, {end:?}"));
        if lived.is_ok() {
            assert!(
                step > 50 && crash.steps() == step,
                "the script has only {step} steps"
            );
            return;
        }
        step += 1;
    }
}

#[test]
fn a_power_cut_at_every_step_loses_nothing_acknowledged() {
    crash_everywhere(&Disk::durable(), End::PowerCut, live, 5);
    crash_everywhere(&Disk::durable(), End::PowerCutAfterRemovals, live, 5);
}

#[test]
fn a_crash_at_every_step_loses_nothing_acknowledged() {
    crash_everywhere(&Disk::durable(), End::Crash, live, 5);
    // A spool does not wait for the disk, and survives its process all the same.
    crash_everywhere(&Disk::unsynced(), End::Crash, live, 5);
}

#[test]
fn a_power_cut_at_every_step_of_folding_and_collecting_loses_no_point_that_is_kept() {
    crash_everywhere(&Disk::durable(), End::PowerCut, live_and_collect, 9);
    crash_everywhere(&Disk::durable(), End::PowerCutAfterRemovals, live_and_collect, 9);
}

#[test]
fn a_crash_at_every_step_of_folding_and_collecting_loses_no_point_that_is_kept() {
    crash_everywhere(&Disk::durable(), End::Crash, live_and_collect, 9);
    crash_everywhere(&Disk::unsynced(), End::Crash, live_and_collect, 9);
}

/// Says that the disk is full at one step, and goes on as if nothing was.
#[derive(Debug)]
struct FullAt {
    step: usize,
    at: Mutex<usize>,
}

impl Fault for FullAt {
    fn before(&self, step: Step<'_>) -> io::Result<()> {
        let mut at = self.at.lock().unwrap();
        // Removing needs no room.
        let needs_room = !matches!(step, Step::Unlink(_));
        *at += usize::from(needs_room);
        if needs_room && *at == self.step + 1 {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        Ok(())
    }
}

#[test]
fn a_full_disk_at_every_step_is_said_clearly_and_loses_nothing() {
    let segments = chain("web", 3);
    for step in 0.. {
        let dir = tempdir();
        let full = Arc::new(FullAt {
            step,
            at: Mutex::new(0),
        });
        let disk = Disk::durable().with_fault(full.clone());
        let store = match FsStore::open_on(dir.path(), None, disk.clone()) {
            Ok(store) => store,
            Err(e) => {
                assert!(matches!(e, StoreError::DiskFull { .. }), "step {step}: {e}");
                FsStore::open_on(dir.path(), None, disk).unwrap()
            }
        };
        let mut refused = 0;
        for (segment, bytes) in &segments {
            let before = store.all();
            if let Err(e) = put(&store, segment, bytes) {
                refused += 1;
                assert!(matches!(e, StoreError::DiskFull { .. }), "step {step}: {e}");
                assert!(
                    e.to_string().contains("full")
                        && e.to_string().contains(&dir.path().display().to_string())
                );
                assert_eq!(store.all(), before, "step {step}");
                // There is room again: the same segment goes in, also when its name was visible already.
                put(&store, segment, bytes).unwrap();
            }
        }
        let all = store.all();
        let run: Vec<_> = all.iter().map(|entry| entry.name.clone()).collect();
        if let Err(e) = store.merge_into_newest(&run, 1) {
            refused += 1;
            assert!(matches!(e, StoreError::DiskFull { .. }), "step {step}: {e}");
            assert_eq!(store.all(), all);
            store.merge_into_newest(&run, 1).unwrap();
        }
        if let Err(e) = store.promise(&vm("web"), Generation(2)) {
            refused += 1;
            assert!(matches!(e, StoreError::DiskFull { .. }), "step {step}: {e}");
            store.promise(&vm("web"), Generation(2)).unwrap();
        }
        let steps = *full.at.lock().unwrap();
        assert!(refused <= 1);
        let (all, used) = (store.all(), store.used_bytes());
        assert_eq!(
            used,
            all.iter().map(|entry| entry.bytes).sum::<u64>(),
            "step {step}"
        );
        drop(store);
        let again = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
        // After a merge whose last sync failed, the old ones are kept.
        assert_eq!((again.all(), again.used_bytes()), (all, used), "step {step}");
        again.verify(&name("web/1/3")).unwrap();
        if steps <= step {
            assert!(step > 40, "only {step} steps");
            return;
        }
    }
}
