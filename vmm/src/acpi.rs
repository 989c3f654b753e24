//! The ACPI tables: what a kernel cannot find out by probing.
//!
//! ```text
//! RSDP --> XSDT --> FADT --> DSDT   COM1, CMOS clock, virtio-mmio slots, generation id, event device, \_S5
//!               \-> MADT            local APICs, IOAPIC, the timer's line
//! ```
//!
//! The machine is "hardware reduced": no PM timer, no SCI and no PM1 registers, and so nothing of them in a
//! checkpoint. Power off is one write to the sleep control register, reset one write to the reset register, and the
//! generation id is announced through a generic event device (ACPI 6.5, 5.6.9) with a line of its own.
//!
//! The tables lie in RAM: a restored machine has those it was booted with.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::layout::{
    ACPI_TABLES, ACPI_TABLES_END, EVENT_GSI, GENERATION_ID, IOAPIC, LOCAL_APIC, RESET_PORT, RESET_VALUE,
    RSDP, RTC_GSI, SERIAL_GSI, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, VIRTIO_MMIO_BYTES, VirtioSlot,
};

const OEM: [u8; 6] = *b"UNDRST";
const OEM_TABLE: [u8; 8] = *b"UNDERSTD";
const OEM_REVISION: u32 = 1;
/// The length of a table's header.
const HEADER_BYTES: u32 = 36;
/// The DSDT's revision from which integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// ACPI 6.5's.
const MADT_REVISION: u8 = 5;
/// MADT flags: there are also two 8259s.
const PCAT_COMPAT: u32 = 1;
/// FADT, IA-PC boot architecture: devices on ISA, no VGA, no MSI. The keyboard controller is left out: it has no
/// keyboard, and a kernel would wait for one.
const BOOT_ARCHITECTURE: u16 = (1 << 0) | (1 << 2) | (1 << 3);

/// A table and where it goes.
pub type Placed = (u64, Vec<u8>);

/// The tables of a machine, with their guest physical addresses.
#[must_use]
pub fn tables(vcpus: u8, slots: &[VirtioSlot]) -> Vec<Placed> {
    let mut next = ACPI_TABLES;
    let mut placed = Vec::new();
    let mut place = |bytes: Vec<u8>| {
        let at = next;
        next += (bytes.len() as u64).next_multiple_of(16);
        // Sized by constants: MAX_VCPUS and MAX_VIRTIO_SLOTS need a tenth of it.
        assert!(next <= ACPI_TABLES_END, "the ACPI tables outgrow their place");
        placed.push((at, bytes));
        at
    };
    let dsdt = place(dsdt(slots));
    let fadt = place(fadt(dsdt));
    let madt = place(madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    placed.push((RSDP, bytes(&Rsdp::new(OEM, xsdt))));
    placed
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address.into(),
    )
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        // No buttons: "fixed" ones would need the PM1 registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    bytes(&fadt.finalize())
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut madt = Sdt::new(
        *b"APIC",
        HEADER_BYTES,
        MADT_REVISION,
        OEM,
        OEM_TABLE,
        OEM_REVISION,
    );
    madt.append(LOCAL_APIC);
    madt.append(PCAT_COMPAT);
    for id in 0..vcpus {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    // The IOAPIC's id is behind those of the local APICs.
    madt.append_slice(&bytes(&IoApic::new(vcpus, IOAPIC, 0)));
    // Interrupt source override: ISA's line 0 (the timer) is pin 2, as KVM routes it; bus default polarity and trigger.
    madt.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    // NMI through LINT1 of every local APIC.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt.as_slice().to_vec()
}

fn dsdt(slots: &[VirtioSlot]) -> Vec<u8> {
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        DSDT_REVISION,
        OEM,
        OEM_TABLE,
        OEM_REVISION,
    );
    let mut add = |aml: &dyn Aml| dsdt.append_slice(&bytes(aml));
    add(&Sleep);
    add(&Com1);
    add(&Clock);
    slots.iter().for_each(|slot| add(&Virtio(*slot)));
    add(&GenerationId);
    add(&Events);
    dsdt.as_slice().to_vec()
}

/// An edge triggered, active high line that nobody else uses.
fn line(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn name(name: &str, value: &dyn Aml) -> Vec<u8> {
    bytes(&Name::new(name.into(), value))
}

/// AML that is already encoded.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// A device in `\_SB_`.
fn device(sink: &mut dyn AmlSink, path: &str, parts: Vec<Vec<u8>>) {
    let parts: Vec<Raw> = parts.into_iter().map(Raw).collect();
    let device = Device::new(path.into(), parts.iter().map(|part| part as &dyn Aml).collect());
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(sink);
}

/// `\_S5`: sleep type 5 is "off".
struct Sleep;

impl Aml for Sleep {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Name::new("\\_S5_".into(), &Package::new(vec![&5u8, &ZERO, &ZERO, &ZERO])).to_aml_bytes(sink);
    }
}

struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let resources = ResourceTemplate::new(vec![&IO::new(0x3f8, 0x3f8, 0, 8), &line(SERIAL_GSI)]).bytes();
        device(
            sink,
            "COM1",
            vec![
                name("_HID", &EISAName::new("PNP0501")),
                name("_UID", &ZERO),
                name("_CRS", &Raw(resources)),
            ],
        );
    }
}

struct Clock;

impl Aml for Clock {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let resources = ResourceTemplate::new(vec![&IO::new(0x70, 0x70, 0, 2), &line(RTC_GSI)]).bytes();
        device(
            sink,
            "RTC_",
            vec![
                name("_HID", &EISAName::new("PNP0B00")),
                name("_CRS", &Raw(resources)),
            ],
        );
    }
}

/// A virtio-mmio window, as Linux finds it (drivers/virtio/virtio_mmio.c).
struct Virtio(VirtioSlot);

impl Aml for Virtio {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(slot) = *self;
        // The windows lie below 4 GiB (layout.rs).
        let window = Memory32Fixed::new(true, slot.address() as u32, VIRTIO_MMIO_BYTES as u32);
        let resources = ResourceTemplate::new(vec![&window, &line(slot.gsi())]).bytes();
        device(
            sink,
            &format!("V{:03}", slot.number()),
            vec![
                name("_HID", &"LNRO0005"),
                name("_UID", &slot.number()),
                // DMA is coherent.
                name("_CCA", &ONE),
                name("_CRS", &Raw(resources)),
            ],
        );
    }
}

/// The VM generation id, as Microsoft's "Virtual Machine Generation ID" paper and Linux' vmgenid.c have it: `ADDR`
/// is a package of the low and the high half of the address.
struct GenerationId;

impl Aml for GenerationId {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
        device(
            sink,
            "VGEN",
            vec![
                name("_HID", &"UNDR0001"),
                name("_CID", &"VM_Gen_Counter"),
                name("_DDN", &"VM_Gen_Counter"),
                name("ADDR", &Package::new(vec![&low, &high])),
            ],
        );
    }
}

/// The generic event device: its line means "the generation id has changed".
struct Events;

impl Aml for Events {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let resources = ResourceTemplate::new(vec![&line(EVENT_GSI)]).bytes();
        let target = Path::new("\\_SB_.VGEN");
        let notify = Notify::new(&target, &0x80u8);
        let event = Equal::new(&Arg(0), &EVENT_GSI);
        let when = If::new(&event, vec![&notify]);
        let method = Method::new("_EVT".into(), 1, true, vec![&when]);
        device(
            sink,
            "GED_",
            vec![
                name("_HID", &"ACPI0013"),
                name("_UID", &ZERO),
                name("_CRS", &Raw(resources)),
                bytes(&method),
            ],
        );
    }
}

/// The bytes of a resource template, which is dropped with what it borrows.
trait Encoded {
    fn bytes(&self) -> Vec<u8>;
}

impl Encoded for ResourceTemplate<'_> {
    fn bytes(&self) -> Vec<u8> {
        bytes(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MAX_VIRTIO_SLOTS;
    use crate::vm::MAX_VCPUS;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_root_and_adds_up() {
        let slots: Vec<_> = (0..MAX_VIRTIO_SLOTS as u8).filter_map(VirtioSlot::new).collect();
        let placed = tables(MAX_VCPUS, &slots);
        let at = |address: u64| {
            let (_, bytes) = placed.iter().find(|(at, _)| *at == address).unwrap();
            assert_eq!(sum(bytes), 0, "checksum at {address:#x}");
            bytes
        };
        let u64_at =
            |bytes: &[u8], offset: usize| u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap());
        let root = at(RSDP);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!(sum(&root[..20]), 0);
        let xsdt = at(u64_at(root, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let (fadt, madt) = (at(u64_at(xsdt, 36)), at(u64_at(xsdt, 44)));
        assert_eq!(&fadt[..4], b"FACP");
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(&at(u64_at(fadt, 140))[..4], b"DSDT");
        for (_, table) in placed.iter().filter(|(at, _)| *at != RSDP) {
            let length = u32::from_le_bytes(table[4..8].try_into().unwrap());
            assert_eq!(length as usize, table.len());
        }
        assert_eq!(madt.len(), 44 + 8 * usize::from(MAX_VCPUS) + 12 + 10 + 6);
        for (at, bytes) in &placed {
            assert!(at + bytes.len() as u64 <= ACPI_TABLES_END);
        }
    }

    #[test]
    fn the_device_table_has_the_slots_that_are_taken_and_no_others() {
        let text = |slots: &[VirtioSlot]| String::from_utf8_lossy(&dsdt(slots)).into_owned();
        let three = VirtioSlot::new(3).unwrap();
        let with = text(&[three]);
        assert!(with.contains("V003") && !with.contains("V000") && with.contains("LNRO0005"));
        assert!(with.contains("VM_Gen_Counter") && with.contains("ACPI0013"));
        assert!(!text(&[]).contains("LNRO0005"));
        let address = (three.address() as u32).to_le_bytes();
        assert!(dsdt(&[three]).windows(4).any(|w| w == address));
    }
}
