//! The map between a machine's state and the records of a segment: the only place that knows both.
//!
//! | tag | version | payload |
//! |---|---|---|
//! | `machine` | 1 | CBOR: memory bytes, number of vCPUs, number of virtio devices, CPU model |
//! | `vcpu/N/mp_state`, `regs`, `sregs`, `xcrs`, `debugregs`, `lapic`, `events` | 1 | KVM's structure of that name, as the kernel's ABI lays it out |
//! | `vcpu/N/xsave` | 1 | the XSAVE area |
//! | `vcpu/N/cpuid` | 1 | `kvm_cpuid_entry2`, any number |
//! | `vcpu/N/msrs` | 1 | `kvm_msr_entry`, any number |
//! | `vcpu/N/tsc_khz` | 1 | u32 |
//! | `pit`, `clock`, `irqchip/0..2` | 1 | KVM's structure |
//! | `serial`, `i8042`, `rtc` | 1 | CBOR |
//! | `virtio/N` | 1 | CBOR: the device in slot N |
//!
//! KVM's structures are a stable ABI of little-endian integers without pointers. Their length is checked to the
//! byte: a shorter or longer one is refused, never padded.

use std::collections::HashMap;

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use segment::Record;
use vm_superio::serial::SerialState;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::cpuid;
use crate::cpuid::baseline::CpuModel;
use crate::devices::i8042::I8042State;
use crate::devices::rtc::RtcState;
use crate::kvm::XSAVE_MAX_BYTES;
use crate::memory::{MAX_MEMORY_BYTES, MIN_MEMORY_BYTES};
use crate::vcpu::msrs::MAX_MSRS;
use crate::vcpu::state::VcpuState;
use crate::vm::{MAX_VCPUS, MachineConfig, MachineState};

mod virtio;

const VERSION: u16 = 1;
/// A FIFO of the serial port holds 64 bytes.
const MAX_SERIAL_INPUT: usize = 64;

/// Why records are not the state of a machine this monitor can make.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A record is not there.
    #[error("the segment has no record {tag:?}: it is not a checkpoint of a VM, or it was cut")]
    Missing {
        /// Its tag.
        tag: String,
    },
    /// A record is of a version this monitor does not know, or one it may not skip.
    #[error(
        "record {tag:?} version {version} is not known to this monitor ({}): use a newer `vmm`",
        crate::PRODUCER
    )]
    Unknown {
        /// Its tag.
        tag: String,
        /// Its version.
        version: u16,
    },
    /// A record's content is not of its form.
    #[error("record {tag:?}: {why}")]
    Invalid {
        /// Its tag.
        tag: String,
        /// What is wrong.
        why: String,
    },
}

#[derive(minicbor::Encode, minicbor::Decode)]
#[cbor(map)]
struct MachineRecord {
    #[n(0)]
    memory_bytes: u64,
    #[n(1)]
    vcpus: u8,
    /// Number of virtio devices.
    #[n(2)]
    #[cbor(default)]
    virtio: u8,
    /// The CPU it is shown; absent: the host's it was booted on.
    #[n(3)]
    cpu: Option<String>,
}

#[derive(minicbor::Encode, minicbor::Decode)]
#[cbor(map)]
struct SerialRecord {
    #[n(0)]
    registers: [u8; 9],
    #[cbor(n(1), with = "minicbor::bytes")]
    input: Vec<u8>,
}

#[derive(minicbor::Encode, minicbor::Decode)]
#[cbor(map)]
struct I8042Record {
    #[n(0)]
    config: u8,
    #[n(1)]
    config_expected: bool,
    #[n(2)]
    output_full: bool,
}

#[derive(minicbor::Encode, minicbor::Decode)]
#[cbor(map)]
struct RtcRecord {
    #[n(0)]
    index: u8,
    #[cbor(n(1), with = "minicbor::bytes")]
    memory: Vec<u8>,
}

/// The records of a state.
#[must_use]
pub fn to_records(state: &MachineState) -> Vec<Record> {
    let mut out = Vec::with_capacity(16 + 12 * state.vcpus.len());
    let mut put = |tag: String, payload: Vec<u8>| {
        out.push(Record {
            tag,
            version: VERSION,
            critical: true,
            payload,
        })
    };
    let machine = MachineRecord {
        memory_bytes: state.config.memory_bytes,
        vcpus: state.config.vcpus,
        // A machine has at most MAX_VIRTIO_SLOTS.
        virtio: state.virtio.len() as u8,
        cpu: (state.config.cpu != CpuModel::Host).then(|| state.config.cpu.to_string()),
    };
    put("machine".into(), cbor(&machine));
    for (index, vcpu) in state.vcpus.iter().enumerate() {
        let mut part = |name: &str, payload: Vec<u8>| put(format!("vcpu/{index}/{name}"), payload);
        part("mp_state", vcpu.mp_state.as_bytes().to_vec());
        part("regs", vcpu.regs.as_bytes().to_vec());
        part("sregs", vcpu.sregs.as_bytes().to_vec());
        part("xsave", vcpu.xsave.clone());
        part("xcrs", vcpu.xcrs.as_bytes().to_vec());
        part("debugregs", vcpu.debug_regs.as_bytes().to_vec());
        part("lapic", vcpu.lapic.as_bytes().to_vec());
        part("tsc_khz", vcpu.tsc_khz.to_le_bytes().to_vec());
        part("cpuid", vcpu.cpuid.as_slice().as_bytes().to_vec());
        part("msrs", vcpu.msrs.as_slice().as_bytes().to_vec());
        part("events", vcpu.events.as_bytes().to_vec());
    }
    put("pit".into(), state.pit.as_bytes().to_vec());
    put("clock".into(), state.clock.as_bytes().to_vec());
    for (index, chip) in state.irqchips.iter().enumerate() {
        put(format!("irqchip/{index}"), chip.as_bytes().to_vec());
    }
    let s = &state.serial;
    let registers = [
        s.baud_divisor_low,
        s.baud_divisor_high,
        s.interrupt_enable,
        s.interrupt_identification,
        s.line_control,
        s.line_status,
        s.modem_control,
        s.modem_status,
        s.scratch,
    ];
    put(
        "serial".into(),
        cbor(&SerialRecord {
            registers,
            input: s.in_buffer.clone(),
        }),
    );
    let I8042State {
        config,
        config_expected,
        output_full,
    } = state.i8042;
    put(
        "i8042".into(),
        cbor(&I8042Record {
            config,
            config_expected,
            output_full,
        }),
    );
    put(
        "rtc".into(),
        cbor(&RtcRecord {
            index: state.rtc.index,
            memory: state.rtc.memory.clone(),
        }),
    );
    let virtio = state.virtio.iter().enumerate();
    out.extend(virtio.map(|(index, device)| virtio::to_record(index, device)));
    out
}

fn cbor<T: minicbor::Encode<()>>(value: &T) -> Vec<u8> {
    minicbor::to_vec(value).expect("encoding into memory does not fail")
}

/// Records not looked at yet.
struct Unread<'a>(HashMap<&'a str, &'a Record>);

impl<'a> Unread<'a> {
    fn take(&mut self, tag: &str) -> Result<&'a [u8], StateError> {
        let record = self
            .0
            .remove(tag)
            .ok_or_else(|| StateError::Missing { tag: tag.into() })?;
        if record.version != VERSION {
            return Err(StateError::Unknown {
                tag: tag.into(),
                version: record.version,
            });
        }
        Ok(&record.payload)
    }

    fn cbor<T: minicbor::Decode<'a, ()>>(&mut self, tag: &str) -> Result<T, StateError> {
        decode(tag, self.take(tag)?)
    }

    fn plain<T: FromBytes>(&mut self, tag: &str) -> Result<T, StateError> {
        let payload = self.take(tag)?;
        T::read_from_bytes(payload).map_err(|_| {
            invalid(
                tag,
                format!("it has {} bytes, not {}", payload.len(), size_of::<T>()),
            )
        })
    }

    fn list<T: FromBytes + Immutable + Clone>(
        &mut self,
        tag: &str,
        max: usize,
    ) -> Result<Vec<T>, StateError> {
        let payload = self.take(tag)?;
        let (size, length) = (size_of::<T>(), payload.len());
        if length % size != 0 || length / size > max {
            return Err(invalid(
                tag,
                format!("{length} bytes are not up to {max} entries of {size}"),
            ));
        }
        payload
            .chunks_exact(size)
            .map(|entry| {
                T::read_from_bytes(entry).map_err(|_| invalid(tag, "an entry has another size".into()))
            })
            .collect()
    }
}

fn decode<'a, T: minicbor::Decode<'a, ()>>(tag: &str, payload: &'a [u8]) -> Result<T, StateError> {
    let mut decoder = minicbor::Decoder::new(payload);
    let value = decoder.decode().map_err(|e| invalid(tag, e.to_string()))?;
    if decoder.position() != payload.len() {
        return Err(invalid(tag, "bytes follow its content".into()));
    }
    Ok(value)
}

fn invalid(tag: &str, why: String) -> StateError {
    StateError::Invalid { tag: tag.into(), why }
}

/// The state that records describe.
///
/// # Errors
/// [`StateError`] naming the record. A record that is not known and not critical is skipped.
pub fn from_records(records: &[Record]) -> Result<MachineState, StateError> {
    let mut unread = Unread(
        records
            .iter()
            .map(|record| (record.tag.as_str(), record))
            .collect(),
    );
    let machine: MachineRecord = unread.cbor("machine")?;
    if !(1..=MAX_VCPUS).contains(&machine.vcpus) {
        return Err(invalid(
            "machine",
            format!("{} vCPUs; 1 to {MAX_VCPUS} are possible", machine.vcpus),
        ));
    }
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&machine.memory_bytes) {
        return Err(invalid(
            "machine",
            format!("{} bytes of memory", machine.memory_bytes),
        ));
    }
    let cpu = match &machine.cpu {
        None => CpuModel::Host,
        Some(name) => name.parse().map_err(|why: String| invalid("machine", why))?,
    };
    let vcpus = (0..machine.vcpus)
        .map(|index| vcpu(&mut unread, index))
        .collect::<Result<Vec<_>, _>>()?;
    let state = MachineState {
        config: MachineConfig {
            memory_bytes: machine.memory_bytes,
            vcpus: machine.vcpus,
            cpu,
        },
        vcpus,
        pit: unread.plain("pit")?,
        clock: unread.plain("clock")?,
        irqchips: [
            unread.plain("irqchip/0")?,
            unread.plain("irqchip/1")?,
            unread.plain("irqchip/2")?,
        ],
        serial: serial(&unread.cbor("serial")?)?,
        i8042: i8042(&unread.cbor("i8042")?),
        rtc: rtc(unread.cbor("rtc")?),
        virtio: virtio::from_records(&mut unread, machine.virtio)?,
    };
    if let Some(record) = unread
        .0
        .into_values()
        .filter(|r| r.critical)
        .min_by(|a, b| a.tag.cmp(&b.tag))
    {
        return Err(StateError::Unknown {
            tag: record.tag.clone(),
            version: record.version,
        });
    }
    Ok(state)
}

fn vcpu(unread: &mut Unread<'_>, index: u8) -> Result<VcpuState, StateError> {
    let tag = |name: &str| format!("vcpu/{index}/{name}");
    let xsave = unread.take(&tag("xsave"))?;
    if xsave.len() > XSAVE_MAX_BYTES {
        return Err(invalid(
            &tag("xsave"),
            format!("{} bytes, more than {XSAVE_MAX_BYTES}", xsave.len()),
        ));
    }
    Ok(VcpuState {
        mp_state: unread.plain(&tag("mp_state"))?,
        regs: unread.plain(&tag("regs"))?,
        sregs: unread.plain(&tag("sregs"))?,
        xsave: xsave.to_vec(),
        xcrs: unread.plain(&tag("xcrs"))?,
        debug_regs: unread.plain(&tag("debugregs"))?,
        lapic: unread.plain(&tag("lapic"))?,
        tsc_khz: u32::from_le_bytes(unread.plain(&tag("tsc_khz"))?),
        cpuid: unread.list::<kvm_cpuid_entry2>(&tag("cpuid"), cpuid::MAX_ENTRIES)?,
        msrs: unread.list::<kvm_msr_entry>(&tag("msrs"), MAX_MSRS)?,
        events: unread.plain(&tag("events"))?,
    })
}

fn serial(record: &SerialRecord) -> Result<SerialState, StateError> {
    if record.input.len() > MAX_SERIAL_INPUT {
        return Err(invalid(
            "serial",
            format!(
                "{} bytes of input, more than {MAX_SERIAL_INPUT}",
                record.input.len()
            ),
        ));
    }
    let r = record.registers;
    Ok(SerialState {
        baud_divisor_low: r[0],
        baud_divisor_high: r[1],
        interrupt_enable: r[2],
        interrupt_identification: r[3],
        line_control: r[4],
        line_status: r[5],
        modem_control: r[6],
        modem_status: r[7],
        scratch: r[8],
        in_buffer: record.input.clone(),
    })
}

fn i8042(record: &I8042Record) -> I8042State {
    let I8042Record {
        config,
        config_expected,
        output_full,
    } = *record;
    I8042State {
        config,
        config_expected,
        output_full,
    }
}

fn rtc(record: RtcRecord) -> RtcState {
    RtcState {
        index: record.index,
        memory: record.memory,
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::QueueState;

    use super::*;
    use crate::devices::rtc::Rtc;
    use crate::devices::virtio::state::{BlockState, DeviceState, VirtioState};

    fn sample() -> MachineState {
        let mut vcpu = VcpuState {
            xsave: vec![7; 4096],
            tsc_khz: 2_600_000,
            ..Default::default()
        };
        vcpu.regs.rip = 0x1234_5678_9abc;
        vcpu.msrs = vec![kvm_msr_entry {
            index: 0x10,
            data: 99,
            ..Default::default()
        }];
        vcpu.cpuid = vec![
            kvm_cpuid_entry2 {
                function: 1,
                eax: 5,
                ..Default::default()
            };
            3
        ];
        MachineState {
            config: MachineConfig {
                memory_bytes: 64 << 20,
                vcpus: 2,
                cpu: CpuModel::V3,
            },
            vcpus: vec![vcpu.clone(), vcpu],
            pit: Default::default(),
            clock: Default::default(),
            irqchips: Default::default(),
            serial: SerialState {
                in_buffer: b"typed".to_vec(),
                scratch: 3,
                ..Default::default()
            },
            i8042: I8042State {
                config: 0x47,
                ..Default::default()
            },
            rtc: Rtc::default().state(),
            virtio: vec![VirtioState {
                name: "disk:root".into(),
                driver_features: 1 << 32 | 1 << 9,
                device_features_sel: 1,
                driver_features_sel: 1,
                queue_sel: 0,
                status: 15,
                config_generation: 2,
                interrupt_status: 1,
                queues: vec![QueueState {
                    max_size: 256,
                    size: 128,
                    next_avail: 7,
                    next_used: 6,
                    ready: true,
                    event_idx_enabled: true,
                    desc_table: 0x1000,
                    avail_ring: 0x2000,
                    used_ring: 0x3000,
                }],
                device: DeviceState::Block(BlockState {
                    bytes: 1 << 20,
                    read_only: false,
                    flush: true,
                }),
            }],
        }
    }

    #[test]
    fn what_goes_in_comes_out() {
        let records = to_records(&sample());
        let back = from_records(&records).unwrap();
        assert_eq!(to_records(&back), records);
        assert_eq!(back.config.cpu, CpuModel::V3);
        assert_eq!(back.vcpus[1].regs.rip, 0x1234_5678_9abc);
        assert_eq!(back.serial.in_buffer, b"typed");
        assert_eq!(back.virtio, sample().virtio);
    }

    #[test]
    fn every_record_is_needed_and_checked() {
        let records = to_records(&sample());
        for index in 0..records.len() {
            let tag = &records[index].tag;
            let mut without = records.clone();
            without.remove(index);
            assert!(from_records(&without).is_err(), "{tag} was not missed");
            let mut newer = records.clone();
            newer[index].version = 2;
            assert!(
                matches!(from_records(&newer), Err(StateError::Unknown { .. })),
                "{tag} of version 2 was taken"
            );
            if !tag.ends_with("/xsave") {
                let mut cut = records.clone();
                cut[index].payload.pop();
                assert!(
                    matches!(from_records(&cut), Err(StateError::Invalid { .. })),
                    "{tag} cut short was taken"
                );
                let mut long = records.clone();
                long[index].payload.push(0);
                assert!(
                    matches!(from_records(&long), Err(StateError::Invalid { .. })),
                    "{tag} too long was taken"
                );
            }
        }
    }

    #[test]
    fn an_unknown_record_is_skipped_only_if_it_may_be() {
        let mut records = to_records(&sample());
        let mut extra = Record {
            tag: "vsock".into(),
            version: 1,
            critical: false,
            payload: vec![1],
        };
        records.push(extra.clone());
        assert!(from_records(&records).is_ok());
        extra.critical = true;
        *records.last_mut().unwrap() = extra;
        assert!(from_records(&records).unwrap_err().to_string().contains("vsock"));
    }
}
