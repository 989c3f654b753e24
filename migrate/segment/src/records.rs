//! Records: the devices' state, each a tagged and versioned run of bytes this crate does not look into.

use std::collections::HashSet;

use minicbor::{Decode, Decoder, Encode, Encoder};

use crate::error::at_most;
use crate::{Cipher, FormatError, cbor, limits};

/// The level records are compressed at: they are few and small.
const LEVEL: i32 = 3;

/// The state of one part of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What it is of, like "vcpu/0/regs": printable ASCII, used once in a segment.
    pub tag: String,
    /// The version of the payload's form.
    pub version: u16,
    /// Whether a reader that does not know the tag must refuse the segment.
    pub critical: bool,
    /// The state.
    pub payload: Vec<u8>,
}

/// Records as they are stored.
#[derive(Debug)]
pub(crate) struct StoredRecords {
    pub(crate) bytes: Vec<u8>,
    pub(crate) raw_bytes: u32,
}

/// Checks, compresses and, where there is a cipher, encrypts records.
pub(crate) fn encode(records: &[Record], cipher: Option<&Cipher>) -> Result<StoredRecords, FormatError> {
    check(records.iter().map(|record| record.tag.as_str()))?;
    let payloads = records.iter().fold(0u64, |sum, record| {
        sum.saturating_add(record.payload.len() as u64)
    });
    at_most(|| "records", payloads, limits::MAX_RECORDS_RAW_BYTES.into())?;
    let mut raw = Vec::new();
    write(records, &mut raw).map_err(|e| FormatError::invalid("records", e.to_string()))?;
    at_most(
        || "records",
        raw.len() as u64,
        limits::MAX_RECORDS_RAW_BYTES.into(),
    )?;
    let mut bytes = zstd::bulk::compress(&raw, LEVEL).map_err(|source| FormatError::Zstd {
        action: "compress",
        what: "records".into(),
        source,
    })?;
    // Below the limit, which is a u32.
    let raw_bytes = raw.len() as u32;
    if let Some(cipher) = cipher {
        cipher.seal_records(raw_bytes, &mut bytes)?;
    }
    at_most(
        || "stored records",
        bytes.len() as u64,
        limits::MAX_RECORDS_STORED_BYTES.into(),
    )?;
    Ok(StoredRecords { bytes, raw_bytes })
}

fn write(
    records: &[Record],
    raw: &mut Vec<u8>,
) -> Result<(), minicbor::encode::Error<std::convert::Infallible>> {
    let mut encoder = Encoder::new(raw);
    encoder.array(records.len() as u64)?;
    for record in records {
        encoder.encode(Wire {
            tag: &record.tag,
            version: record.version,
            critical: record.critical,
            payload: &record.payload,
        })?;
    }
    Ok(())
}

/// Decompresses and checks records. `raw_bytes` is the header's, and within its limit.
pub(crate) fn decode(stored: &[u8], raw_bytes: u32) -> Result<Vec<Record>, FormatError> {
    let mut raw = vec![0; raw_bytes as usize];
    let length =
        zstd::bulk::decompress_to_buffer(stored, raw.as_mut_slice()).map_err(|source| FormatError::Zstd {
            action: "decompress",
            what: "records".into(),
            source,
        })?;
    if length != raw.len() {
        let why = format!("they decompress to {length} bytes, the header says {raw_bytes}");
        return Err(FormatError::invalid("records", why));
    }
    cbor::check("records", &raw)?;
    let cbor = |source| FormatError::Cbor {
        what: "records".into(),
        source: Box::new(source),
    };
    let mut decoder = Decoder::new(&raw);
    let count = decoder.array().map_err(cbor)?.unwrap_or(0);
    at_most(|| "number of records", count, limits::MAX_RECORDS as u64)?;
    let wires: Vec<Wire<'_>> = (0..count)
        .map(|_| decoder.decode())
        .collect::<Result<_, _>>()
        .map_err(cbor)?;
    check(wires.iter().map(|wire| wire.tag))?;
    Ok(wires.iter().map(Record::from).collect())
}

/// Checks the number of records and their tags.
fn check<'a>(tags: impl ExactSizeIterator<Item = &'a str>) -> Result<(), FormatError> {
    at_most(
        || "number of records",
        tags.len() as u64,
        limits::MAX_RECORDS as u64,
    )?;
    let mut seen = HashSet::new();
    for (i, tag) in tags.enumerate() {
        at_most(
            || format!("tag of record {i}"),
            tag.len() as u64,
            limits::MAX_TAG_BYTES as u64,
        )?;
        if tag.is_empty() || !tag.bytes().all(|byte| byte.is_ascii_graphic()) {
            let why = format!("{tag:?}: 1 to 64 printable ASCII characters without blanks are needed");
            return Err(FormatError::invalid(format!("tag of record {i}"), why));
        }
        if !seen.insert(tag) {
            return Err(FormatError::invalid(
                format!("record {i}"),
                format!("there are two tagged {tag:?}"),
            ));
        }
    }
    Ok(())
}

/// A record as it is written. A key is never used again for something else.
#[derive(Encode, Decode)]
#[cbor(map)]
struct Wire<'a> {
    #[b(0)]
    tag: &'a str,
    #[n(1)]
    version: u16,
    #[n(2)]
    critical: bool,
    #[cbor(b(3), with = "minicbor::bytes")]
    payload: &'a [u8],
}

impl From<&Wire<'_>> for Record {
    fn from(wire: &Wire<'_>) -> Self {
        Self {
            tag: wire.tag.to_owned(),
            version: wire.version,
            critical: wire.critical,
            payload: wire.payload.to_owned(),
        }
    }
}
