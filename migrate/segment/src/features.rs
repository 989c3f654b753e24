//! Features: what a reader has to know to read a segment, one bit each and a name for people.

use std::fmt;

/// A set of feature bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

/// Every feature there is: its bit and its name. A bit or a name is never used again for something else.
const NAMES: [(u64, &str); 3] = [
    (Features::SAME_PAGES.0, "same-pages"),
    (Features::PAGE_CHANGES.0, "page-changes"),
    (Features::ENCRYPTED.0, "encrypted"),
];

impl Features {
    /// None.
    pub const NONE: Self = Self(0);
    /// Frames say that pages are the same as others (bit 0).
    pub const SAME_PAGES: Self = Self(1);
    /// Frames hold pages as changes of the parent's (bit 1).
    pub const PAGE_CHANGES: Self = Self(1 << 1);
    /// What is in frames and records is encrypted (bit 2).
    pub const ENCRYPTED: Self = Self(1 << 2);
    /// All that this crate knows.
    pub const KNOWN: Self = Self(Self::SAME_PAGES.0 | Self::PAGE_CHANGES.0 | Self::ENCRYPTED.0);

    /// Whether all of `other` are in it.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The minor version that they came with: the earliest that a segment which uses them can have.
    pub(crate) fn minor(self) -> u16 {
        if self.has(Self::ENCRYPTED) {
            2
        } else {
            u16::from(self != Self::NONE)
        }
    }

    /// Those this crate does not know.
    #[must_use]
    pub fn unknown(self) -> Self {
        Self(self.0 & !Self::KNOWN.0)
    }

    /// The names of those that are known, in the order of their bits.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES
            .into_iter()
            .filter(move |(bit, _)| self.0 & bit != 0)
            .map(|(_, name)| name)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("none");
        }
        let mut first = true;
        let mut put = |f: &mut fmt::Formatter<'_>, name: &dyn fmt::Display| {
            let comma = if std::mem::take(&mut first) { "" } else { ", " };
            write!(f, "{comma}{name}")
        };
        for name in self.names() {
            put(f, &name)?;
        }
        for bit in (0..64).filter(|bit| self.unknown().0 & (1 << bit) != 0) {
            put(f, &format_args!("bit {bit}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_bit_has_one_name() {
        let names: Vec<_> = Features::KNOWN.names().collect();
        assert_eq!(names.len() as u32, Features::KNOWN.0.count_ones());
        assert_eq!(Features(1 << 63 | 1).to_string(), "same-pages, bit 63");
        assert_eq!(Features::NONE.to_string(), "none");
    }
}
