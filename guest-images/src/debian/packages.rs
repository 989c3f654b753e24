//! Debian packages, fetched with apt and unpacked, never installed.
//!
//! `STORE/NAME_VERSION/` holds what `dpkg-deb -x` made of a package. A package is fetched once for each version:
//! the folder appears under its name only when it is complete. apt checks the signatures.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, io};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Unpacked packages, in a folder of ours.
#[derive(Debug, Clone)]
pub struct Packages {
    store: PathBuf,
    /// Options for apt: none for the sources of the machine itself.
    apt: Vec<String>,
}

/// One unpacked package.
#[derive(Debug, Clone)]
pub struct Package {
    /// `NAME_VERSION`: what it is, exactly.
    pub id: String,
    /// Its files, as they would be under `/`.
    pub root: PathBuf,
}

impl Package {
    /// One of its files, wherever a Debian with or without merged `/usr` has it.
    ///
    /// # Errors
    /// When it is in neither place.
    pub fn file(&self, name: &str) -> Result<PathBuf, Error> {
        let places = [self.root.join(name), self.root.join("usr").join(name)];
        let found = places.into_iter().find(|path| path.is_file());
        found.ok_or_else(|| Error::NoFile {
            package: self.id.clone(),
            file: name.into(),
        })
    }
}

impl Packages {
    /// Packages kept in `store`, made when it does not exist.
    #[must_use]
    pub fn new(store: impl Into<PathBuf>) -> Self {
        Self {
            store: store.into(),
            apt: Vec::new(),
        }
    }

    /// The backports of this machine's Debian release, which apt need not have in its sources: the lists are kept
    /// in the store too.
    ///
    /// # Errors
    /// When this is not a Debian release that has them, or they cannot be fetched.
    pub fn backports(&self) -> Result<Self, Error> {
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let value = |key: &str| release.lines().find_map(|line| line.strip_prefix(key));
        let (Some("debian"), Some(name)) = (value("ID="), value("VERSION_CODENAME=")) else {
            return Err(Error::NoPackage {
                name: "from backports: this is not a Debian release".into(),
            });
        };
        let folder = self.store.join(format!("apt-{name}-backports"));
        let folder = std::path::absolute(&folder).map_err(io("find", &folder))?;
        let (lists, cache) = (folder.join("lists"), folder.join("cache"));
        for needed in [lists.join("partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&needed).map_err(io("create", &needed))?;
        }
        let sources = folder.join("sources.list");
        let mirror = mirror(name)?;
        let line = format!("deb [signed-by={KEYRING}] {mirror} {name}-backports main\n");
        // Whole, whoever reads it meanwhile.
        let written = folder.join(format!("sources.{}", std::process::id()));
        fs::write(&written, line).map_err(io("write", &written))?;
        fs::rename(&written, &sources).map_err(io("rename to", &sources))?;
        let apt = [
            ("Dir::Etc::sourcelist", sources.as_path()),
            ("Dir::Etc::sourceparts", Path::new("/dev/null")),
            ("Dir::State::lists", &lists),
            ("Dir::Cache", &cache),
            // What is installed is no candidate: it cannot be fetched from there.
            ("Dir::State::status", Path::new("/dev/null")),
        ];
        let option = |(key, path): (&str, &Path)| ["-o".to_owned(), format!("{key}={}", path.display())];
        Ok(Self {
            store: self.store.clone(),
            apt: apt.into_iter().flat_map(option).collect(),
        })
    }

    /// The version of `name` that apt would install, fetched and unpacked.
    ///
    /// # Errors
    /// When apt does not know it or cannot fetch it.
    pub fn get(&self, name: &str) -> Result<Package, Error> {
        let version = match self.candidate(name)? {
            Some(version) => version,
            None => {
                self.update()?;
                self.candidate(name)?
                    .ok_or_else(|| Error::NoPackage { name: name.into() })?
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
        if self.candidate(name)?.is_none() {
            self.update()?;
        }
        let depends = self.apt(Path::new("."), "apt-cache", &["depends", name])?;
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
        let result = self.fetch_into(&work, name, version, root);
        // What is left is of no use, and an error that matters more may be on its way.
        let _ = fs::remove_dir_all(&work);
        result
    }

    fn fetch_into(&self, work: &Path, name: &str, version: &str, root: &Path) -> Result<(), Error> {
        let wanted = format!("{name}={version}");
        let download = || self.apt(work, "apt-get", &["download", "-q", &wanted]);
        // The lists may be older than the archive, which no longer has that version's file.
        if download().is_err() {
            self.update()?;
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

    /// The version apt would install, None when it knows none.
    fn candidate(&self, name: &str) -> Result<Option<String>, Error> {
        let policy = self.apt(Path::new("."), "apt-cache", &["policy", name])?;
        Ok(policy
            .lines()
            .find_map(|line| line.trim().strip_prefix("Candidate: "))
            .filter(|version| *version != "(none)")
            .map(str::to_owned))
    }

    fn update(&self) -> Result<(), Error> {
        let here = Path::new(".");
        // Others may want the same at the same time, and apt-get does not wait for the lists.
        fs::create_dir_all(&self.store).map_err(io("create", &self.store))?;
        let path = self.store.join("update.lock");
        let turn = File::create(&path).map_err(io("create", &path))?;
        turn.lock().map_err(io("lock", &path))?;
        // The lists of the machine itself belong to root, ours to us.
        if self.apt.is_empty() && run("id", ["-u"])?.trim() != "0" {
            run_in(here, "sudo", ["-n", "apt-get", "update", "-qq"]).map(drop)
        } else {
            self.apt(here, "apt-get", &["update", "-qq"]).map(drop)
        }
    }

    fn apt(&self, folder: &Path, program: &str, arguments: &[&str]) -> Result<String, Error> {
        let options = self.apt.iter().map(String::as_str);
        run_in(folder, program, options.chain(arguments.iter().copied()))
    }
}

/// Where this machine gets its own release from: the release's backports are beside it.
fn mirror(release: &str) -> Result<String, Error> {
    let sources = run("apt-get", ["indextargets", "--format", "$(RELEASE) $(REPO_URI)"])?;
    let of_release = |line: &str| match line.split_once(' ') {
        Some((of, mirror)) if of == release => Some(mirror.trim().to_owned()),
        Some(_) | None => None,
    };
    sources
        .lines()
        .find_map(of_release)
        .ok_or_else(|| Error::NoPackage {
            name: format!("from backports: apt has no source for {release} itself"),
        })
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
