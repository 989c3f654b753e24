//! The fuzz targets over their stored corpus, and over a bounded number of mutations of it, so that every test run
//! fuzzes a little and needs nothing but the compiler. `scripts/fuzz` is for more.
//!
//! A failure names the target, the seed and the input's file: run it again with `FUZZ_SEED=SEED`.
#![allow(clippy::unwrap_used)] // A test that cannot read its corpus fails.

#[allow(unreachable_pub)] // Another crate uses them too.
#[path = "../../fuzz/src/targets.rs"]
mod targets;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;

use segment::{SegmentReader, read_prefix};
use targets::{Run, TARGETS};

/// Mutated inputs of each target.
const MUTATIONS: usize = 1500;
/// The longest input.
const MAX_INPUT: usize = 4096;

fn corpus(target: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "fuzz", "corpus", target]
        .iter()
        .collect()
}

fn inputs(target: &str) -> BTreeMap<String, Vec<u8>> {
    let read = |file: std::io::Result<std::fs::DirEntry>| {
        let file = file.unwrap();
        (
            file.file_name().into_string().unwrap(),
            std::fs::read(file.path()).unwrap(),
        )
    };
    std::fs::read_dir(corpus(target)).unwrap().map(read).collect()
}

/// Numbers without a pattern (SplitMix64).
struct Random(u64);

impl Random {
    fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.number() % end.max(1) as u64) as usize
    }
}

/// Changes an input in one to four places.
fn mutate(random: &mut Random, input: &mut Vec<u8>, other: &[u8]) {
    const VALUES: [u8; 12] = [0, 1, 2, 3, 4, 5, 0x7f, 0x80, 0xff, 0xfb, 0x9b, 0x20];
    for _ in 0..=random.below(4) {
        let at = random.below(input.len() + 1);
        match random.below(7) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = VALUES[random.below(VALUES.len())],
            2 if at < input.len() => {
                input[at] = input[at].wrapping_add(random.number() as u8 % 5).wrapping_sub(2)
            }
            3 => input.insert(at, VALUES[random.below(VALUES.len())]),
            4 => {
                let end = (at + random.below(16)).min(input.len());
                input.drain(at..end);
            }
            5 => {
                let from = random.below(other.len() + 1);
                let piece = &other[from..(from + random.below(64)).min(other.len())];
                input.splice(at..at, piece.iter().copied());
            }
            _ if at + 8 <= input.len() => {
                let value = [0, 1, u64::MAX, 1 << 63, u64::from(u32::MAX), random.number()][random.below(6)];
                let length = [1, 2, 4, 8][random.below(4)];
                input[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
            }
            _ => {}
        }
    }
    input.truncate(MAX_INPUT);
}

fn fuzz(name: &str, run: Run) {
    let inputs: Vec<(String, Vec<u8>)> = inputs(name).into_iter().collect();
    assert!(!inputs.is_empty(), "the corpus of {name} is empty");
    for (file, input) in &inputs {
        println!("{name}: {file}");
        run(input);
    }
    let seed = std::env::var("FUZZ_SEED").map_or_else(
        |_| RandomState::new().hash_one(name),
        |text| text.parse().unwrap(),
    );
    println!("{name}: FUZZ_SEED={seed}");
    let mut random = Random(seed);
    for n in 0..MUTATIONS {
        let (file, input) = &inputs[random.below(inputs.len())];
        let (_, other) = &inputs[random.below(inputs.len())];
        let mut input = input.clone();
        mutate(&mut random, &mut input, other);
        let result = std::panic::catch_unwind(|| run(&input));
        if let Err(panic) = result {
            println!("{name}: mutation {n} of {file}, FUZZ_SEED={seed}: {input:02x?}");
            std::panic::resume_unwind(panic);
        }
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                fuzz(stringify!($name), targets::$name);
            }
        )*

        #[test]
        fn every_target_is_run() {
            let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
        }
    };
}
targets!(header manifest records index frames chain);

fn golden() -> Vec<Vec<u8>> {
    let testdata: PathBuf = [env!("CARGO_MANIFEST_DIR"), "segment", "testdata"]
        .iter()
        .collect();
    let mut files: Vec<PathBuf> = std::fs::read_dir(testdata)
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// A frame as the target `frames` takes it.
fn frame(
    how: u8,
    first: u8,
    end: u8,
    counts: [u8; 4],
    table: &[u8],
    checks: &[u8],
    pages: &[&[u8]],
) -> Vec<u8> {
    let raw = [table, checks, &pages.concat()].concat();
    let head = [how, first, end, counts[0], counts[1], counts[2], counts[3]];
    [&head[..], &(raw.len() as u16).to_le_bytes(), &raw].concat()
}

fn link(builds_on: u8, frames: &[Vec<u8>]) -> Vec<u8> {
    let frames = frames.concat();
    [&[builds_on][..], &(frames.len() as u16).to_le_bytes(), &frames].concat()
}

/// The first inputs: what is good, so that mutations begin where all the code is reached.
#[test]
#[ignore = "writes fuzz/corpus"]
fn write_the_first_corpus() {
    let put = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(corpus(target)).unwrap();
        std::fs::write(corpus(target).join(name), bytes).unwrap();
    };
    for (n, bytes) in golden().iter().enumerate() {
        let name = format!("golden-{n}");
        let header = read_prefix(bytes).unwrap();
        let part = |from: u64, to: u64| &bytes[from as usize..to as usize];
        put("header", &name, &bytes[..96]);
        put(
            "manifest",
            &name,
            part(header.manifest_offset(), header.records_offset()),
        );
        let stored = part(header.records_offset(), header.body_offset());
        put(
            "records",
            &name,
            &zstd::bulk::decompress(stored, 1 << 20).unwrap(),
        );
        put("records", &format!("{name}-stored"), stored);
        put("index", &name, part(header.index_offset(), header.file_bytes()));
        assert!(SegmentReader::open(bytes.as_slice()).is_ok());
    }
    let (a, b) = ([7; 512], [9; 512]);
    let mut changed = a;
    changed[3] = 1;
    let xor: Vec<u8> = a.iter().zip(&changed).map(|(a, b)| a ^ b).collect();
    let check = segment::PageCheck::of(&changed).0;
    // Pages 1 and 2 whole, 3 the same as 1; then 9 the same as 2 of the frame before.
    let base = frame(
        1,
        1,
        4,
        [2, 0, 1, 0],
        &[2, 0, 0, 0, 1, 0, 2, 3, 0, 1, 2],
        &[],
        &[&a, &b],
    );
    let far = frame(0, 9, 10, [0, 0, 1, 0], &[1, 0, 0, 0, 3, 0, 1, 7], &[], &[]);
    // Page 1 a change, 2 zero.
    let change = frame(
        1,
        1,
        3,
        [1, 1, 0, 1],
        &[2, 0, 0, 0, 4, 0, 1, 2, 0, 1],
        &check,
        &[&xor],
    );
    let whole = frame(0, 1, 2, [1, 0, 0, 0], &[1, 0, 0, 0, 1, 0, 1], &[], &[&b]);
    let packed = zstd::bulk::compress(&[&[1, 0, 0, 0, 1, 0, 1][..], &a].concat(), 1).unwrap();
    let mut stored = frame(2, 5, 6, [1, 0, 0, 0], &packed, &[], &[]);
    stored[0] = 2;
    put("frames", "whole-and-same", &[base.clone(), far.clone()].concat());
    put("frames", "change", &change);
    put("frames", "one", &whole);
    put("frames", "compressed", &stored);
    put("chain", "full", &link(0, &[base.clone(), far.clone()]));
    put(
        "chain",
        "full-and-change",
        &[
            link(0, std::slice::from_ref(&base)),
            link(0, std::slice::from_ref(&change)),
        ]
        .concat(),
    );
    let three = [
        link(0, &[base, far]),
        link(0, std::slice::from_ref(&change)),
        link(0, &[whole]),
    ]
    .concat();
    put("chain", "three", &three);
    put("chain", "no-base", &link(0, &[change]));
}
