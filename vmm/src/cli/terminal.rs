//! The user's terminal: raw while a guest's console is on it, and as it was afterwards.

use std::io::{self, Read};
use std::os::fd::AsFd;

use rustix::termios::{InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use tokio::sync::mpsc;

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// A terminal in raw mode. Dropped, it is as before.
#[derive(Debug)]
pub(super) struct RawMode(Termios);

impl RawMode {
    /// Makes standard input raw, if it is a terminal and this process may read from it (a job in the background
    /// would be stopped for trying). Output is left alone: the log's lines must not run down the screen.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        let terminal = stdin.as_fd();
        if !rustix::termios::isatty(terminal) {
            return Ok(None);
        }
        if rustix::termios::tcgetpgrp(terminal).is_ok_and(|front| front != rustix::process::getpgrp()) {
            return Ok(None);
        }
        let before = rustix::termios::tcgetattr(terminal)?;
        let mut raw = before.clone();
        raw.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN;
        raw.input_modes -= InputModes::ICRNL | InputModes::INLCR | InputModes::IXON | InputModes::ISTRIP;
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        rustix::termios::tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = rustix::termios::tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &self.0);
    }
}

/// What the user types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Typed {
    /// For the guest.
    Bytes(Vec<u8>),
    /// Ctrl-A x.
    Leave,
}

/// Finds the escape in what is typed.
#[derive(Debug, Default)]
pub(super) struct Escape {
    pending: bool,
}

impl Escape {
    /// What of `input` is for the guest, and whether the user wants to leave (what follows that is dropped).
    pub(super) fn feed(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(input.len());
        for &byte in input {
            match (self.pending, byte) {
                (false, ESCAPE) => self.pending = true,
                (false, _) => out.push(byte),
                (true, b'x' | b'X') => return (out, true),
                // Twice is once, for the guest.
                (true, ESCAPE) => {
                    self.pending = false;
                    out.push(ESCAPE);
                }
                (true, _) => {
                    self.pending = false;
                    out.extend([ESCAPE, byte]);
                }
            }
        }
        (out, false)
    }
}

/// Reads standard input on a thread of its own until it ends or nobody wants more. With `escape`, Ctrl-A x is found
/// in it.
pub(super) fn read_stdin(escape: bool) -> io::Result<mpsc::Receiver<Typed>> {
    let (to, typed) = mpsc::channel(4);
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut finder = Escape::default();
        let mut piece = [0; 1024];
        loop {
            let input = match io::stdin().read(&mut piece) {
                Ok(0) => return,
                Ok(count) => &piece[..count],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::debug!(%error, "standard input");
                    return;
                }
            };
            let (bytes, leave) = if escape {
                finder.feed(input)
            } else {
                (input.to_vec(), false)
            };
            if (!bytes.is_empty() && to.blocking_send(Typed::Bytes(bytes)).is_err())
                || (leave && to.blocking_send(Typed::Leave).is_err())
            {
                return;
            }
        }
    })?;
    Ok(typed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_is_found_also_across_reads() {
        let mut escape = Escape::default();
        assert_eq!(escape.feed(b"ab\x01"), (b"ab".to_vec(), false));
        assert_eq!(escape.feed(b"\x01c\x01d"), (b"\x01c\x01d".to_vec(), false));
        assert_eq!(escape.feed(b"e\x01"), (b"e".to_vec(), false));
        assert_eq!(escape.feed(b"xrest"), (Vec::new(), true));
    }
}
