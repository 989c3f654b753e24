//! A machine that stands still: the only way to its state.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip};

use super::{MachineState, Vm, VmError};
use crate::clock;
use crate::kvm::KvmError;
use crate::vcpu::state;

/// A machine that stands still. Dropped, it stays so.
#[must_use = "dropped, the guest stays stopped"]
#[derive(Debug)]
pub struct Paused<'vm>(pub(super) &'vm mut Vm);

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
        let fds: Vec<_> = vm.vcpus.iter().map(|vcpu| vcpu.fd()).collect();
        let mut vcpus = fds
            .iter()
            .zip(0u8..)
            .map(|(fd, id)| state::save(fd, id, &vm.msr_list, vm.xsave_bytes))
            .collect::<Result<Vec<_>, _>>()?;
        let pit = vm.fd.get_pit2().map_err(on("KVM_GET_PIT2"))?;
        // After the vCPUs: it sets the TSCs just read to those of its own instant, so that none is later than a
        // deadline that "has just expired".
        let clock = clock::save(&vm.fd, fds.iter().map(|fd| &**fd), &mut vcpus, vm.host_clock)?;
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
    ///
    /// # Errors
    /// [`VmError::Kvm`] when a frozen clock cannot be set; the guest stays stopped.
    pub fn resume(self) -> Result<(), VmError> {
        let fds: Vec<_> = self.0.vcpus.iter().map(|vcpu| vcpu.fd()).collect();
        if let Some(clock) = &self.0.start_clock {
            clock.restore(&self.0.fd, fds.iter().map(|fd| &**fd), self.0.host_clock)?;
        }
        for fd in &fds {
            // Trap 6, as at the save: the guest's watchdog is not to count the time it stood still.
            let _ = fd.kvmclock_ctrl();
        }
        drop(fds);
        self.0.start_clock = None;
        self.0.run();
        Ok(())
    }
}
