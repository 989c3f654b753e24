//! A VM whose holders are chosen, replaced when they die or are drained, and that goes on at one that joined late.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use understudy_tests::harness::{Cluster, counter, run, run_json, wait_for};

/// Agents that notice soon that another is gone.
const HASTY: [&str; 4] = ["--lease", "2s", "--replace-after", "500ms"];

fn holders(cluster: &Cluster, vm: &str) -> Vec<String> {
    let explained = run_json(cluster.standby(0).args(["explain", vm, "--json"])).unwrap();
    let holders = explained["vm"]["holders"].as_array().unwrap().clone();
    holders.iter().map(|h| h.as_str().unwrap().to_owned()).collect()
}

/// Waits until the holders are as `wanted` says, and the owner has committed with them.
fn settled(cluster: &Cluster, vm: &str, what: &str, wanted: impl Fn(&[String]) -> bool) -> Vec<String> {
    wait_for(what, || {
        let explained = run_json(cluster.standby(0).args(["explain", vm, "--json"]))?;
        let changing = !explained["vm"]["swap"].is_null();
        let now = holders(cluster, vm);
        Ok((!changing && wanted(&now)).then_some(now))
    })
    .unwrap()
}

#[test]
fn holders_are_chosen_and_replaced_and_one_that_joined_late_takes_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(folder.path(), false).unwrap();
    for (name, rack) in [
        ("alder", "rack=1"),
        ("birch", "rack=1"),
        ("cedar", "rack=2"),
        ("dogwood", "rack=3"),
    ] {
        let more: Vec<_> = HASTY.iter().copied().chain(["--label", rack]).collect();
        cluster.start_agent(name, &more).unwrap();
    }
    let at: Vec<_> = cluster.agents.iter().map(|a| a.address.clone()).collect();
    // The registry's node holds nothing, so that it is never the one that is lost.
    run(cluster.standby(0).args(["drain", "alder"])).unwrap();
    let arguments = [
        "--memory",
        "48M",
        "--every",
        "50ms",
        "--protect",
        "--replicas",
        "2",
        "--spread",
        "rack",
        "--label",
        "rack",
        "--registry",
        &at[0],
    ];
    let mut machine = cluster
        .launch(
            "web",
            "churn",
            "mib=16 rate=2000 heartbeat_ms=50 verify=4",
            &arguments,
        )
        .unwrap();
    let first = holders(&cluster, "web");
    assert_eq!(first.len(), 2, "{first:?}");
    assert!(!first.contains(&at[0]), "a drained node was chosen: {first:?}");
    let spare = at[1..].iter().find(|a| !first.contains(a)).unwrap().clone();
    let said = run(cluster.standby(0).args(["explain", "web"])).unwrap();
    assert!(
        said.contains("alder: it is drained") || said.contains("alder: "),
        "{said}"
    );

    // Dead: its place is taken by the one that had none.
    let lost = at.iter().position(|a| *a == first[1]).unwrap();
    cluster.kill_agent(lost).unwrap();
    let second = settled(&cluster, "web", "the dead holder to be replaced", |now| {
        now.contains(&spare) && !now.contains(&first[1])
    });
    assert_eq!(second.len(), 2, "{second:?}");

    // Back, and another drained: it goes over, and may leave.
    cluster.restart_agent(lost).unwrap();
    let drained = at.iter().position(|a| *a == first[0]).unwrap();
    let name = cluster.agents[drained].name.clone();
    run(cluster.standby(0).args(["drain", &name, "--wait"])).unwrap();
    let third = settled(&cluster, "web", "the drained holder to be replaced", |now| {
        !now.contains(&first[0])
    });
    assert!(third.contains(&spare) && third.contains(&first[1]), "{third:?}");
    run(cluster.standby(0).args(["leave", &name])).unwrap();

    // The owner goes on committing with holders it was not started with, and one of them runs the guest.
    let committed = |cluster: &Cluster| cluster.status("web", &machine.run_dir).unwrap()["committed"].clone();
    let before = committed(&cluster);
    wait_for("a commit by the new holders", || {
        Ok((committed(&cluster) != before).then_some(()))
    })
    .unwrap();
    let console = machine.console().unwrap();
    let count = counter(&console, "writes").unwrap_or(0);
    machine.kill().unwrap();
    let heir = at.iter().position(|a| *a == spare).unwrap();
    let report = run_json(cluster.standby(heir).args(["promote", "web", "--json"])).unwrap();
    let machine = cluster.adopt(
        "web",
        heir,
        u32::try_from(report["pid"].as_u64().unwrap()).unwrap(),
    );
    wait_for("the guest to go on", || {
        let console = machine.console()?;
        assert!(!console.contains("BAD"), "the guest found damage:\n{console}");
        Ok(counter(&console, "writes").filter(|now| *now > count))
    })
    .unwrap();
    cluster.own(machine);
}
