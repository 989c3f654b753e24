//! The state of one vCPU: read and written back in an order that matters, the reason beside each step.
//!
//! [`VcpuState`] is plain and untrusted: it may come from another machine. Nothing in it is applied to a vCPU that
//! already ran; a restore makes a new one (rule 1).

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_SMM, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::msrs;
use crate::cpuid;
use crate::kvm::{self, KvmError};

/// Everything KVM holds of one vCPU.
#[derive(Debug, Clone, Default)]
pub struct VcpuState {
    /// Running, halted, waiting for SIPI...
    pub mp_state: kvm_mp_state,
    /// General registers, RIP, RFLAGS.
    pub regs: kvm_regs,
    /// Segments, control registers, EFER, APIC base, pending interrupt bitmap.
    pub sregs: kvm_sregs,
    /// The XSAVE area as KVM gives it: 4096 bytes or more.
    pub xsave: Vec<u8>,
    /// XCR0 and friends.
    pub xcrs: kvm_xcrs,
    /// DR0 to DR7.
    pub debug_regs: kvm_debugregs,
    /// The local APIC's register page.
    pub lapic: kvm_lapic_state,
    /// The TSC frequency the guest was given, in kHz.
    pub tsc_khz: u32,
    /// The CPUID the guest sees.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Model specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    /// Pending exceptions, interrupts, NMIs, SMM.
    pub events: kvm_vcpu_events,
}

/// Why a saved vCPU cannot be given to this host.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// KVM refused a step.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host lacks CPU features.
    #[error(
        "this host's CPU lacks what the guest was shown: {}. Restore it on a host that has them, or run the guest \
         with fewer",
        features.join(", ")
    )]
    Features {
        /// By name.
        features: Vec<String>,
    },
    /// The TSC would run at another speed.
    #[error(
        "the guest's TSC ran at {saved} kHz and this host's at {host} kHz, and this host cannot scale it: its clocks \
         would run wrong. Restore it on a host with the same TSC frequency or with TSC scaling"
    )]
    Tsc {
        /// The guest's.
        saved: u32,
        /// This host's.
        host: u32,
    },
    /// The saved extended registers do not fit this host.
    #[error(
        "the saved XSAVE area has {saved} bytes and this host's KVM takes {host}, and the rest is not zero"
    )]
    Xsave {
        /// The saved area's size.
        saved: usize,
        /// This host's.
        host: usize,
    },
    /// A part of the state is not of the form it must have.
    #[error("vCPU {vcpu}: {why}")]
    Invalid {
        /// The vCPU.
        vcpu: u8,
        /// What is wrong.
        why: String,
    },
}

/// Reads the state of a stopped vCPU whose pending I/O has been completed.
///
/// # Errors
/// [`KvmError`] naming the ioctl or the MSR.
pub fn save(vcpu: &VcpuFd, id: u8, msr_list: &[u32], xsave_bytes: usize) -> Result<VcpuState, KvmError> {
    let on = |ioctl: &'static str| KvmError::ioctl(ioctl, format!("vCPU {id}"));

    // Tells a guest on kvmclock that it was stopped, so that its soft lockup watchdog does not fire. It fails for a
    // guest that has no kvmclock, which is fine.
    let _ = vcpu.kvmclock_ctrl();

    // Trap 1: MP_STATE first. Reading it runs pending APIC events (INIT, SIPI), which change CS and RIP.
    let mp_state = vcpu.get_mp_state().map_err(on("KVM_GET_MP_STATE"))?;
    let regs = vcpu.get_regs().map_err(on("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(on("KVM_GET_SREGS"))?;
    let mut xsave = vec![0; xsave_bytes];
    kvm::get_xsave(vcpu, &mut xsave).map_err(on("KVM_GET_XSAVE2"))?;
    let xcrs = vcpu.get_xcrs().map_err(on("KVM_GET_XCRS"))?;
    let debug_regs = vcpu.get_debug_regs().map_err(on("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(on("KVM_GET_LAPIC"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(on("KVM_GET_TSC_KHZ"))?;
    // Trap 5: read back at every save. KVM changes bits at run time (OSXSAVE, the APIC bit), and a VM restored with
    // the CPUID it was first given has lost timers on the second restore.
    let cpuid = vcpu
        .get_cpuid2(cpuid::MAX_ENTRIES)
        .map_err(on("KVM_GET_CPUID2"))?
        .as_slice()
        .to_vec();
    let mut msrs = msrs::get(vcpu, id, msr_list)?;
    arm_lost_deadline(&mut msrs, &lapic);
    // Last: what MP_STATE or the MSRs injected is in it.
    let events = vcpu.get_vcpu_events().map_err(on("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuState {
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        lapic,
        tsc_khz,
        cpuid,
        msrs,
        events,
    })
}

/// Trap 4: KVM reports a deadline of 0 from the moment the timer expires until its interrupt is delivered. Saved
/// like that, the interrupt is lost. With the timer armed in deadline mode, "now" stands in for it: the interrupt
/// then comes at once, at worst one time too many, which guests tolerate.
fn arm_lost_deadline(msrs: &mut [kvm_msr_entry], lapic: &kvm_lapic_state) {
    const LVT_TIMER: usize = 0x320;
    const LVT_MASKED: u32 = 1 << 16;
    const LVT_MODE: u32 = 3 << 17;
    const LVT_MODE_TSC_DEADLINE: u32 = 2 << 17;
    let mut bytes = [0; 4];
    for (byte, reg) in bytes.iter_mut().zip(&lapic.regs[LVT_TIMER..LVT_TIMER + 4]) {
        *byte = *reg as u8;
    }
    let timer = u32::from_le_bytes(bytes);
    if timer & LVT_MODE != LVT_MODE_TSC_DEADLINE || timer & LVT_MASKED != 0 {
        return;
    }
    let Some(tsc) = msrs.iter().find(|m| m.index == msrs::TSC).map(|m| m.data) else {
        return;
    };
    for msr in msrs
        .iter_mut()
        .filter(|m| m.index == msrs::TSC_DEADLINE && m.data == 0)
    {
        msr.data = tsc;
    }
}

/// Gives a saved state, all but the TSC deadline, to a fresh vCPU of a VM whose memory slots are set. `scales_tsc`:
/// the host has `KVM_CAP_TSC_CONTROL`.
///
/// # Errors
/// [`RestoreError`]: the vCPU is then of no use and must be dropped.
pub fn restore(
    vcpu: &VcpuFd,
    id: u8,
    state: &VcpuState,
    xsave_bytes: usize,
    scales_tsc: bool,
) -> Result<(), RestoreError> {
    let on = |ioctl: &'static str| KvmError::ioctl(ioctl, format!("vCPU {id}"));
    let invalid = |why: String| RestoreError::Invalid { vcpu: id, why };

    // The frequency before anything that counts in it (MSR TSC, the deadline, kvmclock).
    restore_tsc_khz(vcpu, id, state.tsc_khz, scales_tsc)?;
    // Trap 10: CPUID before everything: since Linux 6.13 KVM checks MSRs and XCRs against it.
    let cpuid = cpuid::to_kvm(&state.cpuid).map_err(invalid)?;
    vcpu.set_cpuid2(&cpuid).map_err(on("KVM_SET_CPUID2"))?;
    vcpu.set_mp_state(state.mp_state)
        .map_err(on("KVM_SET_MP_STATE"))?;
    // Trap 2: REGS before VCPU_EVENTS: setting registers clears a pending exception.
    vcpu.set_regs(&state.regs).map_err(on("KVM_SET_REGS"))?;
    // Trap 3: SREGS (they hold the APIC base) before the LAPIC.
    vcpu.set_sregs(&state.sregs).map_err(on("KVM_SET_SREGS"))?;
    // XCRS after SREGS: XCR0 may only be set while CR4.OSXSAVE is. XSAVE does not depend on it in KVM.
    let xsave = fit_xsave(&state.xsave, xsave_bytes)?;
    kvm::set_xsave(vcpu, &xsave).map_err(on("KVM_SET_XSAVE"))?;
    vcpu.set_xcrs(&state.xcrs).map_err(on("KVM_SET_XCRS"))?;
    vcpu.set_debug_regs(&state.debug_regs)
        .map_err(on("KVM_SET_DEBUGREGS"))?;
    // Trap 3: the LAPIC before the MSRs: its timer's mode decides what writing the deadline does.
    vcpu.set_lapic(&state.lapic).map_err(on("KVM_SET_LAPIC"))?;
    msrs::set(vcpu, id, &state.msrs)?;
    // Last: nothing after it clears what is pending.
    let mut events = state.events;
    // KVM refuses SMM state from a VM that was never in SMM on hosts without it; it is zero then.
    if events.smi.smm == 0 && events.smi.pending == 0 {
        events.flags &= !KVM_VCPUEVENT_VALID_SMM;
    }
    vcpu.set_vcpu_events(&events).map_err(on("KVM_SET_VCPU_EVENTS"))?;
    Ok(())
}

/// The TSC's speed, in parts per million, below which a difference is within what NTP corrects (KVM's own bound).
const TSC_TOLERANCE_PPM: u64 = 250;

/// How a guest's TSC can run at its speed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TscFit {
    /// The host's is the same.
    Same,
    /// The host scales its own.
    Scaled,
    /// Not at all.
    Impossible,
}

/// Asked for a higher frequency it cannot scale to, KVM says yes and lets the TSC jump to catch up at each exit:
/// whether it scales is asked for, not tried.
pub(crate) fn tsc_fit(saved_khz: u32, host_khz: u32, scales: bool) -> TscFit {
    let tolerance = u64::from(host_khz) * TSC_TOLERANCE_PPM / 1_000_000;
    if u64::from(host_khz.abs_diff(saved_khz)) <= tolerance {
        TscFit::Same
    } else if scales {
        TscFit::Scaled
    } else {
        TscFit::Impossible
    }
}

fn restore_tsc_khz(vcpu: &VcpuFd, id: u8, saved: u32, scales: bool) -> Result<(), RestoreError> {
    let host = vcpu
        .get_tsc_khz()
        .map_err(KvmError::ioctl("KVM_GET_TSC_KHZ", format!("vCPU {id}")))?;
    match tsc_fit(saved, host, scales) {
        TscFit::Same => Ok(()),
        TscFit::Scaled => vcpu
            .set_tsc_khz(saved)
            .map_err(|_| RestoreError::Tsc { saved, host }),
        TscFit::Impossible => Err(RestoreError::Tsc { saved, host }),
    }
}

/// A saved XSAVE area in the size this host's KVM reads: padded with zeros, or cut where only zeros are cut.
pub(crate) fn fit_xsave(saved: &[u8], bytes: usize) -> Result<Vec<u8>, RestoreError> {
    let refused = RestoreError::Xsave {
        saved: saved.len(),
        host: bytes,
    };
    if saved.len() < kvm::XSAVE_MIN_BYTES || saved.len() > kvm::XSAVE_MAX_BYTES {
        return Err(refused);
    }
    if saved.len() > bytes && saved[bytes..].iter().any(|&b| b != 0) {
        return Err(refused);
    }
    let mut area = saved.to_vec();
    area.resize(bytes, 0);
    Ok(area)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }
    }

    #[test]
    fn an_expired_deadline_is_armed_again_only_in_deadline_mode() {
        let mut lapic = kvm_lapic_state::default();
        let mut saved = [msr(msrs::TSC_DEADLINE, 0), msr(msrs::TSC, 1234)];
        arm_lost_deadline(&mut saved, &lapic);
        assert_eq!(saved[0].data, 0, "one-shot mode");
        lapic.regs[0x322] = 4; // TSC-deadline mode
        arm_lost_deadline(&mut saved, &lapic);
        assert_eq!(saved[0].data, 1234);
        saved[0].data = 99;
        arm_lost_deadline(&mut saved, &lapic);
        assert_eq!(saved[0].data, 99, "a deadline that is still to come stays");
        saved[0].data = 0;
        lapic.regs[0x322] = 4 | 1; // masked
        arm_lost_deadline(&mut saved, &lapic);
        assert_eq!(saved[0].data, 0);
    }

    #[test]
    fn an_xsave_area_is_never_cut_through_data() {
        let mut saved = vec![0; 8192];
        assert_eq!(fit_xsave(&saved, 4096).unwrap().len(), 4096);
        assert_eq!(fit_xsave(&saved[..4096], 8192).unwrap().len(), 8192);
        saved[5000] = 1;
        assert!(fit_xsave(&saved, 4096).is_err());
        assert!(fit_xsave(&saved[..100], 4096).is_err());
        assert!(fit_xsave(&vec![0; 1 << 20], 4096).is_err());
    }
}
