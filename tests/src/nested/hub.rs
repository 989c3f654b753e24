//! A network hub for emulated hosts: what one sends, all others get.
//!
//! QEMU's `stream` network connects to our Unix socket and sends each Ethernet frame behind its length, 32 bits
//! big-endian. A host whose QEMU reads too slowly loses frames, as on a real network; the others do not wait.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

/// The largest frame QEMU sends, with offloads.
const MAX_FRAME_BYTES: usize = 68 << 10;
/// Frames that may wait for one host.
const QUEUE_FRAMES: usize = 4096;

type Frame = Arc<[u8]>;
/// Guarded because hosts connect one after the other while frames already flow.
type Ports = Arc<Mutex<Vec<SyncSender<Frame>>>>;

/// Serves a hub on a new Unix socket at `path`, until this process ends.
///
/// # Errors
/// When the socket cannot be made.
pub(crate) fn serve(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    let ports = Ports::default();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            attach(&ports, stream);
        }
    });
    Ok(())
}

fn attach(ports: &Ports, stream: UnixStream) {
    // A host that cannot be attached has no network, which its test will say.
    let Ok(out) = stream.try_clone() else { return };
    let (queue, frames) = sync_channel(QUEUE_FRAMES);
    let mine = {
        let mut all = ports.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(queue);
        all.len() - 1
    };
    thread::spawn(move || send(out, &frames));
    let ports = Arc::clone(ports);
    thread::spawn(move || receive(stream, mine, &ports));
}

/// Both ends finish when QEMU does, which is no error here: the machine's own end is reported elsewhere.
fn receive(mut stream: UnixStream, mine: usize, ports: &Ports) {
    let mut length = [0; 4];
    while stream.read_exact(&mut length).is_ok() {
        let bytes = u32::from_be_bytes(length) as usize;
        if bytes > MAX_FRAME_BYTES {
            return;
        }
        let mut frame = vec![0; 4 + bytes];
        frame[..4].copy_from_slice(&length);
        if stream.read_exact(&mut frame[4..]).is_err() {
            return;
        }
        let frame = Frame::from(frame);
        let all = ports.lock().unwrap_or_else(PoisonError::into_inner);
        for (other, queue) in all.iter().enumerate() {
            if other != mine {
                match queue.try_send(Arc::clone(&frame)) {
                    // Full: the frame is lost to that host. Gone: so is its machine.
                    Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
                }
            }
        }
    }
}

fn send(mut stream: UnixStream, frames: &Receiver<Frame>) {
    for frame in frames {
        if stream.write_all(&frame).is_err() {
            return;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test fails by it.
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_frame_reaches_all_others_and_not_its_sender() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hub");
        serve(&path).unwrap();
        let mut hosts: Vec<UnixStream> = (0..3).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let frame = [&3_u32.to_be_bytes()[..], b"abc"].concat();
        let deadline = Instant::now() + Duration::from_secs(60);
        for to in [1, 2] {
            hosts[to]
                .set_read_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            let mut found = [0; 7];
            // A frame sent before a host was attached is lost to it: again.
            loop {
                hosts[0].write_all(&frame).unwrap();
                if hosts[to].read_exact(&mut found).is_ok() {
                    break;
                }
                assert!(Instant::now() < deadline, "no frame for host {to}");
            }
            assert_eq!(&found[..], &frame[..]);
        }
        hosts[0]
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        assert!(hosts[0].read(&mut [0]).is_err(), "the sender got its own frame");
    }
}
