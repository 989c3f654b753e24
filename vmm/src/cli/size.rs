//! Sizes and times as people write them.

use std::time::Duration;

use bytesize::ByteSize;

/// A size in bytes. `K`, `M`, `G` and `T`, with or without `B` or `iB`, are powers of 1024: memory comes in those.
///
/// # Errors
/// In words.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let unit = text
        .trim_start_matches(|c: char| c.is_ascii_digit() || c == '.')
        .trim();
    let binary = match unit.to_ascii_lowercase().as_str() {
        "" => return Err(format!("{text:?} has no unit: write 256M or 4G")),
        "b" => "B",
        "k" | "kb" | "kib" => "KiB",
        "m" | "mb" | "mib" => "MiB",
        "g" | "gb" | "gib" => "GiB",
        "t" | "tb" | "tib" => "TiB",
        _ => return Err(format!("{unit:?} is no unit of memory: write 256M or 4G")),
    };
    let number = text[..text.len() - unit.len()].trim();
    let size: ByteSize = format!("{number} {binary}")
        .parse()
        .map_err(|_| format!("{text:?} is not a size: write 256M or 4G"))?;
    Ok(size.as_u64())
}

/// A size in MiB.
///
/// # Errors
/// In words, also when it is not a whole number of MiB.
pub(super) fn mib(text: &str) -> Result<u64, String> {
    let bytes = bytes(text)?;
    if !bytes.is_multiple_of(1 << 20) {
        return Err(format!("{text:?} is not a whole number of MiB"));
    }
    Ok(bytes >> 20)
}

/// A time, like `200ms` or `1m 30s`.
///
/// # Errors
/// In words.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("{text:?} is not a time: {error}. Write 200ms or 5s"))
}

/// Milliseconds, from a time.
///
/// # Errors
/// In words, also when it is no whole number of them.
pub(super) fn millis(text: &str) -> Result<u64, String> {
    let time = duration(text)?;
    if time.subsec_nanos() % 1_000_000 != 0 {
        return Err(format!("{text:?} is not a whole number of milliseconds"));
    }
    u64::try_from(time.as_millis()).map_err(|_| format!("{text:?} is too long"))
}

/// Bytes for people.
pub(super) fn show_bytes(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_however_they_are_written() {
        for text in ["256M", "256MiB", "256MB", "256m", "256 MiB", "0.25G", "262144K"] {
            assert_eq!(bytes(text), Ok(256 << 20), "{text}");
            assert_eq!(mib(text), Ok(256), "{text}");
        }
        assert_eq!(bytes("100B"), Ok(100));
        for text in [
            "",
            "256",
            "M",
            "-1M",
            "1X",
            "1.5.5M",
            "100B",
            "1.5K",
            "99999999999999T",
        ] {
            assert!(mib(text).is_err(), "{text:?} was taken: {:?}", mib(text));
        }
    }

    #[test]
    fn times_are_whole_milliseconds() {
        assert_eq!(millis("200ms"), Ok(200));
        assert_eq!(millis("1m 30s"), Ok(90_000));
        for text in ["", "200", "1us", "-1s", "fast"] {
            assert!(millis(text).is_err(), "{text:?} was taken");
        }
    }
}
