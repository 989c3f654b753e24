//! The Debian guest: a kernel, an initramfs with busybox and our init, nothing else.
//!
//! ```text
//! DIR/vmlinuz            Debian's bzImage
//! DIR/vmlinux            the same kernel uncompressed: ELF64 with a PVH entry
//! DIR/initramfs.cpio     /init, /bin/busybox, /bin/torture, /bin/understudy-checkpoint, /modules/*.ko
//! DIR/torture            for the host: `torture peer`, `torture check`
//! DIR/id                 what all of it was made of; written last
//! ```
//!
//! The same packages and the same program give the same bytes. What init does is documented in `init.sh`.

use std::fs;
use std::path::{Path, PathBuf};

use super::packages::Packages;
use super::{Error, Kernel, io};
use crate::cpio::Archive;
use crate::{CHECKPOINT, CHECKPOINT_NAME, TORTURE};

const INIT: &str = include_str!("init.sh");
/// Raised when the same inputs give other bytes.
const LAYOUT: u32 = 1;
/// The devices of our monitor, and those of QEMU that the image is tried with. ext4 and the console are built in.
const MODULES: [&str; 9] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio-rng",
    "virtio_balloon",
    "vsock",
    "vmw_vsock_virtio_transport",
    "virtio_console",
];

/// Where the parts of a Debian guest are.
#[derive(Debug, Clone)]
pub struct Image {
    /// The bzImage.
    pub bzimage: PathBuf,
    /// The uncompressed kernel, for the PVH boot protocol.
    pub vmlinux: PathBuf,
    /// The initial root file system.
    pub initramfs: PathBuf,
    /// The program for the host's side.
    pub torture: PathBuf,
    /// What it was made of, as text: kernel and busybox versions, and a hash of the rest.
    pub id: String,
}

impl Image {
    /// Makes the image in `dir`, or finds it there when it was made of the same parts.
    ///
    /// # Errors
    /// When a package cannot be had or a file not written.
    pub fn build(dir: &Path, packages: &Packages) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(io("create", dir))?;
        let linux = packages.get_through("linux-image-cloud-amd64", "linux-image-")?;
        let busybox = packages.get("busybox-static")?;
        let mut ours = blake3::Hasher::new();
        ours.update(&LAYOUT.to_le_bytes());
        for part in [
            INIT.as_bytes(),
            TORTURE,
            CHECKPOINT,
            format!("{MODULES:?}").as_bytes(),
        ] {
            ours.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        let id = format!("{} {} {}\n", linux.id, busybox.id, ours.finalize().to_hex());
        let image = Self {
            bzimage: dir.join("vmlinuz"),
            vmlinux: dir.join("vmlinux"),
            initramfs: dir.join("initramfs.cpio"),
            torture: dir.join("torture"),
            id: id.trim_end().to_owned(),
        };
        let made_of = dir.join("id");
        if fs::read_to_string(&made_of).is_ok_and(|there| there == id) {
            return Ok(image);
        }
        let kernel = Kernel::of(&linux)?;
        let bzimage = fs::read(&kernel.image).map_err(io("read", &kernel.image))?;
        write(&image.bzimage, &bzimage)?;
        write(&image.vmlinux, &kernel.vmlinux()?)?;
        write(
            &image.initramfs,
            &initramfs(&kernel, &busybox.file("bin/busybox")?)?,
        )?;
        write(&image.torture, TORTURE)?;
        set_executable(&image.torture)?;
        // Last: where it is, all the rest is whole.
        write(&made_of, id.as_bytes())?;
        Ok(image)
    }
}

fn initramfs(kernel: &Kernel, busybox: &Path) -> Result<Vec<u8>, Error> {
    let mut archive = Archive::new();
    for folder in ["proc", "sys", "dev", "mnt", "root", "tmp", "run"] {
        archive.directory(folder);
    }
    // Linux opens it for init before anything is mounted.
    archive.character("dev/console", 5, 1);
    archive.file("init", 0o755, INIT);
    let busybox = fs::read(busybox).map_err(io("read", busybox))?;
    archive.file("bin/busybox", 0o755, busybox);
    archive.file("bin/torture", 0o755, TORTURE);
    archive.file(&format!("bin/{CHECKPOINT_NAME}"), 0o755, CHECKPOINT);
    kernel.add_modules(&MODULES, &mut archive)?;
    Ok(archive.finish())
}

/// Under another name first: two that make the same image at once never leave half a file.
fn write(path: &Path, data: &[u8]) -> Result<(), Error> {
    let work = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&work, data).map_err(io("write", &work))?;
    fs::rename(&work, path).map_err(io("rename to", path))
}

fn set_executable(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(io("make executable", path))
}
