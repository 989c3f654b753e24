//! Hosts of their own on this machine, as namespaces of processes.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;

use crate::harness::{signal, wait_for};

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
}

impl Host {
    pub(crate) fn start(name: &str, folder: &Path) -> Result<Self> {
        let said = folder.join(format!("{name}.host.log"));
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
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
        Ok(host)
    }

    /// A command on it.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.first));
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--preserve-credentials"]);
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
