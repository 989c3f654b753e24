//! The record of the highest generation promised for a VM.
//!
//! ```text
//!   0  8  magic "UNDSPRM1"
//!   8  8  generation
//!  16 32  digest of the bytes before it and the VM's id
//! ```
//!
//! The id is in the digest, so a record copied to another VM's file is noticed.

use std::cmp::Ordering;

use segment::{Generation, VmId};

/// What is to be done about a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// It is below the one that is promised: refused, whatever is asked.
    Refused,
    /// It is the one that is promised.
    Stands,
    /// It has to be promised durably, before anything is answered.
    Raise,
}

/// The rule of the fencing memory: what is promised never goes down.
#[must_use]
pub fn promise(promised: Generation, asked: Generation) -> Promise {
    match asked.cmp(&promised) {
        Ordering::Less => Promise::Refused,
        Ordering::Equal => Promise::Stands,
        Ordering::Greater => Promise::Raise,
    }
}

const MAGIC: [u8; 8] = *b"UNDSPRM1";
const CONTEXT: &str = "understudy store v1 promise";
/// The length of a record.
pub(super) const RECORD_BYTES: usize = 48;

pub(super) fn encode(vm: &VmId, generation: Generation) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..8].copy_from_slice(&MAGIC);
    record[8..16].copy_from_slice(&generation.0.to_le_bytes());
    let digest = digest(vm, &record[..16]);
    record[16..].copy_from_slice(&digest);
    record
}

pub(super) fn decode(vm: &VmId, bytes: &[u8]) -> Result<Generation, &'static str> {
    let Ok(record) = <&[u8; RECORD_BYTES]>::try_from(bytes) else {
        return Err("its length is wrong");
    };
    if record[..8] != MAGIC {
        return Err("it is not a promise");
    }
    if record[16..] != digest(vm, &record[..16]) {
        return Err("its digest does not match");
    }
    let mut generation = [0; 8];
    generation.copy_from_slice(&record[8..16]);
    Ok(Generation(u64::from_le_bytes(generation)))
}

fn digest(vm: &VmId, bytes: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new_derive_key(CONTEXT)
        .update(bytes)
        .update(vm.as_str().as_bytes())
        .finalize()
        .as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_and_every_bit_counts() {
        let vm = VmId::new("web").unwrap();
        let record = encode(&vm, Generation(3));
        assert_eq!(&record[..16], b"UNDSPRM1\x03\0\0\0\0\0\0\0");
        assert_eq!(decode(&vm, &record), Ok(Generation(3)));
        for bit in 0..RECORD_BYTES * 8 {
            let mut flipped = record;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&vm, &flipped).is_err(), "bit {bit}");
        }
        for length in 0..RECORD_BYTES {
            assert!(decode(&vm, &record[..length]).is_err());
        }
        assert!(decode(&VmId::new("db").unwrap(), &record).is_err());
    }
}
