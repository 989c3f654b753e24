//! The receiver alone: what it refuses, each thing by itself, and what becomes of the rest of its connection then.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::time::Duration;

use migrate::lease::{MAX_TTL, MIN_TTL};
use migrate::protocol::{BeginResult, CommitResult, PromiseResult, Receiver, ReceiverAction, ReceiverEvent};
use migrate::wire::{
    Accept, End, Fenced, Granted, Message, Open, Position, Refuse, RefuseReason, Reject, Released, Renew,
};
use net_common::model::*;
use segment::{Generation, VmId};

#[test]
fn what_was_not_promised_is_not_taken() {
    let good = offer(1, true);
    assert!(!closes(&frame(&mut opened(), 1, Message::Offer(good.clone()))));
    let mut lower = good.clone();
    lower.generation = Generation(MINE.0 - 1);
    let mut higher = good.clone();
    higher.generation = Generation(MINE.0 + 1);
    let mut ahead = good.clone();
    ahead.name.generation = Generation(MINE.0 + 1);
    let mut other = good.clone();
    other.name.vm = segment::VmId::new("db").unwrap();
    for bad in [lower, higher, ahead, other] {
        assert!(
            closes(&frame(&mut opened(), 1, Message::Offer(bad.clone()))),
            "{bad:?}"
        );
    }
    // Before the generation was promised, and on the stream of none.
    let mut fresh = Receiver::new(Duration::from_secs(1), Duration::from_secs(6), Duration::ZERO);
    assert!(closes(&frame(&mut fresh, 1, Message::Offer(good.clone()))));
    assert!(closes(&frame(&mut opened(), 0, Message::Offer(good.clone()))));
    // An earlier generation's segment under ours is fine: a new owner ships what it was restored from.
    let mut earlier = good;
    earlier.name.generation = Generation(1);
    assert!(!closes(&frame(&mut opened(), 1, Message::Offer(earlier))));
}

#[test]
fn more_or_fewer_bytes_than_were_offered_end_the_connection() {
    let offer = offer(1, true);
    let exact = offer.bytes as usize;
    for (bytes, fits) in [(exact - 1, false), (exact, true), (exact + 1, false)] {
        let mut receiver = opened();
        frame(&mut receiver, 1, Message::Offer(offer.clone()));
        let mut actions = frame(&mut receiver, 1, Message::Chunk(vec![0; bytes]));
        // Too many are refused before they are written.
        assert_eq!(closes(&actions), bytes > exact);
        actions.extend(frame(&mut receiver, 1, Message::End(End {})));
        let committed = actions.contains(&ReceiverAction::Commit { transfer: 1 });
        assert_eq!((committed, closes(&actions)), (fits, !fits), "{bytes} bytes");
    }
}

#[test]
fn transfers_are_bounded() {
    let mut receiver = opened();
    let begin = |receiver: &mut Receiver, stream| frame(receiver, stream, Message::Offer(offer(1, true)));
    for stream in 1..=migrate::protocol::MAX_TRANSFERS as u32 {
        assert!(!closes(&begin(&mut receiver, stream)));
    }
    assert!(closes(&begin(&mut receiver, 9999)));
}

#[test]
fn an_owner_that_waits_for_a_slow_disk_is_not_taken_for_dead() {
    let mut now = Duration::ZERO;
    let mut receiver = opened();
    for _ in 0..20 {
        now = receiver.deadline().unwrap();
        let actions = receiver.step::<ModelProof>(ReceiverEvent::Unread, now);
        assert!(!closes(&actions), "{actions:?} at {now:?}");
    }
    assert!(now > Duration::from_secs(12));
    let heard = now;
    while !closes(&receiver.step::<ModelProof>(ReceiverEvent::Tick, now)) {
        now = receiver.deadline().unwrap();
    }
    assert_eq!(now - heard, Duration::from_secs(6));
}

/// Opens as [`open`] does, with something else.
fn opening(change: impl FnOnce(&mut Open)) -> Message {
    let Message::Open(mut open) = open() else {
        unreachable!()
    };
    change(&mut open);
    Message::Open(open)
}

fn leased(ttl: Duration) -> Message {
    opening(|open| open.lease_ttl_ms = Some(u64::try_from(ttl.as_millis()).unwrap()))
}

/// One whose store has not answered yet whether it promises.
fn promising() -> Receiver {
    let mut receiver = fresh();
    frame(&mut receiver, 0, open());
    receiver
}

/// One that has promised and looks for what it has.
fn finding() -> Receiver {
    let mut receiver = promising();
    receiver.step::<ModelProof>(ReceiverEvent::Promised(PromiseResult::Promised), Duration::ZERO);
    receiver
}

/// One to which the first checkpoint is being sent.
fn receiving() -> Receiver {
    let mut receiver = opened();
    frame(&mut receiver, 1, Message::Offer(offer(1, true)));
    receiver
}

/// One that has all of it, and waits for its store.
fn committing() -> Receiver {
    let mut receiver = receiving();
    frame(
        &mut receiver,
        1,
        Message::Chunk(vec![0; offer(1, true).bytes as usize]),
    );
    frame(&mut receiver, 1, Message::End(End {}));
    receiver
}

#[test]
fn what_comes_out_of_order_ends_the_connection() {
    let chunk = || Message::Chunk(vec![0]);
    let end = || Message::End(End {});
    let renew = || Message::Renew(Renew { seq: 1 });
    let released = || Message::Released(Released {});
    let again = || Message::Offer(offer(2, true));
    let ms = Duration::from_millis;
    let other_vm = opening(|open| open.vm = VmId::new("db").unwrap());
    let other_generation = opening(|open| open.generation = MINE.next());
    for (what, mut receiver, stream, message) in [
        ("a chunk before all", fresh(), 1, chunk()),
        ("an end before all", fresh(), 1, end()),
        ("a renewal before all", fresh(), 0, renew()),
        ("a guest that stands still before all", fresh(), 0, released()),
        ("a lease that is too short", fresh(), 0, leased(MIN_TTL - ms(1))),
        ("a lease that is too long", fresh(), 0, leased(MAX_TTL + ms(1))),
        ("an offer before the promise", promising(), 1, again()),
        ("a second open before the promise", promising(), 0, open()),
        ("an offer before the position", finding(), 1, again()),
        ("a second open before the position", finding(), 0, open()),
        ("another VM", opened(), 0, other_vm),
        ("another generation", opened(), 0, other_generation),
        ("a renewal without a lease", opened(), 0, renew()),
        ("two offers on one stream", receiving(), 1, again()),
        (
            "an empty chunk after the end",
            committing(),
            1,
            Message::Chunk(Vec::new()),
        ),
        ("a second end", committing(), 1, end()),
    ] {
        let actions = frame(&mut receiver, stream, message);
        let protocol = |action: &ReceiverAction| matches!(action, ReceiverAction::Close { code, .. } if *code == Reject::PROTOCOL);
        assert!(actions.last().is_some_and(protocol), "{what}: {actions:?}");
        // Whatever comes now, nothing is done any more.
        assert_eq!(frame(&mut receiver, 0, open()), [], "{what}");
    }
    // The same where it is in order.
    for (what, mut receiver, stream, message) in [
        ("the shortest lease", fresh(), 0, leased(MIN_TTL)),
        ("the longest lease", fresh(), 0, leased(MAX_TTL)),
        ("a guest that stands still", promising(), 0, released()),
        ("the owner looks again", opened(), 0, open()),
        ("a second offer", receiving(), 2, again()),
        ("a chunk of what was refused", opened(), 7, chunk()),
        ("the end of what was refused", opened(), 7, end()),
    ] {
        let actions = frame(&mut receiver, stream, message);
        assert!(!closes(&actions), "{what}: {actions:?}");
    }
}

#[test]
fn what_only_a_holder_says_ends_the_connection() {
    let generation = MINE;
    for message in [
        Message::Accept(Accept {}),
        Message::Granted(Granted { seq: 1 }),
        Message::Position(Position {
            generation,
            newest: None,
        }),
        Message::Refuse(Refuse {
            generation,
            reason: RefuseReason::Full,
            why: "no".into(),
        }),
        Message::Fenced(Fenced {
            vm: vm(),
            asked: generation,
            current: generation.next(),
        }),
        Message::Reject(Reject {
            code: Reject::PROTOCOL,
            why: "no".into(),
        }),
    ] {
        let what = message.kind().name();
        assert!(closes(&frame(&mut receiving(), 0, message)), "{what}");
    }
}

/// An owner that is over hears of it at once and of which generation is on, wherever it is found out; and what it was
/// sending is given up.
#[test]
fn who_is_fenced_is_told_by_whom() {
    let current = Generation(MINE.0 + 2);
    for (mut receiver, event, sending) in [
        (
            promising(),
            ReceiverEvent::Promised(PromiseResult::Fenced { current }),
            false,
        ),
        (
            receiving(),
            ReceiverEvent::Begun {
                transfer: 1,
                result: BeginResult::Fenced { current },
            },
            true,
        ),
        (
            committing(),
            ReceiverEvent::Committed {
                transfer: 1,
                result: CommitResult::Fenced { current },
            },
            false,
        ),
        (receiving(), ReceiverEvent::Superseded { current }, true),
        (finding(), ReceiverEvent::Superseded { current }, false),
    ] {
        let what = format!("{event:?}");
        let mut wanted = vec![ReceiverAction::Send {
            stream: 0,
            message: Message::Fenced(Fenced {
                vm: vm(),
                asked: MINE,
                current,
            }),
        }];
        wanted.extend(sending.then_some(ReceiverAction::Abort { transfer: 1 }));
        let mut actions = receiver.step::<ModelProof>(event, Duration::ZERO);
        let last = actions.pop();
        assert_eq!(actions, wanted, "{what}");
        assert!(
            matches!(last, Some(ReceiverAction::Close { code: 0, .. })),
            "{what}: {last:?}"
        );
    }
}

/// A newer connection of the same owner is no fence: the owner must not stop its guest for it.
#[test]
fn a_connection_that_gives_way_to_its_owners_next_is_not_fenced() {
    for mut receiver in [opened(), receiving()] {
        let actions =
            receiver.step::<ModelProof>(ReceiverEvent::Superseded { current: MINE }, Duration::ZERO);
        let last = actions.last();
        let superseded = |action: &ReceiverAction| matches!(action, ReceiverAction::Close { code, .. } if *code == Reject::SUPERSEDED);
        assert!(last.is_some_and(superseded), "{actions:?}");
        assert!(
            !actions
                .iter()
                .any(|action| matches!(action, ReceiverAction::Send { .. })),
            "{actions:?}"
        );
    }
}

#[test]
fn a_promise_that_fails_is_a_failure_of_the_holder_and_no_fence() {
    let why = "the disk is gone".to_owned();
    let failed = || ReceiverEvent::<ModelProof>::Promised(PromiseResult::Failed { why: why.clone() });
    let close = ReceiverAction::Close {
        code: Reject::FAILED,
        why: why.clone(),
    };
    assert_eq!(promising().step(failed(), Duration::ZERO), [close]);
    // Of a promise that nobody waits for any more.
    assert_eq!(opened().step(failed(), Duration::ZERO), []);
}
