//! What the network tests share: synthetic checkpoints, agents in this process, and waiting for conditions.
#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

pub mod authority;
pub mod etcd;
pub mod model;
pub mod process;
pub mod s3;

use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use migrate::agent::{Agent, AgentConfig};
use migrate::registry::{NewVm, Registry, RegistryAddr, Role};
use migrate::shipper::{ShipEvent, Shipper, ShipperConfig};
use migrate::spool::Spool;
use migrate::store::{Durability, Entry, FsStore};
use migrate::transport::Identity;
use segment::{
    CheckpointId, Epoch, FrameEncoder, Generation, Kind, Manifest, PageIndex, Record, SegmentName,
    SegmentWriter, Space, SpaceId, VmId, pages_per_frame,
};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How long a condition may take before a test fails: far more than it needs.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn vm(id: &str) -> VmId {
    VmId::new(id).unwrap()
}

pub fn name(id: &str, generation: u64, epoch: u64) -> SegmentName {
    SegmentName::new(vm(id), Generation(generation), Epoch(epoch))
}

/// The bytes of a segment: `pages` of content that does not compress, different for every seed.
pub fn segment_bytes(
    name: &SegmentName,
    checkpoint: CheckpointId,
    parent: Option<(&SegmentName, CheckpointId)>,
    pages: u64,
) -> Vec<u8> {
    other_bytes(name, checkpoint, parent, pages, 0)
}

/// The same, of as many bytes, with other content for every `salt`.
pub fn other_bytes(
    name: &SegmentName,
    checkpoint: CheckpointId,
    parent: Option<(&SegmentName, CheckpointId)>,
    pages: u64,
    salt: u64,
) -> Vec<u8> {
    let space = Space {
        id: SpaceId::MEMORY,
        name: "memory".into(),
        page_bytes: 4096,
        pages: pages.max(16),
    };
    let kind = match parent {
        None => Kind::Full,
        Some((parent, parent_checkpoint)) => Kind::Delta {
            parent: parent.clone(),
            parent_checkpoint,
        },
    };
    let full = kind.is_full();
    let manifest = Manifest {
        name: name.clone(),
        checkpoint,
        links: u32::from(!full),
        kind,
        created_unix_ns: 1_700_000_000_000_000_000,
        producer: "net tests".into(),
        spaces: vec![space.clone()],
        first_epoch: None,
        label: None,
        encryption: None,
    };
    let record = Record {
        tag: "vcpu/0".into(),
        version: 1,
        critical: true,
        payload: vec![7; 100],
    };
    let mut writer = SegmentWriter::new(Cursor::new(Vec::new()), &manifest, &[record]).unwrap();
    let mut encoder = FrameEncoder::new(1);
    let mut state = u64::from_le_bytes(checkpoint.0[..8].try_into().unwrap()) ^ salt << 1 | 1;
    let mut next = || {
        // xorshift: what zstd cannot make smaller.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let all: Vec<_> = (0..pages).map(PageIndex).collect();
    for frame in all.chunks(pages_per_frame(4096)) {
        let data: Vec<u8> = (0..frame.len() * 512)
            .flat_map(|_| next().to_le_bytes())
            .collect();
        if let Some(frame) = encoder.encode(&space, full, frame, &data).unwrap() {
            writer.push(frame).unwrap();
        }
    }
    writer.finish().unwrap().0.into_inner()
}

/// A checkpoint id that says which name it is of.
pub fn checkpoint_of(name: &SegmentName, salt: u8) -> CheckpointId {
    let mut id = [salt; 16];
    id[..8].copy_from_slice(&(name.epoch.0 << 8 | name.generation.0 | 1 << 40).to_le_bytes());
    CheckpointId(id)
}

/// Stores a segment in a store, as the protect loop does.
pub fn put(store: &Arc<FsStore>, name: &SegmentName, parent: Option<&SegmentName>, pages: u64) -> Entry {
    use std::io::Write;
    let parent = parent.map(|p| (p, checkpoint_of(p, 1)));
    let bytes = segment_bytes(name, checkpoint_of(name, 1), parent, pages);
    let mut incoming = store.begin(name, bytes.len() as u64).unwrap();
    incoming.write_all(&bytes).unwrap();
    incoming.commit().unwrap().entry().clone()
}

/// Who a test is.
pub fn tester() -> Identity {
    Identity::plaintext("test")
}

pub fn config(dir: &Path, node: &str, registry: RegistryAddr) -> AgentConfig {
    AgentConfig {
        listen: "127.0.0.1:0".into(),
        advertise: None,
        data: dir.join(node),
        identity: Identity::plaintext(node),
        roles: vec![Role::Execute, Role::Store],
        registry,
        budget: None,
        vmm: None,
        offers: Vec::new(),
        hot: Default::default(),
        drill_every: None,
        global: None,
        metrics: None,
        key_file: None,
        replace: false,
        run_dir: None,
        restore_timeout: None,
        housekeeping: Default::default(),
        labels: Default::default(),
        etcd: Default::default(),
        lease_ttl: migrate::agent::LEASE_TTL,
        replace_after: migrate::agent::REPLACE_AFTER,
    }
}

/// An agent that keeps the registry.
pub async fn first_agent(dir: &Path) -> Agent {
    Agent::start(config(dir, "a", RegistryAddr::Embedded))
        .await
        .unwrap()
}

pub async fn agent_with(dir: &Path, node: &str, registry: &Agent) -> Agent {
    let registry = RegistryAddr::Agent(registry.address().to_owned());
    Agent::start(config(dir, node, registry)).await.unwrap()
}

/// Where an agent was, so that it can be started there again.
pub fn again(dir: &Path, node: &str, registry: RegistryAddr, address: &str) -> AgentConfig {
    AgentConfig {
        listen: address.to_owned(),
        ..config(dir, node, registry)
    }
}

pub async fn create(registry: &Registry, id: &str, holders: &[&str], ack_quorum: u32) -> Generation {
    let new = NewVm {
        vm: vm(id),
        owner: "owner".into(),
        holders: holders.iter().map(|h| (*h).to_owned()).collect(),
        ack_quorum,
        every_ms: 200,
        policy: None,
    };
    registry.create_vm(new).await.unwrap().generation
}

/// An owner: a spool with a chain that grows, and a shipper.
pub struct Owner {
    pub vm: VmId,
    pub generation: Generation,
    pub store: Arc<FsStore>,
    pub spool: Arc<Spool>,
    pub shipper: Shipper,
    pub events: mpsc::UnboundedReceiver<ShipEvent>,
    pub epoch: u64,
    /// Wants the next checkpoint to be full.
    pub full: bool,
    pub seen: Vec<ShipEvent>,
}

impl Owner {
    pub fn start(
        dir: &Path,
        id: &str,
        generation: Generation,
        holders: &[&str],
        quorum: usize,
        registry: Option<Registry>,
    ) -> Self {
        Self::tuned(dir, id, generation, holders, quorum, registry, |_| {})
    }

    pub fn tuned(
        dir: &Path,
        id: &str,
        generation: Generation,
        holders: &[&str],
        quorum: usize,
        registry: Option<Registry>,
        tune: impl FnOnce(&mut ShipperConfig),
    ) -> Self {
        let store = FsStore::open(&dir.join(format!("spool-{generation}")), None, Durability::Spool).unwrap();
        let spool = Spool::new(store.clone(), vm(id), 1);
        let (tell, events) = mpsc::unbounded_channel();
        let holders = holders.iter().map(|h| (*h).to_owned()).collect();
        let mut config = ShipperConfig::new(
            vm(id),
            generation,
            &Identity::plaintext("owner"),
            holders,
            quorum,
            registry,
        );
        tune(&mut config);
        let shipper = Shipper::start(&tokio::runtime::Handle::current(), config, spool.clone(), tell);
        Self {
            vm: vm(id),
            generation,
            store,
            spool,
            shipper,
            events,
            epoch: 0,
            full: true,
            seen: Vec::new(),
        }
    }

    pub fn name(&self, epoch: u64) -> SegmentName {
        SegmentName::new(self.vm.clone(), self.generation, Epoch(epoch))
    }

    /// The next checkpoint: full when it is the first or one was asked for, else a delta on the one before.
    pub fn take(&mut self, pages: u64) -> SegmentName {
        self.epoch += 1;
        let name = self.name(self.epoch);
        let parent = (!std::mem::take(&mut self.full)).then(|| self.name(self.epoch - 1));
        put(&self.store, &name, parent.as_ref(), pages);
        self.shipper.notify();
        name
    }

    /// Waits for an event; asks for a full checkpoint are noted on the way.
    pub async fn wait_event(&mut self, what: &str, mut wanted: impl FnMut(&ShipEvent) -> bool) -> ShipEvent {
        let waiting = async {
            loop {
                let event = self.events.recv().await.expect("the shipper lives");
                self.seen.push(event.clone());
                if matches!(event, ShipEvent::NeedFull { .. }) {
                    self.full = true;
                }
                if wanted(&event) {
                    return event;
                }
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(event) => event,
            Err(_) => panic!(
                "{what} did not happen; seen: {:?}; {:?}",
                self.seen,
                self.shipper.status()
            ),
        }
    }

    pub async fn wait_committed(&mut self, name: &SegmentName) {
        let is = |e: &ShipEvent| matches!(e, ShipEvent::Committed { name: n, .. } if n >= name);
        if self.shipper.status().committed.as_ref() < Some(name) {
            self.wait_event(&format!("commit of {name}"), is).await;
        }
    }
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < PATIENCE,
            "{what} did not come true within {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
