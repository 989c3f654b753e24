//! `scripts/bench`: the rows of MEASURE.md, each beside what the machine itself would allow.
//!
//! ```text
//! Bench (one of BENCHES) --measure(&Lab)--> Vec<Row> --> table, JSON
//!        real guests on /dev/kvm, in this process; real binaries where the row is about a process
//! ```
//!
//! Invariants: guest memory is touched before it is timed; a row's limit is measured in the same run, next to it;
//! a row that cannot be measured is an error and never a number.
//!
//! What it never does: it does not judge. A missed target is shown and is no failure of the run.

mod capture;
mod cpu;
mod encode;
mod failover;
mod guest;
mod hot;
mod lab;
mod limits;
mod overhead;
mod pages;
mod process;
mod recover;
mod replicate;
mod restore;
pub mod row;
mod scale;
mod ship;
pub mod stats;
mod store;
mod table;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use lab::Lab;
use row::Row;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Rows to measure, by name or by the first words of it (`capture`, `capture.delta`) [default: all].
    #[arg(value_name = "ROW")]
    pub rows: Vec<String>,
    /// Write the rows to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Fewer samples and smaller guests: whether it works, not how fast it is.
    #[arg(long)]
    pub quick: bool,
    /// Only name the rows.
    #[arg(long)]
    pub list: bool,
    /// Where segments are written; it decides which disk is measured [default: a new folder in the temporary one].
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
}

/// One measurement, which may give several rows.
struct Bench {
    /// The rows it gives.
    rows: &'static [&'static str],
    about: &'static str,
    measure: fn(&Lab) -> Result<Vec<Row>>,
}

static BENCHES: &[Bench] = &[
    Bench {
        rows: &["capture.delta.stop_us"],
        about: "guest stopped for a delta, 100 times a second, at 1,000 and 10,000 page writes a second",
        measure: capture::delta,
    },
    Bench {
        rows: &["capture.full.stop_us", "capture.full.finish"],
        about: "guest stopped for a full checkpoint, and touched memory a second until it is stored",
        measure: capture::full,
    },
    Bench {
        rows: &["capture.overhead"],
        about: "a busy guest's work lost at 10 and at 40 epochs a second, 1,000 page writes a second",
        measure: overhead::measure,
    },
    Bench {
        rows: &["capture.rate"],
        about: "epochs a second committed by one holder, a checkpoint every 4 ms",
        measure: replicate::measure,
    },
    Bench {
        rows: &["encode.rate", "encode.rate.zero"],
        about: "page bytes a second that one core encodes",
        measure: encode::rate,
    },
    Bench {
        rows: &["encode.ratio"],
        about: "bytes of a segment for each byte of its dirty pages, when each is written again",
        measure: encode::ratio,
    },
    Bench {
        rows: &["ship.rate"],
        about: "segment bytes a second to one holder, until it has them on its disk",
        measure: ship::measure,
    },
    Bench {
        rows: &["ship.cpu_ratio"],
        about: "CPU of an owner's process that ships to three holders, over that of one that ships to one",
        measure: cpu::measure,
    },
    Bench {
        rows: &["restore.cold.rate"],
        about: "guest memory a second from a compressed chain of 10, until all of it is resident",
        measure: restore::measure,
    },
    Bench {
        rows: &["restore.hot.ready_ms"],
        about: "`vmm restore --image` to the guest's first output, from an image of 128 MiB and of 2 GiB",
        measure: hot::ready,
    },
    Bench {
        rows: &["failover.hot.takeover_ms"],
        about: "`standby promote` to the guest's first output, from an image, with three holders",
        measure: failover::hot,
    },
    Bench {
        rows: &["failover.cold.takeover_ms"],
        about: "`standby promote` to the guest's first output, from a chain of 10",
        measure: failover::cold,
    },
    Bench {
        rows: &["store.put_ms"],
        about: "a segment of 100 KB made durable in a store",
        measure: store::measure,
    },
    Bench {
        rows: &["store.recover_ms"],
        about: "the start of an agent with 100,000 segments after SIGKILL",
        measure: recover::measure,
    },
    Bench {
        rows: &["status.ms", "agent.rss_mib"],
        about: "`standby status`, and the memory of the agent, with 1,000 VMs of 100 restore points held and in an etcd",
        measure: scale::measure,
    },
    Bench {
        rows: &["vmm.boot_ms"],
        about: "`vmm run` to the first byte of a bare-metal guest",
        measure: process::boot,
    },
    Bench {
        rows: &["vmm.overhead_mib"],
        about: "resident memory of an idle `vmm run` beyond its guest's",
        measure: process::overhead,
    },
];

/// Measures and shows.
///
/// # Errors
/// When a row is not known or could not be measured; those that could are shown and written nonetheless.
pub fn run(options: &Options) -> Result<()> {
    if options.list {
        for bench in BENCHES {
            println!("{:32} {}", bench.rows.join(" "), bench.about);
        }
        return Ok(());
    }
    let chosen = choose(&options.rows)?;
    let lab = Lab::new(options.folder.as_deref(), options.quick)?;
    println!("{}", lab.machine());
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    for bench in chosen {
        lab.say(format!("{}: {}", bench.rows.join(", "), bench.about));
        match (bench.measure)(&lab) {
            Ok(measured) => rows.extend(measured),
            Err(error) => {
                lab.say(format!("{}: not measured: {error:#}", bench.rows[0]));
                failed.push(bench.rows[0]);
            }
        }
    }
    println!("{}", table::render(&rows));
    if let Some(path) = &options.json {
        write(path, &rows)?;
    }
    if !failed.is_empty() {
        bail!("not measured: {}. The reasons are above", failed.join(", "));
    }
    Ok(())
}

fn choose(names: &[String]) -> Result<Vec<&'static Bench>> {
    let matches = |name: &str, row: &str| {
        row.strip_prefix(name)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    if let Some(unknown) = names.iter().find(|name| {
        !BENCHES
            .iter()
            .any(|b| b.rows.iter().any(|row| matches(name, row)))
    }) {
        let known: Vec<_> = BENCHES.iter().flat_map(|bench| bench.rows).copied().collect();
        bail!("there is no row {unknown:?}. The rows are: {}", known.join(", "));
    }
    let wanted = |bench: &&Bench| {
        names.is_empty()
            || names
                .iter()
                .any(|name| bench.rows.iter().any(|row| matches(name, row)))
    };
    Ok(BENCHES.iter().filter(wanted).collect())
}

fn write(path: &Path, rows: &[Row]) -> Result<()> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let text = serde_json::to_string_pretty(rows).context("write the rows as JSON")?;
    std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str]) -> Result<Vec<&'static str>> {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        Ok(choose(&names)?.iter().map(|bench| bench.rows[0]).collect())
    }

    #[test]
    fn rows_are_chosen_by_name_and_by_its_first_words() {
        assert_eq!(chosen(&[]).expect("all").len(), BENCHES.len());
        assert_eq!(chosen(&["store.put_ms"]).expect("one"), ["store.put_ms"]);
        assert_eq!(
            chosen(&["encode"]).expect("some"),
            ["encode.rate", "encode.ratio"]
        );
        // The second row of a bench finds the bench.
        assert_eq!(
            chosen(&["capture.full.finish"]).expect("one"),
            ["capture.full.stop_us"]
        );
    }

    #[test]
    fn an_unknown_row_is_refused_and_the_known_are_named() {
        for name in ["captur", "store.put", "nonsense"] {
            let error = chosen(&[name]).expect_err("there is no such row").to_string();
            assert!(error.contains(name) && error.contains("vmm.boot_ms"), "{error}");
        }
    }
}
