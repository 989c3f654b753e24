//! Which QEMU emulates the hosts.
//!
//! Before 8.2 QEMU does not let a hypervisor in it intercept XSETBV: KVM does not learn what its guest enabled, sets
//! XCR0 back at its next exit, and the guest's AVX instructions fault and its XSAVE leaves out registers. Where the
//! installed QEMU is older, that of the Debian release's backports is unpacked beside it and used.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use guest_images::debian::Packages;

use crate::harness::run;

const PROGRAM: &str = "qemu-system-x86_64";
/// The first version, major and minor, in which a guest of the emulated KVM has correct AVX and XSAVE.
const OLDEST: (u32, u32) = (8, 2);

/// A QEMU to run.
#[derive(Debug)]
pub(crate) struct Qemu {
    pub(crate) program: PathBuf,
    /// Where it finds its firmware, when not where it was built for.
    pub(crate) data: Vec<PathBuf>,
}

impl Qemu {
    /// The installed one when it is new enough, otherwise one from backports, kept in `cache`.
    pub(crate) fn find(cache: &Path) -> Result<Self> {
        let said =
            run(Command::new(PROGRAM).arg("--version")).context("find QEMU (Debian: qemu-system-x86)")?;
        if version(&said).is_some_and(|version| version >= OLDEST) {
            return Ok(Self {
                program: PROGRAM.into(),
                data: Vec::new(),
            });
        }
        let first = said.lines().next().unwrap_or_default();
        Self::backported(cache).with_context(|| {
            let (major, minor) = OLDEST;
            format!("{first} is too old, QEMU {major}.{minor} or newer is needed; fetch one from backports")
        })
    }

    fn backported(cache: &Path) -> Result<Self> {
        let packages = Packages::new(cache.join("packages")).backports()?;
        let program = packages
            .get("qemu-system-x86")?
            .root
            .join("usr/bin")
            .join(PROGRAM);
        let data = packages.get("qemu-system-data")?.root.join("usr/share/qemu");
        let firmware = packages.get("seabios")?.root.join("usr/share/seabios");
        // Its libraries are those of the installed one, mostly; a loader's error names one that is not.
        let said = run(Command::new(&program).arg("--version"))?;
        if version(&said).is_none_or(|version| version < OLDEST) {
            bail!(
                "that is too old as well: {}",
                said.lines().next().unwrap_or_default()
            );
        }
        Ok(Self {
            program,
            data: vec![data, firmware],
        })
    }
}

/// Major and minor of `QEMU emulator version 7.2.22 (Debian ..)`.
fn version(said: &str) -> Option<(u32, u32)> {
    let (_, rest) = said.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let old = version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)");
        let new = version("QEMU emulator version 10.0.2");
        assert_eq!(old, Some((7, 2)));
        assert!(new >= Some(OLDEST) && old < Some(OLDEST));
        assert_eq!(version("nonsense"), None);
    }
}
