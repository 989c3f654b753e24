//! A restore point as one file: what `standby export` writes and `standby import` takes.
//!
//! ```text
//! a POSIX tar:   web-1-42.seg  web-1-41.seg  web-1-40.seg     the chain, files as stored, the newest first
//!                SHA256SUMS                                   their digests, as sha256sum writes them
//!
//! to check it without us:   tar xf FILE && sha256sum -c SHA256SUMS
//! ```
//!
//! An import publishes nothing before every byte of every link was checked against its digests, the digest list, and
//! the rest of the chain; then the full segment first, so that whatever instant it is killed at, what is there is whole.
//! It never replaces anything, and it never makes what it brings the newest state of a VM that is held already: a
//! takeover would run it.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::Arc;

use segment::SegmentName;
use sha2::{Digest as _, Sha256};

use super::incoming::Quota;
use super::{
    ChainError, Entry, FsStore, Incoming, MAX_CHAIN_LINKS, MAX_SEGMENT_BYTES, StoreError, chain_of, flat,
};

/// The file with the digests.
const SUMS: &str = "SHA256SUMS";
/// A tar's unit.
const BLOCK: usize = 512;
/// What is read and written at a time.
const PIECE: usize = 256 << 10;
/// The longest list of digests.
const MAX_SUMS_BYTES: u64 = (MAX_CHAIN_LINKS as u64) * 256;
/// The largest number the octal field of a tar takes; above it is binary.
const MAX_OCTAL: u64 = (1 << 33) - 1;

/// Why an archive was not made or taken. Nothing of it is in the store then, unless it says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// The archive cannot be read or written.
    #[error("{what} the archive")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no archive of ours, or damaged.
    #[error("this is no whole export of a restore point: {0}")]
    Malformed(String),
    /// A file's bytes are not those the list names.
    #[error("{file} in the archive is damaged: its SHA-256 is not the one in {SUMS}")]
    Sum {
        /// Which.
        file: String,
    },
    /// The links do not make a chain.
    #[error("what is in the archive is not a whole chain")]
    Chain(#[source] Box<ChainError>),
    /// It would become the state that a takeover runs.
    #[error(
        "{tip} is newer than {newest}, the newest checkpoint of that VM here: it would become what a takeover runs. Import \
         it at an agent that holds nothing of the VM"
    )]
    Newer {
        /// What is imported.
        tip: SegmentName,
        /// What is here.
        newest: SegmentName,
    },
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> ArchiveError {
    move |source| ArchiveError::Io { what, source }
}

/// Writes an archive, link by link.
#[derive(Debug)]
pub struct ArchiveWriter<W> {
    out: W,
    sums: String,
    /// The file that is being written: its path, its digest so far, its length.
    open: Option<(String, Sha256, u64)>,
    /// How much of it is to come.
    left: u64,
}

impl<W: Write> ArchiveWriter<W> {
    /// An archive into `out`.
    pub fn new(out: W) -> Self {
        Self {
            out,
            sums: String::new(),
            open: None,
            left: 0,
        }
    }

    /// Begins a segment of exactly `bytes` bytes.
    ///
    /// # Errors
    /// When the archive cannot be written.
    pub fn begin(&mut self, name: &SegmentName, bytes: u64) -> Result<(), ArchiveError> {
        let path = format!("{}.seg", flat(name));
        self.out
            .write_all(&header(&path, bytes))
            .map_err(io_error("write"))?;
        self.open = Some((path, Sha256::new(), bytes));
        self.left = bytes;
        Ok(())
    }

    /// Adds to the segment that was begun.
    ///
    /// # Errors
    /// When it is more than was announced, and when the archive cannot be written.
    pub fn write(&mut self, piece: &[u8]) -> Result<(), ArchiveError> {
        let Some((path, sha, _)) = self.open.as_mut() else {
            return Err(ArchiveError::Malformed("bytes of no segment".into()));
        };
        let Some(left) = self.left.checked_sub(piece.len() as u64) else {
            return Err(ArchiveError::Malformed(format!(
                "{path} is longer than it was announced"
            )));
        };
        self.left = left;
        sha.update(piece);
        self.out.write_all(piece).map_err(io_error("write"))
    }

    /// Ends the segment.
    ///
    /// # Errors
    /// When bytes of it are missing, and when the archive cannot be written.
    pub fn end(&mut self) -> Result<(), ArchiveError> {
        let Some((path, sha, bytes)) = self.open.take() else {
            return Ok(());
        };
        if self.left > 0 {
            let why = format!("{path} lacks {} of its {bytes} bytes", self.left);
            return Err(ArchiveError::Malformed(why));
        }
        self.pad(bytes)?;
        self.sums.push_str(&format!("{}  {path}\n", hex(&sha.finalize())));
        Ok(())
    }

    /// Ends the archive with the list of digests, and gives the writer back.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(mut self) -> Result<W, ArchiveError> {
        let sums = std::mem::take(&mut self.sums);
        let length = sums.len() as u64;
        self.out
            .write_all(&header(SUMS, length))
            .map_err(io_error("write"))?;
        self.out.write_all(sums.as_bytes()).map_err(io_error("write"))?;
        self.pad(length)?;
        self.out.write_all(&[0; 2 * BLOCK]).map_err(io_error("write"))?;
        self.out.flush().map_err(io_error("write"))?;
        Ok(self.out)
    }

    fn pad(&mut self, bytes: u64) -> Result<(), ArchiveError> {
        self.out
            .write_all(&[0; BLOCK][..padding(bytes)])
            .map_err(io_error("write"))
    }
}

fn padding(bytes: u64) -> usize {
    (BLOCK - (bytes % BLOCK as u64) as usize) % BLOCK
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The header of a file in a POSIX (ustar) tar. A path of ours is at most 100 bytes: a VM's id is at most 63.
fn header(path: &str, bytes: u64) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, path.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if bytes <= MAX_OCTAL {
        put(124, format!("{bytes:011o}\0").as_bytes());
    } else {
        // The extension that every tar of today reads: a set bit, then the number in binary.
        put(124, &[0x80, 0, 0, 0]);
        put(128, &bytes.to_be_bytes());
    }
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// The next file of a tar: its path and length; none at the end.
fn next_file(input: &mut impl Read) -> Result<Option<(String, u64)>, ArchiveError> {
    let mut header = [0; BLOCK];
    input.read_exact(&mut header).map_err(io_error("read"))?;
    if header == [0; BLOCK] {
        return Ok(None);
    }
    let malformed = |why: &str| ArchiveError::Malformed(why.to_owned());
    let octal = |field: &[u8]| {
        let text: Vec<u8> = field.iter().copied().filter(|b| *b != 0 && *b != b' ').collect();
        u64::from_str_radix(std::str::from_utf8(&text).ok()?, 8).ok()
    };
    let mut summed = header;
    summed[148..156].fill(b' ');
    let sum: u64 = summed.iter().map(|byte| u64::from(*byte)).sum();
    if octal(&header[148..156]) != Some(sum) || &header[257..262] != b"ustar" {
        return Err(malformed("a header in it is damaged, or it is not a tar"));
    }
    if !matches!(header[156], b'0' | 0) {
        return Err(malformed("there is something in it that is not a file"));
    }
    let path = header[..100].split(|b| *b == 0).next().unwrap_or_default();
    let path = std::str::from_utf8(path).map_err(|_| malformed("a file's name is not text"))?;
    let bytes = if header[124] & 0x80 == 0 {
        octal(&header[124..136])
    } else {
        let mut number = [0; 8];
        number.copy_from_slice(&header[128..136]);
        Some(u64::from_be_bytes(number))
    };
    let bytes = bytes.ok_or_else(|| malformed("a file's length is no number"))?;
    Ok(Some((path.trim_start_matches("./").to_owned(), bytes)))
}

/// The segment that a file of an archive is called after.
fn segment_of(path: &str) -> Result<SegmentName, ArchiveError> {
    let name = || {
        let mut parts = path.strip_suffix(".seg")?.rsplitn(3, '-');
        let (epoch, generation, vm) = (parts.next()?, parts.next()?, parts.next()?);
        format!("{vm}/{generation}/{epoch}").parse().ok()
    };
    name().ok_or_else(|| ArchiveError::Malformed(format!("{path:?} in it is not called like a segment")))
}

/// What an import did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The restore point.
    pub tip: Entry,
    /// Links that are new here.
    pub added: u64,
    /// Links that were here already.
    pub held: u64,
}

/// One link of an archive.
enum Staged {
    New(Box<Incoming>, Entry),
    /// Here already, the very same checkpoint.
    Held(Entry),
}

impl Staged {
    fn entry(&self) -> &Entry {
        match self {
            Self::New(_, entry) | Self::Held(entry) => entry,
        }
    }
}

impl FsStore {
    /// Takes the archive of a restore point. See the [module](self) for what is checked.
    ///
    /// # Errors
    /// [`ArchiveError`]; a name that is taken by another checkpoint is [`StoreError::DuplicateName`].
    pub fn import(self: &Arc<Self>, input: impl Read) -> Result<Imported, ArchiveError> {
        let staged = self.stage(input)?;
        let tip = staged.keys().max().cloned();
        let tip = tip.ok_or_else(|| ArchiveError::Malformed("there is no segment in it".into()))?;
        let chain = chain_of(staged.values().map(|link| link.entry().clone()), &tip)
            .map_err(|e| ArchiveError::Chain(Box::new(e)))?;
        if chain.len() != staged.len() {
            let why = format!(
                "it has {} segments, and {tip} stands on {}",
                staged.len(),
                chain.len() - 1
            );
            return Err(ArchiveError::Malformed(why));
        }
        if let Some(newest) = self.newest_complete(&tip.vm)
            && newest.name.position() < tip.position()
        {
            let newest = newest.name;
            return Err(ArchiveError::Newer { tip, newest });
        }
        let mut imported = Imported {
            tip: chain[chain.len() - 1].clone(),
            added: 0,
            held: 0,
        };
        // Everything is checked. From here on links appear, the full one first: each is whole when it does. They are
        // leased so that none is collected before what stands on it is there.
        let mut leases = Vec::new();
        for (_, link) in staged {
            let name = match link {
                Staged::New(incoming, entry) => {
                    let name = entry.name.clone();
                    incoming.publish(entry)?;
                    imported.added += 1;
                    name
                }
                Staged::Held(entry) => {
                    imported.held += 1;
                    entry.name
                }
            };
            leases.extend(self.lease_parent(&name));
        }
        Ok(imported)
    }

    /// Reads the archive into temporary files, and checks each by itself.
    fn stage(self: &Arc<Self>, mut input: impl Read) -> Result<BTreeMap<SegmentName, Staged>, ArchiveError> {
        let malformed = |why: String| Err(ArchiveError::Malformed(why));
        let (mut staged, mut found, mut listed) = (BTreeMap::new(), BTreeMap::new(), None);
        let mut vm = None;
        while let Some((path, bytes)) = next_file(&mut input)? {
            if path == SUMS {
                if bytes > MAX_SUMS_BYTES || listed.is_some() {
                    return malformed(format!("its {SUMS} is too long, or there twice"));
                }
                let mut text = String::new();
                let read = (&mut input).take(bytes).read_to_string(&mut text);
                if read.map_err(io_error("read"))? as u64 != bytes {
                    return malformed("it ends too early".into());
                }
                listed = Some(text);
            } else {
                let name = segment_of(&path)?;
                if *vm.get_or_insert_with(|| name.vm.clone()) != name.vm {
                    return malformed("its segments are of several VMs".into());
                }
                if staged.len() >= MAX_CHAIN_LINKS || staged.contains_key(&name) || bytes > MAX_SEGMENT_BYTES
                {
                    return malformed(format!("{path} in it is too long, there twice, or one too many"));
                }
                let (link, sum) = self.stage_one(&name, bytes, &mut input)?;
                staged.insert(name, link);
                found.insert(path, sum);
            }
            input
                .read_exact(&mut [0; BLOCK][..padding(bytes)])
                .map_err(io_error("read"))?;
        }
        let Some(listed) = listed else {
            return malformed(format!(
                "there is no {SUMS} in it: it was cut off, or never whole"
            ));
        };
        for line in listed.lines() {
            let Some((sum, path)) = line.split_once("  ") else {
                return malformed(format!("a line of its {SUMS} is none"));
            };
            match found.remove(path) {
                Some(is) if is == sum => {}
                Some(_) => {
                    return Err(ArchiveError::Sum {
                        file: path.to_owned(),
                    });
                }
                None => return malformed(format!("{path} is in its {SUMS} and not in it")),
            }
        }
        match found.into_keys().next() {
            Some(path) => malformed(format!("{path} is in it and not in its {SUMS}")),
            None => Ok(staged),
        }
    }

    fn stage_one(
        self: &Arc<Self>,
        name: &SegmentName,
        bytes: u64,
        input: &mut impl Read,
    ) -> Result<(Staged, String), ArchiveError> {
        // On behalf of whoever owns the VM now: an old restore point takes nothing from anyone.
        let writer = self.promised(&name.vm).max(name.generation);
        let mut incoming = Incoming::new(self, name, bytes, Quota::Exact, writer)?;
        let (mut sha, mut left, mut piece) = (Sha256::new(), bytes, vec![0; PIECE]);
        while left > 0 {
            let most = left.min(PIECE as u64) as usize;
            let read = input.read(&mut piece[..most]).map_err(io_error("read"))?;
            if read == 0 {
                return Err(ArchiveError::Malformed("it ends too early".into()));
            }
            sha.update(&piece[..read]);
            if let Err(source) = incoming.write_all(&piece[..read]) {
                return Err(match incoming.take_failure() {
                    Some(error) => error.into(),
                    None => io_error("store what is in")(source),
                });
            }
            left -= read as u64;
        }
        let offered = incoming.check()?;
        let link = match self.get(name) {
            None => Staged::New(Box::new(incoming), offered),
            Some(held) if held.checkpoint == offered.checkpoint => Staged::Held(held),
            Some(held) => {
                return Err(ArchiveError::Store(StoreError::DuplicateName {
                    name: name.clone(),
                    held: held.checkpoint,
                    offered: offered.checkpoint,
                }));
            }
        };
        Ok((link, hex(&sha.finalize())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Durability;
    use crate::store::fixture::{chain, load, name, other_checkpoint, put, vm};

    pub(in crate::store) fn archive(segments: &[(SegmentName, Vec<u8>)]) -> Vec<u8> {
        let mut writer = ArchiveWriter::new(Vec::new());
        for (name, bytes) in segments.iter().rev() {
            writer.begin(name, bytes.len() as u64).unwrap();
            bytes.chunks(1000).for_each(|piece| writer.write(piece).unwrap());
            writer.end().unwrap();
        }
        writer.finish().unwrap()
    }

    fn open(dir: &std::path::Path) -> Arc<FsStore> {
        FsStore::open(dir, None, Durability::Durable).unwrap()
    }

    #[test]
    fn a_point_goes_out_and_comes_in_again_and_common_tools_can_check_it() {
        let dir = tempfile::tempdir().unwrap();
        let segments = chain("a-b-1", 3);
        let archive = archive(&segments);
        std::fs::write(dir.path().join("x.tar"), &archive).unwrap();
        let checked = std::process::Command::new("sh")
            .args([
                "-c",
                "tar xf x.tar && sha256sum -c SHA256SUMS && test $(ls *.seg | wc -l) = 3",
            ])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(checked.status.success(), "{checked:?}");
        // What a person packed anew with tar is as good.
        let packed = std::process::Command::new("tar")
            .args(["cf", "y.tar", "--format=ustar", "./SHA256SUMS"])
            .args(segments.iter().map(|(name, _)| format!("./{}.seg", flat(name))))
            .current_dir(dir.path())
            .status()
            .unwrap();
        assert!(packed.success());
        let again = std::fs::read(dir.path().join("y.tar")).unwrap();

        let store = open(&dir.path().join("store"));
        let imported = store.import(archive.as_slice()).unwrap();
        assert_eq!((imported.added, imported.held), (3, 0));
        assert_eq!(imported.tip.name, name("a-b-1/1/3"));
        let imported = store.import(again.as_slice()).unwrap();
        assert_eq!((imported.added, imported.held), (0, 3));
        let other = open(&dir.path().join("other"));
        for (name, bytes) in &segments {
            put(&other, name, bytes).unwrap();
        }
        for (name, _) in &segments {
            assert_eq!(load(&store, name), load(&other, name));
        }
    }

    #[test]
    fn nothing_is_published_of_what_is_damaged_cut_off_or_not_whole() {
        let segments = chain("web", 3);
        let whole = archive(&segments);
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let refused = |bytes: &[u8], what: &str| {
            let error = store.import(bytes).unwrap_err();
            assert_eq!(store.all(), [], "{what}: {error}");
            assert_eq!(std::fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
            error
        };
        for length in (0..whole.len() - 2 * BLOCK).step_by(97) {
            refused(&whole[..length], &format!("cut at {length}"));
        }
        for at in (0..whole.len() - 2 * BLOCK).step_by(61) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x04;
            // A bit of the padding, or of a header's field that says nothing, may be any.
            if store.import(damaged.as_slice()).is_ok() {
                let held = store.all();
                assert_eq!(held.len(), 3, "bit at {at}");
                held.iter()
                    .for_each(|entry| assert!(store.verify(&entry.name).is_ok()));
                held.iter()
                    .rev()
                    .for_each(|entry| store.remove(&entry.name).unwrap());
            }
            assert_eq!(store.all(), []);
        }
        let error = refused(&archive(&segments[1..]), "without the full one");
        assert!(matches!(error, ArchiveError::Chain(_)), "{error}");
        let error = refused(&archive(&[segments[0].clone(), segments[2].clone()]), "a gap");
        assert!(matches!(error, ArchiveError::Chain(_)), "{error}");
        refused(&archive(&[]), "nothing");
        assert_eq!(store.vms(), [] as [segment::VmId; 0]);
    }

    #[test]
    fn it_replaces_nothing_and_becomes_no_newest_state() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let segments = chain("web", 3);
        // The name is another checkpoint's.
        let second = name("web/1/2");
        put(&store, &second, &other_checkpoint(&second)).unwrap();
        let before = store.all();
        let error = store.import(archive(&segments[..2]).as_slice()).unwrap_err();
        assert!(
            matches!(error, ArchiveError::Store(StoreError::DuplicateName { .. })),
            "{error}"
        );
        store.remove(&second).unwrap();
        // Newer than what is here.
        put(&store, &segments[0].0, &segments[0].1).unwrap();
        let error = store.import(archive(&segments).as_slice()).unwrap_err();
        assert!(matches!(error, ArchiveError::Newer { .. }), "{error}");
        assert_eq!((before.len(), store.all().len()), (1, 1));
        // Older than what is here, under a newer owner: history comes back.
        let newer = name("web/2/1");
        put(&store, &newer, &other_checkpoint(&newer)).unwrap();
        store.promise(&vm("web"), segment::Generation(2)).unwrap();
        let imported = store.import(archive(&segments).as_slice()).unwrap();
        assert_eq!((imported.added, imported.held), (2, 1));
        assert_eq!(store.newest_complete(&vm("web")).unwrap().name, newer);
    }
}
#[cfg(test)]
pub(super) use tests::archive as archive_of;
