//! The model, checked exhaustively; and with one rule broken at a time, to see that it finds out.

use std::collections::BTreeSet;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model as _};
use understudy_sim::Rules;
use understudy_sim::model::{Model, Sizes};

const fn sizes(holders: usize, quorum: usize, ticks: u64, epochs: u64, begins: u8, restarts: u8) -> Sizes {
    Sizes {
        holders,
        quorum,
        ticks,
        epochs,
        begins,
        restarts,
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Checks all of it; says how much there was.
fn check(sizes: Sizes) {
    let begun = Instant::now();
    let checker = Model::new(sizes, Rules::SOUND).checker().threads(threads());
    let checker = checker.spawn_bfs().join();
    println!(
        "{sizes:?}: {} states, {} of them different, {} steps deep, {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    // It went through all of it.
    assert!(checker.is_done());
    checker.assert_properties();
}

/// This fails under these rules; it is shown how it comes to it.
fn found(sizes: Sizes, rules: Rules, fails: &'static str) {
    let checker = Model::new(sizes, rules).checker().threads(threads());
    let until = HasDiscoveries::AllOf(BTreeSet::from([fails]));
    let checker = checker.finish_when(until).spawn_bfs().join();
    let mut discoveries = checker.discoveries();
    let Some(path) = discoveries.remove(fails) else {
        panic!(
            "{rules:?}: {fails:?} held, of {} states",
            checker.unique_state_count()
        );
    };
    println!("{rules:?}, {fails:?} fails after:");
    for action in path.into_actions() {
        println!("  {action:?}");
    }
}

#[test]
fn every_interleaving_of_one_takeover_is_safe_and_ends_up_running() {
    check(sizes(2, 1, 2, 1, 1, 1));
    check(sizes(2, 2, 2, 1, 1, 1));
    check(sizes(3, 2, 1, 1, 1, 0));
}

#[test]
fn every_interleaving_of_two_takeovers_is_safe_and_ends_up_running() {
    check(sizes(1, 1, 2, 1, 2, 0));
}

#[test]
#[ignore = "long: scripts/test --run-ignored only"]
fn more_checkpoints_and_time_are_safe() {
    check(sizes(2, 1, 3, 2, 1, 1));
}

#[test]
#[ignore = "long: scripts/test --run-ignored only"]
fn three_holders_that_begin_anew_are_safe() {
    check(sizes(3, 2, 2, 1, 1, 1));
}

#[test]
#[ignore = "long: scripts/test --run-ignored only"]
fn two_takeovers_at_once_are_safe() {
    check(sizes(2, 1, 1, 1, 2, 0));
    check(sizes(2, 2, 1, 1, 2, 0));
}

#[test]
fn a_holder_that_does_not_fence_is_found_out() {
    let holders_fence = false;
    let rules = Rules {
        holders_fence,
        ..Rules::SOUND
    };
    found(sizes(2, 2, 1, 2, 1, 0), rules, "no committed epoch lost");
    found(sizes(2, 2, 2, 1, 1, 0), rules, "never two running");
}

#[test]
fn a_takeover_that_does_not_wait_is_found_out() {
    let takeover_waits = false;
    let rules = Rules {
        takeover_waits,
        ..Rules::SOUND
    };
    found(sizes(2, 2, 1, 1, 1, 0), rules, "never two running");
}

#[test]
fn an_owner_that_counts_from_the_answer_is_found_out() {
    let counts_from_asking = false;
    let rules = Rules {
        counts_from_asking,
        ..Rules::SOUND
    };
    found(sizes(2, 1, 2, 1, 1, 0), rules, "never two running");
}

#[test]
fn a_holder_that_forgets_its_grants_at_a_restart_is_found_out() {
    let restart_remembers = false;
    let rules = Rules {
        restart_remembers,
        ..Rules::SOUND
    };
    found(sizes(2, 2, 3, 1, 1, 2), rules, "never two running");
}
