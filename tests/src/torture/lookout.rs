//! Reads what the owners of VMs say of themselves, again and again, at every host they may be on.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use vmm::api::client::Client;

use super::ears::Hearing;
use super::witness::Point;

/// How often an owner is asked.
const EVERY: Duration = Duration::from_millis(20);
/// How long it may take to answer: one that is stopped does not.
const DEADLINE: Duration = Duration::from_millis(150);

/// A place where a VM may run.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) vm: String,
    pub(super) host: String,
    /// The run folder.
    pub(super) run_dir: PathBuf,
}

/// What a process said of itself last.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) at: Instant,
    pub(super) host: String,
    pub(super) generation: u64,
    pub(super) status: Value,
}

impl Seen {
    /// The number of its process, in its host's own counting.
    pub(super) fn pid(&self) -> Option<u32> {
        self.status["pid"].as_u64()?.try_into().ok()
    }

    /// A checkpoint that the status names.
    pub(super) fn point(&self, pointer: &str) -> Option<Point> {
        Point::of(self.status.pointer(pointer)?.as_str()?)
    }

    /// How many holders have all that is taken, or all but this many checkpoints of it.
    pub(super) fn holders_within(&self, lag: u64) -> usize {
        let holders = self.status["protection"]["holders"].as_array();
        let well = |holder: &&Value| {
            holder["state"] == "up-to-date" && holder["lag_epochs"].as_u64().is_some_and(|lags| lags <= lag)
        };
        holders.map_or(0, |holders| holders.iter().filter(well).count())
    }
}

/// By the VM's name and its generation.
pub(super) type Sights = HashMap<(String, u64), Seen>;

/// The thread that reads; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Lookout {
    // The thread writes, the story reads; each for moments.
    sights: Arc<Mutex<Sights>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Lookout {
    /// Looks at all these places; what is said of each VM is also told to its witness.
    pub(super) fn start(
        places: Vec<Place>,
        hearings: HashMap<String, Arc<Mutex<Hearing>>>,
        mut seen: impl FnMut(&Place, &Seen) + Send + 'static,
    ) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime")?;
        let (sights, end) = (Arc::<Mutex<Sights>>::default(), Arc::new(AtomicBool::new(false)));
        let (told, over) = (Arc::clone(&sights), Arc::clone(&end));
        let look = move || {
            while !over.load(Ordering::Relaxed) {
                let began = Instant::now();
                for place in &places {
                    let hearing = hearings.get(&place.vm);
                    if let Some(found) = runtime.block_on(ask(place, hearing)) {
                        seen(place, &found);
                        let mut sights = told.lock().unwrap_or_else(PoisonError::into_inner);
                        sights.insert((place.vm.clone(), found.generation), found);
                    }
                }
                std::thread::sleep(EVERY.saturating_sub(began.elapsed()));
            }
        };
        let thread = std::thread::Builder::new().name("lookout".into()).spawn(look);
        Ok(Self {
            sights,
            end,
            thread: Some(thread.context("start the lookout")?),
        })
    }

    /// What each owner said last.
    pub(super) fn sights(&self) -> MutexGuard<'_, Sights> {
        self.sights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the owner under this generation said last.
    pub(super) fn of(&self, vm: &str, generation: u64) -> Option<Seen> {
        self.sights().get(&(vm.to_owned(), generation)).cloned()
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by itself.
            let _ = thread.join();
        }
    }
}

/// Where the control socket of a VM is.
pub(super) fn socket(run_dir: &Path, vm: &str) -> PathBuf {
    run_dir.join(vm).join("api.sock")
}

async fn ask(place: &Place, hearing: Option<&Arc<Mutex<Hearing>>>) -> Option<Seen> {
    let hear = || hearing.map(|hearing| hearing.lock().unwrap_or_else(PoisonError::into_inner));
    // Before it is asked: what it has taken after its answer was taken after this was said.
    let said = hear().and_then(|hearing| {
        let generation = hearing.witness.highest()?.generation;
        Some((generation, hearing.witness.last_beat(generation)?))
    });
    let client = Client::new(socket(&place.run_dir, &place.vm)).with_deadline(DEADLINE);
    let status: Value = client.get("/status").await.ok()?;
    let seen = Seen {
        at: Instant::now(),
        host: place.host.clone(),
        generation: status["generation"].as_u64()?,
        status,
    };
    if let Some(mut hearing) = hear() {
        if let Some(from) = seen.point("/restored_from") {
            let went_on = hearing.witness.went_on(seen.generation, from);
            hearing.note(went_on);
        }
        if let Some(committed) = seen.point("/committed") {
            let known = hearing.witness.committed(committed);
            hearing.note(known);
        }
        if let (Some(newest), Some((generation, beat))) = (seen.point("/newest/name"), said)
            && newest.generation == generation
        {
            hearing.witness.taken(newest, beat);
        }
    }
    Some(seen)
}
