//! How names, ids and generations stand in CBOR: `#[cbor(with = "crate::wire::value", has_nil)]`.
//!
//! Text for names, byte strings for ids, unsigned numbers for generations; nil for an absent one. They are parsed
//! here, so that nothing behind the decoder ever sees a name that is none.

use std::collections::BTreeMap;

use minicbor::decode::{self, Decoder};
use minicbor::encode::{self, Encoder, Write};
use segment::{CheckpointId, Digest, Epoch, Generation, SegmentName, VmId};

use crate::placement::LabelRule;

/// The most items one list inside a message may have.
pub const MAX_LIST_ITEMS: u64 = 4096;

/// A value with one form in CBOR.
pub trait WireValue: Sized {
    /// Writes it.
    ///
    /// # Errors
    /// What the encoder says.
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>>;

    /// Reads and checks it.
    ///
    /// # Errors
    /// When it is of another type, or not well-formed.
    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error>;

    /// The value that stands for an absent field, where there is one.
    fn absent() -> Option<Self> {
        None
    }

    /// Whether it is the absent value, which is left out.
    fn is_absent(&self) -> bool {
        false
    }
}

/// For the derive of minicbor.
///
/// # Errors
/// What the encoder says.
pub fn encode<C, T: WireValue, W: Write>(
    v: &T,
    e: &mut Encoder<W>,
    _: &mut C,
) -> Result<(), encode::Error<W::Error>> {
    v.put(e)
}

/// For the derive of minicbor.
///
/// # Errors
/// When the value is of another type, or not well-formed.
pub fn decode<C, T: WireValue>(d: &mut Decoder<'_>, _: &mut C) -> Result<T, decode::Error> {
    T::take(d)
}

/// For the derive of minicbor: what a missing field means.
#[must_use]
pub fn nil<T: WireValue>() -> Option<T> {
    T::absent()
}

/// For the derive of minicbor: whether a field may be left out.
#[must_use]
pub fn is_nil<T: WireValue>(v: &T) -> bool {
    v.is_absent()
}

macro_rules! parsed {
    ($($t:ty),*) => {$(
        impl WireValue for $t {
            fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
                e.str(&self.to_string())?.ok()
            }
            fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
                d.str()?.parse().map_err(decode::Error::custom)
            }
        }
    )*};
}
parsed!(VmId, SegmentName, LabelRule);

macro_rules! numbers {
    ($($t:ident),*) => {$(
        impl WireValue for $t {
            fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
                e.u64(self.0)?.ok()
            }
            fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
                Ok(Self(d.u64()?))
            }
        }
    )*};
}
numbers!(Generation, Epoch);

macro_rules! ids {
    ($($t:ident),*) => {$(
        impl WireValue for $t {
            fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
                e.bytes(&self.0)?.ok()
            }
            fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
                let at = d.position();
                Self::from_slice(d.bytes()?)
                    .ok_or_else(|| decode::Error::message(concat!(stringify!($t), " of a wrong length")).at(at))
            }
        }
    )*};
}
ids!(CheckpointId, Digest);

impl WireValue for [u8; 16] {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        e.bytes(self)?.ok()
    }
    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        let at = d.position();
        d.bytes()?
            .try_into()
            .map_err(|_| decode::Error::message("not 16 bytes").at(at))
    }
}

impl WireValue for String {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        e.str(self)?.ok()
    }
    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        Ok(d.str()?.to_owned())
    }
}

impl<T: WireValue> WireValue for Option<T> {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        match self {
            Some(v) => v.put(e),
            None => e.null()?.ok(),
        }
    }
    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        if d.datatype()? == minicbor::data::Type::Null {
            d.null()?;
            return Ok(None);
        }
        T::take(d).map(Some)
    }
    fn absent() -> Option<Self> {
        Some(None)
    }
    fn is_absent(&self) -> bool {
        self.is_none()
    }
}

/// The length of a list or map that begins here: definite, and at most [`MAX_LIST_ITEMS`].
fn length(found: Option<u64>, at: usize) -> Result<u64, decode::Error> {
    match found {
        Some(n) if n <= MAX_LIST_ITEMS => Ok(n),
        Some(_) => Err(decode::Error::message("more items than a message may have").at(at)),
        None => Err(decode::Error::message("a list of indefinite length").at(at)),
    }
}

impl<T: WireValue> WireValue for Vec<T> {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        e.array(self.len() as u64)?;
        self.iter().try_for_each(|v| v.put(e))
    }
    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        let at = d.position();
        let n = length(d.array()?, at)?;
        // Grows as items are really there: a claimed count takes no memory.
        let mut items = Vec::new();
        for _ in 0..n {
            items.push(T::take(d)?);
        }
        Ok(items)
    }
}

impl WireValue for BTreeMap<String, String> {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        e.map(self.len() as u64)?;
        self.iter().try_for_each(|(k, v)| e.str(k)?.str(v)?.ok())
    }
    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        let at = d.position();
        let n = length(d.map()?, at)?;
        let mut map = Self::new();
        for _ in 0..n {
            map.insert(d.str()?.to_owned(), d.str()?.to_owned());
        }
        Ok(map)
    }
}
