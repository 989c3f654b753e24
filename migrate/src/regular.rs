//! Opening a file that has to be one: never a named pipe (which waits for its other end), a device or a folder.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Opens `path` for reading; a link to a file is a file.
///
/// # Errors
/// What the system says; [`io::ErrorKind::InvalidInput`] when it is something else than a file.
pub fn open(path: &Path) -> io::Result<File> {
    // Looked at first, because opening a device may already do something.
    check(&std::fs::metadata(path)?)?;
    // And not waited for, should it have become a pipe in this moment.
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    let file = File::options()
        .read(true)
        .custom_flags(i32::try_from(flags).unwrap_or_default())
        .open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

/// The content of a file of at most `max` bytes.
///
/// # Errors
/// As [`open`]; [`io::ErrorKind::FileTooLarge`] when it is longer.
pub fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        let why = format!("it is longer than {max} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

/// The same of a text.
///
/// # Errors
/// As [`read`]; [`io::ErrorKind::InvalidData`] when it is no UTF-8.
pub fn read_text(path: &Path, max: u64) -> io::Result<String> {
    String::from_utf8(read(path, max)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

fn check(metadata: &std::fs::Metadata) -> io::Result<()> {
    let kind = metadata.file_type();
    let what = match kind {
        k if k.is_file() => return Ok(()),
        k if k.is_dir() => "a folder",
        k if k.is_fifo() => "a named pipe",
        k if k.is_socket() => "a socket",
        k if k.is_block_device() || k.is_char_device() => "a device",
        _ => "something else",
    };
    let why = format!("it is {what}, and a file is needed");
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_opened_and_nothing_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link, pipe) = (dir.path().join("f"), dir.path().join("l"), dir.path().join("p"));
        std::fs::write(&file, b"x").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        assert!(open(&file).is_ok() && open(&link).is_ok());
        for (path, what) in [
            (dir.path(), "a folder"),
            (&pipe, "a named pipe"),
            (Path::new("/dev/zero"), "a device"),
        ] {
            let told = open(path).unwrap_err().to_string();
            assert!(told.contains(what), "{told}");
        }
        assert_eq!(read(&file, 1).unwrap(), b"x");
        std::fs::write(&file, b"xy").unwrap();
        assert_eq!(read(&file, 1).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(read_text(&link, 2).unwrap(), "xy");
        assert!(
            read_text(&pipe, 2)
                .unwrap_err()
                .to_string()
                .contains("a named pipe")
        );
        assert_eq!(
            open(&dir.path().join("none")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
