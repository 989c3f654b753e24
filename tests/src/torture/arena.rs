//! Hosts on a bridge, and an etcd in the middle.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use super::ears::Ears;
use super::lookout::Place;
use crate::harness::{Agent, Cluster, run, run_json, signal, wait_for};
use crate::hosts::{address, bridge};

/// The hosts there may be, each with one agent of the same number.
pub(super) const HOSTS: [&str; 4] = ["alder", "birch", "cedar", "dogwood"];
/// Where etcd is.
const ETCD: SocketAddr = SocketAddr::new(IpAddr::V4(address(1)), 2379);

/// The cluster, ended when this is dropped.
#[derive(Debug)]
pub(super) struct Arena {
    pub(super) cluster: Cluster,
    /// The VMs that were launched; others are their agents' children.
    launched: Vec<Child>,
    _etcd: Etcd,
}

/// How hosts reach one another and the registry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ways {
    /// Where etcd is to be reached.
    pub(super) etcd: SocketAddr,
    /// Where the agent of a host is to be reached by the others; where it listens, when that is `None`.
    pub(super) agent: Option<fn(usize) -> SocketAddr>,
}

impl Default for Ways {
    /// Nothing is in between.
    fn default() -> Self {
        Self {
            etcd: ETCD,
            agent: None,
        }
    }
}

/// What a VM is like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guest<'a> {
    pub(super) name: &'a str,
    pub(super) cmdline: &'a str,
    pub(super) memory: &'a str,
    /// How it is protected.
    pub(super) more: &'a [&'a str],
}

impl Arena {
    /// Makes the bridge with these addresses beside etcd's own, and starts etcd; there are no hosts yet.
    pub(super) fn new(folder: &Path, ways: Ways, addresses: &[Ipv4Addr]) -> Result<Self> {
        let mut all = vec![address(1)];
        all.extend(addresses);
        bridge(&all).context("make a bridge (`ip`, of iproute2, is needed)")?;
        let etcd = Etcd::start(folder)?;
        let mut cluster = Cluster::new(folder, false)?;
        cluster.use_registry(&format!("etcd://{}", ways.etcd));
        Ok(Self {
            cluster,
            launched: Vec::new(),
            _etcd: etcd,
        })
    }

    /// Starts the first `count` of the hosts. With ears, the VMs that they take over are heard.
    pub(super) fn start_hosts(
        &mut self,
        count: usize,
        ways: Ways,
        ears: Option<&Ears>,
        more: &[&str],
    ) -> Result<()> {
        for (at, name) in HOSTS.iter().enumerate().take(count) {
            let number = at as u8 + 1;
            let mut reached: Vec<IpAddr> = vec![address(10 + number).into()];
            let mut arguments: Vec<String> = more.iter().map(|&word| word.to_owned()).collect();
            if let Some(agent) = ways.agent {
                reached.push(agent(at).ip());
                arguments.extend(["--advertise".to_owned(), agent(at).to_string()]);
            }
            if let Some(ears) = ears {
                let vmm = ears.wrapper(name, &self.cluster.binaries.vmm)?;
                arguments.extend(["--vmm".to_owned(), vmm.display().to_string()]);
            }
            self.cluster.issue_for(name, "owner,execute,store", &reached)?;
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            self.cluster
                .start_networked_host(name, number, &arguments)
                .with_context(|| format!("start host {name}"))?;
        }
        wait_for("all nodes to live in the registry", || {
            let status = run_json(self.cluster.standby(0).args(["status", "--json"]));
            let status = status.unwrap_or_default();
            let nodes = status["nodes"].as_array().into_iter().flatten();
            let alive = nodes.filter(|node| !node["alive"].is_null()).count();
            Ok((alive == count).then_some(()))
        })
    }

    /// Launches a VM on a host; its console goes to this file, or pipe.
    pub(super) fn launch(&mut self, host: usize, guest: Guest<'_>, console: &Path) -> Result<()> {
        let Guest { name, memory, .. } = guest;
        let (cluster, run_dir) = (&self.cluster, self.run_dir(host));
        let said = cluster.folder().join(format!("{name}.log"));
        let mut child = cluster
            .host(host)
            .command(&cluster.binaries.vmm)
            .args([
                "run",
                "--name",
                name,
                "--cmdline",
                guest.cmdline,
                "--memory",
                memory,
            ])
            .arg("--run-dir")
            .arg(&run_dir)
            .arg("--kernel")
            .arg(cluster.guest("churn"))
            .arg("--store")
            .arg(cluster.folder().join("vms").join(name))
            .arg("--console-log")
            .arg(console)
            .args(guest.more)
            .env("UNDERSTUDY_TLS", cluster.certificate(HOSTS[host]))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&said)?)
            .spawn()
            .context("start `vmm run`")?;
        wait_for(format!("VM {name} to answer"), || {
            if let Some(status) = child.try_wait()? {
                let said = std::fs::read_to_string(&said)?;
                bail!("`vmm run` ended with {status}: {}", said.trim());
            }
            Ok(cluster
                .status(name, &run_dir)
                .ok()
                .filter(|status| status["state"] == "running"))
        })?;
        self.launched.push(child);
        Ok(())
    }

    /// Where the VMs of a host have their sockets.
    pub(super) fn run_dir(&self, host: usize) -> PathBuf {
        self.cluster.agents[host].data.join("run")
    }

    /// All places where VM `name` may be.
    pub(super) fn places(&self, name: &str) -> Vec<Place> {
        let agents = self.cluster.agents.iter().enumerate();
        let place = |(at, agent): (usize, &Agent)| Place {
            vm: name.to_owned(),
            host: agent.name.clone(),
            run_dir: self.run_dir(at),
        };
        agents.map(place).collect()
    }

    /// Sends a signal to a process of a host, by its number there; whether there was one.
    pub(super) fn signal(&mut self, host: usize, name: &str, pid: u32) -> Result<bool> {
        if name == "CONT" {
            self.wake();
        }
        for child in &mut self.launched {
            // A process that has ended is there until it was waited for.
            child.try_wait()?;
        }
        let kill = format!("kill -{name} {pid}");
        let mut command = self.cluster.host(host).command(Path::new("sh"));
        let status = command.args(["-c", &kill]).stderr(Stdio::null()).status();
        Ok(status.context("run `nsenter`")?.success())
    }

    /// `nsenter` stops itself when what it waits for is stopped.
    fn wake(&self) {
        for child in &self.launched {
            // It may have ended.
            let _ = signal(child.id(), Signal::CONT);
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.wake();
        for host in 0..self.cluster.agents.len() {
            // It may be dead already.
            let _ = self.cluster.kill_host(host);
        }
        for child in &mut self.launched {
            // It went with its host.
            let _ = child.wait();
        }
    }
}

/// An etcd of one member that is never cut off from everyone.
#[derive(Debug)]
struct Etcd(Child);

impl Etcd {
    fn start(folder: &Path) -> Result<Self> {
        // In memory, as what is tested is not the disk: in this namespace's own mount, which goes with it.
        let data = folder.join("etcd");
        std::fs::create_dir(&data)?;
        run(Command::new("mount").args(["-t", "tmpfs", "etcd"]).arg(&data))?;
        let client = format!("http://{ETCD}");
        let child = Command::new("etcd")
            .args(["--name", "middle", "--data-dir"])
            .arg(data.join("data"))
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args(["--listen-peer-urls", "http://127.0.0.1:2380"])
            .args(["--log-level", "error"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.join("etcd.log"))?)
            .spawn()
            .context("start etcd (Debian: etcd-server; scripts/torture installs it)")?;
        let etcd = Self(child);
        wait_for("etcd to answer", || {
            let mut ctl = Command::new("etcdctl");
            ctl.env("ETCDCTL_API", "3")
                .args(["--endpoints", &ETCD.to_string(), "--command-timeout", "2s"])
                .args(["endpoint", "health"]);
            Ok(run(&mut ctl).ok())
        })?;
        Ok(etcd)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
