//! The register check: values kept live in every register across a long stretch and an idle exit in its middle.
//!
//! [`Registers::run`] loads all general-purpose registers but RSP, all vector registers and the x87 stack, then
//! steps them `loops` times, idles through the monitor's port with everything live, steps them `loops` times more
//! and stores them. A checkpoint nearly always hits this stretch, for it is what the guest does when idle. What
//! the registers must then hold is computed another way: in closed form, without the registers concerned.
//!
//! One step is
//! - for a general-purpose register: multiply by [`FACTOR`], add [`ADDEND`] (modulo 2^64);
//! - for each 128-bit half of a vector register: exclusive-or with a key, rotate its four 32-bit words by one;
//! - for the x87 stack: negate the top, rotate the stack by one.
//!
//! MXCSR and the x87 control word hold values other than the default meanwhile.

use crate::content::mix64;
use crate::port::{IDLE, IDLE_MAX_US};
use core::arch::global_asm;
use core::fmt;

const GENERAL: usize = 15;
const VECTOR: usize = 16;
const X87: usize = 8;

const FACTOR: i32 = 0x2545_f491;
const ADDEND: i32 = 0x3c6e_f35f;

/// All exceptions masked, round towards zero.
const MXCSR: u32 = 0x7f80;
/// All exceptions masked, round towards zero, full precision (the values are 63-bit integers).
const X87_CONTROL: u16 = 0x0f7f;

const GENERAL_NAMES: [&str; GENERAL] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
];

/// A vector register: the 128 bits of XMM first, then the upper half of YMM.
type Vector = [u64; 4];

/// Aligned, for the instructions that use a key from memory fault on one that is not.
#[repr(C, align(32))]
struct Keys([Vector; VECTOR]);

/// The keys of the vector step.
static KEYS: Keys = Keys({
    let mut keys = [[0; 4]; VECTOR];
    let mut at = 0;
    while at < VECTOR * 4 {
        // Weyl's sequence: distinct words are enough here.
        keys[at / 4][at % 4] = (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        at += 1;
    }
    keys
});

/// A full set of register values. The assembly below knows the offsets.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(32))]
pub(crate) struct Registers {
    pub(crate) vector: [Vector; VECTOR],
    pub(crate) general: [u64; GENERAL],
    pub(crate) x87: [i64; X87],
    pub(crate) mxcsr: u32,
    pub(crate) x87_control: u32,
}

const _: () = assert!(core::mem::offset_of!(Registers, general) == 512);
const _: () = assert!(core::mem::offset_of!(Registers, x87) == 632);
const _: () = assert!(core::mem::offset_of!(Registers, mxcsr) == 696);
const _: () = assert!(core::mem::offset_of!(Registers, x87_control) == 700);

unsafe extern "C" {
    /// Steps `registers` twice `loops` times, with an idle of `idle_us` between (none when zero).
    fn register_run_sse(registers: *mut Registers, loops: u64, idle_us: u64);
    /// The same with the upper halves of the vector registers.
    fn register_run_avx(registers: *mut Registers, loops: u64, idle_us: u64);
}

// Stack frame during the run: loop counter, loops, idle_us, registers, then room for MXCSR and the control word.
// The counter is in memory so that no register is spared; the keys are found relative to RIP.
global_asm!(
    r#"
.macro register_step avx
    .irp r, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15
    imul \r, \r, {factor}
    add \r, {addend}
    .endr
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    .if \avx
    vxorps ymm\n, ymm\n, [rip + {keys} + 32 * \n]
    vpermilps ymm\n, ymm\n, 0x93
    .else
    xorps xmm\n, [rip + {keys} + 32 * \n]
    shufps xmm\n, xmm\n, 0x93
    .endif
    .endr
    fchs
    fincstp
.endm

.macro register_run name, avx
.global \name
\name:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 40
    mov [rsp], rsi
    mov [rsp + 8], rsi
    mov [rsp + 16], rdx
    mov [rsp + 24], rdi
    stmxcsr [rsp + 32]
    fnstcw [rsp + 36]
    ldmxcsr [rdi + 696]
    fninit
    fldcw [rdi + 700]
    .irp n, 7, 6, 5, 4, 3, 2, 1, 0
    fild qword ptr [rdi + 632 + 8 * \n]
    .endr
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    .if \avx
    vmovups ymm\n, [rdi + 32 * \n]
    .else
    movups xmm\n, [rdi + 32 * \n]
    .endif
    .endr
    mov rax, [rdi + 512]
    mov rbx, [rdi + 520]
    mov rcx, [rdi + 528]
    mov rdx, [rdi + 536]
    mov rsi, [rdi + 544]
    mov rbp, [rdi + 560]
    mov r8, [rdi + 568]
    mov r9, [rdi + 576]
    mov r10, [rdi + 584]
    mov r11, [rdi + 592]
    mov r12, [rdi + 600]
    mov r13, [rdi + 608]
    mov r14, [rdi + 616]
    mov r15, [rdi + 624]
    mov rdi, [rdi + 552]
2:
    register_step \avx
    dec qword ptr [rsp]
    jnz 2b

    cmp qword ptr [rsp + 16], 0
    je 3f
    push rax
    push rdx
    mov eax, [rsp + 32]
    mov edx, {idle_port}
    out dx, eax
    pop rdx
    pop rax
3:
    push qword ptr [rsp + 8]
    pop qword ptr [rsp]
4:
    register_step \avx
    dec qword ptr [rsp]
    jnz 4b

    push rdi
    mov rdi, [rsp + 32]
    pop qword ptr [rdi + 552]
    mov [rdi + 512], rax
    mov [rdi + 520], rbx
    mov [rdi + 528], rcx
    mov [rdi + 536], rdx
    mov [rdi + 544], rsi
    mov [rdi + 560], rbp
    mov [rdi + 568], r8
    mov [rdi + 576], r9
    mov [rdi + 584], r10
    mov [rdi + 592], r11
    mov [rdi + 600], r12
    mov [rdi + 608], r13
    mov [rdi + 616], r14
    mov [rdi + 624], r15
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    .if \avx
    vmovups [rdi + 32 * \n], ymm\n
    .else
    movups [rdi + 32 * \n], xmm\n
    .endif
    .endr
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7
    fistp qword ptr [rdi + 632 + 8 * \n]
    .endr
    stmxcsr [rdi + 696]
    fnstcw [rdi + 700]
    ldmxcsr [rsp + 32]
    fldcw [rsp + 36]
    .if \avx
    vzeroupper
    .endif
    add rsp, 40
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
.endm

.section .text.register_run, "ax", @progbits
register_run register_run_sse, 0
register_run register_run_avx, 1
.text
"#,
    factor = const FACTOR,
    addend = const ADDEND,
    idle_port = const IDLE,
    keys = sym KEYS,
);

impl Registers {
    /// Values that differ in every register, from `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        let mut next = seed;
        let mut draw = || {
            next = next.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix64(next)
        };
        Self {
            vector: [(); VECTOR].map(|()| [(); 4].map(|()| draw())),
            general: [(); GENERAL].map(|()| draw()),
            // Integers of at most 62 bits are exact in the x87's 64-bit significand, either sign.
            x87: [(); X87].map(|()| (draw() >> 2) as i64),
            mxcsr: MXCSR,
            x87_control: X87_CONTROL.into(),
        }
    }

    /// Runs the stretch: twice `loops` (at least 1) steps with an idle of `idle_us` between, none when zero.
    pub(crate) fn run(&mut self, avx: bool, loops: u64, idle_us: u64) {
        let (loops, idle_us) = (loops.max(1), idle_us.min(IDLE_MAX_US));
        let run = if avx { register_run_avx } else { register_run_sse };
        // SAFETY: the routine follows the C calling convention, reads and writes only `self` and its own stack
        // frame, and with `avx` is called only where the operating mode permits AVX (the caller asked CPUID).
        unsafe { run(self, loops, idle_us) }
    }

    /// What [`Self::run`] must leave after `steps` steps in all, in closed form.
    pub(crate) fn after(&self, avx: bool, steps: u64) -> Self {
        let (factor, addend) = affine_power(steps);
        let mut vector = self.vector;
        for (value, key) in vector.iter_mut().zip(&KEYS.0) {
            let [a, b] = half_after([value[0], value[1]], [key[0], key[1]], steps);
            let upper = [value[2], value[3]];
            let [c, d] = if avx {
                half_after(upper, [key[2], key[3]], steps)
            } else {
                upper
            };
            *value = [a, b, c, d];
        }
        let mut x87 = self.x87;
        for (top, value) in x87.iter_mut().enumerate() {
            let original = (top + (steps % X87 as u64) as usize) % X87;
            // The steps numbered `original`, `original + 8` and so on found it on the top and negated it.
            let negations = (steps + X87 as u64 - 1 - original as u64) / X87 as u64;
            *value = if negations % 2 == 1 {
                -self.x87[original]
            } else {
                self.x87[original]
            };
        }
        Self {
            vector,
            general: self
                .general
                .map(|value| value.wrapping_mul(factor).wrapping_add(addend)),
            x87,
            ..self.clone()
        }
    }

    /// Calls `report` for each register that differs between `self` and `wanted`: its name, and for a vector
    /// register whether it is the upper half.
    pub(crate) fn differences(&self, wanted: &Self, mut report: impl FnMut(Name)) {
        for (at, (found, wanted)) in self.vector.iter().zip(&wanted.vector).enumerate() {
            if found[..2] != wanted[..2] {
                report(Name::Lower(at));
            }
            if found[2..] != wanted[2..] {
                report(Name::Upper(at));
            }
        }
        for (at, (found, wanted)) in self.general.iter().zip(&wanted.general).enumerate() {
            if found != wanted {
                report(Name::General(at));
            }
        }
        for (at, (found, wanted)) in self.x87.iter().zip(&wanted.x87).enumerate() {
            if found != wanted {
                report(Name::X87(at));
            }
        }
        if self.mxcsr & !MXCSR_FLAGS != wanted.mxcsr & !MXCSR_FLAGS {
            report(Name::Mxcsr);
        }
        if self.x87_control != wanted.x87_control {
            report(Name::X87Control);
        }
    }

    /// Self-test: makes one general-purpose register wrong.
    pub(crate) fn flip_a_bit(&mut self) {
        self.general[3] ^= 1 << 40;
    }
}

/// The sticky exception flags, which are not part of what is checked.
const MXCSR_FLAGS: u32 = 0x3f;

/// Names a register in a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    General(usize),
    /// XMM.
    Lower(usize),
    /// The upper half of YMM.
    Upper(usize),
    X87(usize),
    Mxcsr,
    X87Control,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::General(at) => f.write_str(GENERAL_NAMES[at]),
            Self::Lower(at) => write!(f, "xmm{at}"),
            Self::Upper(at) => write!(f, "ymm{at}"),
            Self::X87(at) => write!(f, "st{at}"),
            Self::Mxcsr => f.write_str("mxcsr"),
            Self::X87Control => f.write_str("fcw"),
        }
    }
}

/// The map `x -> x * FACTOR + ADDEND` applied `steps` times, as factor and addend.
fn affine_power(mut steps: u64) -> (u64, u64) {
    // Square and multiply, on pairs that stand for affine maps.
    let then = |first: (u64, u64), second: (u64, u64)| {
        (
            first.0.wrapping_mul(second.0),
            first.1.wrapping_mul(second.0).wrapping_add(second.1),
        )
    };
    let mut power = (i64::from(FACTOR) as u64, i64::from(ADDEND) as u64);
    let mut whole = (1, 0);
    while steps > 0 {
        if steps & 1 == 1 {
            whole = then(whole, power);
        }
        power = then(power, power);
        steps >>= 1;
    }
    whole
}

/// Half a vector register after `steps` steps. Four steps exclusive-or all four words of the key into each word
/// and bring the words back to their places, so eight steps change nothing and only the remainder counts.
fn half_after(value: [u64; 2], key: [u64; 2], steps: u64) -> [u64; 2] {
    let mut value = u128::from(value[1]) << 64 | u128::from(value[0]);
    let key = u128::from(key[1]) << 64 | u128::from(key[0]);
    for _ in 0..steps % 8 {
        value = (value ^ key).rotate_left(32);
    }
    [value as u64, (value >> 64) as u64]
}
