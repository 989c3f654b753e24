//! The VM generation id: 16 random bytes in a page of the guest's memory, others after each restore.
//!
//! By it a guest learns that what it remembers may be known elsewhere, or may never have happened to the rest of the
//! world: random numbers, keys and unique names drawn from here on must not be those of another run from the same
//! state. Microsoft's "Virtual Machine Generation ID" paper lists when it changes; a takeover by a replica is among
//! them. A reboot is not.

use std::mem::offset_of;

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_ioapic_state, kvm_irqchip};
use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::{Vm, VmError};
use crate::kvm::KvmError;
use crate::layout::{EVENT_GSI, GENERATION_ID};
use crate::memory::GuestRam;
use crate::random;

/// One machine's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GenerationId([u8; 16]);

impl GenerationId {
    /// One that nobody has had.
    pub(super) fn random() -> Result<Self, VmError> {
        random::bytes().map(Self).map_err(VmError::GenerationId)
    }

    /// Puts it where the guest looks for it.
    pub(super) fn write(self, ram: &GuestRam) -> Result<(), VmError> {
        ram.memory()
            .write_slice(&self.0, GuestAddress(GENERATION_ID))
            .map_err(|error| VmError::GenerationId(std::io::Error::other(error)))
    }
}

impl Vm {
    /// Gives the guest a new generation id, and tells it so. The page is a write of the monitor's own: the next delta
    /// has it.
    ///
    /// # Errors
    /// [`VmError::GenerationId`], [`VmError::Kvm`].
    pub fn new_generation_id(&mut self) -> Result<(), VmError> {
        self.generation_id = GenerationId::random()?;
        self.generation_id.write(&self.ram)?;
        raise(&self.fd)
    }
}

/// An edge on the event device's line, for a guest that has a driver for it: one that never set up its interrupt
/// controllers would find an interrupt in them that it cannot place.
fn raise(fd: &VmFd) -> Result<(), VmError> {
    let on = |ioctl: &'static str| KvmError::ioctl(ioctl, "the event device's line");
    let mut ioapic = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..kvm_irqchip::default()
    };
    fd.get_irqchip(&mut ioapic).map_err(on("KVM_GET_IRQCHIP"))?;
    if pin_is_masked(&ioapic, EVENT_GSI) {
        return Ok(());
    }
    for level in [true, false] {
        fd.set_irq_line(EVENT_GSI, level).map_err(on("KVM_IRQ_LINE"))?;
    }
    Ok(())
}

/// Bit 16 of a redirection entry (82093AA, 3.2.4).
fn pin_is_masked(ioapic: &kvm_irqchip, pin: u32) -> bool {
    const ENTRIES: usize = offset_of!(kvm_irqchip, chip) + offset_of!(kvm_ioapic_state, redirtbl);
    let at = ENTRIES + pin as usize * size_of::<u64>();
    let entry = ioapic.as_bytes()[at..].first_chunk();
    entry.is_none_or(|entry| u64::from_le_bytes(*entry) & (1 << 16) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_that_of_the_pin() {
        let mut chip = kvm_irqchip::default();
        // The bytes of the union, as KVM has them: 24 of other registers, then 8 for each pin.
        let bytes = chip.as_mut_bytes();
        let entry = |pin: usize| 8 + 24 + 8 * pin;
        for pin in 0..24 {
            bytes[entry(pin) + 2] = 1;
        }
        assert!(pin_is_masked(&chip, EVENT_GSI));
        chip.as_mut_bytes()[entry(9) + 2] = 0;
        assert!(!pin_is_masked(&chip, EVENT_GSI));
        assert!(pin_is_masked(&chip, 8));
        assert!(pin_is_masked(&chip, 10));
    }
}
