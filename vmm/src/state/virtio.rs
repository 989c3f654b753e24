//! The record of a virtio device: `virtio/N`, N its slot.

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};
use segment::Record;
use virtio_queue::QueueState;

use super::{StateError, Unread, VERSION, cbor, invalid};
use crate::devices::virtio::state::{
    BalloonState, BlockState, DeviceState, MAX_NAME_BYTES, MAX_QUEUES, NetState, VirtioState, VsockState,
};
use crate::layout::MAX_VIRTIO_SLOTS;

#[derive(Encode, Decode)]
#[cbor(map)]
struct VirtioRecord {
    #[n(0)]
    name: String,
    /// Virtio's number.
    #[n(1)]
    kind: u32,
    #[n(2)]
    driver_features: u64,
    #[n(3)]
    device_features_sel: u32,
    #[n(4)]
    driver_features_sel: u32,
    #[n(5)]
    queue_sel: u32,
    #[n(6)]
    status: u32,
    #[n(7)]
    config_generation: u32,
    #[n(8)]
    interrupt_status: u32,
    #[n(9)]
    queues: Vec<QueueRecord>,
    /// The kind's own record.
    #[n(10)]
    device: ByteVec,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct QueueRecord {
    #[n(0)]
    max_size: u16,
    #[n(1)]
    next_avail: u16,
    #[n(2)]
    next_used: u16,
    #[n(3)]
    event_idx: bool,
    #[n(4)]
    size: u16,
    #[n(5)]
    ready: bool,
    #[n(6)]
    desc_table: u64,
    #[n(7)]
    avail_ring: u64,
    #[n(8)]
    used_ring: u64,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct BlockRecord {
    #[n(0)]
    bytes: u64,
    #[n(1)]
    read_only: bool,
    #[n(2)]
    flush: bool,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct NetRecord {
    #[n(0)]
    mac: minicbor::bytes::ByteArray<6>,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct VsockRecord {
    #[n(0)]
    guest_cid: u32,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct BalloonRecord {
    #[n(0)]
    target_pages: u32,
    #[n(1)]
    actual_pages: u32,
    #[n(2)]
    deflate_on_oom: bool,
    #[n(3)]
    stats_interval_s: u16,
    #[n(4)]
    reporting: bool,
}

fn queue_record(queue: &QueueState) -> QueueRecord {
    let QueueState {
        max_size,
        next_avail,
        next_used,
        event_idx_enabled,
        size,
        ready,
        desc_table,
        avail_ring,
        used_ring,
    } = *queue;
    QueueRecord {
        max_size,
        next_avail,
        next_used,
        event_idx: event_idx_enabled,
        size,
        ready,
        desc_table,
        avail_ring,
        used_ring,
    }
}

fn queue_state(record: &QueueRecord) -> QueueState {
    QueueState {
        max_size: record.max_size,
        next_avail: record.next_avail,
        next_used: record.next_used,
        event_idx_enabled: record.event_idx,
        size: record.size,
        ready: record.ready,
        desc_table: record.desc_table,
        avail_ring: record.avail_ring,
        used_ring: record.used_ring,
    }
}

/// The record of the device in slot `index`.
pub(super) fn to_record(index: usize, state: &VirtioState) -> Record {
    let device = match &state.device {
        DeviceState::Block(block) => cbor(&BlockRecord {
            bytes: block.bytes,
            read_only: block.read_only,
            flush: block.flush,
        }),
        DeviceState::Net(net) => cbor(&NetRecord { mac: net.mac.into() }),
        DeviceState::Rng => Vec::new(),
        DeviceState::Vsock(vsock) => cbor(&VsockRecord {
            guest_cid: vsock.guest_cid,
        }),
        DeviceState::Balloon(balloon) => cbor(&BalloonRecord {
            target_pages: balloon.target_pages,
            actual_pages: balloon.actual_pages,
            deflate_on_oom: balloon.deflate_on_oom,
            stats_interval_s: balloon.stats_interval_s,
            reporting: balloon.reporting,
        }),
    };
    Record {
        tag: format!("virtio/{index}"),
        version: VERSION,
        critical: true,
        payload: cbor(&VirtioRecord {
            name: state.name.clone(),
            kind: state.device.kind(),
            driver_features: state.driver_features,
            device_features_sel: state.device_features_sel,
            driver_features_sel: state.driver_features_sel,
            queue_sel: state.queue_sel,
            status: state.status,
            config_generation: state.config_generation,
            interrupt_status: state.interrupt_status,
            queues: state.queues.iter().map(queue_record).collect(),
            device: device.into(),
        }),
    }
}

/// The devices that `count` records describe, in the order of their slots.
pub(super) fn from_records(unread: &mut Unread<'_>, count: u8) -> Result<Vec<VirtioState>, StateError> {
    if usize::from(count) > MAX_VIRTIO_SLOTS {
        let why = format!("{count} virtio devices, more than {MAX_VIRTIO_SLOTS}");
        return Err(invalid("machine", why));
    }
    let mut states: Vec<VirtioState> = Vec::new();
    for index in 0..count {
        let tag = format!("virtio/{index}");
        let record: VirtioRecord = unread.cbor(&tag)?;
        if record.name.is_empty()
            || record.name.len() > MAX_NAME_BYTES
            || record.name.chars().any(char::is_control)
        {
            return Err(invalid(
                &tag,
                "its name is empty, too long, or not plain text".into(),
            ));
        }
        if states.iter().any(|state| state.name == record.name) {
            return Err(invalid(
                &tag,
                format!("a second device is named {:?}", record.name),
            ));
        }
        if record.queues.len() > MAX_QUEUES {
            return Err(invalid(
                &tag,
                format!("{} queues, more than {MAX_QUEUES}", record.queues.len()),
            ));
        }
        states.push(VirtioState {
            device: device(&tag, record.kind, &record.device)?,
            name: record.name,
            driver_features: record.driver_features,
            device_features_sel: record.device_features_sel,
            driver_features_sel: record.driver_features_sel,
            queue_sel: record.queue_sel,
            status: record.status,
            config_generation: record.config_generation,
            interrupt_status: record.interrupt_status,
            queues: record.queues.iter().map(queue_state).collect(),
        });
    }
    Ok(states)
}

fn device(tag: &str, kind: u32, payload: &[u8]) -> Result<DeviceState, StateError> {
    match kind {
        crate::devices::virtio::block::KIND => {
            let record: BlockRecord = super::decode(tag, payload)?;
            Ok(DeviceState::Block(BlockState {
                bytes: record.bytes,
                read_only: record.read_only,
                flush: record.flush,
            }))
        }
        crate::devices::virtio::net::KIND => {
            let record: NetRecord = super::decode(tag, payload)?;
            Ok(DeviceState::Net(NetState {
                mac: record.mac.into(),
            }))
        }
        crate::devices::virtio::rng::KIND if payload.is_empty() => Ok(DeviceState::Rng),
        crate::devices::virtio::vsock::KIND => {
            let VsockRecord { guest_cid } = super::decode(tag, payload)?;
            if !crate::devices::virtio::vsock::CIDS.contains(&guest_cid) {
                return Err(invalid(tag, format!("{guest_cid} is no guest's CID")));
            }
            Ok(DeviceState::Vsock(VsockState { guest_cid }))
        }
        crate::devices::virtio::balloon::KIND => {
            let record: BalloonRecord = super::decode(tag, payload)?;
            Ok(DeviceState::Balloon(BalloonState {
                target_pages: record.target_pages,
                actual_pages: record.actual_pages,
                deflate_on_oom: record.deflate_on_oom,
                stats_interval_s: record.stats_interval_s,
                reporting: record.reporting,
            }))
        }
        kind => Err(invalid(
            tag,
            format!("a virtio device of kind {kind}, which this monitor does not have"),
        )),
    }
}
