//! Real agents and real VMs as child processes, in one temporary folder, ended with it.
//!
//! Every wait has a deadline and says what it waited for. Only processes started here (or by an agent started here)
//! are ever signalled, by their id.

use std::fmt::Display;
use std::fs::File;
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::hosts::Host;

/// How long anything may take before it counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);
/// The node that VMs are launched on.
pub const HOST: &str = "oak";
/// Who gives orders.
pub const OPERATOR: &str = "operator";

/// Where the binaries are.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// The launch CLI.
    pub vmm: PathBuf,
    /// The host agent.
    pub standby: PathBuf,
}

impl Binaries {
    /// Those built with the running program: beside it, or one folder up for a test.
    ///
    /// # Errors
    /// When they are not there, and how to build them.
    pub fn find() -> Result<Self> {
        let me = std::env::current_exe().context("find this program")?;
        for folder in me.ancestors().skip(1).take(2) {
            let (vmm, standby) = (folder.join("vmm"), folder.join("standby"));
            if vmm.is_file() && standby.is_file() {
                return Ok(Self { vmm, standby });
            }
        }
        bail!(
            "no vmm and standby beside {}: build them with `cargo build --workspace --bins`",
            me.display()
        )
    }
}

/// Polls until `check` has something, an error at the deadline.
///
/// # Errors
/// What `check` returned, or that `what` did not come within [`PATIENCE`].
pub fn wait_for<T>(what: impl Display, check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_within(PATIENCE, what, check)
}

/// The same for what may take longer.
///
/// # Errors
/// What `check` returned, or that `what` did not come in that time.
pub fn wait_within<T>(
    patience: Duration,
    what: impl Display,
    mut check: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = check()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("{what}: not within {} s", patience.as_secs());
        }
        std::thread::sleep(POLL);
    }
}

/// Runs a command to its end; its standard output.
///
/// # Errors
/// With what it said, when it does not exit with 0.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} ended with {}: {}", output.status, said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{command:?} did not print text"))
}

/// Runs a command that prints JSON.
///
/// # Errors
/// When it fails, or prints something else.
pub fn run_json(command: &mut Command) -> Result<Value> {
    let text = run(command)?;
    serde_json::from_str(&text).with_context(|| format!("{command:?} printed no JSON: {text}"))
}

/// A port nobody listens on just now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}

/// Sends a signal to a process.
///
/// # Errors
/// When there is none of that id, or it is not ours.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| anyhow!("{pid} is no process id"))?;
    kill_process(pid, signal).with_context(|| format!("send {signal:?} to process {}", pid.as_raw_nonzero()))
}

/// A standby agent.
#[derive(Debug)]
pub struct Agent {
    /// Its node name.
    pub name: String,
    /// Where it listens.
    pub address: String,
    /// Its data folder.
    pub data: PathBuf,
    child: Option<Child>,
    arguments: Vec<String>,
    /// The host it runs on, when it has one of its own.
    host: Option<usize>,
}

/// A VM process.
#[derive(Debug)]
pub struct Machine {
    /// The VM's name.
    pub name: String,
    /// Where its control socket is.
    pub run_dir: PathBuf,
    /// Its console's output.
    pub console: PathBuf,
    /// Its process.
    pub pid: u32,
    child: Option<Child>,
}

/// Agents and VMs in a folder.
#[derive(Debug)]
pub struct Cluster {
    /// The binaries.
    pub binaries: Binaries,
    folder: PathBuf,
    keep: bool,
    /// The agents, in the order they were started.
    pub agents: Vec<Agent>,
    machines: Vec<Machine>,
    hosts: Vec<Host>,
    /// Where the registry is, when the first agent does not keep it.
    registry: Option<String>,
}

impl Cluster {
    /// An empty one below `folder`, which is made; with `keep` everything goes on when this is dropped.
    ///
    /// # Errors
    /// When the folder cannot be made or the binaries are not there.
    pub fn new(folder: &Path, keep: bool) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        guest_images::write_all(folder)
            .with_context(|| format!("write the guests to {}", folder.display()))?;
        let cluster = Self {
            binaries: Binaries::find()?,
            folder: folder.to_owned(),
            keep,
            agents: Vec::new(),
            machines: Vec::new(),
            hosts: Vec::new(),
            registry: None,
        };
        if !cluster.authority().exists() {
            run(Command::new(&cluster.binaries.standby)
                .args(["ca", "init"])
                .arg(cluster.authority()))?;
            cluster.issue(HOST, "owner")?;
            cluster.issue(OPERATOR, "operator")?;
        }
        Ok(cluster)
    }

    /// Agents that are started from now on have their registry there.
    pub fn use_registry(&mut self, address: &str) {
        self.registry = Some(address.to_owned());
    }

    /// Where everything is.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder of the cluster's authority.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.folder.join("ca")
    }

    /// The folder of a node's certificate.
    #[must_use]
    pub fn certificate(&self, node: &str) -> PathBuf {
        self.authority().join(node)
    }

    /// Issues a certificate.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn issue(&self, node: &str, roles: &str) -> Result<()> {
        self.issue_for(node, roles, &[])
    }

    /// The same for a node that is reached at these addresses.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn issue_for(&self, node: &str, roles: &str, addresses: &[IpAddr]) -> Result<()> {
        let mut command = Command::new(&self.binaries.standby);
        command
            .args(["ca", "issue", node, "--role", roles, "--ca"])
            .arg(self.authority());
        for address in addresses {
            command.args(["--address", &address.to_string()]);
        }
        run(&mut command).map(drop)
    }

    /// A guest's kernel.
    #[must_use]
    pub fn guest(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.elf"))
    }

    /// Starts an agent; the first keeps the registry.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn start_agent(&mut self, name: &str, more: &[&str]) -> Result<usize> {
        self.start_agent_on(None, name, more)
    }

    /// Starts a host of its own and an agent on it; the number of the agent, and of the host.
    ///
    /// # Errors
    /// When namespaces are not allowed, or the agent does not answer.
    pub fn start_host(&mut self, name: &str, more: &[&str]) -> Result<(usize, usize)> {
        if !self.certificate(name).exists() {
            self.issue(name, "owner,execute,store")?;
        }
        self.hosts.push(Host::start(name, &self.folder)?);
        let host = self.hosts.len() - 1;
        Ok((self.start_agent_on(Some(host), name, more)?, host))
    }

    /// The same with a network of its own, plugged into the bridge as this number. Its certificate is there.
    ///
    /// # Errors
    /// As [`Cluster::start_host`].
    pub(crate) fn start_networked_host(
        &mut self,
        name: &str,
        number: u8,
        more: &[&str],
    ) -> Result<(usize, usize)> {
        self.hosts.push(Host::plugged_in(name, &self.folder, number)?);
        let host = self.hosts.len() - 1;
        Ok((self.start_agent_on(Some(host), name, more)?, host))
    }

    /// A host.
    pub(crate) fn host(&self, host: usize) -> &Host {
        &self.hosts[host]
    }

    /// A host that was killed comes back, and its agent with the data it had.
    ///
    /// # Errors
    /// When it does not.
    pub(crate) fn revive_host(&mut self, host: usize) -> Result<()> {
        self.hosts[host].restart(&self.folder)?;
        for agent in 0..self.agents.len() {
            if self.agents[agent].host == Some(host) {
                self.restart_agent(agent)?;
            }
        }
        Ok(())
    }

    /// A host loses its power: its agent and its VMs die at once.
    ///
    /// # Errors
    /// When it is dead already.
    pub fn kill_host(&mut self, host: usize) -> Result<()> {
        self.hosts[host].kill()
    }

    fn start_agent_on(&mut self, host: Option<usize>, name: &str, more: &[&str]) -> Result<usize> {
        let own = host.and_then(|host| self.hosts[host].listens_at());
        let address = match own {
            Some(address) => address,
            None => format!("127.0.0.1:{}", free_port()?),
        };
        let data = self.folder.join(name);
        let first = self.agents.first().map(|a| a.address.clone());
        let registry = self.registry.clone().or(first);
        let registry = registry.unwrap_or_else(|| "embedded".to_owned());
        let mut arguments: Vec<String> = [
            "serve",
            "--listen",
            &address,
            "--name",
            name,
            "--registry",
            &registry,
        ]
        .map(str::to_owned)
        .into();
        if !self.certificate(name).exists() {
            self.issue(name, "execute,store")?;
        }
        arguments.extend(["--tls".into(), self.certificate(name).display().to_string()]);
        arguments.extend(["--data".into(), data.display().to_string()]);
        if !more.contains(&"--vmm") {
            arguments.extend(["--vmm".into(), self.binaries.vmm.display().to_string()]);
        }
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        std::fs::create_dir_all(&data)?;
        self.agents.push(Agent {
            name: name.into(),
            address,
            data,
            child: None,
            arguments,
            host,
        });
        let index = self.agents.len() - 1;
        self.restart_agent(index)?;
        Ok(index)
    }

    /// Starts an agent again with the data it has, and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn restart_agent(&mut self, index: usize) -> Result<()> {
        let standby = self.binaries.standby.clone();
        let agent = &mut self.agents[index];
        if let Some(before) = agent.child.take() {
            // It died with its host, and is waited for.
            kill(before)?;
        }
        let log = File::options()
            .create(true)
            .append(true)
            .open(agent.data.join("agent.log"))?;
        let mut command = match agent.host {
            Some(host) => self.hosts[host].command(&standby),
            None => Command::new(standby),
        };
        let child = command
            .args(&agent.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start `standby serve`")?;
        agent.child = Some(child);
        let address = agent.address.clone();
        wait_for(format!("agent {address} to listen"), || {
            if let Some(status) = self.agents[index]
                .child
                .as_mut()
                .and_then(|c| c.try_wait().transpose())
            {
                let log =
                    std::fs::read_to_string(self.agents[index].data.join("agent.log")).unwrap_or_default();
                bail!("the agent ended with {}: {log}", status?);
            }
            Ok(std::net::TcpStream::connect(&address).ok())
        })?;
        Ok(())
    }

    /// Starts an agent again as a new node of its name, with nothing.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn restart_emptied(&mut self, index: usize) -> Result<()> {
        let agent = &mut self.agents[index];
        if agent.data.exists() {
            std::fs::remove_dir_all(&agent.data)?;
        }
        std::fs::create_dir_all(&agent.data)?;
        agent.arguments.push("--replace".to_owned());
        self.restart_agent(index)
    }

    /// SIGKILLs an agent.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill_agent(&mut self, index: usize) -> Result<()> {
        let child = self.agents[index].child.take();
        kill(child.ok_or_else(|| anyhow!("agent {index} is not running"))?)
    }

    /// The processes to be ended for the agents and hosts to be gone.
    #[must_use]
    pub fn agent_pids(&self) -> Vec<String> {
        let hosts = self.hosts.iter().filter(|h| h.parent.is_some());
        let hosts = hosts.map(|host| host.first.to_string());
        let alone = self.agents.iter().filter(|a| a.host.is_none());
        let agents = alone.flat_map(|a| &a.child).map(|child| child.id().to_string());
        agents.chain(hosts).collect()
    }

    /// `standby` speaking to an agent, with an operator's certificate.
    #[must_use]
    pub fn standby(&self, agent: usize) -> Command {
        let mut command = Command::new(&self.binaries.standby);
        command
            .args(["--agent", &self.agents[agent].address])
            .env("UNDERSTUDY_TLS", self.certificate(OPERATOR));
        command
    }

    /// `vmm`, with a run folder of this cluster and the certificate of a host that runs VMs.
    #[must_use]
    pub fn vmm(&self, command: &str, run_dir: &Path) -> Command {
        let mut vmm = Command::new(&self.binaries.vmm);
        vmm.arg(command)
            .arg("--run-dir")
            .arg(run_dir)
            .env("UNDERSTUDY_TLS", self.certificate(HOST));
        vmm
    }

    /// Where VMs launched by [`Cluster::launch`] have their sockets.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// Launches a guest with `vmm run`, and waits until its control socket answers.
    ///
    /// # Errors
    /// With what it said, when it does not.
    pub fn launch(&mut self, name: &str, guest: &str, cmdline: &str, more: &[&str]) -> Result<Machine> {
        self.launch_on(None, name, guest, cmdline, more)
    }

    /// The same, on a host of its own.
    ///
    /// # Errors
    /// As [`Cluster::launch`].
    pub fn launch_on(
        &mut self,
        host: Option<usize>,
        name: &str,
        guest: &str,
        cmdline: &str,
        more: &[&str],
    ) -> Result<Machine> {
        let run_dir = self.run_dir();
        let console = self.folder.join(format!("{name}.console"));
        let said = self.folder.join(format!("{name}.log"));
        let mut command = self.vmm("run", &run_dir);
        if let Some(host) = host.map(|host| &self.hosts[host]) {
            command = host.command(&self.binaries.vmm);
            command
                .args(["run", "--run-dir"])
                .arg(&run_dir)
                .env("UNDERSTUDY_TLS", self.certificate(&host.name));
        }
        let mut child = command
            .args(["--name", name, "--cmdline", cmdline])
            .arg("--kernel")
            .arg(self.guest(guest))
            .arg("--store")
            .arg(self.folder.join("vms").join(name))
            .args(more)
            .stdin(Stdio::null())
            .stdout(File::create(&console)?)
            .stderr(File::create(&said)?)
            .spawn()
            .context("start `vmm run`")?;
        let pid = child.id();
        wait_for(format!("VM {name} to answer"), || {
            if let Some(status) = child.try_wait()? {
                bail!(
                    "`vmm run` ended with {status}: {}",
                    std::fs::read_to_string(&said)?.trim()
                );
            }
            // It answers before its guest runs.
            Ok(self
                .status(name, &run_dir)
                .ok()
                .filter(|status| status["state"] != "Not started"))
        })?;
        Ok(Machine {
            name: name.into(),
            run_dir,
            console,
            pid,
            child: Some(child),
        })
    }

    /// A VM that an agent started, to be ended with this cluster.
    #[must_use]
    pub fn adopt(&self, name: &str, agent: usize, pid: u32) -> Machine {
        let data = &self.agents[agent].data;
        let console = data.join("vmm").join(format!("{name}.console"));
        Machine {
            name: name.into(),
            run_dir: data.join("run"),
            console,
            pid,
            child: None,
        }
    }

    /// A VM that an agent started on a host of its own: it ends with that host.
    #[must_use]
    pub fn found(&self, name: &str, agent: usize) -> Machine {
        // Its number there means another process here.
        self.adopt(name, agent, 0)
    }

    /// Ends a VM when the cluster is dropped.
    pub fn own(&mut self, machine: Machine) {
        self.machines.push(machine);
    }

    /// What `vmm inspect` says of a running VM.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self, name: &str, run_dir: &Path) -> Result<Value> {
        run_json(self.vmm("inspect", run_dir).args(["--json", name]))
    }

    /// Waits until a checkpoint of at least this number is committed; the number of the newest.
    ///
    /// # Errors
    /// When none is in time.
    pub fn committed(&self, machine: &Machine, at_least: u64) -> Result<u64> {
        let name = &machine.name;
        wait_for(format!("epoch {at_least} of {name} to be committed"), || {
            let now = epoch(&self.status(name, &machine.run_dir)?["committed"]);
            Ok((now >= at_least).then_some(now))
        })
    }
}

impl Machine {
    /// The console's text so far.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn console(&self) -> Result<String> {
        let bytes =
            std::fs::read(&self.console).with_context(|| format!("read {}", self.console.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// SIGKILLs it: its host is gone.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self) -> Result<()> {
        match self.child.take() {
            Some(child) => kill(child),
            None => signal(self.pid, Signal::KILL),
        }
    }

    /// Waits for its process to end.
    ///
    /// # Errors
    /// When it was not launched here, or does not end.
    pub fn wait(&mut self) -> Result<std::process::ExitStatus> {
        let child = self
            .child
            .as_mut()
            .ok_or_else(|| anyhow!("{} was not launched here", self.name))?;
        wait_for(format!("VM {} to end", self.name), || Ok(child.try_wait()?))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            let _ = kill(child);
        }
    }
}

fn kill(mut child: Child) -> Result<()> {
    child.kill().context("kill a child process")?;
    child.wait().context("wait for a child process")?;
    Ok(())
}

impl Cluster {
    /// Kills every VM that has this run folder.
    fn end_all_in(&self, run_dir: &Path) {
        if !run_dir.is_dir() {
            return;
        }
        let Ok(found) = run_json(self.vmm("ps", run_dir).arg("--json")) else {
            return;
        };
        for vm in found.as_array().into_iter().flatten() {
            if let Some(pid) = vm["status"]["pid"].as_u64() {
                // It may be gone by now.
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.keep {
            for machine in &mut self.machines {
                // Forgotten, not ended.
                machine.child = None;
            }
            for host in &mut self.hosts {
                host.parent = None;
            }
            return;
        }
        for host in &mut self.hosts {
            // It may be dead already.
            let _ = host.kill();
        }
        for machine in &mut self.machines {
            // It may have ended by itself.
            let _ = machine.kill();
        }
        for agent in &mut self.agents {
            if let Some(child) = agent.child.take() {
                let _ = kill(child);
            }
        }
        // What they started by themselves; nobody starts more of it now.
        for agent in &self.agents {
            self.end_all_in(&agent.data.join("run"));
        }
    }
}

/// The number of a checkpoint by its name, `VM/GENERATION/EPOCH`; 0 when there is none.
#[must_use]
pub fn epoch(name: &Value) -> u64 {
    name.as_str()
        .and_then(|name| name.rsplit('/').next())
        .and_then(|epoch| epoch.parse().ok())
        .unwrap_or(0)
}

/// A counter of `churn`'s newest whole heartbeat, `name=N`.
#[must_use]
pub fn counter(console: &str, name: &str) -> Option<u64> {
    beats(console).next_back().and_then(|line| value(line, name))
}

/// A counter of `churn`'s first whole heartbeat.
#[must_use]
pub fn first_counter(console: &str, name: &str) -> Option<u64> {
    beats(console).next().and_then(|line| value(line, name))
}

fn beats(console: &str) -> impl DoubleEndedIterator<Item = &str> {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    // The first line of a restored guest's console may be the rest of one that began before.
    whole
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("churn beat=") && line.contains(" up_ms="))
}

fn value(line: &str, name: &str) -> Option<u64> {
    line.split(' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_whole_heartbeats_only() {
        let console = "s=9 up_ms=3\nchurn beat=1 writes=10 bad=0 up_ms=5\r\nchurn beat=2 writes=20 bad=0 up_ms=9\nchurn beat=3 wri";
        assert_eq!(counter(console, "writes"), Some(20));
        assert_eq!(first_counter(console, "writes"), Some(10));
        assert_eq!(counter("churn beat=1 writes=1", "writes"), None);
    }
}
