use std::collections::BTreeSet;

use proptest::prelude::*;
use segment::Generation;

use super::*;
use crate::registry::LiveLease;

fn vm() -> VmId {
    VmId::new("web").unwrap()
}

fn node(name: &str, zone: &str) -> NodeRecord {
    NodeRecord {
        name: name.into(),
        address: format!("{name}:7400"),
        id: [1; 16],
        roles: vec!["store".into()],
        labels: [("zone".to_owned(), zone.to_owned())].into(),
        joined_unix_ms: 0,
        total_bytes: Some(100 << 30),
        free_bytes: Some(50 << 30),
        draining: None,
        alive: Some(LiveLease {
            lease: 1,
            ttl_ms: 5000,
        }),
    }
}

fn six() -> Vec<NodeRecord> {
    [
        ("a1", "a"),
        ("a2", "a"),
        ("b1", "b"),
        ("b2", "b"),
        ("c1", "c"),
        ("c2", "c"),
    ]
    .map(|(name, zone)| node(name, zone))
    .into()
}

fn policy(replicas: u32, labels: &[&str]) -> Policy {
    Policy {
        labels: labels.iter().map(|l| l.parse().unwrap()).collect(),
        ..Policy::of(replicas)
    }
}

fn placed(policy: &Policy, owner: &str, held: &[String], nodes: &[NodeRecord]) -> Placement {
    let placing = Placing {
        vm: &vm(),
        policy,
        owner,
        held,
    };
    place(&placing, nodes)
}

fn names(placement: &Placement) -> BTreeSet<&str> {
    placement.chosen.iter().map(|c| c.node.as_str()).collect()
}

#[test]
fn rules_are_read_as_they_are_written() {
    for text in ["zone=a", "zone!=a", "zone!=", "ssd", "rack/row=7"] {
        assert_eq!(text.parse::<LabelRule>().unwrap().to_string(), text);
    }
    for bad in ["", "=a", "!=", "zone=", "a b", "zone=a=b", "zone=ü"] {
        assert!(bad.parse::<LabelRule>().is_err(), "{bad}");
    }
}

#[test]
fn another_zone_than_the_owners() {
    let placement = placed(&policy(3, &["zone!="]), "a1", &[], &six());
    assert_eq!(placement.chosen.len(), 3);
    assert!(placement.chosen.iter().all(|c| !c.node.starts_with('a')));
    let own = placement.refused.iter().find(|r| r.node == "a1").unwrap();
    assert!(own.why.contains("runs there"), "{}", own.why);
    let same = placement.refused.iter().find(|r| r.node == "a2").unwrap();
    assert!(
        same.why.contains("zone!=") && same.why.contains("zone=a"),
        "{}",
        same.why
    );
    // From outside of the cluster it cannot be told.
    let lost = placed(&policy(3, &["zone!="]), "elsewhere", &[], &six());
    assert_eq!(lost.missing, 3);
    assert!(lost.shortage().contains("no label zone"), "{}", lost.shortage());
}

#[test]
fn spread_takes_each_value_before_any_twice() {
    let spread = Policy {
        spread: Some("zone".into()),
        ..Policy::of(3)
    };
    let placement = placed(&spread, "x", &[], &six());
    let zones: BTreeSet<_> = placement.chosen.iter().map(|c| &c.node[..1]).collect();
    assert_eq!(zones.len(), 3, "{placement:?}");
    // With one held, the others go elsewhere.
    let placement = placed(&spread, "x", &["b2:7400".to_owned()], &six());
    assert!(names(&placement).contains("b2") && !names(&placement).contains("b1"));
}

#[test]
fn who_cannot_is_told_why() {
    let mut nodes = six();
    nodes[0].alive = None;
    nodes[1].draining = Some(true);
    nodes[2].roles = vec!["execute".into()];
    nodes[3].free_bytes = Some(1 << 20);
    nodes[4].free_bytes = None;
    let wanting = Policy {
        min_free_bytes: 1 << 30,
        ..Policy::of(2)
    };
    let placement = placed(&wanting, "x", &["gone:1".to_owned()], &nodes);
    assert_eq!((names(&placement), placement.missing), (["c2"].into(), 1));
    let why: Vec<_> = placement.refused.iter().map(|r| r.why.as_str()).collect();
    for part in [
        "lease",
        "drained",
        "does not store",
        "1.0 MiB free",
        "does not say",
        "no node",
    ] {
        assert!(why.iter().any(|w| w.contains(part)), "{why:?} lacks {part}");
    }
}

fn record(holders: &[&str], policy: Option<Policy>) -> VmRecord {
    VmRecord {
        vm: vm(),
        generation: Generation(1),
        revision: 1,
        owner: "x".into(),
        holders: holders.iter().map(|h| format!("{h}:7400")).collect(),
        ack_quorum: 2,
        every_ms: 200,
        state: VmState::Running,
        changed_unix_ms: 0,
        newest: None,
        claim: [0; 16],
        policy,
        leased: None,
        swap: None,
        alive: None,
        failover: None,
    }
}

fn watched(nodes: Vec<NodeRecord>, gone: &[(&str, u64)]) -> Vec<Watched> {
    nodes
        .into_iter()
        .map(|mut node| {
            let gone = gone.iter().find(|(name, _)| *name == node.name);
            let gone_for = gone.map(|(_, s)| Duration::from_secs(*s));
            if gone_for.is_some() {
                node.alive = None;
            }
            Watched { node, gone_for }
        })
        .collect()
}

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_dead_holder_is_replaced_after_a_while() {
    let vm = record(&["a1", "b1", "c1"], Some(Policy::of(3)));
    assert_eq!(repair(&vm, &watched(six(), &[]), PATIENCE), Verdict::Right);
    let soon = repair(&vm, &watched(six(), &[("b1", 59)]), PATIENCE);
    assert!(matches!(soon, Verdict::Wait(_)), "{soon:?}");
    let Verdict::Repair(Repair { swap, sources, why }) =
        repair(&vm, &watched(six(), &[("b1", 60)]), PATIENCE)
    else {
        panic!("no repair");
    };
    assert_eq!(swap.leaving.as_deref(), Some("b1:7400"));
    assert!(!vm.holders.contains(&swap.joining));
    assert_eq!(sources, ["a1:7400", "c1:7400"]);
    assert!(why.contains("b1"), "{why}");
    // One at a time.
    let busy = VmRecord {
        swap: Some(swap),
        ..vm
    };
    let joining = busy.swap.as_ref().unwrap().joining.replace(":7400", "");
    assert!(matches!(
        repair(&busy, &watched(six(), &[("b1", 60), ("c1", 60)]), PATIENCE),
        Verdict::Wait(_)
    ));
    // Who was to join is gone too: another is looked for after that.
    let given_up = repair(
        &busy,
        &watched(six(), &[("b1", 60), (joining.as_str(), 60)]),
        PATIENCE,
    );
    assert!(matches!(given_up, Verdict::GiveUp(_)), "{given_up:?}");
    // Of a stopped one nobody knows what is committed.
    let stopped = VmRecord {
        state: VmState::Stopped,
        swap: None,
        ..busy
    };
    let wait = repair(&stopped, &watched(six(), &[("b1", 60)]), PATIENCE);
    assert!(matches!(wait, Verdict::Wait(_)), "{wait:?}");
}

#[test]
fn a_drained_holder_serves_until_it_is_replaced() {
    for policy in [Some(Policy::of(3)), None] {
        let vm = record(&["a1", "b1", "c1"], policy);
        let mut nodes = six();
        nodes[2].draining = Some(true);
        let Verdict::Repair(Repair { swap, sources, .. }) = repair(&vm, &watched(nodes, &[]), PATIENCE)
        else {
            panic!("no repair");
        };
        assert_eq!(swap.leaving.as_deref(), Some("b1:7400"));
        assert_eq!(sources.len(), 3);
    }
}

#[test]
fn holders_that_a_person_named_are_left_alone() {
    let vm = record(&["a1", "b1"], None);
    assert_eq!(
        repair(&vm, &watched(six(), &[("b1", 9999)]), PATIENCE),
        Verdict::Right
    );
}

#[test]
fn nobody_to_take_the_place_is_said() {
    let vm = record(&["a1", "b1"], Some(Policy::of(2)));
    let nodes = vec![node("a1", "a"), node("b1", "b")];
    let verdict = repair(&vm, &watched(nodes, &[("b1", 100)]), PATIENCE);
    let Verdict::Short(why) = verdict else {
        panic!("{verdict:?}")
    };
    assert!(why.contains("b1") && why.contains("lease is gone"), "{why}");
}

fn any_node(at: usize) -> impl Strategy<Value = NodeRecord> {
    (
        "[abc]",
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        prop::option::of(0u64..1 << 40),
    )
        .prop_map(move |(zone, alive, draining, stores, free)| NodeRecord {
            alive: alive.then_some(LiveLease { lease: 1, ttl_ms: 1 }),
            draining: draining.then_some(true),
            roles: vec![if stores { "store" } else { "execute" }.into()],
            free_bytes: free,
            ..node(&format!("n{at}"), &zone)
        })
}

fn any_nodes() -> impl Strategy<Value = Vec<NodeRecord>> {
    (0usize..10).prop_flat_map(|n| (0..n).map(any_node).collect::<Vec<_>>())
}

proptest! {
    #[test]
    fn what_is_chosen_is_able_and_as_many_as_can_be(
        nodes in any_nodes(),
        replicas in 1u32..5,
        held in prop::collection::vec(0usize..10, 0..4),
        spread in any::<bool>(),
        order in any::<u64>(),
    ) {
        let policy = Policy {
            spread: spread.then(|| "zone".into()),
            labels: vec!["zone!=c".parse().unwrap()],
            ..Policy::of(replicas)
        };
        let held: Vec<_> = held.iter().map(|n| format!("n{n}:7400")).collect();
        let placement = placed(&policy, "n0", &held, &nodes);
        let able: BTreeSet<_> = nodes
            .iter()
            .filter(|n| n.is_alive() && !n.is_draining() && n.has_role(Role::Store))
            .filter(|n| n.labels["zone"] != "c" && n.name != "n0")
            .map(|n| n.name.as_str())
            .collect();
        // As the plain rule says, each once, and all there is to have.
        prop_assert!(names(&placement).is_subset(&able));
        prop_assert_eq!(names(&placement).len(), placement.chosen.len());
        prop_assert_eq!(placement.chosen.len(), able.len().min(replicas as usize));
        prop_assert_eq!(placement.missing as usize, replicas as usize - placement.chosen.len());
        // Every node is accounted for, with a reason.
        let told: BTreeSet<_> = placement.refused.iter().map(|r| r.node.as_str()).chain(names(&placement)).collect();
        prop_assert!(nodes.iter().all(|n| told.contains(n.name.as_str())));
        // A holder that is able stays before anyone new comes.
        let stay = able.iter().filter(|n| held.contains(&format!("{n}:7400"))).count();
        let kept = placement.chosen.iter().filter(|c| c.held).count();
        prop_assert_eq!(kept, stay.min(replicas as usize));
        // The order in which the nodes are listed is nothing, nor is what their clocks say.
        let mut other = nodes.clone();
        for (node, hours) in other.iter_mut().zip(0u64..) {
            node.joined_unix_ms = order.wrapping_mul(hours);
        }
        other.sort_by_key(|n| draw(&vm(), &format!("{order}{}", n.name)));
        prop_assert_eq!(placed(&policy, "n0", &held, &other).chosen, placement.chosen);
    }

    #[test]
    fn repairs_end_with_the_right_count(
        nodes in any_nodes(),
        replicas in 1u32..5,
        held in prop::collection::btree_set(1usize..10, 1..5),
    ) {
        let held: Vec<String> = held.iter().map(|n| format!("n{n}")).collect();
        let held: Vec<&str> = held.iter().map(String::as_str).collect();
        let mut vm = record(&held, Some(Policy::of(replicas)));
        let watched: Vec<_> = nodes
            .iter()
            .map(|n| Watched { node: n.clone(), gone_for: (!n.is_alive()).then_some(PATIENCE) })
            .collect();
        let able = |address: &String| nodes.iter().any(|n| {
            n.address == *address && n.is_alive() && !n.is_draining() && n.has_role(Role::Store)
        });
        for _ in 0..20 {
            let before = vm.holders.len();
            match repair(&vm, &watched, PATIENCE) {
                Verdict::Right => {
                    // Whoever stays lives and is not drained, and they are enough.
                    prop_assert!(vm.holders.len() >= replicas as usize);
                    for holder in &vm.holders {
                        let node = nodes.iter().find(|n| n.address == *holder);
                        prop_assert!(node.is_some_and(|n| n.is_alive() && !n.is_draining()));
                    }
                    return Ok(());
                }
                Verdict::Short(_) => return Ok(()),
                Verdict::Wait(why) | Verdict::GiveUp(why) => prop_assert!(false, "it waits for {}", why),
                Verdict::Repair(Repair { swap, sources, .. }) => {
                    prop_assert!(able(&swap.joining));
                    prop_assert!(!vm.holders.contains(&swap.joining));
                    prop_assert!(!sources.is_empty());
                    if let Some(leaving) = &swap.leaving {
                        vm.holders.retain(|h| h != leaving);
                    }
                    vm.holders.push(swap.joining);
                    prop_assert!(vm.holders.len() >= before);
                }
            }
        }
        prop_assert!(false, "it never ends");
    }
}
