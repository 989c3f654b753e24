//! A real guest on /dev/kvm: booted, stopped, saved, restored into a new machine in this process.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

mod common;

use std::time::Duration;

use common::{Guests, PATIENCE, small, wait_for};
use vmm::boot::BootSource;
use vmm::control::{RunState, VmHandle};
use vmm::vm::{MachineConfig, Vm, no_devices};

fn boot(config: MachineConfig, source: &BootSource) -> VmHandle {
    VmHandle::start(|outbox, ended| Vm::boot(config, source, &no_devices, outbox, ended)).unwrap()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// A guest that stands still says nothing; one that runs says something every 2 ms here.
#[track_caller]
fn assert_silent(vm: &VmHandle, which: &str) {
    let end = vm.outbox().end();
    let said = vm.outbox().read(end, Duration::from_millis(100)).bytes;
    assert!(said.is_empty(), "a {which} guest spoke");
}

#[test]
fn a_guest_boots_and_ticks_and_ends() {
    let guests = Guests::new();
    let vm = boot(
        small(64),
        &guests.source("ticker", "period_ms=5 exit_after_ticks=20"),
    );
    assert_eq!(*vm.state().borrow(), RunState::Paused);
    run(vm.resume()).unwrap();
    let said = wait_for(vm.outbox(), |text| {
        text.contains("tick 19\n").then(|| text.to_owned())
    });
    let ticks: Vec<_> = said.lines().filter(|line| line.starts_with("tick ")).collect();
    assert_eq!(ticks, (0..20).map(|n| format!("tick {n}")).collect::<Vec<_>>());
    run(async { vm.state().wait_for(RunState::is_final).await.map(|_| ()) }).unwrap();
    assert_eq!(vm.state().borrow().word(), "ended");
    assert!(run(vm.resume()).is_err(), "a guest that ended cannot go on");
}

#[test]
fn a_paused_guest_is_silent_and_goes_on() {
    let guests = Guests::new();
    let vm = boot(small(64), &guests.source("ticker", "period_ms=2"));
    run(vm.resume()).unwrap();
    wait_for(vm.outbox(), |text| text.contains("tick 5").then_some(()));
    run(vm.pause()).unwrap();
    assert_silent(&vm, "paused");
    let end = vm.outbox().end();
    run(vm.resume()).unwrap();
    assert!(!vm.outbox().read(end, PATIENCE).bytes.is_empty());
    vm.fence("generation 2 is running elsewhere").unwrap();
    assert_silent(&vm, "fenced");
    assert!(run(vm.resume()).unwrap_err().to_string().contains("generation 2"));
    run(vm.stop()).unwrap();
    assert_eq!(*vm.state().borrow(), RunState::Stopped);
}

#[test]
fn without_a_lease_the_guest_is_not_entered_though_nobody_has_stopped_it() {
    let guests = Guests::new();
    let vm = boot(small(64), &guests.source("ticker", "period_ms=2"));
    vm.leash().hold();
    let refused = run(vm.resume()).unwrap_err().to_string();
    assert!(refused.contains("it has no lease"), "{refused}");
    assert_eq!(*vm.state().borrow(), RunState::Paused);
    vm.leash().free();
    run(vm.resume()).unwrap();
    wait_for(vm.outbox(), |text| text.contains("tick 5").then_some(()));
    vm.leash().hold();
    // It is in the guest when the lease goes, and comes out with at most the byte it is writing.
    std::thread::sleep(Duration::from_millis(100));
    let end = vm.outbox().end();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.outbox().end(), end, "the guest ran without a lease");
    assert_eq!(*vm.state().borrow(), RunState::Running);
    vm.leash().free();
    assert!(
        !vm.outbox().read(end, PATIENCE).bytes.is_empty(),
        "it goes on with one"
    );
    vm.leash().cut();
    assert!(
        vm.outbox().read(0, Duration::from_millis(10)).bytes.is_empty(),
        "what it said is not told to anyone any more"
    );
    run(vm.stop()).unwrap();
}

#[test]
fn a_guest_that_lapsed_goes_on_when_its_lease_is_renewed_unless_it_was_paused_meanwhile() {
    let guests = Guests::new();
    let vm = boot(small(64), &guests.source("ticker", "period_ms=2"));
    vm.lapse("it does not run yet").unwrap();
    assert_eq!(*vm.state().borrow(), RunState::Paused);
    run(vm.resume()).unwrap();
    vm.lapse("nobody answers").unwrap();
    let lapsed = vm.state().borrow().clone();
    assert_eq!(
        (lapsed.word(), lapsed.reason().as_deref()),
        ("lapsed", Some("nobody answers"))
    );
    assert_silent(&vm, "lapsed");
    assert!(
        run(vm.resume())
            .unwrap_err()
            .to_string()
            .contains("nobody answers")
    );
    vm.renewed().unwrap();
    assert_eq!(*vm.state().borrow(), RunState::Running);
    vm.lapse("nobody answers").unwrap();
    run(vm.pause()).unwrap();
    vm.renewed().unwrap();
    assert_eq!(*vm.state().borrow(), RunState::Paused, "someone wants it paused");
    run(vm.resume()).unwrap();
    vm.lapse("nobody answers").unwrap();
    vm.fence("another runs it").unwrap();
    vm.renewed().unwrap();
    assert_eq!(vm.state().borrow().word(), "fenced");
    run(vm.stop()).unwrap();
}
