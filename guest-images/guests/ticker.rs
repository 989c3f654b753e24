//! `ticker`: prints a numbered line at a fixed period, so that a test sees at a glance whether a guest runs,
//! stood still, lost time or went back to an earlier state.
//!
//! Command line: `period_ms=` (100), `exit_after_ticks=`, `reset_after_ticks=`, `tsc_khz=`; see `cmdline.rs`.
//! Output: `ticker up`, then `tick 0`, `tick 1` and so on, never two at once to make up for lost time.

#![no_std]
#![no_main]

mod clock;
#[allow(dead_code, reason = "shared with churn, which uses the rest")]
mod cmdline;
#[allow(dead_code, reason = "shared with churn, which uses the rest")]
mod content;
#[allow(dead_code, reason = "shared with churn, which uses the rest")]
mod layout;
mod port;
#[allow(dead_code, reason = "shared with churn, which uses the rest")]
mod pvh;
#[allow(dead_code, reason = "shared with churn, which uses the rest")]
mod rt;
mod serial;
mod tsc;

use clock::Every;
use cmdline::TickerConfig;
use serial::{Serial, say};

#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    let mut serial = Serial::new();
    let boot = match pvh::Boot::read(start_info) {
        Ok(boot) => boot,
        Err(error) => {
            say!(serial, "ticker: ERROR {}", error.text());
            port::stop()
        }
    };
    match TickerConfig::parse(boot.command_line()) {
        Ok(config) => run(&mut serial, &config),
        Err(error) => say!(serial, "ticker: ERROR {error}"),
    }
    port::stop()
}

fn run(serial: &mut Serial, config: &TickerConfig) {
    say!(serial, "ticker up");
    let mut clock = tsc::Clock::new(config.tsc_khz);
    let mut tick = Every::new(config.period_ms * 1000, clock.now_us());
    let mut ticks: u64 = 0;
    loop {
        if tick.is_due(clock.now_us()) {
            say!(serial, "tick {ticks}");
            ticks += 1;
            if config.reset_after_ticks == Some(ticks) {
                say!(serial, "reset");
                port::reset()
            }
            if config.exit_after_ticks == Some(ticks) {
                say!(serial, "done");
                return;
            }
        }
        clock.wait_until(tick.next_us());
    }
}
