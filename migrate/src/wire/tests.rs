use proptest::prelude::*;
use segment::{CheckpointId, Digest, Epoch, Generation, SegmentName, VmId};

use super::*;
use crate::placement::Policy;
use crate::registry::{
    Changed, Changes, Failover, HistoryEntry, HolderSwap, Lease, LeaseSubject, LiveLease, NodeRecord,
    OwnerProcess, RegistryError, RegistryRequest, RegistryResponse, SegmentRecord, Stamp, VmRecord, VmState,
};

fn name(epoch: u64) -> SegmentName {
    SegmentName::new(vm(), Generation(2), Epoch(epoch))
}

fn vm() -> VmId {
    VmId::new("web").unwrap()
}

fn held(epoch: u64) -> Held {
    Held {
        name: name(epoch),
        checkpoint: CheckpointId([epoch as u8; 16]),
    }
}

fn ack() -> Ack {
    Ack {
        generation: Generation(3),
        held: held(7),
        digest: Digest([9; 32]),
    }
}

fn brief() -> SegmentBrief {
    SegmentBrief {
        name: name(7),
        checkpoint: CheckpointId([7; 16]),
        digest: Digest([9; 32]),
        bytes: 1 << 33,
        parent: Some(held(6)),
        created_unix_ns: 1_700_000_000_000_000_000,
        links: 6,
        complete: true,
        label: Some("before the upgrade".into()),
    }
}

fn vm_record() -> VmRecord {
    VmRecord {
        vm: vm(),
        generation: Generation(2),
        revision: 5,
        owner: "node-a".into(),
        holders: vec!["127.0.0.1:7400".into(), "127.0.0.1:7401".into()],
        ack_quorum: 1,
        every_ms: 200,
        state: VmState::Stopped,
        changed_unix_ms: 1_700_000_000_000,
        newest: Some(held(7)),
        claim: [4; 16],
        policy: Some(policy()),
        leased: Some(2),
        swap: Some(swap()),
        alive: Some(live()),
        failover: Some(failover()),
    }
}

fn failover() -> Failover {
    Failover {
        ttl_ms: 2500,
        renew_every_ms: 400,
        process: Some(OwnerProcess {
            boot: [5; 16],
            namespace: 4_026_531_836,
            pid: 77,
            started: 12_345,
        }),
        stop_on_lapse: Some(true),
    }
}

fn policy() -> Policy {
    Policy {
        labels: vec!["zone!=".parse().unwrap()],
        spread: Some("rack".into()),
        ..Policy::of(3)
    }
}

fn swap() -> HolderSwap {
    HolderSwap {
        joining: "127.0.0.1:7403".into(),
        leaving: Some("127.0.0.1:7401".into()),
    }
}

fn live() -> LiveLease {
    LiveLease {
        lease: 7,
        ttl_ms: 5000,
    }
}

fn stamp() -> Option<Stamp> {
    Some(Stamp {
        registry: u64::MAX,
        revision: 12,
        term: 2,
    })
}

fn subject() -> LeaseSubject {
    LeaseSubject::Owner {
        vm: vm(),
        generation: Generation(2),
    }
}

fn segment_record() -> SegmentRecord {
    SegmentRecord {
        name: name(7),
        checkpoint: CheckpointId([7; 16]),
        digest: Digest([9; 32]),
        bytes: 77,
        parent: None,
        holders: vec!["127.0.0.1:7400".into()],
        created_unix_ns: 8,
    }
}

fn node() -> NodeRecord {
    NodeRecord {
        name: "a".into(),
        address: "127.0.0.1:7400".into(),
        id: [1; 16],
        roles: vec!["store".into()],
        labels: [("zone".to_owned(), "b".to_owned())].into(),
        joined_unix_ms: 3,
        total_bytes: Some(4),
        free_bytes: None,
        draining: Some(true),
        alive: Some(live()),
    }
}

/// The frames of the replication flow, and their bytes. These may never change: nodes of two versions meet.
fn golden() -> Vec<(Message, &'static str)> {
    vec![
        (
            Message::Hello(Hello {
                min_version: 1,
                max_version: 2,
                cluster: "c".into(),
                purpose: Purpose::Ship,
                name: "n".into(),
            }),
            "555346310100000005000000 0d000000 a5 00 01 01 02 02 61 63 03 00 04 61 6e",
        ),
        (
            Message::Welcome(Welcome {
                version: 1,
                node: "n".into(),
                registry: Some("r".into()),
                software: "s".into(),
            }),
            "555346310200000005000000 0c000000 a4 00 01 01 61 6e 02 61 72 03 61 73",
        ),
        (
            Message::Reject(Reject {
                code: 3,
                why: "w".into(),
            }),
            "555346310300000005000000 06000000 a2 00 03 01 61 77",
        ),
        (Message::Ping(Ping {}), "555346310400000005000000 01000000 a0"),
        (
            Message::Open(Open {
                vm: vm(),
                generation: Generation(3),
                owner: "o".into(),
                lease_ttl_ms: None,
            }),
            "555346310a00000005000000 0b000000 a3 00 63 776562 01 03 02 61 6f",
        ),
        (
            Message::Position(Position {
                generation: Generation(3),
                newest: Some(held(7)),
            }),
            "555346310b00000005000000 20000000 a2 00 03 01 a2 00 67 7765622f322f37 01 50 07070707070707070707070707070707",
        ),
        (
            Message::Position(Position {
                generation: Generation(3),
                newest: None,
            }),
            "555346310b00000005000000 03000000 a1 00 03",
        ),
        (
            Message::Offer(Offer {
                generation: Generation(3),
                name: name(7),
                checkpoint: CheckpointId([7; 16]),
                digest: Digest([9; 32]),
                bytes: 300,
                parent: Some(held(6)),
                created_unix_ns: 8,
            }),
            "555346310c00000005000000 64000000 a7 00 03 01 67 7765622f322f37 02 50 07070707070707070707070707070707 \
             03 5820 0909090909090909090909090909090909090909090909090909090909090909 04 19012c \
             05 a2 00 67 7765622f322f36 01 50 06060606060606060606060606060606 06 08",
        ),
        (Message::Accept(Accept {}), "555346310d00000005000000 01000000 a0"),
        (
            Message::Have(ack()),
            "555346310e00000005000000 43000000 a3 00 03 01 a2 00 67 7765622f322f37 01 50 07070707070707070707070707070707 \
             02 5820 0909090909090909090909090909090909090909090909090909090909090909",
        ),
        (
            Message::Refuse(Refuse {
                generation: Generation(3),
                reason: RefuseReason::Full,
                why: "w".into(),
            }),
            "555346310f00000005000000 08000000 a3 00 03 01 01 02 61 77",
        ),
        (
            Message::Chunk(vec![1, 2, 3]),
            "555346311000000005000000 03000000 010203",
        ),
        (Message::End(End {}), "555346311100000005000000 01000000 a0"),
        (Message::Abort(Abort {}), "555346311200000005000000 01000000 a0"),
        (
            Message::Stored(ack()),
            "555346311300000005000000 43000000 a3 00 03 01 a2 00 67 7765622f322f37 01 50 07070707070707070707070707070707 \
             02 5820 0909090909090909090909090909090909090909090909090909090909090909",
        ),
        (
            Message::Fenced(Fenced {
                vm: vm(),
                asked: Generation(2),
                current: Generation(3),
            }),
            "555346311400000005000000 0a000000 a3 00 63 776562 01 02 02 03",
        ),
        (
            Message::Renew(Renew { seq: 5 }),
            "555346311500000005000000 03000000 a1 00 05",
        ),
        (
            Message::Granted(Granted { seq: 5 }),
            "555346311600000005000000 03000000 a1 00 05",
        ),
        (
            Message::Released(Released {}),
            "555346311700000005000000 01000000 a0",
        ),
        (
            Message::Call(Box::new(Call::Seal(SealCall {
                vm: vm(),
                generation: Generation(3),
            }))),
            "555346312000000005000000 0b000000 82 06 81 a2 00 63 776562 01 03",
        ),
        (
            Message::Reply(Box::new(Reply::Sealed(SealReport {
                generation: Generation(3),
                newest: None,
                had: None,
                dangling: None,
                grant_remaining_ms: None,
            }))),
            "555346312100000005000000 06000000 82 07 81 a1 00 03",
        ),
    ]
}

fn calls() -> Vec<Message> {
    let requests = [
        RegistryRequest::JoinNode {
            node: node(),
            replace: true,
        },
        RegistryRequest::ListNodes {
            after: None,
            limit: 3,
        },
        RegistryRequest::CreateVm {
            vm: vm(),
            owner: "o".into(),
            holders: vec!["h".into()],
            ack_quorum: 1,
            every_ms: 200,
            claim: [3; 16],
            policy: Some(policy()),
        },
        RegistryRequest::GetVm { vm: vm() },
        RegistryRequest::ListVms {
            after: Some(vm()),
            limit: 3,
        },
        RegistryRequest::RaiseGeneration {
            vm: vm(),
            expected: Generation(1),
            new_owner: "n".into(),
            claim: [3; 16],
        },
        RegistryRequest::SetHolders {
            vm: vm(),
            generation: Generation(1),
            revision: 4,
            holders: vec!["h".into()],
            ack_quorum: 1,
        },
        RegistryRequest::SetVmState {
            vm: vm(),
            generation: Generation(1),
            state: VmState::Running,
        },
        RegistryRequest::SetFailover {
            vm: vm(),
            generation: Generation(1),
            failover: Some(failover()),
        },
        RegistryRequest::ForgetVm {
            vm: vm(),
            force: false,
        },
        RegistryRequest::RegisterSegments {
            vm: vm(),
            generation: Generation(2),
            segments: vec![segment_record()],
        },
        RegistryRequest::Note {
            vm: vm(),
            entry: history_entry(),
        },
        RegistryRequest::History { vm: vm() },
        RegistryRequest::ListSegments {
            vm: vm(),
            after: Some(name(3)),
            limit: 5,
        },
        RegistryRequest::GrantLease {
            subject: subject(),
            ttl_ms: 5000,
            lease: 7,
        },
        RegistryRequest::KeepAlive {
            subject: LeaseSubject::Node {
                name: "a".into(),
                id: [1; 16],
            },
            lease: 7,
        },
        RegistryRequest::RevokeLease {
            subject: subject(),
            lease: 7,
        },
        RegistryRequest::AwaitChanges {
            after: 5,
            wait_ms: 100,
        },
        RegistryRequest::SetSwap {
            vm: vm(),
            generation: Generation(1),
            revision: 4,
            swap: Some(swap()),
        },
        RegistryRequest::SetDraining {
            name: "a".into(),
            draining: true,
        },
        RegistryRequest::LeaveNode {
            name: "a".into(),
            force: false,
        },
    ];
    let calls = [
        Call::Status(Nothing {}),
        Call::List(ListCall {
            vm: Some(vm()),
            after: None,
            limit: 10,
        }),
        Call::Show(NameCall { name: name(1) }),
        Call::Promote(PromoteCall {
            vm: vm(),
            dry_run: true,
            accept_loss: true,
            force: true,
        }),
        Call::Holding(HoldingCall {
            vm: vm(),
            thorough: true,
        }),
        Call::Forget(ForgetCall {
            vm: vm(),
            force: true,
            only_here: false,
            wait_ms: None,
        }),
        Call::Fetch(NameCall { name: name(1) }),
        Call::Drill(DrillCall {
            vm: vm(),
            watch_ms: 5,
        }),
        Call::Copy(CopyCall {
            vm: vm(),
            generation: Generation(2),
            from: vec!["h:1".into()],
        }),
    ];
    let calls = requests.into_iter().map(Call::Registry).chain(calls);
    calls.map(|c| Message::Call(Box::new(c))).collect()
}

fn history_entry() -> HistoryEntry {
    HistoryEntry {
        at_unix_ms: 7,
        times: vec![PhaseTime {
            phase: "raise".into(),
            us: 9,
        }],
        ..HistoryEntry::new(Generation(2), "birch", "taken-over", "in 9 us".into())
    }
}

fn replies() -> Vec<Message> {
    let responses = [
        RegistryResponse::Done,
        RegistryResponse::Node(node()),
        RegistryResponse::Nodes(vec![node()], true),
        RegistryResponse::Vm(vm_record()),
        RegistryResponse::Vms(vec![vm_record()], false),
        RegistryResponse::Segments(vec![segment_record()], true),
        RegistryResponse::Lease(Lease { id: 7, ttl_ms: 5000 }, Some(vm_record())),
        RegistryResponse::Changes(Changes {
            revision: 9,
            changed: vec![Changed::Vm { vm: vm() }, Changed::Node { name: "a".into() }],
            complete: true,
        }),
        RegistryResponse::History(vec![history_entry()]),
    ];
    let owner = || "o".to_owned();
    let errors = [
        RegistryError::VmTaken {
            vm: vm(),
            owner: owner(),
            generation: Generation(1),
            state: "running".into(),
        },
        RegistryError::NoSuchVm { vm: vm() },
        RegistryError::Conflict {
            vm: vm(),
            expected: Generation(1),
            current: Generation(2),
            owner: owner(),
        },
        RegistryError::Revision {
            vm: vm(),
            expected: 1,
            current: 2,
        },
        RegistryError::Fenced {
            vm: vm(),
            asked: Generation(1),
            current: Generation(2),
            owner: owner(),
        },
        RegistryError::DuplicateName {
            name: name(1),
            held: CheckpointId([1; 16]),
            given: CheckpointId([2; 16]),
        },
        RegistryError::NodeTaken {
            name: "a".into(),
            address: "b".into(),
        },
        RegistryError::TooMany {
            what: "x".into(),
            max: 3,
        },
        RegistryError::Invalid { why: "w".into() },
        RegistryError::Storage { why: "w".into() },
        RegistryError::Unavailable {
            address: "a".into(),
            why: "w".into(),
        },
        RegistryError::NotHere {
            node: "n".into(),
            registry: "r".into(),
        },
        RegistryError::LeaseGone { subject: subject() },
        RegistryError::NoSuchNode { name: "a".into() },
        RegistryError::Past {
            address: "a".into(),
            why: "w".into(),
        },
        RegistryError::Denied {
            address: "a".into(),
            why: "w".into(),
        },
        RegistryError::Busy { what: "w".into() },
    ];
    let status = AgentStatus {
        node: "n".into(),
        address: "a".into(),
        software: "s".into(),
        roles: vec!["store".into()],
        registry: "embedded".into(),
        used_bytes: 1,
        budget_bytes: Some(2),
        vms: vec![VmStatus {
            vm: vm(),
            promised: Generation(2),
            segments: 3,
            bytes: 4,
            newest: Some(brief()),
            shipping: None,
            hot_at: Some(brief().name),
            cold: Some("c".into()),
            drill: Some(LastDrill {
                at_unix_ms: 5,
                segment: Some(brief().name),
                recovery_us: Some(6),
                age_ms: Some(7),
                failed: Some("f".into()),
            }),
        }],
        damaged: vec!["d".into()],
        connections: 5,
        registry_problem: None,
        keep: None,
        store_problem: None,
        verified_unix_s: None,
        global: None,
    };
    let detail = SegmentDetail {
        segment: brief(),
        producer: "p".into(),
        spaces: vec![SpaceBrief {
            id: 0,
            name: "memory".into(),
            page_bytes: 4096,
            pages: 100,
        }],
        records: 3,
        frames: 4,
        first_epoch: Some(5),
        incomplete: Some("why".into()),
        key: Some("0123456789abcdef".into()),
    };
    let report = PromoteReport {
        vm: vm(),
        generation: Generation(2),
        resumed_from: Some(held(3)),
        total_us: 10,
        phases: vec![PhaseTime {
            phase: "seal".into(),
            us: 4,
        }],
        pid: Some(3),
        socket: Some("/run/x".into()),
        notes: vec!["n".into()],
        dry_run: false,
    };
    let replies = [
        Reply::Status(status),
        Reply::List(SegmentPage {
            segments: vec![brief()],
            more: true,
        }),
        Reply::Show(detail),
        Reply::Promoted(report),
        Reply::Forgotten(ForgetReport {
            segments: 1,
            bytes: 2,
            notes: vec![],
            left: 3,
        }),
        Reply::Fetch(brief()),
        Reply::Drilled(DrillReport {
            segment: brief(),
            recovery_us: 1,
            age_ms: 2,
            watched_ms: 3,
        }),
        Reply::Copied(CopyReport {
            segments: 1,
            bytes: 2,
            newest: Some(held(3)),
            notes: vec!["n".into()],
        }),
        Reply::Failed(Failure { why: "w".into() }),
        Reply::Fenced(Fenced {
            vm: vm(),
            asked: Generation(1),
            current: Generation(2),
        }),
    ];
    let registry = responses.into_iter().map(|r| Reply::Registry(r, stamp()));
    let refused = errors.into_iter().map(|e| Reply::RegistryRefused(e, None));
    registry
        .chain(refused)
        .chain(replies)
        .map(|r| Message::Reply(Box::new(r)))
        .collect()
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digits: Vec<_> = hex.chars().filter(|c| !c.is_whitespace()).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap())
        .collect()
}

fn encode(stream: u32, message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    encode_frame(stream, message, &mut out).unwrap();
    out
}

fn decode(bytes: &[u8]) -> Result<(FrameHeader, Message), WireError> {
    let header = FrameHeader::parse(bytes[..HEADER_BYTES].try_into().unwrap())?;
    let message = Message::decode(header.kind, bytes[HEADER_BYTES..].to_vec())?;
    Ok((header, message))
}

#[test]
fn frames_have_the_bytes_that_were_agreed() {
    let all = golden();
    for (message, hex) in &all {
        let bytes = encode(5, message);
        let shown: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(bytes, bytes_of(hex), "{message:?} is now {shown}");
        let (header, back) = decode(&bytes).unwrap();
        assert_eq!((header.stream, &back), (5, message));
    }
    // Every type of frame is among them.
    for kind in FrameType::ALL {
        assert!(
            all.iter().any(|(m, _)| m.kind() == *kind),
            "{kind:?} has no golden bytes"
        );
        assert_eq!(FrameType::from_number(kind.number()), Some(*kind));
    }
}

#[test]
fn calls_and_replies_come_back_as_they_were() {
    for message in calls().into_iter().chain(replies()) {
        let bytes = encode(1, &message);
        assert_eq!(decode(&bytes).unwrap().1, message);
        // Cut anywhere it is an error, and so is a byte too many.
        for end in HEADER_BYTES..bytes.len() {
            assert!(decode(&bytes[..end]).is_err(), "{message:?} cut at {end}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(matches!(
            decode(&longer),
            Err(WireError::Trailing { left: 1, .. })
        ));
    }
}

#[test]
fn fields_of_a_newer_version_are_skipped() {
    // A Reject with a third field: a list that holds a map.
    let payload = bytes_of("a3 00 03 01 61 77 02 82 01 a1 00 63 616263");
    let back = Message::decode(FrameType::Reject, payload).unwrap();
    let why = "w".to_owned();
    assert_eq!(back, Message::Reject(Reject { code: 3, why }));
    // A refusal for a reason that is not known yet is a refusal.
    let payload = bytes_of("a3 00 03 01 18 63 02 61 77");
    let Message::Refuse(refuse) = Message::decode(FrameType::Refuse, payload).unwrap() else {
        panic!("not a Refuse")
    };
    assert_eq!(refuse.reason, RefuseReason::Other(99));
}

#[test]
fn hostile_headers_are_refused_before_anything_is_read() {
    let good = encode(1, &Message::Ping(Ping {}));
    let header = |at: usize, value: u8| {
        let mut bytes: [u8; HEADER_BYTES] = good[..HEADER_BYTES].try_into().unwrap();
        bytes[at] = value;
        FrameHeader::parse(&bytes)
    };
    assert!(matches!(header(0, b'G'), Err(WireError::Magic { .. })));
    assert!(matches!(header(4, 0), Err(WireError::UnknownType { kind: 0 })));
    assert!(matches!(header(5, 1), Err(WireError::Flags { .. })));
    assert!(matches!(header(7, 1), Err(WireError::Flags { .. })));
    assert!(matches!(
        header(15, 0xff),
        Err(WireError::TooLong {
            max: MAX_MESSAGE_BYTES,
            ..
        })
    ));
    for kind in FrameType::ALL {
        let longest = FrameHeader {
            kind: *kind,
            stream: 0,
            len: kind.max_bytes(),
        };
        assert!(FrameHeader::parse(&longest.to_bytes()).is_ok());
        let len = kind.max_bytes() + 1;
        let longer = FrameHeader { len, ..longest };
        assert!(matches!(
            FrameHeader::parse(&longer.to_bytes()),
            Err(WireError::TooLong { .. })
        ));
    }
}

#[test]
fn hostile_lengths_inside_a_message_take_no_memory() {
    // A list of 2^60 segments in a page of none, and a text of 2^60 bytes.
    let page = bytes_of("82 03 81 a2 00 9b 1000000000000000 01 f4");
    assert!(Message::decode(FrameType::Reply, page).is_err());
    let text = bytes_of("a2 00 03 01 7b 1000000000000000");
    assert!(Message::decode(FrameType::Reject, text).is_err());
    // Holders beyond the limit of a list, though the bytes are there.
    let mut many = bytes_of("a1 04 99 1001");
    many.extend(std::iter::repeat_n(0x60, 0x1001));
    assert!(Message::decode(FrameType::Call, many).is_err());
}

#[test]
fn names_are_checked_where_they_are_read() {
    let open = |vm: &str| {
        let mut payload = bytes_of("a3 00");
        payload.push(0x60 + vm.len() as u8);
        payload.extend(vm.bytes());
        payload.extend(bytes_of("01 03 02 61 6f"));
        Message::decode(FrameType::Open, payload)
    };
    assert!(open("web").is_ok());
    for bad in ["", "../x", "Web", "a/b"] {
        assert!(open(bad).is_err(), "{bad:?} was taken");
    }
}

#[test]
fn a_message_that_is_too_long_is_not_sent() {
    let why = "x".repeat(MAX_MESSAGE_BYTES as usize);
    let mut out = vec![1, 2, 3];
    let refused = encode_frame(0, &Message::Reject(Reject { code: 1, why }), &mut out);
    assert!(matches!(refused, Err(WireError::TooLong { .. })));
    assert_eq!(out, [1, 2, 3]);
    assert!(
        encode_frame(
            0,
            &Message::Chunk(vec![0; MAX_CHUNK_BYTES as usize + 1]),
            &mut out
        )
        .is_err()
    );
}

#[test]
fn content_is_never_shown() {
    let shown = format!("{:?}", Message::Chunk(b"secret of the guest".to_vec()));
    assert_eq!(shown, "Chunk(19 bytes)");
}

proptest! {
    #[test]
    fn anything_read_is_a_message_or_an_error(kind in 0u8..40, payload in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Some(kind) = FrameType::from_number(kind) {
            let _ = Message::decode(kind, payload);
        }
    }

    #[test]
    fn one_changed_byte_is_a_message_or_an_error(pick in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let all: Vec<_> = golden().into_iter().map(|(m, _)| m).chain(calls()).chain(replies()).collect();
        let mut bytes = encode(1, pick.get(&all));
        let at = at.index(bytes.len());
        bytes[at] = to;
        let _ = decode(&bytes);
    }
}
