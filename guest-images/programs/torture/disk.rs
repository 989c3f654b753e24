//! Numbered, checksummed records in a file, each on disk before the next is begun.
//!
//! The file is a ring of slots of 4 KiB. Record n, from 1, is in slot n modulo their number:
//!
//! | Bytes | Field (little-endian) |
//! |---|---|
//! | 0..8 | "USRECORD" |
//! | 8..16 | seed |
//! | 16..24 | n |
//! | 24..32 | checksum: the sum of all other words, each mixed with its place |
//! | 32..4096 | 508 words from seed, n and place |
//!
//! So of a file found at any instant every record up to some n is there (as far as the ring reaches), none after
//! it, and at most the slot of n + 1 is damaged: that record was being written.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;

use crate::content::mix64;
use crate::work::{Keys, Worker, bad, say};

const BYTES: usize = 4096;
const WORDS: usize = BYTES / 8;
const MAGIC: u64 = u64::from_le_bytes(*b"USRECORD");
/// Reads from the disk, not from memory.
const O_DIRECT: i32 = 0o40000;
/// Records read back for each one written.
const READ_BACK: u64 = 4;

/// Aligned as O_DIRECT wants it.
#[repr(C, align(4096))]
struct Slot([u8; BYTES]);

fn record(seed: u64, n: u64) -> Box<Slot> {
    let mut words = [0; WORDS];
    for (at, word) in (0..).zip(&mut words) {
        *word = mix64(seed ^ mix64(n) ^ at);
    }
    (words[0], words[1], words[2], words[3]) = (MAGIC, seed, n, 0);
    words[3] = checksum(&words);
    let mut slot = Box::new(Slot([0; BYTES]));
    for (bytes, word) in slot.0.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    slot
}

fn checksum(words: &[u64; WORDS]) -> u64 {
    let mixed = (0..)
        .zip(words)
        .map(|(at, word): (u64, &u64)| mix64(word ^ mix64(at)));
    mixed.fold(0, u64::wrapping_add)
}

/// The number of the whole record in a slot.
fn number(slot: &Slot) -> Option<(u64, u64)> {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(slot.0.chunks_exact(8)) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    let [magic, seed, n, sum, ..] = words;
    words[3] = 0;
    (magic == MAGIC && sum == checksum(&words)).then_some((seed, n))
}

/// Opened for reading past the page cache, where the file system can.
fn direct(path: &str) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    options
        .clone()
        .custom_flags(O_DIRECT)
        .open(path)
        .or_else(|_| options.open(path))
}

/// The newest record of a file; None of one without records.
fn newest(file: &File, slots: u64) -> Result<Option<(u64, u64)>, String> {
    let mut found: Vec<Option<(u64, u64)>> = Vec::new();
    let mut slot = Box::new(Slot([0; BYTES]));
    for at in 0..slots {
        let place = at * BYTES as u64;
        file.read_exact_at(&mut slot.0, place)
            .map_err(|error| format!("slot {at}: {error}"))?;
        found.push(number(&slot));
    }
    let Some((seed, newest)) = found.iter().flatten().copied().max_by_key(|(_, n)| *n) else {
        return Ok(None);
    };
    for back in 0..slots.min(newest) {
        let n = newest - back;
        let at = n % slots;
        // The oldest of a full ring is being replaced by the one after the newest.
        let torn = back + 1 == slots;
        match found[at as usize] {
            Some(there) if there == (seed, n) => {}
            None if torn => {}
            there => return Err(format!("record {n} of {newest} is lost: slot {at} has {there:?}")),
        }
    }
    Ok(Some((seed, newest)))
}

/// On the host: checks the file of a guest that is gone.
pub fn check(keys: &Keys) -> ExitCode {
    let path = keys.file.clone().unwrap_or_default();
    let result = File::open(&path)
        .map_err(|error| error.to_string())
        .and_then(|file| {
            let bytes = file.metadata().map_err(|error| error.to_string())?.len();
            newest(&file, bytes / BYTES as u64)
        });
    match result {
        Ok(newest) => {
            say(format_args!("records newest={}", newest.map_or(0, |(_, n)| n)));
            ExitCode::SUCCESS
        }
        Err(error) => {
            bad("disk", format_args!("{path}: {error}"));
            ExitCode::FAILURE
        }
    }
}

pub fn work(keys: &Keys) {
    let worker = Worker::begin("disk", &["synced", "verified"]);
    let path = keys.file.clone().unwrap_or_default();
    if let Err(error) = write_and_verify(keys, &path, &worker) {
        worker.bad(format_args!("{path}: {error}"));
    }
}

fn write_and_verify(keys: &Keys, path: &str, worker: &Worker) -> Result<(), String> {
    let slots = keys.records;
    let failed = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
    let out = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    let out = out.map_err(failed("open"))?;
    if out.metadata().map_err(failed("look"))?.len() != slots * BYTES as u64 {
        out.set_len(slots * BYTES as u64)
            .map_err(failed("set the size"))?;
        out.sync_all().map_err(failed("sync the size"))?;
    }
    let back = direct(path).map_err(failed("open to read"))?;
    let found = newest(&back, slots)?;
    let mut n = match found {
        Some((seed, n)) if seed == keys.seed => n,
        Some((seed, _)) => return Err(format!("it has the records of seed {seed}")),
        None => 0,
    };
    let mut slot = Box::new(Slot([0; BYTES]));
    let mut draw = keys.seed;
    loop {
        n += 1;
        let place = n % slots * BYTES as u64;
        out.write_all_at(&record(keys.seed, n).0, place)
            .map_err(failed("write"))?;
        out.sync_data().map_err(failed("sync"))?;
        worker.set(0, n);
        for _ in 0..READ_BACK {
            draw = mix64(draw);
            let wanted = n - draw % slots.min(n);
            let place = wanted % slots * BYTES as u64;
            back.read_exact_at(&mut slot.0, place).map_err(failed("read"))?;
            if slot.0 != record(keys.seed, wanted).0 {
                let there = number(&slot);
                worker.bad(format_args!("record {wanted} of {n} reads as {there:?}"));
            }
            worker.add(1, 1);
        }
    }
}
