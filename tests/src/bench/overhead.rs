//! What checkpoints cost the guest: work of a guest that is always busy, with and without them.
//!
//! The guest is `churn` without a pace, told to verify so many pages for each it writes that it comes to about 1,000
//! writes a second. Its work is the pages it verifies, counted and timed by itself; its clock runs on while it is
//! stopped. Lost are the stops, the first write to each page after a checkpoint (a fault in the host, which no monitor
//! can avoid as long as KVM tracks writes by protecting pages), and what the encoding takes of caches and cores.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use migrate::checkpoint::CaptureKind;

use super::guest::{Guest, Taker};
use super::lab::Lab;
use super::row::Row;
use super::stats::Samples;

const NAME: &str = "capture.overhead";
/// Page writes a second that the guest comes to.
const WRITES: f64 = 1_000.0;
/// Pages verified for each written, to begin with.
const FIRST_GUESS: u64 = 500;
/// The most that `churn` takes for `verify=`.
const MAX_VERIFY: f64 = 1e6;
/// Memory the busy guest works on.
const WORK_MIB: u64 = 64;
const MEMORY_MIB: u64 = 128;
/// Epochs a second, and the most percent of work that may be lost to them.
const TARGETS: [(u32, f64); 2] = [(10, 2.0), (40, 8.0)];
/// After a change of pace, before work is counted.
const SETTLE: Duration = Duration::from_millis(300);

/// The command line of a guest that is always busy and writes about [`WRITES`] pages a second, its memory in MiB.
pub(crate) fn busy_guest(lab: &Lab) -> Result<(String, u64)> {
    let with = |verify: u64| format!("mib={WORK_MIB} rate=0 verify={verify} heartbeat_ms=100");
    let mut guest = Guest::filled(lab, &with(FIRST_GUESS), MEMORY_MIB)?;
    let (first, last) = guest.console.stretch(lab.stretch())?;
    let verify = FIRST_GUESS as f64 * last.writes_since(&first) / WRITES;
    Ok((with(verify.clamp(1.0, MAX_VERIFY) as u64), MEMORY_MIB))
}

pub(crate) fn measure(lab: &Lab) -> Result<Vec<Row>> {
    let first_write_us = first_write_us(lab)?;
    let (command_line, memory_mib) = busy_guest(lab)?;
    let mut guest = Guest::filled(lab, &command_line, memory_mib)?;
    let mut taker = Taker::new(lab, &guest)?;
    taker.take(true)?;
    TARGETS
        .map(|(epochs, target)| at(lab, &mut guest, &mut taker, epochs, target, first_write_us))
        .into_iter()
        .collect()
}

fn at(
    lab: &Lab,
    guest: &mut Guest,
    taker: &mut Taker,
    epochs: u32,
    target: f64,
    first_write_us: f64,
) -> Result<Row> {
    let mut series = Series::default();
    // Between two stretches without checkpoints each, as the machine's speed drifts.
    let mut before = undisturbed(lab, guest)?;
    for _ in 0..lab.samples(5, 2) {
        let with = series.stretch(lab, guest, taker, epochs)?;
        let after = undisturbed(lab, guest)?;
        series.lost.push(100.0 * (1.0 - with / ((before + after) / 2.0)));
        before = after;
    }
    let dirty = series.pages / series.time.as_secs_f64();
    let row = Row::new(NAME, "% of work lost", &series.lost)?
        .limit(
            dirty * first_write_us / 1e4,
            "the first write to each dirty page alone",
        )
        .at_most(target)
        .param("epochs_per_s", epochs)
        .param("work_mib", WORK_MIB)
        .seen("dirty_pages_per_s", dirty)
        .seen("first_write_us", first_write_us)
        .seen(
            "stopped_percent",
            100.0 * series.stopped.as_secs_f64() / series.time.as_secs_f64(),
        )
        .seen("verified_per_s", before);
    Ok(row)
}

/// What the stretches with checkpoints of one pace gave.
#[derive(Debug, Default)]
struct Series {
    lost: Samples,
    pages: f64,
    stopped: Duration,
    time: Duration,
}

impl Series {
    /// Lets the guest work while checkpoints are taken; the pages it verified a second.
    fn stretch(&mut self, lab: &Lab, guest: &mut Guest, taker: &mut Taker, epochs: u32) -> Result<f64> {
        let every = Duration::from_secs(1) / epochs;
        // At least a few of them, and no less than the stretch.
        let paced = |time: Duration| {
            let start = Instant::now();
            move |_| start.elapsed() < time
        };
        taker.paced(every, paced(SETTLE), |_| {})?;
        let (mut pages, mut stopped) = (0, Duration::ZERO);
        let (taker, stretch) = (&mut *taker, lab.stretch());
        // The console is read on the side, so that the checkpoints keep their pace.
        let (beats, pace) = std::thread::scope(|scope| {
            let beats = scope.spawn(|| guest.console.stretch(stretch));
            let pace = taker.paced(
                every,
                |_| !beats.is_finished(),
                |taken| {
                    pages += taken.summary.data_pages + taken.summary.zero_pages;
                    stopped += taken.stopped;
                },
            );
            (beats.join(), pace)
        });
        let pace = pace?;
        let (first, last) = beats
            .ok()
            .context("the thread that reads the console panicked")??;
        self.pages += pages as f64;
        self.stopped += stopped;
        self.time += pace.elapsed;
        Ok(last.work_since(&first))
    }
}

/// Pages verified a second without checkpoints.
fn undisturbed(lab: &Lab, guest: &mut Guest) -> Result<f64> {
    std::thread::sleep(SETTLE);
    let (first, last) = guest.console.stretch(lab.stretch())?;
    Ok(last.work_since(&first))
}

/// What the first write to a page after a checkpoint costs a guest, in microseconds: a guest that does nothing but
/// write pages of a memory so large that it seldom meets one twice.
fn first_write_us(lab: &Lab) -> Result<f64> {
    let guest = Guest::filled(lab, "mib=200 rate=0 verify=0 heartbeat_ms=1000", 256)?;
    guest.capture(CaptureKind::Full)?;
    let mut each = Samples::default();
    for _ in 0..lab.samples(50, 10) {
        guest.capture(CaptureKind::Delta)?;
        let start = Instant::now();
        std::thread::sleep(Duration::from_millis(10));
        let ran = start.elapsed();
        let captured = guest.capture(CaptureKind::Delta)?;
        let pages: usize = captured.spaces.iter().map(|space| space.pages.len()).sum();
        each.push(ran.as_secs_f64() * 1e6 / pages.max(1) as f64);
    }
    Ok(each.median())
}
