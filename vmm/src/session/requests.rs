//! Checkpoints that the guest asks for, over its stream sockets.
//!
//! A process in the guest connects to CID 2, port [`PORT`], and speaks lines:
//!
//! ```text
//! guest: CHECKPOINT before the upgrade      a name is optional
//! host:  TAKEN web/3/42                     the guest's state at some moment between the line above and this one
//! host:  COMMITTED web/3/42                 a takeover goes on from there or later
//! or:    ERROR why
//! ```
//!
//! One after the other on a connection, as many as it likes. Connections are in no checkpoint: a guest that is restored
//! finds its connection reset, also where it waited for this very checkpoint, and may ask again.
//!
//! Everything the guest says is hostile: lines, connections and the pace of its checkpoints are bounded, and a VM
//! that nobody protects takes none, so that a guest cannot fill its host's disk.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use migrate::protect::CheckpointRequest;
use migrate::store::GUEST_LABEL;
use segment::SegmentName;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::checkpoints::AFTER_FAILURE;
use super::{Session, chain};
use crate::socket::{Socket, SocketError};

/// The port at CID 2 where a guest asks: that of the agents, too.
pub const PORT: u32 = 7400;
/// The longest name a guest may give a checkpoint, in bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// The longest line of a request, in bytes.
const MAX_LINE_BYTES: usize = 128;
/// Connections at a time.
const MAX_CONNECTIONS: usize = 8;
/// Between two checkpoints that a guest asks for.
const PACE: Duration = Duration::from_millis(100);
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(60);
/// How often it is looked whether a checkpoint can still be committed.
const LOOK: Duration = Duration::from_secs(1);
/// How long a guest may leave an answer unread.
const WRITE: Duration = Duration::from_secs(10);
/// How long accepting pauses after it failed.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Where a process of this host has the port of a guest whose stream sockets meet at `vsock`.
#[must_use]
pub fn path(vsock: &Path) -> PathBuf {
    let mut path = vsock.as_os_str().to_owned();
    path.push(format!("_{PORT}"));
    path.into()
}

/// Answers the guest's requests for as long as the session lives.
///
/// # Errors
/// [`SocketError`] when the socket cannot be had: the VM is as it was, and its guest finds nobody at the port.
pub(super) fn serve(session: &Arc<Session>, vsock: &Path) -> Result<(), SocketError> {
    let socket = Socket::bind(&path(vsock))?;
    let listener = socket
        .listener()
        .try_clone()
        .and_then(UnixListener::from_std)
        .map_err(|source| SocketError::Bind {
            path: socket.path().to_owned(),
            source,
        })?;
    let desk = Arc::new(Desk {
        session: Arc::downgrade(session),
        next: Mutex::new(Instant::now()),
        seats: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
    });
    let ended = session.vm().state();
    tokio::spawn(async move {
        let _socket = socket;
        let mut state = ended;
        tokio::select! {
            () = accept(&listener, &desk) => {}
            _ = state.wait_for(super::RunState::is_final) => {}
        }
    });
    Ok(())
}

/// What the connections share.
struct Desk {
    session: Weak<Session>,
    /// When the next checkpoint may be taken; held while one is.
    next: Mutex<Instant>,
    seats: Arc<Semaphore>,
}

async fn accept(listener: &UnixListener, desk: &Arc<Desk>) {
    loop {
        let (mut stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept a guest's request");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let Ok(seat) = Arc::clone(&desk.seats).try_acquire_owned() else {
            let _ = stream
                .try_write(format!("ERROR {MAX_CONNECTIONS} connections are open already\n").as_bytes());
            continue;
        };
        let desk = Arc::clone(desk);
        tokio::spawn(async move {
            let _seat = seat;
            if let Err(error) = desk.attend(&mut stream).await {
                tracing::debug!(%error, "a guest's request");
            }
        });
    }
}

impl Desk {
    async fn attend(&self, stream: &mut UnixStream) -> std::io::Result<()> {
        let (reader, mut writer) = stream.split();
        let mut reader = BufReader::new(reader);
        loop {
            let Ok(line) = tokio::time::timeout(IDLE, read_line(&mut reader)).await else {
                return say(&mut writer, "ERROR nothing was asked for a minute").await;
            };
            let request = match line? {
                Line::End => return Ok(()),
                Line::TooLong => {
                    let why = format!("ERROR a line of more than {MAX_LINE_BYTES} bytes");
                    return say(&mut writer, &why).await;
                }
                Line::Is(line) => parse(&line),
            };
            let name = match request {
                Ok(name) => name,
                Err(why) => {
                    say(&mut writer, &format!("ERROR {why}")).await?;
                    continue;
                }
            };
            match self.take(name).await {
                Ok((taken, committed)) => {
                    say(&mut writer, &format!("TAKEN {taken}")).await?;
                    // Who does not wait for the answer any more leaves room for others.
                    let gone = async {
                        if let Ok(&[_, ..]) = reader.fill_buf().await {
                            std::future::pending::<()>().await;
                        }
                    };
                    let last = tokio::select! {
                        committed = self.committed(&taken, committed) => match committed {
                            Ok(()) => format!("COMMITTED {taken}"),
                            Err(why) => format!("ERROR {taken} is not committed: {why}"),
                        },
                        () = gone => return Ok(()),
                    };
                    say(&mut writer, &last).await?;
                }
                Err(why) => say(&mut writer, &format!("ERROR {why}")).await?,
            }
        }
    }

    async fn take(
        &self,
        label: Option<String>,
    ) -> Result<(SegmentName, watch::Receiver<Option<SegmentName>>), String> {
        let mut next = self.next.lock().await;
        sleep_until(*next).await;
        let session = self.session.upgrade().ok_or("the VM is stopping")?;
        let asking = session.asking.read().await;
        if !*asking {
            return Err("the VM is stopping".into());
        }
        if session.status().protection.is_none() {
            return Err(
                "this VM is not protected: no other host would have the checkpoint. Have it started with --protect-to"
                    .into(),
            );
        }
        let committed = session.committed();
        let label = label.map(|name| format!("{GUEST_LABEL}{name}"));
        let request = CheckpointRequest { full: false, label };
        let taken = session.checkpoint(request).await;
        drop(asking);
        *next = Instant::now() + if taken.is_ok() { PACE } else { AFTER_FAILURE };
        // What it says of this host is none of the guest's business.
        let failed = |error: &dyn std::error::Error| {
            tracing::debug!(vm = %session.name(), error = %chain(error), "a checkpoint for the guest failed");
            "the checkpoint failed: `vmm ps` on the host says why"
        };
        let taken = taken.map_err(|error| failed(&error))?;
        let name = taken.name.parse().map_err(|error| failed(&error))?;
        Ok((name, committed))
    }

    /// Waits until this checkpoint, or a later one, is committed.
    async fn committed(
        &self,
        taken: &SegmentName,
        mut committed: watch::Receiver<Option<SegmentName>>,
    ) -> Result<(), String> {
        let reached = |newest: &Option<SegmentName>| {
            newest
                .as_ref()
                .is_some_and(|newest| (newest.generation, newest.epoch) >= (taken.generation, taken.epoch))
        };
        let mut look = interval_at(Instant::now() + LOOK, LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                known = committed.wait_for(reached) => return match known {
                    Ok(_) => Ok(()),
                    Err(_) => Err("the VM is stopping".into()),
                },
                _ = look.tick() => {
                    let status = self.session.upgrade().map(|session| session.status());
                    let status = status.ok_or("the VM is stopping")?;
                    if status.protection.is_none() {
                        return Err("the VM's protection has ended: `vmm ps` on the host says why".into());
                    }
                }
            }
        }
    }
}

async fn say(writer: &mut (impl AsyncWriteExt + Unpin), line: &str) -> std::io::Result<()> {
    // One line to an answer, whatever an error's text has in it.
    let line: String = line
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let written = tokio::time::timeout(WRITE, writer.write_all(format!("{line}\n").as_bytes())).await;
    written.map_err(|_| std::io::ErrorKind::TimedOut)?
}

enum Line {
    Is(Vec<u8>),
    TooLong,
    End,
}

/// One line, without what ends it. What comes without an end of line is no request.
async fn read_line(reader: &mut BufReader<impl AsyncRead + Unpin>) -> std::io::Result<Line> {
    let mut line = Vec::new();
    let most = MAX_LINE_BYTES as u64 + 1;
    reader.take(most).read_until(b'\n', &mut line).await?;
    Ok(match line.pop() {
        Some(b'\n') => Line::Is(line),
        Some(_) if line.len() as u64 + 1 == most => Line::TooLong,
        Some(_) | None => Line::End,
    })
}

/// The name in a request for a checkpoint.
fn parse(line: &[u8]) -> Result<Option<String>, String> {
    let line = std::str::from_utf8(line).map_err(|_| "the request is not UTF-8")?;
    let line = line.trim_end_matches('\r');
    let name = match line.strip_prefix("CHECKPOINT") {
        Some("") => return Ok(None),
        Some(rest) if rest.starts_with(' ') => rest.trim(),
        Some(_) | None => return Err("unknown request: CHECKPOINT, or CHECKPOINT NAME".into()),
    };
    if name.len() > MAX_NAME_BYTES {
        return Err(format!(
            "the name has {} bytes; at most {MAX_NAME_BYTES} are allowed",
            name.len()
        ));
    }
    // It is shown to people: nothing that a terminal might obey, and nothing that looks like nothing.
    if !name
        .chars()
        .all(|c| c.is_alphanumeric() || (' '..='~').contains(&c))
    {
        return Err("the name has other characters than letters, digits, spaces and those of ASCII".into());
    }
    Ok((!name.is_empty()).then(|| name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_its_checkpoint_or_not() {
        assert_eq!(parse(b"CHECKPOINT"), Ok(None));
        assert_eq!(parse(b"CHECKPOINT \r"), Ok(None));
        assert_eq!(
            parse(b"CHECKPOINT before the upgrade"),
            Ok(Some("before the upgrade".into()))
        );
        let longest = format!("CHECKPOINT {}", "x".repeat(MAX_NAME_BYTES));
        assert_eq!(
            parse(longest.as_bytes()).map(|name| name.map(|n| n.len())),
            Ok(Some(MAX_NAME_BYTES))
        );
        for (bad, why) in [
            (&b"CHECKPOINTS"[..], "unknown request"),
            (b"checkpoint", "unknown request"),
            (b"", "unknown request"),
            (b"CHECKPOINT \xff", "not UTF-8"),
            (b"CHECKPOINT a\x07b", "other characters"),
            ("CHECKPOINT a\u{202e}b".as_bytes(), "other characters"),
            (
                format!("CHECKPOINT {}", "x".repeat(MAX_NAME_BYTES + 1)).as_bytes(),
                "at most 64",
            ),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[tokio::test]
    async fn a_line_is_bounded_and_whole() {
        let read = async |bytes: &[u8]| read_line(&mut BufReader::new(bytes)).await.unwrap();
        assert!(matches!(read(b"").await, Line::End));
        assert!(matches!(read(b"CHECKPOINT").await, Line::End));
        assert!(matches!(read(b"a\nb\n").await, Line::Is(line) if line == b"a"));
        let mut longest = vec![b'x'; MAX_LINE_BYTES];
        longest.push(b'\n');
        assert!(matches!(read(&longest).await, Line::Is(line) if line.len() == MAX_LINE_BYTES));
        longest.insert(0, b'x');
        assert!(matches!(read(&longest).await, Line::TooLong));
    }
}
