//! A TAP interface of the host: opening it, and what it does for the guest. One of the few places with `unsafe`: the
//! TUN ioctls have no wrapper.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// Bytes of the header before each frame: virtio 1's, with its count of buffers.
pub const HEADER_BYTES: usize = 12;

/// Why a TAP cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is none of that name.
    #[error(
        "the host has no TAP interface {tap:?} for {name}: make it with `ip tuntap add dev {tap} mode tap` and \
         `ip link set {tap} up`"
    )]
    Missing {
        /// The device.
        name: String,
        /// The interface.
        tap: String,
    },
    /// It is no name of an interface.
    #[error("{tap:?} cannot be the name of a TAP interface: 1 to 15 characters without '/' and spaces")]
    Name {
        /// What was given.
        tap: String,
    },
    /// Another process has it.
    #[error("the TAP interface {tap:?} for {name} is in use by another VM or process")]
    Busy {
        /// The device.
        name: String,
        /// The interface.
        tap: String,
    },
    /// The system refused.
    #[error("{what} of the TAP interface {tap:?}")]
    System {
        /// What was done.
        what: &'static str,
        /// The interface.
        tap: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// A TAP interface. Closed, its place is free for another.
#[derive(Debug, Clone)]
pub struct Tap(Arc<File>);

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Tap {
    /// Opens the interface `tap` for the device `name`.
    ///
    /// # Errors
    /// [`TapError`] naming the interface.
    pub fn open(name: &str, tap: &str) -> Result<Self, TapError> {
        if tap.is_empty()
            || tap.len() >= libc::IFNAMSIZ
            || tap == "."
            || tap == ".."
            || tap.contains(|c: char| c == '/' || c == '%' || c.is_whitespace() || c == '\0')
        {
            return Err(TapError::Name { tap: tap.into() });
        }
        // Opening one that is not there would make it.
        if !Path::new("/sys/class/net").join(tap).exists() {
            return Err(TapError::Missing {
                name: name.into(),
                tap: tap.into(),
            });
        }
        let system = |what, source| TapError::System {
            what,
            tap: tap.into(),
            source,
        };
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(|e| system("open /dev/net/tun", e))?;
        attach(&file, tap).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy {
                name: name.into(),
                tap: tap.into(),
            },
            _ => system("TUNSETIFF", source),
        })?;
        set_header(&file).map_err(|e| system("TUNSETVNETHDRSZ", e))?;
        Ok(Self(Arc::new(file)))
    }

    /// What the guest takes from the host: `TUN_F_*`. To be set again on every new TAP (trap 14).
    ///
    /// # Errors
    /// The system's error.
    pub fn set_offload(&self, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a number, no pointer.
        let ret = unsafe { ioctl_with_val(&*self.0, libc::TUNSETOFFLOAD as _, flags.into()) };
        result(ret)
    }

    /// The next frame, header first; `WouldBlock` when there is none.
    ///
    /// # Errors
    /// The system's error.
    pub fn receive(&self, to: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(to)
    }

    /// Sends a frame, header first.
    ///
    /// # Errors
    /// The system's error.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&*self.0).write(frame).map(drop)
    }
}

fn result(ret: libc::c_int) -> io::Result<()> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn attach(file: &File, tap: &str) -> io::Result<()> {
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(tap.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: flags as libc::c_short,
        },
    };
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives across the call.
    result(unsafe { ioctl_with_mut_ref(file, libc::TUNSETIFF as _, &mut request) })
}

fn set_header(file: &File) -> io::Result<()> {
    let bytes = HEADER_BYTES as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives across the call.
    result(unsafe { ioctl_with_ref(file, libc::TUNSETVNETHDRSZ as _, &bytes) })
}
