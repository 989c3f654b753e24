//! Names: what a checkpoint is called everywhere in the cluster.
//!
//! A name is `<vm>/<generation>/<epoch>`. It names a *state* of a VM: generations are handed out by
//! compare-and-swap and epochs are counted by the one owner of a generation, so no two states can have one name.
//! The bytes that carry the state may be written anew (a chain folded, deltas merged); the [`CheckpointId`] stays.

use std::fmt;
use std::str::FromStr;

/// The longest VM id, in bytes.
pub const MAX_VM_ID_BYTES: usize = 64;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The VM id is empty, too long or has a character that is not allowed.
    #[error("VM id {id:?} {why}: use 1 to 64 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit")]
    VmId {
        /// The text that was given (cut to a printable length).
        id: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The text is not `<vm>/<generation>/<epoch>`.
    #[error("{text:?} is not a segment name: expected <vm>/<generation>/<epoch>, like web/1/42")]
    Form {
        /// The text that was given (cut to a printable length).
        text: String,
    },
    /// The text is no checkpoint's id.
    #[error("{text:?} is not a checkpoint's id: expected 32 of 0-9 and a-f")]
    CheckpointForm {
        /// The text that was given (cut to a printable length).
        text: String,
    },
}

/// The id of a protected machine. It stays the same wherever the VM runs.
///
/// 1 to 64 characters of `a-z`, `0-9`, `.`, `_`, `-`, the first a letter or digit: safe as one path component.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(String);

impl VmId {
    /// Checks `id` and makes a VM id of it.
    ///
    /// # Errors
    /// [`NameError::VmId`] when it is empty, too long, or has a character that is not allowed.
    pub fn new(id: &str) -> Result<Self, NameError> {
        let refuse = |why| {
            Err(NameError::VmId {
                id: id.chars().take(80).collect(),
                why,
            })
        };
        let Some(first) = id.bytes().next() else {
            return refuse("is empty");
        };
        if id.len() > MAX_VM_ID_BYTES {
            return refuse("is too long");
        }
        if !(first.is_ascii_lowercase() || first.is_ascii_digit()) {
            return refuse("starts with a character that is not allowed there");
        }
        if !id
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'))
        {
            return refuse("has a character that is not allowed");
        }
        Ok(Self(id.to_owned()))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for VmId {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        Self::new(s)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The next one; stays at the largest when there is none (2^64 checkpoints at 1,000 a second take
            /// half a billion years).
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number! {
    /// The fencing token of a VM: raised by one in the registry at every change of owner. The first is 1.
    Generation
}
number! {
    /// The number of a checkpoint within a generation. The first is 1.
    Epoch
}

/// The name of a checkpoint: `<vm>/<generation>/<epoch>`.
///
/// Ordered by VM, then generation, then epoch: within one VM a later name is a later state.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The VM.
    pub vm: VmId,
    /// The generation of the owner that took it.
    pub generation: Generation,
    /// Its number within the generation.
    pub epoch: Epoch,
}

impl SegmentName {
    /// A name of its parts.
    #[must_use]
    pub fn new(vm: VmId, generation: Generation, epoch: Epoch) -> Self {
        Self {
            vm,
            generation,
            epoch,
        }
    }

    /// `(generation, epoch)`: the order of the states of one VM.
    #[must_use]
    pub fn position(&self) -> (Generation, Epoch) {
        (self.generation, self.epoch)
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.vm, self.generation, self.epoch)
    }
}

impl fmt::Debug for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SegmentName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let form = || NameError::Form {
            text: s.chars().take(120).collect(),
        };
        let mut parts = s.split('/');
        let (Some(vm), Some(generation), Some(epoch), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        // One text per name: no sign, no leading zeros, no blanks. Names become paths and keys.
        let number = |text: &str| -> Result<u64, NameError> {
            let value: u64 = text.parse().map_err(|_| form())?;
            if value.to_string() == text {
                Ok(value)
            } else {
                Err(form())
            }
        };
        Ok(Self::new(
            VmId::new(vm)?,
            Generation(number(generation)?),
            Epoch(number(epoch)?),
        ))
    }
}

/// The identity of a checkpoint: 16 random bytes drawn when the guest was stopped for it.
///
/// Every encoding of the checkpoint carries it (as taken, merged, folded), and a delta names its parent's: a chain
/// whose links fit by name but not by id is refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointId(pub [u8; 16]);

/// A blake3 digest of 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

macro_rules! hex {
    ($name:ident, $bytes:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl $name {
            /// Reads it from a slice of exactly its length.
            #[must_use]
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                <[u8; $bytes]>::try_from(bytes).ok().map(Self)
            }
        }
    };
}
impl FromStr for CheckpointId {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let hex = s.len() == 32 && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let number = hex.then(|| u128::from_str_radix(s, 16).ok()).flatten();
        number
            .map(|n| Self(n.to_be_bytes()))
            .ok_or_else(|| NameError::CheckpointForm {
                text: s.chars().take(120).collect(),
            })
    }
}

hex!(CheckpointId, 16);
hex!(Digest, 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_text() {
        let name: SegmentName = "web-1/3/42".parse().unwrap();
        assert_eq!(name.to_string(), "web-1/3/42");
        for bad in [
            "",
            "web",
            "web/1",
            "web/1/2/3",
            "web/01/2",
            "web/+1/2",
            "web/1/ 2",
            "/1/2",
            "../1/2",
            "Web/1/2",
        ] {
            assert!(bad.parse::<SegmentName>().is_err(), "{bad:?} was taken");
        }
        assert!(VmId::new(&"a".repeat(64)).is_ok());
        assert!(VmId::new(&"a".repeat(65)).is_err());
        assert!(VmId::new(".hidden").is_err());
        assert!(VmId::new("a/b").is_err());
    }

    #[test]
    fn checkpoint_ids_have_one_text() {
        let id = CheckpointId(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse::<CheckpointId>().unwrap(), id);
        for bad in [
            "",
            "00",
            "+0000000000000000000000000000000",
            "0123456789ABCDEF0123456789ABCDEF",
        ] {
            assert!(bad.parse::<CheckpointId>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn order_is_generation_then_epoch() {
        let name = |g, e| SegmentName::new(VmId::new("a").unwrap(), Generation(g), Epoch(e));
        assert!(name(1, 900) < name(2, 1));
        assert!(name(2, 1) < name(2, 2));
    }
}
