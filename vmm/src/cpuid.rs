//! What the guest is told of its CPU, and whether this host can keep a promise made on another.
//!
//! A fresh vCPU sees `KVM_GET_SUPPORTED_CPUID` with its own APIC id and topology, plus the timing leaf 0x40000010
//! (TSC and APIC bus frequency in kHz, as VMware and KVM's users define it), so that a guest need not calibrate.
//! A restored vCPU sees exactly what it saw before; [`missing`] names what this host lacks for that.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::kvm::KvmError;

pub mod baseline;

/// The most CPUID entries a vCPU is given or a saved state may hold (KVM's own limit).
pub const MAX_ENTRIES: usize = 256;

/// The hypervisor's timing leaf: EAX is the TSC's, EBX the APIC bus' frequency in kHz.
const TIMING_LEAF: u32 = 0x4000_0010;
const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;
/// KVM's APIC timer counts a bus of 1 GHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What this host can show a guest.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let cpuid = kvm
        .get_supported_cpuid(MAX_ENTRIES)
        .map_err(KvmError::ioctl("KVM_GET_SUPPORTED_CPUID", "/dev/kvm"))?;
    let mut entries = cpuid.as_slice().to_vec();
    if kvm.check_extension(Cap::TscDeadlineTimer)
        && let Some(leaf) = entries.iter_mut().find(|e| e.function == 1)
    {
        leaf.ecx |= 1 << 24; // KVM offers the TSC deadline timer by capability, not in the list.
    }
    Ok(entries)
}

/// What a guest would really see here: `supported`, and what KVM adds of its own when a vCPU is given that (a KVM
/// that cannot intercept CPUID shows the host's features whatever it was told).
///
/// `probe` is a vCPU that gets its own CPUID afterwards.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn offered(supported: &[kvm_cpuid_entry2], probe: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let on = |ioctl| KvmError::ioctl(ioctl, "a vCPU to probe with");
    let given =
        CpuId::from_entries(supported).map_err(|_| KvmError::Lacks("room for its own CPUID entries"))?;
    probe.set_cpuid2(&given).map_err(on("KVM_SET_CPUID2"))?;
    let mut seen = probe
        .get_cpuid2(MAX_ENTRIES)
        .map_err(on("KVM_GET_CPUID2"))?
        .as_slice()
        .to_vec();
    for entry in &mut seen {
        let twin = supported
            .iter()
            .find(|s| s.function == entry.function && s.index == entry.index);
        if let Some(twin) = twin {
            entry.eax |= twin.eax;
            entry.ebx |= twin.ebx;
            entry.ecx |= twin.ecx;
            entry.edx |= twin.edx;
        }
    }
    Ok(seen)
}

/// The CPUID of vCPU `id` of `count`, on a TSC of `tsc_khz`: one package, one thread a core. APIC ids are vCPU numbers.
#[must_use]
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], id: u8, count: u8, tsc_khz: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries = supported.to_vec();
    let id_bits = u32::from(count).next_power_of_two().trailing_zeros();
    // Leaf 0x1f is an extension of 0xb, and nothing in it applies here.
    entries.retain(|entry| !matches!(entry.function, TIMING_LEAF | 0xb | 0x1f));
    for entry in &mut entries {
        match entry.function {
            1 => {
                // EBX: initial APIC id in 31..24, logical CPUs in the package in 23..16.
                entry.ebx = (entry.ebx & 0xffff) | (u32::from(id) << 24) | (u32::from(count) << 16);
                entry.ecx |= 1 << 31; // running under a hypervisor
                // EDX bit 28: the count in EBX means something.
                entry.edx = if count > 1 {
                    entry.edx | 1 << 28
                } else {
                    entry.edx & !(1 << 28)
                };
            }
            // Caches (Intel's and AMD's leaf have the same form): in 25..14 the APIC ids that share one, less one; the
            // third level is the package's. Intel: in 31..26 the core ids of the package, less one.
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if (entry.eax >> 5) & 7 >= 3 {
                    (1 << id_bits) - 1
                } else {
                    0
                };
                let cores = if entry.function == 4 {
                    (1 << id_bits) - 1
                } else {
                    0
                };
                entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
            }
            // AMD: cores in the package less one, and the APIC id's size.
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | u32::from(count - 1) | (id_bits << 12),
            // AMD: extended APIC id; one thread a core; node 0 of 1.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (u32::from(id), u32::from(id), 0),
            KVM_SIGNATURE_LEAF => entry.eax = entry.eax.max(TIMING_LEAF),
            _ => {}
        }
    }
    // Extended topology. Newer KVMs leave it to us, and list an empty one.
    if entries.iter().any(|e| e.function == 0 && e.eax >= 0xb) {
        for (index, (shift, cpus, kind)) in [(0, 1, 1), (id_bits, u32::from(count), 2), (0, 0, 0)]
            .into_iter()
            .enumerate()
        {
            entries.push(kvm_cpuid_entry2 {
                function: 0xb,
                index: index as u32,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: cpus,
                // The level's number, and its kind: 1 thread, 2 core.
                ecx: index as u32 | (kind << 8),
                edx: id.into(),
                ..Default::default()
            });
        }
    }
    entries.push(kvm_cpuid_entry2 {
        function: TIMING_LEAF,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
    entries
}

/// The entries in the form the ioctls take.
///
/// # Errors
/// A sentence, when there are more than KVM takes.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, String> {
    if entries.len() > MAX_ENTRIES {
        return Err(format!(
            "{} CPUID entries, more than the {MAX_ENTRIES} KVM takes",
            entries.len()
        ));
    }
    CpuId::from_entries(entries).map_err(|e| format!("CPUID entries: {e:?}"))
}

/// A register of a CPUID leaf that is a set of features.
struct FeatureWord {
    function: u32,
    index: u32,
    register: Register,
    /// Names by bit, from the vendors' manuals, for the bits a guest is likely to miss.
    names: &'static [(u8, &'static str)],
    /// Bits that are not a promise of the CPU's: set by the OS, by us, or per vCPU.
    ignore: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

const fn word(
    function: u32,
    index: u32,
    register: Register,
    ignore: u32,
    names: &'static [(u8, &'static str)],
) -> FeatureWord {
    FeatureWord {
        function,
        index,
        register,
        names,
        ignore,
    }
}

#[rustfmt::skip]
const FEATURES: &[FeatureWord] = &[
    // ECX 27 is OSXSAVE (follows CR4), 31 the hypervisor bit.
    word(1, 0, Register::Ecx, 1 << 27 | 1 << 31, &[
        (0, "sse3"), (1, "pclmulqdq"), (3, "monitor"), (9, "ssse3"), (12, "fma"), (13, "cx16"), (17, "pcid"),
        (19, "sse4.1"), (20, "sse4.2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"), (24, "tsc-deadline"),
        (25, "aes"), (26, "xsave"), (28, "avx"), (29, "f16c"), (30, "rdrand"),
    ]),
    // EDX 9 is the APIC (follows its base MSR), 28 the thread count's validity.
    word(1, 0, Register::Edx, 1 << 9 | 1 << 28, &[
        (0, "fpu"), (4, "tsc"), (6, "pae"), (8, "cx8"), (12, "mtrr"), (15, "cmov"), (16, "pat"), (19, "clflush"),
        (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"),
    ]),
    word(7, 0, Register::Ebx, 0, &[
        (0, "fsgsbase"), (1, "tsc-adjust"), (3, "bmi1"), (5, "avx2"), (7, "smep"), (8, "bmi2"), (9, "erms"),
        (10, "invpcid"), (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"), (19, "adx"), (20, "smap"),
        (21, "avx512ifma"), (23, "clflushopt"), (24, "clwb"), (28, "avx512cd"), (29, "sha"), (30, "avx512bw"),
        (31, "avx512vl"),
    ]),
    // ECX 4 is OSPKE (follows CR4).
    word(7, 0, Register::Ecx, 1 << 4, &[
        (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (6, "avx512-vbmi2"), (7, "shstk"), (8, "gfni"), (9, "vaes"),
        (10, "vpclmulqdq"), (11, "avx512-vnni"), (12, "avx512-bitalg"), (14, "avx512-vpopcntdq"), (16, "la57"),
        (22, "rdpid"),
    ]),
    word(7, 0, Register::Edx, 0, &[
        (4, "fsrm"), (22, "amx-bf16"), (23, "avx512-fp16"), (24, "amx-tile"), (25, "amx-int8"), (26, "spec-ctrl"),
        (27, "stibp"), (29, "arch-capabilities"), (31, "ssbd"),
    ]),
    word(7, 1, Register::Eax, 0, &[(4, "avx-vnni"), (5, "avx512-bf16"), (23, "avx-ifma")]),
    word(0xd, 0, Register::Eax, 0, &[
        (0, "xcr0 x87"), (1, "xcr0 sse"), (2, "xcr0 avx"), (5, "xcr0 opmask"), (6, "xcr0 zmm-hi256"),
        (7, "xcr0 hi16-zmm"), (9, "xcr0 pku"), (17, "xcr0 tilecfg"), (18, "xcr0 tiledata"),
    ]),
    word(0xd, 1, Register::Eax, 0, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")]),
    word(0x8000_0001, 0, Register::Ecx, 0, &[
        (0, "lahf"), (5, "abm"), (6, "sse4a"), (7, "misalignsse"), (8, "3dnowprefetch"), (22, "topoext"),
    ]),
    word(0x8000_0001, 0, Register::Edx, 1 << 9, &[
        (11, "syscall"), (20, "nx"), (22, "mmxext"), (25, "fxsr-opt"), (26, "1-GiB pages"), (27, "rdtscp"), (29, "lm"),
    ]),
    word(0x8000_0007, 0, Register::Edx, 0, &[(8, "invariant tsc")]),
    word(0x8000_0008, 0, Register::Ebx, 0, &[
        (0, "clzero"), (2, "xsaveerptr"), (9, "wbnoinvd"), (12, "ibpb"), (14, "ibrs"), (15, "stibp"), (24, "ssbd"),
    ]),
    // KVM's own features (0x40000001): a guest that uses kvmclock or async page faults must find them again.
    word(0x4000_0001, 0, Register::Eax, 0, &[
        (0, "kvm clocksource"), (3, "kvm clocksource2"), (4, "kvm async-pf"), (5, "kvm steal-time"), (6, "kvm pv-eoi"),
        (7, "kvm pv-unhalt"), (9, "kvm pv-tlb-flush"), (11, "kvm pv-send-ipi"), (24, "kvm stable clocksource"),
    ]),
];

/// The word's value in a CPUID; 0 where there is no such leaf.
fn value_of(entries: &[kvm_cpuid_entry2], word: &FeatureWord) -> u32 {
    entries
        .iter()
        .find(|e| {
            e.function == word.function
                && (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || e.index == word.index)
        })
        .map_or(0, |e| word.register.of(e))
}

/// The names of some bits of a word, by bit.
fn names_of(word: &FeatureWord, mut bits: u32) -> Vec<String> {
    let known = FEATURES
        .iter()
        .find(|f| (f.function, f.index, f.register) == (word.function, word.index, word.register));
    let mut names = Vec::new();
    while bits != 0 {
        let bit = bits.trailing_zeros() as u8;
        bits &= bits - 1;
        let name = known.and_then(|known| known.names.iter().find(|(b, _)| *b == bit));
        names.push(name.map_or_else(
            || {
                let register = word.register.name();
                format!("CPUID {:#x}.{} {register} bit {bit}", word.function, word.index)
            },
            |(_, name)| (*name).to_owned(),
        ));
    }
    names
}

/// The vendor that leaf 0 names.
fn vendor(entries: &[kvm_cpuid_entry2]) -> Option<String> {
    let leaf = entries.iter().find(|e| e.function == 0)?;
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The features that a saved vCPU was shown and that this host's `supported` lacks, in words.
#[must_use]
pub fn missing(saved: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    if let (Some(saved), Some(host)) = (vendor(saved), vendor(supported))
        && saved != host
    {
        // Kernels choose their system call entry and their workarounds by it.
        missing.push(format!("a CPU of {saved} (this host's is of {host})"));
    }
    for word in FEATURES {
        let bits = value_of(saved, word) & !value_of(supported, word) & !word.ignore;
        missing.extend(names_of(word, bits));
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let saved = [leaf(1, 1 << 28 | 1 << 27 | 1 << 2)];
        assert_eq!(missing(&saved, &[leaf(1, 0)]), ["CPUID 0x1.0 ecx bit 2", "avx"]);
        assert!(missing(&saved, &saved).is_empty());
        assert!(missing(&[leaf(1, 1)], &[]).contains(&"sse3".to_owned()));
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let mut base = vec![
            leaf(0, 0),
            leaf(1, 0),
            leaf(0xb, 0),
            leaf(KVM_SIGNATURE_LEAF, 0),
            leaf(4, 0),
            leaf(4, 0),
        ];
        base[0].eax = 0xd;
        base[4].eax = 0x1234_c021; // a data cache of level 1
        base[5].eax = 0x1234_c063; // a cache of level 3
        let third = for_vcpu(&base, 2, 6, 2_600_000);
        let find = |function, index| {
            let found = third.iter().find(|e| e.function == function && e.index == index);
            *found.unwrap()
        };
        assert_eq!(find(1, 0).ebx >> 16, 2 << 8 | 6);
        assert_eq!(
            (find(0xb, 0).edx, find(0xb, 0).ebx, find(0xb, 0).ecx),
            (2, 1, 0x100)
        );
        assert_eq!(
            (find(0xb, 1).edx, find(0xb, 1).ebx, find(0xb, 1).ecx),
            (2, 6, 0x201)
        );
        assert_eq!(find(0xb, 1).eax, 3, "six ids take three bits");
        assert_eq!(find(0xb, 2).ebx, 0, "the end of the list");
        let caches: Vec<u32> = third
            .iter()
            .filter(|e| e.function == 4)
            .map(|e| e.eax >> 14 & 0xfff)
            .collect();
        assert_eq!(caches, [0, 7], "the third level is shared");
        assert_eq!(find(KVM_SIGNATURE_LEAF, 0).eax, TIMING_LEAF);
        assert_eq!(find(TIMING_LEAF, 0).eax, 2_600_000);
        assert_eq!(
            for_vcpu(&third, 2, 6, 1).len(),
            third.len(),
            "nothing is added twice"
        );
    }
}
