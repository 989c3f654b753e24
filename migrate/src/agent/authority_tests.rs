//! The table of who may ask what, against the function: every request, every set of roles, every state of ownership.

use segment::{CheckpointId, Digest, Epoch, Generation, SegmentName, VmId};

use super::authority::*;
use crate::registry::{
    HistoryEntry, LeaseSubject, NodeRecord, OwnerProcess, RegistryRequest, SegmentRecord, VmState,
};
use crate::transport::{CertRole, NodeIdentity, Peer};
use crate::wire::{
    Call, CopyCall, DrillCall, FoldCall, ForgetCall, HoldingCall, KeepCall, ListCall, NameCall, Nothing,
    OwnerViewCall, ProcessCall, PromoteCall, SealCall, VerifyCall,
};

const HERE: &str = "here";
const ME: &str = "me";
const NOW: Generation = Generation(7);

/// What a request needs of one role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Nothing more.
    Nothing,
    /// That the registry says the VM is the peer's under the generation it names.
    Own,
    /// That the registry says that the generation it names is the newest, whoever's it is.
    Current,
    /// That the VM is another's, of which it has a copy.
    Copies,
    /// As `Own`; refused by the registry itself, and so let through, when it is nobody's or unknown.
    OwnIfKnown,
    /// That it is not known to be another's, or another generation.
    NotAnothers,
    /// That the VM is the peer's, under whatever generation.
    OwnAnyGeneration,
    /// It never may.
    Never,
}
use Needs::{Copies, Current, Never as X, NotAnothers, Nothing as Y, Own, OwnAnyGeneration, OwnIfKnown};

fn vm() -> VmId {
    VmId::new("web").unwrap()
}

fn name() -> SegmentName {
    SegmentName::new(vm(), NOW, Epoch(1))
}

fn node(name: &str, roles: &[&str]) -> RegistryRequest {
    RegistryRequest::JoinNode {
        node: NodeRecord {
            name: name.into(),
            address: "127.0.0.1:1".into(),
            id: [0; 16],
            roles: roles.iter().map(|r| (*r).to_owned()).collect(),
            labels: Default::default(),
            joined_unix_ms: 0,
            total_bytes: None,
            free_bytes: None,
            draining: None,
            alive: None,
        },
        replace: false,
    }
}

fn create(owner: &str) -> RegistryRequest {
    RegistryRequest::CreateVm {
        vm: vm(),
        owner: owner.into(),
        holders: vec![],
        ack_quorum: 1,
        every_ms: 1,
        claim: [0; 16],
        policy: None,
    }
}

fn raise(new_owner: &str) -> RegistryRequest {
    RegistryRequest::RaiseGeneration {
        vm: vm(),
        expected: NOW,
        new_owner: new_owner.into(),
        claim: [0; 16],
    }
}

fn note(node: &str) -> RegistryRequest {
    RegistryRequest::Note {
        vm: vm(),
        entry: HistoryEntry::new(NOW, node, "taken-over", "in no time".into()),
    }
}

fn owners_lease() -> LeaseSubject {
    LeaseSubject::Owner {
        vm: vm(),
        generation: NOW,
    }
}

fn nodes_lease(name: &str) -> LeaseSubject {
    LeaseSubject::Node {
        name: name.into(),
        id: [0; 16],
    }
}

fn lease(subject: LeaseSubject) -> RegistryRequest {
    RegistryRequest::GrantLease {
        subject,
        ttl_ms: 1000,
        lease: 1,
    }
}

fn alive(subject: LeaseSubject) -> RegistryRequest {
    RegistryRequest::KeepAlive { subject, lease: 1 }
}

fn revoke(subject: LeaseSubject) -> RegistryRequest {
    RegistryRequest::RevokeLease { subject, lease: 1 }
}

fn keep(policy: Option<&str>) -> Call {
    Call::Keep(KeepCall {
        vm: vm(),
        policy: policy.map(str::to_owned),
        only_here: false,
    })
}

/// Each call, what it needs of execute, store, owner and operator, and whether this node itself may always.
fn table() -> Vec<(Call, [Needs; 4], bool)> {
    let registry = Call::Registry;
    let record = SegmentRecord {
        name: name(),
        checkpoint: CheckpointId([0; 16]),
        digest: Digest([0; 32]),
        bytes: 0,
        parent: None,
        holders: vec![],
        created_unix_ns: 0,
    };
    let (vm_of, generation) = (vm, NOW);
    vec![
        (Call::Status(Nothing {}), [Y, Y, Y, Y], true),
        (
            Call::List(ListCall {
                vm: None,
                after: None,
                limit: 1,
            }),
            [Y, Y, Y, Y],
            true,
        ),
        (Call::Show(NameCall { name: name() }), [Y, Y, Y, Y], true),
        (keep(None), [Y, Y, Y, Y], true),
        (keep(Some("last=1")), [Y, X, X, Y], true),
        (
            Call::Promote(PromoteCall {
                vm: vm(),
                dry_run: false,
                accept_loss: false,
                force: false,
            }),
            [X, X, X, Y],
            true,
        ),
        (
            Call::Forget(ForgetCall {
                vm: vm(),
                force: true,
                only_here: true,
                wait_ms: None,
            }),
            [Y, X, X, Y],
            true,
        ),
        (
            Call::Drill(DrillCall {
                vm: vm(),
                watch_ms: 1,
            }),
            [X, X, X, Y],
            true,
        ),
        (Call::Fold(FoldCall { vm: vm(), tip: None }), [X, X, X, Y], true),
        (
            Call::Verify(VerifyCall {
                vm: None,
                sample: None,
            }),
            [X, X, X, Y],
            true,
        ),
        (Call::Import(Nothing {}), [X, X, X, Y], true),
        (
            Call::Holding(HoldingCall {
                vm: vm(),
                thorough: false,
            }),
            [Y, Y, X, Y],
            false,
        ),
        (
            Call::Seal(SealCall {
                vm: vm(),
                generation: NOW,
            }),
            [NotAnothers, X, Own, X],
            false,
        ),
        (
            Call::Copy(CopyCall {
                vm: vm(),
                generation: NOW,
                from: vec![],
            }),
            [Current, Current, X, Current],
            false,
        ),
        (
            Call::Fetch(NameCall { name: name() }),
            [Y, Y, OwnAnyGeneration, Y],
            false,
        ),
        (registry(node(ME, &[])), [Y, Y, X, X], false),
        (registry(node(ME, &["execute"])), [Y, X, X, X], false),
        (registry(node("other", &[])), [X, X, X, X], false),
        (registry(node(ME, &["god"])), [X, X, X, X], false),
        (
            registry(RegistryRequest::ListNodes {
                after: None,
                limit: 1,
            }),
            [Y, Y, Y, Y],
            false,
        ),
        (registry(create(ME)), [Y, X, Y, X], false),
        (registry(create("other")), [X, X, X, X], false),
        (registry(RegistryRequest::GetVm { vm: vm() }), [Y, Y, Y, Y], false),
        (
            registry(RegistryRequest::ListVms {
                after: None,
                limit: 1,
            }),
            [Y, Y, Y, Y],
            false,
        ),
        (registry(raise(ME)), [Y, X, OwnAnyGeneration, X], false),
        (registry(raise("other")), [X, X, X, X], false),
        (
            registry(RegistryRequest::SetHolders {
                vm: vm_of(),
                generation,
                revision: 1,
                holders: vec![],
                ack_quorum: 1,
            }),
            [OwnIfKnown, X, OwnIfKnown, X],
            false,
        ),
        (
            registry(RegistryRequest::SetVmState {
                vm: vm_of(),
                generation,
                state: VmState::Running,
            }),
            [OwnIfKnown, X, OwnIfKnown, X],
            false,
        ),
        (
            registry(RegistryRequest::SetFailover {
                vm: vm_of(),
                generation,
                failover: None,
            }),
            [OwnIfKnown, X, OwnIfKnown, X],
            false,
        ),
        (registry(note(ME)), [Y, Y, Y, Y], false),
        (registry(note("other")), [X, X, X, X], false),
        (
            registry(RegistryRequest::History { vm: vm_of() }),
            [Y, Y, Y, Y],
            false,
        ),
        (
            Call::OwnerView(OwnerViewCall { vm: vm_of() }),
            [Y, Y, X, Y],
            false,
        ),
        (
            Call::Process(ProcessCall {
                process: OwnerProcess {
                    boot: [0; 16],
                    namespace: 1,
                    pid: 1,
                    started: 1,
                },
            }),
            [Y, Y, X, Y],
            false,
        ),
        (
            registry(RegistryRequest::SetSwap {
                vm: vm_of(),
                generation,
                revision: 1,
                swap: None,
            }),
            [Y, Y, OwnIfKnown, X],
            false,
        ),
        (
            registry(lease(owners_lease())),
            [OwnIfKnown, X, OwnIfKnown, X],
            false,
        ),
        (
            registry(alive(owners_lease())),
            [OwnIfKnown, X, OwnIfKnown, X],
            false,
        ),
        (
            registry(revoke(owners_lease())),
            [OwnIfKnown, X, OwnIfKnown, X],
            false,
        ),
        (registry(lease(nodes_lease(ME))), [Y, Y, X, X], false),
        (registry(alive(nodes_lease(ME))), [Y, Y, X, X], false),
        (registry(revoke(nodes_lease(ME))), [Y, Y, X, X], false),
        (registry(lease(nodes_lease("other"))), [X, X, X, X], false),
        (registry(alive(nodes_lease("other"))), [X, X, X, X], false),
        (registry(revoke(nodes_lease("other"))), [X, X, X, X], false),
        (
            registry(RegistryRequest::AwaitChanges { after: 0, wait_ms: 1 }),
            [Y, Y, Y, Y],
            false,
        ),
        (
            registry(RegistryRequest::SetDraining {
                name: ME.into(),
                draining: true,
            }),
            [Y, Y, X, Y],
            false,
        ),
        (
            registry(RegistryRequest::SetDraining {
                name: "x".into(),
                draining: true,
            }),
            [X, X, X, Y],
            false,
        ),
        (
            registry(RegistryRequest::LeaveNode {
                name: ME.into(),
                force: false,
            }),
            [Y, Y, X, Y],
            false,
        ),
        (
            registry(RegistryRequest::LeaveNode {
                name: "x".into(),
                force: false,
            }),
            [X, X, X, Y],
            false,
        ),
        (
            registry(RegistryRequest::ForgetVm {
                vm: vm(),
                force: false,
            }),
            [Y, X, X, Y],
            false,
        ),
        (
            registry(RegistryRequest::RegisterSegments {
                vm: vm_of(),
                generation,
                segments: vec![record],
            }),
            [Y, Copies, OwnIfKnown, X],
            false,
        ),
        (
            registry(RegistryRequest::ListSegments {
                vm: vm(),
                after: None,
                limit: 1,
            }),
            [Y, Y, Y, Y],
            false,
        ),
    ]
}

/// Every state of ownership that makes a difference.
fn owners() -> Vec<Owner> {
    let mut all = vec![Owner::Nobody, Owner::Unknown];
    for node in [ME, "other"] {
        for generation in [6, 7, 8].map(Generation) {
            all.push(is(generation, node));
        }
    }
    all
}

fn is(generation: Generation, node: &str) -> Owner {
    Owner::Is {
        generation,
        node: node.into(),
        newest: Some(name()),
    }
}

fn met(needs: Needs, owner: &Owner) -> bool {
    let mine = *owner == is(NOW, ME);
    match needs {
        Needs::Nothing => true,
        Needs::Never => false,
        Needs::Own => mine,
        Needs::Copies => matches!(owner, Owner::Is { node, .. } if node == "other"),
        Needs::Current => mine || *owner == is(NOW, "other"),
        // Of another generation the registry says itself that it is over.
        Needs::OwnIfKnown => *owner != is(NOW, "other"),
        Needs::NotAnothers => mine || *owner == Owner::Unknown,
        Needs::OwnAnyGeneration => matches!(owner, Owner::Is { node, .. } if node == ME),
    }
}

fn peer(name: &str, roles: &[CertRole]) -> Peer {
    Peer::Node(NodeIdentity {
        cluster: None,
        name: name.into(),
        roles: roles.to_vec(),
    })
}

/// All sets of roles.
fn role_sets() -> Vec<Vec<CertRole>> {
    (0..16)
        .map(|set| {
            let all = CertRole::ALL.into_iter().enumerate();
            all.filter(|(at, _)| set >> at & 1 == 1)
                .map(|(_, role)| role)
                .collect()
        })
        .collect()
}

#[test]
fn every_call_is_allowed_to_whom_the_table_says() {
    let mut judged = 0;
    for (call, needs, here_may) in table() {
        for owner in owners() {
            for roles in role_sets() {
                let of_roles = CertRole::ALL
                    .into_iter()
                    .zip(needs)
                    .any(|(role, needs)| roles.contains(&role) && met(needs, &owner));
                let asked = Asked::Call(&call);
                let verdict = authorise(HERE, &peer(ME, &roles), asked, &owner);
                assert_eq!(
                    verdict.is_ok(),
                    of_roles,
                    "{call:?} by {roles:?} of {owner:?}: {verdict:?}"
                );
                if let Err(Denied::Never(why)) = verdict {
                    // In words, and about this peer or this VM.
                    assert!(
                        why.len() > 20 && (why.contains(ME) || why.contains("web")),
                        "{why}"
                    );
                }
                assert_eq!(authorise(HERE, &Peer::Anyone, asked, &owner), Ok(()), "{call:?}");
                if here_may {
                    let itself = authorise(HERE, &peer(HERE, &roles), asked, &owner);
                    assert_eq!(itself, Ok(()), "{call:?} by this node with {roles:?}");
                }
                judged += 1;
            }
        }
    }
    assert_eq!(judged, table().len() * 8 * 16);
}

#[test]
fn only_the_owner_of_the_generation_ships() {
    let vm = vm();
    for roles in role_sets() {
        let may = roles.contains(&CertRole::Owner) || roles.contains(&CertRole::Execute);
        for owner in owners() {
            let asked = Asked::Ship {
                vm: &vm,
                generation: NOW,
            };
            let verdict = authorise(HERE, &peer(ME, &roles), asked, &owner);
            let told = format!("{roles:?} {owner:?} {verdict:?}");
            match (&owner, &verdict) {
                (_, Err(Denied::Never(_))) if !may => {}
                _ if !may => panic!("{told}"),
                (Owner::Unknown, Err(Denied::Later(_))) | (Owner::Nobody, Err(Denied::Never(_))) => {}
                (Owner::Is { generation, .. }, Err(Denied::Over { current })) if *generation > NOW => {
                    assert_eq!(current, generation, "{told}");
                }
                (Owner::Is { generation, .. }, Err(Denied::Never(_))) if *generation < NOW => {}
                (Owner::Is { node, .. }, Ok(())) if met(Own, &owner) => assert_eq!(node, ME, "{told}"),
                (Owner::Is { node, .. }, Err(Denied::Never(_))) if node == "other" => {}
                _ => panic!("{told}"),
            }
        }
    }
}

#[test]
fn an_old_seal_is_told_which_generation_is() {
    let call = Call::Seal(SealCall {
        vm: vm(),
        generation: NOW,
    });
    let verdict = authorise(
        HERE,
        &peer(ME, &[CertRole::Execute]),
        Asked::Call(&call),
        &is(Generation(9), "other"),
    );
    let current = Generation(9);
    assert_eq!(verdict, Err(Denied::Over { current }));
}

#[test]
fn whose_a_vm_is_is_looked_up_only_where_it_matters() {
    for (call, needs, _) in table() {
        let matters = needs.iter().any(|n| !matches!(n, Needs::Nothing | Needs::Never));
        let raises_for_another = matches!(&call, Call::Registry(RegistryRequest::RaiseGeneration { new_owner, .. }) if new_owner != ME);
        assert_eq!(
            whose(Asked::Call(&call)).is_some(),
            matters || raises_for_another,
            "{call:?}"
        );
    }
}

/// What is committed is its owner's to say: a copy of anything newer is not believed, nor one where nothing is committed.
#[test]
fn who_copies_registers_only_what_is_committed() {
    let record = |epoch| SegmentRecord {
        name: SegmentName::new(vm(), NOW, Epoch(epoch)),
        checkpoint: CheckpointId([0; 16]),
        digest: Digest([0; 32]),
        bytes: 0,
        parent: None,
        holders: vec![],
        created_unix_ns: 0,
    };
    let verdict = |of: &str, newest: Option<u64>, epochs: &[u64]| {
        let call = Call::Registry(RegistryRequest::RegisterSegments {
            vm: vm(),
            generation: NOW,
            segments: epochs.iter().copied().map(record).collect(),
        });
        let owner = Owner::Is {
            generation: NOW,
            node: of.into(),
            newest: newest.map(|epoch| record(epoch).name),
        };
        authorise(HERE, &peer(ME, &[CertRole::Execute]), Asked::Call(&call), &owner)
    };
    assert_eq!(verdict("other", Some(5), &[1, 5]), Ok(()));
    for (newest, epochs) in [(Some(5), &[1, 6][..]), (None, &[1])] {
        let Err(Denied::Never(why)) = verdict("other", newest, epochs) else {
            panic!("{newest:?} {epochs:?}");
        };
        assert!(why.contains("may not register web/7/"), "{why}");
    }
    // The owner does.
    assert_eq!(verdict(ME, None, &[1, 6]), Ok(()));
}
