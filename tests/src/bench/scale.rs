//! What many VMs cost: `standby status`, and the memory of an agent that holds all of them.
//!
//! ```text
//! etcd (a real one) <-- 1,000 VMs of 100 segments each, 9 simulated nodes     through the registry's own API
//!       ^
//! standby serve (a process), whose store holds all 100,000 segments <-- standby status (a process)
//! ```
//!
//! The VMs have no owner that runs, and no lease: nobody takes them over.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use migrate::protocol::parent_of;
use migrate::registry::{
    EtcdAccess, LeaseSubject, MAX_LEASE_MS, MAX_REGISTER_SEGMENTS, NewVm, NodeRecord, Registry, Role,
    SegmentRecord, random_id, random_lease,
};
use migrate::store::{Entry, FsStore};
use tokio::task::JoinSet;

use super::lab::Lab;
use super::recover::{fill, vm_name};
use super::row::Row;
use super::stats::Samples;
use crate::etcd::Etcd;
use crate::harness::{Cluster, run, run_json};

const STATUS: &str = "status.ms";
const STATUS_TARGET_MS: f64 = 1000.0;
const MEMORY: &str = "agent.rss_mib";
const MEMORY_TARGET_MIB: f64 = 200.0;
/// Restore points of a VM.
const POINTS: u64 = 100;
/// Nodes that are only in the registry.
const NODES: usize = 9;
/// Tasks that fill the registry.
const WRITERS: usize = 16;
/// For how long the agent is left to itself before its memory is looked at again: it looks at the registry every second
/// and every ten.
const SETTLE: Duration = Duration::from_secs(12);

pub(crate) fn measure(lab: &Lab) -> Result<Vec<Row>> {
    let vms = lab.samples(1000, 20) as u64;
    let segments = vms * POINTS;
    let (folder, etcd) = (lab.temporary("scale-")?, Etcd::start(1));
    let mut cluster = Cluster::new(folder.path(), false)?;
    cluster.use_registry(&etcd.registry_addr("small").to_string());
    let small = cluster.start_agent("small", &[])?;
    lab.say(format!("  storing {segments} segments"));
    let data = cluster.folder().join("large");
    fill(&data, segments as usize, POINTS)?;
    cluster.use_registry(&etcd.registry_addr("large").to_string());
    let large = cluster.start_agent("large", &[])?;
    let pids: Vec<u32> = cluster
        .agent_pids()
        .iter()
        .map(|pid| pid.parse().context("the number of a process"))
        .collect::<Result<_>>()?;
    let cold = memory_mib(pids[large], "VmRSS:")?;
    let address = cluster.agents[large].address.clone();
    let registered = Instant::now();
    lab.say(format!("  registering {segments} segments of {vms} VMs"));
    let access = EtcdAccess::default();
    let registry = migrate::registry::Etcd::new(&etcd.addr("large"), &access).context("use etcd")?;
    lab.runtime().block_on(register(
        Registry::new(registry),
        &data.join("store"),
        vms,
        &address,
    ))?;
    let registering = registered.elapsed();
    let (quiet, before) = (Instant::now(), asked(etcd.client(0))?);
    std::thread::sleep(if lab.quick() {
        Duration::from_secs(1)
    } else {
        SETTLE
    });
    let (after, quiet) = (asked(etcd.client(0))?, quiet.elapsed().as_secs_f64());

    let (mut times, mut json, mut limit) = (Samples::default(), Samples::default(), Samples::default());
    let (mut memory, mut empty) = (Samples::default(), Samples::default());
    let status = |agent: usize| {
        let mut command = cluster.standby(agent);
        command.arg("status");
        command
    };
    for index in 0..=lab.samples(11, 3) {
        let bare = timed(&mut status(small))?;
        let time = timed(&mut status(large))?;
        let as_json = timed(status(large).arg("--json"))?;
        // The first is a rehearsal.
        if index > 0 {
            limit.push_ms(bare);
            times.push_ms(time);
            json.push_ms(as_json);
            memory.push(memory_mib(pids[large], "VmRSS:")?);
            empty.push(memory_mib(pids[small], "VmRSS:")?);
        }
    }
    let told = run_json(status(large).arg("--json"))?;
    let listed = told["vms"].as_array().map_or(0, Vec::len) as u64;
    ensure!(listed == vms, "{listed} of {vms} VMs are in the status");
    let nodes = told["nodes"].as_array().map_or(0, Vec::len);
    ensure!(nodes == NODES + 1, "{nodes} nodes are in the status");

    let with = |row: Row| row.param("vms", vms).param("points_of_each", POINTS);
    let status = Row::new(STATUS, "ms", &times)?
        .limit(
            limit.median(),
            "`standby status` of an agent that holds nothing, with an empty registry in the same etcd",
        )
        .at_most(STATUS_TARGET_MS)
        .param("nodes", NODES + 1)
        .seen("json_ms", json.median())
        .seen("registering_s", registering.as_secs_f64())
        .seen(
            "idle_requests_a_second",
            (after.requests - before.requests) / quiet,
        )
        .seen(
            "idle_mb_a_second",
            (after.sent_bytes - before.sent_bytes) / quiet / 1e6,
        );
    let memory = Row::new(MEMORY, "MiB resident", &memory)?
        .limit(empty.median(), "an agent that holds nothing")
        .at_most(MEMORY_TARGET_MIB)
        .seen("cold_mib", cold)
        .seen("peak_mib", memory_mib(pids[large], "VmHWM:")?);
    Ok(vec![with(status), with(memory)])
}

fn timed(command: &mut Command) -> Result<Duration> {
    let start = Instant::now();
    run(command)?;
    Ok(start.elapsed())
}

/// What an etcd was asked since it began.
#[derive(Debug, Clone, Copy)]
struct Asked {
    requests: f64,
    sent_bytes: f64,
}

/// By its own metrics.
fn asked(address: &str) -> Result<Asked> {
    let told = || format!("read the metrics of etcd at {address}");
    let mut stream = TcpStream::connect(address).with_context(told)?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).with_context(told)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).with_context(told)?;
    let sum = |name: &str, label: &str| {
        let lines = text
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(label));
        let numbers = lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        numbers.sum::<f64>()
    };
    let requests = sum("grpc_server_handled_total{", "grpc_service=\"etcdserverpb.KV\"");
    ensure!(requests > 0.0, "etcd at {address} tells of no requests");
    Ok(Asked {
        requests,
        sent_bytes: sum("etcd_network_client_grpc_sent_bytes_total", ""),
    })
}

/// A size in a process's status, in MiB.
fn memory_mib(pid: u32, key: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    Ok(kib.with_context(|| format!("{path} has no {key}"))? / 1024.0)
}

/// Writes the nodes, the VMs and their segments as owners do; the agent at `address` holds each, and two nodes more.
async fn register(registry: Registry, store: &Path, vms: u64, address: &str) -> Result<()> {
    let mut nodes = Vec::with_capacity(NODES);
    for number in 0..NODES {
        // Nobody listens there, and nobody is asked: they live, by their leases.
        let node = NodeRecord {
            name: format!("simulated-{number}"),
            address: format!("192.0.2.{}:7400", number + 1),
            id: random_id(),
            roles: vec![Role::Execute.to_string(), Role::Store.to_string()],
            labels: [("zone".to_owned(), format!("z{}", number % 3))].into(),
            joined_unix_ms: 0,
            total_bytes: Some(1 << 40),
            free_bytes: Some(1 << 39),
            draining: None,
            alive: None,
        };
        let subject = LeaseSubject::Node {
            name: node.name.clone(),
            id: node.id,
        };
        nodes.push(node.address.clone());
        registry.join_node(node, false).await.context("register a node")?;
        let leased = registry.grant_lease(&subject, MAX_LEASE_MS, random_lease()).await;
        leased.context("take a node's lease")?;
    }
    let store = FsStore::open_read_only(store).context("open the agent's store")?;
    let mut writers = JoinSet::new();
    for first in 0..WRITERS as u64 {
        let mut wanted = Vec::new();
        for number in (first..vms).step_by(WRITERS) {
            let at = |n: u64| nodes[(number + n) as usize % NODES].clone();
            let holders = vec![address.to_owned(), at(0), at(1)];
            let vm = vm_name(number).parse().context("name a VM")?;
            let entries = store.entries(&vm);
            wanted.push((vm, holders, entries));
        }
        let registry = registry.clone();
        writers.spawn(async move {
            for (vm, holders, entries) in wanted {
                one(&registry, vm, holders, entries).await?;
            }
            Ok::<_, anyhow::Error>(())
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended.context("a writer of the registry")??;
    }
    Ok(())
}

async fn one(
    registry: &Registry,
    vm: segment::VmId,
    holders: Vec<String>,
    entries: Vec<Entry>,
) -> Result<()> {
    let new = NewVm {
        vm: vm.clone(),
        owner: "oak".into(),
        holders: holders.clone(),
        ack_quorum: 2,
        every_ms: 200,
        policy: None,
    };
    let told = || format!("register {vm}");
    let record = registry.create_vm(new).await.with_context(told)?;
    let records: Vec<_> = entries
        .into_iter()
        .map(|entry| SegmentRecord {
            parent: parent_of(&entry),
            name: entry.name,
            checkpoint: entry.checkpoint,
            digest: entry.digest,
            bytes: entry.bytes,
            holders: holders.clone(),
            created_unix_ns: entry.created_unix_ns,
        })
        .collect();
    for some in records.chunks(MAX_REGISTER_SEGMENTS) {
        let done = registry.register_segments(&vm, record.generation, some.to_vec());
        done.await.with_context(told)?;
    }
    Ok(())
}
