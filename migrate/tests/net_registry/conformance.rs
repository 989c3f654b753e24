//! What every registry does, whatever is behind it.

use migrate::registry::{
    Failover, HistoryEntry, MAX_HISTORY, MAX_HOLDERS, MAX_REGISTER_SEGMENTS, MAX_SEGMENTS_PER_VM, NewVm,
    NodeRecord, Registry, RegistryError, RegistryRequest, SegmentRecord, VmState,
};
use segment::{CheckpointId, Digest, Generation, SegmentName};

use crate::net_common::*;

pub fn new_vm(id: &str) -> NewVm {
    NewVm {
        vm: vm(id),
        owner: "o1".into(),
        holders: vec!["127.0.0.1:1".into(), "127.0.0.1:2".into()],
        ack_quorum: 1,
        every_ms: 200,
        policy: None,
    }
}

pub fn record(name: SegmentName, salt: u8, holder: &str) -> SegmentRecord {
    SegmentRecord {
        checkpoint: CheckpointId([salt; 16]),
        name,
        digest: Digest([salt; 32]),
        bytes: 100,
        parent: None,
        holders: vec![holder.into()],
        created_unix_ns: 5,
    }
}

pub fn node(name: &str, address: &str, id: u8) -> NodeRecord {
    NodeRecord {
        name: name.into(),
        address: address.into(),
        id: [id; 16],
        roles: vec!["store".into()],
        labels: Default::default(),
        joined_unix_ms: 0,
        total_bytes: None,
        free_bytes: None,
        draining: None,
        alive: None,
    }
}

pub async fn a_vm_is_created_once(r: Registry) {
    let created = r.create_vm(new_vm("web")).await.unwrap();
    assert_eq!(
        (created.generation, created.state),
        (Generation(1), VmState::Running)
    );
    let taken = r
        .create_vm(NewVm {
            owner: "o2".into(),
            ..new_vm("web")
        })
        .await
        .unwrap_err();
    let told = taken.to_string();
    assert!(matches!(taken, RegistryError::VmTaken { .. }), "{taken:?}");
    for part in [
        "web",
        "o1",
        "generation 1",
        "running",
        "standby promote web",
        "standby forget web",
    ] {
        assert!(told.contains(part), "{told:?} lacks {part}");
    }
    assert_eq!(r.get_vm(&vm("web")).await.unwrap(), created);
    let missing = r.get_vm(&vm("db")).await.unwrap_err();
    assert_eq!(missing, RegistryError::NoSuchVm { vm: vm("db") });
}

pub async fn a_request_that_is_repeated_is_answered_the_same(r: Registry) {
    let NewVm {
        vm: id,
        owner,
        holders,
        ack_quorum,
        every_ms,
        policy,
    } = new_vm("web");
    let claim = [9; 16];
    let create = RegistryRequest::CreateVm {
        vm: id.clone(),
        owner,
        holders,
        ack_quorum,
        every_ms,
        claim,
        policy,
    };
    let first = r.call(create.clone()).await.unwrap();
    assert_eq!(r.call(create).await.unwrap(), first);
    let expected = Generation(1);
    let raise = RegistryRequest::RaiseGeneration {
        vm: id,
        expected,
        new_owner: "o2".into(),
        claim: [8; 16],
    };
    let first = r.call(raise.clone()).await.unwrap();
    assert_eq!(r.call(raise).await.unwrap(), first);
    assert_eq!(r.get_vm(&vm("web")).await.unwrap().generation, Generation(2));
}

pub async fn raising_is_a_compare_and_swap(r: Registry) {
    r.create_vm(new_vm("web")).await.unwrap();
    let raised = r.raise_generation(&vm("web"), Generation(1), "o2").await.unwrap();
    assert_eq!(
        (raised.generation, raised.owner.as_str(), raised.state),
        (Generation(2), "o2", VmState::Stopped)
    );
    let lost = r
        .raise_generation(&vm("web"), Generation(1), "o3")
        .await
        .unwrap_err();
    let conflict = RegistryError::Conflict {
        vm: vm("web"),
        expected: Generation(1),
        current: Generation(2),
        owner: "o2".into(),
    };
    assert_eq!(lost, conflict);
    assert!(r.raise_generation(&vm("db"), Generation(1), "o2").await.is_err());
}

pub async fn of_many_that_raise_at_once_one_wins(r: Registry) {
    r.create_vm(new_vm("web")).await.unwrap();
    for round in 1..=5 {
        let tries = (0..8).map(|i| {
            let (r, owner) = (r.clone(), format!("candidate{i}"));
            tokio::spawn(async move {
                let raised = r.raise_generation(&vm("web"), Generation(round), &owner).await;
                (owner, raised)
            })
        });
        let mut winners = Vec::new();
        for task in tries.collect::<Vec<_>>() {
            match task.await.unwrap() {
                (owner, Ok(record)) => winners.push((owner, record.owner)),
                (_, Err(RegistryError::Conflict { current, .. })) => {
                    assert_eq!(current, Generation(round + 1))
                }
                (_, Err(other)) => panic!("{other}"),
            }
        }
        assert_eq!(winners.len(), 1, "{winners:?}");
        let record = r.get_vm(&vm("web")).await.unwrap();
        assert_eq!(
            (&record.owner, record.generation),
            (&winners[0].0, Generation(round + 1))
        );
    }
}

pub async fn holders_change_only_under_generation_and_revision(r: Registry) {
    let first = r.create_vm(new_vm("web")).await.unwrap();
    let set = async |generation, revision, holders: Vec<String>, quorum| {
        r.set_holders(&vm("web"), Generation(generation), revision, holders, quorum)
            .await
    };
    let one = vec!["127.0.0.1:3".to_owned()];
    let changed = set(1, first.revision, one.clone(), 1).await.unwrap();
    assert_eq!(changed.holders, one);
    assert!(matches!(
        set(1, first.revision, vec!["127.0.0.1:4".into()], 1).await,
        Err(RegistryError::Revision { current, .. }) if current == changed.revision
    ));
    r.raise_generation(&vm("web"), Generation(1), "o2").await.unwrap();
    assert!(matches!(
        set(1, changed.revision + 1, one.clone(), 1).await,
        Err(RegistryError::Fenced {
            asked: Generation(1),
            current: Generation(2),
            ..
        })
    ));
    let revision = r.get_vm(&vm("web")).await.unwrap().revision;
    // A quorum that cannot be, a holder that counts twice, too many.
    for (holders, quorum) in [
        (one.clone(), 0),
        (one.clone(), 2),
        (vec!["h:1".into(), "h:1".into()], 1),
        ((0..=MAX_HOLDERS).map(|i| format!("h:{i}")).collect(), 1),
        (vec![String::new()], 1),
    ] {
        assert!(
            set(2, revision, holders.clone(), quorum).await.is_err(),
            "{holders:?} {quorum}"
        );
    }
    assert_eq!(r.get_vm(&vm("web")).await.unwrap().revision, revision);
}

pub async fn only_the_owner_says_whether_it_runs(r: Registry) {
    r.create_vm(new_vm("web")).await.unwrap();
    r.raise_generation(&vm("web"), Generation(1), "o2").await.unwrap();
    let late = r.set_vm_state(&vm("web"), Generation(1), VmState::Running).await;
    assert!(matches!(late, Err(RegistryError::Fenced { .. })));
    let now = r
        .set_vm_state(&vm("web"), Generation(2), VmState::Running)
        .await
        .unwrap();
    assert_eq!(now.state, VmState::Running);
    let again = r
        .set_vm_state(&vm("web"), Generation(2), VmState::Running)
        .await
        .unwrap();
    assert_eq!(again, now);
}

pub async fn a_forgotten_vm_leaves_its_last_generation(r: Registry) {
    r.create_vm(new_vm("web")).await.unwrap();
    r.raise_generation(&vm("web"), Generation(1), "o2").await.unwrap();
    r.register_segments(
        &vm("web"),
        Generation(2),
        vec![record(name("web", 2, 1), 1, "h:1")],
    )
    .await
    .unwrap();
    r.register_segments(
        &vm("web"),
        Generation(2),
        vec![record(name("web", 2, 2), 2, "h:1")],
    )
    .await
    .unwrap();
    r.set_vm_state(&vm("web"), Generation(2), VmState::Running)
        .await
        .unwrap();
    let running = r.forget_vm(&vm("web"), false).await.unwrap_err();
    assert!(running.to_string().contains("vmm stop web"), "{running}");
    r.forget_vm(&vm("web"), true).await.unwrap();
    r.forget_vm(&vm("web"), false).await.unwrap();
    assert!(r.get_vm(&vm("web")).await.is_err());
    assert!(r.list_segments(&vm("web"), None, 10).await.unwrap().0.is_empty());
    // Above what holders may have promised.
    assert_eq!(
        r.create_vm(new_vm("web")).await.unwrap().generation,
        Generation(3)
    );
}

pub async fn a_segment_name_means_one_checkpoint(r: Registry) {
    r.create_vm(new_vm("web")).await.unwrap();
    let put = async |generation, records| {
        r.register_segments(&vm("web"), Generation(generation), records)
            .await
    };
    let first = name("web", 1, 1);
    put(1, vec![record(first.clone(), 1, "h:1")]).await.unwrap();
    put(1, vec![record(first.clone(), 1, "h:2")]).await.unwrap();
    put(1, vec![record(first.clone(), 1, "h:2")]).await.unwrap();
    let (segments, _) = r.list_segments(&vm("web"), None, 10).await.unwrap();
    assert_eq!(segments.len(), 1);
    assert_eq!(segments[0].holders, ["h:1", "h:2"]);
    // One of another identity: and with it the whole request is refused.
    let both = vec![
        record(name("web", 1, 2), 2, "h:1"),
        record(first.clone(), 7, "h:1"),
    ];
    let duplicate = put(1, both).await.unwrap_err();
    assert!(
        matches!(&duplicate, RegistryError::DuplicateName { name, .. } if *name == first),
        "{duplicate}"
    );
    assert_eq!(r.list_segments(&vm("web"), None, 10).await.unwrap().0.len(), 1);
    // Another VM's name, and one of a generation to come.
    assert!(put(1, vec![record(name("db", 1, 1), 1, "h:1")]).await.is_err());
    assert!(put(1, vec![record(name("web", 2, 1), 1, "h:1")]).await.is_err());
    let many = (0..=MAX_REGISTER_SEGMENTS as u64)
        .map(|e| record(name("web", 1, e), 1, "h:1"))
        .collect();
    assert!(matches!(put(1, many).await, Err(RegistryError::TooMany { .. })));
    // A generation that is over; the new one may tell of what the old one wrote.
    r.raise_generation(&vm("web"), Generation(1), "o2").await.unwrap();
    assert!(matches!(
        put(1, vec![record(name("web", 1, 2), 2, "h:1")]).await,
        Err(RegistryError::Fenced {
            current: Generation(2),
            ..
        })
    ));
    put(
        2,
        vec![
            record(name("web", 1, 2), 2, "h:3"),
            record(name("web", 2, 1), 3, "h:3"),
        ],
    )
    .await
    .unwrap();
    let newest = r.get_vm(&vm("web")).await.unwrap().newest.unwrap();
    assert_eq!(newest.name, name("web", 2, 1));
}

pub async fn lists_come_in_pages(r: Registry) {
    for id in ["a", "b", "c", "d", "e"] {
        r.create_vm(new_vm(id)).await.unwrap();
    }
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let (page, more) = r.list_vms(after, 2).await.unwrap();
        assert!(page.len() <= 2);
        seen.extend(page.iter().map(|v| v.vm.to_string()));
        after = page.last().map(|v| v.vm.clone());
        if !more {
            break;
        }
    }
    assert_eq!(seen, ["a", "b", "c", "d", "e"]);

    // Neither another VM's segments nor an order by text.
    for epoch in [1, 2, 9, 10, 11, 100] {
        r.register_segments(
            &vm("b"),
            Generation(1),
            vec![record(name("b", 1, epoch), 1, "h:1")],
        )
        .await
        .unwrap();
        r.register_segments(
            &vm("c"),
            Generation(1),
            vec![record(name("c", 1, epoch), 1, "h:1")],
        )
        .await
        .unwrap();
    }
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let (page, more) = r.list_segments(&vm("b"), after, 4).await.unwrap();
        seen.extend(page.iter().map(|s| s.name.epoch.0));
        after = page.last().map(|s| s.name.clone());
        if !more {
            break;
        }
    }
    assert_eq!(seen, [1, 2, 9, 10, 11, 100]);
}

pub async fn a_node_name_is_one_node(r: Registry) {
    r.join_node(node("n1", "127.0.0.1:1", 1), false).await.unwrap();
    // The same data directory at another address, and another directory at that address.
    r.join_node(node("n1", "127.0.0.1:2", 1), false).await.unwrap();
    r.join_node(node("n1", "127.0.0.1:2", 2), false).await.unwrap();
    let taken = r
        .join_node(node("n1", "127.0.0.1:3", 3), false)
        .await
        .unwrap_err();
    assert!(
        taken.to_string().contains("127.0.0.1:2") && taken.to_string().contains("--replace"),
        "{taken}"
    );
    r.join_node(node("n1", "127.0.0.1:3", 3), true).await.unwrap();
    let (nodes, _) = r.list_nodes(Some("m".into()), 10).await.unwrap();
    assert_eq!(nodes.iter().filter(|n| n.name == "n1").count(), 1);
    assert!(r.join_node(node("", "127.0.0.1:3", 3), true).await.is_err());
}

pub async fn the_oldest_records_go_when_there_are_too_many(r: Registry) {
    r.create_vm(new_vm("web")).await.unwrap();
    let last = MAX_SEGMENTS_PER_VM + 100;
    for first in (1..=last).step_by(MAX_REGISTER_SEGMENTS) {
        let records = (first..=last.min(first + MAX_REGISTER_SEGMENTS as u64 - 1))
            .map(|e| record(name("web", 1, e), 1, "h:1"))
            .collect();
        r.register_segments(&vm("web"), Generation(1), records)
            .await
            .unwrap();
    }
    let (page, _) = r.list_segments(&vm("web"), None, 1).await.unwrap();
    assert_eq!(page[0].name.epoch.0, 101);
}

pub async fn only_the_owner_says_how_it_fails_over(r: Registry) {
    let created = r.create_vm(new_vm("web")).await.unwrap();
    assert_eq!(created.failover, None);
    let failover = Failover {
        ttl_ms: 2500,
        renew_every_ms: 400,
        process: None,
        stop_on_lapse: None,
    };
    let said = r
        .set_failover(&vm("web"), Generation(1), Some(failover))
        .await
        .unwrap();
    assert_eq!(
        (said.failover, said.revision),
        (Some(failover), created.revision + 1)
    );
    let again = r
        .set_failover(&vm("web"), Generation(1), Some(failover))
        .await
        .unwrap();
    assert_eq!(again.revision, said.revision, "nothing changed");
    // A takeover has to know by which lease the owner before runs.
    let raised = r.raise_generation(&vm("web"), Generation(1), "o2").await.unwrap();
    assert_eq!(raised.failover, Some(failover));
    let over = r.set_failover(&vm("web"), Generation(1), None).await.unwrap_err();
    assert!(matches!(over, RegistryError::Fenced { .. }), "{over}");
    let hasty = Failover {
        renew_every_ms: 2000,
        ..failover
    };
    let refused = r
        .set_failover(&vm("web"), Generation(2), Some(hasty))
        .await
        .unwrap_err();
    assert!(matches!(refused, RegistryError::Invalid { .. }), "{refused}");
    let by_hand = r.set_failover(&vm("web"), Generation(2), None).await.unwrap();
    assert_eq!(by_hand.failover, None);
}

pub async fn a_history_has_its_last_entries_and_goes_with_the_vm(r: Registry) {
    let entry = |n: usize| {
        HistoryEntry::new(
            Generation(1),
            "birch",
            "taken-over",
            format!("number {n}\nin {n} ms"),
        )
    };
    let nobody = r.note(&vm("web"), entry(0)).await.unwrap_err();
    assert!(matches!(nobody, RegistryError::NoSuchVm { .. }), "{nobody}");
    r.create_vm(new_vm("web")).await.unwrap();
    assert_eq!(r.history(&vm("web")).await.unwrap(), []);
    for n in 0..MAX_HISTORY + 3 {
        r.note(&vm("web"), entry(n)).await.unwrap();
    }
    let history = r.history(&vm("web")).await.unwrap();
    assert_eq!(history.len(), MAX_HISTORY, "the oldest give way");
    assert_eq!(
        history[0].detail, "number 3 in 3 ms",
        "and none breaks a terminal's lines"
    );
    assert!(history.iter().all(|e| e.at_unix_ms > 0 && e.node == "birch"));
    assert!(
        history
            .windows(2)
            .all(|two| two[0].at_unix_ms <= two[1].at_unix_ms)
    );
    let long = HistoryEntry {
        detail: "x".repeat(5000),
        ..entry(1)
    };
    let refused = r.note(&vm("web"), long).await.unwrap_err();
    assert!(matches!(refused, RegistryError::Invalid { .. }), "{refused}");
    let odd = HistoryEntry {
        detail: "\u{1b}[2J".into(),
        ..entry(1)
    };
    let refused = r.note(&vm("web"), odd).await.unwrap_err();
    assert!(matches!(refused, RegistryError::Invalid { .. }), "{refused}");
    r.forget_vm(&vm("web"), true).await.unwrap();
    assert!(r.history(&vm("web")).await.is_err());
    r.create_vm(new_vm("web")).await.unwrap();
    assert_eq!(r.history(&vm("web")).await.unwrap(), []);
}
