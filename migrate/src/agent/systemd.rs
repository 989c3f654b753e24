//! Tells systemd how the agent is: `READY=1` when it listens, `WATCHDOG=1` while its tasks run, and
//! `STOPPING=1`. Without `$NOTIFY_SOCKET` it says nothing.
//!
//! The protocol is sd_notify(3): lines of text in one datagram.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Where to say it, and how often at least.
#[derive(Debug)]
pub(super) struct Systemd {
    socket: Option<UnixDatagram>,
    /// Half of the time after which systemd takes a silent agent for hung.
    watchdog: Option<Duration>,
}

impl Systemd {
    /// As the environment says.
    pub(super) fn from_env() -> Self {
        let at = std::env::var_os("NOTIFY_SOCKET").filter(|at| !at.is_empty());
        let socket = at.and_then(|at| match connect(&at) {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::warn!(socket = ?at, %error, "systemd cannot be told how the agent is");
                None
            }
        });
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let limit = number("WATCHDOG_USEC").filter(|us| ours && *us > 0);
        Self {
            socket,
            watchdog: limit.map(|us| Duration::from_micros(us / 2)),
        }
    }

    /// Says one thing. A systemd that does not listen holds nobody up.
    pub(super) fn say(&self, text: &str) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(text.as_bytes())
        {
            tracing::debug!(%error, text, "systemd was not told");
        }
    }

    /// Waits until the next sign of life is due, for ever when none is wanted.
    pub(super) async fn next_sign(&self) {
        match self.watchdog {
            Some(every) if self.socket.is_some() => tokio::time::sleep(every).await,
            Some(_) | None => std::future::pending().await,
        }
    }
}

fn connect(at: &OsStr) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    match at.as_bytes().split_first() {
        Some((b'@', name)) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        _ => socket.connect(at)?,
    }
    Ok(socket)
}
