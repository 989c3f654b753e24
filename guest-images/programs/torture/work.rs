//! What the workers share: keys, heartbeats, findings, and the watch that notices a worker that is stuck.

use std::fmt::{Arguments, Write as _};
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::kernel::{clock_ms, clocksource};

/// Findings so far.
static BAD: AtomicU64 = AtomicU64::new(0);
/// All workers, in the order in which they began. Locked for a moment a heartbeat.
static WORKERS: Mutex<Vec<Arc<Worker>>> = Mutex::new(Vec::new());

/// The command line's keys, with their defaults.
#[derive(Clone, Default)]
pub struct Keys {
    pub seconds: Option<u64>,
    pub beat_ms: u64,
    pub stuck_s: u64,
    pub file: Option<String>,
    pub records: u64,
    pub mib: u64,
    pub late_ms: u64,
    pub peer: Option<String>,
    pub ping: Option<String>,
    pub time: Option<String>,
    pub time_ms: u64,
    pub listen: Option<String>,
    pub seed: u64,
}

impl Keys {
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut keys = Self {
            beat_ms: 1000,
            stuck_s: 60,
            records: 4096,
            mib: 32,
            late_ms: 10_000,
            time_ms: 50,
            seed: 1,
            ..Self::default()
        };
        for word in words {
            let (key, value) = word
                .split_once('=')
                .ok_or_else(|| format!("{word} is not key=value"))?;
            let number = || match value.parse() {
                Ok(number @ 1..) => Ok(number),
                _ => Err(format!("{word}: not a number from 1")),
            };
            match key {
                "seconds" => keys.seconds = Some(number()?),
                "beat_ms" => keys.beat_ms = number()?,
                "stuck_s" => keys.stuck_s = number()?,
                "file" => keys.file = Some(value.into()),
                "records" => keys.records = number()?,
                "mib" => keys.mib = number()?,
                "late_ms" => keys.late_ms = number()?,
                "peer" => keys.peer = Some(value.into()),
                "ping" => keys.ping = Some(value.into()),
                "time" => keys.time = Some(value.into()),
                "time_ms" => keys.time_ms = number()?,
                "listen" => keys.listen = Some(value.into()),
                "seed" => keys.seed = number()?,
                _ => return Err(format!("{word}: no such key")),
            }
        }
        Ok(keys)
    }
}

/// One worker's running totals. The first is what shows that it is not stuck.
pub struct Worker {
    name: String,
    totals: Vec<(&'static str, AtomicU64)>,
    ended: AtomicBool,
}

impl Worker {
    pub fn begin(name: impl Into<String>, totals: &[&'static str]) -> Arc<Self> {
        let worker = Arc::new(Self {
            name: name.into(),
            totals: totals.iter().map(|name| (*name, AtomicU64::new(0))).collect(),
            ended: AtomicBool::new(false),
        });
        WORKERS
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&worker));
        worker
    }

    pub fn add(&self, at: usize, count: u64) {
        self.totals[at].1.fetch_add(count, Ordering::Relaxed);
    }

    pub fn set(&self, at: usize, value: u64) {
        self.totals[at].1.store(value, Ordering::Relaxed);
    }

    /// Keeps the largest value.
    pub fn most(&self, at: usize, value: u64) {
        self.totals[at].1.fetch_max(value, Ordering::Relaxed);
    }

    /// A finding of this worker.
    pub fn bad(&self, what: Arguments<'_>) {
        bad(&self.name, what);
    }

    /// Its work is over, in order: nobody watches it any more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    fn first(&self) -> u64 {
        self.totals[0].1.load(Ordering::Relaxed)
    }

    fn line(&self, beat: u64) -> String {
        let mut line = format!("torture {} beat={beat}", self.name);
        for (name, total) in &self.totals {
            // A String takes everything.
            let _ = write!(line, " {name}={}", total.load(Ordering::Relaxed));
        }
        line
    }
}

/// A line on the console, whole. A console that is gone does not stop the work.
pub fn say(line: Arguments<'_>) {
    let _ = std::io::stdout().lock().write_all(format!("{line}\n").as_bytes());
}

/// A finding.
pub fn bad(who: &str, what: Arguments<'_>) {
    BAD.fetch_add(1, Ordering::Relaxed);
    say(format_args!("BAD {who} {what}"));
}

/// Says heartbeats and watches the workers until the time is up; the findings.
pub fn watch(keys: &Keys) -> u64 {
    let began = Instant::now();
    let mut seen: Vec<(u64, Instant)> = Vec::new();
    for beat in 0.. {
        thread::sleep(Duration::from_millis(keys.beat_ms));
        let workers = WORKERS.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (at, worker) in workers.iter().enumerate() {
            let now = Instant::now();
            match seen.get_mut(at) {
                None => seen.push((worker.first(), now)),
                Some((count, since)) if *count == worker.first() => {
                    let watched = !worker.ended.load(Ordering::Relaxed);
                    if watched && now.duration_since(*since).as_secs() >= keys.stuck_s {
                        worker.bad(format_args!(
                            "stuck for {} s: {}",
                            keys.stuck_s,
                            worker.line(beat)
                        ));
                        *since = now;
                    }
                }
                Some(last) => *last = (worker.first(), now),
            }
        }
        let (wall, mono) = clock_ms();
        let source = clocksource();
        let bad = BAD.load(Ordering::Relaxed);
        say(format_args!(
            "torture clock beat={beat} wall_ms={wall} mono_ms={mono} source={source} bad={bad}"
        ));
        for worker in workers {
            say(format_args!("{}", worker.line(beat)));
        }
        if keys
            .seconds
            .is_some_and(|seconds| began.elapsed().as_secs() >= seconds)
        {
            break;
        }
    }
    BAD.load(Ordering::Relaxed)
}
