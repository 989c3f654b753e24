//! Hosts of their own on this machine, as namespaces of processes; with a cable, of networks too.
//!
//! ```text
//!   host alder               the namespace this process is in            host birch
//!   eth0 10.77.0.11 ======== v1.1 -- bridge us0, 10.77.0.1 -- v2.1 ======== eth0 10.77.0.12
//! ```
//!
//! All of it is in namespaces, so it is gone with their last process, however that ends.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;

use crate::harness::{run, signal, wait_for};

/// The bridge that hosts are plugged into.
const BRIDGE: &str = "us0";
/// Where the agent of a host with a network of its own listens.
const AGENT_PORT: u16 = 7400;

/// An address on the bridge's network.
#[must_use]
pub(crate) const fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, number)
}

fn ip(words: &str) -> Result<()> {
    run(Command::new("ip").args(words.split(' '))).map(drop)
}

/// Makes the bridge, in the network namespace that this process has to itself, with these addresses on it.
///
/// # Errors
/// When `ip` refuses.
pub(crate) fn bridge(addresses: &[Ipv4Addr]) -> Result<()> {
    ip("link set lo up")?;
    // An address of its own: by default it has that of a host's cable, and another one when that changes.
    ip(&format!(
        "link add {BRIDGE} address 02:00:00:00:01:00 type bridge"
    ))?;
    for address in addresses {
        ip(&format!("addr add {address}/24 dev {BRIDGE}"))?;
    }
    ip(&format!("link set {BRIDGE} up"))
}

/// What a host is plugged into the bridge with.
#[derive(Debug)]
struct Cable {
    number: u8,
    /// How often it was plugged in: the interface of a host that has just died is there for a moment longer.
    plugged: u32,
}

impl Cable {
    fn address(&self) -> Ipv4Addr {
        address(10 + self.number)
    }

    /// The interface on the bridge's side.
    fn interface(&self) -> String {
        format!("v{}.{}", self.number, self.plugged)
    }

    fn plug_in(&mut self, first: u32) -> Result<()> {
        self.plugged += 1;
        let (Self { number, .. }, interface) = (&*self, self.interface());
        // The same hardware address each time: its neighbours remember it.
        ip(&format!(
            "link add {interface} type veth peer name eth0 address 02:00:00:00:00:{number:02x} netns {first}"
        ))?;
        ip(&format!("link set {interface} master {BRIDGE} up"))?;
        let set_up = format!(
            "ip link set lo up && ip addr add {}/24 dev eth0 && ip link set eth0 up",
            self.address()
        );
        let target = format!("--target={first}");
        run(Command::new("nsenter").args([&target, "--net", "--", "sh", "-c", &set_up])).map(drop)
    }
}

/// A host of its own: a namespace of processes that all die with the first, as they do when a host loses its power, and
/// that nobody on another host can look at.
#[derive(Debug)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// `unshare`, which waits for the first process of the namespace.
    pub(crate) parent: Option<Child>,
    /// The first process, as seen from here.
    pub(crate) first: u32,
    cable: Option<Cable>,
}

impl Host {
    /// One that shares this process's network.
    pub(crate) fn start(name: &str, folder: &Path) -> Result<Self> {
        Self::boot(name, folder, None)
    }

    /// One with a network of its own, plugged into the [`bridge`] as number 1 to 89.
    pub(crate) fn plugged_in(name: &str, folder: &Path, number: u8) -> Result<Self> {
        Self::boot(name, folder, Some(Cable { number, plugged: 0 }))
    }

    /// Again, after it died.
    pub(crate) fn restart(&mut self, folder: &Path) -> Result<()> {
        *self = Self::boot(&self.name, folder, self.cable.take())?;
        Ok(())
    }

    fn boot(name: &str, folder: &Path, cable: Option<Cable>) -> Result<Self> {
        let said = folder.join(format!("{name}.host.log"));
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        if cable.is_some() {
            command.arg("--net");
        }
        let parent = command
            .args([
                "--pid",
                "--mount-proc",
                "--fork",
                "--kill-child=KILL",
                "--",
                "sleep",
                "infinity",
            ])
            .stdin(Stdio::null())
            // It complains when its child is killed.
            .stderr(File::create(&said)?)
            .spawn()
            .context("start `unshare` (of util-linux)")?;
        let children = format!("/proc/{0}/task/{0}/children", parent.id());
        let mut host = Self {
            name: name.into(),
            parent: Some(parent),
            first: 0,
            cable,
        };
        host.first = wait_for(format!("host {name} to have a process"), || {
            if let Some(status) = host.parent.as_mut().and_then(|p| p.try_wait().transpose()) {
                let why = std::fs::read_to_string(&said).unwrap_or_default();
                bail!(
                    "`unshare` ended with {} (are namespaces allowed here?): {}",
                    status?,
                    why.trim()
                );
            }
            // `unshare` mounts /proc between its fork and what it executes.
            let first = std::fs::read_to_string(&children).unwrap_or_default();
            let first = first.trim().parse().ok();
            Ok(first.filter(|first| {
                std::fs::read_to_string(format!("/proc/{first}/comm"))
                    .is_ok_and(|comm| comm.trim() == "sleep")
            }))
        })?;
        if let Some(cable) = &mut host.cable {
            cable.plug_in(host.first)?;
        }
        Ok(host)
    }

    /// Where its agent listens, when it has a network of its own.
    pub(crate) fn listens_at(&self) -> Option<String> {
        let cable = self.cable.as_ref()?;
        Some(format!("{}:{AGENT_PORT}", cable.address()))
    }

    /// Pulls its cable out of the bridge, or plugs it in again.
    ///
    /// # Errors
    /// When it has none.
    pub(crate) fn connect(&self, connected: bool) -> Result<()> {
        let cable = self.cable.as_ref();
        let cable = cable.ok_or_else(|| anyhow!("host {} has no network of its own", self.name))?;
        let state = if connected { "up" } else { "down" };
        ip(&format!("link set {} {state}", cable.interface()))
    }

    /// A command on it.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.first));
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--preserve-credentials"]);
        }
        if self.cable.is_some() {
            command.arg("--net");
        }
        command.args(["--pid", "--mount", "--"]).arg(program);
        command
    }

    /// All of its processes die at once.
    pub(crate) fn kill(&mut self) -> Result<()> {
        let mut parent = self
            .parent
            .take()
            .ok_or_else(|| anyhow!("host {} is dead", self.name))?;
        signal(self.first, Signal::KILL)?;
        parent.wait().context("wait for `unshare`").map(drop)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // One that did not come up; the others are killed before, or kept.
        if let Some(mut parent) = self.parent.take() {
            let _ = parent.kill();
            let _ = parent.wait();
        }
    }
}
