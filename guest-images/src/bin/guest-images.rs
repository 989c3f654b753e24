//! `guest-images` writes guests: the bare-metal ones, or a Debian one.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use guest_images::debian::{Image, Packages, cache, root_disk};

const USAGE: &str = "\
usage: guest-images DIR
           writes the bare-metal guests ticker.elf and churn.elf, and understudy-checkpoint, by which a Linux guest asks
           for a checkpoint of itself, into the existing directory DIR
       guest-images debian DIR
           makes a Debian guest in DIR: vmlinuz, vmlinux (for PVH), initramfs.cpio, and torture for the host
       guest-images debian-root FILE
           makes an ext4 disk with a Debian root file system and stress-ng, iperf3, e2fsprogs (as root)";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let result = match &arguments[..] {
        [help] if help == "--help" || help == "-h" => {
            println!("{USAGE}");
            Ok(())
        }
        [debian_guest, dir] if debian_guest == "debian" => debian(Path::new(dir)),
        [root, file] if root == "debian-root" => root_disk(Path::new(file)).map_err(Into::into),
        [dir] => bare_metal(Path::new(dir)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("guest-images: {error}");
            let mut source = error.source();
            while let Some(error) = source {
                eprint!(": {error}");
                source = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn bare_metal(dir: &Path) -> Result<(), Box<dyn Error>> {
    let failed = |error| format!("cannot write the guests into {}: {error}", dir.display());
    guest_images::write_all(dir).map_err(failed)?;
    for (name, image) in guest_images::ALL {
        println!("wrote {} ({} bytes)", dir.join(name).display(), image.len());
    }
    let program = guest_images::write_checkpoint(dir).map_err(failed)?;
    println!(
        "wrote {} ({} bytes)",
        program.display(),
        guest_images::CHECKPOINT.len()
    );
    Ok(())
}

fn debian(dir: &Path) -> Result<(), Box<dyn Error>> {
    let store = cache().unwrap_or_else(|| PathBuf::from(dir)).join("packages");
    let image = Image::build(dir, &Packages::new(store))?;
    println!("{} in {}", image.id, dir.display());
    Ok(())
}
