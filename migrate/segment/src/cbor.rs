//! A check of CBOR before it is decoded.
//!
//! The format takes a small part of CBOR: definite lengths, no tags, map keys that are unsigned and ascending, at
//! most [`MAX_CBOR_DEPTH`] levels, and nothing after the value. So one content has nearly one text, and a decoder
//! behind this check can skip what it does not know without taking memory for it.

use crate::FormatError;
use crate::limits::MAX_CBOR_DEPTH;

/// One array or map that is being walked.
#[derive(Clone, Copy, Default)]
struct Level {
    /// Items still to come; a map's keys and values each count.
    left: u64,
    map: bool,
    /// The last key of a map.
    key: Option<u64>,
}

/// Checks that `bytes` are exactly one CBOR value of the part the format takes.
pub(crate) fn check(what: &'static str, bytes: &[u8]) -> Result<(), FormatError> {
    let mut levels = [Level::default(); MAX_CBOR_DEPTH];
    levels[0].left = 1;
    let mut depth = 0;
    let mut at = 0;
    loop {
        let bad = |why: String| FormatError::invalid(what, format!("at byte {at}: {why}"));
        let (major, value, next) = head(bytes, at).map_err(&bad)?;
        let level = &mut levels[depth];
        // Even: every value has its key before it, so a key is due.
        if level.map && level.left % 2 == 0 {
            if major != 0 || level.key.is_some_and(|last| value <= last) {
                return Err(bad(
                    "map keys have to be unsigned numbers in ascending order".into()
                ));
            }
            level.key = Some(value);
        }
        level.left -= 1;
        let rest = (bytes.len() - next) as u64;
        at = match major {
            2 | 3 if value > rest => {
                return Err(bad(format!("a text of {value} bytes with {rest} bytes left")));
            }
            // At most the length of the slice, so the sum and the cast are exact.
            2 | 3 => next + value as usize,
            4 | 5 if value > rest => {
                return Err(bad(format!(
                    "an array or map of {value} items with {rest} bytes left"
                )));
            }
            4 | 5 => {
                depth += 1;
                let deeper = levels
                    .get_mut(depth)
                    .ok_or_else(|| bad("nested too deeply".into()))?;
                // At most twice the length of the slice.
                *deeper = Level {
                    left: if major == 5 { value * 2 } else { value },
                    map: major == 5,
                    key: None,
                };
                next
            }
            6 => return Err(bad("tags are not used in this format".into())),
            _ => next,
        };
        while levels[depth].left == 0 {
            if depth == 0 {
                return match bytes.len() - at {
                    0 => Ok(()),
                    n => Err(FormatError::invalid(
                        what,
                        format!("{n} bytes left over after its end at {at}"),
                    )),
                };
            }
            depth -= 1;
        }
    }
}

/// The major type and the value of the item at `at`, and where its content begins.
fn head(bytes: &[u8], at: usize) -> Result<(u8, u64, usize), String> {
    let cut = || "cut short".to_owned();
    let first = *bytes.get(at).ok_or_else(cut)?;
    let (major, info) = (first >> 5, first & 0x1f);
    let start = at + 1;
    let width = match info {
        0..=23 => return Ok((major, info.into(), start)),
        24..=27 => 1usize << (info - 24),
        _ => return Err("indefinite lengths are not used in this format".to_owned()),
    };
    let field = bytes
        .get(start..)
        .and_then(|rest| rest.get(..width))
        .ok_or_else(cut)?;
    let value = field
        .iter()
        .fold(0u64, |value, &byte| value << 8 | u64::from(byte));
    Ok((major, value, start + width))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(bytes: &[u8]) -> String {
        check("test", bytes).unwrap_err().to_string()
    }

    #[test]
    fn takes_what_the_format_uses() {
        check("test", &[0x80]).unwrap();
        check(
            "test",
            &[0xa2, 0x00, 0x61, b'x', 0x18, 0x20, 0x82, 0xf5, 0x41, 0x07],
        )
        .unwrap();
    }

    #[test]
    fn refuses_what_it_does_not() {
        assert!(refused(&[]).contains("cut short"));
        assert!(refused(&[0x18]).contains("cut short"));
        assert!(refused(&[0x00, 0x00]).contains("1 bytes left over"));
        assert!(refused(&[0x9f, 0xff]).contains("indefinite"));
        assert!(refused(&[0xc0, 0x00]).contains("tags"));
        assert!(refused(&[0x42, 0x00]).contains("a text of 2 bytes with 1 bytes left"));
        assert!(refused(&[0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]).contains("items"));
        assert!(refused(&[0xbb, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x00]).contains("items"));
        assert!(refused(&[0xa2, 0x01, 0x00, 0x01, 0x00]).contains("ascending"));
        assert!(refused(&[0xa1, 0x61, b'x', 0x00]).contains("ascending"));
        assert!(refused(&[0x81; 64]).contains("deep"));
        check("test", &[0x81, 0x81, 0x81, 0x81, 0x81, 0x81, 0x81, 0x00]).unwrap();
    }
}
