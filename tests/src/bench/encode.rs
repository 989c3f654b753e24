//! How fast captured pages become a segment, and how small.

use std::io::Cursor;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use migrate::checkpoint::{CaptureKind, Captured, EncodeOptions, EncodePool, Source, SourceError};
use migrate::protect::{CheckpointRequest, ProtectOptions, Protector};
use migrate::store::{Durability, FsStore};
use segment::Generation;
use vmm::replica::VmSource;

use super::guest::Guest;
use super::lab::Lab;
use super::limits::{self, timed};
use super::pages::{self, Bytes, FRAME_BYTES};
use super::row::Row;
use super::stats::Samples;
use vmm::memory::PAGE_BYTES;

const RATE: &str = "encode.rate";
const RATE_ZERO: &str = "encode.rate.zero";
const RATIO: &str = "encode.ratio";
const RATE_SHARE: f64 = 0.9;
const ZERO_SHARE: f64 = 0.8;
const RATIO_SHARE: f64 = 0.5;
const ZERO_BYTES: usize = 256 << 20;

pub(crate) fn rate(lab: &Lab) -> Result<Vec<Row>> {
    let mib = if lab.quick() { 32 } else { 128 };
    let guest = Guest::filled(lab, &format!("mib={mib}"), mib + 32)?;
    let captured = guest.capture(CaptureKind::Full)?;
    drop(guest);
    let data = pages::content(&captured);
    drop(captured);
    let n = lab.samples(15, 3);

    let limit = Samples::collect(n, |_| {
        limits::compress(&data.0, FRAME_BYTES).map(|(rate, _)| rate)
    })?;
    let (samples, stored) = encoded(&data, n)?;
    let pages = Row::new(RATE, "MB/s a core", &samples)?
        .limit(
            limit.median(),
            "zstd level 1 alone, on the same bytes in the same frames, on one core",
        )
        .at_least_of_limit(RATE_SHARE)
        .param("content", "churn's default mix, without zero pages")
        .param("mib", data.0.len() >> 20)
        .seen("ratio", stored as f64 / data.0.len() as f64);

    // Written, as memory never written is one zero page again and again; more than the caches hold.
    let zeros = Bytes(
        std::hint::black_box(vec![1; ZERO_BYTES])
            .into_iter()
            .map(|byte: u8| byte - 1)
            .collect::<Vec<_>>()
            .into(),
    );
    let limit = Samples::collect(n, |_| Ok::<_, anyhow::Error>(limits::scan(&zeros.0)))?;
    let (samples, _) = encoded(&zeros, n)?;
    let zero = Row::new(RATE_ZERO, "MB/s a core", &samples)?
        .limit(
            limit.median(),
            "a plain scan that looks at every byte, on one core",
        )
        .at_least_of_limit(ZERO_SHARE)
        .param("content", "zero pages")
        .param("mib", zeros.0.len() >> 20);
    Ok(vec![pages, zero])
}

/// MB a second at which one thread makes a full segment of these pages in memory, and how long it is.
fn encoded(bytes: &Bytes, n: usize) -> Result<(Samples, u64)> {
    let (captured, manifest) = pages::full(&pages::name("encode", 1)?, bytes);
    let pool = EncodePool::new(EncodeOptions { level: 1, threads: 1 });
    let (mut rates, mut stored) = (Samples::default(), 0);
    let mut out = Vec::new();
    // The first makes the compressor and grows the buffers.
    for index in 0..=n {
        let (done, time) = timed(|| pool.encode(&captured, &manifest, Cursor::new(out)));
        let (written, summary) = done.context("encode")?;
        out = written.into_inner();
        stored = summary.file_bytes;
        if index > 0 {
            rates.push_rate(bytes.0.len() as u64, time);
        }
    }
    Ok((rates, stored))
}

/// Page writes a second. The memory is large beside them: most pages in a delta were written once before it.
const RATIO_WRITES: u64 = 2_000;
/// All of the guest's memory fits: what is measured is what a change takes.
const RATIO_CACHE: usize = 256 << 20;

/// Takes captures, and keeps the bytes of the last.
struct Watched {
    source: VmSource,
    last: Arc<Mutex<Vec<u8>>>,
}

impl Source for Watched {
    fn capture(&mut self, kind: CaptureKind) -> Result<Captured, SourceError> {
        let captured = self.source.capture(kind)?;
        if !captured.full {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            last.clear();
            captured
                .spaces
                .iter()
                .for_each(|space| last.extend_from_slice(space.data.as_ref()));
        }
        Ok(captured)
    }

    fn put_back(&mut self, captured: &Captured) {
        self.source.put_back(captured);
    }

    fn fence(&mut self, reason: &str) {
        self.source.fence(reason);
    }
}

pub(crate) fn ratio(lab: &Lab) -> Result<Vec<Row>> {
    let guest = Guest::filled(lab, &format!("mib=200 rate={RATIO_WRITES}"), 256)?;
    let folder = lab.temporary("owner-")?;
    let store = FsStore::open(folder.path(), None, Durability::Spool).context("open the owner's store")?;
    let last = Arc::new(Mutex::new(Vec::new()));
    let source = Watched {
        source: VmSource::new(guest.vm.clone()),
        last: Arc::clone(&last),
    };
    let options = ProtectOptions {
        delta_cache: RATIO_CACHE,
        ..ProtectOptions::default()
    };
    let vm = "bench".parse().context("name the VM")?;
    let mut protector = Protector::new(source, store, vm, Generation(1), options);
    let mut take = |full| {
        let request = CheckpointRequest { full, label: None };
        protector.checkpoint(request).context("take a checkpoint")
    };
    take(true)?;
    let (mut ratios, mut alone, mut dirty) = (Samples::default(), Samples::default(), Samples::default());
    let mut changes = Samples::default();
    for _ in 0..lab.samples(7, 2) {
        std::thread::sleep(lab.stretch() / 2);
        let taken = take(false)?;
        let bytes = last.lock().unwrap_or_else(PoisonError::into_inner);
        ratios.push(taken.summary.file_bytes as f64 / bytes.len().max(1) as f64);
        dirty.push((bytes.len() / PAGE_BYTES) as f64);
        changes.push(taken.summary.change_pages as f64);
        let (_, compressed) = limits::compress(&bytes, FRAME_BYTES)?;
        alone.push(compressed as f64 / bytes.len().max(1) as f64);
    }
    let row = Row::new(RATIO, "segment bytes per dirty byte", &ratios)?
        .limit(
            alone.median(),
            "zstd level 1 of the dirty pages alone, zero pages included; the target is half of it",
        )
        .at_most_of_limit(RATIO_SHARE)
        .param("mix", "churn's default")
        .param("writes_per_s", RATIO_WRITES)
        .param("delta_cache_mib", RATIO_CACHE >> 20)
        .param("pages_per_epoch", dirty.median())
        .param("changes_per_epoch", changes.median());
    Ok(vec![row])
}
