//! `torture`: many things at once that a restore could break, each checking itself. A static Linux program.
//!
//! ```text
//! torture all|disk|memory|registers|timers|tcp|ping|time|dmesg|entropy.. [key=value..]   in the guest
//! torture peer listen=ADDRESS:PORT [seconds=N]                                       on the host: the stream's other end
//! torture check file=FILE                                                            on the host: a disk's records
//! ```
//!
//! `all` is every worker whose keys are given: `disk` needs `file=`, `tcp` needs `peer=`, `ping` needs `ping=`, `time` needs `time=`.
//!
//! | Key | Meaning |
//! |---|---|
//! | `seconds=N` | end after N seconds; for ever when not given |
//! | `beat_ms=N` | milliseconds between heartbeats, 1000 |
//! | `stuck_s=N` | a worker that does nothing for so long is a finding, 60 |
//! | `file=PATH`, `records=N` | the disk worker's file and its size in records of 4 KiB, 4096 |
//! | `mib=N` | the memory worker's MiB, 32 |
//! | `late_ms=N` | a timer later than this is a finding, 10000 |
//! | `peer=ADDRESS:PORT`, `ping=ADDRESS` | the other ends of the network |
//! | `time=ADDRESS:PORT`, `time_ms=N` | the peer whose clock ours is compared with; to be further off than at first is a finding, 50 |
//! | `seed=N` | of all content, 1 |
//!
//! Every heartbeat is a line of the clocks and one of each worker, with running totals:
//!
//! ```text
//! torture clock beat=7 wall_ms=1795512094123 mono_ms=9120 source=kvm-clock bad=0
//! torture disk beat=7 synced=812 verified=4410
//! ```
//!
//! A finding is a line `BAD <worker> <what>`. The end is `torture done bad=N`, with status 1 when N is not 0.

mod disk;
mod kernel;
mod memory;
mod net;
mod processors;
mod work;

#[path = "../../guests/content.rs"]
#[allow(dead_code)] // Shared with the bare-metal guests, which use all of it.
mod content;
#[path = "../../guests/port.rs"]
#[allow(dead_code)]
mod port;
#[path = "../../guests/registers.rs"]
#[allow(dead_code)]
mod registers;

use std::process::ExitCode;
use std::thread;

use work::{Keys, say};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(what) = arguments.next() else {
        eprintln!(
            "usage: torture all|disk|memory|registers|timers|tcp|ping|time|dmesg|entropy|peer|check [key=value..]"
        );
        return ExitCode::from(2);
    };
    let keys = match Keys::parse(arguments) {
        Ok(keys) => keys,
        Err(error) => {
            eprintln!("torture: {error}");
            return ExitCode::from(2);
        }
    };
    match what.as_str() {
        "peer" => net::peer(&keys),
        "check" => return disk::check(&keys),
        _ => {}
    }
    let names: &[&str] = match what.as_str() {
        "all" => &[
            "disk",
            "memory",
            "registers",
            "timers",
            "tcp",
            "ping",
            "time",
            "dmesg",
            "entropy",
        ],
        _ => &[what.as_str()],
    };
    for name in names {
        let keys = keys.clone();
        match *name {
            "disk" if keys.file.is_some() => drop(thread::spawn(move || disk::work(&keys))),
            "tcp" if keys.peer.is_some() => drop(thread::spawn(move || net::tcp(&keys))),
            "ping" if keys.ping.is_some() => drop(thread::spawn(move || net::ping(&keys))),
            "time" if keys.time.is_some() => drop(thread::spawn(move || net::time(&keys))),
            "disk" | "tcp" | "ping" | "time" if what == "all" => {}
            "memory" => drop(thread::spawn(move || memory::work(&keys))),
            "registers" => processors::registers(&keys),
            "timers" => processors::timers(&keys),
            "dmesg" => drop(thread::spawn(kernel::dmesg)),
            "entropy" => drop(thread::spawn(kernel::entropy)),
            "peer" => {}
            _ => {
                eprintln!("torture: {what} is unknown or lacks its key (file=, peer=, ping=, time=)");
                return ExitCode::from(2);
            }
        }
    }
    let bad = work::watch(&keys);
    say(format_args!("torture done bad={bad}"));
    ExitCode::from(u8::from(bad != 0))
}
