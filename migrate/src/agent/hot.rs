//! Hot standby: an image of each VM that is asked for, kept at the newest checkpoint that is whole here.
//!
//! ```text
//! a segment is stored (and acknowledged) --note--> one thread of low priority: build, or advance link by link
//! a takeover from E:  the image is at E, or can be brought to it --> the guest runs on it
//!                     anything else                              --> the chain of E is loaded
//! ```
//!
//! An image follows what is *stored*, committed or not: what a takeover goes on from is decided as if there were no
//! image, and an image that is not at exactly that checkpoint, by name and id, is not used. So an epoch that was never
//! committed, or of a branch that a later generation left behind, costs the time to make the image anew, and nothing else.
//!
//! Invariants: images take no more memory and disk than they were given, and give way to guests when the host runs short; a
//! takeover never waits for an image to be made (it breaks that off), nor for one that is far behind; a VM that runs on this
//! host because of this agent has none.
//!
//! What it never does: it acknowledges nothing and holds no acknowledgement up, and it keeps nothing across a restart.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use segment::{SegmentName, VmId};

use super::{Inner, blocking, spawn, view};
use crate::image::{Image, ImageError, ImageSize, TakenImage};
use crate::mutex::lock;
use crate::registry::Role;
use crate::store::{Entry, FsStore};
use crate::transport::in_full;
use crate::wire::Held;

/// How often it is looked for VMs that came or went without a segment being shipped here.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long until an image is tried again that could not be made.
const AGAIN: Duration = Duration::from_secs(30);
/// The niceness of the thread.
const NICE: i32 = 10;
/// Where the disks' files are, in the data folder.
const FOLDER: &str = "hot";
/// What images may take of the host's memory when nothing was said: a half.
const SHARE_OF_MEMORY: u64 = 2;
/// What their disks may take of the free room of the data folder's file system when nothing was said: a half.
const SHARE_OF_DISK: u64 = 2;

/// The part of the host's memory that images leave to others: they are made only while an eighth stays free.
const LEFT_FREE: u64 = 8;
/// Below a sixteenth images are given up.
const GIVEN_UP_BELOW: u64 = 16;
/// For how long no image is made after some were given up for a takeover.
const ROOM_KEPT: Duration = Duration::from_secs(60);
/// How far behind an image may be that a takeover brings forward: so many bytes always, and else a quarter of its chain.
const BEHIND_BYTES: u64 = 32 << 20;
const BEHIND_SHARE: u64 = 4;

/// Names of VMs, with `*` for any characters; `all` is `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPattern(String);

impl FromStr for VmPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let pattern = if text == "all" { "*" } else { text };
        // What a name may have, and the star.
        match VmId::new(&pattern.replace('*', "a")) {
            Ok(_) => Ok(Self(pattern.to_owned())),
            Err(error) => Err(format!("{text:?} names no VMs (web, web-*, all): {error}")),
        }
    }
}

impl VmPattern {
    fn matches(&self, vm: &VmId) -> bool {
        let mut rest = vm.as_str();
        let mut parts = self.0.split('*').peekable();
        let Some(first) = parts.next() else { return false };
        let Some(after) = rest.strip_prefix(first) else {
            return false;
        };
        if parts.peek().is_none() {
            return after.is_empty();
        }
        rest = after;
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                return rest.ends_with(part);
            }
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        true
    }
}

/// Which VMs have images, and what these may take.
#[derive(Debug, Clone, Default)]
pub struct HotStandby {
    /// Of which VMs; none: of none. What an earlier one names comes first.
    pub vms: Vec<VmPattern>,
    /// The most memory, in bytes; half of the host's when absent.
    pub memory: Option<u64>,
    /// The most disk, in bytes; half of what is free at the start when absent.
    pub disk: Option<u64>,
}

/// What is told of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Told {
    Making,
    At(SegmentName),
    Cold(String),
}

/// One VM's place.
#[derive(Debug)]
struct Slot {
    size: ImageSize,
    /// Held while it is made or brought forward.
    image: Mutex<Option<Image>>,
    /// A takeover wants it: whatever is being done to it ends at the next frame or link.
    wanted: AtomicBool,
    told: Mutex<Told>,
    /// Not before that is it made again.
    not_before: Mutex<Option<Instant>>,
}

impl Slot {
    fn new(size: ImageSize) -> Arc<Self> {
        Arc::new(Self {
            size,
            image: Mutex::default(),
            wanted: AtomicBool::new(false),
            told: Mutex::new(Told::Making),
            not_before: Mutex::default(),
        })
    }

    fn tell(&self, told: Told) {
        *lock(&self.told) = told;
    }
}

/// The images of this agent.
#[derive(Debug)]
pub(super) struct Hot {
    vms: Vec<VmPattern>,
    limit: ImageSize,
    folder: PathBuf,
    next: AtomicU64,
    /// VMs that something came of. Shared by whoever stores; held for moments.
    noted: Mutex<BTreeSet<VmId>>,
    wake: Condvar,
    /// Shared with takeovers and the status; held for moments.
    slots: Mutex<BTreeMap<VmId, Arc<Slot>>>,
    /// Why VMs that are to have an image have no slot. Shared likewise.
    cold: Mutex<BTreeMap<VmId, String>>,
    /// The VMs that run here because of this agent, and their processes. Shared likewise.
    running: Mutex<HashMap<VmId, u32>>,
    /// Until then none is made. Shared likewise.
    room_kept: Mutex<Option<Instant>>,
    stopped: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Hot {
    /// Nothing in it. What an earlier agent left of its disks' files goes.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn open(config: HotStandby, data: &Path) -> std::io::Result<Self> {
        let folder = data.join(FOLDER);
        match std::fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            Ok(()) | Err(_) => {}
        }
        let limit = ImageSize {
            memory: config.memory.unwrap_or_else(|| host_memory() / SHARE_OF_MEMORY),
            disks: config.disk.unwrap_or_else(|| free(data) / SHARE_OF_DISK),
        };
        Ok(Self {
            vms: config.vms,
            limit,
            folder,
            next: AtomicU64::new(0),
            noted: Mutex::default(),
            wake: Condvar::new(),
            slots: Mutex::default(),
            cold: Mutex::default(),
            running: Mutex::default(),
            room_kept: Mutex::default(),
            stopped: AtomicBool::new(false),
            thread: Mutex::default(),
        })
    }

    fn order(&self, vm: &VmId) -> Option<usize> {
        self.vms.iter().position(|pattern| pattern.matches(vm))
    }

    /// A checkpoint of `vm` was stored here: at once, and without a look at it.
    pub(super) fn stored(&self, vm: &VmId) {
        if self.order(vm).is_some() {
            lock(&self.noted).insert(vm.clone());
            self.wake.notify_one();
        }
    }

    /// `vm` runs here now, as this process.
    pub(super) fn runs(&self, vm: &VmId, pid: u32) {
        lock(&self.running).insert(vm.clone(), pid);
    }

    /// Whether `vm` runs here because of this agent.
    pub(super) fn runs_here(&self, vm: &VmId) -> bool {
        lock(&self.running).contains_key(vm)
    }

    /// That process has ended.
    pub(super) fn ended(&self, vm: &VmId, pid: u32) {
        let mut running = lock(&self.running);
        if running.get(vm) == Some(&pid) {
            running.remove(vm);
        }
    }

    /// Ends the thread, and whatever it does.
    pub(super) fn stop(&self) {
        // Under the lock: the thread is either before its look at it, or waits.
        let noted = lock(&self.noted);
        self.stopped.store(true, Ordering::Relaxed);
        self.wake.notify_one();
        drop(noted);
    }

    /// Waits for the thread's end, after [`Self::stop`].
    pub(super) fn join(&self) {
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps images panicked");
        }
    }

    /// Where the image of `vm` is, or why it has none that could be used; neither when none is wanted.
    pub(super) fn standing(&self, vm: &VmId) -> (Option<SegmentName>, Option<String>) {
        if self.order(vm).is_none() {
            return (None, None);
        }
        let slot = lock(&self.slots).get(vm).cloned();
        match slot.map(|slot| lock(&slot.told).clone()) {
            Some(Told::At(name)) => (Some(name), None),
            Some(Told::Making) => (None, Some("its image is being made".into())),
            Some(Told::Cold(why)) => (None, Some(why)),
            None => {
                let why = lock(&self.cold).get(vm).cloned();
                (
                    None,
                    Some(why.unwrap_or_else(|| "it was not looked at yet".into())),
                )
            }
        }
    }

    /// Whether `vm` could be taken over from an image, as far as is known.
    pub(super) fn is_hot(&self, vm: &VmId) -> bool {
        self.standing(vm).0.is_some()
    }

    /// The image of `vm` at `tip`; it is gone from here then. From a thread that may wait: for a link to be applied.
    ///
    /// # Errors
    /// Why there is none, in words.
    fn take(&self, store: &Arc<FsStore>, vm: &VmId, tip: &Held) -> Result<TakenImage, String> {
        let slot = lock(&self.slots).get(vm).cloned();
        let Some(slot) = slot else {
            return Err(self.standing(vm).1.unwrap_or_default());
        };
        slot.wanted.store(true, Ordering::Relaxed);
        let image = lock(&slot.image).take();
        let told = lock(&slot.told).clone();
        // Whatever comes of it: it is of no more use here.
        lock(&self.slots).remove(vm);
        let Some(mut image) = image else {
            return Err(match told {
                Told::Cold(why) => why,
                Told::Making | Told::At(_) => "its image was being made".into(),
            });
        };
        if let Some(behind) = image.at().and_then(|at| far_behind(store, at, tip)) {
            return Err(format!("its image is {} behind", view::size(behind)));
        }
        if let Err(error) = image.advance(store, tip, &|| true) {
            return Err(in_full(&error));
        }
        image.take(tip).map_err(|image| match image.at() {
            Some(at) => format!("its image is at {}", at.name),
            None => "its image is of no use".to_owned(),
        })
    }

    /// Gives up all images but that of `vm`, for a takeover that needs their memory; whether there were any. From a thread
    /// that may wait: for a frame or a link to be applied.
    pub(super) fn make_room(&self, vm: &VmId) -> bool {
        *lock(&self.room_kept) = Some(Instant::now() + ROOM_KEPT);
        let others: Vec<_> = {
            let mut slots = lock(&self.slots);
            let others = slots.iter().filter(|(of, _)| *of != vm);
            let others: Vec<_> = others.map(|(of, slot)| (of.clone(), slot.clone())).collect();
            others.iter().for_each(|(of, _)| drop(slots.remove(of)));
            others
        };
        for (of, slot) in &others {
            slot.wanted.store(true, Ordering::Relaxed);
            *lock(&slot.image) = None;
            tracing::warn!(vm = %of, "its image was given up for the takeover of VM {vm}");
        }
        !others.is_empty()
    }

    /// While the host runs short of memory gives up the image that was asked for last: guests go before.
    fn give_way(&self) {
        if available_memory().is_none_or(|free| free >= host_memory() / GIVEN_UP_BELOW) {
            return;
        }
        let mut slots = lock(&self.slots);
        if let Some(vm) = slots.keys().max_by_key(|vm| self.order(vm)).cloned() {
            slots.remove(&vm);
            tracing::warn!(%vm, "its image was given up: this host runs short of memory");
        }
    }

    /// How many VMs are to have an image here, how many of these can be taken over on it, and what all take at most.
    pub(super) fn images(&self) -> (usize, usize, ImageSize) {
        let slots: Vec<_> = lock(&self.slots).values().cloned().collect();
        let made = slots
            .iter()
            .filter(|slot| matches!(*lock(&slot.told), Told::At(_)));
        let (made, cold) = (made.count(), lock(&self.cold).len());
        (slots.len() + cold, made, self.taken())
    }

    /// What all images here take at most.
    fn taken(&self) -> ImageSize {
        lock(&self.slots)
            .values()
            .fold(ImageSize::default(), |sum, slot| ImageSize {
                memory: sum.memory.saturating_add(slot.size.memory),
                disks: sum.disks.saturating_add(slot.size.disks),
            })
    }

    /// Whether an image of this size has room beside the others; else why not.
    fn fits(&self, size: ImageSize) -> Result<(), String> {
        let taken = self.taken();
        let of = |what: &str, size: u64, taken: u64, limit: u64, option: &str| {
            if taken.saturating_add(size) <= limit {
                return Ok(());
            }
            let (size, taken, limit) = (view::size(size), view::size(taken), view::size(limit));
            Err(format!(
                "its {what} of {size} does not fit: {taken} of {limit} are taken by other images (`standby serve {option}`)"
            ))
        };
        of(
            "memory",
            size.memory,
            taken.memory,
            self.limit.memory,
            "--hot-memory",
        )?;
        of("disk", size.disks, taken.disks, self.limit.disks, "--hot-disk")?;
        if lock(&self.room_kept).is_some_and(|until| Instant::now() < until) {
            return Err("its image was given up for a takeover, and is made again in a while".into());
        }
        let (free, left) = (available_memory(), host_memory() / LEFT_FREE);
        match free {
            Some(free) if size.memory.saturating_add(left) > free => Err(format!(
                "its memory of {} does not fit: {} of this host's are free, and {} are left to guests",
                view::size(size.memory),
                view::size(free),
                view::size(left)
            )),
            Some(_) | None => Ok(()),
        }
    }
}

/// The image of `vm` at `tip`, for a takeover; `None` when none is wanted of it, and else why there is none.
pub(super) async fn take(inner: &Arc<Inner>, vm: &VmId, tip: Held) -> Option<Result<TakenImage, String>> {
    inner.hot.order(vm)?;
    let (agent, vm) = (inner.clone(), vm.clone());
    Some(blocking(move || agent.hot.take(&agent.store, &vm, &tip)).await)
}

/// Starts the thread, when there is something for it to do.
///
/// # Errors
/// What the system says.
pub(super) fn start(inner: &Arc<Inner>) -> std::io::Result<()> {
    if inner.hot.vms.is_empty() {
        return Ok(());
    }
    if !inner.roles.contains(&Role::Execute) {
        tracing::warn!("this node only stores: it keeps no images (--hot)");
        return Ok(());
    }
    let agent = inner.clone();
    let thread = std::thread::Builder::new().name("hot".into());
    let thread = thread.spawn(move || {
        // Linux gives each thread its own niceness. Without the right to, it is done at the usual one.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!(%error, "images are kept without being niced");
        }
        follow(&agent);
        // They hold the store.
        lock(&agent.hot.slots).clear();
    })?;
    *lock(&inner.hot.thread) = Some(thread);
    Ok(())
}

fn follow(inner: &Arc<Inner>) {
    let hot = &inner.hot;
    let mut looked: Option<Instant> = None;
    while !hot.stopped.load(Ordering::Relaxed) {
        let due = looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY);
        let vms: BTreeSet<VmId> = if due {
            looked = Some(Instant::now());
            hot.give_way();
            lock(&hot.noted).clear();
            let known: Vec<VmId> = lock(&hot.slots).keys().cloned().collect();
            let cold: Vec<VmId> = lock(&hot.cold).keys().cloned().collect();
            inner.store.vms().into_iter().chain(known).chain(cold).collect()
        } else {
            let noted = lock(&hot.noted);
            let wait = |noted: &mut BTreeSet<VmId>| noted.is_empty() && !hot.stopped.load(Ordering::Relaxed);
            let waited = hot.wake.wait_timeout_while(noted, LOOK_EVERY, wait);
            std::mem::take(&mut *waited.unwrap_or_else(PoisonError::into_inner).0)
        };
        let mut ordered: Vec<(usize, VmId)> = vms
            .into_iter()
            .filter_map(|vm| Some((hot.order(&vm)?, vm)))
            .collect();
        ordered.sort();
        for (_, vm) in ordered {
            if hot.stopped.load(Ordering::Relaxed) {
                return;
            }
            look(inner, &vm);
        }
    }
}

/// Makes the image of `vm` what it should be.
fn look(inner: &Arc<Inner>, vm: &VmId) {
    let hot = &inner.hot;
    if inner.promotes.is_under_way(vm) {
        return;
    }
    match wanted(inner, vm) {
        Ok((slot, newest)) => {
            lock(&hot.cold).remove(vm);
            bring(inner, vm, &slot, &newest);
        }
        Err(why) => {
            lock(&hot.slots).remove(vm);
            match why {
                Some(why) => lock(&hot.cold).insert(vm.clone(), why),
                None => lock(&hot.cold).remove(vm),
            };
        }
    }
}

/// The place of `vm`, and what its image should be at.
///
/// # Errors
/// Why it has none; without words when it is not held here any more.
fn wanted(inner: &Arc<Inner>, vm: &VmId) -> Result<(Arc<Slot>, Entry), Option<String>> {
    let hot = &inner.hot;
    if hot.runs_here(vm) {
        return Err(Some("it runs here".into()));
    }
    let Some(newest) = inner.store.newest_complete(vm) else {
        let some = !inner.store.entries(vm).is_empty();
        return Err(some.then(|| "no checkpoint of it is whole here".into()));
    };
    if let Some(slot) = lock(&hot.slots).get(vm) {
        return Ok((slot.clone(), newest));
    }
    // It may have been started by this agent's predecessor.
    if spawn::runs_in_a_spool(inner, vm) {
        return Err(Some("it runs here".into()));
    }
    let size = match inner.store.open_segment(&newest.name) {
        Ok(reader) => ImageSize::of(&reader.manifest().spaces),
        Err(error) => return Err(Some(in_full(&error))),
    };
    hot.fits(size).map_err(Some)?;
    let slot = Slot::new(size);
    lock(&hot.slots).insert(vm.clone(), slot.clone());
    Ok((slot, newest))
}

/// Brings the image to `newest`, or makes it there.
fn bring(inner: &Arc<Inner>, vm: &VmId, slot: &Slot, newest: &Entry) {
    let hot = &inner.hot;
    let go_on = || !slot.wanted.load(Ordering::Relaxed) && !hot.stopped.load(Ordering::Relaxed);
    let mut place = lock(&slot.image);
    if !go_on() {
        return;
    }
    let tip = Held {
        name: newest.name.clone(),
        checkpoint: newest.checkpoint,
    };
    if let Some(image) = place.as_mut() {
        let result = image.advance(&inner.store, &tip, &go_on);
        match (result, image.at()) {
            (Ok(_) | Err(ImageError::BrokenOff), Some(at)) => {
                slot.tell(Told::At(at.name.clone()));
                return;
            }
            (Err(error), _) => {
                let why = in_full(&error);
                tracing::info!(%vm, tip = %tip.name, why, "the image is made anew");
            }
            (Ok(_), None) => {}
        }
        // Before the next is made: both would take twice the room.
        *place = None;
    }
    if lock(&slot.not_before).is_some_and(|at| Instant::now() < at) {
        return;
    }
    let spaces = inner.store.open_segment(&tip.name);
    if spaces.is_ok_and(|reader| ImageSize::of(&reader.manifest().spaces) != slot.size) {
        // Another machine under the same name: it is looked for room anew.
        lock(&hot.slots).remove(vm);
        hot.stored(vm);
        return;
    }
    slot.tell(Told::Making);
    let started = Instant::now();
    let stem = format!("{vm}-{}", hot.next.fetch_add(1, Ordering::Relaxed));
    match Image::build(&inner.store, &tip.name, (&hot.folder, &stem), &go_on) {
        Ok((image, stats)) => {
            // It may have become the newest's only in this moment; the next look goes on from here.
            if let Some(at) = image.at() {
                let ms = started.elapsed().as_millis() as u64;
                tracing::info!(%vm, at = %at.name, ms, bytes = stats.bytes_written, "the image is made");
                slot.tell(Told::At(at.name.clone()));
            }
            *lock(&slot.not_before) = None;
            *place = Some(image);
        }
        Err(ImageError::BrokenOff) => {}
        Err(_) if !go_on() => {}
        Err(error) => {
            let why = in_full(&error);
            tracing::warn!(%vm, tip = %tip.name, why, "no image could be made");
            slot.tell(Told::Cold(format!("its image could not be made: {why}")));
            *lock(&slot.not_before) = Some(Instant::now() + AGAIN);
        }
    }
}

/// How many bytes an image at `at` lacks, when reading all of the chain of `tip` is quicker than bringing it forward.
fn far_behind(store: &FsStore, at: &Held, tip: &Held) -> Option<u64> {
    let chain = store.chain(&tip.name).ok()?;
    let bytes = |links: &[Entry]| links.iter().map(|link| link.bytes).sum::<u64>();
    let here = chain.iter().position(|link| link.name == at.name)?;
    let behind = bytes(&chain[here + 1..]);
    (behind > BEHIND_BYTES && behind > bytes(&chain) / BEHIND_SHARE).then_some(behind)
}

/// What the kernel says can be had without swapping, in bytes.
pub(super) fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    u64::from(info.mem_unit).saturating_mul(info.totalram)
}

fn free(path: &Path) -> u64 {
    rustix::fs::statvfs(path).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_name_vms() {
        let vm = |name: &str| VmId::new(name).unwrap();
        for (pattern, name, expected) in [
            ("web", "web", true),
            ("web", "web-1", false),
            ("web-*", "web-1", true),
            ("web-*", "web", false),
            ("*-db", "big-db", true),
            ("*-db", "big-db-2", false),
            ("a*b*c", "a-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("*", "any", true),
            ("all", "any", true),
        ] {
            let pattern: VmPattern = pattern.parse().unwrap();
            assert_eq!(pattern.matches(&vm(name)), expected, "{pattern:?} of {name}");
        }
        assert!("a/b".parse::<VmPattern>().is_err());
        assert!("".parse::<VmPattern>().is_err());
    }
}
