//! A listening Unix socket of this host: bound for this user alone, and unlinked when it goes.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

/// The longest path of a Unix socket: `sun_path` has 108 bytes, and one ends it.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The system's bound.
    #[error(
        "the socket path {path:?} has {} bytes, and a Unix socket's may have {MAX_SOCKET_PATH_BYTES}: choose a \
         shorter one with --api-sock, --vsock or --run-dir",
        path.as_os_str().len()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Someone answers there.
    #[error(
        "another process answers on the socket {path:?}: choose another path for this one, or stop that VM"
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{path:?} is there and is not a socket: choose another path, or remove it")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("make the socket {path:?}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// A socket that is bound, so that its name is taken. Unlinked on drop, unless another has its name by then.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

/// Whether a Unix socket can have this path at all.
///
/// # Errors
/// [`SocketError::TooLong`].
pub fn check_length(path: &Path) -> Result<(), SocketError> {
    if path.as_os_str().as_bytes().len() > MAX_SOCKET_PATH_BYTES {
        return Err(SocketError::TooLong {
            path: path.to_owned(),
        });
    }
    Ok(())
}

impl Socket {
    /// Binds `path`, for this user alone. What a process that is gone left there is removed first.
    ///
    /// # Errors
    /// [`SocketError`] naming the path.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let bind = |source| SocketError::Bind {
            path: path.to_owned(),
            source,
        };
        check_length(path)?;
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(bind(error)),
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(SocketError::NotASocket {
                    path: path.to_owned(),
                });
            }
            Ok(_) => match UnixStream::connect(path) {
                // Only what certainly has no owner is removed.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(bind)?;
                }
                Ok(_) => {
                    return Err(SocketError::InUse {
                        path: path.to_owned(),
                    });
                }
                Err(error) => return Err(bind(error)),
            },
        }
        // The mask makes the socket private from its first instant; a chmod after would leave a gap. It is the
        // process's: a file that another thread makes meanwhile gets fewer permissions, never more.
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(before);
        let listener = bound.map_err(bind)?;
        let socket = Self {
            listener,
            path: path.to_owned(),
            identity: identity(path),
        };
        socket.listener.set_nonblocking(true).map_err(bind)?;
        Ok(socket)
    }

    /// Its listening end, which does not block.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Gone already is fine.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is there.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let there = std::fs::symlink_metadata(path).ok()?;
    Some((there.dev(), there.ino()))
}
