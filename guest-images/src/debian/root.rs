//! A Debian root file system on an ext4 disk, for `us.root=`: mmdebstrap makes the tree, mke2fs the disk.

use std::fs;
use std::path::Path;

use super::packages::run;
use super::{Error, io};

/// What the tests in it use, beyond a minimal system.
const INCLUDE: &str = "stress-ng,iperf3,e2fsprogs,iproute2,procps,python3-minimal";
/// Room for what is written to it.
const SIZE: &str = "2G";
/// Times in it are not those of its making: mmdebstrap cuts all later ones to this.
const EPOCH: &str = "SOURCE_DATE_EPOCH=1700000000";

/// Makes the disk at `path`: a sparse file of 2 GiB, of which about 350 MiB are used. Takes a minute, and root.
///
/// # Errors
/// When mmdebstrap or mke2fs is missing or fails.
pub fn root_disk(path: &Path) -> Result<(), Error> {
    let name = |ending: &str| path.with_extension(format!("{ending}-{}", std::process::id()));
    let (tree, work) = (name("tree"), name("new"));
    let result = make(&tree, &work, path);
    // What is left is of no use, and an error that matters more may be on its way.
    let _ = fs::remove_dir_all(&tree);
    let _ = fs::remove_file(&work);
    result
}

fn make(tree: &Path, work: &Path, path: &Path) -> Result<(), Error> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let name = name.filter(|_| release.lines().any(|line| line == "ID=debian"));
    let include = format!("--include={INCLUDE}");
    let (tree_text, work_text) = (tree.to_string_lossy(), work.to_string_lossy());
    let without =
        ["doc", "man", "locale"].map(|folder| format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    let mut words = vec![EPOCH, "mmdebstrap", "--quiet", "--variant=minbase", &include];
    words.extend(without.iter().map(String::as_str));
    words.extend([name.unwrap_or("stable"), &tree_text]);
    run("env", words)?;
    let how = "lazy_itable_init=1,root_owner=0:0";
    let words = [
        "-q", "-t", "ext4", "-L", "debian", "-E", how, "-d", &tree_text, &work_text, SIZE,
    ];
    run("mke2fs", words)?;
    fs::rename(work, path).map_err(io("rename to", path))
}
