//! How fast segments reach a holder's disk.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use migrate::agent::{Agent, AgentConfig};
use migrate::checkpoint::{EncodeOptions, EncodePool};
use migrate::registry::{NewVm, RegistryAddr, Role};
use migrate::shipper::{ShipEvent, Shipper, ShipperConfig};
use migrate::spool::Spool;
use migrate::store::{Durability, FsStore};
use migrate::transport::CertRole;
use segment::SegmentName;
use tokio::sync::mpsc;

use super::lab::Lab;
use super::limits::{self, Random};
use super::pages::{self, Bytes};
use super::row::Row;
use super::stats::Samples;

const NAME: &str = "ship.rate";
const SHARE: f64 = 0.8;
/// How long a segment may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(120);

/// An agent in this process, on a port of the system's choice.
pub(crate) async fn agent(lab: &Lab, data: &Path) -> Result<Agent> {
    let config = AgentConfig {
        listen: "127.0.0.1:0".into(),
        advertise: None,
        data: data.to_owned(),
        identity: lab.identity("holder", &[CertRole::Store])?,
        roles: vec![Role::Store],
        registry: RegistryAddr::Embedded,
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
    };
    Agent::start(config).await.context("start an agent")
}

pub(crate) fn measure(lab: &Lab) -> Result<Vec<Row>> {
    let mib = if lab.quick() { 16 } else { 256 };
    let (own, held, bare) = (
        lab.temporary("owner-")?,
        lab.temporary("holder-")?,
        lab.temporary("limit-")?,
    );
    let store = FsStore::open(own.path(), None, Durability::Spool).context("open the owner's store")?;
    let bytes = Bytes(Random(2).bytes(mib << 20).into());
    let pool = EncodePool::new(EncodeOptions {
        level: 1,
        threads: super::lab::cores(),
    });
    let agent = lab.runtime().block_on(agent(lab, held.path()))?;
    let (mut rates, mut limit, mut tcp) = (Samples::default(), Samples::default(), Samples::default());
    for index in 0..=lab.samples(7, 2) {
        // A VM for each, as each is shipped from the beginning.
        let name = pages::name(&format!("ship-{index}"), 1)?;
        let (captured, manifest) = pages::full(&name, &bytes);
        let (stored, _) = pool
            .encode_to_store(&captured, &manifest, &store)
            .context("encode a segment")?;
        let length = stored.entry().bytes;
        let time = lab.runtime().block_on(ship(lab, &store, &name, &agent))?;
        agent.store().remove(&name).context("remove what was shipped")?;
        store.remove(&name).context("remove what was shipped")?;
        let (to_disk, alone) = limits::tcp_to_disk(bare.path(), &bytes.0)?;
        // The first is a rehearsal.
        if index > 0 {
            rates.push_rate(length, time);
            limit.push_rate(bytes.0.len() as u64, to_disk);
            tcp.push_rate(bytes.0.len() as u64, alone);
        }
    }
    lab.runtime().block_on(agent.stop());
    let row = Row::new(NAME, "MB/s of segments", &rates)?
        .limit(
            limit.median(),
            "as many bytes over loopback TCP into a file, synced and renamed, without TLS",
        )
        .at_least_of_limit(SHARE)
        .param("segment_mib", mib)
        .param("holders", 1)
        .param("tls", true)
        .param("disk", lab.disk())
        .seen("tcp_alone", tcp.median());
    Ok(vec![row])
}

/// Ships what the owner's store has of this VM; from the first connection to the acknowledgement.
async fn ship(lab: &Lab, store: &Arc<FsStore>, name: &SegmentName, holder: &Agent) -> Result<Duration> {
    let spool = Spool::new(Arc::clone(store), name.vm.clone(), 1);
    let identity = lab.identity("owner", &[CertRole::Owner])?;
    let new = NewVm {
        vm: name.vm.clone(),
        owner: identity.name().to_owned(),
        holders: vec![holder.address().to_owned()],
        ack_quorum: 1,
        every_ms: 200,
        policy: None,
    };
    let record = holder.registry().create_vm(new).await;
    let generation = record.context("register the VM")?.generation;
    let config = ShipperConfig::new(
        name.vm.clone(),
        generation,
        &identity,
        vec![holder.address().to_owned()],
        1,
        None,
    );
    let (events, mut inbox) = mpsc::unbounded_channel();
    let start = Instant::now();
    let shipper = Shipper::start(&tokio::runtime::Handle::current(), config, spool, events);
    let committed = async {
        while let Some(event) = inbox.recv().await {
            match event {
                ShipEvent::Committed { .. } => return Ok(start.elapsed()),
                ShipEvent::HolderDown { why, .. } => bail!("the holder went away: {why}"),
                ShipEvent::Fenced { current, .. } => bail!("the holder has promised generation {current}"),
                ShipEvent::Forgotten { .. } => bail!("the registry does not know the VM any more"),
                ShipEvent::NeedFull { .. } => bail!("the holder asks for another full segment"),
                ShipEvent::HolderUp { .. }
                | ShipEvent::HoldersChanged { .. }
                | ShipEvent::Electors { .. }
                | ShipEvent::Granted { .. }
                | ShipEvent::Renewed { .. } => {}
            }
        }
        bail!("the shipper ended")
    };
    let time = tokio::time::timeout(PATIENCE, committed)
        .await
        .context("the segment was not acknowledged in time")?;
    shipper.stop().await;
    time
}
