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

use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::boot::{self, BootError, BootSource, kept};
use crate::bus::{Attached, Bus, MmioDevice, Occupied};
use crate::clock::{ClockPolicy, HostClock, SavedClock};
use crate::cpuid;
use crate::cpuid::baseline::{CpuModel, ModelError};
use crate::devices::DeviceStateError;
use crate::devices::i8042::{I8042, I8042State};
use crate::devices::rtc::{Rtc, RtcState};
use crate::devices::serial::SerialPort;
use crate::devices::virtio::disk::Disk;
use crate::devices::virtio::mmio::DrainError;
use crate::devices::virtio::state::VirtioState;
use crate::dirty::DirtyTracker;
use crate::kvm::KvmError;
use crate::layout::VirtioSlot;
use crate::memory::{GuestRam, MemoryError};
use crate::outbox::Outbox;
use crate::vcpu::state::{self, RestoreError, VcpuState};
use crate::vcpu::{GuestEnd, Vcpu, VcpuError};
use generation::GenerationId;
use parts::{Parts, tie};

mod generation;
mod parts;
mod paused;

pub(crate) use parts::set_slots;
pub use paused::Paused;

/// The most vCPUs a guest can have.
pub const MAX_VCPUS: u8 = 32;

/// The size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineConfig {
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// The CPU the guest is shown.
    pub cpu: CpuModel,
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
    /// A machine of a checkpoint that does not have what it was booted from.
    #[error("the kernel to restart with is not known here")]
    NoKernel,
    /// The guest's memory could not be zeroed for a restart.
    #[error("{call} on the guest's memory, to restart it")]
    Clear {
        /// The system call.
        call: &'static str,
        /// The system's error.
        #[source]
        source: rustix::io::Errno,
    },
    /// The generation id.
    #[error("give the guest a generation id")]
    GenerationId(#[source] std::io::Error),
    /// The CPU to show the guest.
    #[error(transparent)]
    Model(#[from] ModelError),
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

/// Called on a vCPU's thread when the guest ends of itself, with the machine's [`Vm::life`] and the vCPU.
pub type Ended = Arc<dyn Fn(u64, u8, GuestEnd) + Send + Sync>;

fn slots_of(attached: &[Attached]) -> Vec<VirtioSlot> {
    attached.iter().map(|device| device.slot).collect()
}

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
    host_clock: HostClock,
    /// A frozen clock that is set once more when the guest first runs.
    start_clock: Option<SavedClock>,
    running: bool,
    life: u64,
    generation_id: GenerationId,
    /// What it was booted from: see [`kept`].
    boot: Option<Arc<Disk>>,
    outbox: Outbox,
    ended: Ended,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("config", &self.config)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// A machine that is about to execute its kernel's first instruction. It can be restarted.
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
        let entry = boot::load(&ram, source, config.vcpus, &slots_of(&attached))?;
        let parts = Parts::new(config.vcpus)?;
        set_slots(&parts.fd, &ram, false)?;
        parts.at_entry(config, entry)?;
        let serial = SerialPort::new(parts.serial_interrupt()?, outbox.writer());
        let bus = Bus::new(serial, I8042::default(), Rtc::default());
        let mut vm = Self::assemble(parts, config, ram, bus, attached, (outbox, ended))?;
        vm.boot = Some(kept::keep(source)?);
        vm.generation_id.write(&vm.ram)?;
        Ok(vm)
    }

    /// Gives the vCPUs their threads and the devices their lines.
    fn assemble(
        parts: Parts,
        config: MachineConfig,
        ram: Arc<GuestRam>,
        mut bus: Bus,
        attached: Vec<Attached>,
        (outbox, ended): (&Outbox, &Ended),
    ) -> Result<Self, VmError> {
        for device in &attached {
            bus.attach(device.slot, Arc::clone(&device.device) as Arc<dyn MmioDevice>)?;
            tie(&parts.fd, device)?;
        }
        let mut vm = Self {
            vcpus: Vec::new(),
            bus: Arc::new(bus),
            fd: parts.fd,
            dirty: DirtyTracker::new(&ram, false),
            ram,
            attached,
            logging: false,
            config,
            msr_list: config.cpu.cut(parts.msr_list),
            xsave_bytes: parts.xsave_bytes,
            host_clock: parts.clock,
            start_clock: None,
            running: false,
            life: 0,
            generation_id: GenerationId::random()?,
            boot: None,
            outbox: outbox.clone(),
            ended: Arc::clone(ended),
        };
        vm.start_threads(parts.vcpus)?;
        Ok(vm)
    }

    fn start_threads(&mut self, fds: Vec<VcpuFd>) -> Result<(), VmError> {
        let life = self.life;
        self.vcpus = fds
            .into_iter()
            .zip(0u8..)
            .map(|(fd, id)| {
                let (ended, leash) = (Arc::clone(&self.ended), self.outbox.leash());
                Vcpu::start(id, fd, Arc::clone(&self.bus), leash, move |id, end| {
                    ended(life, id, end)
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(())
    }

    /// Whether it can be restarted: it is known what it was booted from.
    #[must_use]
    pub fn can_restart(&self) -> bool {
        self.boot.is_some()
    }

    /// What a machine that was restored was booted from: a [`kept`] one.
    pub fn set_boot(&mut self, boot: Arc<Disk>) {
        self.boot = Some(boot);
    }

    /// How often it was restarted. What an [`Ended`] of an earlier life says is old.
    #[must_use]
    pub fn life(&self) -> u64 {
        self.life
    }

    /// What a PC does at a reset: all memory zero, all devices as new, the same kernel at its first instruction. KVM's
    /// VM is a new one; the memory, the bus and the virtio devices are the same objects. It does not run yet.
    ///
    /// Every page that was ever written is dirty afterwards: a delta on an earlier checkpoint says that it is zero.
    ///
    /// # Errors
    /// [`VmError`]: the machine is then of no use.
    pub fn restart(&mut self) -> Result<(), VmError> {
        // Opened while the memory is as it was: when that fails, nothing has been lost but a guest that has ended.
        let kept = kept::open(self.boot.as_ref().ok_or(VmError::NoKernel)?)?;
        let source = kept.source();
        // The threads end here, and with them the only users of what is replaced below.
        self.vcpus.clear();
        self.running = false;
        for device in &self.attached {
            device.device.reset();
        }
        let refused = |call| move |source| VmError::Clear { call, source };
        let written = self.ram.populated().map_err(refused("lseek"))?;
        self.ram.clear().map_err(refused("fallocate"))?;
        self.dirty.put_back(written.into_iter().flatten());
        let entry = boot::load(&self.ram, source, self.config.vcpus, &slots_of(&self.attached))?;
        // The same as before: after a reboot nothing is remembered twice.
        self.generation_id.write(&self.ram)?;
        let parts = Parts::new(self.config.vcpus)?;
        set_slots(&parts.fd, &self.ram, self.logging)?;
        parts.at_entry(self.config, entry)?;
        *self.bus.serial() = SerialPort::new(parts.serial_interrupt()?, self.outbox.writer());
        *self.bus.i8042() = I8042::default();
        // The CMOS clock has a battery. The old VM goes before its devices' eventfds are tied to the new one: an
        // eventfd belongs to one VM.
        self.fd = parts.fd;
        for device in &self.attached {
            tie(&self.fd, device)?;
        }
        self.life += 1;
        self.start_threads(parts.vcpus)
    }

    /// A machine with a saved state, whose memory `memory` makes, of so many bytes, and `load` fills. It does not run yet.
    ///
    /// Whether this host can run it is found out before the memory is loaded.
    ///
    /// # Errors
    /// [`VmError`], before anything has run.
    pub fn restore(
        saved: &MachineState,
        policy: ClockPolicy,
        memory: impl FnOnce(u64) -> Result<GuestRam, MemoryError>,
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
        let ram = Arc::new(memory(saved.config.memory_bytes)?);
        set_slots(&parts.fd, &ram, false)?;
        for (vcpu, (state, id)) in parts.vcpus.iter().zip(saved.vcpus.iter().zip(0u8..)) {
            state::restore(vcpu, id, state, parts.xsave_bytes, scales_tsc)?;
        }
        // After the vCPUs: the IOAPIC looks at their local APICs.
        let vm = |ioctl: &'static str| KvmError::ioctl(ioctl, "the VM");
        parts.fd.set_pit2(&saved.pit).map_err(vm("KVM_SET_PIT2"))?;
        for chip in &saved.irqchips {
            parts.fd.set_irqchip(chip).map_err(vm("KVM_SET_IRQCHIP"))?;
        }
        load(&ram).map_err(VmError::Load)?;
        // After the memory, which may take its time: none of it is the guest's.
        let start = SavedClock::of(saved, policy);
        start.restore(&parts.fd, parts.vcpus.iter(), parts.clock)?;
        // Devices last: an interrupt they raise must find the chips in place and not be overwritten.
        let serial = SerialPort::from_state(&saved.serial, parts.serial_interrupt()?, outbox.writer())?;
        let bus = Bus::new(
            serial,
            I8042::from_state(&saved.i8042)?,
            Rtc::from_state(&saved.rtc)?,
        );
        let attached = attach(&ram).map_err(VmError::Attach)?;
        let mut vm = Self::assemble(parts, saved.config, ram, bus, attached, (outbox, ended))?;
        vm.start_clock = start.until_first_run();
        Ok(vm)
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

    /// Its disks, in the order of their slots, and what it was booted from: each is an address space.
    pub fn disks(&self) -> impl Iterator<Item = &Arc<Disk>> {
        let disks = self.attached.iter().filter_map(|attached| attached.disk.as_ref());
        disks.chain(&self.boot)
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
        self.stop_vcpus()?;
        self.stop_devices()?;
        Ok(Paused(self))
    }

    /// The first half of [`Vm::pause`].
    ///
    /// # Errors
    /// [`VcpuError::Stuck`].
    pub fn stop_vcpus(&mut self) -> Result<(), VmError> {
        for vcpu in &self.vcpus {
            vcpu.ask_stop();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_parked()?;
        }
        self.running = false;
        Ok(())
    }

    /// The second half of [`Vm::pause`].
    ///
    /// # Errors
    /// [`VmError::Drain`].
    pub fn stop_devices(&self) -> Result<(), VmError> {
        // After the vCPUs, whose kicks are then all made; what is in flight ends before anything is saved (trap 1).
        for attached in &self.attached {
            attached.device.pause()?;
        }
        Ok(())
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
