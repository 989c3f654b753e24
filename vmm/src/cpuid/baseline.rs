//! CPUs by name: what a guest is shown, so that unlike hosts can run it.
//!
//! A baseline has the instructions of a level of the x86-64 psABI, what every server CPU with that level has beside
//! them, and what KVM provides on any. Everything else is hidden, also where the host has it: a feature that is not
//! listed here is off, whatever the kernel's list of supported ones grows to. Family, model and name are fixed too.
//!
//! | | instructions | its CPUs |
//! |---|---|---|
//! | `x86-64-v2` | SSE4.2, POPCNT, CX16 | Nehalem (2008), Bulldozer (2011) and later |
//! | `x86-64-v3` | AVX2, BMI, FMA, F16C, MOVBE; AES, PCLMUL, RDRAND | Haswell (2013), Zen (2017) and later |
//! | `x86-64-v4` | AVX-512 F, BW, CD, DQ, VL; RDSEED, ADX, SMAP, CLFLUSHOPT | Skylake-SP (2017), Zen 4 (2022) and later |
//!
//! The vendor stays the host's: kernels do different things on Intel's and AMD's CPUs, and a guest cannot change over.
//! A baseline shows no bits of speculation control, whose MSRs differ from CPU to CPU; a guest under one relies on
//! what needs no MSR (page table isolation, retpolines). Where that is not enough, run it with `host`.

use kvm_bindings::kvm_cpuid_entry2;

use super::{FeatureWord, KVM_SIGNATURE_LEAF, Register, names_of, value_of};

/// The CPU a guest is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuModel {
    /// Everything this host and its KVM have.
    #[default]
    Host,
    /// `x86-64-v2`.
    V2,
    /// `x86-64-v3`.
    V3,
    /// `x86-64-v4`.
    V4,
}

/// Why a host cannot show a CPU.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// It lacks features.
    #[error(
        "this host lacks {} of the CPU {model}: choose a lower baseline with --cpu, or another host",
        missing.join(", ")
    )]
    Missing {
        /// Which CPU.
        model: CpuModel,
        /// By name.
        missing: Vec<String>,
    },
}

impl std::fmt::Display for CpuModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::V2 => "baseline:x86-64-v2",
            Self::V3 => "baseline:x86-64-v3",
            Self::V4 => "baseline:x86-64-v4",
        })
    }
}

impl std::str::FromStr for CpuModel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Host, Self::V2, Self::V3, Self::V4]
            .into_iter()
            .find(|model| model.to_string() == name)
            .ok_or_else(|| {
                format!(
                    "{name:?} is no CPU: there are host, baseline:x86-64-v2, baseline:x86-64-v3 and baseline:x86-64-v4"
                )
            })
    }
}

/// Bits of a feature word, from the level on.
struct Allowed {
    function: u32,
    index: u32,
    register: Register,
    /// Of v2, added by v3, added by v4.
    levels: [u32; 3],
    /// Shown where the host has them, not required: what is KVM's own, or of one vendor.
    if_there: u32,
}

const fn bits<const N: usize>(list: [u8; N]) -> u32 {
    let (mut word, mut at) = (0, 0);
    while at < N {
        word |= 1 << list[at];
        at += 1;
    }
    word
}

#[rustfmt::skip]
const ALLOWED: &[Allowed] = &[
    // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT. v3: PCLMUL, FMA, MOVBE, AES, XSAVE, OSXSAVE, AVX, F16C, RDRAND.
    // KVM's on any host: x2APIC, TSC deadline; the hypervisor bit.
    Allowed { function: 1, index: 0, register: Register::Ecx,
        levels: [bits([0, 9, 13, 19, 20, 23]), bits([1, 12, 22, 25, 26, 28, 29, 30]), 0],
        if_there: bits([21, 24, 27, 31]) },
    // FPU, DE, PSE, TSC, MSR, PAE, CX8, APIC, SEP, PGE, CMOV, PAT, PSE36, CLFLUSH, MMX, FXSR, SSE, SSE2.
    Allowed { function: 1, index: 0, register: Register::Edx,
        levels: [bits([0, 2, 3, 4, 5, 6, 8, 13, 15, 16, 17, 19, 23, 24, 25, 26]), 0, 0],
        if_there: bits([1, 7, 9, 11, 12, 14, 28]) },
    // ARAT: the local APIC's timer never stops in KVM.
    Allowed { function: 6, index: 0, register: Register::Eax, levels: [0; 3], if_there: bits([2]) },
    // v3: FSGSBASE, BMI1, AVX2, SMEP, BMI2. v4: AVX512F, DQ, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, CD, BW, VL.
    Allowed { function: 7, index: 0, register: Register::Ebx,
        levels: [0, bits([0, 3, 5, 7, 8]), bits([16, 17, 18, 19, 20, 23, 24, 28, 30, 31])],
        if_there: bits([1]) },
    // x87 and SSE; AVX; AVX-512's three.
    Allowed { function: 0xd, index: 0, register: Register::Eax,
        levels: [0, bits([0, 1, 2]), bits([5, 6, 7])], if_there: 0 },
    Allowed { function: 0xd, index: 1, register: Register::Eax,
        levels: [0, bits([0]), bits([1, 2])], if_there: 0 },
    // LAHF; v3: LZCNT (ABM), PREFETCHW. TOPOEXT is AMD's.
    Allowed { function: 0x8000_0001, index: 0, register: Register::Ecx,
        levels: [bits([0]), bits([5]), bits([8])], if_there: bits([1, 22]) },
    // SYSCALL, NX, LM; RDTSCP, 1 GiB pages. AMD repeats leaf 1's bits here.
    Allowed { function: 0x8000_0001, index: 0, register: Register::Edx,
        levels: [bits([11, 20, 29]), bits([27]), 0],
        if_there: bits([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24]) },
    Allowed { function: 0x8000_0007, index: 0, register: Register::Edx, levels: [0; 3], if_there: bits([8]) },
    // Clock, clock2, steal time, EOI, unhalt, TLB flush, stable clock: in every KVM since Linux 4.16.
    Allowed { function: 0x4000_0001, index: 0, register: Register::Eax, levels: [0; 3],
        if_there: bits([0, 1, 3, 5, 6, 7, 9, 24]) },
];

/// Leaves whose registers are not sets of features, and which are shown as the host has them.
const DESCRIPTIVE: &[u32] = &[
    0,
    2,
    4,
    0xb,
    0x8000_0000,
    0x8000_0005,
    0x8000_0006,
    0x8000_001d,
    0x8000_001e,
    KVM_SIGNATURE_LEAF,
];
/// The highest basic and extended leaf of a baseline.
const LAST_BASIC: u32 = 0xd;
const LAST_EXTENDED: u32 = 0x8000_001e;

/// MSRs that belong to features no baseline has: another host may lack them, and the guest was never told of them.
#[rustfmt::skip]
const HIDDEN_MSRS: &[(u32, u32)] = &[
    (0x3a, 0x3a), (0x48, 0x48), (0x8b, 0x8b), (0x9e, 0x9e), (0x10a, 0x10a), (0x122, 0x122), (0x140, 0x140),
    (0x1c4, 0x1c5), (0x4d0, 0x4d0), (0x6a0, 0x6a8), (0xda0, 0xda0), (0x4000_0000, 0x4000_0200),
    (0x4b56_4d02, 0x4b56_4d02), (0x4b56_4d05, 0x4b56_4dff), (0xc000_0104, 0xc000_0104), (0xc001_0117, 0xc001_011f),
    (0xc001_1029, 0xc001_1029),
];

impl CpuModel {
    fn level(self) -> Option<usize> {
        match self {
            Self::Host => None,
            Self::V2 => Some(0),
            Self::V3 => Some(1),
            Self::V4 => Some(2),
        }
    }

    /// What a guest of this model is shown on a host that supports `supported`.
    ///
    /// # Errors
    /// [`ModelError::Missing`] naming all the host lacks.
    pub fn apply(self, supported: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, ModelError> {
        let Some(level) = self.level() else {
            return Ok(supported.to_vec());
        };
        let missing = required(level)
            .flat_map(|(word, required)| names_of(&word, required & !value_of(supported, &word)))
            .collect::<Vec<_>>();
        if !missing.is_empty() {
            return Err(ModelError::Missing { model: self, missing });
        }
        Ok(supported
            .iter()
            .filter_map(|entry| self.show(level, entry))
            .collect())
    }

    /// One leaf as a guest of a baseline sees it; none: it is not shown.
    fn show(self, level: usize, entry: &kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
        let mut shown = kvm_cpuid_entry2 {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            ..Default::default()
        };
        for allowed in ALLOWED
            .iter()
            .filter(|a| a.function == entry.function && a.index == entry.index)
        {
            let mask = allowed.levels[..=level]
                .iter()
                .fold(allowed.if_there, |all, l| all | l);
            *allowed.register.of_mut(&mut shown) = allowed.register.of(entry) & mask;
        }
        match (entry.function, entry.index) {
            // The model of the level's first CPUs, as hypervisors commonly name them.
            (1, _) => {
                shown.eax = signature(level, is_amd(entry));
                shown.ebx = entry.ebx;
            }
            (0, _) => {
                shown = kvm_cpuid_entry2 {
                    eax: entry.eax.min(LAST_BASIC),
                    ..*entry
                }
            }
            (0x8000_0000, _) => {
                shown = kvm_cpuid_entry2 {
                    eax: entry.eax.min(LAST_EXTENDED),
                    ..*entry
                }
            }
            (0x8000_0001, _) => shown.ebx = entry.ebx,
            (0x8000_0002..=0x8000_0004, _) => self.name_leaf(&mut shown),
            // Address sizes; what else is in it are features.
            (0x8000_0008, _) => (shown.eax, shown.ecx) = (entry.eax, entry.ecx),
            (7, 0) | (6 | 0x8000_0007 | 0x4000_0001, _) => {}
            // Sizes and offsets of the register areas that are on; KVM keeps the sizes true itself.
            (0xd, 0) if level > 0 => (shown.ebx, shown.ecx, shown.edx) = (entry.ebx, XSAVE_BYTES[level], 0),
            (0xd, 1) if level > 0 => shown.ebx = entry.ebx,
            (0xd, 2) if level > 0 => shown = *entry,
            (0xd, 5..=7) if level > 1 => shown = *entry,
            (function, _) if DESCRIPTIVE.contains(&function) => shown = *entry,
            _ => return None,
        }
        Some(shown)
    }

    fn name_leaf(self, shown: &mut kvm_cpuid_entry2) {
        let mut name = [0u8; 48];
        let text = format!("Understudy {}", self.to_string().trim_start_matches("baseline:"));
        name[..text.len()].copy_from_slice(text.as_bytes());
        let at = (shown.function - 0x8000_0002) as usize * 16;
        let word = |n: usize| {
            let at = at + 4 * n;
            u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]])
        };
        (shown.eax, shown.ebx, shown.ecx, shown.edx) = (word(0), word(1), word(2), word(3));
    }

    /// Of the MSRs a host has, those that belong to the state of a guest of this model.
    #[must_use]
    pub fn cut(self, mut msrs: Vec<u32>) -> Vec<u32> {
        if self != Self::Host {
            let hidden = |index: u32| {
                HIDDEN_MSRS
                    .iter()
                    .any(|(first, last)| (*first..=*last).contains(&index))
            };
            msrs.retain(|&index| !hidden(index));
        }
        msrs
    }
}

/// Bytes of an XSAVE area in the standard format with everything of the level in it.
const XSAVE_BYTES: [u32; 3] = [0, 832, 2688];

fn required(level: usize) -> impl Iterator<Item = (FeatureWord, u32)> {
    ALLOWED.iter().map(move |allowed| {
        let word = super::word(allowed.function, allowed.index, allowed.register, 0, &[]);
        (word, allowed.levels[..=level].iter().fold(0, |all, l| all | l))
    })
}

/// Whether a leaf 1 is AMD's: family 15 and above.
fn is_amd(leaf: &kvm_cpuid_entry2) -> bool {
    (leaf.eax >> 8) & 0xf == 0xf
}

/// Family, model and stepping: Nehalem, Haswell, Skylake-SP; Opteron, EPYC (Zen), EPYC (Zen 4).
fn signature(level: usize, amd: bool) -> u32 {
    let of = if amd {
        [0x0010_0f23, 0x0080_0f12, 0x00a1_0f11]
    } else {
        [0x0001_06a5, 0x0003_06f2, 0x0005_0654]
    };
    of[level]
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

    fn leaf(function: u32, index: u32, all: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            flags: if matches!(function, 7 | 0xd) {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax: all,
            ebx: all,
            ecx: all,
            edx: all,
            ..Default::default()
        }
    }

    /// A host with every bit set, of Intel's family 6.
    fn everything() -> Vec<kvm_cpuid_entry2> {
        let mut host: Vec<_> = [
            (0, 0),
            (1, 0),
            (6, 0),
            (7, 0),
            (7, 1),
            (0xa, 0),
            (0xd, 0),
            (0xd, 1),
            (0xd, 2),
            (0xd, 9),
            (0x14, 0),
            (0x4000_0001, 0),
            (0x8000_0001, 0),
            (0x8000_0002, 0),
            (0x8000_0007, 0),
            (0x8000_0008, 0),
        ]
        .map(|(function, index)| leaf(function, index, u32::MAX))
        .into();
        host[1].eax = 0x000c_06f2;
        host
    }

    #[test]
    fn a_baseline_shows_the_same_on_unlike_hosts() {
        for model in [CpuModel::V2, CpuModel::V3, CpuModel::V4] {
            let rich = model.apply(&everything()).unwrap();
            // A host with only what the baseline requires, and KVM's own.
            let mut poor = everything();
            for entry in &mut poor {
                let mut least = kvm_cpuid_entry2 {
                    function: entry.function,
                    index: entry.index,
                    flags: entry.flags,
                    ..Default::default()
                };
                for a in ALLOWED
                    .iter()
                    .filter(|a| a.function == entry.function && a.index == entry.index)
                {
                    let level = model.level().unwrap();
                    *a.register.of_mut(&mut least) =
                        a.levels[..=level].iter().fold(a.if_there, |all, l| all | l);
                }
                match entry.function {
                    1 => (least.eax, least.ebx) = (0x0003_06f2, entry.ebx),
                    7 | 6 | 0xa | 0xd | 0x14 | 0x4000_0001 | 0x8000_0007 => {}
                    0x8000_0001 => least.ebx = entry.ebx,
                    _ => least = *entry,
                }
                *entry = least;
            }
            let same = model.apply(&poor).unwrap();
            let of = |entries: &[kvm_cpuid_entry2], function, index| {
                entries
                    .iter()
                    .find(|e| (e.function, e.index) == (function, index))
                    .copied()
            };
            for (function, index) in [
                (1, 0),
                (7, 0),
                (0x8000_0001, 0),
                (0x8000_0002, 0),
                (0x4000_0001, 0),
            ] {
                assert_eq!(
                    of(&rich, function, index),
                    of(&same, function, index),
                    "{model} leaf {function:#x}"
                );
            }
            assert!(of(&rich, 7, 1).is_none() && of(&rich, 0xa, 0).is_none() && of(&rich, 0x14, 0).is_none());
            assert!(super::super::missing(&rich, &poor).is_empty(), "{model}");
        }
    }

    #[test]
    fn a_host_without_a_level_says_what_it_lacks() {
        let mut host = everything();
        host[3].ebx &= !bits([5, 16]);
        assert!(CpuModel::V2.apply(&host).is_ok());
        let error = CpuModel::V4.apply(&host).unwrap_err().to_string();
        assert!(
            error.contains("avx2, avx512f of the CPU baseline:x86-64-v4"),
            "{error}"
        );
        assert_eq!(CpuModel::Host.apply(&host).unwrap(), host);
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for model in [CpuModel::Host, CpuModel::V2, CpuModel::V3, CpuModel::V4] {
            assert_eq!(model.to_string().parse(), Ok(model));
        }
        assert!(
            "baseline:x86-64-v5"
                .parse::<CpuModel>()
                .unwrap_err()
                .contains("x86-64-v4")
        );
        assert_eq!(CpuModel::V3.cut(vec![0x10, 0x48, 0x277]), [0x10, 0x277]);
        assert_eq!(CpuModel::Host.cut(vec![0x48]), [0x48]);
    }
}
