//! What the machine itself allows: each function does only the part that cannot be left out, as plainly as it goes.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use vmm::memory::{GuestRam, PAGE_BYTES};
use zstd::bulk::{Compressor, Decompressor};

use super::stats::Samples;

/// Bytes moved with one call where data is streamed.
const PIECE_BYTES: usize = 1 << 20;
/// The zstd level that checkpoints are compressed with.
const LEVEL: i32 = 1;

/// Runs `f` and says how long it took.
pub(crate) fn timed<T>(f: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let value = f();
    (value, start.elapsed())
}

/// Numbers without a pattern (SplitMix64), the same in every run.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Bytes that cannot be compressed.
    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length.div_ceil(8))
            .flat_map(|_| self.number().to_le_bytes())
            .take(length)
            .collect()
    }
}

/// Microseconds to copy `count` pages, scattered over the populated part of `ram`, into a warm buffer.
pub(crate) fn gather(ram: &GuestRam, count: usize, samples: usize) -> Result<Samples> {
    let populated: Vec<u64> = ram
        .populated()
        .context("find the guest's pages")?
        .into_iter()
        .flatten()
        .collect();
    let mut random = Random(count as u64);
    let mut to = vec![1; count.max(1) * PAGE_BYTES];
    let mut times = Samples::default();
    for _ in 0..samples {
        let mut pages: Vec<u64> = (0..count)
            .filter_map(|_| populated.get((random.number() % populated.len().max(1) as u64) as usize))
            .copied()
            .collect();
        pages.sort_unstable();
        // As far apart as checkpoints are: what is copied is in no cache.
        std::thread::sleep(Duration::from_millis(2));
        let ((), time) = timed(|| {
            for (&page, to) in pages.iter().zip(to.chunks_exact_mut(PAGE_BYTES)) {
                ram.read_pages(page, to);
            }
        });
        times.push_us(time);
    }
    Ok(times)
}

/// MB a second that one core copies of `ram`'s populated pages into fresh memory.
pub(crate) fn copy_out(ram: &GuestRam) -> Result<f64> {
    let populated = ram.populated().context("find the guest's pages")?;
    let bytes = populated.iter().map(|run| run.end - run.start).sum::<u64>() * PAGE_BYTES as u64;
    // Asked for zeroed: the kernel gives the pages one by one as they are first written.
    let mut to = vec![0; usize::try_from(bytes).context("as much memory as the guest has")?];
    let ((), time) = timed(|| {
        let mut rest = to.as_mut_slice();
        for run in populated {
            let (this, after) = rest.split_at_mut((run.end - run.start) as usize * PAGE_BYTES);
            for (index, piece) in this.chunks_mut(PIECE_BYTES).enumerate() {
                ram.read_pages(run.start + (index * PIECE_BYTES / PAGE_BYTES) as u64, piece);
            }
            rest = after;
        }
    });
    Ok(rate(bytes, time))
}

/// MB a second that `threads` populate of fresh guest memory, by copying from a small warm buffer into it.
pub(crate) fn populate(bytes: u64, threads: usize) -> Result<f64> {
    let ram = GuestRam::new(bytes.next_multiple_of(1 << 20)).context("fresh guest memory")?;
    let (from, pages) = (vec![1; 64 * PAGE_BYTES], bytes / PAGE_BYTES as u64);
    let step = from.len() / PAGE_BYTES;
    let share = pages.div_ceil(threads as u64);
    let (done, time) = timed(|| {
        std::thread::scope(|scope| {
            let work = |thread: u64| {
                let (ram, from) = (&ram, &from);
                move || {
                    let end = pages.min((thread + 1) * share);
                    (thread * share..end).step_by(step).try_for_each(|page| {
                        let some = (end - page).min(step as u64) as usize;
                        ram.write_pages(page, &from[..some * PAGE_BYTES])
                    })
                }
            };
            let threads: Vec<_> = (0..threads as u64)
                .map(|thread| scope.spawn(work(thread)))
                .collect();
            threads.into_iter().try_for_each(|thread| {
                let written = thread.join().map_err(|_| anyhow!("a thread panicked"))?;
                written.context("populate guest memory")
            })
        })
    });
    done?;
    Ok(rate(bytes, time))
}

/// MB a second that one core finds to be zero, looking at every byte.
pub(crate) fn scan(bytes: &[u8]) -> f64 {
    let (found, time) = timed(|| {
        bytes.chunks(PAGE_BYTES).all(|page| {
            // In lanes that do not wait for each other.
            let mut lanes = [0; 16];
            for piece in page.as_chunks::<128>().0 {
                for (lane, word) in lanes.iter_mut().zip(piece.as_chunks().0) {
                    *lane |= u64::from_ne_bytes(*word);
                }
            }
            lanes.iter().all(|&lane| lane == 0)
        })
    });
    std::hint::black_box(found);
    rate(bytes.len() as u64, time)
}

/// MB a second (of input) that zstd alone compresses on one core, frame by frame, and the bytes that come out.
pub(crate) fn compress(bytes: &[u8], frame_bytes: usize) -> Result<(f64, u64)> {
    let mut compressor = Compressor::new(LEVEL).context("make a compressor")?;
    let mut out = vec![0; zstd::zstd_safe::compress_bound(frame_bytes)];
    let mut run = || -> Result<u64> {
        let mut total = 0;
        for frame in bytes.chunks(frame_bytes) {
            total += compressor
                .compress_to_buffer(frame, out.as_mut_slice())
                .context("compress")? as u64;
        }
        Ok(total)
    };
    let (total, time) = timed(&mut run);
    Ok((rate(bytes.len() as u64, time), total?))
}

/// MB a second (of output) that zstd alone decompresses with `threads` threads.
pub(crate) fn decompress(bytes: &[u8], frame_bytes: usize, threads: usize) -> Result<f64> {
    let mut compressor = Compressor::new(LEVEL).context("make a compressor")?;
    let frames: Vec<Vec<u8>> = bytes
        .chunks(frame_bytes)
        .map(|frame| compressor.compress(frame).context("compress"))
        .collect::<Result<_>>()?;
    let work = |frames: &[Vec<u8>]| -> Result<()> {
        let mut decompressor = Decompressor::new().context("make a decompressor")?;
        let mut out = vec![0; frame_bytes];
        frames.iter().try_for_each(|frame| {
            let length = decompressor
                .decompress_to_buffer(frame, out.as_mut_slice())
                .context("decompress")?;
            std::hint::black_box(length);
            Ok(())
        })
    };
    let (done, time) = timed(|| {
        std::thread::scope(|scope| {
            let shares = frames.chunks(frames.len().div_ceil(threads).max(1));
            let threads: Vec<_> = shares.map(|share| scope.spawn(|| work(share))).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
        })
    });
    done?;
    Ok(rate(bytes.len() as u64, time))
}

/// Writes a file of these bytes durably: write, sync, rename, sync the folder.
pub(crate) fn put(folder: &Path, name: &str, bytes: &[u8]) -> Result<Duration> {
    let (temporary, last) = (folder.join(format!("{name}.tmp")), folder.join(name));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &last)?;
        File::open(folder)?.sync_all()
    };
    let (written, time) = timed(write);
    written.with_context(|| format!("write {}", last.display()))?;
    Ok(time)
}

/// How long these bytes take over loopback TCP into a file that is then synced and acknowledged, and how long over
/// TCP alone.
pub(crate) fn tcp_to_disk(folder: &Path, bytes: &[u8]) -> Result<(Duration, Duration)> {
    let to_disk = over_tcp(bytes, Some(&folder.join("limit.tmp")))?;
    let alone = over_tcp(bytes, None)?;
    Ok((to_disk, alone))
}

fn over_tcp(bytes: &[u8], path: Option<&Path>) -> Result<Duration> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("listen on loopback")?;
    let address = listener.local_addr().context("the listener's address")?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&listener, path));
        let start = Instant::now();
        let mut stream = TcpStream::connect(address).context("connect on loopback")?;
        for piece in bytes.chunks(PIECE_BYTES) {
            stream.write_all(piece).context("send on loopback")?;
        }
        stream
            .shutdown(std::net::Shutdown::Write)
            .context("end the sending")?;
        stream
            .read_exact(&mut [0])
            .context("receive the acknowledgement")?;
        let time = start.elapsed();
        receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
        Ok(time)
    })
}

fn receive(listener: &TcpListener, path: Option<&Path>) -> Result<()> {
    let (mut stream, _) = listener.accept().context("accept on loopback")?;
    let mut file = path.map(File::create).transpose().context("make a file")?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let length = stream.read(&mut piece).context("receive on loopback")?;
        if length == 0 {
            break;
        }
        if let Some(file) = &mut file {
            file.write_all(&piece[..length]).context("write the file")?;
        }
    }
    if let (Some(file), Some(path)) = (file, path) {
        file.sync_all().context("sync the file")?;
        let last = path.with_extension("seg");
        std::fs::rename(path, &last).context("rename the file")?;
        if let Some(folder) = last.parent() {
            File::open(folder)
                .and_then(|folder| folder.sync_all())
                .context("sync the folder")?;
        }
        std::fs::remove_file(&last).context("remove the file")?;
    }
    stream.write_all(&[1]).context("acknowledge")
}

/// MB (10^6 bytes) a second.
pub(crate) fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64().max(1e-9)
}
