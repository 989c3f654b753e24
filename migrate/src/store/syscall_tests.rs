//! The same lives of a store in a process of its own, which strace kills at each of its system calls in turn: the steps
//! that [`super::crash_tests`] refuses are those the code tells of, these are all that the kernel sees.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::crash_tests::{End, Said, Script, Segments, check, live, live_and_collect, oracle, tempdir};
use super::fixture::{Bytes, chain};
use super::*;

/// The system calls that can change what is on the disk.
const CALLS: &str = "openat,mkdir,mkdirat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,\
                     unlinkat,rmdir,ftruncate,fallocate,flock";
/// The child's folder, and which of the lives it has.
const FOLDER: &str = "UNDERSTUDY_TEST_STORE";
const LIFE: &str = "UNDERSTUDY_TEST_LIFE";
const CHILD: &str = "store::syscall_tests::child";
/// What the child says in the end.
const LIVED: &str = "lived";

const LIVES: [(&str, Script, u64); 2] = [("live", live, 5), ("live and collect", live_and_collect, 9)];

#[test]
#[ignore = "the process that the test below kills"]
fn child() {
    let (Some(dir), Ok(life)) = (std::env::var_os(FOLDER), std::env::var(LIFE)) else {
        return;
    };
    let (_, script, links) = LIVES.into_iter().find(|(name, ..)| *name == life).unwrap();
    // Ends the line that the harness began.
    rustix::io::write(rustix::stdio::stdout(), b"\n").unwrap();
    let segments = chain("web", links);
    let store = FsStore::open(Path::new(&dir), None, Durability::Durable).unwrap();
    let mut said = Said::default();
    said.aloud = true;
    script(&store, &segments, &mut said).unwrap();
    rustix::io::write(rustix::stdio::stdout(), format!("{LIVED}\n").as_bytes()).unwrap();
}

/// Runs a life under strace with these options; what the child said.
fn run(dir: &Path, life: &str, strace: &[&str]) -> String {
    let out = Command::new("strace")
        .args(["-f", "-qq"])
        .args(strace)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", CHILD, "--ignored", "--nocapture", "--test-threads=1"])
        .env(FOLDER, dir)
        .env(LIFE, life)
        .stderr(Stdio::null())
        .output()
        .expect("strace does not start: install Debian's package strace, as scripts/test does");
    String::from_utf8(out.stdout).unwrap()
}

fn folders() -> (tempfile::TempDir, PathBuf) {
    let dir = tempdir();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    (dir, data)
}

/// How often one thread makes each of the calls in a life, at most.
fn calls(life: &str) -> BTreeMap<String, usize> {
    let (dir, data) = folders();
    let trace = dir.path().join("trace");
    let said = run(
        &data,
        life,
        &["-e", &format!("trace={CALLS}"), "-o", trace.to_str().unwrap()],
    );
    assert!(said.contains(LIVED), "{life}: {said}");
    let mut threads: BTreeMap<(String, String), usize> = BTreeMap::new();
    for line in std::fs::read_to_string(&trace).unwrap().lines() {
        // `PID  call(..`; what a thread was interrupted in goes on in a line `PID  <... call resumed>`.
        let (thread, call) = line.split_once(' ').unwrap();
        if let Some((call, _)) = call.trim_start().split_once('(')
            && !call.starts_with('<')
        {
            *threads.entry((thread.into(), call.into())).or_default() += 1;
        }
    }
    let mut most = BTreeMap::new();
    for ((_, call), count) in threads {
        let known = most.entry(call).or_default();
        *known = count.max(*known);
    }
    most
}

/// Kills it at the call with this number, and looks at what is left; whether it was killed.
fn kill_at(life: &str, call: &str, number: usize, oracle: &BTreeMap<SegmentName, Bytes>) -> bool {
    let (_dir, data) = folders();
    let kill = format!("inject={call}:signal=SIGKILL:when={number}");
    let text = run(
        &data,
        life,
        &["-e", &format!("trace={call}"), "-e", &kill, "-o", "/dev/null"],
    );
    let context = format!("{life}, killed at {call} {number}");
    check(&data, &Said::heard(&text), oracle, End::Crash, &context);
    !text.contains(LIVED)
}

#[test]
fn a_kill_at_every_system_call_loses_nothing_acknowledged() {
    for (life, _, links) in LIVES {
        let segments: Segments = chain("web", links);
        let oracle = oracle(&segments);
        let calls = calls(life);
        for expected in ["mkdir", "write", "fsync", "renameat2", "unlink"] {
            assert!(calls.contains_key(expected), "{life}: no {expected} in {calls:?}");
        }
        let points: Vec<(&str, usize)> = calls
            .iter()
            .flat_map(|(call, count)| (1..=*count).map(move |number| (call.as_str(), number)))
            .collect();
        let (next, killed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().unwrap().get() {
                scope.spawn(|| {
                    while let Some((call, number)) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let was_killed = kill_at(life, call, *number, &oracle);
                        killed.fetch_add(was_killed.into(), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(killed.into_inner(), points.len(), "{life}: {calls:?}");
    }
}
