//! Random bytes, from the kernel's source.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// So many of them.
///
/// # Errors
/// When the kernel gives none, or too few.
pub(crate) fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    if getrandom(&mut bytes, GetRandomFlags::empty())? < N {
        return Err(io::Error::other("the kernel gave too few random bytes"));
    }
    Ok(bytes)
}
