# Entry of a bare-metal guest: from the PVH start state (flat 32-bit protected mode, paging off,
# EBX = struct hvm_start_info) to Rust at privilege level 3 of 64-bit mode.
#
# Level 0 code is kept as short as it can be: on a host without VMX or SVM every instruction of it goes
# through KVM's instruction emulator, a million of them a second. All tables are therefore laid out by the
# assembler, with the accessed and dirty bits already set so that using them writes nothing.
#
# What level 0 does: load GDT, CR3, CR4, EFER, CR0 (paging on), TSS, IDT, XCR0; ask CPUID a few leaves
# (at level 3 a host without VMX or SVM gives the answers of its own CPU); leave.
#
# Level 3 reaches the ports by two ways, because each is missing somewhere. A host without VMX or SVM was seen to drop
# IOPL 3 on the way to level 3; the TSS's I/O bitmap works there. QEMU's own processor looks into the bitmap only while
# the task register holds an available TSS, as `ltr` left it; KVM restores it as a busy one, as a real processor has it,
# and every `out` of a restored guest was #GP. IOPL 3 works there.
#
# Leaving: `sysexit` first, because it is the only way out that KVM's emulator knows (it has no `iret` outside
# real mode, no `sysret`, and no far return to an outer level). AMD processors have no `sysexit` in 64-bit mode
# and raise #UD, which lands in our own handler, and that one leaves with `iretq`.
#
# Exceptions: all 32 vectors go to `exception_common`, which carries vector, error code, RIP and CR2 to
# `report_fault` at level 3. Interrupts stay disabled for good.

.set KERNEL_CODE, 0x08
.set KERNEL_DATA, 0x10
.set USER_CODE,   0x2b          # sysexit takes SYSENTER_CS + 32 for CS ...
.set USER_DATA,   0x33          # ... and SYSENTER_CS + 40 for SS
.set TASK,        0x38
.set LEVEL3_FLAGS, 0x3002       # interrupts off, IOPL 3, bit 1 always set
.set PORTS, 0x1000              # level 3 may use ports below this one

.set MSR_SYSENTER_CS, 0x174
.set MSR_EFER,        0xc0000080
.set EFER_LME,        1 << 8

.set CR4_PAE, 1 << 5
.set CR4_OSFXSR, 1 << 9
.set CR4_OSXMMEXCPT, 1 << 10
.set CR4_OSXSAVE, 1 << 18
.set CR0_PE, 1 << 0
.set CR0_MP, 1 << 1
.set CR0_NE, 1 << 5
.set CR0_WP, 1 << 16
.set CR0_PG, 1 << 31

.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18                  # name bytes, descriptor bytes, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad entry32

.section .boot, "ax", @progbits
.code64
.global exception_stubs
exception_stubs:                # one every 16 bytes: the IDT below counts on it
.set vector, 0
.rept 32
.balign 16, 0xcc
.if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
.else
    .byte 0x6a, 0               # push 0 where the processor pushes no error code
.endif
    .byte 0x6a, vector          # push vector
    jmp exception_common
.set vector, vector + 1
.endr

.code32
.global entry32
entry32:
    cli
    cld
    mov ebp, ebx                # start_info; CPUID takes EBX
    lgdt [gdt_pointer]

    mov eax, 1
    xor ecx, ecx
    cpuid
    mov edi, ecx                # feature bits, for XCR0 below
    mov eax, CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
    test edi, 1 << 26           # XSAVE
    jz 1f
    or eax, CR4_OSXSAVE
1:  mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, MSR_EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    mov eax, CR0_PE | CR0_MP | CR0_NE | CR0_WP | CR0_PG
    mov cr0, eax
    .byte 0xea                  # far jump to KERNEL_CODE:entry64
    .long entry64
    .short KERNEL_CODE

.code64
entry64:
    mov eax, KERNEL_DATA
    mov ss, eax
    mov eax, USER_DATA
    mov ds, eax
    mov es, eax
    mov esp, offset level0_stack_top
    mov eax, TASK
    ltr ax
    lidt [idt_pointer]

    test edi, 1 << 26
    jz 2f
    mov eax, 3                  # x87 and SSE
    test edi, 1 << 28           # AVX
    jz 1f
    mov al, 7
1:  xor edx, edx
    xor ecx, ecx
    xsetbv
2:
    mov ecx, MSR_SYSENTER_CS
    mov eax, KERNEL_CODE
    xor edx, edx
    wrmsr

    mov esi, offset cpuid_answers
3:  mov eax, [rsi]
    xor ecx, ecx
    cpuid
    mov [rsi + 4], eax
    mov [rsi + 8], ebx
    mov [rsi + 12], ecx
    mov [rsi + 16], edx
    add esi, 20
    cmp esi, offset cpuid_answers_end
    jne 3b

    mov edx, offset level3_start
    mov ecx, offset level3_stack_top

# Leave level 0: RIP from RDX, RSP from RCX; every other register is carried over, but the flags.
leave_with_flags:
    push LEVEL3_FLAGS
    popfq
leave_level0:
    .byte 0x48, 0x0f, 0x35      # sysexitq
leave_by_iret:
    mov eax, USER_DATA
    push rax
    push rcx
    push LEVEL3_FLAGS
    push USER_CODE
    push rdx
    iretq

# On the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS.
exception_common:
    cmp dword ptr [rsp + 16], offset leave_level0
    je leave_by_iret            # the #UD of a processor without 64-bit sysexit; RCX and RDX are untouched
    pop rdi
    pop rsi
    pop r8
    mov r9, cr2
    mov edx, offset level3_fault
    mov ecx, offset level3_stack_top
    jmp leave_with_flags

.section .text.level3, "ax", @progbits
level3_start:
    mov edi, offset bss_start
    mov ecx, offset bss_end
    sub ecx, edi
    xor eax, eax
    rep stosb
    fninit
    push 0x1f80                 # the architecture's default: all exceptions masked, round to nearest
    ldmxcsr [rsp]
    mov dword ptr [rsp], 0      # a null return address: end of the call chain
    mov edi, ebp
    jmp guest_main

level3_fault:                   # the interrupted stack is of no more use: start a new one
    mov rdx, r8
    mov rcx, r9
    push 0
    jmp report_fault

# What the compiler calls by name without being asked. `rep` does these at memory speed where it matters.
.global memcpy, memmove, memset, memcmp, bcmp, rust_eh_personality
memmove:
    mov rax, rdi
    mov rcx, rdx
    mov rdx, rdi
    sub rdx, rsi
    cmp rdx, rcx
    jae 1f                      # the destination does not start inside the source: forwards
    lea rdi, [rdi + rcx - 1]
    lea rsi, [rsi + rcx - 1]
    std
    rep movsb
    cld
    ret
memcpy:
    mov rax, rdi
    mov rcx, rdx
1:  rep movsb
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    mov rcx, rdx
    test rcx, rcx
    jz 1f
    repe cmpsb
    je 1f
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub ecx, eax
    mov eax, ecx
1:  ret
rust_eh_personality:            # named by the precompiled `core`, never called: panics abort
    ud2

.section .tables, "aw", @progbits
# Present, writable, user, accessed, dirty. Everything is open to level 3: it is the guest.
.set OPEN, 0x67
.set OPEN_LARGE, 0xe7           # and a 2 MiB page
.balign 4096
pml4:
    .quad first_directory_pointers + OPEN
    .zero 4096 - 8
.global first_directory_pointers
first_directory_pointers:       # one entry a GiB; the guest adds those beyond the first from level 3
    .quad first_gib + OPEN
    .zero 4096 - 8
first_gib:
.set address, 0
.rept 512
    .quad address + OPEN_LARGE
.set address, address + 0x200000
.endr

.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08 level 0 code, 64 bits
    .quad 0x00cf93000000ffff    # 0x10 level 0 data
    .quad 0                     # 0x18 (sysexit's 32-bit code)
    .quad 0                     # 0x20 (sysexit's 32-bit data)
    .quad 0x00affb000000ffff    # 0x28 level 3 code, 64 bits
    .quad 0x00cff3000000ffff    # 0x30 level 3 data
tss_descriptor:                 # 0x38, 16 bytes; the base is below 16 MiB, so its low 24 bits are contiguous
    .short tss_end - tss - 1
    .long tss + 0x89000000      # base 0..24, then type: available 64-bit TSS
    .short 0
    .quad 0
gdt_end:

.balign 16
tss:
    .long 0
    .quad level0_stack_top      # RSP0: where an exception at level 3 lands
    .zero 104 - 12 - 2
    .short io_bitmap - tss
io_bitmap:                      # a zero bit permits its port
    .zero PORTS / 8
    .byte 0xff                  # the processor reads two bytes at a time, so one more must be there
tss_end:

.balign 16
idt:
.set address, 0x200000          # exception_stubs; guest.ld asserts it
.rept 32
    .short address & 0xffff
    .short KERNEL_CODE
    .byte 0, 0x8e               # interrupt gate, present, for hardware exceptions only
    .short address >> 16
    .quad 0
.set address, address + 16
.endr
idt_end:

.balign 8
    .short 0, 0, 0
gdt_pointer:
    .short gdt_end - gdt - 1
    .quad gdt
    .short 0, 0, 0
idt_pointer:
    .short idt_end - idt - 1
    .quad idt

# Leaf, then the four registers that came back. clock.rs and registers.rs know the order.
.balign 8
.global cpuid_answers
cpuid_answers:
    .long 0x0, 0, 0, 0, 0
    .long 0x1, 0, 0, 0, 0
    .long 0x15, 0, 0, 0, 0
    .long 0x16, 0, 0, 0, 0
    .long 0x40000000, 0, 0, 0, 0
    .long 0x40000010, 0, 0, 0, 0
cpuid_answers_end:

.section .stacks, "aw", @nobits
.balign 16
    .zero 4096
level0_stack_top:
    .zero 65536
level3_stack_top:
