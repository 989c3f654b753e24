//! What every measurement needs: a folder on the disk to be measured, a runtime, the guests' kernels, and who
//! this machine is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use migrate::ca::NewCertificate;
use migrate::transport::{CertRole, Identity};
use rustix::fs::statfs;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Where and how thoroughly things are measured.
#[derive(Debug)]
pub(crate) struct Lab {
    folder: TempDir,
    runtime: Runtime,
    quick: bool,
}

impl Lab {
    pub(crate) fn new(below: Option<&Path>, quick: bool) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("understudy-bench-");
        let folder = match below {
            Some(below) => {
                std::fs::create_dir_all(below).with_context(|| format!("make {}", below.display()))?;
                builder.tempdir_in(below)
            }
            None => builder.tempdir(),
        }
        .context("make a folder for the benchmark")?;
        guest_images::write_all(folder.path()).context("write the guests' kernels")?;
        let authority = folder.path().join("ca");
        migrate::ca::init(&authority, "bench", 1).context("make an authority")?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .context("start threads")?;
        Ok(Self {
            folder,
            runtime,
            quick,
        })
    }

    /// Whether only the harness is tried.
    pub(crate) fn quick(&self) -> bool {
        self.quick
    }

    /// A number of samples, or a fraction of it when only the harness is tried.
    pub(crate) fn samples(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }

    /// How long one sample takes that is measured over time.
    pub(crate) fn stretch(&self) -> Duration {
        Duration::from_millis(if self.quick { 500 } else { 2000 })
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// A new empty folder, gone when it is dropped.
    pub(crate) fn temporary(&self, what: &str) -> Result<TempDir> {
        let folder = tempfile::Builder::new()
            .prefix(what)
            .tempdir_in(self.folder.path());
        folder.with_context(|| format!("make a folder for {what}"))
    }

    pub(crate) fn kernel(&self, guest: &str) -> PathBuf {
        self.folder.path().join(format!("{guest}.elf"))
    }

    /// Who `node` is, by a certificate made for it.
    pub(crate) fn identity(&self, node: &str, roles: &[CertRole]) -> Result<Identity> {
        let of = self.certificate(node, roles)?;
        Identity::tls(&of).with_context(|| format!("use the certificate of {node}"))
    }

    /// The folder of a node's certificate, made when it is not there.
    pub(crate) fn certificate(&self, node: &str, roles: &[CertRole]) -> Result<PathBuf> {
        let authority = self.folder.path().join("ca");
        let of = authority.join(node);
        if !of.exists() {
            migrate::ca::issue(&authority, &of, &NewCertificate::new(node, roles, 1), false)
                .with_context(|| format!("issue the certificate of {node}"))?;
        }
        Ok(of)
    }

    /// The kind of file system that segments are written to.
    pub(crate) fn disk(&self) -> String {
        const KNOWN: [(i64, &str); 5] = [
            (0xef53, "ext"),
            (0x5846_5342, "xfs"),
            (0x9123_683e, "btrfs"),
            (0x0102_1994, "tmpfs"),
            (0x794c_7630, "overlay"),
        ];
        let Ok(found) = statfs(self.folder.path()) else {
            return "unknown".to_owned();
        };
        let name = KNOWN.iter().find(|(magic, _)| *magic == found.f_type);
        name.map_or_else(|| format!("{:#x}", found.f_type), |(_, name)| (*name).to_owned())
    }

    /// Says what is going on, for who waits.
    #[allow(clippy::unused_self)]
    pub(crate) fn say(&self, text: impl AsRef<str>) {
        eprintln!("bench: {}", text.as_ref());
    }

    /// The machine, in a line.
    pub(crate) fn machine(&self) -> String {
        let of = |file: &str, key: &str| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix(':'));
            line.unwrap_or(" unknown").trim().to_owned()
        };
        format!(
            "{}, {} cores, memory {}, Linux {}, segments on {} in {}{}",
            of("/proc/cpuinfo", "model name"),
            cores(),
            of("/proc/meminfo", "MemTotal"),
            rustix::system::uname().release().to_string_lossy(),
            self.disk(),
            self.folder.path().display(),
            if self.quick {
                " (quick: these are no results)"
            } else {
                ""
            },
        )
    }
}

/// Threads that can work at once.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
