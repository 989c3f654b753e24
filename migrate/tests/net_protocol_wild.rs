//! The sender and the receiver, each alone, against anything in any order.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::time::Duration;

use migrate::protocol::{
    BeginResult, CommitResult, Next, PromiseResult, Proof, Receiver, ReceiverAction, ReceiverEvent, Sender,
    SenderAction, SenderConfig, SenderEvent, SenderState,
};
use migrate::wire::{
    Abort, Accept, End, Fenced, Granted, Message, Offer, Open, Ping, Position, Refuse, RefuseReason, Reject,
    Released, Renew,
};
use net_common::model::*;
use proptest::prelude::*;
use segment::Generation;

proptest! {
    #[test]
    fn a_sender_stands_anything(events in prop::collection::vec(wild_event(), 0..200)) {
        let mut sender = Sender::new(SenderConfig::new(vm(), MINE, "owner"));
        let mut now = Duration::ZERO;
        let mut fenced = false;
        for (event, pause) in events {
            now += Duration::from_millis(u64::from(pause) * 20);
            let actions = sender.step(event, now);
            prop_assert!(!fenced || actions.is_empty());
            fenced |= actions.iter().any(|a| matches!(a, SenderAction::Fence { .. }));
        }
    }

    #[test]
    fn a_receiver_stands_anything(events in prop::collection::vec((wild_receiver_event(), any::<u8>()), 0..200)) {
        let mut receiver = Receiver::new(Duration::from_secs(1), Duration::from_secs(6), Duration::ZERO);
        let mut now = Duration::ZERO;
        let mut closed = false;
        let mut proven = Vec::new();
        for (event, pause) in events {
            now += Duration::from_millis(u64::from(pause) * 20);
            match &event {
                ReceiverEvent::Begun { result: BeginResult::Have(p), .. }
                | ReceiverEvent::Committed { result: CommitResult::Stored(p), .. } => proven.push(p.held()),
                _ => {}
            }
            for action in receiver.step(event, now) {
                prop_assert!(!closed, "{action:?} after the close");
                match action {
                    ReceiverAction::Close { .. } => closed = true,
                    ReceiverAction::Send { message: Message::Stored(ack) | Message::Have(ack), .. } => {
                        prop_assert!(proven.contains(ack.held()), "{ack:?} without proof");
                    }
                    _ => {}
                }
            }
        }
    }
}

fn wild_message() -> impl Strategy<Value = Message> {
    let epoch = 1u64..5;
    let generation = (2u64..5).prop_map(Generation);
    prop_oneof![
        Just(Message::Ping(Ping {})),
        Just(Message::Accept(Accept {})),
        Just(Message::End(End {})),
        Just(Message::Abort(Abort {})),
        (0u64..4).prop_map(|seq| Message::Renew(Renew { seq })),
        (0u64..4).prop_map(|seq| Message::Granted(Granted { seq })),
        Just(Message::Released(Released {})),
        (0usize..60).prop_map(|n| Message::Chunk(vec![0; n])),
        generation.clone().prop_map(|generation| Message::Open(Open {
            vm: vm(),
            generation,
            owner: "o".into(),
            lease_ttl_ms: Some(2_500),
        })),
        (generation.clone(), prop::option::of(epoch.clone())).prop_map(|(generation, e)| Message::Position(
            Position {
                generation,
                newest: e.map(held)
            }
        )),
        (epoch, generation.clone(), any::<bool>()).prop_map(|(e, generation, full)| {
            Message::Offer(Offer {
                generation,
                ..offer(e, full)
            })
        }),
        generation.clone().prop_map(|generation| {
            Message::Refuse(Refuse {
                generation,
                reason: RefuseReason::Full,
                why: "w".into(),
            })
        }),
        generation.prop_map(|current| Message::Fenced(Fenced {
            vm: vm(),
            asked: MINE,
            current
        })),
        Just(Message::Reject(Reject {
            code: 1,
            why: "w".into()
        })),
    ]
}

fn wild_event() -> impl Strategy<Value = (SenderEvent, u8)> {
    let connection = 0u64..3;
    let event = prop_oneof![
        connection.clone().prop_map(|connection| SenderEvent::Connected {
            connection,
            version: 2
        }),
        Just(SenderEvent::Release),
        connection.clone().prop_map(|connection| SenderEvent::Lost {
            connection,
            why: "w".into(),
            jitter: 3
        }),
        (connection.clone(), 0u32..4, wild_message()).prop_map(|(connection, stream, message)| {
            SenderEvent::Frame {
                connection,
                stream,
                message,
            }
        }),
        (0u64..4, 1u64..5).prop_map(|(ticket, e)| SenderEvent::NextIs {
            ticket,
            next: Next::Segment(offer(e, e == 1))
        }),
        (0u64..4).prop_map(|ticket| SenderEvent::NextIs {
            ticket,
            next: Next::UpToDate
        }),
        (0u64..4).prop_map(|ticket| SenderEvent::NextIs {
            ticket,
            next: Next::NeedFull
        }),
        connection
            .clone()
            .prop_map(|connection| SenderEvent::Progress { connection }),
        connection.prop_map(|connection| SenderEvent::StreamFailed {
            connection,
            why: "w".into()
        }),
        Just(SenderEvent::Notify),
        Just(SenderEvent::Tick),
    ];
    (event, any::<u8>())
}

fn wild_receiver_event() -> impl Strategy<Value = ReceiverEvent<ModelProof>> {
    let transfer = 0u32..4;
    let why = "w".to_owned();
    let proof = (1u64..5).prop_map(|e| ModelProof(offer(e, false)));
    let refused = BeginResult::Refused {
        reason: RefuseReason::Full,
        why: why.clone(),
    };
    let late = CommitResult::Refused {
        reason: RefuseReason::Failed,
        why,
    };
    prop_oneof![
        8 => (0u32..4, wild_message()).prop_map(|(stream, message)| ReceiverEvent::Frame { stream, message }),
        2 => Just(ReceiverEvent::Promised(PromiseResult::Promised)),
        2 => prop::option::of(1u64..5).prop_map(|e| ReceiverEvent::Found(e.map(held))),
        2 => transfer.clone().prop_map(|transfer| ReceiverEvent::Begun { transfer, result: BeginResult::Ready }),
        1 => (transfer.clone(), proof.clone())
            .prop_map(|(transfer, p)| ReceiverEvent::Begun { transfer, result: BeginResult::Have(p) }),
        1 => transfer.clone().prop_map(move |transfer| ReceiverEvent::Begun { transfer, result: refused.clone() }),
        2 => (transfer.clone(), proof)
            .prop_map(|(transfer, p)| ReceiverEvent::Committed { transfer, result: CommitResult::Stored(p) }),
        1 => transfer.prop_map(move |transfer| ReceiverEvent::Committed { transfer, result: late.clone() }),
        1 => (2u64..5).prop_map(|g| ReceiverEvent::Superseded { current: Generation(g) }),
        2 => Just(ReceiverEvent::Tick),
    ]
}

#[test]
fn an_acknowledgement_of_something_else_is_not_believed() {
    let now = Duration::ZERO;
    let mut sender = Sender::new(SenderConfig::new(vm(), MINE, "owner"));
    sender.step(SenderEvent::Tick, now);
    sender.step(
        SenderEvent::Connected {
            connection: 1,
            version: 1,
        },
        now,
    );
    let frame = |stream, message| SenderEvent::Frame {
        connection: 1,
        stream,
        message,
    };
    let position = Position {
        generation: MINE,
        newest: None,
    };
    sender.step(frame(0, Message::Position(position)), now);
    let next = Next::Segment(offer(1, true));
    sender.step(SenderEvent::NextIs { ticket: 1, next }, now);
    // Made by a receiver for another checkpoint.
    let mut receiver = opened();
    self::frame(&mut receiver, 1, Message::Offer(offer(2, true)));
    let result = BeginResult::Have(ModelProof(offer(2, true)));
    let said = receiver.step(ReceiverEvent::Begun { transfer: 1, result }, now);
    let Some(ReceiverAction::Send { message, .. }) = said.into_iter().next() else {
        panic!("nothing was said")
    };
    let actions = sender.step(frame(1, message), now);
    assert!(
        matches!(actions[..], [SenderAction::Disconnect { connection: 1, .. }]),
        "{actions:?}"
    );
}

#[test]
fn the_window_bounds_what_is_on_its_way() {
    let mut config = SenderConfig::new(vm(), MINE, "owner");
    config.window_segments = 3;
    let mut sender = Sender::new(config);
    let now = Duration::ZERO;
    sender.step(SenderEvent::Tick, now);
    sender.step(
        SenderEvent::Connected {
            connection: 1,
            version: 1,
        },
        now,
    );
    let position = Message::Position(Position {
        generation: MINE,
        newest: None,
    });
    let mut actions = sender.step(
        SenderEvent::Frame {
            connection: 1,
            stream: 0,
            message: position,
        },
        now,
    );
    let mut offered = 0;
    while let Some(ticket) = actions.iter().find_map(|a| match a {
        SenderAction::Next { ticket, .. } => Some(*ticket),
        _ => None,
    }) {
        offered += 1;
        let next = Next::Segment(offer(offered, offered == 1));
        actions = sender.step(SenderEvent::NextIs { ticket, next }, now);
    }
    assert_eq!(offered, 3);
}

#[test]
fn a_silent_holder_is_given_up_and_tried_again_with_longer_pauses() {
    let mut sender = Sender::new(SenderConfig::new(vm(), MINE, "owner"));
    let mut now = Duration::ZERO;
    let mut pauses = Vec::new();
    for connection in 1..=12 {
        let actions = sender.step(SenderEvent::Tick, now);
        assert!(
            actions.contains(&SenderAction::Connect { connection }),
            "{actions:?}"
        );
        sender.step(
            SenderEvent::Lost {
                connection,
                why: "refused".into(),
                jitter: 0,
            },
            now,
        );
        let until = sender.deadline().unwrap();
        pauses.push((until - now).as_millis());
        now = until;
    }
    assert_eq!(pauses[..4], [50, 100, 200, 400]);
    assert_eq!(pauses.last(), Some(&5000));
    assert_eq!(
        sender.state(),
        SenderState::Unreachable {
            why: "refused".into()
        }
    );

    sender.step(SenderEvent::Tick, now);
    sender.step(
        SenderEvent::Connected {
            connection: 13,
            version: 1,
        },
        now,
    );
    let mut pings = 0;
    loop {
        now = sender.deadline().unwrap();
        let actions = sender.step(SenderEvent::Tick, now);
        pings += actions
            .iter()
            .filter(|a| {
                matches!(
                    a,
                    SenderAction::Send {
                        message: Message::Ping(_),
                        ..
                    }
                )
            })
            .count();
        if let Some(SenderAction::Disconnect { connection, why }) = actions.last() {
            assert_eq!((*connection, why.contains("sign of life")), (13, true));
            break;
        }
    }
    assert!(pings >= 4, "{pings} pings");
}

#[test]
fn time_is_asked_for_at_its_pace_and_only_of_who_can_grant_it() {
    let ms = Duration::from_millis;
    let terms = migrate::lease::LeaseTerms::DEFAULT;
    let asked = |version: u16, until: u64| {
        let mut config = SenderConfig::new(vm(), MINE, "o");
        config.lease = Some(terms);
        let mut sender = Sender::new(config);
        sender.step(SenderEvent::Tick, ms(0));
        sender.step(
            SenderEvent::Connected {
                connection: 1,
                version,
            },
            ms(0),
        );
        let position = Message::Position(Position {
            generation: MINE,
            newest: None,
        });
        let mut all = sender.step(frame_of(position), ms(10));
        for at in (11..until).step_by(7) {
            all.extend(sender.step(SenderEvent::Tick, ms(at)));
        }
        let renew = |a: &SenderAction| match a {
            SenderAction::Send {
                message: Message::Renew(Renew { seq }),
                ..
            } => Some(*seq),
            _ => None,
        };
        let renews: Vec<u64> = all.iter().filter_map(renew).collect();
        (sender, renews)
    };
    assert_eq!(
        asked(1, 2000).1,
        Vec::<u64>::new(),
        "a holder of the version before knows nothing of it"
    );
    let (mut sender, renews) = asked(2, 10 + 2 * 400 + 50);
    assert_eq!(renews, [1, 2, 3]);
    // The answer to the first counts from when the first was sent.
    let granted = sender.step(frame_of(Message::Granted(Granted { seq: 1 })), ms(900));
    assert!(
        granted.contains(&SenderAction::Granted { sent: ms(10) }),
        "{granted:?}"
    );
    assert!(
        sender
            .step(frame_of(Message::Granted(Granted { seq: 1 })), ms(901))
            .is_empty()
    );
    let released = sender.step(SenderEvent::Release, ms(902));
    let told = |a: &SenderAction| {
        matches!(
            a,
            SenderAction::Send {
                message: Message::Released(_),
                ..
            }
        )
    };
    assert!(released.iter().any(told), "{released:?}");
    let late = sender.step(frame_of(Message::Granted(Granted { seq: 3 })), ms(903));
    assert!(late.is_empty(), "what was given back is not counted: {late:?}");
    let never = sender.step(frame_of(Message::Granted(Granted { seq: 9 })), ms(904));
    assert!(
        matches!(never[..], [SenderAction::Disconnect { .. }]),
        "{never:?}"
    );
}

fn frame_of(message: Message) -> SenderEvent {
    SenderEvent::Frame {
        connection: 1,
        stream: 0,
        message,
    }
}

/// A sender that is connected, and has heard nothing.
fn connected() -> Sender {
    let mut sender = Sender::new(SenderConfig::new(vm(), MINE, "owner"));
    sender.step(SenderEvent::Tick, Duration::ZERO);
    let connected = SenderEvent::Connected {
        connection: 1,
        version: 1,
    };
    sender.step(connected, Duration::ZERO);
    sender
}

/// One that has heard that the holder has nothing; its first question has ticket 1.
fn flowing() -> Sender {
    let mut sender = connected();
    sender.step(frame_of(position_of(MINE, None)), Duration::ZERO);
    sender
}

fn position_of(generation: Generation, newest: Option<migrate::wire::Held>) -> Message {
    Message::Position(Position { generation, newest })
}

fn next(sender: &mut Sender, ticket: u64, next: Next, now: Duration) -> Vec<SenderAction> {
    sender.step(SenderEvent::NextIs { ticket, next }, now)
}

fn gives_up(actions: &[SenderAction]) -> Option<&str> {
    actions.iter().find_map(|action| match action {
        SenderAction::Disconnect { why, .. } => Some(why.as_str()),
        _ => None,
    })
}

#[test]
fn a_holder_that_lives_and_stores_nothing_is_given_up() {
    let seconds = Duration::from_secs;
    let stall_after = SenderConfig::new(vm(), MINE, "o").stall_after.as_secs();
    for moved_at in [0, 30] {
        let mut sender = flowing();
        next(&mut sender, 1, Next::Segment(offer(1, true)), Duration::ZERO);
        for now in 1..stall_after + moved_at {
            let alive = sender.step(frame_of(Message::Ping(Ping {})), seconds(now));
            assert_eq!(gives_up(&alive), None, "at {now} s");
            if now == moved_at {
                sender.step(SenderEvent::Progress { connection: 1 }, seconds(now));
            }
        }
        let end = sender.step(frame_of(Message::Ping(Ping {})), seconds(stall_after + moved_at));
        let why = gives_up(&end).unwrap_or_else(|| panic!("{end:?}"));
        assert!(why.contains("stored nothing"), "{why}");
    }
}

/// A large segment takes long to be checked and to get to a slow disk, and is not sent again for that.
#[test]
fn a_holder_is_given_the_time_that_a_large_segment_takes() {
    let config = SenderConfig::new(vm(), MINE, "o");
    let mut sender = flowing();
    let mut large = offer(1, true);
    large.bytes = 1 << 30;
    next(&mut sender, 1, Next::Segment(large), Duration::ZERO);
    let patience = config.stall_after.as_secs() + (1 << 30) / config.slowest_store;
    for now in 1..patience {
        let alive = sender.step(frame_of(Message::Ping(Ping {})), Duration::from_secs(now));
        assert_eq!(gives_up(&alive), None, "at {now} s");
    }
    let end = sender.step(frame_of(Message::Ping(Ping {})), Duration::from_secs(patience));
    assert!(gives_up(&end).is_some(), "a disk that hangs is noticed: {end:?}");
}

/// One that takes longer than was thought gets twice as long the next time: else nothing would ever be stored there.
#[test]
fn a_holder_that_is_slower_than_was_thought_gets_longer_each_time() {
    let second = Duration::from_secs(1);
    let mut sender = Sender::new(SenderConfig::new(vm(), MINE, "owner"));
    let mut now = Duration::ZERO;
    for (connection, times) in [(1, 1), (2, 2), (3, 4), (4, 8)] {
        let frame = |message| SenderEvent::Frame {
            connection,
            stream: 0,
            message,
        };
        // The pause before it is tried again.
        now += 10 * second;
        sender.step(SenderEvent::Tick, now);
        sender.step(
            SenderEvent::Connected {
                connection,
                version: 1,
            },
            now,
        );
        let flows = sender.step(frame(position_of(MINE, None)), now);
        let asked = flows.iter().find_map(|action| match action {
            SenderAction::Next { ticket, .. } => Some(*ticket),
            _ => None,
        });
        let asked = asked.unwrap_or_else(|| panic!("it asks for nothing: {flows:?}"));
        next(&mut sender, asked, Next::Segment(offer(1, true)), now);
        let given_up = now + SenderConfig::new(vm(), MINE, "o").stall_after * times;
        while now + second < given_up {
            now += second;
            let alive = sender.step(frame(Message::Ping(Ping {})), now);
            assert_eq!(gives_up(&alive), None, "{times} times as long, at {now:?}");
        }
        now = given_up;
        let end = sender.step(frame(Message::Ping(Ping {})), now);
        assert!(gives_up(&end).is_some(), "{times} times as long: {end:?}");
        sender.step(
            SenderEvent::Lost {
                connection,
                why: "it stored nothing".into(),
                jitter: 0,
            },
            now,
        );
    }
}

#[test]
fn a_fence_is_believed_only_for_this_vm_and_a_higher_generation() {
    let other = segment::VmId::new("db").unwrap();
    for (of, current, believed) in [
        (vm(), MINE.0 + 1, true),
        (vm(), MINE.0, false),
        (vm(), MINE.0 - 1, false),
        (other, MINE.0 + 1, false),
    ] {
        let mut sender = flowing();
        let current = Generation(current);
        let fenced = Message::Fenced(Fenced {
            vm: of,
            asked: MINE,
            current,
        });
        let actions = sender.step(frame_of(fenced), Duration::ZERO);
        assert_eq!(
            actions.contains(&SenderAction::Fence { current }),
            believed,
            "{actions:?}"
        );
        assert!(gives_up(&actions).is_some(), "{actions:?}");
    }
}

#[test]
fn a_position_in_another_vm_or_generation_is_none() {
    let mut other = held(1);
    other.name.vm = segment::VmId::new("db").unwrap();
    for (generation, newest, believed) in [
        (MINE, Some(held(1)), true),
        (MINE, Some(other), false),
        (Generation(MINE.0 + 1), Some(held(1)), false),
    ] {
        let actions = connected().step(frame_of(position_of(generation, newest)), Duration::ZERO);
        let taken = actions
            .iter()
            .any(|action| matches!(action, SenderAction::Position { .. }));
        assert_eq!(
            (taken, gives_up(&actions).is_some()),
            (believed, !believed),
            "{actions:?}"
        );
    }
}

#[test]
fn what_is_asked_for_first_is_what_follows_the_holders_newest() {
    for newest in [None, Some(held(3))] {
        let actions = connected().step(frame_of(position_of(MINE, newest.clone())), Duration::ZERO);
        let asked = |action: &SenderAction| matches!(action, SenderAction::Next { position, .. } if *position == newest);
        assert!(actions.iter().any(asked), "{newest:?}: {actions:?}");
    }
}

#[test]
fn what_was_refused_is_offered_again_after_pauses_that_grow() {
    let mut sender = flowing();
    let (mut now, mut ticket) = (Duration::ZERO, 1);
    let opens = |actions: &[SenderAction]| {
        let open = |action: &SenderAction| {
            matches!(
                action,
                SenderAction::Send {
                    message: Message::Open(_),
                    ..
                }
            )
        };
        actions.iter().any(open)
    };
    for (transfer, pause) in [(1, 1000), (2, 2000), (3, 4000)] {
        next(&mut sender, ticket, Next::Segment(offer(1, true)), now);
        let refused = SenderEvent::Frame {
            connection: 1,
            stream: transfer,
            message: Message::Refuse(Refuse {
                generation: MINE,
                reason: RefuseReason::Full,
                why: "no room".into(),
            }),
        };
        assert!(!opens(&sender.step(refused, now)), "at once");
        assert!(matches!(sender.state(), SenderState::Refused { .. }));
        now += Duration::from_millis(pause);
        // It is heard meanwhile.
        let early = sender.step(frame_of(Message::Ping(Ping {})), now - Duration::from_millis(1));
        assert!(!opens(&early), "before {pause} ms: {early:?}");
        assert!(opens(&sender.step(SenderEvent::Tick, now)), "after {pause} ms");
        let asked = sender.step(frame_of(position_of(MINE, None)), now);
        ticket = asked
            .iter()
            .find_map(|action| match action {
                SenderAction::Next { ticket, .. } => Some(*ticket),
                _ => None,
            })
            .unwrap();
    }
}

#[test]
fn a_full_checkpoint_is_asked_for_once_in_a_while() {
    let full_again = SenderConfig::new(vm(), MINE, "o").full_again;
    let mut sender = flowing();
    let mut ticket = 1;
    let soon = full_again - Duration::from_millis(1);
    for (now, asks) in [(Duration::ZERO, true), (soon, false), (full_again, true)] {
        // Alive: as long as it takes.
        sender.step(
            frame_of(Message::Ping(Ping {})),
            now.saturating_sub(Duration::from_secs(1)),
        );
        let actions = next(&mut sender, ticket, Next::NeedFull, now);
        assert_eq!(
            actions.contains(&SenderAction::RequestFull),
            asks,
            "{now:?}: {actions:?}"
        );
        // Something new was stored here: it asks what there is for the holder.
        let asked = sender.step(SenderEvent::Notify, now);
        ticket = asked
            .iter()
            .find_map(|action| match action {
                SenderAction::Next { ticket, .. } => Some(*ticket),
                _ => None,
            })
            .unwrap();
    }
}

/// A receiver that has all of the first checkpoint, and is told by its store that it has `proof`.
fn stored(proof: Offer) -> Vec<ReceiverAction> {
    let mut receiver = opened();
    let first = offer(1, true);
    let bytes = first.bytes as usize;
    frame(&mut receiver, 1, Message::Offer(first));
    frame(&mut receiver, 1, Message::Chunk(vec![0; bytes]));
    frame(&mut receiver, 1, Message::End(End {}));
    let result = CommitResult::Stored(ModelProof(proof));
    receiver.step(ReceiverEvent::Committed { transfer: 1, result }, Duration::ZERO)
}

#[test]
fn a_receiver_acknowledges_only_what_its_store_proves() {
    let acknowledges = |actions: &[ReceiverAction]| {
        let ack = |action: &ReceiverAction| {
            matches!(
                action,
                ReceiverAction::Send {
                    message: Message::Stored(_) | Message::Have(_),
                    ..
                }
            )
        };
        actions.iter().any(ack)
    };
    let right = stored(offer(1, true));
    assert!(acknowledges(&right) && !closes(&right), "{right:?}");
    let wrong = stored(offer(2, true));
    assert!(!acknowledges(&wrong) && closes(&wrong), "{wrong:?}");
    let mut receiver = opened();
    frame(&mut receiver, 1, Message::Offer(offer(1, true)));
    let result = BeginResult::Have(ModelProof(offer(2, true)));
    let wrong = receiver.step(ReceiverEvent::Begun { transfer: 1, result }, Duration::ZERO);
    assert!(!acknowledges(&wrong) && closes(&wrong), "{wrong:?}");
}

#[test]
fn an_acknowledgement_of_other_bytes_is_not_believed() {
    for (digest, believed) in [(offer(1, true).digest, true), (offer(2, true).digest, false)] {
        let mut sender = flowing();
        next(&mut sender, 1, Next::Segment(offer(1, true)), Duration::ZERO);
        let proof = Offer {
            digest,
            ..offer(1, true)
        };
        let Some(ReceiverAction::Send { stream, message }) = stored(proof).into_iter().next() else {
            panic!("nothing was said")
        };
        let said = SenderEvent::Frame {
            connection: 1,
            stream,
            message,
        };
        let actions = sender.step(said, Duration::ZERO);
        let acked = actions
            .iter()
            .any(|action| matches!(action, SenderAction::Acked { .. }));
        assert_eq!(
            (acked, gives_up(&actions).is_some()),
            (believed, !believed),
            "{actions:?}"
        );
    }
}
