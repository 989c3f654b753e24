//! `churn`: writes memory at a given rate and never stops checking that everything it wrote, and everything it
//! keeps in registers, is still what it should be. It is the witness that a checkpoint restored on another
//! host lost nothing: it simply goes on running there, and its own expectations go with it.
//!
//! Command line: see `cmdline.rs`. Output, one line each:
//! ```text
//! churn up mib=<m> pages=<n> rate=<r> mix=<z:t:r> avx=<0|1>
//! churn filled pages=<n>
//! churn beat=<n> writes=<page writes> verified=<pages> bad=<n> regs=<register checks> passes=<n> up_ms=<n>
//! BAD page=<n> write=<count> kind=<kind> why=<stamp|content>
//! BAD reg=<name>
//! ```
//!
//! Memory: the free RAM above the image holds page directories (if the guest has more than 1 GiB), then the
//! expectation table (for each page 30 bits of write count and 2 bits of kind), then the pages.
//!
//! What is checked when (`verify=0` turns the first two off):
//! - the old content of a page, before it is overwritten, so that no loss is painted over;
//! - pages in order, `verify` of them per page written;
//! - pages in order, some at each heartbeat, so that every page has its turn even when nothing is written;
//! - the registers, at each idle, or every [`BUSY_CHECK_US`] where there is no idle.
//!
//! A bad page is counted and reported once: the right content is put back. At most [`MAX_BAD_LINES`] of these
//! lines appear per heartbeat, as the serial line is slow; `bad` counts them all.

#![no_std]
#![no_main]

mod clock;
#[allow(dead_code, reason = "shared with ticker, which uses the rest")]
mod cmdline;
mod content;
mod layout;
mod memory;
mod port;
mod pvh;
mod registers;
mod rt;
mod serial;
#[allow(dead_code, reason = "shared with ticker, which uses the rest")]
mod tsc;

use clock::Every;
use cmdline::ChurnConfig;
use content::{PAGE_BYTES, PAGE_WORDS, Recipe, Version, mix64};
use layout::FreeMemory;
use registers::Registers;
use serial::{Serial, say};
use tsc::Clock;

const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;
/// Free pages left alone when `mib=` is absent.
const MARGIN_PAGES: u64 = 16;

/// Pages written between two looks at the clock.
const BATCH: u64 = 16;
/// Shortest idle: at high rates pages are written in bursts this far apart.
const MIN_IDLE_US: u64 = 2000;
/// Time between register checks when there is no idle.
const BUSY_CHECK_US: u64 = 10_000;
/// How long each half of a register check shall last.
const STRETCH_US: u64 = 200;

/// The length of the trial, in steps.
const TRIAL_STEPS: u64 = 256;

/// Pages checked at each heartbeat: a 64th of all, within these bounds.
const BEAT_PAGES: core::ops::RangeInclusive<u64> = 64..=4096;

const MAX_BAD_LINES: u64 = 16;

#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    let mut serial = Serial::new();
    let boot = match pvh::Boot::read(start_info) {
        Ok(boot) => boot,
        Err(error) => {
            say!(serial, "churn: ERROR {}", error.text());
            port::stop()
        }
    };
    let config = match ChurnConfig::parse(boot.command_line()) {
        Ok(config) => config,
        Err(error) => {
            say!(serial, "churn: ERROR {error}");
            port::stop()
        }
    };
    if let Some(pages) = Pages::set_up(&mut serial, &boot, &config) {
        // Before the clock is made: finding the frequency of the TSC may take a while.
        announce(&mut serial, &config, pages.count);
        Churn::new(serial, config, pages).run();
    }
    port::stop()
}

fn announce(serial: &mut Serial, config: &ChurnConfig, pages: u64) {
    let ChurnConfig {
        rate,
        mix: [zero, text, random],
        ..
    } = *config;
    let (mib, avx) = (pages / PAGES_PER_MIB, u8::from(has_avx()));
    say!(
        serial,
        "churn up mib={mib} pages={pages} rate={rate} mix={zero}:{text}:{random} avx={avx}"
    );
}

/// `entry.s` enabled AVX under the same condition.
fn has_avx() -> bool {
    const XSAVE_AND_AVX: u32 = 1 << 26 | 1 << 28;
    rt::cpuid(1).ecx & XSAVE_AND_AVX == XSAVE_AND_AVX
}

/// The pages worked on, and what each of them must hold.
struct Pages {
    count: u64,
    /// Address of the expectation table, one 32-bit entry a page: write count, and kind in the top two bits.
    table: u64,
    free: FreeMemory,
    recipe: Recipe,
}

impl Pages {
    const KIND_SHIFT: u32 = 30;
    const MAX_COUNT: u32 = (1 << Self::KIND_SHIFT) - 1;

    /// Finds and maps the memory, and says why not if that fails.
    fn set_up(serial: &mut Serial, boot: &pvh::Boot, config: &ChurnConfig) -> Option<Self> {
        let mut free = FreeMemory::new(boot.ram(), rt::end_of_image());
        if memory::map(&mut free).is_none() {
            say!(serial, "churn: ERROR no room below 1 GiB for page directories");
            return None;
        }
        // Every page costs itself and four bytes of the table.
        let usable = free.pages().saturating_sub(MARGIN_PAGES) * PAGE_BYTES / (PAGE_BYTES + 4);
        let count = config.mib.map_or(usable, |mib| mib * PAGES_PER_MIB);
        if count > usable || count == 0 {
            let (mib, most) = (config.mib.unwrap_or(0), usable / PAGES_PER_MIB);
            say!(
                serial,
                "churn: ERROR mib={mib} asks for more than the {most} MiB usable"
            );
            return None;
        }
        let table_pages = (count * 4).div_ceil(PAGE_BYTES);
        let Some(table) = free.take(table_pages) else {
            say!(
                serial,
                "churn: ERROR no {table_pages} contiguous pages for the table"
            );
            return None;
        };
        for word in 0..table_pages * PAGE_WORDS as u64 {
            memory::store(table + word * 8, 0);
        }
        Some(Self {
            count,
            table,
            free,
            recipe: Recipe::new(config.seed, config.mix),
        })
    }

    fn address(&self, page: u64) -> u64 {
        match self.free.address(page) {
            Some(address) => address,
            None => panic!("page {page} of {} lies outside of the free memory", self.count),
        }
    }

    /// What `page` must hold, and whether the table's own entry is sound. None if never written.
    fn expected(&self, page: u64) -> Option<(Version, bool)> {
        let entry = memory::load32(self.table + page * 4);
        let (count, kind) = (entry & Self::MAX_COUNT, entry >> Self::KIND_SHIFT);
        if count == 0 {
            return None;
        }
        let version = self.recipe.version(page, count);
        Some((version, version.kind as u32 == kind))
    }

    fn check(&self, page: u64, version: &Version, entry_is_sound: bool) -> Result<(), content::Fault> {
        let address = self.address(page);
        version.check(|index| memory::load(address + index as u64 * 8))?;
        if entry_is_sound {
            Ok(())
        } else {
            Err(content::Fault::Stamp)
        }
    }

    /// Writes the next version of `page` and then its table entry.
    fn advance(&self, page: u64) {
        let count = memory::load32(self.table + page * 4) & Self::MAX_COUNT;
        // After 2^30 writes the count starts again; the generation that begins there is written whole.
        let count = if count == Self::MAX_COUNT { 1 } else { count + 1 };
        let version = self.recipe.version(page, count);
        self.put(page, version.kind, count, |store| version.write(store));
    }

    /// Puts back what `version` should have left.
    fn repair(&self, page: u64, version: &Version) {
        self.put(page, version.kind, version.count(), |store| {
            version.write_whole(store)
        });
    }

    fn put(
        &self,
        page: u64,
        kind: content::Kind,
        count: u32,
        write: impl FnOnce(&mut dyn FnMut(usize, u64)),
    ) {
        let address = self.address(page);
        write(&mut |index, word| memory::store(address + index as u64 * 8, word));
        memory::store32(self.table + page * 4, count | (kind as u32) << Self::KIND_SHIFT);
    }

    /// Self-test: flips one bit in the middle of `page`.
    fn spoil(&self, page: u64) {
        let address = self.address(page) + PAGE_BYTES / 2;
        memory::store(address, memory::load(address) ^ 1 << 17);
    }
}

/// How many pages are due at a given rate. Never more than a second's worth.
struct Pace {
    rate: u64,
    last_us: u64,
    /// Millionths of a page.
    owed: u64,
}

impl Pace {
    const PAGE: u64 = 1_000_000;

    fn update(&mut self, now_us: u64) {
        self.owed = (self.owed + (now_us - self.last_us) * self.rate).min(self.rate * 1_000_000);
        self.last_us = now_us;
    }

    /// Pages to write now, at most a batch; without a rate always a whole batch.
    fn take(&mut self) -> u64 {
        if self.rate == 0 {
            return BATCH;
        }
        let pages = (self.owed / Self::PAGE).min(BATCH);
        self.owed -= pages * Self::PAGE;
        pages
    }

    /// Microseconds until a page is due, None while one is.
    fn idle_us(&self) -> Option<u64> {
        if self.rate == 0 || self.owed >= Self::PAGE {
            return None;
        }
        Some((Self::PAGE - self.owed).div_ceil(self.rate).max(MIN_IDLE_US))
    }
}

struct Churn {
    serial: Serial,
    config: ChurnConfig,
    pages: Pages,
    clock: Clock,
    avx: bool,
    /// Steps in half a register check.
    loops: u64,
    beat: Every,
    beats: u64,
    writes: u64,
    verified: u64,
    bad: u64,
    register_checks: u64,
    next_register_check_us: u64,
    passes: u64,
    /// The next page of the round-robin check.
    cursor: u64,
    /// State of the pseudo-random order of writes.
    order: u64,
    bad_lines: u64,
}

impl Churn {
    fn new(serial: Serial, config: ChurnConfig, pages: Pages) -> Self {
        let mut clock = Clock::new(config.tsc_khz);
        let beat = Every::new(config.heartbeat_ms * 1000, clock.now_us());
        Self {
            serial,
            config,
            pages,
            clock,
            avx: has_avx(),
            loops: TRIAL_STEPS,
            beat,
            beats: 0,
            writes: 0,
            verified: 0,
            bad: 0,
            register_checks: 0,
            next_register_check_us: 0,
            passes: 0,
            cursor: 0,
            order: mix64(config.seed),
            bad_lines: 0,
        }
    }

    fn run(&mut self) {
        self.measure_stretch();
        if self.config.fill {
            self.fill();
        }
        let first_counted = self.beats;
        let mut pace = Pace {
            rate: self.config.rate,
            last_us: self.clock.now_us(),
            owed: 0,
        };
        loop {
            let now_us = self.clock.now_us();
            if self.beat.is_due(now_us) {
                self.heartbeat(now_us);
                if self.config.exit_after_beats == Some(self.beats - first_counted) {
                    say!(self.serial, "done");
                    return;
                }
            }
            pace.update(now_us);
            for _ in 0..pace.take() {
                self.write_some_page();
            }
            match pace.idle_us() {
                Some(idle_us) => {
                    let until_beat_us = self.beat.next_us().saturating_sub(now_us).max(1);
                    self.check_registers(idle_us.min(until_beat_us));
                }
                None if now_us >= self.next_register_check_us => {
                    self.check_registers(0);
                    self.next_register_check_us = now_us + BUSY_CHECK_US;
                }
                None => {}
            }
        }
    }

    /// Writes every page once, in order, as fast as it goes.
    fn fill(&mut self) {
        for page in 0..self.pages.count {
            self.write(page);
            if page % BATCH == 0 {
                let now_us = self.clock.now_us();
                if self.beat.is_due(now_us) {
                    self.heartbeat(now_us);
                }
            }
        }
        say!(self.serial, "churn filled pages={}", self.pages.count);
    }

    fn write_some_page(&mut self) {
        self.order = self
            .order
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let page = (u128::from(mix64(self.order)) * u128::from(self.pages.count)) >> 64;
        if self.config.verify > 0 {
            self.verify(page as u64);
        }
        self.write(page as u64);
        self.verify_in_order(self.config.verify);
    }

    fn write(&mut self, page: u64) {
        self.pages.advance(page);
        self.writes += 1;
        if self.config.inject_bad == Some(self.writes) {
            self.pages.spoil(page);
        }
    }

    fn verify_in_order(&mut self, pages: u64) {
        for _ in 0..pages {
            self.verify(self.cursor);
            self.cursor += 1;
            if self.cursor == self.pages.count {
                self.cursor = 0;
                self.passes += 1;
            }
        }
    }

    /// Checks `page`, unless it was never written. Reports and repairs it if it is bad.
    fn verify(&mut self, page: u64) {
        let Some((version, entry_is_sound)) = self.pages.expected(page) else {
            return;
        };
        self.verified += 1;
        if let Err(fault) = self.pages.check(page, &version, entry_is_sound) {
            self.count_bad(format_args!(
                "page={page} write={} kind={} why={}",
                version.count(),
                version.kind.name(),
                fault.name()
            ));
            self.pages.repair(page, &version);
        }
    }

    /// One stretch of register work with an idle of `idle_us` in its middle.
    fn check_registers(&mut self, idle_us: u64) {
        self.register_checks += 1;
        let before = Registers::new(self.config.seed ^ self.register_checks);
        let wanted = before.after(self.avx, 2 * self.loops);
        let mut found = before;
        found.run(self.avx, self.loops, idle_us);
        if self.config.inject_reg == Some(self.register_checks) {
            found.flip_a_bit();
        }
        found.differences(&wanted, |name| self.count_bad(format_args!("reg={name}")));
    }

    /// Chooses the length of the register check by trying one, after one that warms up (an emulator translates
    /// the code the first time).
    fn measure_stretch(&mut self) {
        self.check_registers(0);
        let start_us = self.clock.now_us();
        self.check_registers(0);
        let took_us = (self.clock.now_us() - start_us).max(1);
        self.loops = (2 * self.loops * STRETCH_US / took_us).clamp(16, 1 << 16);
    }

    fn count_bad(&mut self, what: core::fmt::Arguments<'_>) {
        self.bad += 1;
        self.bad_lines += 1;
        if self.bad_lines <= MAX_BAD_LINES {
            say!(self.serial, "BAD {what}");
        }
    }

    fn heartbeat(&mut self, now_us: u64) {
        self.verify_in_order((self.pages.count / 64).clamp(*BEAT_PAGES.start(), *BEAT_PAGES.end()));
        let Self {
            beats,
            writes,
            verified,
            bad,
            register_checks: regs,
            passes,
            ..
        } = *self;
        let up_ms = now_us / 1000;
        say!(
            self.serial,
            "churn beat={beats} writes={writes} verified={verified} bad={bad} regs={regs} passes={passes} \
             up_ms={up_ms}"
        );
        self.beats += 1;
        self.bad_lines = 0;
    }
}
