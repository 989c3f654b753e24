//! `understudy-checkpoint`: in a guest, asks the monitor for a checkpoint and waits until it is committed.
//!
//! ```text
//! understudy-checkpoint [--timeout SECONDS] [NAME]
//! ```
//!
//! | Status | Meaning |
//! |---|---|
//! | 0 | committed: whatever happens to this host, the VM goes on from this state or a later one |
//! | 1 | refused, or not committed in time: the last line says why |
//! | 2 | wrong arguments |
//!
//! It speaks the lines of the monitor's port 7400 over a stream socket (AF_VSOCK) to the host, CID 2, and prints the
//! answers. A connection that is reset was in another life of the VM: this is a machine restored from a checkpoint,
//! maybe from the very one that was asked for. It asks again, in this life.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

const USAGE: &str = "usage: understudy-checkpoint [--timeout SECONDS] [NAME]";
/// The monitor's port, and the host's address.
const PORT: u32 = 7400;
const HOST_CID: u32 = 2;
/// How long a commit is waited for, unless it is said.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is tried to find somebody there.
const TRIES: u32 = 10;
/// How long until it is asked again after a reset.
const AGAIN: Duration = Duration::from_millis(200);

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const SOCK_CLOEXEC: i32 = 0o2_000_000;

/// `struct sockaddr_vm` of <linux/vm_sockets.h>.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn connect(socket: i32, address: *const Address, bytes: u32) -> i32;
}

/// A stream to the monitor.
fn reach() -> io::Result<File> {
    // SAFETY: no pointer is passed.
    let made = unsafe { socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else has it.
    let stream = File::from(unsafe { OwnedFd::from_raw_fd(made) });
    let address = Address {
        family: AF_VSOCK as u16,
        reserved: 0,
        port: PORT,
        cid: HOST_CID,
        flags: 0,
        zero: [0; 3],
    };
    // SAFETY: the address lives through the call and has the size that is said.
    let refused = unsafe { connect(made, &raw const address, size_of::<Address>() as u32) } != 0;
    if refused { Err(io::Error::last_os_error()) } else { Ok(stream) }
}

/// Why there is no committed checkpoint.
enum Failure {
    /// It may go well another time.
    Again(String),
    Refused(String),
    /// Nobody is there.
    Nobody(String),
}

impl Failure {
    fn of(what: &str, error: &io::Error) -> Self {
        let said = format!("{what}: {error}");
        match error.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof | ErrorKind::NotConnected => {
                Self::Again(said)
            }
            _ => Self::Refused(said),
        }
    }
}

/// Asks once, and says what it is answered.
fn ask(name: Option<&str>) -> Result<(), Failure> {
    let mut stream = reach().map_err(|error| match error.kind() {
        // Nobody listens there: the transport answers with a reset.
        ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused => Failure::Nobody(format!(
            "reach the host over vsock: {error} (was the VM started with --vsock, by a vmm that takes requests?)"
        )),
        _ => Failure::Refused(format!(
            "reach the host over vsock: {error} (is the driver there? modprobe vmw_vsock_virtio_transport)"
        )),
    })?;
    let request = match name {
        Some(name) => format!("CHECKPOINT {name}\n"),
        None => "CHECKPOINT\n".to_owned(),
    };
    stream
        .write_all(request.as_bytes())
        .map_err(|error| Failure::of("ask the host", &error))?;
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(|error| Failure::of("hear the host", &error))?;
        println!("{line}");
        if line.starts_with("COMMITTED ") {
            return Ok(());
        }
        if let Some(why) = line.strip_prefix("ERROR ") {
            return Err(Failure::Refused(why.to_owned()));
        }
    }
    Err(Failure::Again("the host ended the connection".into()))
}

fn ask_until_committed(name: Option<&str>) -> Result<(), String> {
    let mut unreached = 0;
    loop {
        match ask(name) {
            Err(Failure::Nobody(_)) if unreached < TRIES => {
                // Or the machine was restored in that very moment.
                unreached += 1;
                thread::sleep(AGAIN);
            }
            Err(Failure::Nobody(why)) => return Err(why),
            Ok(()) => return Ok(()),
            Err(Failure::Refused(why)) => return Err(why),
            Err(Failure::Again(why)) => {
                eprintln!("understudy-checkpoint: {why}; asking again");
                thread::sleep(AGAIN);
            }
        }
    }
}

fn arguments() -> Option<(Option<String>, Duration)> {
    let mut given = std::env::args().skip(1);
    let (mut name, mut timeout) = (None, PATIENCE);
    while let Some(argument) = given.next() {
        match argument.as_str() {
            "--timeout" => timeout = Duration::from_secs(given.next()?.parse().ok()?),
            option if option.starts_with("--") => return None,
            _ if name.is_some() => return None,
            _ => name = Some(argument),
        }
    }
    Some((name, timeout))
}

fn main() -> ExitCode {
    let Some((name, timeout)) = arguments() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let (tell, told) = channel();
    // A thread of its own: a host that does not answer blocks it.
    thread::spawn(move || {
        let _ = tell.send(ask_until_committed(name.as_deref()));
    });
    let why = match told.recv_timeout(timeout) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(why)) => why,
        Err(RecvTimeoutError::Timeout) => format!("not committed within {} s", timeout.as_secs()),
        Err(RecvTimeoutError::Disconnected) => "failed".into(),
    };
    eprintln!("understudy-checkpoint: {why}");
    ExitCode::FAILURE
}
