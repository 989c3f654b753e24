//! What the kernel says: its log, its clocks, its random numbers.

use std::fs::File;
use std::io::Read;
use std::thread;
use std::time::Duration;

use crate::work::{Worker, say};

/// Words that a healthy kernel does not say.
const TROUBLE: [&str; 15] = [
    "rcu: INFO",
    "detected stalls",
    "self-detected stall",
    "soft lockup",
    "hard LOCKUP",
    "WARNING: CPU:",
    "BUG:",
    "Oops",
    "general protection",
    "invalid opcode",
    "blocked for more than",
    "I/O error",
    "EXT4-fs error",
    "unstable because the skew",
    "nobody cared",
];
/// Words about a new generation of the machine, which the host wants to see.
const GENERATION: [&str; 2] = ["vmgenid", "virtual machine fork"];

const CLOCK_REALTIME: i32 = 0;
const CLOCK_MONOTONIC: i32 = 1;

#[repr(C)]
struct Time {
    seconds: i64,
    nanoseconds: i64,
}

unsafe extern "C" {
    fn clock_gettime(clock: i32, time: *mut Time) -> i32;
}

/// Wall clock and monotonic time, in milliseconds.
pub fn clock_ms() -> (i64, i64) {
    let read = |clock| {
        let mut time = Time {
            seconds: 0,
            nanoseconds: 0,
        };
        // SAFETY: the kernel writes one `timespec`, which `Time` is on this platform.
        unsafe { clock_gettime(clock, &raw mut time) };
        time.seconds * 1000 + time.nanoseconds / 1_000_000
    };
    (read(CLOCK_REALTIME), read(CLOCK_MONOTONIC))
}

/// The clock source in use, `-` when the kernel does not say.
pub fn clocksource() -> String {
    let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    std::fs::read_to_string(path).map_or_else(|_| "-".into(), |name| name.trim().to_owned())
}

/// Watches the kernel's log, from its beginning. Nothing need come: it shows that it lives by itself.
pub fn dmesg() {
    let worker = Worker::begin("dmesg", &["alive", "lines"]);
    let alive = std::sync::Arc::clone(&worker);
    thread::spawn(move || {
        loop {
            alive.add(0, 1);
            thread::sleep(Duration::from_secs(1));
        }
    });
    let mut log = match File::open("/dev/kmsg") {
        Ok(log) => log,
        Err(error) => return worker.bad(format_args!("cannot open /dev/kmsg: {error}")),
    };
    // A read gives one record: "priority,number,time,flags;text".
    let mut record = vec![0; 8192];
    loop {
        let Ok(count) = log.read(&mut record) else {
            // Records were overwritten before they were read: the next read goes on behind them.
            continue;
        };
        worker.add(1, 1);
        let record = String::from_utf8_lossy(&record[..count]);
        let text = record.split_once(';').map_or(&*record, |(_, text)| text);
        let text = text.lines().next().unwrap_or_default();
        if TROUBLE.iter().any(|trouble| text.contains(trouble)) {
            worker.bad(format_args!("{text}"));
        }
        if GENERATION.iter().any(|word| text.contains(word)) {
            say(format_args!("torture generation {text}"));
        }
    }
}

/// Random numbers, which two machines from one checkpoint must not share: a line each ten seconds.
pub fn entropy() {
    let worker = Worker::begin("entropy", &["drawn"]);
    loop {
        let mut bytes = [0; 16];
        match File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes)) {
            Ok(()) => say(format_args!("torture random {:032x}", u128::from_be_bytes(bytes))),
            Err(error) => worker.bad(format_args!("/dev/urandom: {error}")),
        }
        worker.add(0, 1);
        thread::sleep(Duration::from_secs(10));
    }
}
