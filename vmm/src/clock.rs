//! The guest's clocks over a checkpoint and a restore: kvmclock and every vCPU's TSC, as one.
//!
//! ```text
//!              checkpoint                                  restore
//! kvmclock     c  at one instant                           c + e      e = 0 (frozen) or the time between (catch-up)
//! TSC of i     t(i) at the same instant                    t(i) + e * frequency
//! ```
//!
//! A guest on clocksource=tsc never looks at kvmclock once it runs, so advancing kvmclock alone would leave its time
//! behind (trap 8); and TSCs written one by one drift apart by the time between the writes (trap 9). Therefore both
//! are moved by the same `e`, the TSCs through `KVM_VCPU_TSC_OFFSET`, by the algorithm of the kernel's
//! Documentation/virt/kvm/devices/vcpu.rst (group 4), which this file follows:
//!
//! 1. save: `KVM_GET_CLOCK` gives kvmclock, the host's TSC and its wall clock of one instant; with each vCPU's offset
//!    that is the guest's TSC at that instant. It goes into the saved MSR, in place of what was read a moment before.
//! 2. restore: `KVM_SET_CLOCK`, with `KVM_CLOCK_REALTIME` to catch up; `KVM_GET_CLOCK` again: how far kvmclock is.
//! 3. offset(i) = t(i) + e * frequency - the host's TSC of that reading.
//!
//! Where the host's TSC is scaled for the guest, or is no clock of the host's, its readings do not tell the guest's
//! TSC; vCPU 0's is read as an MSR beside the clock then, and the others follow it by the differences of their
//! offsets, which are exact all the same.
//!
//! The wall clock a guest keeps follows from these two; the CMOS clock always shows the host's time.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::kvm::{self, KvmError};
use crate::vcpu::msrs;
use crate::vcpu::state::VcpuState;
use crate::vm::MachineState;

/// What the guest's clocks do about the time between a checkpoint and its restore.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum ClockPolicy {
    /// They go on where they stood: no time has passed for the guest.
    Frozen,
    /// They show the time that has passed, as after a wait: right for a failover.
    #[default]
    CatchUp,
}

impl std::str::FromStr for ClockPolicy {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "frozen" => Ok(Self::Frozen),
            "catch-up" => Ok(Self::CatchUp),
            _ => Err("the policies are frozen and catch-up".into()),
        }
    }
}

/// What of the host's clock matters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostClock {
    /// The frequency of the host's TSC, in kHz, as KVM knows it.
    pub tsc_khz: u32,
    /// `KVM_SET_CLOCK` catches up by itself.
    pub realtime: bool,
}

fn on_vm(ioctl: &'static str) -> impl FnOnce(vmm_sys_util::errno::Error) -> KvmError {
    KvmError::ioctl(ioctl, "the VM")
}

fn on_vcpu(ioctl: &'static str, id: u8) -> impl FnOnce(vmm_sys_util::errno::Error) -> KvmError {
    KvmError::ioctl(ioctl, format!("vCPU {id}"))
}

/// One instant of a machine: kvmclock, and vCPU 0's TSC if it could be told.
struct Reading {
    clock: kvm_clock_data,
    tsc: u64,
    /// vCPU 0's offset, where KVM has offsets.
    offset: Option<u64>,
}

impl Reading {
    fn read(vm: &VmFd, first: &VcpuFd, host: HostClock) -> Result<Self, KvmError> {
        let scaled = first.get_tsc_khz().map_err(on_vcpu("KVM_GET_TSC_KHZ", 0))? != host.tsc_khz;
        let offset = kvm::tsc_offset(first);
        let mut clock = vm.get_clock().map_err(on_vm("KVM_GET_CLOCK"))?;
        let tsc = match offset {
            Some(offset) if clock.flags & KVM_CLOCK_HOST_TSC != 0 && !scaled => {
                clock.host_tsc.wrapping_add(offset)
            }
            // Read as close to the clock as two calls can be.
            Some(_) | None => msrs::get(first, 0, &[msrs::TSC])?[0].data,
        };
        if clock.flags & KVM_CLOCK_REALTIME == 0 {
            clock.realtime = kvm::realtime_ns();
        }
        Ok(Self { clock, tsc, offset })
    }
}

/// Reads the clock of a machine that stands still, and makes the TSCs in `states` those of the same instant. The
/// `realtime` of what is returned is always filled.
///
/// # Errors
/// [`KvmError`] naming the ioctl.
pub(crate) fn save<'a>(
    vm: &VmFd,
    vcpus: impl Iterator<Item = &'a VcpuFd> + Clone,
    states: &mut [VcpuState],
    host: HostClock,
) -> Result<kvm_clock_data, KvmError> {
    let mut fds = vcpus.clone();
    let Some(first) = fds.next() else {
        return vm.get_clock().map_err(on_vm("KVM_GET_CLOCK"));
    };
    let now = Reading::read(vm, first, host)?;
    for ((vcpu, state), id) in vcpus.zip(states).zip(0u8..) {
        let Some(tsc) = state.msrs.iter_mut().find(|msr| msr.index == msrs::TSC) else {
            continue;
        };
        match (now.offset, kvm::tsc_offset(vcpu)) {
            (Some(first), Some(own)) => tsc.data = now.tsc.wrapping_add(own.wrapping_sub(first)),
            // A KVM without offsets: what the MSR said, which for vCPU 0 is this instant's.
            (None, _) | (_, None) if id == 0 => tsc.data = now.tsc,
            (None, _) | (_, None) => {}
        }
    }
    Ok(now.clock)
}

/// What a checkpoint says of a machine's clocks, and what is to become of it.
#[derive(Debug, Clone)]
pub(crate) struct SavedClock {
    clock: kvm_clock_data,
    policy: ClockPolicy,
    vcpus: Vec<SavedTsc>,
}

#[derive(Debug, Clone)]
struct SavedTsc {
    tsc: Option<u64>,
    khz: u32,
    deadline: Vec<kvm_msr_entry>,
}

impl SavedClock {
    pub(crate) fn of(saved: &MachineState, policy: ClockPolicy) -> Self {
        let find = |state: &VcpuState, index| state.msrs.iter().copied().find(|msr| msr.index == index);
        let vcpus = saved.vcpus.iter().map(|state| SavedTsc {
            tsc: find(state, msrs::TSC).map(|msr| msr.data),
            khz: state.tsc_khz,
            deadline: find(state, msrs::TSC_DEADLINE).into_iter().collect(),
        });
        Self {
            clock: saved.clock,
            policy,
            vcpus: vcpus.collect(),
        }
    }

    /// What is still to be done when the guest first runs: a frozen clock goes back to where it stood, for until then
    /// it has gone on. One that catches up is right already.
    pub(crate) fn until_first_run(self) -> Option<Self> {
        (self.policy == ClockPolicy::Frozen).then_some(self)
    }

    /// Sets kvmclock, the TSCs and then their deadlines, on vCPUs that have everything else. May be repeated: a timer
    /// that fired in between fires once more, which guests tolerate.
    ///
    /// # Errors
    /// [`KvmError`] naming the ioctl.
    pub(crate) fn restore<'a>(
        &self,
        vm: &VmFd,
        vcpus: impl Iterator<Item = &'a VcpuFd> + Clone,
        host: HostClock,
    ) -> Result<(), KvmError> {
        let clock = clock_to_set(&self.clock, self.policy, host.realtime, kvm::realtime_ns());
        vm.set_clock(&clock).map_err(on_vm("KVM_SET_CLOCK"))?;
        if let (Some(first), Some(saved)) = (vcpus.clone().next(), self.vcpus.first())
            && let Some(tsc) = saved.tsc
        {
            let now = Reading::read(vm, first, host)?;
            let elapsed_ns = now.clock.clock.saturating_sub(self.clock.clock);
            let wanted = tsc.wrapping_add(cycles(elapsed_ns, saved.khz));
            let offset = now
                .offset
                .map(|offset| offset.wrapping_add(wanted.wrapping_sub(now.tsc)));
            // The same for all: what differs between them was in the checkpoint already.
            for ((vcpu, own), id) in vcpus.clone().zip(&self.vcpus).zip(0u8..) {
                let apart = own.tsc.unwrap_or(tsc).wrapping_sub(tsc);
                set_tsc(vcpu, id, offset, wanted, apart)?;
            }
            if offset.is_some_and(|offset| kvm::tsc_offset(first) != Some(offset)) {
                tracing::warn!(
                    "this host's KVM does not move the guest's TSC: a guest on clocksource=tsc is as far behind as \
                     it was stopped"
                );
            }
        }
        for ((vcpu, saved), id) in vcpus.zip(&self.vcpus).zip(0u8..) {
            msrs::set_deadline(vcpu, id, &saved.deadline)?;
        }
        Ok(())
    }
}

/// Sets a TSC that is `apart` from vCPU 0's: by its offset, or before Linux 5.16 by value, where KVM itself takes
/// values written within a second of each other for one.
fn set_tsc(
    vcpu: &VcpuFd,
    id: u8,
    first_offset: Option<u64>,
    first_tsc: u64,
    apart: u64,
) -> Result<(), KvmError> {
    if let Some(offset) = first_offset {
        return kvm::set_tsc_offset(vcpu, offset.wrapping_add(apart))
            .map_err(on_vcpu("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)", id));
    }
    let tsc = kvm_msr_entry {
        index: msrs::TSC,
        data: first_tsc.wrapping_add(apart),
        ..Default::default()
    };
    msrs::set(vcpu, id, &[tsc])
}

/// What is given to `KVM_SET_CLOCK`. Never the flags `KVM_GET_CLOCK` reported (trap 7): given back, some make the
/// guest's monotonic time jump, and some are refused.
fn clock_to_set(saved: &kvm_clock_data, policy: ClockPolicy, realtime: bool, now_ns: u64) -> kvm_clock_data {
    let mut clock = kvm_clock_data {
        clock: saved.clock,
        ..Default::default()
    };
    // Zero: a checkpoint of before the wall clock was kept.
    if policy == ClockPolicy::CatchUp && saved.realtime != 0 {
        if realtime {
            clock.flags = KVM_CLOCK_REALTIME;
            clock.realtime = saved.realtime;
        } else {
            // A host whose clock is behind the other's does not turn the guest's back.
            clock.clock = clock.clock.saturating_add(now_ns.saturating_sub(saved.realtime));
        }
    }
    clock
}

/// TSC cycles in `ns` at `khz`.
fn cycles(ns: u64, khz: u32) -> u64 {
    (u128::from(ns) * u128::from(khz) / 1_000_000) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: kvm_clock_data = kvm_clock_data {
        clock: 5_000,
        flags: 0xe,
        pad0: 0,
        realtime: 1_000_000,
        host_tsc: 77,
        pad: [0; 4],
    };

    #[test]
    fn a_frozen_clock_goes_on_and_a_caught_up_one_has_the_time_between() {
        let set = |policy, realtime, now| {
            let clock = clock_to_set(&SAVED, policy, realtime, now);
            (clock.clock, clock.flags, clock.realtime, clock.host_tsc)
        };
        assert_eq!(set(ClockPolicy::Frozen, true, 9_000_000), (5_000, 0, 0, 0));
        assert_eq!(
            set(ClockPolicy::CatchUp, true, 9_000_000),
            (5_000, KVM_CLOCK_REALTIME, 1_000_000, 0)
        );
        assert_eq!(set(ClockPolicy::CatchUp, false, 9_000_000), (8_005_000, 0, 0, 0));
        assert_eq!(
            set(ClockPolicy::CatchUp, false, 10),
            (5_000, 0, 0, 0),
            "never back"
        );
        let old = kvm_clock_data { realtime: 0, ..SAVED };
        assert_eq!(clock_to_set(&old, ClockPolicy::CatchUp, true, 9).flags, 0);
    }

    #[test]
    fn cycles_do_not_overflow_in_a_year() {
        assert_eq!(cycles(1_000_000_000, 2_600_000), 2_600_000_000);
        assert_eq!(cycles(31_536_000_000_000_000, 4_000_000), 126_144_000_000_000_000);
    }
}
