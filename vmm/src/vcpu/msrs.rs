//! Which MSRs are saved, and in which order they are written back.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::kvm::KvmError;

/// The most MSRs one ioctl takes (KVM's `MAX_IO_MSRS`).
const CHUNK: usize = 256;
/// The most MSRs a saved state may hold.
pub const MAX_MSRS: usize = 2048;
const _: () = assert!(KVM_MAX_CPUID_ENTRIES >= CHUNK);

/// IA32_TSC.
pub(crate) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// The MSRs that make up a machine's state, as ranges (inclusive). From the Intel and AMD manuals and
/// arch/x86/kvm/x86.c (`msrs_to_save`): everything a guest can set and later rely on. Not here: counters that only
/// measure, microcode levels, and what CPUID already says.
#[rustfmt::skip]
const KEPT: &[(u32, u32, &str)] = &[
    (0x10, 0x10, "TSC"),
    (0x1b, 0x1b, "APIC base"),
    (0x3a, 0x3b, "feature control, TSC adjust"),
    (0x48, 0x48, "SPEC_CTRL"),
    (0x8b, 0x8b, "microcode revision the guest was told"),
    (0x9e, 0x9e, "SMI base"),
    (0x10a, 0x10a, "ARCH_CAPABILITIES"),
    (0x122, 0x122, "TSX_CTRL"),
    (0x140, 0x140, "MISC_FEATURES_ENABLES"),
    (0x174, 0x176, "SYSENTER CS, ESP, EIP"),
    (0x179, 0x17b, "machine check capabilities, status, control"),
    (0x1a0, 0x1a0, "MISC_ENABLE"),
    (0x1c4, 0x1c5, "XFD, XFD_ERR"),
    (0x1d9, 0x1d9, "DEBUGCTL"),
    (0x200, 0x20f, "variable MTRRs"),
    (0x250, 0x250, "fixed MTRR 64K"), (0x258, 0x259, "fixed MTRRs 16K"), (0x268, 0x26f, "fixed MTRRs 4K"),
    (0x277, 0x277, "PAT"),
    (0x2ff, 0x2ff, "MTRR default type"),
    (0x400, 0x47f, "machine check banks"),
    (0x4d0, 0x4d0, "MCG_EXT_CTL"),
    (0x6a0, 0x6a8, "shadow stacks: U_CET, S_CET, PL0..3_SSP, SSP table"),
    (0x6e0, 0x6e0, "TSC deadline"),
    (0xda0, 0xda0, "XSS"),
    (0x4000_0000, 0x4000_0200, "Hyper-V synthetic MSRs, if they are offered"),
    (0x4b56_4d00, 0x4b56_4dff, "KVM's own: clock, steal time, async page faults, EOI, poll control"),
    (0xc000_0080, 0xc000_0084, "EFER, STAR, LSTAR, CSTAR, FMASK"),
    (0xc000_0100, 0xc000_0104, "FS base, GS base, kernel GS base, TSC_AUX, TSC ratio"),
    (0xc001_0015, 0xc001_0015, "HWCR"),
    (0xc001_0117, 0xc001_0117, "VM_HSAVE_PA"),
    (0xc001_011f, 0xc001_011f, "VIRT_SPEC_CTRL"),
    (0xc001_1029, 0xc001_1029, "DE_CFG"),
];

/// What an MSR is, or the group it is of, if it is one that is saved.
pub(crate) fn name(index: u32) -> Option<&'static str> {
    KEPT.iter()
        .find(|(first, last, _)| (*first..=*last).contains(&index))
        .map(|(_, _, name)| *name)
}

fn kept(index: u32) -> bool {
    KEPT.iter()
        .any(|(first, last, _)| (*first..=*last).contains(&index))
}

/// The MSRs of this host to save, found once a VM: those KVM lists, cut to what must be kept, less those that KVM
/// lists and then does not let be read.
///
/// # Errors
/// [`KvmError`].
pub fn list(kvm: &Kvm, probe: &VcpuFd) -> Result<Vec<u32>, KvmError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(KvmError::ioctl("KVM_GET_MSR_INDEX_LIST", "/dev/kvm"))?;
    let mut indices = Vec::new();
    for &index in list.as_slice().iter().filter(|&&index| kept(index)) {
        let mut one = fam(&[kvm_msr_entry {
            index,
            ..Default::default()
        }])?;
        match probe.get_msrs(&mut one) {
            Ok(1) => indices.push(index),
            _ => tracing::debug!(
                msr = format!("{index:#x}"),
                "KVM lists this MSR but does not read it"
            ),
        }
    }
    // KVM's list leaves the deadline out where the timer's mode makes it meaningless; it is asked for all the same.
    if !indices.contains(&TSC_DEADLINE) {
        let mut one = fam(&[kvm_msr_entry {
            index: TSC_DEADLINE,
            ..Default::default()
        }])?;
        if matches!(probe.get_msrs(&mut one), Ok(1)) {
            indices.push(TSC_DEADLINE);
        }
    }
    Ok(indices)
}

/// Reads the MSRs of `indices`.
///
/// # Errors
/// [`KvmError::Msr`] naming the first that KVM refused.
pub fn get(vcpu: &VcpuFd, id: u8, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut saved = Vec::with_capacity(indices.len());
    for chunk in indices.chunks(CHUNK) {
        let entries: Vec<_> = chunk
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = fam(&entries)?;
        let count = vcpu
            .get_msrs(&mut msrs)
            .map_err(KvmError::ioctl("KVM_GET_MSRS", format!("vCPU {id}")))?;
        if let Some(&index) = chunk.get(count) {
            return Err(KvmError::Msr {
                ioctl: "KVM_GET_MSRS",
                index,
                vcpu: id,
                value: String::new(),
            });
        }
        saved.extend_from_slice(msrs.as_slice());
    }
    Ok(saved)
}

/// Writes saved MSRs, all but the TSC deadline.
///
/// # Errors
/// [`KvmError::Msr`] naming the first that KVM refused, with its value.
pub fn set(vcpu: &VcpuFd, id: u8, saved: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let rest: Vec<_> = saved
        .iter()
        .copied()
        .filter(|m| m.index != TSC_DEADLINE)
        .collect();
    write(vcpu, id, &rest)
}

/// Writes the saved TSC deadline, after the TSC has got its final value (trap 4): a deadline is compared with the TSC
/// as it is written, so one written first would fire at once or never. One that has passed while the clocks caught
/// up fires now.
///
/// # Errors
/// [`KvmError::Msr`].
pub fn set_deadline(vcpu: &VcpuFd, id: u8, saved: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let deadline: Vec<_> = saved
        .iter()
        .copied()
        .filter(|m| m.index == TSC_DEADLINE)
        .collect();
    write(vcpu, id, &deadline)
}

fn write(vcpu: &VcpuFd, id: u8, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    for chunk in entries.chunks(CHUNK) {
        let count = vcpu
            .set_msrs(&fam(chunk)?)
            .map_err(KvmError::ioctl("KVM_SET_MSRS", format!("vCPU {id}")))?;
        if let Some(refused) = chunk.get(count) {
            return Err(KvmError::Msr {
                ioctl: "KVM_SET_MSRS",
                index: refused.index,
                vcpu: id,
                value: format!(" = {:#x}", refused.data),
            });
        }
    }
    Ok(())
}

/// The indices of `saved` that this host's KVM does not let be set to their saved values, on a vCPU that has the
/// saved CPUID. The TSC and its deadline are left out.
pub(crate) fn refused(vcpu: &VcpuFd, saved: &[kvm_msr_entry]) -> Vec<u32> {
    saved
        .iter()
        .filter(|msr| !matches!(msr.index, TSC | TSC_DEADLINE))
        .filter(|msr| {
            !matches!(
                fam(std::slice::from_ref(*msr)).map(|one| vcpu.set_msrs(&one)),
                Ok(Ok(1))
            )
        })
        .map(|msr| msr.index)
        .collect()
}

fn fam(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::Lacks("room for so many MSRs in one call"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_ordered_and_has_what_matters() {
        assert!(
            KEPT.windows(2).all(|w| w[0].1 < w[1].0),
            "ranges ascend and do not overlap"
        );
        for index in [
            TSC,
            TSC_DEADLINE,
            0x1b,
            0x277,
            0xc000_0080,
            0xc000_0102,
            0x4b56_4d01,
            0x4b56_4d04,
        ] {
            assert!(kept(index), "{index:#x}");
        }
        assert!(!kept(0xc1), "a performance counter is not state");
    }
}
