//! Debian packages, fetched with apt and unpacked, never installed.
//!
//! `STORE/NAME_VERSION/` holds what `dpkg-deb -x` made of a package. A package is fetched once for each version:
//! the folder appears under its name only when it is complete. apt checks the signatures.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, io};

/// Unpacked packages, in a folder of ours.
#[derive(Debug, Clone)]
pub struct Packages {
    store: PathBuf,
}

/// One unpacked package.
#[derive(Debug, Clone)]
pub struct Package {
    /// `NAME_VERSION`: what it is, exactly.
    pub id: String,
    /// Its files, as they would be under `/`.
    pub root: PathBuf,
}

impl Packages {
    /// Packages kept in `store`, made when it does not exist.
    #[must_use]
    pub fn new(store: impl Into<PathBuf>) -> Self {
        Self { store: store.into() }
    }

    /// The version of `name` that apt would install, fetched and unpacked.
    ///
    /// # Errors
    /// When apt does not know it or cannot fetch it.
    pub fn get(&self, name: &str) -> Result<Package, Error> {
        let version = match candidate(name)? {
            Some(version) => version,
            None => {
                update()?;
                candidate(name)?.ok_or_else(|| Error::NoPackage { name: name.into() })?
            }
        };
        // The epoch's colon is awkward in paths.
        let id = format!("{name}_{}", version.replace(':', "%3a"));
        let root = self.store.join(&id);
        if !root.is_dir() {
            self.fetch(name, &version, &root)?;
        }
        Ok(Package { id, root })
    }

    /// The package that the meta package `name` stands for: the first it depends on whose name starts so.
    ///
    /// # Errors
    /// When there is none, or it cannot be had.
    pub fn get_through(&self, name: &str, start: &str) -> Result<Package, Error> {
        if candidate(name)?.is_none() {
            update()?;
        }
        let depends = run("apt-cache", ["depends", name])?;
        let found = depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|depended| depended.starts_with(start));
        match found {
            Some(found) => self.get(found),
            None => Err(Error::NoPackage { name: name.into() }),
        }
    }

    fn fetch(&self, name: &str, version: &str, root: &Path) -> Result<(), Error> {
        // Others may fetch the same at the same time: each in a folder of its own, the first rename wins.
        let work = self.store.join(format!("fetch-{}-{name}", std::process::id()));
        fs::create_dir_all(&work).map_err(io("create", &work))?;
        let result = Self::fetch_into(&work, name, version, root);
        // What is left is of no use, and an error that matters more may be on its way.
        let _ = fs::remove_dir_all(&work);
        result
    }

    fn fetch_into(work: &Path, name: &str, version: &str, root: &Path) -> Result<(), Error> {
        let wanted = format!("{name}={version}");
        let download = || run_in(work, "apt-get", ["download", "-q", &wanted]);
        // The lists may be older than the archive, which no longer has that version's file.
        if download().is_err() {
            update()?;
            download()?;
        }
        let file = fs::read_dir(work)
            .map_err(io("list", work))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension() == Some(OsStr::new("deb")))
            .ok_or_else(|| Error::NoPackage { name: name.into() })?;
        let unpacked = work.join("root");
        run("dpkg-deb", [OsStr::new("-x"), file.as_ref(), unpacked.as_ref()])?;
        match fs::rename(&unpacked, root) {
            Err(_) if root.is_dir() => Ok(()),
            result => result.map_err(io("rename to", root)),
        }
    }
}

/// The version apt would install, None when it knows none.
fn candidate(name: &str) -> Result<Option<String>, Error> {
    let policy = run("apt-cache", ["policy", name])?;
    Ok(policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .map(str::to_owned))
}

fn update() -> Result<(), Error> {
    let root = run("id", ["-u"])?.trim() == "0";
    if root {
        run("apt-get", ["update", "-qq"])?;
    } else {
        run("sudo", ["-n", "apt-get", "update", "-qq"])?;
    }
    Ok(())
}

/// Runs a program to its end; its standard output.
pub(crate) fn run<A: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = A>,
) -> Result<String, Error> {
    run_in(Path::new("."), program, arguments)
}

fn run_in<A: AsRef<OsStr>>(
    folder: &Path,
    program: &str,
    arguments: impl IntoIterator<Item = A>,
) -> Result<String, Error> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(folder)
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(std::process::Stdio::null());
    let output = command.output().map_err(|source| Error::Start {
        program: program.into(),
        source,
    })?;
    if !output.status.success() {
        return Err(Error::Failed {
            command: format!("{command:?}"),
            status: output.status.to_string(),
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
