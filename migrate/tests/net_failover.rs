//! The takeover plan: every interleaving of an owner that ships, two candidates and holders that come and go.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::collections::BTreeSet;
use std::time::Duration;

use migrate::failover::{
    Holding, Left, Plan, PlanAction, PlanEvent, PlanOptions, PromoteError, Running, SealFailure, seals_needed,
};
use migrate::registry::{RegistryError, VmRecord, VmState};
use migrate::wire::SegmentBrief;
use proptest::prelude::*;
use segment::{CheckpointId, Digest, Epoch, Generation, SegmentName, VmId};

/// Generation and epoch.
type At = (u64, u64);

fn vm() -> VmId {
    VmId::new("web").unwrap()
}

fn brief((generation, epoch): At) -> SegmentBrief {
    let mut checkpoint = [0; 16];
    checkpoint[0] = generation as u8;
    checkpoint[1..9].copy_from_slice(&epoch.to_le_bytes());
    SegmentBrief {
        name: SegmentName::new(vm(), Generation(generation), Epoch(epoch)),
        checkpoint: CheckpointId(checkpoint),
        digest: Digest([0; 32]),
        bytes: 1,
        parent: None,
        created_unix_ns: 0,
        links: 0,
        complete: true,
        label: None,
    }
}

fn at(brief: &SegmentBrief) -> At {
    (brief.name.generation.0, brief.name.epoch.0)
}

#[derive(Debug, Clone, Default)]
struct Holder {
    up: bool,
    promised: u64,
    has: BTreeSet<At>,
    /// The newest it remembers to have acknowledged.
    had: Option<At>,
    /// It has lost its memory, and has acknowledged nothing since.
    wiped: bool,
}

impl Holder {
    fn holding(&self) -> Holding {
        let name = |at| brief(at).name;
        Holding {
            newest: self.has.last().copied().map(brief),
            had: self.had.max(self.has.last().copied()).map(name),
            dangling: None,
            forgot: self.wiped.then(|| "emptied".to_owned()),
            granted: Duration::ZERO,
        }
    }
}

/// Someone who runs the guest, or believes to.
#[derive(Debug)]
struct Owner {
    generation: u64,
    epoch: u64,
    /// The newest epoch each holder has of it.
    shipped: Vec<u64>,
    fenced: bool,
}

#[derive(Debug)]
struct Candidate {
    name: String,
    plan: Plan,
    todo: Vec<PlanAction>,
    ended: Option<Result<At, PromoteError>>,
}

#[derive(Debug)]
struct World {
    quorum: usize,
    generation: u64,
    owner_name: String,
    holders: Vec<Holder>,
    owners: Vec<Owner>,
    candidates: Vec<Candidate>,
    committed: BTreeSet<At>,
    /// What the registry has heard of that.
    registered: Option<At>,
    damaged: bool,
    /// Which generation was started from where.
    started: Vec<(u64, At)>,
}

impl World {
    fn new(holders: usize, quorum: usize) -> Self {
        let up = Holder {
            up: true,
            ..Holder::default()
        };
        let first = Owner {
            generation: 1,
            epoch: 0,
            shipped: vec![0; holders],
            fenced: false,
        };
        let candidates = ["one", "two"].map(|name| Candidate {
            name: name.to_owned(),
            plan: Plan::new(vm(), PlanOptions::default()),
            todo: Vec::new(),
            ended: None,
        });
        Self {
            quorum,
            generation: 1,
            owner_name: "first".into(),
            holders: vec![up; holders],
            owners: vec![first],
            candidates: candidates.into(),
            committed: BTreeSet::new(),
            registered: None,
            damaged: false,
            started: Vec::new(),
        }
    }

    fn record(&self) -> VmRecord {
        VmRecord {
            vm: vm(),
            generation: Generation(self.generation),
            revision: 1,
            owner: self.owner_name.clone(),
            holders: (0..self.holders.len()).map(|i| i.to_string()).collect(),
            ack_quorum: self.quorum as u32,
            every_ms: 200,
            state: VmState::Running,
            changed_unix_ms: 0,
            newest: self.registered.map(|at| brief(at).held()),
            claim: [0; 16],
            policy: None,
            leased: None,
            swap: None,
            alive: None,
            failover: None,
        }
    }

    /// An owner ships its next epoch to a holder, or takes one.
    fn own(&mut self, owner: usize, holder: usize) {
        let count = self.owners.len();
        let owner = &mut self.owners[owner % count];
        if owner.fenced {
            return;
        }
        let index = holder % (self.holders.len() + 1);
        let Some(holder) = self.holders.get_mut(index) else {
            owner.epoch += 1;
            return;
        };
        if !holder.up {
            return;
        }
        if holder.promised > owner.generation {
            owner.fenced = true;
            return;
        }
        holder.promised = owner.generation;
        if owner.shipped[index] < owner.epoch {
            owner.shipped[index] += 1;
            let at = (owner.generation, owner.shipped[index]);
            holder.has.insert(at);
            holder.had = holder.had.max(Some(at));
            holder.wiped = false;
        }
        let mut acked = owner.shipped.clone();
        acked.sort_unstable_by(|a, b| b.cmp(a));
        let epoch = acked[self.quorum - 1];
        if epoch > 0 && self.committed.insert((owner.generation, epoch)) {
            // What the sealed holders had already may still become committed; nothing beyond what was started from.
            let at = (owner.generation, epoch);
            let lost = self
                .started
                .iter()
                .find(|(generation, from)| *generation > owner.generation && *from < at);
            assert_eq!(
                lost, None,
                "{at:?} was committed after a later owner ran from before it"
            );
        }
    }

    /// A holder loses the newest it has, or its whole memory but the promise.
    fn damage(&mut self, holder: usize, all: bool) {
        let count = self.holders.len();
        let holder = &mut self.holders[holder % count];
        if all && holder.had.is_some() {
            holder.wiped = true;
            holder.had = None;
            holder.has.clear();
            self.damaged = true;
        } else if !all {
            self.damaged |= holder.has.pop_last().is_some();
        }
    }

    fn begin(&mut self, candidate: usize) {
        let candidate = &mut self.candidates[candidate % 2];
        if candidate.todo.is_empty() && (candidate.ended.is_some() || !candidate.plan.is_finished()) {
            candidate.ended = None;
            candidate.plan = Plan::new(vm(), PlanOptions::default());
            candidate.todo = candidate.plan.step(PlanEvent::Begin);
        }
    }

    /// The process is gone in the middle of what it did.
    fn crash(&mut self, candidate: usize) {
        let candidate = &mut self.candidates[candidate % 2];
        candidate.todo.clear();
        candidate.plan = Plan::new(vm(), PlanOptions::default());
        candidate.ended = None;
    }

    /// A candidate does one of the things it has to do.
    fn act(&mut self, candidate: usize, which: usize) {
        let index = candidate % 2;
        let todo = &mut self.candidates[index].todo;
        if todo.is_empty() {
            return;
        }
        let action = todo.swap_remove(which % todo.len());
        let event = match action {
            PlanAction::ReadRecord => PlanEvent::Record(Ok(self.record())),
            PlanAction::Raise { expected } => PlanEvent::Raised(if expected.0 == self.generation {
                self.generation += 1;
                self.owner_name.clone_from(&self.candidates[index].name);
                Ok(self.record())
            } else {
                Err(RegistryError::Conflict {
                    vm: vm(),
                    expected,
                    current: Generation(self.generation),
                    owner: self.owner_name.clone(),
                })
            }),
            PlanAction::Seal { holder, generation } => {
                let at = holder.parse::<usize>().unwrap();
                let h = &mut self.holders[at];
                let result = if !h.up {
                    Err(SealFailure::Unreachable { why: "down".into() })
                } else if h.promised > generation.0 {
                    Err(SealFailure::Fenced {
                        current: Generation(h.promised),
                    })
                } else {
                    h.promised = generation.0;
                    Ok(h.holding())
                };
                PlanEvent::Sealed { holder, result }
            }
            PlanAction::Fetch { from, tip, .. } => {
                let has = |i: &String| {
                    let h = &self.holders[i.parse::<usize>().unwrap()];
                    h.up && h.has.contains(&at(&tip))
                };
                let found = from.iter().any(has);
                PlanEvent::Fetched(if found { Ok(Vec::new()) } else { Err("gone".into()) })
            }
            PlanAction::Start { record, tip } => {
                let (generation, from) = (record.generation.0, at(&tip));
                let twice = self.started.iter().find(|(g, _)| *g == generation);
                assert_eq!(twice, None, "generation {generation} was started twice");
                let newest = self.committed.iter().filter(|(g, _)| *g < generation).max();
                assert!(
                    newest.is_none_or(|c| *c <= from),
                    "{newest:?} was committed and {from:?} was started"
                );
                self.started.push((generation, from));
                let shipped = vec![0; self.holders.len()];
                self.owners.push(Owner {
                    generation,
                    epoch: 0,
                    shipped,
                    fenced: false,
                });
                PlanEvent::Started(Ok(Running {
                    pid: 1,
                    ..Running::default()
                }))
            }
            PlanAction::Wait { time, .. } => PlanEvent::Waited { time },
            PlanAction::LookGlobal => PlanEvent::Global(Ok(None)),
            PlanAction::Ask { holder, thorough } => {
                assert!(!thorough, "no loss was accepted");
                let h = &self.holders[holder.parse::<usize>().unwrap()];
                let result = if h.up { Ok(h.holding()) } else { Err("down".into()) };
                PlanEvent::Asked { holder, result }
            }
            PlanAction::Finish(result) => {
                self.candidates[index].ended = Some(result.map(|outcome| at(&outcome.tip)));
                return;
            }
        };
        let more = self.candidates[index].plan.step(event);
        self.candidates[index].todo.extend(more);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Own(usize, usize),
    Begin(usize),
    Act(usize, usize),
    Crash(usize),
    Toggle(usize),
    Damage(usize, bool),
    Register,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let n = any::<u8>().prop_map(usize::from);
    let step = prop_oneof![
        30 => (n.clone(), n.clone()).prop_map(|(a, b)| Step::Own(a, b)),
        3 => n.clone().prop_map(Step::Begin),
        15 => (n.clone(), n.clone()).prop_map(|(a, b)| Step::Act(a, b)),
        1 => n.clone().prop_map(Step::Crash),
        2 => n.clone().prop_map(Step::Toggle),
        2 => (n, any::<bool>()).prop_map(|(h, all)| Step::Damage(h, all)),
        2 => Just(Step::Register),
    ];
    prop::collection::vec(step, 0..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_committed_epoch_is_lost_and_no_generation_runs_twice(
        steps in steps(),
        (holders, quorum) in (1usize..=4).prop_flat_map(|n| (Just(n), 1..=n)),
    ) {
        let mut world = World::new(holders, quorum);
        for step in steps {
            match step {
                Step::Own(owner, holder) => world.own(owner, holder),
                Step::Begin(candidate) => world.begin(candidate),
                Step::Act(candidate, which) => world.act(candidate, which),
                Step::Crash(candidate) => world.crash(candidate),
                Step::Damage(holder, all) => world.damage(holder, all),
                Step::Register => world.registered = world.registered.max(world.committed.last().copied()),
                Step::Toggle(holder) => {
                    let index = holder % holders;
                    world.holders[index].up ^= true;
                }
            }
        }
        // With everyone up, and nobody else trying, the last one that tries gets it.
        for holder in &mut world.holders {
            holder.up = true;
        }
        world.crash(0);
        world.crash(1);
        world.begin(0);
        for _ in 0..50 {
            world.act(0, 0);
        }
        let ended = world.candidates[0].ended.clone();
        if let Some(Err(PromoteError::WouldLose { .. })) = &ended {
            // Only where something was lost; and it was refused before anything was changed.
            prop_assert!(world.damaged);
        } else if world.committed.is_empty() {
            prop_assert!(ended.is_some());
        } else {
            prop_assert!(matches!(ended, Some(Ok(_))), "{ended:?}");
        }
    }
}

#[test]
fn the_seals_meet_every_quorum() {
    assert_eq!(
        [
            seals_needed(1, 1),
            seals_needed(2, 2),
            seals_needed(3, 2),
            seals_needed(2, 1)
        ],
        [1, 1, 2, 2]
    );
    for holders in 1..=16usize {
        for quorum in 1..=holders {
            let needed = seals_needed(holders, quorum);
            // The pigeonhole: they cannot be disjoint; and with one fewer they could.
            assert!(needed + quorum > holders && needed + quorum <= holders + 1);
        }
    }
}

fn sealing(holders: usize, quorum: usize) -> (Plan, VmRecord) {
    let mut world = World::new(holders, quorum);
    world.generation = 2;
    let record = world.record();
    let mut plan = Plan::new(vm(), PlanOptions::default());
    assert_eq!(plan.step(PlanEvent::Begin), [PlanAction::ReadRecord]);
    let asks = plan.step(PlanEvent::Record(Ok(World::new(holders, quorum).record())));
    assert_eq!(asks.len(), holders);
    let mut raise = Vec::new();
    for holder in 0..holders {
        raise.extend(plan.step(asked(&holder.to_string(), Some((1, 1)))));
    }
    assert_eq!(
        raise,
        [PlanAction::Raise {
            expected: Generation(1)
        }]
    );
    let seals = plan.step(PlanEvent::Raised(Ok(record.clone())));
    assert_eq!(seals.len(), holders);
    (plan, record)
}

fn finish(mut actions: Vec<PlanAction>) -> Result<At, PromoteError> {
    assert_eq!(actions.len(), 1, "{actions:?}");
    let Some(PlanAction::Finish(result)) = actions.pop() else {
        panic!("it goes on")
    };
    result.map(|outcome| at(&outcome.tip))
}

fn has(newest: Option<At>) -> Holding {
    Holding {
        newest: newest.map(brief),
        had: newest.map(|at| brief(at).name),
        ..Holding::default()
    }
}

/// One that acknowledged `had` and has `newest` left.
fn lost(newest: At, had: At) -> Holding {
    Holding {
        had: Some(brief(had).name),
        ..has(Some(newest))
    }
}

fn asked(holder: &str, newest: Option<At>) -> PlanEvent {
    PlanEvent::Asked {
        holder: holder.into(),
        result: Ok(has(newest)),
    }
}

fn sealed_as(holder: &str, holding: Holding) -> PlanEvent {
    PlanEvent::Sealed {
        holder: holder.into(),
        result: Ok(holding),
    }
}

fn sealed(holder: &str, newest: Option<At>) -> PlanEvent {
    sealed_as(holder, has(newest))
}

fn down(holder: &str) -> PlanEvent {
    let why = "connection refused".to_owned();
    PlanEvent::Sealed {
        holder: holder.into(),
        result: Err(SealFailure::Unreachable { why }),
    }
}

#[test]
fn the_highest_of_enough_holders_is_taken_from_who_has_it() {
    let (mut plan, _) = sealing(3, 2);
    assert_eq!(plan.step(sealed("0", Some((1, 9)))), []);
    let fetch = plan.step(sealed("2", Some((1, 12))));
    let expected = PlanAction::Fetch {
        from: vec!["2".into(), "0".into()],
        thorough: false,
        tip: brief((1, 12)),
        generation: Generation(2),
    };
    assert_eq!(fetch, [expected]);
    // One that answers later changes nothing.
    assert_eq!(plan.step(sealed("1", Some((1, 30)))), []);
    let start = plan.step(PlanEvent::Fetched(Ok(Vec::new())));
    assert!(
        matches!(&start[..], [PlanAction::Start { tip, .. }] if at(tip) == (1, 12)),
        "{start:?}"
    );
    assert_eq!(
        finish(plan.step(PlanEvent::Started(Ok(Running {
            pid: 3,
            ..Running::default()
        })))),
        Ok((1, 12))
    );
}

#[test]
fn too_few_seals_say_who_is_missing_and_what_state_it_is_in() {
    let (mut plan, _) = sealing(3, 2);
    assert_eq!(plan.step(down("0")), []);
    assert_eq!(plan.step(down("1")), []);
    let error = finish(plan.step(sealed("2", Some((1, 5))))).unwrap_err();
    assert!(matches!(
        error,
        PromoteError::TooFewSeals {
            needed: 2,
            holders: 3,
            ..
        }
    ));
    let told = error.to_string();
    for part in [
        "0 (connection refused)",
        "generation 2",
        "promoting again, here or elsewhere, is safe",
    ] {
        assert!(told.contains(part), "{told:?} lacks {part:?}");
    }
}

#[test]
fn each_failure_after_the_raise_says_that_nothing_runs() {
    let left = Left::Raised(Generation(2));
    let (mut plan, _) = sealing(1, 1);
    let none = finish(plan.step(sealed("0", None))).unwrap_err();
    assert_eq!(
        none,
        PromoteError::Nothing {
            vm: vm(),
            state: left
        }
    );

    let (mut plan, _) = sealing(1, 1);
    plan.step(sealed("0", Some((1, 5))));
    let fetch = finish(plan.step(PlanEvent::Fetched(Err("disk full".into())))).unwrap_err();
    assert!(
        fetch.to_string().contains("disk full") && fetch.to_string().contains("stopped under generation 2")
    );

    let (mut plan, _) = sealing(1, 1);
    plan.step(sealed("0", Some((1, 5))));
    plan.step(PlanEvent::Fetched(Ok(Vec::new())));
    let look = plan.step(PlanEvent::Started(Err("no /dev/kvm".into())));
    assert!(
        matches!(&look[..], [PlanAction::Fetch { thorough: true, .. }]),
        "{look:?}"
    );
    let start = finish(plan.step(PlanEvent::Fetched(Ok(Vec::new())))).unwrap_err();
    assert!(
        start.to_string().contains("web/1/5") && start.to_string().contains("no /dev/kvm"),
        "{start}"
    );

    let (mut plan, _) = sealing(2, 1);
    let current = Generation(7);
    let fenced = PlanEvent::Sealed {
        holder: "1".into(),
        result: Err(SealFailure::Fenced { current }),
    };
    let overtaken = finish(plan.step(fenced)).unwrap_err();
    assert!(matches!(overtaken, PromoteError::Overtaken { .. }));
    assert_eq!(plan.step(sealed("0", Some((1, 5)))), [], "nothing after the end");
}

#[test]
fn a_dry_run_changes_nothing() {
    let dry_run = PlanOptions {
        dry_run: true,
        ..PlanOptions::default()
    };
    let mut plan = Plan::new(vm(), dry_run);
    plan.step(PlanEvent::Begin);
    let asks = plan.step(PlanEvent::Record(Ok(World::new(2, 2).record())));
    assert!(
        asks.iter().all(|a| matches!(a, PlanAction::Ask { .. })),
        "{asks:?}"
    );
    assert_eq!(plan.step(asked("0", Some((1, 5)))), [], "it waits for everyone");
    let result = Err("connection refused".into());
    let down = PlanEvent::Asked {
        holder: "1".into(),
        result,
    };
    assert_eq!(finish(plan.step(down)), Ok((1, 5)));
}

#[test]
fn only_the_owner_that_was_judged_is_taken_over() {
    let with = |judged| {
        let options = PlanOptions {
            judged: Some(Generation(judged)),
            ..PlanOptions::default()
        };
        let mut plan = Plan::new(vm(), options);
        plan.step(PlanEvent::Begin);
        plan.step(PlanEvent::Record(Ok(World::new(3, 2).record())))
    };
    let current = World::new(3, 2).record().generation.0;
    assert!(matches!(with(current)[..], [PlanAction::Ask { .. }, ..]));
    // Another has taken it over since, or a generation before was restored from an old registry: who has it may be well.
    for judged in [current - 1, current + 1] {
        let error = finish(with(judged)).unwrap_err();
        assert!(matches!(error, PromoteError::NotJudged { .. }), "{error}");
        assert!(error.to_string().contains("Nothing was changed"), "{error}");
    }
}

#[test]
fn what_cannot_succeed_leaves_the_old_owner_alone() {
    let mut plan = Plan::new(vm(), PlanOptions::default());
    plan.step(PlanEvent::Begin);
    plan.step(PlanEvent::Record(Ok(World::new(3, 2).record())));
    for holder in ["0", "1"] {
        let result = Err("connection refused".into());
        let holder = holder.into();
        assert_eq!(plan.step(PlanEvent::Asked { holder, result }), []);
    }
    let error = finish(plan.step(asked("2", Some((1, 5))))).unwrap_err();
    let unchanged = matches!(
        error,
        PromoteError::TooFewSeals {
            state: Left::Unchanged,
            ..
        }
    );
    assert!(unchanged, "{error}");
}

#[test]
fn only_by_force_it_goes_on_without_enough_holders_and_waits_as_long_as_they_can_have_granted() {
    let run = |force: bool, failover| {
        let options = PlanOptions {
            force,
            ..PlanOptions::default()
        };
        let mut plan = Plan::new(vm(), options);
        let record = VmRecord {
            failover,
            ..World::new(3, 2).record()
        };
        plan.step(PlanEvent::Begin);
        plan.step(PlanEvent::Record(Ok(record.clone())));
        let unheard = |holder: &str| PlanEvent::Asked {
            holder: holder.into(),
            result: Err("connection refused".into()),
        };
        plan.step(unheard("0"));
        plan.step(unheard("1"));
        let raise = plan.step(asked("2", Some((1, 5))));
        if !force {
            return finish(raise).map(|_| (plan, Vec::new()));
        }
        assert!(matches!(raise[..], [PlanAction::Raise { .. }]), "{raise:?}");
        plan.step(PlanEvent::Raised(Ok(VmRecord {
            generation: Generation(2),
            ..record
        })));
        plan.step(down("0"));
        plan.step(down("1"));
        let actions = plan.step(sealed("2", Some((1, 5))));
        Ok((plan, actions))
    };
    assert!(matches!(run(false, None), Err(PromoteError::TooFewSeals { .. })));
    let (mut plan, actions) = run(true, None).unwrap();
    assert!(
        matches!(&actions[..], [PlanAction::Fetch { tip, .. }] if at(tip) == (1, 5)),
        "{actions:?}"
    );
    plan.step(PlanEvent::Fetched(Ok(Vec::new())));
    let ended = plan.step(PlanEvent::Started(Ok(Running {
        pid: 3,
        ..Running::default()
    })));
    let [PlanAction::Finish(outcome)] = &ended[..] else {
        panic!("{ended:?}");
    };
    let notes = outcome.as_ref().as_ref().unwrap().notes.join("; ");
    assert!(
        notes.contains("forced") && notes.contains("runs twice"),
        "{notes}"
    );
    let failover = migrate::registry::Failover {
        ttl_ms: 2500,
        renew_every_ms: 400,
        process: None,
        stop_on_lapse: None,
    };
    let (_, actions) = run(true, Some(failover)).unwrap();
    assert!(wait_of(&actions) >= Some(2525), "{actions:?}");
}

#[test]
fn a_late_answer_to_a_question_is_no_seal() {
    let (mut plan, _) = sealing(3, 2);
    assert_eq!(plan.step(sealed("0", Some((1, 9)))), []);
    assert_eq!(plan.step(asked("1", Some((1, 9)))), []);
    assert!(matches!(
        &plan.step(sealed("2", Some((1, 9))))[..],
        [PlanAction::Fetch { .. }]
    ));
}

#[test]
fn a_holder_that_lost_what_it_acknowledged_does_not_count() {
    // One of two suffices, and it once had more than it has: the other is waited for, and has it.
    let (mut plan, _) = sealing(2, 2);
    assert_eq!(plan.step(sealed_as("0", lost((1, 9), (1, 12)))), []);
    let fetch = plan.step(sealed("1", Some((1, 12))));
    assert!(
        matches!(&fetch[..], [PlanAction::Fetch { tip, from, .. }] if at(tip) == (1, 12) && from[0] == "1"),
        "{fetch:?}"
    );

    // The other is gone: that is said, with what it would cost.
    let (mut plan, _) = sealing(2, 2);
    plan.step(sealed_as("0", lost((1, 9), (1, 12))));
    let error = finish(plan.step(down("1"))).unwrap_err();
    let told = error.to_string();
    for part in [
        "0 once stored web/1/12",
        "newest whole checkpoint at the holders that answer is web/1/9",
        "1 (connection refused)",
        "--accept-loss` goes on from web/1/9",
        "lost for ever",
    ] {
        assert!(told.contains(part), "{told:?} lacks {part:?}");
    }

    // Two of three that remember everything prove that it was not committed.
    let (mut plan, _) = sealing(3, 2);
    plan.step(sealed_as("0", lost((1, 9), (1, 12))));
    plan.step(sealed("1", Some((1, 11))));
    let fetch = plan.step(sealed("2", Some((1, 10))));
    assert!(
        matches!(&fetch[..], [PlanAction::Fetch { tip, .. }] if at(tip) == (1, 11)),
        "{fetch:?}"
    );

    // One that cannot tell does not count either.
    let (mut plan, _) = sealing(2, 2);
    let forgot = Holding {
        forgot: Some("its disk is new".into()),
        ..Holding::default()
    };
    assert_eq!(plan.step(sealed_as("0", forgot)), []);
    assert!(matches!(
        finish(plan.step(down("1"))).unwrap_err(),
        PromoteError::WouldLose { best: None, .. }
    ));
}

#[test]
fn what_the_registry_has_as_committed_is_a_floor_of_its_own() {
    let (mut plan, mut record) = sealing(1, 1);
    drop(plan);
    record.newest = Some(brief((1, 12)).held());
    let ask = |options| {
        let mut plan = Plan::new(vm(), options);
        plan.step(PlanEvent::Begin);
        plan.step(PlanEvent::Record(Ok(record.clone())));
        let next = plan.step(asked("0", Some((1, 9))));
        (plan, next)
    };
    let (_, next) = ask(PlanOptions::default());
    let error = finish(next).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the registry has web/1/12 as committed"),
        "{error}"
    );

    let accept_loss = true;
    (plan, _) = ask(PlanOptions {
        accept_loss,
        ..PlanOptions::default()
    });
    plan.step(PlanEvent::Raised(Ok(record)));
    let fetch = plan.step(sealed("0", Some((1, 9))));
    assert!(
        matches!(&fetch[..], [PlanAction::Fetch { tip, .. }] if at(tip) == (1, 9)),
        "{fetch:?}"
    );
}

#[test]
fn parts_at_several_holders_are_put_together_before_anything_is_given_up() {
    let parts = || Holding {
        dangling: Some(brief((1, 12))),
        ..lost((1, 9), (1, 12))
    };
    let seal = |accept_loss| {
        let (_, record) = sealing(2, 1);
        let mut plan = Plan::new(
            vm(),
            PlanOptions {
                accept_loss,
                ..PlanOptions::default()
            },
        );
        plan.step(PlanEvent::Begin);
        plan.step(PlanEvent::Record(Ok(record.clone())));
        plan.step(asked("0", Some((1, 9))));
        plan.step(asked("1", Some((1, 11))));
        plan.step(PlanEvent::Raised(Ok(record)));
        plan.step(sealed_as("0", parts()));
        let fetch = plan.step(sealed("1", Some((1, 11))));
        assert!(
            matches!(&fetch[..], [PlanAction::Fetch { tip, .. }] if at(tip) == (1, 12)),
            "{fetch:?}"
        );
        plan
    };
    let start = seal(false).step(PlanEvent::Fetched(Ok(Vec::new())));
    assert!(matches!(&start[..], [PlanAction::Start { tip, .. }] if at(tip) == (1, 12)));
    let error = finish(seal(false).step(PlanEvent::Fetched(Err("no link".into())))).unwrap_err();
    assert!(matches!(error, PromoteError::WouldLose { .. }), "{error}");
    let lower = seal(true).step(PlanEvent::Fetched(Err("no link".into())));
    assert!(
        matches!(&lower[..], [PlanAction::Fetch { tip, .. }] if at(tip) == (1, 11)),
        "{lower:?}"
    );
}

#[test]
fn a_start_that_failed_for_a_damaged_copy_is_tried_once_more() {
    let failed = || PlanEvent::Started(Err("digest of frame 3".into()));
    let (mut plan, _) = sealing(1, 1);
    plan.step(sealed("0", Some((1, 5))));
    plan.step(PlanEvent::Fetched(Ok(Vec::new())));
    plan.step(failed());
    let again = plan.step(PlanEvent::Fetched(Ok(vec!["web/1/5 was replaced".into()])));
    assert!(matches!(&again[..], [PlanAction::Start { .. }]), "{again:?}");
    let error = finish(plan.step(failed())).unwrap_err();
    assert!(matches!(error, PromoteError::Start { .. }), "{error}");
}

/// A plan that has raised from `before` to `raised`, and whose two holders had granted so much; what it does then.
fn raised(before: VmRecord, raised: VmRecord, granted: [u64; 2]) -> (Plan, Vec<PlanAction>) {
    let mut plan = Plan::new(vm(), PlanOptions::default());
    plan.step(PlanEvent::Begin);
    plan.step(PlanEvent::Record(Ok(before)));
    for holder in ["0", "1"] {
        plan.step(asked(holder, Some((1, 1))));
    }
    plan.step(PlanEvent::Raised(Ok(raised)));
    let mut actions = Vec::new();
    for (holder, ms) in ["0", "1"].into_iter().zip(granted) {
        let holding = Holding {
            granted: Duration::from_millis(ms),
            ..has(Some((1, 1)))
        };
        actions.extend(plan.step(sealed_as(holder, holding)));
    }
    (plan, actions)
}

fn wait_of(actions: &[PlanAction]) -> Option<u64> {
    actions.iter().find_map(|action| match action {
        PlanAction::Wait { time, .. } => Some(time.as_millis() as u64),
        _ => None,
    })
}

#[test]
fn the_guest_starts_only_after_the_time_of_the_owner_before() {
    let world = World::new(2, 1);
    let plain = world.record();
    let failover = Some(migrate::registry::Failover {
        ttl_ms: 2500,
        renew_every_ms: 400,
        process: None,
        stop_on_lapse: None,
    });
    let before = VmRecord {
        failover,
        leased: Some(1),
        ..plain.clone()
    };
    let after = |revision| VmRecord {
        generation: Generation(2),
        revision,
        leased: None,
        state: VmState::Stopped,
        ..before.clone()
    };
    let alive = migrate::registry::LiveLease {
        lease: 9,
        ttl_ms: 2525,
    };

    // Its lease had run out in the registry, and nobody granted anything: nothing to wait for.
    assert_eq!(wait_of(&raised(before.clone(), after(2), [0, 0]).1), None);
    // It took another one between the look and the raise.
    assert_eq!(wait_of(&raised(before.clone(), after(3), [0, 0]).1), Some(2525));
    let held = VmRecord {
        alive: Some(alive),
        ..before.clone()
    };
    assert_eq!(wait_of(&raised(held.clone(), after(2), [0, 0]).1), Some(2525));
    // Raised before by one that went no further: of the owner before it nothing is known.
    let stuck = VmRecord {
        leased: None,
        state: VmState::Stopped,
        ..before.clone()
    };
    assert_eq!(wait_of(&raised(stuck, after(2), [0, 0]).1), Some(2525));
    // An owner without a lease runs until it is fenced, whatever is waited.
    assert_eq!(
        wait_of(
            &raised(
                plain,
                VmRecord {
                    failover: None,
                    ..after(2)
                },
                [0, 0]
            )
            .1
        ),
        None
    );

    let (mut plan, actions) = raised(before.clone(), after(2), [30, 1700]);
    assert_eq!(wait_of(&actions), Some(1700));
    assert_eq!(
        plan.step(PlanEvent::Fetched(Ok(Vec::new()))),
        [],
        "it is not over"
    );
    let start = plan.step(PlanEvent::Waited {
        time: Duration::from_millis(1700),
    });
    assert!(matches!(start[..], [PlanAction::Start { .. }]), "{start:?}");

    let (mut plan, _) = raised(held, after(2), [0, 0]);
    assert_eq!(
        plan.step(PlanEvent::Waited {
            time: Duration::from_millis(2525)
        }),
        []
    );
    let start = plan.step(PlanEvent::Fetched(Ok(Vec::new())));
    assert!(matches!(start[..], [PlanAction::Start { .. }]), "{start:?}");
}
