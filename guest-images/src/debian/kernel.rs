//! A Debian kernel package: its image, its modules in loading order, and the uncompressed ELF in the image.
//!
//! A bzImage is a real-mode part of `(setup_sects + 1) * 512` bytes, then the protected-mode part, in which the
//! compressed kernel lies at `payload_offset` with `payload_length` bytes (Linux, Documentation/arch/x86/boot.rst):
//!
//! | Offset | Bytes | Field |
//! |---|---|---|
//! | 0x1f1 | 1 | `setup_sects`, 0 means 4 |
//! | 0x202 | 4 | "HdrS" |
//! | 0x206 | 2 | protocol version, 2.08 or later for the payload's fields |
//! | 0x248 | 4 | `payload_offset` |
//! | 0x24c | 4 | `payload_length`; the last four bytes of the payload are its size uncompressed |

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::packages::Package;
use super::{Error, io};
use crate::cpio::Archive;

/// No kernel is larger when uncompressed.
const MAX_VMLINUX_BYTES: usize = 512 << 20;
/// LZ4's legacy frames have blocks of 8 MiB at most when uncompressed.
const LZ4_BLOCK_BYTES: usize = 8 << 20;
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// A kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The version, as `uname -r` says it.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    modules: PathBuf,
}

/// A kernel module, ready to be loaded.
#[derive(Debug, Clone)]
pub struct Module {
    /// Its file's name without the extension.
    pub name: String,
    /// The ELF file, uncompressed.
    pub data: Vec<u8>,
}

impl Kernel {
    /// The kernel of an unpacked package.
    ///
    /// # Errors
    /// When there is no `vmlinuz` in it.
    pub fn of(package: &Package) -> Result<Self, Error> {
        let boot = package.root.join("boot");
        let names = fs::read_dir(&boot).map_err(io("list", &boot))?;
        let release = names
            .filter_map(|entry| {
                Some(
                    entry
                        .ok()?
                        .file_name()
                        .to_str()?
                        .strip_prefix("vmlinuz-")?
                        .to_owned(),
                )
            })
            .next()
            .ok_or_else(|| Error::NotAKernel {
                what: format!("package {} has no /boot/vmlinuz-*", package.id),
            })?;
        // Packages of a merged-/usr Debian have their modules there.
        let below = ["lib/modules", "usr/lib/modules"].map(|folder| package.root.join(folder).join(&release));
        let modules = below.into_iter().find(|folder| folder.is_dir());
        Ok(Self {
            image: boot.join(format!("vmlinuz-{release}")),
            modules: modules.ok_or_else(|| Error::NotAKernel {
                what: format!("package {} has no modules", package.id),
            })?,
            release,
        })
    }

    /// The modules `wanted` and what they depend on, each after what it needs. A name that the kernel has built
    /// in is passed over.
    ///
    /// # Errors
    /// When one is neither there nor built in.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<Module>, Error> {
        let mut files = Vec::new();
        walk(&self.modules.join("kernel"), &mut files)?;
        let builtin = self.modules.join("modules.builtin");
        let builtin = fs::read_to_string(&builtin).map_err(io("read", &builtin))?;
        let builtin = builtin
            .lines()
            .filter_map(|line| line.rsplit('/').next())
            .map(module_name);
        let mut search = Search {
            files,
            builtin: builtin.collect(),
            seen: BTreeSet::new(),
            ordered: Vec::new(),
        };
        for name in wanted {
            search.visit(name)?;
        }
        Ok(search.ordered)
    }

    /// Puts the modules `wanted`, and what they need, into an initial RAM disk as `modules/NAME.ko`, and their names in
    /// the order in which they are to be loaded as `modules/order`.
    ///
    /// # Errors
    /// As [`Self::modules`].
    pub fn add_modules(&self, wanted: &[&str], archive: &mut Archive) -> Result<(), Error> {
        let mut order = String::new();
        for module in self.modules(wanted)? {
            order += &module.name;
            order.push('\n');
            archive.file(&format!("modules/{}.ko", module.name), 0o644, module.data);
        }
        archive.file("modules/order", 0o644, order);
        Ok(())
    }

    /// The uncompressed kernel: an ELF64 file, with a PVH entry note where the kernel has one.
    ///
    /// # Errors
    /// When the image is not a bzImage, or compressed in a way not known here.
    pub fn vmlinux(&self) -> Result<Vec<u8>, Error> {
        let image = fs::read(&self.image).map_err(io("read", &self.image))?;
        let elf = uncompress(payload(&image)?)?;
        if elf.starts_with(b"\x7fELF") {
            Ok(elf)
        } else {
            Err(not_a_kernel("the kernel in the image is not an ELF file"))
        }
    }
}

struct Search {
    files: Vec<PathBuf>,
    builtin: BTreeSet<String>,
    seen: BTreeSet<String>,
    ordered: Vec<Module>,
}

impl Search {
    /// Depth first: what a module needs is put before it. The kernel's modules have no cycles, and `seen` ends one.
    fn visit(&mut self, name: &str) -> Result<(), Error> {
        let name = module_name(name);
        if self.builtin.contains(&name) || !self.seen.insert(name.clone()) {
            return Ok(());
        }
        let file = self.files.iter().find(|file| {
            let file = file.file_name().and_then(|file| file.to_str());
            file.is_some_and(|file| module_name(file) == name)
        });
        let file = file.ok_or_else(|| Error::NoModule { name: name.clone() })?;
        let data = read_module(file)?;
        for needed in depends(&data) {
            self.visit(&needed)?;
        }
        self.ordered.push(Module { name, data });
        Ok(())
    }
}

/// A module's name from its file's: no extension, and dashes and underscores are the same.
fn module_name(file: &str) -> String {
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// What a module's `.modinfo` says it depends on: NUL-terminated `depends=a,b`.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|&byte| byte == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(io("list", folder))? {
        let path = entry.map_err(io("list", folder))?.path();
        if path.is_dir() {
            walk(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Later Debian releases compress their modules.
fn read_module(file: &Path) -> Result<Vec<u8>, Error> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(file).map_err(io("read", file)),
    };
    let mut command = Command::new(program);
    command.arg("-dc").arg(file).stdin(Stdio::null());
    let output = command.output().map_err(|source| Error::Start {
        program: program.into(),
        source,
    })?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(Error::Failed {
            command: format!("{command:?}"),
            status: output.status.to_string(),
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }
}

fn not_a_kernel(what: &str) -> Error {
    Error::NotAKernel { what: what.into() }
}

/// The compressed kernel in a bzImage.
fn payload(image: &[u8]) -> Result<&[u8], Error> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(|bytes| u32::from_le_bytes(bytes) as usize)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(not_a_kernel(
            "the image is not a bzImage: it has no \"HdrS\" at 0x202",
        ));
    }
    let sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let found = word(0x248).zip(word(0x24c)).and_then(|(offset, length)| {
        let start = offset.checked_add((sectors + 1) * 512)?;
        image.get(start..start.checked_add(length)?)
    });
    found.ok_or_else(|| not_a_kernel("the image's payload is outside the image"))
}

fn uncompress(payload: &[u8]) -> Result<Vec<u8>, Error> {
    let (data, size) = payload
        .split_last_chunk::<4>()
        .ok_or_else(|| not_a_kernel("the image's payload is empty"))?;
    let size = u32::from_le_bytes(*size) as usize;
    if size > MAX_VMLINUX_BYTES {
        return Err(not_a_kernel(
            "the image's payload claims to be larger than any kernel",
        ));
    }
    let Some(mut rest) = data.strip_prefix(&LZ4_LEGACY) else {
        return Err(not_a_kernel(
            "the image's payload is not LZ4, which is what is known here",
        ));
    };
    let bad = || not_a_kernel("the image's LZ4 payload is damaged");
    let mut out = Vec::with_capacity(size);
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block = after.get(..length).ok_or_else(bad)?;
        let block = lz4_flex::block::decompress(block, LZ4_BLOCK_BYTES).map_err(|_| bad())?;
        out.extend_from_slice(&block);
        rest = &after[length..];
    }
    if out.len() == size { Ok(out) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 64];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&64_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    fn compressed(data: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        for block in data.chunks(LZ4_BLOCK_BYTES) {
            let block = lz4_flex::block::compress(block);
            payload.extend_from_slice(&(block.len() as u32).to_le_bytes());
            payload.extend_from_slice(&block);
        }
        payload.extend_from_slice(&(data.len() as u32).to_le_bytes());
        payload
    }

    #[test]
    fn the_kernel_in_an_image_is_found() {
        let kernel: Vec<u8> = (0..9_u32 << 20).map(|n| (n / 5000) as u8).collect();
        let image = image(&compressed(&kernel));
        let payload = payload(&image).expect("it has one");
        assert!(uncompress(payload).expect("it is good") == kernel);
    }

    #[test]
    fn a_damaged_image_is_an_error_wherever_it_is_cut() {
        let good = image(&compressed(&[7; 5000]));
        for length in 0..good.len() {
            assert!(payload(&good[..length]).is_err(), "{length} bytes passed");
        }
        let mut wrong = compressed(&[7; 5000]);
        let size = wrong.len() - 4;
        wrong[size] ^= 1;
        assert!(uncompress(&wrong).is_err());
        assert!(uncompress(b"").is_err());
        assert!(uncompress(&[0xff; 100]).is_err());
    }

    #[test]
    fn what_a_module_depends_on_is_read_from_its_information() {
        assert_eq!(
            depends(b"\x7fELF..\0license=GPL\0depends=virtio,virtio_ring\0name=x\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(depends(b"\0depends=\0").is_empty());
        assert!(depends(b"nothing").is_empty());
        assert_eq!(module_name("kvm-amd.ko.xz"), "kvm_amd");
    }
}
