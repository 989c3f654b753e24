//! The guest's clocks over a restore: kvmclock and all TSCs move as one, by the policy's time.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

mod common;

use std::sync::Arc;

use common::{Guests, small};
use vmm::clock::ClockPolicy;
use vmm::memory::GuestRam;
use vmm::outbox::Outbox;
use vmm::vm::{Ended, MachineConfig, MachineState, Vm, no_devices};

const TSC: u32 = 0x10;
const GAP_NS: u64 = 60_000_000_000;

fn tsc(state: &MachineState, vcpu: usize) -> u64 {
    let msrs = &state.vcpus[vcpu].msrs;
    msrs.iter().find(|msr| msr.index == TSC).unwrap().data
}

fn has_tsc_offsets() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    text.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
}

fn restore(state: &MachineState, policy: ClockPolicy) -> MachineState {
    let ended: Ended = Arc::new(|_, _, _| {});
    let mut vm = Vm::restore(
        state,
        policy,
        GuestRam::new,
        |_| Ok(()),
        &no_devices,
        &Outbox::default(),
        &ended,
    )
    .unwrap();
    vm.pause().unwrap().save().unwrap()
}

#[test]
fn kvmclock_and_every_tsc_move_by_the_same_time() {
    let guests = Guests::new();
    let config = MachineConfig {
        vcpus: 4,
        ..small(16)
    };
    let ended: Ended = Arc::new(|_, _, _| {});
    let source = guests.source("ticker", "period_ms=5");
    let mut vm = Vm::boot(config, &source, &no_devices, &Outbox::default(), &ended).unwrap();
    let mut before = vm.pause().unwrap().save().unwrap();
    drop(vm);
    assert!(before.clock.realtime > 0, "the instant's wall clock is kept");
    // A guest that has set one vCPU's TSC apart keeps it so, to the cycle.
    let apart = before.vcpus[2]
        .msrs
        .iter_mut()
        .find(|msr| msr.index == TSC)
        .unwrap();
    apart.data += 1_000_000;
    // As if it had been taken a minute ago.
    before.clock.realtime -= GAP_NS;
    let khz = u64::from(before.vcpus[0].tsc_khz);
    for (policy, gap) in [(ClockPolicy::CatchUp, GAP_NS), (ClockPolicy::Frozen, 0)] {
        let after = restore(&before, policy);
        let moved_ns = after.clock.clock - before.clock.clock;
        // How long this test took is in it, but not another minute.
        assert!(
            (gap..gap + GAP_NS / 2).contains(&moved_ns),
            "{policy:?}: kvmclock moved {moved_ns} ns"
        );
        // Without VMX or SVM a guest reads the host's own TSC, whatever its offset says; `tests/linux.rs` is for those.
        for vcpu in (0..4).filter(|_| has_tsc_offsets()) {
            let cycles = tsc(&after, vcpu) - tsc(&before, vcpu);
            let tsc_ns = u128::from(cycles) * 1_000_000 / u128::from(khz);
            let apart = u64::try_from(tsc_ns).unwrap().abs_diff(moved_ns);
            assert!(
                apart < 20_000_000,
                "{policy:?}: TSC {vcpu} and kvmclock differ by {apart} ns"
            );
            let skew = |state: &MachineState| tsc(state, vcpu).wrapping_sub(tsc(state, 0));
            assert_eq!(skew(&after), skew(&before), "{policy:?}: TSC {vcpu} beside TSC 0");
        }
    }
}
