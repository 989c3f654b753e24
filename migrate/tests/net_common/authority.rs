//! A cluster with certificates: an authority in a temporary folder, agents and owners that it knows.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use migrate::agent::Agent;
use migrate::ca::{self, NewCertificate};
use migrate::registry::{NewVm, Registry, RegistryAddr};
use migrate::transport::{CertRole, Identity};

use super::{Owner, config, vm};

pub const NODE: &[CertRole] = &[CertRole::Execute, CertRole::Store];
const DAY: Duration = Duration::from_secs(24 * 3600);

/// An authority in a temporary folder.
pub struct Authority(pub tempfile::TempDir);

impl Authority {
    pub fn new(cluster: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        ca::init(dir.path(), cluster, 10).unwrap();
        Self(dir)
    }

    pub fn dir(&self, node: &str) -> PathBuf {
        self.0.path().join(node)
    }

    pub fn issue_as(&self, wanted: &NewCertificate) -> PathBuf {
        let dir = self.dir(&wanted.node);
        ca::issue(self.0.path(), &dir, wanted, true).unwrap();
        dir
    }

    pub fn issue(&self, node: &str, roles: &[CertRole]) -> Identity {
        Identity::tls(&self.issue_as(&NewCertificate::new(node, roles, 10))).unwrap()
    }

    /// A certificate that was valid when it was read, and holds for `from` to `to` days from now since.
    pub fn at(&self, node: &str, roles: &[CertRole], from: i32, to: i32) -> Identity {
        let identity = self.issue(node, roles);
        let now = SystemTime::now();
        let day = |n: i32| match n {
            n if n < 0 => now - DAY * n.unsigned_abs(),
            n => now + DAY * n.unsigned_abs(),
        };
        self.issue_as(&NewCertificate {
            not_before: day(from),
            not_after: day(to),
            ..NewCertificate::new(node, roles, 10)
        });
        identity.reload();
        identity
    }
}

pub fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}
/// An agent with a certificate, and its address.
pub async fn agent(
    lab: &Authority,
    dir: &Path,
    node: &str,
    registry: Option<&Agent>,
    at: Option<&str>,
) -> Agent {
    let registry = match registry {
        None => RegistryAddr::Embedded,
        Some(agent) => RegistryAddr::Agent(agent.address().to_owned()),
    };
    served(lab, dir, node, registry, at).await
}

pub async fn served(
    lab: &Authority,
    dir: &Path,
    node: &str,
    registry: RegistryAddr,
    at: Option<&str>,
) -> Agent {
    let mut config = config(dir, node, registry);
    config.identity = lab.issue(node, NODE);
    if let Some(at) = at {
        config.listen = at.to_owned();
    }
    Agent::start(config).await.unwrap()
}

/// A VM that `identity` owns, and ships from.
pub async fn owner(
    dir: &Path,
    registry: &Agent,
    holders: &[&str],
    quorum: usize,
    identity: &Identity,
) -> Owner {
    let registry = Registry::remote(registry.address(), identity);
    let new = NewVm {
        vm: vm("web"),
        owner: identity.name().to_owned(),
        holders: holders.iter().map(|h| (*h).to_owned()).collect(),
        ack_quorum: quorum as u32,
        every_ms: 200,
        policy: None,
    };
    let generation = registry.create_vm(new).await.unwrap().generation;
    Owner::tuned(
        dir,
        "web",
        generation,
        holders,
        quorum,
        Some(registry),
        |config| {
            config.identity = identity.clone();
        },
    )
}
