//! `scripts/torture`, briefly: each fault once, and links that are cut for a while.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;
use understudy_tests::harness::{signal, wait_for};

/// Runs it to its end; its figures.
fn torture(arguments: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("figures.json");
    let output = Command::new(env!("CARGO_BIN_EXE_torture"))
        .args(arguments)
        .arg("--json")
        .arg(&json)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{said}");
    println!("{said}");
    serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap()
}

#[test]
fn four_failovers_one_of_each_kind_run_no_two_vms_and_lose_nothing() {
    let figures = torture(&["failovers", "--count", "4", "--seed", "1"]);
    for fault in ["kill", "kill-host", "stop", "cut"] {
        assert_eq!(figures["by_fault"][fault]["count"], 1, "{figures}");
    }
    for number in ["heartbeats", "commits"] {
        assert!(figures[number].as_u64() > Some(4), "{number}: {figures}");
    }
}

#[test]
fn what_is_committed_while_links_are_cut_is_at_every_holder_in_the_end() {
    let figures = torture(&["links", "--minutes", "0.25", "--seed", "2"]);
    for number in ["committed", "held", "verified"] {
        assert!(figures[number].as_u64() > Some(10), "{number}: {figures}");
    }
}

/// The processes that have this path in their command line.
fn processes_of(folder: &str) -> Vec<String> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let of = all.filter_map(|process| {
        let words = std::fs::read(process.path().join("cmdline")).ok()?;
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        words.contains(folder).then_some(words)
    });
    of.collect()
}

#[test]
fn one_that_is_interrupted_leaves_nothing_behind() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_torture"))
        .args(["failovers", "--seed", "3"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let folder = PathBuf::from(first.rsplit(' ').next().unwrap());
    // The hosts are up and the guest runs.
    let running = lines.any(|line| line.unwrap().starts_with("a guest of "));
    assert!(running, "it ended before: {:?}", child.wait());
    let name = folder.to_str().unwrap();
    assert!(processes_of(name).len() > 5);
    signal(child.id(), Signal::INT).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(!Path::new(&folder).exists(), "{name} is there still");
    wait_for("its processes to be gone", || {
        Ok(processes_of(name).is_empty().then_some(()))
    })
    .unwrap();
}
