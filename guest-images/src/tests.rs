//! Tests of the guests' pure parts. What needs a machine is in `tests/boot.rs`.

use crate::clock::{Every, Timeline};
use crate::cmdline::{ChurnConfig, TickerConfig};
use crate::content::{Fault, Kind, PAGE_BYTES, PAGE_WORDS, Recipe};
use crate::layout::{FreeMemory, GIB, Range};
use crate::registers::{Name, Registers};

type Page = [u64; PAGE_WORDS];

const MIX: [u32; 3] = [20, 50, 30];

fn apply(recipe: &Recipe, page: u64, count: u32, words: &mut Page) {
    recipe
        .version(page, count)
        .write(|index, word| words[index] = word);
}

#[test]
fn every_version_written_after_the_one_before_it_verifies() {
    let recipe = Recipe::new(7, MIX);
    for page in 0..40 {
        let mut words = [u64::MAX; PAGE_WORDS];
        for count in 1..=50 {
            apply(&recipe, page, count, &mut words);
            let version = recipe.version(page, count);
            assert_eq!(version.count(), count);
            assert_eq!(
                version.check(|index| words[index]),
                Ok(()),
                "page {page} write {count}"
            );
            let mut whole = [0; PAGE_WORDS];
            version.write_whole(|index, word| whole[index] = word);
            assert!(
                words == whole,
                "page {page} write {count} differs from the version written whole"
            );
        }
    }
}

#[test]
fn a_later_write_changes_about_an_eighth() {
    let recipe = Recipe::new(7, [0, 1, 1]);
    let mut words = [0; PAGE_WORDS];
    apply(&recipe, 3, 1, &mut words);
    for count in 2..=16 {
        let before = words;
        apply(&recipe, 3, count, &mut words);
        let changed = before
            .iter()
            .zip(&words)
            .filter(|(before, after)| before != after)
            .count();
        assert!(
            (50..=64).contains(&changed),
            "write {count} changed {changed} of 512 words"
        );
    }
}

#[test]
fn one_flipped_bit_anywhere_is_seen() {
    let recipe = Recipe::new(9, MIX);
    for kind in [Kind::Zero, Kind::Text, Kind::Random] {
        let page = (0..)
            .find(|&page| recipe.version(page, 1).kind == kind)
            .expect("the mix has every kind");
        let version = recipe.version(page, 5);
        let mut words = [0; PAGE_WORDS];
        version.write_whole(|index, word| words[index] = word);
        for index in 0..PAGE_WORDS {
            words[index] ^= 1 << (index % 64);
            let seen = version.check(|at| words[at]);
            words[index] ^= 1 << (index % 64);
            let wanted = if index < 8 { Fault::Stamp } else { Fault::Content };
            assert_eq!(
                seen,
                Err(wanted),
                "{} page, {} word {index}",
                kind.name(),
                wanted.name()
            );
        }
    }
}

#[test]
fn a_page_that_fell_back_to_an_earlier_version_is_seen() {
    let recipe = Recipe::new(11, [0, 1, 1]);
    let mut words = [0; PAGE_WORDS];
    for count in 1..=40 {
        apply(&recipe, 2, count, &mut words);
        assert!(
            recipe.version(2, count + 1).check(|index| words[index]).is_err(),
            "write {count}"
        );
        assert!(
            recipe.version(3, count).check(|index| words[index]).is_err(),
            "page 2 passed for page 3"
        );
    }
}

#[test]
fn the_mix_is_kept() {
    let recipe = Recipe::new(1, MIX);
    let mut seen = [0_u32; 3];
    for page in 0..100_000 {
        seen[recipe.version(page, 1).kind as usize] += 1;
    }
    for (seen, share) in seen.iter().zip(MIX) {
        assert!(
            seen.abs_diff(share * 1000) < 1000,
            "{seen} of 100000 for a share of {share} in 100"
        );
    }
    assert!((0..1000).all(|page| Recipe::new(1, [1, 0, 0]).version(page, 3).kind == Kind::Zero));
}

#[test]
fn churn_defaults_and_every_key() {
    let config = ChurnConfig::parse("").expect("an empty line is fine");
    assert_eq!(
        (config.mib, config.rate, config.mix, config.verify),
        (None, 1000, MIX, 1)
    );
    assert_eq!((config.heartbeat_ms, config.fill), (200, true));
    let config = ChurnConfig::parse(
        "mib=64 rate=0 mix=1:2:3 seed=9 verify=4 heartbeat_ms=50 fill=0 exit_after_beats=3 inject_bad=10 \
         inject_reg=2 tsc_khz=2400000",
    )
    .expect("every key is good");
    assert_eq!(
        (config.mib, config.rate, config.mix, config.seed),
        (Some(64), 0, [1, 2, 3], 9)
    );
    assert_eq!((config.verify, config.heartbeat_ms, config.fill), (4, 50, false));
    assert_eq!((config.exit_after_beats, config.inject_bad), (Some(3), Some(10)));
    assert_eq!((config.inject_reg, config.tsc_khz), (Some(2), Some(2_400_000)));
}

#[test]
fn words_meant_for_linux_are_passed_over() {
    let line = "console=ttyS0 reboot=k panic=1 virtio_mmio.device=4K@0xd0000000:5 quiet rate=5";
    assert_eq!(ChurnConfig::parse(line).expect("none of ours is bad").rate, 5);
    assert_eq!(
        TickerConfig::parse("console=ttyS0").expect("not ours").period_ms,
        100
    );
}

#[test]
fn a_bad_word_is_named() {
    for bad in [
        "rtae=5",
        "rate",
        "rate=",
        "rate=+5",
        "rate=-1",
        "rate=1x",
        "rate=99999999999999999999",
        "mib=0",
        "fill=2",
        "mix=1:2",
        "mix=1:2:3:4",
        "mix=0:0:0",
        "mix=a:b:c",
        "heartbeat_ms=0",
        "seed=0x1",
    ] {
        let line = format!("verify=1 {bad} seed=3");
        let error = ChurnConfig::parse(&line).expect_err(bad).to_string();
        assert!(error.contains(&format!("\"{bad}\"")), "{error}");
    }
    assert!(TickerConfig::parse("rate=5").is_err());
}

#[test]
fn time_neither_stalls_nor_bursts_when_the_tsc_jumps() {
    let mut timeline = Timeline::new(1000, 5_000_000); // 1 MHz: a cycle is a microsecond
    assert_eq!(timeline.observe(5_000_010), 10);
    assert_eq!(timeline.observe(17), 10, "a step back only moves the reference");
    assert_eq!(timeline.observe(20), 13);
    assert_eq!(timeline.observe(1_000_020), 1_000_013, "a second is still time");
    assert_eq!(timeline.observe(9_000_000_000), 1_000_013, "a long gap is not");
    assert_eq!(timeline.observe(u64::MAX - 1), 1_000_013);
    assert_eq!(
        timeline.observe(3),
        1_000_018,
        "a wrap of the counter is a step of 5"
    );
}

#[test]
fn missed_moments_are_dropped() {
    let mut every = Every::new(100, 0);
    assert!(every.is_due(0));
    assert!(!every.is_due(99));
    assert!(every.is_due(130));
    assert_eq!(every.next_us(), 200, "a late moment does not shift the series");
    assert!(every.is_due(1234));
    assert!(!every.is_due(1234));
    assert_eq!(every.next_us(), 1334);
}

#[test]
fn free_memory_is_whole_pages_above_the_image_in_any_order() {
    let ram = [
        Range {
            start: 4 * GIB,
            end: 5 * GIB + 100,
        },
        Range {
            start: 0,
            end: 0x9fc00,
        },
        Range {
            start: 0x10_0000,
            end: 0x80_0800,
        },
        Range {
            start: 0x70_0000,
            end: 0x80_1000,
        },
    ];
    let mut free = FreeMemory::new(&ram, 0x30_0000);
    assert_eq!(
        free.ranges(),
        [
            Range {
                start: 0x30_0000,
                end: 0x80_0000
            },
            Range {
                start: 0x80_0000,
                end: 0x80_1000
            },
            Range {
                start: 4 * GIB,
                end: 5 * GIB
            },
        ]
    );
    let first = (0x80_0000 - 0x30_0000) / PAGE_BYTES;
    assert_eq!(free.pages(), first + 1 + GIB / PAGE_BYTES);
    assert_eq!(free.address(first + 1), Some(4 * GIB));
    assert_eq!(free.address(free.pages()), None);
    assert!(free.reaches(0) && !free.reaches(1) && free.reaches(4) && !free.reaches(5));
    assert_eq!(free.take(2), Some(0x30_0000));
    assert_eq!(free.address(0), Some(0x30_2000));
    assert_eq!(
        free.take(first),
        Some(4 * GIB),
        "what does not fit the first range comes from the next"
    );
}

#[test]
fn the_registers_step_as_their_closed_form_says() {
    let avx = std::arch::is_x86_feature_detected!("avx");
    for avx in [false, avx] {
        for loops in [1, 2, 3, 4, 5, 7, 8, 9, 100, 1001] {
            let before = Registers::new(loops);
            let wanted = before.after(avx, 2 * loops);
            assert!(wanted != before);
            let mut found = before;
            // No idle: its port belongs to a guest.
            found.run(avx, loops, 0);
            let mut wrong: Vec<Name> = Vec::new();
            found.differences(&wanted, |name| wrong.push(name));
            assert!(wrong.is_empty(), "avx {avx} loops {loops}: {wrong:?}");
        }
    }
}

#[test]
fn every_wrong_register_is_named() {
    let wanted = Registers::new(1);
    let mut names = Vec::new();
    Registers::new(2).differences(&wanted, |name| names.push(name.to_string()));
    for name in ["rax", "r15", "xmm0", "ymm15", "st0", "st7"] {
        assert!(
            names.iter().any(|found| found == name),
            "{name} is missing from {names:?}"
        );
    }
    assert_eq!(names.len(), 15 + 16 + 16 + 8, "each register once: {names:?}");
    // One bit of one word, whichever: a register is compared whole.
    let named = |spoil: &dyn Fn(&mut Registers)| {
        let (mut wrong, mut names) = (wanted.clone(), Vec::new());
        spoil(&mut wrong);
        wrong.differences(&wanted, |name| names.push(name));
        names
    };
    for (at, word) in (0..16).flat_map(|at| (0..4).map(move |word| (at, word))) {
        let half = [Name::Lower(at), Name::Lower(at), Name::Upper(at), Name::Upper(at)][word];
        assert_eq!(named(&|wrong| wrong.vector[at][word] ^= 1), [half], "word {word}");
    }
    for at in 0..15 {
        assert_eq!(named(&|wrong| wrong.general[at] ^= 1 << 63), [Name::General(at)]);
    }
    for at in 0..8 {
        assert_eq!(named(&|wrong| wrong.x87[at] ^= 1), [Name::X87(at)]);
    }
    // Its lowest six bits say what has happened, and may be anything.
    for (bit, names) in [(5, vec![]), (6, vec![Name::Mxcsr]), (15, vec![Name::Mxcsr])] {
        assert_eq!(named(&|wrong| wrong.mxcsr ^= 1 << bit), names, "bit {bit}");
    }
    assert_eq!(named(&|wrong| wrong.x87_control ^= 1), [Name::X87Control]);
    let mut flipped = wanted.clone();
    flipped.flip_a_bit();
    flipped.differences(&wanted, |name| assert_eq!(name, Name::General(3)));
}
