//! `guest-images DIR` writes the bare-metal guests into DIR.

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let (Some(dir), None) = (arguments.next().map(PathBuf::from), arguments.next()) else {
        eprintln!(
            "usage: guest-images DIR\nWrites ticker.elf and churn.elf into the existing directory DIR."
        );
        return ExitCode::from(2);
    };
    if let Err(error) = guest_images::write_all(&dir) {
        eprintln!(
            "guest-images: cannot write the guests into {}: {error}",
            dir.display()
        );
        return ExitCode::FAILURE;
    }
    for (name, image) in guest_images::ALL {
        println!("wrote {} ({} bytes)", dir.join(name).display(), image.len());
    }
    ExitCode::SUCCESS
}
