//! The disks of an emulated host: the initramfs, and an ext4 root with the userland and the built programs.
//!
//! Both are cached by the content of what goes in, below the build's target folder.
//!
//! A program is at the path it has here, with the libraries the loader names, so that what finds its neighbours by
//! its own path finds them there too.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use guest_images::cpio::Archive;
use guest_images::debian::{Kernel, Packages};

use crate::harness::run;

/// What an emulated host needs to boot, to be a KVM host and to have networks.
const MODULES: [&str; 15] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio-rng",
    "irqbypass",
    "kvm",
    "kvm-amd",
    "tun",
    "loop",
    "bridge",
    "veth",
    "vsock",
    "tls",
    "tap",
];
/// Programs of the building machine that are of use there, where it has them.
const TOOLS: [&str; 10] = [
    "bash", "ip", "ss", "bridge", "mke2fs", "e2fsck", "debugfs", "dumpe2fs", "strace", "setpriv",
];
const TOOL_FOLDERS: [&str; 4] = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"];
/// Room on the root disk beyond what is on it. The file is sparse.
const FREE_BYTES: u64 = 8 << 30;
/// Root disks not used for so long are removed when a new one is made.
const KEEP: Duration = Duration::from_secs(2 * 60 * 60);
/// Part of every key: raised when the same inputs give another image.
const LAYOUT: u64 = 1;

/// The kernel and disks of the emulated hosts.
#[derive(Debug)]
pub(crate) struct Disks {
    /// The kernel's bzImage.
    pub(crate) kernel: PathBuf,
    /// The initramfs, without what a single run adds.
    pub(crate) initramfs: PathBuf,
    /// The root disk, to be opened as a snapshot.
    pub(crate) root: PathBuf,
}

/// Makes the disks, or finds those made before, in `cache`. `shared` names the files and folders to put on the
/// root disk, each at its own path; all are absolute.
///
/// # Errors
/// When a package, a module, a file or a tool is missing.
pub(crate) fn make(cache: &Path, shared: &[PathBuf]) -> Result<Disks> {
    fs::create_dir_all(cache).with_context(|| format!("create {}", cache.display()))?;
    let packages = Packages::new(cache.join("packages"));
    let linux = packages.get_through("linux-image-cloud-amd64", "linux-image-")?;
    let busybox = packages.get("busybox-static")?;
    let busybox = busybox.file("bin/busybox")?;
    let kernel = Kernel::of(&linux)?;
    Ok(Disks {
        initramfs: initramfs(cache, &kernel, &busybox)?,
        root: root(cache, &busybox, shared)?,
        kernel: kernel.image,
    })
}

fn initramfs(cache: &Path, kernel: &Kernel, busybox: &Path) -> Result<PathBuf> {
    let init = include_str!("initramfs.sh");
    let mut key = blake3::Hasher::new();
    key.update(&LAYOUT.to_le_bytes());
    key.update(init.as_bytes());
    key.update(format!("{MODULES:?} {} {}", kernel.image.display(), busybox.display()).as_bytes());
    let path = cache.join(format!("initramfs-{}", short(&key)));
    if path.is_file() {
        return Ok(path);
    }
    let mut archive = Archive::new();
    for folder in ["proc", "sys", "dev", "root", "nested"] {
        archive.directory(folder);
    }
    archive.character("dev/console", 5, 1);
    archive.file("init", 0o755, init);
    archive.file("bin/busybox", 0o755, fs::read(busybox)?);
    kernel.add_modules(&MODULES, &mut archive)?;
    publish(&path, |work| Ok(fs::write(work, archive.finish())?))?;
    Ok(path)
}

fn root(cache: &Path, busybox: &Path, shared: &[PathBuf]) -> Result<PathBuf> {
    let mut files = BTreeSet::new();
    for path in shared {
        collect(path, &mut files)?;
    }
    for tool in TOOLS {
        let found = TOOL_FOLDERS.iter().map(|folder| Path::new(folder).join(tool));
        files.extend(found.filter(|path| path.is_file()).take(1));
    }
    files.insert("/etc/mke2fs.conf".into());
    let mut key = blake3::Hasher::new();
    key.update(&LAYOUT.to_le_bytes());
    key.update(include_bytes!("machine.sh"));
    key.update(busybox.as_os_str().as_encoded_bytes());
    let mut bytes = 0;
    for file in &files {
        key.update(file.as_os_str().as_encoded_bytes());
        key.update(b"\0");
        key.update(content(file)?.as_bytes());
        bytes += fs::metadata(file)
            .with_context(|| format!("look at {}", file.display()))?
            .len();
    }
    let path = cache.join(format!("root-{}.ext4", short(&key)));
    if path.is_file() {
        // Its time says when it was last used.
        File::open(&path)?.set_modified(SystemTime::now())?;
        return Ok(path);
    }
    forget_old(cache);
    let staging = tempfile::tempdir_in(cache).context("make a folder for the root disk")?;
    stage(staging.path(), busybox, &files)?;
    publish(&path, |work| {
        let size = (bytes + FREE_BYTES) >> 20;
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-E"])
            .arg("lazy_itable_init=1,nodiscard,root_owner=0:0")
            .arg("-d")
            .arg(staging.path())
            .arg(work)
            .arg(format!("{size}M")))?;
        Ok(())
    })?;
    Ok(path)
}

fn stage(root: &Path, busybox: &Path, files: &BTreeSet<PathBuf>) -> Result<()> {
    // As Debian has it, so that a file is found by either of its paths.
    for folder in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(root.join("usr").join(folder))?;
        symlink(format!("usr/{folder}"), root.join(folder))?;
    }
    for folder in ["etc", "proc", "sys", "dev", "run", "tmp", "root", "results"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::write(root.join("sbin/nested-init"), include_str!("machine.sh"))?;
    fs::set_permissions(root.join("sbin/nested-init"), fs::Permissions::from_mode(0o755))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nkvm:x:104:\n")?;
    let mut hosts = "127.0.0.1 localhost\n".to_owned();
    for host in 1..=super::MAX_HOSTS {
        hosts += &format!("10.77.0.{host} host-{host}\n");
    }
    fs::write(root.join("etc/hosts"), hosts)?;
    let mut libraries = BTreeSet::new();
    for file in files {
        copy(file, &inside(root, file))?;
        if is_elf(file)? {
            libraries.extend(needed(file));
        }
    }
    for library in libraries {
        copy(&library, &inside(root, &library))?;
    }
    copy(busybox, &root.join("bin/busybox"))?;
    for applet in run(Command::new(busybox).arg("--list"))?.lines() {
        let link = root.join("bin").join(applet);
        // A tool of the building machine does more than the applet of its name.
        let there = ["bin", "sbin"]
            .iter()
            .any(|folder| root.join(folder).join(applet).exists());
        if !there {
            symlink("/bin/busybox", link)?;
        }
    }
    Ok(())
}

/// Where `path` of this machine is below `root`.
fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Links where that is possible, copies otherwise.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    // The same file under another of its names (`/lib` and `/usr/lib`).
    if to.symlink_metadata().is_ok() {
        fs::remove_file(to)?;
    }
    let real = from
        .canonicalize()
        .with_context(|| format!("find {}", from.display()))?;
    if fs::hard_link(&real, to).is_err() {
        fs::copy(&real, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    }
    Ok(())
}

/// All files below `path`, or `path` itself.
fn collect(path: &Path, files: &mut BTreeSet<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.insert(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}

/// The programs in `folder`: files that may be executed and are ELF.
///
/// # Errors
/// When the folder cannot be read.
pub(crate) fn programs(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        let data = fs::metadata(&path)?;
        if data.is_file() && data.permissions().mode() & 0o111 != 0 && is_elf(&path)? {
            found.push(path);
        }
    }
    Ok(found)
}

fn is_elf(path: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    Ok(file.read_exact(&mut magic).is_ok() && magic == *b"\x7fELF")
}

/// The libraries and the loader of a program, as the loader itself resolves them; none of one linked statically.
fn needed(program: &Path) -> Vec<PathBuf> {
    let Ok(output) = Command::new("ldd").arg(program).output() else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

fn content(path: &Path) -> Result<blake3::Hash> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(&mut file)
        .with_context(|| format!("read {}", path.display()))?;
    Ok(hasher.finalize())
}

fn short(key: &blake3::Hasher) -> String {
    key.finalize().to_hex()[..16].to_owned()
}

/// Makes a file under another name and renames it: a name in the cache always means a whole file.
fn publish(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let work = path.with_extension(format!("new-{}", std::process::id()));
    let result = make(&work).and_then(|()| Ok(fs::rename(&work, path)?));
    if result.is_err() {
        // It may not even exist; the error that matters is the first.
        let _ = fs::remove_file(&work);
    }
    result.with_context(|| format!("make {}", path.display()))
}

/// Removes root disks that nobody used for long. One in use by a QEMU stays readable for it.
fn forget_old(cache: &Path) {
    let Ok(entries) = fs::read_dir(cache) else { return };
    for entry in entries.flatten() {
        let old = entry
            .metadata()
            .and_then(|data| data.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age > KEEP));
        if old && entry.file_name().to_string_lossy().starts_with("root-") {
            // Another may have removed it.
            let _ = fs::remove_file(entry.path());
        }
    }
}
