//! What is in the folder when a store is opened.
//!
//! Each file's header, manifest, records and index are read and checked against the root digest; its frames are not
//! (they are when they are used, and by `verify`). So opening reads kilobytes a segment, and says nothing about
//! frames that rotted since.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use segment::{FormatError, SegmentName, SegmentReader, VmId};

use super::{Entry, StoreError};

/// The ending of a segment's file.
pub(super) const ENDING: &str = ".seg";

/// Segments that are read at a time.
const SCAN_THREADS: usize = 4;
/// Below this many files, threads cost more than they bring.
const FILES_PER_THREAD: usize = 64;

/// A file with a segment's name.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) name: SegmentName,
    pub(super) content: Content,
}

/// What such a file turned out to be.
#[derive(Debug)]
pub(super) enum Content {
    /// A segment.
    Good(Entry),
    /// Nothing that can be used.
    Damaged(String),
    /// Sound as far as can be told, and written by a later version: kept, and not served.
    Newer { why: String, bytes: u64 },
}

/// Everything in `segments/`: the files, and the folders they are in.
pub(super) fn scan(segments: &Path) -> Result<(Vec<Found>, Vec<PathBuf>), StoreError> {
    let mut folders = vec![segments.to_owned()];
    let mut files = Vec::new();
    // Neither a file nor a pipe is one, whatever its name.
    let folders_in =
        |dir: &Path| children(dir).map(|all| all.into_iter().filter(|(_, path)| is_folder(path)));
    for (vm, vm_path) in folders_in(segments)? {
        folders.push(vm_path.clone());
        for (generation, generation_path) in folders_in(&vm_path)? {
            folders.push(generation_path.clone());
            for (file, path) in children(&generation_path)? {
                let name = file
                    .strip_suffix(ENDING)
                    .map(|epoch| format!("{vm}/{generation}/{epoch}").parse());
                match name {
                    Some(Ok(name)) => files.push((name, path)),
                    Some(Err(_)) | None => {
                        tracing::warn!(path = %path.display(), "not a segment's name: left alone")
                    }
                }
            }
        }
    }
    Ok((read_all(files)?, folders))
}

/// The names of a VM's files. Nothing is opened.
pub(super) fn names_of(segments: &Path, vm: &VmId) -> Result<Vec<SegmentName>, StoreError> {
    let mut names = Vec::new();
    for (generation, path) in children(&segments.join(vm.as_str()))? {
        for (file, _) in children(&path)? {
            let name = file
                .strip_suffix(ENDING)
                .and_then(|epoch| format!("{vm}/{generation}/{epoch}").parse().ok());
            names.extend(name);
        }
    }
    Ok(names)
}

fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// Names and paths of what is in a folder; nothing when it is not one.
fn children(dir: &Path) -> Result<Vec<(String, PathBuf)>, StoreError> {
    let failed = |source| StoreError::Io {
        what: "read the folder",
        path: dir.to_owned(),
        source,
    };
    let list = match fs::read_dir(dir) {
        Ok(list) => list,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotADirectory | io::ErrorKind::NotFound) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(failed(e)),
    };
    let mut found = Vec::new();
    for child in list {
        let child = child.map_err(failed)?;
        // A name that is not UTF-8 is not one of ours.
        if let Ok(name) = child.file_name().into_string() {
            found.push((name, child.path()));
        }
    }
    Ok(found)
}

fn read_all(files: Vec<(SegmentName, PathBuf)>) -> Result<Vec<Found>, StoreError> {
    let threads = SCAN_THREADS.min(files.len().div_ceil(FILES_PER_THREAD)).max(1);
    let share = files.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let read_share = |files: &[(SegmentName, PathBuf)]| -> Result<Vec<Found>, StoreError> {
            files
                .iter()
                .filter_map(|(name, path)| read_one(name, path).transpose())
                .collect()
        };
        let mut shares = files.chunks(share);
        let mine = shares.next().unwrap_or_default();
        let others: Vec<_> = shares
            .map(|files| scope.spawn(move || read_share(files)))
            .collect();
        let mut found = read_share(mine)?;
        for other in others {
            found.extend(
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
            );
        }
        Ok(found)
    })
}

/// Reads one file; none when it has gone in the meantime (another process may be at work when this one only reads).
pub(super) fn read_one(name: &SegmentName, path: &Path) -> Result<Option<Found>, StoreError> {
    let found = |content| {
        Some(Found {
            path: path.to_owned(),
            name: name.clone(),
            content,
        })
    };
    let failed = |source| StoreError::Io {
        what: "open",
        path: path.to_owned(),
        source,
    };
    let file = match crate::regular::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
            return Ok(found(Content::Damaged(e.to_string())));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let bytes = file.metadata().map_err(failed)?.len();
    Ok(match SegmentReader::open(file) {
        Ok(reader) if reader.manifest().name == *name => found(Content::Good(Entry::of(&reader))),
        Ok(reader) => found(Content::Damaged(format!(
            "it says it is {}",
            reader.manifest().name
        ))),
        Err(e @ (FormatError::NewerVersion { .. } | FormatError::UnknownFeatures { .. })) => {
            found(Content::Newer {
                why: explain(&e),
                bytes,
            })
        }
        Err(e) => found(Content::Damaged(explain(&e))),
    })
}

/// An error with its reasons, on one line.
pub(super) fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}
