//! Writes `newc` cpio archives, which Linux unpacks as its initial root file system.
//!
//! Each entry is a header of 110 ASCII bytes, the name with a NUL, padding to 4, the data, padding to 4:
//!
//! ```text
//! "070701" ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
//! ```
//!
//! each number as eight hexadecimal digits. The same entries give the same bytes: they are written sorted by
//! name, owned by root, without a time. Archives may be laid end to end: Linux unpacks one after the other.

use std::collections::BTreeMap;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;
const TRAILER: &str = "TRAILER!!!";

enum Entry {
    Directory,
    File { mode: u32, data: Vec<u8> },
    Link { target: String },
    Character { major: u32, minor: u32 },
}

/// An archive in the making. Names are relative, `bin/sh`; the folders above them are made as needed.
#[derive(Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A folder.
    pub fn directory(&mut self, name: &str) {
        self.insert(name, Entry::Directory);
    }

    /// A regular file with permission bits `mode`.
    pub fn file(&mut self, name: &str, mode: u32, data: impl Into<Vec<u8>>) {
        let data = data.into();
        self.insert(name, Entry::File { mode, data });
    }

    /// A symbolic link to `target`.
    pub fn link(&mut self, name: &str, target: &str) {
        let target = target.to_owned();
        self.insert(name, Entry::Link { target });
    }

    /// A character device.
    pub fn character(&mut self, name: &str, major: u32, minor: u32) {
        self.insert(name, Entry::Character { major, minor });
    }

    fn insert(&mut self, name: &str, entry: Entry) {
        for (at, _) in name.match_indices('/') {
            let above = self.entries.entry(name[..at].to_owned());
            above.or_insert(Entry::Directory);
        }
        self.entries.insert(name.to_owned(), entry);
    }

    /// The archive's bytes.
    ///
    /// # Panics
    /// When a file has 4 GiB or more, which the format cannot say.
    #[must_use]
    pub fn finish(&self) -> Vec<u8> {
        let mut out = Vec::new();
        // Sorted by name, a folder comes before what is in it.
        for (ino, (name, entry)) in (1..).zip(&self.entries) {
            let (mode, device, data) = match entry {
                Entry::Directory => (DIRECTORY | 0o755, (0, 0), &[][..]),
                Entry::File { mode, data } => (REGULAR | mode, (0, 0), &data[..]),
                Entry::Link { target } => (SYMLINK | 0o777, (0, 0), target.as_bytes()),
                Entry::Character { major, minor } => (CHARACTER | 0o600, (*major, *minor), &[][..]),
            };
            append(&mut out, ino, mode, device, name, data);
        }
        append(&mut out, 0, 0, (0, 0), TRAILER, &[]);
        // As cpio does, and so that another archive may follow.
        pad(&mut out, 512);
        out
    }
}

fn append(out: &mut Vec<u8>, ino: u32, mode: u32, device: (u32, u32), name: &str, data: &[u8]) {
    let Ok(size) = u32::try_from(data.len()) else {
        panic!("{name} is too large for a cpio archive: {} bytes", data.len());
    };
    let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
    let (major, minor) = device;
    let named = name.len() as u32 + 1;
    out.extend_from_slice(b"070701");
    for number in [ino, mode, 0, 0, links, 0, size, 0, 0, major, minor, named, 0] {
        out.extend_from_slice(format!("{number:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    pad(out, 4);
    out.extend_from_slice(data);
    pad(out, 4);
}

fn pad(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_documented_bytes_whatever_the_order() {
        let mut archive = Archive::new();
        archive.file("bin/x", 0o755, *b"hello");
        archive.link("bin/y", "x");
        archive.character("dev/console", 5, 1);
        let bytes = archive.finish();
        let header = "07070100000001000041ed0000000000000000000000020000000000000000000000000000000000000000000000000000000400000000bin\0";
        assert_eq!(&bytes[..114], header.as_bytes());
        // 110 + 4 bytes and 2 of padding, then the file.
        let file = "07070100000002000081ed00000000000000000000000100000000000000050000000000000000000000000000000000000006\
                    00000000bin/x\0hello\0\0\0";
        let found = &bytes[116..116 + file.len()];
        assert_eq!(found, file.as_bytes(), "{}", String::from_utf8_lossy(found));
        assert_eq!(bytes.len() % 512, 0);

        let mut other = Archive::new();
        other.character("dev/console", 5, 1);
        other.link("bin/y", "x");
        other.file("bin/x", 0o755, *b"hello");
        assert_eq!(other.finish(), bytes);
    }
}
