//! Work on every processor: registers that stay as they were, timers that come, time that goes forward.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::registers::Registers;
use crate::work::{Keys, Worker};

/// Steps of one stretch of the register check: some milliseconds on a real processor.
const LOOPS: u64 = 50_000;
const TIMER: Duration = Duration::from_millis(10);
/// Processors a mask has room for; the program needs no more.
const MOST: usize = 64;

unsafe extern "C" {
    fn sched_setaffinity(process: i32, size: usize, mask: *const u64) -> i32;
}

/// Runs `work` in a thread on each processor.
fn on_each(work: impl Fn(usize) + Clone + Send + 'static) {
    let count = thread::available_parallelism().map_or(1, usize::from).min(MOST);
    for processor in 0..count {
        let work = work.clone();
        thread::spawn(move || {
            let mask = 1_u64 << processor;
            // SAFETY: the mask outlives the call, and its size is given. 0 means this thread.
            if unsafe { sched_setaffinity(0, size_of_val(&mask), &raw const mask) } != 0 {
                let error = std::io::Error::last_os_error();
                crate::work::bad(
                    "processors",
                    format_args!("cannot run on processor {processor}: {error}"),
                );
            }
            work(processor);
        });
    }
}

pub fn registers(keys: &Keys) {
    let avx = std::arch::is_x86_feature_detected!("avx");
    let seed = keys.seed;
    on_each(move |processor| {
        let worker = Worker::begin(format!("registers-{processor}"), &["stretches", "avx"]);
        worker.set(1, avx.into());
        for turn in 0.. {
            let before = Registers::new(seed ^ turn ^ (processor as u64) << 48);
            let wanted = before.after(avx, 2 * LOOPS);
            let mut found = before;
            // No idle: its port belongs to the bare-metal guests.
            found.run(avx, LOOPS, 0);
            found.differences(&wanted, |name| {
                worker.bad(format_args!("turn {turn}: {name} is wrong"))
            });
            worker.add(0, 1);
            // Room for the others on this processor.
            thread::yield_now();
        }
    });
}

pub fn timers(keys: &Keys) {
    // The latest time any processor has seen, in nanoseconds since `base`.
    static LATEST: AtomicU64 = AtomicU64::new(0);
    let base = Instant::now();
    let late_limit = Duration::from_millis(keys.late_ms);
    on_each(move |processor| {
        let worker = Worker::begin(format!("timers-{processor}"), &["expiries", "latest_us"]);
        loop {
            let asleep = Instant::now();
            thread::sleep(TIMER);
            // Read before the clock: what was seen then cannot be later than what the clock says now.
            let seen = LATEST.load(Ordering::SeqCst);
            let now = Instant::now();
            let Some(slept) = now.checked_duration_since(asleep) else {
                worker.bad(format_args!(
                    "time went back on processor {processor} during a sleep"
                ));
                continue;
            };
            let since = now
                .checked_duration_since(base)
                .map_or(0, |since| since.as_nanos() as u64);
            if since < seen {
                let back = seen - since;
                worker.bad(format_args!(
                    "time on processor {processor} is {back} ns behind another's"
                ));
            }
            LATEST.fetch_max(since, Ordering::SeqCst);
            if slept < TIMER {
                worker.bad(format_args!("a timer of {TIMER:?} came after {slept:?}"));
            }
            let late = slept.saturating_sub(TIMER);
            if late > late_limit {
                worker.bad(format_args!("a timer came {} ms late", late.as_millis()));
            }
            worker.most(1, late.as_micros() as u64);
            worker.add(0, 1);
        }
    });
}
