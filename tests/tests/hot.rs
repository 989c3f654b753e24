//! Hot standby with real processes: a takeover runs on the image when that is of the very checkpoint, and never else.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use understudy_tests::harness::{
    Cluster, Machine, counter, epoch, first_counter, run, run_json, signal, wait_for,
};

const CHURN: &str = "mib=16 rate=2000 heartbeat_ms=20 verify=4";

/// Three agents, the first with the registry; the others with these flags.
fn cluster(folder: &tempfile::TempDir, more: &[&str]) -> Cluster {
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    cluster.start_agent("alder", &[]).unwrap();
    cluster.start_agent("birch", more).unwrap();
    cluster.start_agent("cedar", more).unwrap();
    cluster
}

fn protect(cluster: &mut Cluster, name: &str, agents: &[usize], more: &[&str]) -> Machine {
    protect_as(cluster, name, CHURN, agents, more)
}

fn protect_as(cluster: &mut Cluster, name: &str, cmdline: &str, agents: &[usize], more: &[&str]) -> Machine {
    let holders: Vec<_> = agents
        .iter()
        .map(|a| cluster.agents[*a].address.clone())
        .collect();
    let holders = holders.join(",");
    let mut arguments = vec!["--memory", "48M", "--every", "50ms", "--protect-to", &holders];
    arguments.extend(more);
    let machine = cluster.launch(name, "churn", cmdline, &arguments).unwrap();
    cluster.committed(&machine, 3).unwrap();
    machine
}

/// What the agent says of the VM.
fn standing(cluster: &Cluster, agent: usize, vm: &str) -> Value {
    let status = run_json(cluster.standby(agent).args(["status", "--json"])).unwrap();
    let vms = status["agent"]["vms"].as_array().unwrap().clone();
    vms.into_iter().find(|held| held["vm"] == vm).unwrap_or_default()
}

/// Waits until the agent has an image of the VM, at this generation at least.
fn hot(cluster: &Cluster, agent: usize, vm: &str, generation: u64) {
    wait_for(format!("an image of {vm} of generation {generation}"), || {
        let at = standing(cluster, agent, vm)["hot_at"].clone();
        let of = at
            .as_str()
            .and_then(|at| at.split('/').nth(1)?.parse::<u64>().ok());
        Ok(of.filter(|of| *of >= generation))
    })
    .unwrap();
}

fn promote(cluster: &Cluster, agent: usize, vm: &str) -> (Value, Machine) {
    let report = run_json(cluster.standby(agent).args(["promote", vm, "--json"])).unwrap();
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    let machine = cluster.adopt(vm, agent, pid);
    (report, machine)
}

fn notes(report: &Value) -> String {
    report["notes"].to_string()
}

/// Waits until the guest, wherever it was taken over to, has written so much more; it must have found no damage. The first
/// it said there.
fn goes_on(machine: &Machine, before: &str) -> u64 {
    wait_for(format!("{} to go on", machine.name), || {
        let console = machine.console()?;
        let console = console.strip_prefix(before).unwrap_or(&console);
        assert!(!console.contains("BAD"), "the guest found damage:\n{console}");
        let (first, last) = (first_counter(console, "writes"), counter(console, "writes"));
        Ok(first
            .zip(last)
            .filter(|(first, last)| *last >= first + 400)
            .map(|(first, _)| first))
    })
    .unwrap()
}

#[test]
fn a_takeover_runs_on_the_image_and_the_image_is_made_anew_where_it_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(&folder, &["--hot", "web*"]);
    let mut machine = protect(&mut cluster, "web", &[1, 2], &["--delta-cache", "8M"]);
    for (round, agent) in [1, 2, 1].into_iter().enumerate() {
        hot(&cluster, agent, "web", round as u64 + 1);
        let listed = run(cluster.standby(agent).args(["ls", "web"])).unwrap();
        assert!(listed.contains("its image is at web/"), "{listed}");
        machine.kill().unwrap();
        let before = cluster.adopt("web", agent, 0).console().unwrap_or_default();
        let (report, next) = promote(&cluster, agent, "web");
        machine = next;
        assert!(notes(&report).contains("from its image"), "{report}");
        goes_on(&machine, &before);
        wait_for("it to run there", || {
            let why = standing(&cluster, agent, "web")["cold"].clone();
            Ok((why == "it runs here").then_some(()))
        })
        .unwrap();
        // The new owner protects it: from its own start on.
        let status = cluster.status("web", &machine.run_dir).unwrap();
        assert_eq!(status["generation"], round as u64 + 2);
        wait_for("a commit of the new owner", || {
            let status = cluster.status("web", &machine.run_dir)?;
            let committed = status["committed"].as_str().unwrap_or_default().to_owned();
            Ok(committed
                .starts_with(&format!("web/{}/", round + 2))
                .then_some(()))
        })
        .unwrap();
    }
    machine.kill().unwrap();
}

#[test]
fn what_was_stored_and_never_committed_is_thrown_away_for_the_branch_that_won() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(&folder, &["--hot", "all"]);
    let mut machine = protect(
        &mut cluster,
        "split",
        &[1, 2],
        &["--ack-quorum", "2", "--delta-cache", "8M"],
    );
    hot(&cluster, 1, "split", 1);
    wait_for("cedar to have something", || {
        let status = cluster.status("split", &machine.run_dir)?;
        Ok(status["committed"].is_string().then_some(()))
    })
    .unwrap();
    // From here on birch stores, and follows, what is never committed. (Were cedar only stopped, what is on its way to it
    // would be stored when it goes on.)
    let birch = cluster.agent_pids()[1].parse::<u32>().unwrap();
    cluster.kill_agent(2).unwrap();
    let committed = epoch(&cluster.status("split", &machine.run_dir).unwrap()["committed"]);
    wait_for("birch to follow beyond what is committed", || {
        Ok((epoch(&standing(&cluster, 1, "split")["hot_at"]) > committed + 3).then_some(()))
    })
    .unwrap();
    machine.kill().unwrap();
    signal(birch, Signal::STOP).unwrap();
    cluster.restart_agent(2).unwrap();
    let (report, mut machine) = promote(&cluster, 2, "split");
    let from = report["resumed_from"].as_str().unwrap().to_owned();
    assert!(epoch(&report["resumed_from"]) <= committed + 2, "{from}");
    goes_on(&machine, "");
    signal(birch, Signal::CONT).unwrap();
    // It gives its branch up, and follows the one of generation 2.
    hot(&cluster, 1, "split", 2);
    machine.kill().unwrap();
    let (report, mut machine) = promote(&cluster, 1, "split");
    assert!(
        report["resumed_from"].as_str().unwrap().starts_with("split/2/"),
        "{report}"
    );
    assert!(notes(&report).contains("from its image"), "{report}");
    goes_on(&machine, "");
    machine.kill().unwrap();
}

#[test]
fn an_agent_that_is_killed_while_it_follows_takes_over_from_what_was_committed() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(&folder, &["--hot", "all"]);
    let mut machine = protect(&mut cluster, "torn", &[1, 2], &["--delta-cache", "8M"]);
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(20_u64);
    println!("SEED={seed}");
    let mut random = seed;
    let mut instant = |most_ms: u64| {
        // An LCG: what counts is that a seed is the same again.
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_millis((random >> 33) % most_ms));
    };
    let (mut hot_ones, mut agent) = (0, 1);
    for round in 0..6 {
        // In any state: an image at a checkpoint, between two, being made, not begun.
        instant(300);
        cluster.kill_agent(agent).unwrap();
        cluster.restart_agent(agent).unwrap();
        instant(300);
        let committed = cluster.status("torn", &machine.run_dir).unwrap()["committed"].clone();
        let position = |name: &Value| {
            let name = name.as_str().unwrap();
            let numbers: Vec<u64> = name.split('/').skip(1).map(|n| n.parse().unwrap()).collect();
            (numbers[0], numbers[1])
        };
        machine.kill().unwrap();
        let before = cluster.adopt("torn", agent, 0).console().unwrap_or_default();
        let (report, next) = promote(&cluster, agent, "torn");
        machine = next;
        assert!(
            position(&report["resumed_from"]) >= position(&committed),
            "round {round}: {report}"
        );
        goes_on(&machine, &before);
        hot_ones += u64::from(notes(&report).contains("from its image"));
        println!("round {round}: {}", notes(&report));
        wait_for("a commit of the new owner", || {
            let now = cluster.status("torn", &machine.run_dir)?["committed"].clone();
            Ok((now.is_string() && position(&now).0 == round + 2).then_some(()))
        })
        .unwrap();
        agent = 3 - agent;
    }
    println!("{hot_ones} of 6 ran on an image");
    machine.kill().unwrap();
}

#[test]
fn images_take_what_they_were_given_and_not_more() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = cluster(&folder, &["--hot", "second,all", "--hot-memory", "60M"]);
    let mut first = protect(&mut cluster, "first", &[1], &[]);
    hot(&cluster, 1, "first", 1);
    let second = protect(&mut cluster, "second", &[1], &[]);
    let cold = |cluster: &Cluster, vm: &str| {
        wait_for(format!("{vm} to have no place"), || {
            let why = standing(cluster, 1, vm)["cold"].as_str().map(str::to_owned);
            Ok(why.filter(|why| why.contains("48.0 MiB does not fit") && why.contains("--hot-memory")))
        })
        .unwrap()
    };
    cold(&cluster, "second");
    let shown = run(cluster.standby(1).arg("status")).unwrap();
    assert!(shown.contains("second is cold: its memory of"), "{shown}");
    // What was named first has the place when the agent begins anew.
    cluster.kill_agent(1).unwrap();
    cluster.restart_agent(1).unwrap();
    hot(&cluster, 1, "second", 1);
    cold(&cluster, "first");
    // Cold is as good, and slower.
    first.kill().unwrap();
    let (report, mut first) = promote(&cluster, 1, "first");
    assert!(
        notes(&report).contains("from its chain, not from an image: its memory"),
        "{report}"
    );
    goes_on(&first, "");
    first.kill().unwrap();
    drop(second);
}

/// The entries of a kind in the history.
/// The host's memory is what images have of it: a VM's own is no reason to refuse it, and others' are given up for it.
#[test]
fn a_takeover_is_not_refused_for_the_memory_that_images_have() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (once, always) = (folder.path().join("once"), folder.path().join("always"));
    let vmm = folder.path().join("vmm.sh");
    // What `vmm restore --check` says on a host whose memory is taken.
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' --check '*)\nfor lack in {} {}; do if [ -e $lack ]; then rm -f {}; echo 'missing: \
         memory: the guest has 48 MiB, 10 MiB are available'; exit 1; fi; done;; esac\nexec {} \"$@\"\n",
        once.display(),
        always.display(),
        once.display(),
        understudy_tests::harness::Binaries::find().unwrap().vmm.display()
    );
    std::fs::write(&vmm, script).unwrap();
    std::fs::set_permissions(&vmm, PermissionsExt::from_mode(0o755)).unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    cluster.binaries.vmm = vmm;
    for (name, more) in [
        ("alder", &[][..]),
        ("birch", &["--hot", "web"]),
        ("cedar", &["--hot", "web"]),
    ] {
        cluster.start_agent(name, more).unwrap();
    }
    let mut web = protect(&mut cluster, "web", &[1, 2], &[]);
    let mut db = protect(&mut cluster, "db", &[1, 2], &[]);
    hot(&cluster, 1, "web", 1);
    hot(&cluster, 2, "web", 1);
    db.kill().unwrap();
    std::fs::write(&always, "").unwrap();
    let refused = cluster.standby(2).args(["promote", "db"]).output().unwrap();
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && told.contains("memory: the guest has 48 MiB"),
        "{told}"
    );
    // Tried with all memory there is: what stood in the way was no image.
    let given_up = |agent| {
        wait_for("the image to be given up", || {
            let why = standing(&cluster, agent, "web")["cold"].clone();
            Ok(why
                .as_str()
                .is_some_and(|why| why.contains("given up for a takeover"))
                .then_some(()))
        })
        .unwrap();
    };
    given_up(2);
    // Its own image is its memory.
    web.kill().unwrap();
    let before = cluster.adopt("web", 1, 0).console().unwrap_or_default();
    let (report, mut web) = promote(&cluster, 1, "web");
    assert!(notes(&report).contains("from its image"), "{report}");
    goes_on(&web, &before);
    web.kill().unwrap();
    // With the image of another given up there is room for one that has none.
    std::fs::remove_file(&always).unwrap();
    hot(&cluster, 1, "web", 1);
    std::fs::write(&once, "").unwrap();
    let (_, mut db) = promote(&cluster, 1, "db");
    assert!(!once.exists());
    given_up(1);
    db.kill().unwrap();
}

fn events(cluster: &Cluster, vm: &str, event: &str) -> Vec<Value> {
    let history = run_json(cluster.standby(0).args(["history", vm, "--json"])).unwrap();
    let all = history.as_array().unwrap().clone();
    all.into_iter().filter(|entry| entry["event"] == event).collect()
}

#[test]
fn drills_are_run_by_the_clock_and_one_that_fails_is_told_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    cluster.start_agent("alder", &[]).unwrap();
    cluster.start_agent("birch", &["--drill-every", "2s"]).unwrap();
    // It writes so little that its first checkpoint goes on to be read for long.
    let machine = protect_as(
        &mut cluster,
        "tried",
        "mib=16 rate=20 heartbeat_ms=20",
        &[0, 1],
        &[],
    );
    // Again and again, by the one that is to; and the VM goes on.
    let drilled = wait_for("two drills", || {
        Ok(Some(events(&cluster, "tried", "drilled")).filter(|all| all.len() >= 2))
    })
    .unwrap();
    assert!(
        drilled.iter().all(|entry| entry["node"] == "birch"),
        "{drilled:?}"
    );
    let last = run(cluster.standby(0).args(["drill", "tried", "--last"])).unwrap();
    assert!(last.contains("a copy of tried/1/"), "{last}");
    let told = standing(&cluster, 1, "tried")["drill"].clone();
    assert!(
        told["recovery_us"].as_u64().unwrap() > 0 && told["failed"].is_null(),
        "{told}"
    );

    // The chain at birch is damaged in the middle of its first segment.
    let first = cluster.agents[1].data.join("store/segments/tried/1/1.seg");
    let mut bytes = std::fs::read(&first).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&first, bytes).unwrap();
    wait_for("a drill that fails", || {
        Ok((!events(&cluster, "tried", "drill-failed").is_empty()).then_some(()))
    })
    .unwrap();
    let shown = run(cluster.standby(1).arg("status")).unwrap();
    assert!(shown.contains("FAILED"), "{shown}");
    let log = std::fs::read_to_string(cluster.agents[1].data.join("agent.log")).unwrap();
    assert!(log.contains("a drill FAILED"), "{log}");
    let last = cluster
        .standby(0)
        .args(["drill", "tried", "--last"])
        .output()
        .unwrap();
    assert_eq!(last.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&last.stderr).contains("failed at birch"));
    drop(machine);
}
