//! The key file: what segments are encrypted with. `standby key` makes it and adds to it.
//!
//! ```text
//! # a comment
//! understudy-key-1 7d1f0a9e4b26c853 <64 hex digits: the key> 2026-12-01 rotated
//! understudy-key-1 0c44e1b7a3f29d60 <64 hex digits: the key> 2026-06-01
//! ```
//!
//! A line a key: the first key is for what is written, all are for what is read. What follows a key is a comment.
//!
//! Invariants: the file is readable by its owner alone, or it is refused; it is replaced in one step; a key that is there
//! stays until it is [retired](KeyCommand::Retire), since whatever it encrypted cannot be read without it.

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use segment::{Key, KeyId, Keyring, limits};
use zeroize::Zeroizing;

use crate::crashsafe::{Disk, DiskError, folder_of};
use crate::registry::random_lease as random_number;

/// What a line begins with.
const WORD: &str = "understudy-key-1";
/// The longest file.
const MAX_BYTES: u64 = 64 << 10;
/// The most keys of a file.
const MAX_KEYS: usize = 256;
/// The longest comment.
const MAX_COMMENT_BYTES: usize = 200;
/// The bits of a mode that let others than its owner at a file.
const OTHERS: u32 = 0o077;

/// Why a key file cannot be used, or was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// It cannot be read or written.
    #[error("{what} the key file {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others may read it.
    #[error(
        "the key file {} can be read or written by others than its owner (mode {mode:03o}): chmod 600 {0}",
        path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A line is none of a key file.
    #[error("{}:{line}: {why}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Which, from 1.
        line: usize,
        /// What is wrong with it; never what is in it.
        why: &'static str,
    },
    /// It has no key.
    #[error("the key file {} has no key: make one with `standby key new FILE`", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// There is one already.
    #[error(
        "{} is there already: `standby key rotate` adds a key to it, and without the keys that are in it nothing that they \
         encrypted can be read",
        path.display()
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A key that is to go is not there.
    #[error("{} has no key {id}: `standby key list` shows which it has", path.display())]
    NoSuchKey {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        id: String,
    },
    /// The key that is to go is the one to write with.
    #[error("key {id} is the one that {} writes with: rotate first, so that another takes its place", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
        /// The key.
        id: KeyId,
    },
    /// A comment is none.
    #[error("a comment has at most {MAX_COMMENT_BYTES} bytes and no control characters")]
    Comment,
}

/// `--key-file`.
#[derive(Debug, Clone, Default, Args)]
pub struct KeyFileArgs {
    /// The file with the keys that segments are encrypted with (`standby key new`): what is written is encrypted with the
    /// first, what is read with any of them [default: none, what is written is not encrypted]
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

impl KeyFileArgs {
    /// The keys; none when no file was named.
    ///
    /// # Errors
    /// [`KeyFileError`].
    pub fn keys(&self) -> Result<Keyring, KeyFileError> {
        self.key_file
            .as_deref()
            .map_or_else(|| Ok(Keyring::default()), read)
    }
}

/// `standby key`.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key file with one new key. Keep a copy where no host's loss takes it: without it nothing that was encrypted
    /// can be read.
    New {
        /// The file.
        file: PathBuf,
        /// A remark, after the key.
        #[arg(long, default_value = "")]
        comment: String,
    },
    /// Add a new key, which is written with from now on; the others stay, for what they encrypted.
    Rotate {
        /// The file.
        file: PathBuf,
        /// A remark, after the key.
        #[arg(long, default_value = "")]
        comment: String,
    },
    /// List the keys of a file by their names, never the keys themselves.
    List {
        /// The file.
        file: PathBuf,
    },
    /// Take an old key out. What it encrypted can then not be read any more.
    Retire {
        /// The file.
        file: PathBuf,
        /// The key, as `list` shows it.
        id: String,
    },
}

impl KeyCommand {
    /// Does it; what to say of it.
    ///
    /// # Errors
    /// [`KeyFileError`]; the file is as it was.
    pub fn run(self) -> Result<String, KeyFileError> {
        match self {
            Self::New { file, comment } => {
                let id = make(&file, &comment)?;
                Ok(format!(
                    "{} has key {id}. Give it to each host that is to read what is encrypted (--key-file), and keep a copy: \
                     without it nothing of that can be read.",
                    file.display()
                ))
            }
            Self::Rotate { file, comment } => {
                let id = rotate(&file, &comment)?;
                Ok(format!(
                    "{} writes with key {id} from now on. Copy it to the other hosts first; agents read it again on SIGHUP, \
                     VMs when they are started.",
                    file.display()
                ))
            }
            Self::List { file } => {
                let lines = load(&file)?;
                let mut text = String::new();
                for (at, line) in lines.iter().enumerate() {
                    let use_of = if at == 0 { "writes" } else { "reads" };
                    let comment = &line.comment;
                    text.push_str(format!("{}  {use_of:6}  {comment}", line.key.id()).trim_end());
                    text.push('\n');
                }
                Ok(text)
            }
            Self::Retire { file, id } => {
                retire(&file, &id)?;
                Ok(format!(
                    "{} has key {id} no more: what it encrypted cannot be read with this file.",
                    file.display()
                ))
            }
        }
    }
}

/// A line of the file.
struct Line {
    key: Key,
    comment: String,
}

/// The keys of a file.
///
/// # Errors
/// [`KeyFileError`].
pub fn read(path: &Path) -> Result<Keyring, KeyFileError> {
    Ok(Keyring::new(
        load(path)?.into_iter().map(|line| line.key).collect(),
    ))
}

/// Makes a file with one new key.
///
/// # Errors
/// [`KeyFileError::Exists`], and what the system says.
pub fn make(path: &Path, comment: &str) -> Result<KeyId, KeyFileError> {
    let line = new_line(comment)?;
    let id = line.key.id();
    write(path, &[line], false)?;
    Ok(id)
}

/// Adds a new first key.
///
/// # Errors
/// As [`read`], and what the system says; the file is as it was.
pub fn rotate(path: &Path, comment: &str) -> Result<KeyId, KeyFileError> {
    let mut lines = load(path)?;
    lines.insert(0, new_line(comment)?);
    write(path, &lines, true)?;
    Ok(lines[0].key.id())
}

/// Takes a key out that is not the first.
///
/// # Errors
/// As [`read`], [`KeyFileError::NoSuchKey`], [`KeyFileError::InUse`], and what the system says; the file is as it was.
pub fn retire(path: &Path, id: &str) -> Result<(), KeyFileError> {
    let mut lines = load(path)?;
    match lines.iter().position(|line| line.key.id().to_string() == id) {
        None => Err(KeyFileError::NoSuchKey {
            path: path.to_owned(),
            id: id.chars().take(40).collect(),
        }),
        Some(0) => Err(KeyFileError::InUse {
            path: path.to_owned(),
            id: lines[0].key.id(),
        }),
        Some(at) => {
            lines.remove(at);
            write(path, &lines, true)
        }
    }
}

/// Random bytes that make the key of one encoding of a segment.
///
/// # Panics
/// When the kernel has none to give.
#[must_use]
pub fn random_salt() -> [u8; limits::SALT_BYTES] {
    let mut salt = [0; limits::SALT_BYTES];
    getrandom::fill(&mut salt).expect("the kernel gives random bytes");
    salt
}

fn new_line(comment: &str) -> Result<Line, KeyFileError> {
    if comment.len() > MAX_COMMENT_BYTES || comment.chars().any(char::is_control) {
        return Err(KeyFileError::Comment);
    }
    let mut bytes = Zeroizing::new([0; limits::KEY_BYTES]);
    getrandom::fill(&mut *bytes).expect("the kernel gives random bytes");
    Ok(Line {
        key: Key::new(bytes),
        comment: comment.trim().to_owned(),
    })
}

fn load(path: &Path) -> Result<Vec<Line>, KeyFileError> {
    let failed = |source| KeyFileError::File {
        what: "read",
        path: path.to_owned(),
        source,
    };
    let file = crate::regular::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
    if mode & OTHERS != 0 {
        return Err(KeyFileError::Open {
            path: path.to_owned(),
            mode,
        });
    }
    // As long as it may get, so that no copy is left behind by its growing.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_BYTES as usize + 1));
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        let why = format!("it is longer than {MAX_BYTES} bytes");
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, why)));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| {
        // Its own words would show where, and that is all: but never what.
        failed(io::Error::new(io::ErrorKind::InvalidData, "it is no text"))
    })?;
    let mut lines: Vec<Line> = Vec::new();
    for (at, text) in text.lines().enumerate() {
        let bad = |why| KeyFileError::Line {
            path: path.to_owned(),
            line: at + 1,
            why,
        };
        let text = text.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let line = parse(text).map_err(bad)?;
        if lines.iter().any(|other| other.key.id() == line.key.id()) {
            return Err(bad("this key is there twice"));
        }
        if lines.len() >= MAX_KEYS {
            return Err(bad(
                "a file has at most 256 keys: retire old ones with `standby key retire`",
            ));
        }
        lines.push(line);
    }
    match lines.is_empty() {
        true => Err(KeyFileError::Empty {
            path: path.to_owned(),
        }),
        false => Ok(lines),
    }
}

fn parse(text: &str) -> Result<Line, &'static str> {
    let mut words = text.splitn(4, ' ');
    if words.next() != Some(WORD) {
        return Err("a line of a key begins with understudy-key-1; was it written by a later version?");
    }
    let (Some(id), Some(key)) = (words.next(), words.next()) else {
        return Err("a key's name, or the key, is missing");
    };
    let key = Key::new(unhex(key).ok_or("the key is not 64 of 0-9 and a-f")?);
    if key.id().to_string() != id {
        return Err("the key is not the one of that name: is the line damaged?");
    }
    let comment = words.next().unwrap_or_default().trim();
    if comment.len() > MAX_COMMENT_BYTES || comment.chars().any(char::is_control) {
        return Err("the comment is too long, or has control characters");
    }
    Ok(Line {
        key,
        comment: comment.to_owned(),
    })
}

fn unhex(text: &str) -> Option<Zeroizing<[u8; limits::KEY_BYTES]>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != limits::KEY_BYTES || !rest.is_empty() {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = Zeroizing::new([0; limits::KEY_BYTES]);
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

/// Writes the file in one step; a new one only where there is none.
fn write(path: &Path, lines: &[Line], replace: bool) -> Result<(), KeyFileError> {
    let failed = |source| KeyFileError::File {
        what: "write",
        path: path.to_owned(),
        source,
    };
    // Long enough from the start, for the same reason as above.
    let longest = WORD.len() + 2 * (limits::KEY_BYTES + limits::KEY_ID_BYTES) + MAX_COMMENT_BYTES + 8;
    let mut text = Zeroizing::new(String::with_capacity(lines.len() * longest));
    for Line { key, comment } in lines {
        text.push_str(WORD);
        text.push(' ');
        text.push_str(&key.id().to_string());
        text.push(' ');
        for byte in key.bytes() {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(digit.into(), 16).unwrap_or('0'));
            }
        }
        if !comment.is_empty() {
            text.push(' ');
            text.push_str(comment);
        }
        text.push('\n');
    }
    if text.len() as u64 > MAX_BYTES {
        let why =
            format!("it would be longer than {MAX_BYTES} bytes: retire old keys with `standby key retire`");
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, why)));
    }
    let of_disk = |e: DiskError| failed(e.source);
    let stem = format!(".key.{}", random_number());
    let temp = Disk::durable().secret_temp(folder_of(path), &stem);
    let mut temp = temp.map_err(of_disk)?;
    temp.write_all(text.as_bytes()).map_err(failed)?;
    if replace {
        return temp.replace(path).map_err(of_disk);
    }
    temp.publish(path).map_err(|e| match e.source.kind() {
        io::ErrorKind::AlreadyExists => KeyFileError::Exists {
            path: path.to_owned(),
        },
        _ => of_disk(e),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn text(error: &KeyFileError) -> String {
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(error) {
            text = format!("{text}: {source}");
        }
        text
    }

    #[test]
    fn a_key_file_is_made_rotated_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let first = make(&path, "june").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let keys = read(&path).unwrap();
        assert_eq!(keys.first().unwrap().id(), first);
        // One that is there is never written over.
        let before = fs::read(&path).unwrap();
        assert!(matches!(
            make(&path, "").unwrap_err(),
            KeyFileError::Exists { .. }
        ));
        assert_eq!(fs::read(&path).unwrap(), before);

        let second = rotate(&path, "").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let keys = read(&path).unwrap();
        assert_eq!(keys.first().unwrap().id(), second);
        assert_eq!(
            keys.get(first).unwrap().bytes(),
            read(&path).unwrap().keys()[1].bytes()
        );
        let list = KeyCommand::List { file: path.clone() }.run().unwrap();
        assert_eq!(list, format!("{second}  writes\n{first}  reads   june\n"));
        // Nothing but the file is left.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

        assert!(matches!(
            retire(&path, &second.to_string()).unwrap_err(),
            KeyFileError::InUse { .. }
        ));
        assert!(matches!(
            retire(&path, "0").unwrap_err(),
            KeyFileError::NoSuchKey { .. }
        ));
        retire(&path, &first.to_string()).unwrap();
        assert!(read(&path).unwrap().get(first).is_none());
    }

    #[test]
    fn what_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        make(&path, "").unwrap();
        for mode in [0o640, 0o604, 0o620, 0o602, 0o610, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = text(&read(&path).unwrap_err());
            assert!(error.contains(&format!("mode {mode:03o}")), "{error}");
            assert!(error.contains("chmod 600"), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        read(&path).unwrap();
    }

    #[test]
    fn what_is_no_key_file_is_refused_by_its_line_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        make(&path, "a comment").unwrap();
        let good = fs::read_to_string(&path).unwrap();
        let secret = good.split(' ').nth(2).unwrap().to_owned();
        let (head, tail) = good.split_at(good.find(&secret).unwrap());
        let other = if secret.starts_with('0') { "1" } else { "0" };
        let damaged = format!("{head}{other}{}", &tail[1..]);
        for (bad, why) in [
            (String::new(), "has no key"),
            ("# only this\n".into(), "has no key"),
            (format!("{good}{good}"), ":2: this key is there twice"),
            (format!("\n{damaged}"), ":2: the key is not the one of that name"),
            (good.replace("key-1", "key-2"), ":1: a line of a key begins with"),
            (good.replace(&secret, &secret[1..]), "not 64 of"),
            (
                good.replace(&secret, &secret.to_uppercase().replace('0', "G")),
                "not 64 of",
            ),
            (format!("{WORD} 0"), "is missing"),
            (
                format!("{good}#{}", "x".repeat(70_000)),
                "longer than 65536 bytes",
            ),
            (
                format!("{} {}\n", good.trim_end(), "c".repeat(300)),
                "comment is too long",
            ),
        ] {
            fs::write(&path, &bad).unwrap();
            let error = text(&read(&path).unwrap_err());
            assert!(error.contains(why), "{why}: {error}");
            assert!(!error.contains(&secret), "{error}");
        }
        fs::write(&path, format!("# first\n\n  {good}")).unwrap();
        let keys = read(&path).unwrap();
        assert!(!format!("{keys:?}").contains(&secret), "{keys:?}");
    }
}
