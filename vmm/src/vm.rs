//! A virtual machine: KVM's VM, its memory, its vCPUs and its devices, with one owner.
//!
//! ```text
//! boot() ----\                run()                 pause()
//!             >--> stopped  --------->  running  -----------> Paused (a guard) ---- resume() --> running
//! restore() -/        ^                                          |
//!                     +------------------ dropped ---------------+
//! ```
//!
//! State is read only through [`Paused`]. A guard that is dropped, by an error on the way for example, leaves the
//! guest stopped (rule 5): a possible second copy of the VM becomes a VM that stands still.

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootError, BootSource};
use crate::bus::{Attached, Bus, MmioDevice, Occupied};
use crate::cpuid;
use crate::devices::DeviceStateError;
use crate::devices::i8042::{I8042, I8042State};
use crate::devices::rtc::{Rtc, RtcState};
use crate::devices::serial::{Interrupt, SerialPort};
use crate::devices::virtio::mmio::DrainError;
use crate::devices::virtio::state::VirtioState;
use crate::dirty::DirtyTracker;
use crate::kvm::{self, KvmError};
use crate::layout::{IDENTITY_MAP, SERIAL_GSI, TSS_PAGES, VIRTIO_QUEUE_NOTIFY};
use crate::memory::{GuestRam, MemoryError};
use crate::outbox::Outbox;
use crate::vcpu::state::{self, RestoreError, VcpuState};
use crate::vcpu::{GuestEnd, Vcpu, VcpuError, msrs};

/// The most vCPUs a guest can have.
pub const MAX_VCPUS: u8 = 32;

/// The size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineConfig {
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
}

/// Everything of a stopped machine but its memory: plain, untrusted.
#[derive(Debug, Clone)]
pub struct MachineState {
    /// Its size.
    pub config: MachineConfig,
    /// Its vCPUs, in the order of their APIC ids.
    pub vcpus: Vec<VcpuState>,
    /// The interval timer.
    pub pit: kvm_pit_state2,
    /// The paravirtual clock.
    pub clock: kvm_clock_data,
    /// Master PIC, slave PIC, IOAPIC.
    pub irqchips: [kvm_irqchip; 3],
    /// The serial port.
    pub serial: vm_superio::serial::SerialState,
    /// The keyboard controller.
    pub i8042: I8042State,
    /// The CMOS clock.
    pub rtc: RtcState,
    /// The virtio devices, in the order of their slots.
    pub virtio: Vec<VirtioState>,
}

/// Why a machine could not be made, run, stopped or read.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU's thread.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel, its initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A vCPU's saved state.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A device's saved state.
    #[error("restore a device")]
    Device(#[from] DeviceStateError),
    /// The number of vCPUs.
    #[error("{count} vCPUs: a guest can have 1 to {MAX_VCPUS}")]
    VcpuCount {
        /// What was asked for.
        count: usize,
    },
    /// An eventfd.
    #[error("make an interrupt for the {device}")]
    Interrupt {
        /// For which device.
        device: &'static str,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A virtio device has something in flight that does not end. The vCPUs stand still.
    #[error("stop the devices")]
    Drain(#[from] DrainError),
    /// Two devices in one slot.
    #[error("attach the devices")]
    Occupied(#[from] Occupied),
    /// A device could not be made.
    #[error("attach the devices")]
    Attach(#[source] BoxedError),
    /// The guest's memory could not be filled.
    #[error("load the guest's memory")]
    Load(#[source] BoxedError),
}

/// An error of a layer that the machine does not know.
pub type BoxedError = Box<dyn std::error::Error + Send + Sync>;

/// Makes the devices of a machine, for its memory. Called when the memory is as the guest will find it; after a
/// restore that is the time to look at rings and to raise interrupts.
pub type Attach<'a> = &'a dyn Fn(&Arc<GuestRam>) -> Result<Vec<Attached>, BoxedError>;

/// A machine without virtio devices.
///
/// # Errors
/// Never.
pub fn no_devices(_: &Arc<GuestRam>) -> Result<Vec<Attached>, BoxedError> {
    Ok(Vec::new())
}

/// Called on a vCPU's thread when the guest ends of itself.
pub type Ended = Arc<dyn Fn(u8, GuestEnd) + Send + Sync>;

/// A machine. Dropping it stops the guest and frees everything.
pub struct Vm {
    // Dropped in this order: threads stop before what they use goes away.
    vcpus: Vec<Vcpu>,
    bus: Arc<Bus>,
    fd: VmFd,
    ram: Arc<GuestRam>,
    attached: Vec<Attached>,
    dirty: DirtyTracker,
    logging: bool,
    config: MachineConfig,
    msr_list: Vec<u32>,
    xsave_bytes: usize,
    running: bool,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("config", &self.config)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

/// The parts of a machine before its vCPUs have threads.
struct Parts {
    kvm: Kvm,
    fd: VmFd,
    vcpus: Vec<VcpuFd>,
    xsave_bytes: usize,
    msr_list: Vec<u32>,
}

impl Parts {
    /// VM, TSS, interrupt chips and timer, then vCPUs: the chips must be there before the vCPUs, whose local APICs
    /// belong to them.
    fn new(vcpus: u8) -> Result<Self, VmError> {
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
        Ok(Self {
            kvm,
            fd,
            vcpus,
            xsave_bytes,
            msr_list,
        })
    }

    fn serial_interrupt(&self) -> Result<Interrupt, VmError> {
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

    /// Ties a device to its line and its queues' kicks, and puts it on the bus.
    fn attach(&self, bus: &mut Bus, attached: &Attached) -> Result<(), VmError> {
        let slot = attached.slot;
        let on = |ioctl: &'static str| KvmError::ioctl(ioctl, format!("virtio slot {}", slot.number()));
        let device = &attached.device;
        bus.attach(slot, Arc::clone(device) as Arc<dyn MmioDevice>)?;
        self.fd
            .register_irqfd(device.irq_event(), slot.gsi())
            .map_err(on("KVM_IRQFD"))?;
        let notify = IoEventAddress::Mmio(slot.address() + VIRTIO_QUEUE_NOTIFY);
        for (kick, queue) in device.kicks().iter().zip(0u32..) {
            self.fd
                .register_ioevent(kick, &notify, queue)
                .map_err(on("KVM_IOEVENTFD"))?;
        }
        Ok(())
    }

    fn into_vm(
        self,
        config: MachineConfig,
        ram: Arc<GuestRam>,
        mut bus: Bus,
        attached: Vec<Attached>,
        ended: &Ended,
    ) -> Result<Vm, VmError> {
        for device in &attached {
            self.attach(&mut bus, device)?;
        }
        let bus = Arc::new(bus);
        let vcpus = self
            .vcpus
            .into_iter()
            .zip(0u8..)
            .map(|(fd, id)| {
                let ended = Arc::clone(ended);
                Vcpu::start(id, fd, Arc::clone(&bus), move |id, end| ended(id, end))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let dirty = DirtyTracker::new(&ram, false);
        Ok(Vm {
            vcpus,
            bus,
            fd: self.fd,
            ram,
            attached,
            dirty,
            logging: false,
            config,
            msr_list: self.msr_list,
            xsave_bytes: self.xsave_bytes,
            running: false,
        })
    }
}

/// Tells KVM of the memory slots, or changes whether their writes are logged.
fn set_slots(fd: &VmFd, ram: &GuestRam, log: bool) -> Result<(), KvmError> {
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

impl Vm {
    /// A machine that is about to execute its kernel's first instruction.
    ///
    /// # Errors
    /// [`VmError`], before anything has run.
    pub fn boot(
        config: MachineConfig,
        source: &BootSource,
        attach: Attach<'_>,
        outbox: &Outbox,
        ended: &Ended,
    ) -> Result<Self, VmError> {
        let ram = Arc::new(GuestRam::new(config.memory_bytes)?);
        let attached = attach(&ram).map_err(VmError::Attach)?;
        let slots: Vec<_> = attached.iter().map(|device| device.slot).collect();
        let entry = boot::load(&ram, source, config.vcpus, &slots)?;
        let parts = Parts::new(config.vcpus)?;
        set_slots(&parts.fd, &ram, false)?;
        let supported = cpuid::supported(&parts.kvm)?;
        for (vcpu, id) in parts.vcpus.iter().zip(0u8..) {
            let on = |ioctl: &'static str| KvmError::ioctl(ioctl, format!("vCPU {id}"));
            let tsc_khz = vcpu.get_tsc_khz().map_err(on("KVM_GET_TSC_KHZ"))?;
            let entries = cpuid::for_vcpu(&supported, id, config.vcpus, tsc_khz);
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
        let serial = SerialPort::new(parts.serial_interrupt()?, outbox.writer());
        let bus = Bus::new(serial, I8042::default(), Rtc::default());
        parts.into_vm(config, ram, bus, attached, ended)
    }

    /// A machine with a saved state, whose memory `load` fills. It does not run yet.
    ///
    /// Whether this host can run it is found out before the memory is loaded.
    ///
    /// # Errors
    /// [`VmError`], before anything has run.
    pub fn restore(
        saved: &MachineState,
        load: impl FnOnce(&GuestRam) -> Result<(), BoxedError>,
        attach: Attach<'_>,
        outbox: &Outbox,
        ended: &Ended,
    ) -> Result<Self, VmError> {
        if saved.vcpus.len() != usize::from(saved.config.vcpus) {
            return Err(VmError::VcpuCount {
                count: saved.vcpus.len(),
            });
        }
        let parts = Parts::new(saved.config.vcpus)?;
        let supported = cpuid::supported(&parts.kvm)?;
        let scales_tsc = parts.kvm.check_extension(kvm_ioctls::Cap::TscControl);
        if let Some(vcpu) = saved.vcpus.first() {
            let offered = cpuid::offered(&supported, &parts.vcpus[0])?;
            let features = cpuid::missing(&vcpu.cpuid, &offered);
            if !features.is_empty() {
                return Err(RestoreError::Features { features }.into());
            }
        }
        // Slots before the vCPUs: writing an MSR that holds a guest address (kvmclock, PV EOI, async page faults) makes
        // KVM look the address up. The memory is filled after them: some of these writes make KVM write to it.
        let ram = Arc::new(GuestRam::new(saved.config.memory_bytes)?);
        set_slots(&parts.fd, &ram, false)?;
        for (vcpu, (state, id)) in parts.vcpus.iter().zip(saved.vcpus.iter().zip(0u8..)) {
            state::restore(vcpu, id, state, parts.xsave_bytes, scales_tsc)?;
        }
        // After the vCPUs: the IOAPIC looks at their local APICs.
        let vm = |ioctl: &'static str| KvmError::ioctl(ioctl, "the VM");
        parts.fd.set_pit2(&saved.pit).map_err(vm("KVM_SET_PIT2"))?;
        // Trap 7: the flags GET_CLOCK reported are not to be given back; without them the clock goes on from where
        // it stood (the `frozen` policy).
        let clock = kvm_clock_data {
            clock: saved.clock.clock,
            ..Default::default()
        };
        parts.fd.set_clock(&clock).map_err(vm("KVM_SET_CLOCK"))?;
        for chip in &saved.irqchips {
            parts.fd.set_irqchip(chip).map_err(vm("KVM_SET_IRQCHIP"))?;
        }
        load(&ram).map_err(VmError::Load)?;
        // Devices last: an interrupt they raise must find the chips in place and not be overwritten.
        let serial = SerialPort::from_state(&saved.serial, parts.serial_interrupt()?, outbox.writer())?;
        let bus = Bus::new(
            serial,
            I8042::from_state(&saved.i8042)?,
            Rtc::from_state(&saved.rtc)?,
        );
        let attached = attach(&ram).map_err(VmError::Attach)?;
        parts.into_vm(saved.config, ram, bus, attached, ended)
    }

    /// Its size.
    #[must_use]
    pub fn config(&self) -> MachineConfig {
        self.config
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Its devices.
    #[must_use]
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// Its virtio devices.
    #[must_use]
    pub fn attached(&self) -> &[Attached] {
        &self.attached
    }

    /// Whether the guest has ended of itself on some vCPU.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.vcpus.iter().any(Vcpu::ended)
    }

    /// Whether the guest runs.
    #[must_use]
    pub fn running(&self) -> bool {
        self.running
    }

    /// Lets the guest run.
    pub fn run(&mut self) {
        self.running = true;
        for attached in &self.attached {
            attached.device.unpause();
        }
        for vcpu in &self.vcpus {
            vcpu.run();
        }
    }

    /// Stops the guest, all vCPUs at once.
    ///
    /// # Errors
    /// [`VcpuError::Stuck`]: some vCPU may still run. [`VmError::Drain`]: the vCPUs stand still, and a device may still
    /// finish what it has taken.
    pub fn pause(&mut self) -> Result<Paused<'_>, VmError> {
        for vcpu in &self.vcpus {
            vcpu.ask_stop();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_parked()?;
        }
        self.running = false;
        // After the vCPUs, whose kicks are then all made; what is in flight ends before anything is saved (trap 1).
        for attached in &self.attached {
            attached.device.pause()?;
        }
        Ok(Paused(self))
    }

    /// Begins to log which pages the guest writes, if that is not so yet. Until then a guest pays nothing for it.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn start_logging(&mut self) -> Result<(), VmError> {
        if !self.logging {
            set_slots(&self.fd, &self.ram, true)?;
            self.logging = true;
        }
        Ok(())
    }

    /// Whether writes are logged: without that, only a full checkpoint can be taken.
    #[must_use]
    pub fn logging(&self) -> bool {
        self.logging
    }

    /// Adds what changed to the dirty set, and gives the set out. What is then not stored must be put back.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]; nothing is lost.
    pub fn take_dirty(&mut self, each: impl FnMut(u64)) -> Result<(), VmError> {
        self.dirty.collect(&self.fd, &self.ram)?;
        self.dirty.take(each);
        Ok(())
    }

    /// How many pages are known to be dirty, without asking KVM.
    #[must_use]
    pub fn dirty_count(&self) -> u64 {
        self.dirty.count()
    }

    /// Gives pages back to the dirty set.
    pub fn put_back(&mut self, pages: impl Iterator<Item = u64>) {
        self.dirty.put_back(pages);
    }
}

/// A machine that stands still. Dropped, it stays so.
#[must_use = "dropped, the guest stays stopped"]
#[derive(Debug)]
pub struct Paused<'vm>(&'vm mut Vm);

impl Paused<'_> {
    /// Reads everything but the memory.
    ///
    /// # Errors
    /// [`VmError::Kvm`] naming the ioctl.
    pub fn save(&self) -> Result<MachineState, VmError> {
        let vm = &self.0;
        let on = |ioctl: &'static str| KvmError::ioctl(ioctl, "the VM");
        // Devices first: what they still have to do may raise an interrupt, which must be in KVM's state below.
        let serial = vm.bus.serial().state();
        let i8042 = vm.bus.i8042().state();
        let rtc = vm.bus.rtc().state();
        let virtio = vm.attached.iter().map(|a| a.device.state()).collect();
        let vcpus = vm
            .vcpus
            .iter()
            .zip(0u8..)
            .map(|(vcpu, id)| state::save(&vcpu.fd(), id, &vm.msr_list, vm.xsave_bytes))
            .collect::<Result<Vec<_>, _>>()?;
        let pit = vm.fd.get_pit2().map_err(on("KVM_GET_PIT2"))?;
        let clock = vm.fd.get_clock().map_err(on("KVM_GET_CLOCK"))?;
        let mut irqchips = [kvm_irqchip::default(); 3];
        let ids = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
        for (chip, id) in irqchips.iter_mut().zip(ids) {
            chip.chip_id = id;
            vm.fd.get_irqchip(chip).map_err(on("KVM_GET_IRQCHIP"))?;
        }
        Ok(MachineState {
            config: vm.config,
            vcpus,
            pit,
            clock,
            irqchips,
            serial,
            i8042,
            rtc,
            virtio,
        })
    }

    /// The machine, standing still as long as the guard is held.
    pub fn vm(&mut self) -> &mut Vm {
        self.0
    }

    /// Lets the guest go on.
    pub fn resume(self) {
        for vcpu in &self.0.vcpus {
            // As at the save: the guest's watchdog is not to count the time it stood still.
            let _ = vcpu.fd().kvmclock_ctrl();
        }
        self.0.run();
    }
}
