//! The guests' command lines: words `key=value`, separated by blanks.
//!
//! Strict where it helps: an unknown key, a missing value or a number that does not parse stops the guest with
//! a message, so that a typing error in a test is not taken for a default. Words that monitors and boot
//! loaders add for Linux are passed over: any key with a dot in it, and those in [`FOREIGN`]. The last of
//! several words with the same key counts.

use core::fmt;

/// Kernel parameters that are not ours and not errors.
const FOREIGN: [&str; 15] = [
    "acpi",
    "console",
    "earlycon",
    "earlyprintk",
    "i8042",
    "init",
    "nomodules",
    "panic",
    "pci",
    "quiet",
    "reboot",
    "ro",
    "root",
    "rootflags",
    "rw",
];

/// Longest period either guest accepts: an hour.
const MAX_PERIOD_MS: u64 = 3_600_000;

/// What `ticker` was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TickerConfig {
    /// `period_ms=`: time between ticks.
    pub(crate) period_ms: u64,
    /// `exit_after_ticks=`: stop after so many.
    pub(crate) exit_after_ticks: Option<u64>,
    /// `reset_after_ticks=`: reset the machine after so many.
    pub(crate) reset_after_ticks: Option<u64>,
    /// `tsc_khz=`: the frequency of the TSC.
    pub(crate) tsc_khz: Option<u64>,
}

/// What `churn` was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChurnConfig {
    /// `mib=`: memory to work on. All there is when absent.
    pub(crate) mib: Option<u64>,
    /// `rate=`: pages to write per second, 0 for as many as possible.
    pub(crate) rate: u64,
    /// `mix=Z:T:R`: shares of zero, text-like and random pages.
    pub(crate) mix: [u32; 3],
    /// `seed=`: of content and order.
    pub(crate) seed: u64,
    /// `verify=`: pages that the round-robin check advances per page written.
    pub(crate) verify: u64,
    /// `heartbeat_ms=`: time between heartbeat lines.
    pub(crate) heartbeat_ms: u64,
    /// `fill=`: write every page once before pacing starts.
    pub(crate) fill: bool,
    /// `exit_after_beats=`: stop after so many heartbeats, not counting those during the fill.
    pub(crate) exit_after_beats: Option<u64>,
    /// `inject_bad=`: self-test, flip a bit of a page after so many page writes.
    pub(crate) inject_bad: Option<u64>,
    /// `inject_reg=`: self-test, flip a bit of a register in this register check (from 1).
    pub(crate) inject_reg: Option<u64>,
    /// `tsc_khz=`: the frequency of the TSC.
    pub(crate) tsc_khz: Option<u64>,
}

/// A word of the command line that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadWord<'a> {
    word: &'a str,
    wanted: &'static str,
}

impl fmt::Display for BadWord<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "bad word \"{}\" on the command line: {}",
            self.word, self.wanted
        )
    }
}

impl TickerConfig {
    pub(crate) fn parse(line: &str) -> Result<Self, BadWord<'_>> {
        let mut config = Self {
            period_ms: 100,
            exit_after_ticks: None,
            reset_after_ticks: None,
            tsc_khz: None,
        };
        for word in own_words(line) {
            match word.key {
                "period_ms" => config.period_ms = word.number(1, MAX_PERIOD_MS)?,
                "exit_after_ticks" => config.exit_after_ticks = Some(word.number(1, u64::MAX)?),
                "reset_after_ticks" => config.reset_after_ticks = Some(word.number(1, u64::MAX)?),
                "tsc_khz" => config.tsc_khz = Some(word.number(1000, 100_000_000)?),
                _ => {
                    return Err(
                        word.bad("ticker knows period_ms, exit_after_ticks, reset_after_ticks, tsc_khz")
                    );
                }
            }
        }
        Ok(config)
    }
}

impl ChurnConfig {
    pub(crate) fn parse(line: &str) -> Result<Self, BadWord<'_>> {
        let mut config = Self {
            mib: None,
            rate: 1000,
            mix: [20, 50, 30],
            seed: 1,
            verify: 1,
            heartbeat_ms: 200,
            fill: true,
            exit_after_beats: None,
            inject_bad: None,
            inject_reg: None,
            tsc_khz: None,
        };
        for word in own_words(line) {
            match word.key {
                "mib" => config.mib = Some(word.number(1, 1 << 20)?),
                "rate" => config.rate = word.number(0, 100_000_000)?,
                "mix" => config.mix = word.mix()?,
                "seed" => config.seed = word.number(0, u64::MAX)?,
                "verify" => config.verify = word.number(0, 1_000_000)?,
                "heartbeat_ms" => config.heartbeat_ms = word.number(1, MAX_PERIOD_MS)?,
                "fill" => config.fill = word.number(0, 1)? == 1,
                "exit_after_beats" => config.exit_after_beats = Some(word.number(1, u64::MAX)?),
                "inject_bad" => config.inject_bad = Some(word.number(1, u64::MAX)?),
                "inject_reg" => config.inject_reg = Some(word.number(1, u64::MAX)?),
                "tsc_khz" => config.tsc_khz = Some(word.number(1000, 100_000_000)?),
                _ => {
                    return Err(word.bad(
                        "churn knows mib, rate, mix, seed, verify, heartbeat_ms, fill, \
                         exit_after_beats, inject_bad, inject_reg, tsc_khz",
                    ));
                }
            }
        }
        Ok(config)
    }
}

#[derive(Clone, Copy)]
struct Word<'a> {
    whole: &'a str,
    key: &'a str,
    value: Option<&'a str>,
}

fn own_words(line: &str) -> impl Iterator<Item = Word<'_>> {
    line.split_ascii_whitespace()
        .map(|whole| match whole.split_once('=') {
            Some((key, value)) => Word {
                whole,
                key,
                value: Some(value),
            },
            None => Word {
                whole,
                key: whole,
                value: None,
            },
        })
        .filter(|word| !word.key.contains('.') && !FOREIGN.contains(&word.key))
}

impl<'a> Word<'a> {
    fn bad(self, wanted: &'static str) -> BadWord<'a> {
        BadWord {
            word: self.whole,
            wanted,
        }
    }

    fn number(self, least: u64, most: u64) -> Result<u64, BadWord<'a>> {
        match self.value.and_then(decimal) {
            Some(number) if (least..=most).contains(&number) => Ok(number),
            Some(_) => Err(self.bad("the number is out of range")),
            None => Err(self.bad("a decimal number is wanted")),
        }
    }

    fn mix(self) -> Result<[u32; 3], BadWord<'a>> {
        const WANTED: &str = "three shares Z:T:R are wanted, each at most 1000000, not all zero";
        let mut shares = [0; 3];
        let mut parts = self.value.unwrap_or_default().split(':');
        for share in &mut shares {
            match parts.next().and_then(decimal) {
                Some(number @ 0..=1_000_000) => *share = number as u32,
                _ => return Err(self.bad(WANTED)),
            }
        }
        if parts.next().is_some() || shares == [0; 3] {
            return Err(self.bad(WANTED));
        }
        Ok(shares)
    }
}

/// Digits only: `u64::from_str` would take a leading plus sign too.
fn decimal(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}
