//! What KVM and the devices are given at a restore is what they have afterwards, part by part: the bare-metal guests use
//! few of these parts, and would not miss the others.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

mod common;

use std::sync::Arc;

use common::{Guests, small};
use segment::Record;
use vmm::clock::ClockPolicy;
use vmm::memory::GuestRam;
use vmm::outbox::Outbox;
use vmm::preflight::{self, Lack};
use vmm::state::{from_records, to_records};
use vmm::vm::{Ended, MachineConfig, MachineState, Vm, VmError, no_devices};

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
/// The local APIC's registers, as offsets into its page.
const LDR: usize = 0xd0;
const LVT_TIMER: usize = 0x320;
const LVT_ERROR: usize = 0x370;

fn booted() -> MachineState {
    let guests = Guests::new();
    let config = MachineConfig {
        vcpus: 2,
        ..small(16)
    };
    let ended: Ended = Arc::new(|_, _, _| {});
    let source = guests.source("ticker", "period_ms=5");
    let mut vm = Vm::boot(config, &source, &no_devices, &Outbox::default(), &ended).unwrap();
    vm.pause().unwrap().save().unwrap()
}

fn restored(state: &MachineState) -> Result<Vm, VmError> {
    let ended: Ended = Arc::new(|_, _, _| {});
    let (outbox, load) = (Outbox::default(), |_: &GuestRam| Ok(()));
    Vm::restore(
        state,
        ClockPolicy::Frozen,
        GuestRam::new,
        load,
        &no_devices,
        &outbox,
        &ended,
    )
}

fn put(record: &mut Record, at: usize, bytes: &[u8]) {
    record.payload[at..at + bytes.len()].copy_from_slice(bytes);
}

fn find<'a>(records: &'a mut [Record], tag: &str) -> &'a mut Record {
    records.iter_mut().find(|record| record.tag == tag).unwrap()
}

/// No part as a new machine has it.
fn disturbed(mut state: MachineState) -> MachineState {
    let vcpu = &mut state.vcpus[0];
    (vcpu.regs.rbx, vcpu.regs.r15) = (0x1122_3344_5566_7788, u64::MAX - 1);
    vcpu.sregs.cr2 = 0xdead_b000;
    // XMM0, and in the header that the SSE part is in use.
    vcpu.xsave[160..176].copy_from_slice(&[0x5a; 16]);
    vcpu.xsave[512] |= 0b11;
    vcpu.xcrs.xcrs[0].value = 0b11;
    (vcpu.debug_regs.db[0], vcpu.debug_regs.dr6) = (0x1234_5000, 0xffff_0ff1);
    for (register, value) in [
        (LDR, 0x0200_0000u32),
        // Counts to a deadline: without this mode the deadline below is dropped.
        (LVT_TIMER, 2 << 17 | 0x31),
        (LVT_ERROR, 1 << 16 | 0xfe),
    ] {
        for (to, byte) in vcpu.lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
            *to = byte as _;
        }
    }
    let tsc = vcpu.msrs.iter().find(|msr| msr.index == TSC).unwrap().data;
    for (index, value) in [
        (0xc000_0081, 0x0023_0010_0000_0000), // STAR
        (0x176, 0xffff_8000_0000_1000),       // SYSENTER_EIP
        (0x277, 0x0007_0406_0007_0401),       // PAT
        (TSC_DEADLINE, tsc + (1 << 50)),
    ] {
        let msr = vcpu.msrs.iter_mut().find(|msr| msr.index == index);
        msr.unwrap_or_else(|| panic!("MSR {index:#x} is not saved")).data = value;
    }
    // A general protection fault that has not reached the guest yet.
    (vcpu.events.exception.injected, vcpu.events.exception.nr) = (1, 13);
    (
        vcpu.events.exception.has_error_code,
        vcpu.events.exception.error_code,
    ) = (1, 0x18);
    // As if it had been started and then halted.
    state.vcpus[1].mp_state.mp_state = 3;
    let brand = state.vcpus[0]
        .cpuid
        .iter_mut()
        .find(|e| e.function == 0x8000_0002);
    brand.unwrap().ebx ^= 0x20;

    let mut records = to_records(&state);
    // The master PIC's mask; a masked pin of the IOAPIC, behind its base, index, id and the lines' states.
    put(find(&mut records, "irqchip/0"), 8 + 2, &[0x5a]);
    put(
        find(&mut records, "irqchip/2"),
        8 + 24 + 5 * 8,
        &0x1_0077u64.to_le_bytes(),
    );
    let mut state = from_records(&records).unwrap();
    (state.pit.channels[2].count, state.pit.channels[2].mode) = (0x4321, 2);
    (state.serial.scratch, state.serial.line_control) = (0x5a, 3);
    state.i8042.config = 0x47;
    (state.rtc.index, state.rtc.memory[0x40]) = (0x40, 7);
    state
}

/// What passes with time, and what KVM computes, is left out.
fn comparable(state: &MachineState) -> Vec<Record> {
    let mut state = state.clone();
    state.clock = Default::default();
    for channel in &mut state.pit.channels {
        channel.count_load_time = 0;
    }
    for vcpu in &mut state.vcpus {
        vcpu.msrs.retain(|msr| msr.index != TSC);
    }
    to_records(&state)
}

#[test]
fn every_part_that_is_restored_comes_back() {
    let before = booted();
    let changed = disturbed(before.clone());
    // Nothing below is satisfied by a machine that is new.
    let (new, wanted) = (comparable(&before), comparable(&changed));
    for part in [
        "vcpu/0/regs",
        "vcpu/0/sregs",
        "vcpu/0/xsave",
        "vcpu/0/xcrs",
        "vcpu/0/debugregs",
        "vcpu/0/lapic",
        "vcpu/0/cpuid",
        "vcpu/0/msrs",
        "vcpu/0/events",
        "vcpu/1/mp_state",
        "pit",
        "irqchip/0",
        "irqchip/2",
        "serial",
        "i8042",
        "rtc",
    ] {
        let payload = |records: &[Record]| records.iter().find(|r| r.tag == part).map(|r| r.payload.clone());
        assert_ne!(payload(&new), payload(&wanted), "{part} is as in a new machine");
    }
    let mut vm = restored(&changed).unwrap();
    let found = comparable(&vm.pause().unwrap().save().unwrap());
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.iter().zip(&wanted) {
        let differing: Vec<usize> = (0..wanted.payload.len().max(found.payload.len()))
            .filter(|at| found.payload.get(*at) != wanted.payload.get(*at))
            .collect();
        assert!(
            differing.is_empty(),
            "{} differs at bytes {differing:?}",
            wanted.tag
        );
    }
}

#[test]
fn a_cpu_that_lacks_what_the_guest_was_shown_is_refused_by_name() {
    let mut state = booted();
    assert_eq!(preflight::check(&state).unwrap(), []);
    // No processor has all three: the first is Intel's, the second AMD's, the third is nobody's yet.
    let mut lacking = Vec::new();
    for entry in &mut state.vcpus[0].cpuid {
        let (register, bit, name) = match (entry.function, entry.index) {
            (7, 0) => (&mut entry.edx, 24, "amx-tile"),
            (0x8000_0001, _) => (&mut entry.ecx, 6, "sse4a"),
            (0x8000_0007, _) => (&mut entry.edx, 31, "bit 31"),
            _ => continue,
        };
        if *register & 1 << bit == 0 {
            *register |= 1 << bit;
            lacking.push(name);
        }
    }
    assert!(!lacking.is_empty());
    let refused = restored(&state).map(drop).unwrap_err().to_string();
    let lacks = preflight::check(&state).unwrap();
    for name in lacking {
        assert!(
            refused.contains("CPU lacks") && refused.contains(name),
            "{name}: {refused}"
        );
        let told = |lack: &Lack| matches!(lack, Lack::Feature(feature) if feature.contains(name));
        assert!(lacks.iter().any(told), "{name}: {lacks:?}");
    }
}
