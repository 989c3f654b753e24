//! What a global store changes in a takeover: another copy, and no rule.

use std::time::Duration;

use segment::{CheckpointId, Digest, Epoch, Generation, SegmentName, VmId};

use super::*;
use crate::registry::{VmRecord, VmState};

fn vm() -> VmId {
    VmId::new("web").unwrap()
}

fn brief(epoch: u64) -> SegmentBrief {
    SegmentBrief {
        name: SegmentName::new(vm(), Generation(1), Epoch(epoch)),
        checkpoint: CheckpointId([epoch as u8; 16]),
        digest: Digest([0; 32]),
        bytes: 1,
        parent: None,
        created_unix_ns: 0,
        links: 1,
        complete: true,
        label: None,
    }
}

/// Three holders of which two make a checkpoint committed; the registry has heard of 10.
fn record(generation: u64) -> VmRecord {
    VmRecord {
        vm: vm(),
        generation: Generation(generation),
        revision: generation,
        owner: "oak".into(),
        holders: ["0", "1", "2"].map(str::to_owned).into(),
        ack_quorum: 2,
        every_ms: 200,
        state: VmState::Running,
        changed_unix_ms: 0,
        newest: Some(brief(10).held()),
        claim: [0; 16],
        policy: None,
        leased: None,
        swap: None,
        alive: None,
        failover: None,
    }
}

/// One that has `newest`, and remembers to have acknowledged `had`.
fn holding(newest: Option<u64>, had: u64) -> Holding {
    Holding {
        newest: newest.map(brief),
        had: Some(brief(had).name),
        ..Holding::default()
    }
}

/// Plays a plan to its fetch or its end: what the holders answer (none: not reached), and what the global store has.
fn play(
    options: PlanOptions,
    holders: [Option<Holding>; 3],
    global: Result<Option<u64>, String>,
) -> (Result<(u64, Vec<String>), PromoteError>, usize) {
    let mut plan = Plan::new(vm(), options);
    let mut todo = plan.step(PlanEvent::Begin);
    let mut looks = 0;
    loop {
        assert!(!todo.is_empty(), "it waits for nothing");
        let action = todo.remove(0);
        let of = |holder: &str| holders[holder.parse::<usize>().unwrap()].clone();
        let why = || "connection refused".to_owned();
        let event = match action {
            PlanAction::ReadRecord => PlanEvent::Record(Ok(record(1))),
            PlanAction::Raise { .. } => PlanEvent::Raised(Ok(record(2))),
            PlanAction::Ask { holder, .. } => PlanEvent::Asked {
                result: of(&holder).ok_or_else(why),
                holder,
            },
            PlanAction::Seal { holder, .. } => PlanEvent::Sealed {
                result: of(&holder).ok_or_else(|| SealFailure::Unreachable { why: why() }),
                holder,
            },
            PlanAction::LookGlobal => {
                looks += 1;
                PlanEvent::Global(global.clone().map(|epoch| epoch.map(brief)))
            }
            PlanAction::Wait { .. } => PlanEvent::Waited { time: Duration::ZERO },
            PlanAction::Fetch { tip, from, .. } => return (Ok((tip.name.epoch.0, from)), looks),
            PlanAction::Start { .. } => panic!("started without a fetch"),
            PlanAction::Finish(result) => match *result {
                Ok(outcome) => return (Ok((outcome.tip.name.epoch.0, Vec::new())), looks),
                Err(error) => return (Err(error), looks),
            },
        };
        todo.extend(plan.step(event));
    }
}

fn with(force: bool, accept_loss: bool) -> PlanOptions {
    PlanOptions {
        force,
        accept_loss,
        global: true,
        ..PlanOptions::default()
    }
}

#[test]
fn holders_that_have_what_is_needed_are_enough() {
    let all = || [10, 10, 10].map(|epoch| Some(holding(Some(epoch), epoch)));
    let (result, looks) = play(with(false, false), all(), Ok(Some(12)));
    assert_eq!(
        (result.unwrap().0, looks),
        (10, 0),
        "the global store was looked at"
    );
}

#[test]
fn what_holders_have_lost_comes_from_there() {
    // All remember 10, and none has it any more.
    let lost = || [Some(holding(None, 10)), Some(holding(Some(7), 10)), None];
    let (result, looks) = play(with(false, false), lost(), Ok(Some(10)));
    assert_eq!((result.unwrap().0, looks), (10, 2));
    // No newer than what they remember: a loss, and said so.
    let (result, _) = play(with(false, false), lost(), Ok(Some(9)));
    assert!(
        matches!(result, Err(PromoteError::WouldLose { .. })),
        "{result:?}"
    );
    let (result, _) = play(with(false, true), lost(), Ok(Some(9)));
    assert_eq!(result.unwrap().0, 9);
    // Without a global store, or one that is away: as ever, and why.
    let none = PlanOptions::default();
    let (result, looks) = play(none, lost(), Ok(Some(10)));
    assert!(
        matches!(result, Err(PromoteError::WouldLose { .. })) && looks == 0,
        "{result:?}"
    );
    let (result, _) = play(with(false, false), lost(), Err("it does not answer".into()));
    let error = result.unwrap_err().to_string();
    assert!(error.contains("the global store (it does not answer)"), "{error}");
}

#[test]
fn without_holders_it_takes_force_and_below_what_is_committed_a_word_more() {
    let (result, looks) = play(with(false, false), [None, None, None], Ok(Some(10)));
    assert!(
        matches!(result, Err(PromoteError::TooFewSeals { .. })),
        "{result:?}"
    );
    assert_eq!(looks, 0);
    let (result, _) = play(with(true, false), [None, None, None], Ok(Some(10)));
    assert_eq!(result.unwrap().0, 10);
    let (result, _) = play(with(true, false), [None, None, None], Ok(Some(8)));
    assert!(
        matches!(result, Err(PromoteError::WouldLose { .. })),
        "{result:?}"
    );
    let (result, _) = play(with(true, true), [None, None, None], Ok(Some(8)));
    assert_eq!(result.unwrap().0, 8);
    let (result, _) = play(with(true, false), [None, None, None], Ok(None));
    assert!(
        matches!(result, Err(PromoteError::TooFewSeals { .. })),
        "{result:?}"
    );
    // A holder that has more than the global store is gone on from, as ever.
    let one = [Some(holding(Some(11), 11)), None, None];
    let (result, _) = play(with(true, false), one, Ok(Some(10)));
    assert_eq!(result.unwrap(), (11, vec!["0".to_owned()]));
}
