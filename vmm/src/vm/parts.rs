//! A machine before its vCPUs have threads: what `/dev/kvm` gives, in the order it must be asked.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{MAX_VCPUS, MachineConfig, VmError};
use crate::boot::Entry;
use crate::bus::Attached;
use crate::clock::HostClock;
use crate::cpuid;
use crate::devices::serial::Interrupt;
use crate::kvm::{self, KvmError};
use crate::layout::{IDENTITY_MAP, SERIAL_GSI, TSS_PAGES, VIRTIO_QUEUE_NOTIFY};
use crate::memory::GuestRam;
use crate::vcpu::msrs;
use crate::vcpu::state::RestoreError;

/// The parts of a machine before its vCPUs have threads.
pub(super) struct Parts {
    pub kvm: Kvm,
    pub fd: VmFd,
    pub vcpus: Vec<VcpuFd>,
    pub xsave_bytes: usize,
    pub msr_list: Vec<u32>,
    pub clock: HostClock,
}

impl Parts {
    /// VM, TSS, interrupt chips and timer, then vCPUs: the chips must be there before the vCPUs, whose local APICs
    /// belong to them.
    pub(super) fn new(vcpus: u8) -> Result<Self, VmError> {
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(VmError::VcpuCount { count: vcpus.into() });
        }
        let kvm = kvm::open()?;
        let fd = kvm
            .create_vm()
            .map_err(KvmError::ioctl("KVM_CREATE_VM", "/dev/kvm"))?;
        fd.set_tss_address(TSS_PAGES)
            .map_err(KvmError::ioctl("KVM_SET_TSS_ADDR", "the VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(KvmError::ioctl("KVM_SET_IDENTITY_MAP_ADDR", "the VM"))?;
        fd.create_irq_chip()
            .map_err(KvmError::ioctl("KVM_CREATE_IRQCHIP", "the VM"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit)
            .map_err(KvmError::ioctl("KVM_CREATE_PIT2", "the VM"))?;
        let vcpus = (0..vcpus)
            .map(|id| {
                fd.create_vcpu(id.into())
                    .map_err(KvmError::ioctl("KVM_CREATE_VCPU", format!("vCPU {id}")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let msr_list = msrs::list(&kvm, &vcpus[0])?;
        let xsave_bytes = kvm::xsave_bytes(&fd);
        // Of a vCPU that nobody has set another frequency for: the host's.
        let tsc_khz = vcpus[0]
            .get_tsc_khz()
            .map_err(KvmError::ioctl("KVM_GET_TSC_KHZ", "vCPU 0"))?;
        let clock = HostClock {
            tsc_khz,
            realtime: kvm.check_extension_int(Cap::AdjustClock) as u32 & KVM_CLOCK_REALTIME != 0,
        };
        Ok(Self {
            kvm,
            fd,
            vcpus,
            xsave_bytes,
            msr_list,
            clock,
        })
    }

    pub(super) fn serial_interrupt(&self) -> Result<Interrupt, VmError> {
        let make = |source| VmError::Interrupt {
            device: "serial port",
            source,
        };
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(make)?;
        self.fd
            .register_irqfd(&event, SERIAL_GSI)
            .map_err(KvmError::ioctl("KVM_IRQFD", "the serial port"))?;
        Ok(Interrupt::new(event))
    }

    /// Gives each vCPU of a new machine its CPUID, and the first its first instruction.
    pub(super) fn at_entry(&self, config: MachineConfig, entry: Entry) -> Result<(), VmError> {
        let supported = cpuid::supported(&self.kvm)?;
        let model = config.cpu.apply(&supported)?;
        for (vcpu, id) in self.vcpus.iter().zip(0u8..) {
            let on = |ioctl: &'static str| KvmError::ioctl(ioctl, format!("vCPU {id}"));
            let entries = cpuid::for_vcpu(&model, id, config.vcpus, self.clock.tsc_khz);
            let invalid = |why| RestoreError::Invalid { vcpu: id, why };
            vcpu.set_cpuid2(&cpuid::to_kvm(&entries).map_err(invalid)?)
                .map_err(on("KVM_SET_CPUID2"))?;
            // The others wait for the first to wake them, as on a PC.
            if id == 0 {
                let reset = vcpu.get_sregs().map_err(on("KVM_GET_SREGS"))?;
                vcpu.set_sregs(&entry.sregs(reset)).map_err(on("KVM_SET_SREGS"))?;
                vcpu.set_regs(&entry.regs()).map_err(on("KVM_SET_REGS"))?;
            }
        }
        Ok(())
    }
}

/// Tells KVM of the memory slots, or changes whether their writes are logged.
pub(crate) fn set_slots(fd: &VmFd, ram: &GuestRam, log: bool) -> Result<(), KvmError> {
    for slot in ram.slots() {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.guest_address,
            memory_size: slot.bytes,
            userspace_addr: ram.host_address(slot),
        };
        kvm::set_memory_slot(fd, region).map_err(KvmError::ioctl(
            "KVM_SET_USER_MEMORY_REGION",
            format!("memory slot {}", slot.id),
        ))?;
    }
    Ok(())
}

/// Ties a device to its line and its queues' kicks. What is tied to a VM comes loose with it.
pub(super) fn tie(fd: &VmFd, attached: &Attached) -> Result<(), KvmError> {
    let slot = attached.slot;
    let on = |ioctl: &'static str| KvmError::ioctl(ioctl, format!("virtio slot {}", slot.number()));
    let device = &attached.device;
    fd.register_irqfd(device.irq_event(), slot.gsi())
        .map_err(on("KVM_IRQFD"))?;
    let notify = IoEventAddress::Mmio(slot.address() + VIRTIO_QUEUE_NOTIFY);
    for (kick, queue) in device.kicks().iter().zip(0u32..) {
        fd.register_ioevent(kick, &notify, queue)
            .map_err(on("KVM_IOEVENTFD"))?;
    }
    Ok(())
}
