//! Promotes where a holder has lost a part of what it acknowledged: nothing committed is skipped in silence.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use migrate::registry::Registry;
use migrate::store::FsStore;
use net_common::process::{Served, standby, stderr, stdout};
use net_common::*;
use segment::{Generation, SegmentName};

/// A stand-in for `vmm` that says it runs.
fn running_vmm(dir: &Path) -> PathBuf {
    let path = dir.join("vmm");
    let body = "#!/bin/sh\ncase \"$*\" in *--check*) exit 0;; esac\necho '{\"state\":\"running\",\"pid\":'$$',\"socket\":\"/run/web.sock\"}'\nexec sleep 60\n";
    fs::write(&path, body).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

struct Pair {
    dir: tempfile::TempDir,
    vmm: String,
    a: Served,
    b: Served,
    registry: Registry,
    tip: SegmentName,
}

impl Pair {
    /// Two holders, both of which acknowledged `epochs` checkpoints; the owner is gone.
    async fn new(epochs: u64, pages: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let vmm = running_vmm(dir.path()).display().to_string();
        let a = Served::start(&dir.path().join("a"), "a", "127.0.0.1:0", &["--vmm", &vmm]);
        let more = ["--vmm", vmm.as_str(), "--registry", &a.address];
        let b = Served::start(&dir.path().join("b"), "b", "127.0.0.1:0", &more);
        let registry = Registry::remote(&a.address, &tester());
        let holders = [a.address.as_str(), b.address.as_str()];
        let generation = create(&registry, "web", &holders, 2).await;
        let shared = Some(registry.clone());
        let mut owner = Owner::start(dir.path(), "web", generation, &holders, 2, shared);
        for _ in 0..epochs {
            owner.take(pages);
        }
        let tip = owner.name(epochs);
        owner.wait_committed(&tip).await;
        owner.shipper.stop().await;
        Self {
            dir,
            vmm,
            a,
            b,
            registry,
            tip,
        }
    }

    fn name(&self, epoch: u64) -> SegmentName {
        SegmentName::new(self.tip.vm.clone(), self.tip.generation, segment::Epoch(epoch))
    }

    /// Turns bytes in the middle of a stored file: the frames rot, header and index are sound.
    fn rot(&self, node: &str, name: &SegmentName) {
        let store = FsStore::open_read_only(&self.dir.path().join(node).join("store")).unwrap();
        let path = store.segment_path(name);
        let length = fs::metadata(&path).unwrap().len();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"rotten", length / 2).unwrap();
    }

    fn remove(&self, node: &str, name: &SegmentName) {
        let store = FsStore::open_read_only(&self.dir.path().join(node).join("store")).unwrap();
        fs::remove_file(store.segment_path(name)).unwrap();
    }

    /// Starts `b` again, with what is on its disk now.
    fn again_b(&mut self) {
        let address = self.b.address.clone();
        self.b.kill();
        let more = ["--vmm", self.vmm.as_str(), "--registry", &self.a.address];
        self.b = Served::start(&self.dir.path().join("b"), "b", &address, &more);
    }

    fn again_a(&mut self) {
        let address = self.a.address.clone();
        self.a = Served::start(&self.dir.path().join("a"), "a", &address, &["--vmm", &self.vmm]);
    }

    fn promote(&self, more: &[&str]) -> std::process::Output {
        let mut args = vec!["promote", "web", "--agent", &self.b.address];
        args.extend(more);
        standby(&args)
    }

    fn ran_from(&self, output: &std::process::Output, from: &SegmentName) {
        let told = stdout(output);
        assert!(
            told.contains(&format!("runs on b from {from},")),
            "{told}{}",
            stderr(output)
        );
        let pid = told.split("pid ").nth(1).and_then(|t| t.split(',').next());
        let pid = pid
            .and_then(|p| p.parse().ok())
            .and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::KILL).unwrap();
    }

    async fn generation(&self) -> Generation {
        self.registry.get_vm(&self.tip.vm).await.unwrap().generation
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_copy_here_is_replaced_by_the_good_one_elsewhere() {
    for epoch in [2, 5] {
        let pair = Pair::new(5, 4).await;
        // Found while the old owner could still go on, and replaced after it cannot.
        pair.rot("b", &pair.name(epoch));
        let output = pair.promote(&[]);
        pair.ran_from(&output, &pair.tip);
        let store = FsStore::open_read_only(&pair.dir.path().join("b/store")).unwrap();
        for link in store.chain(&pair.tip).unwrap() {
            store.verify(&link.name).unwrap();
        }
        let aside = fs::read_dir(pair.dir.path().join("b/store/damaged")).unwrap();
        assert_eq!(aside.count(), 1, "the damaged file is kept for a look");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_lost_its_newest_does_not_stand_in_for_one_that_is_away() {
    let mut pair = Pair::new(4, 4).await;
    // Quarantined at the start; gone without a trace; and the registry keeps its own floor beside.
    pair.remove("b", &pair.tip);
    pair.again_b();
    pair.a.kill();
    // The registry is away with `a`, so it comes back, without its segments.
    fs::rename(
        pair.dir.path().join("a/store"),
        pair.dir.path().join("a/store.away"),
    )
    .unwrap();
    pair.again_a();
    let refused = pair.promote(&[]);
    let told = stderr(&refused);
    assert_eq!(refused.status.code(), Some(1), "{}", stdout(&refused));
    for part in [
        "without losing committed state",
        "once stored web/1/4",
        "was its data directory emptied?",
        "is web/1/3",
        "Nothing was changed",
        "--accept-loss",
    ] {
        assert!(told.contains(part), "{told} lacks {part:?}");
    }
    assert_eq!(pair.generation().await, Generation(1));
    let dry = pair.promote(&["--dry-run"]);
    assert_eq!(dry.status.code(), Some(1), "{}", stdout(&dry));

    let accepted = pair.promote(&["--accept-loss"]);
    pair.ran_from(&accepted, &pair.name(3));
    assert!(
        stdout(&accepted).contains("at a loss that was accepted"),
        "{}",
        stdout(&accepted)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_two_holders_make_a_whole() {
    let pair = Pair::new(5, 4).await;
    // Neither has all of it, together they do.
    pair.rot("b", &pair.name(2));
    pair.rot("a", &pair.name(4));
    let output = pair.promote(&[]);
    pair.ran_from(&output, &pair.tip);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_hangs_is_ended_and_named() {
    let mut pair = Pair::new(2, 4).await;
    let pid_file = pair.dir.path().join("pid");
    let body = format!(
        "#!/bin/sh\ncase \"$*\" in *--check*) exit 0;; esac\necho $$ > {}\nexec sleep 600\n",
        pid_file.display()
    );
    fs::write(pair.dir.path().join("vmm"), body).unwrap();
    let address = pair.b.address.clone();
    pair.b.kill();
    let more = ["--vmm", pair.vmm.as_str(), "--registry", &pair.a.address];
    let more = [&more[..], &["--restore-timeout", "1s"]].concat();
    pair.b = Served::start(&pair.dir.path().join("b"), "b", &address, &more);
    let told = stderr(&pair.promote(&[]));
    let pid = fs::read_to_string(&pid_file).unwrap();
    for part in [
        &format!("process {}", pid.trim()),
        "within 1s",
        "--restore-timeout",
        "is safe",
    ] {
        assert!(told.contains(part), "{told} lacks {part:?}");
    }
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    assert!(stat.is_err(), "it is still there: {stat:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn forgetting_much_tells_how_far_it_is_and_goes_on_without_its_caller() {
    use migrate::transport::Client;
    use migrate::wire::{Call, ForgetCall, Reply};

    let pair = Pair::new(150, 1).await;
    let ask = async || {
        let call = ForgetCall {
            vm: pair.tip.vm.clone(),
            force: true,
            only_here: false,
            wait_ms: Some(0),
        };
        // A new connection each time: nothing hangs on the one it was begun with.
        let mut client = Client::connect(&pair.a.address, &tester()).await.unwrap();
        client.call(Call::Forget(call), PATIENCE).await
    };
    let Ok(Reply::Forgotten(first)) = ask().await else {
        panic!("it was refused")
    };
    assert!(first.left > 0, "an answer at once cannot be the end: {first:?}");
    for node in ["a", "b"] {
        let dir = pair.dir.path().join(node).join("store");
        eventually("all is removed", || {
            FsStore::open_read_only(&dir).unwrap().all().is_empty()
        })
        .await;
    }
    let start = tokio::time::Instant::now();
    loop {
        match ask().await {
            Ok(Reply::Forgotten(report)) if report.left == 0 => {
                assert_eq!((report.segments, report.notes.len()), (150, 0), "{report:?}");
                break;
            }
            Ok(_) => assert!(start.elapsed() < PATIENCE),
            Err(error) => panic!("{error}"),
        }
    }
}
