//! How long a guest stands still for a checkpoint.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::guest::{Guest, Taker};
use super::lab::Lab;
use super::limits;
use super::row::Row;
use super::stats::Samples;

const DELTA: &str = "capture.delta.stop_us";
/// 100 checkpoints a second.
const EVERY: Duration = Duration::from_millis(10);
/// Deltas before those that count: buffers grow to their size.
const WARM_UP: usize = 20;
/// MiB that `churn` leaves of its guest for itself.
const SPARE_MIB: u64 = 28;

/// The target for the median at so many page writes a second.
const DELTA_TARGETS_US: [(u64, f64); 2] = [(1_000, 250.0), (10_000, 400.0)];
/// p99 at most so many medians.
const TAIL: f64 = 2.0;

/// What a series of deltas gave.
struct Deltas {
    stops: Samples,
    pages: Samples,
    per_second: f64,
}

pub(crate) fn delta(lab: &Lab) -> Result<Vec<Row>> {
    let memories: &[u64] = if lab.quick() { &[128] } else { &[128, 2048] };
    let count = lab.samples(500, 100);
    let mut rows = Vec::new();
    for &memory_mib in memories {
        // Nothing to copy: what is left is the stop, the state, the log and the start.
        let idle = Guest::start(lab, "ticker", "period_ms=10", memory_mib)?;
        let alone = deltas(lab, &idle, count)?;
        drop(idle);
        for (writes, target) in DELTA_TARGETS_US {
            let command_line = format!("mib={} rate={writes} heartbeat_ms=1000", memory_mib - SPARE_MIB);
            let guest = Guest::filled(lab, &command_line, memory_mib)?;
            let seen = deltas(lab, &guest, count)?;
            let pages = seen.pages.median();
            let copy = limits::gather(guest.vm.ram(), pages as usize, lab.samples(200, 50))?.median();
            let row = Row::new(DELTA, "us", &seen.stops)?
                .limit(
                    alone.stops.median() + copy,
                    "the same stop with nothing to copy (ticker), and a bare copy of as many scattered pages",
                )
                .at_most(target)
                .tail_at_most(&seen.stops, TAIL)
                .param("memory_mib", memory_mib)
                .param("touched_mib", guest.touched_mib()?)
                .param("writes_per_s", writes)
                .param("pages_per_epoch", pages)
                .seen("epochs_per_s", seen.per_second)
                .seen("stop_alone_us", alone.stops.median())
                .seen("copy_us", copy);
            rows.push(row);
        }
    }
    Ok(rows)
}

/// Takes a full checkpoint, and then deltas at the pace.
fn deltas(lab: &Lab, guest: &Guest, count: usize) -> Result<Deltas> {
    let mut taker = Taker::new(lab, guest)?;
    taker.take(true)?;
    let (mut stops, mut pages, mut seen) = (Samples::default(), Samples::default(), 0);
    let pace = taker.paced(
        EVERY,
        |taken| taken < WARM_UP + count,
        |taken| {
            seen += 1;
            if seen > WARM_UP {
                stops.push_us(taken.stopped);
                pages.push((taken.summary.data_pages + taken.summary.zero_pages) as f64);
            }
        },
    )?;
    Ok(Deltas {
        stops,
        pages,
        per_second: pace.per_second(),
    })
}

const FULL_STOP: &str = "capture.full.stop_us";
const FULL_FINISH: &str = "capture.full.finish";
const FULL_STOP_TARGET_US: f64 = 1000.0;
const FULL_FINISH_SHARE: f64 = 0.8;
/// Page writes a second while full checkpoints are taken.
const FULL_WRITES: u64 = 1_000;

pub(crate) fn full(lab: &Lab) -> Result<Vec<Row>> {
    let memories: &[(u64, usize)] = if lab.quick() {
        &[(256, 3)]
    } else {
        &[(256, 20), (1024, 10), (4096, 5)]
    };
    let mut rows = Vec::new();
    for &(memory_mib, count) in memories {
        let command_line = format!(
            "mib={} rate={FULL_WRITES} heartbeat_ms=1000",
            memory_mib - SPARE_MIB
        );
        let guest = Guest::filled(lab, &command_line, memory_mib)?;
        rows.extend(full_of(lab, &guest, memory_mib, count)?);
    }
    Ok(rows)
}

fn full_of(lab: &Lab, guest: &Guest, memory_mib: u64, count: usize) -> Result<[Row; 2]> {
    let touched_mib = guest.touched_mib()?;
    let bytes = touched_mib << 20;
    let mut taker = Taker::new(lab, guest)?;
    let (mut stops, mut finish) = (Samples::default(), Samples::default());
    let (mut copying, mut encoding, mut stored) = (Samples::default(), Samples::default(), 0);
    // The first is a rehearsal.
    for index in 0..=count {
        let start = Instant::now();
        let taken = taker.take(true)?;
        let time = start.elapsed();
        // Nothing builds on it: the next one is full too.
        taker.store.remove(&taken.entry.name)?;
        if index > 0 {
            stops.push_us(taken.stopped);
            finish.push_rate(bytes, time);
            copying.push_ms(time.saturating_sub(taken.encode_time));
            encoding.push_ms(taken.encode_time);
            stored = taken.summary.file_bytes;
        }
    }
    let copy = limits::copy_out(guest.vm.ram())?;
    let folder = lab.temporary("limit-")?;
    // In units of the memory it stands for, so that it can be compared.
    let written = limits::put(folder.path(), "full", &vec![1; stored as usize])?;
    let disk = limits::rate(bytes, written);
    let params = |row: Row| {
        row.param("memory_mib", memory_mib)
            .param("touched_mib", touched_mib)
            .param("writes_per_s", FULL_WRITES)
    };
    let stop = params(Row::new(FULL_STOP, "us", &stops)?)
        .limit(
            stop_alone(lab, memory_mib)?,
            "the stop for a delta with nothing to copy (ticker)",
        )
        .at_most(FULL_STOP_TARGET_US);
    let finish = params(Row::new(FULL_FINISH, "MB/s of touched memory", &finish)?)
        .limit(
            copy.min(disk),
            "the slower of one core's copy into fresh memory and a durable write of the segment",
        )
        .at_least_of_limit(FULL_FINISH_SHARE)
        .param("stored_mib", stored >> 20)
        .seen("copy_ms", copying.median())
        .seen("encode_ms", encoding.median())
        .seen("copy_limit", copy)
        .seen("disk_limit", disk);
    Ok([stop, finish])
}

fn stop_alone(lab: &Lab, memory_mib: u64) -> Result<f64> {
    let idle = Guest::start(lab, "ticker", "period_ms=10", memory_mib)?;
    Ok(deltas(lab, &idle, lab.samples(100, 30))?.stops.median())
}
