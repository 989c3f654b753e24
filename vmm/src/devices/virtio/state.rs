//! The state of a virtio device: plain, untrusted. It names nothing of the host.

use virtio_queue::QueueState;

/// The most queues of one device.
pub const MAX_QUEUES: usize = 8;
/// The longest logical name.
pub const MAX_NAME_BYTES: usize = 64;

/// A device and its transport.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioState {
    /// Its logical name, like `disk:root`.
    pub name: String,
    /// The features the driver has taken.
    pub driver_features: u64,
    /// The half of the offered features that is read.
    pub device_features_sel: u32,
    /// The half of the taken features that is written.
    pub driver_features_sel: u32,
    /// The queue the registers speak of.
    pub queue_sel: u32,
    /// The status register.
    pub status: u32,
    /// The configuration's generation.
    pub config_generation: u32,
    /// The interrupt status register.
    pub interrupt_status: u32,
    /// Its queues.
    pub queues: Vec<QueueState>,
    /// What its kind has beside.
    pub device: DeviceState,
}

/// What a kind of device has beside its transport.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceState {
    /// A disk.
    Block(BlockState),
    /// A network card.
    Net(NetState),
    /// Entropy: nothing.
    Rng,
    /// Stream sockets.
    Vsock(VsockState),
    /// A balloon.
    Balloon(BalloonState),
}

/// A disk, without its content, which is an address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockState {
    /// Its size in bytes.
    pub bytes: u64,
    /// The guest may not write.
    pub read_only: bool,
    /// Flushes are offered to the guest.
    pub flush: bool,
}

/// A network card, without its frames, which are the network's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetState {
    /// Its hardware address.
    pub mac: super::net::Mac,
}

/// Stream sockets, without the connections, which are the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockState {
    /// The guest's address.
    pub guest_cid: u32,
}

/// A balloon. The pages in it are holes of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonState {
    /// Pages of 4 KiB that the guest is to give.
    pub target_pages: u32,
    /// Pages that it has given, as it says.
    pub actual_pages: u32,
    /// It may take memory back when it has too little.
    pub deflate_on_oom: bool,
    /// Seconds from one set of its numbers to the next; 0: never.
    pub stats_interval_s: u16,
    /// It reports memory that it has no use for.
    pub reporting: bool,
}

impl DeviceState {
    /// Virtio's number for the kind of device.
    #[must_use]
    pub fn kind(&self) -> u32 {
        match self {
            Self::Block(_) => super::block::KIND,
            Self::Net(_) => super::net::KIND,
            Self::Rng => super::rng::KIND,
            Self::Vsock(_) => super::vsock::KIND,
            Self::Balloon(_) => super::balloon::KIND,
        }
    }
}
