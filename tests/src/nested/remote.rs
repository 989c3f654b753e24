//! `on-host N COMMAND..`: runs a command on another emulated host, from one of them.
//!
//! Each host serves it on a network of its own, 10.78.0.N port 7400, so that a test may cut the other network,
//! 10.77.0.N, without losing its hands. One TCP connection a command:
//!
//! ```text
//! frame      kind (1 byte), length (32 bits, big-endian), data
//! to it      1 request (JSON), then 2 standard input, 3 its end
//! from it    4 standard output, 5 standard error, 6 alive (every second), 7 exit code (32 bits), 8 cannot start
//! ```
//!
//! A command whose caller is gone is killed. As with ssh, a command that leaves a program in the background with its
//! output open ends when that does: redirect the output.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

const PORT: u16 = 7400;
const MAX_FRAME_BYTES: usize = 1 << 20;
const ALIVE_EVERY: Duration = Duration::from_secs(1);
const CONNECT: Duration = Duration::from_secs(20);
/// Without a frame for so long, the other host is taken for dead.
const DEAD_AFTER: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

const REQUEST: u8 = 1;
const INPUT: u8 = 2;
const INPUT_END: u8 = 3;
const OUTPUT: u8 = 4;
const ERRORS: u8 = 5;
const ALIVE: u8 = 6;
const EXIT: u8 = 7;
const CANNOT: u8 = 8;

#[derive(Serialize, Deserialize)]
enum Request {
    /// Run a program in a folder.
    Run { words: Vec<String>, folder: PathBuf },
    /// Stop dead, as if the power had failed: nothing is written, nobody is told.
    Crash,
}

/// Written to by several threads, a whole frame at a time.
type Shared = Arc<Mutex<TcpStream>>;

/// Serves commands at `address` until the host ends.
///
/// # Errors
/// When it cannot listen there.
pub fn serve(address: &str) -> Result<()> {
    let listener =
        TcpListener::bind((address, PORT)).with_context(|| format!("listen on {address}:{PORT}"))?;
    for stream in listener.incoming() {
        let stream = stream.context("accept a connection")?;
        thread::spawn(move || {
            if let Err(error) = answer(stream) {
                eprintln!("on-host: {error:#}");
            }
        });
    }
    Ok(())
}

/// Runs `words` on host `host`; its exit code.
///
/// # Errors
/// When the host does not answer, or not any more, or cannot start it.
pub fn run_on(host: u8, words: &[String]) -> Result<u8> {
    let folder = std::env::current_dir().context("find the current folder")?;
    let words = words.to_vec();
    call(host, &Request::Run { words, folder })
}

/// Stops host `host` as if its power had failed.
///
/// # Errors
/// When it does not answer.
pub fn crash(host: u8) -> Result<()> {
    let code = call(host, &Request::Crash)?;
    if code == 0 {
        Ok(())
    } else {
        bail!("host {host} cannot crash")
    }
}

fn call(host: u8, request: &Request) -> Result<u8> {
    let address = format!("10.78.0.{host}:{PORT}");
    let mut stream = TcpStream::connect_timeout(&address.parse()?, CONNECT)
        .with_context(|| format!("connect to host {host} at {address}"))?;
    stream.set_read_timeout(Some(DEAD_AFTER))?;
    send(&mut stream, REQUEST, &serde_json::to_vec(request)?)?;
    let mut input = stream.try_clone()?;
    // It may wait for input for ever: it ends with this process.
    thread::spawn(move || {
        let mut buffer = [0; 16 << 10];
        let mut stdin = io::stdin().lock();
        while let Ok(count) = stdin.read(&mut buffer) {
            let kind = if count == 0 { INPUT_END } else { INPUT };
            if send(&mut input, kind, &buffer[..count]).is_err() || count == 0 {
                return;
            }
        }
    });
    loop {
        let (kind, data) = receive(&mut stream).with_context(|| format!("hear from host {host}"))?;
        match kind {
            OUTPUT => put(io::stdout(), &data),
            ERRORS => put(io::stderr(), &data),
            ALIVE => {}
            EXIT => match data[..] {
                [code] => return Ok(code),
                _ => bail!("host {host} sent an exit code of {} bytes", data.len()),
            },
            CANNOT => bail!("host {host}: {}", String::from_utf8_lossy(&data)),
            other => bail!("host {host} sent a frame of kind {other}"),
        }
    }
}

fn put(mut to: impl Write, data: &[u8]) {
    // Nobody reads any more: the command's status still counts.
    let _ = to.write_all(data).and_then(|()| to.flush());
}

fn answer(mut stream: TcpStream) -> Result<()> {
    let (kind, data) = receive(&mut stream).context("read the request")?;
    if kind != REQUEST {
        bail!("a frame of kind {kind} instead of a request");
    }
    let (words, folder) = match serde_json::from_slice(&data).context("understand the request")? {
        Request::Run { words, folder } => (words, folder),
        Request::Crash => {
            send(&mut stream, EXIT, &[0])?;
            // It must be out before the power is.
            stream.shutdown(Shutdown::Write)?;
            let _ = stream.read(&mut [0]);
            std::fs::write("/proc/sysrq-trigger", "o").context("switch the power off")?;
            return Ok(());
        }
    };
    let out = Arc::new(Mutex::new(stream.try_clone()?));
    match start(&words, &folder) {
        Ok(child) => attend(child, stream, &out),
        Err(error) => send_shared(&out, CANNOT, format!("{error:#}").as_bytes()),
    }
}

fn start(words: &[String], folder: &PathBuf) -> Result<Child> {
    let (program, arguments) = words.split_first().context("no command")?;
    std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))
}

/// Sees a command through, and kills it when its caller is gone.
fn attend(mut child: Child, mut stream: TcpStream, out: &Shared) -> Result<()> {
    let mut stdin = child.stdin.take();
    let pumps = [
        child.stdout.take().map(|from| pump(from, OUTPUT, out)),
        child.stderr.take().map(|from| pump(from, ERRORS, out)),
    ];
    let gone = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let caller = Arc::clone(&gone);
    thread::spawn(move || {
        while let Ok((kind, data)) = receive(&mut stream) {
            match (kind, &mut stdin) {
                // A command that does not read its input is not told of it.
                (INPUT, Some(to)) => drop(to.write_all(&data)),
                (INPUT_END, _) => stdin = None,
                _ => {}
            }
        }
        caller.store(true, std::sync::atomic::Ordering::Release);
    });
    let mut quiet = Duration::ZERO;
    let status = loop {
        if let Some(status) = child.try_wait().context("wait for the command")? {
            break status;
        }
        if gone.load(std::sync::atomic::Ordering::Acquire) {
            child.kill().context("kill a command whose caller is gone")?;
        }
        thread::sleep(POLL);
        quiet += POLL;
        if quiet >= ALIVE_EVERY {
            quiet = Duration::ZERO;
            // A caller that is gone is noticed by the reader.
            let _ = send_shared(out, ALIVE, &[]);
        }
    };
    for pump in pumps.into_iter().flatten() {
        // It does not panic.
        let _ = pump.join();
    }
    // As a shell says it: 128 and the signal's number.
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    send_shared(out, EXIT, &[u8::try_from(code).unwrap_or(u8::MAX)])?;
    // The reader's thread would keep the connection open until the caller closes it; it does now.
    Ok(())
}

fn pump(mut from: impl Read + Send + 'static, kind: u8, out: &Shared) -> thread::JoinHandle<()> {
    let out = Arc::clone(out);
    thread::spawn(move || {
        let mut buffer = [0; 16 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if send_shared(&out, kind, &buffer[..count]).is_err() {
                return;
            }
        }
    })
}

fn send_shared(stream: &Shared, kind: u8, data: &[u8]) -> Result<()> {
    let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(send(&mut *stream, kind, data)?)
}

fn send(stream: &mut impl Write, kind: u8, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    let mut frame = vec![kind];
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(data);
    stream.write_all(&frame)
}

fn receive(stream: &mut impl Read) -> Result<(u8, Vec<u8>)> {
    let mut header = [0; 5];
    stream.read_exact(&mut header)?;
    let [kind, length @ ..] = header;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_FRAME_BYTES {
        bail!("a frame of {length} bytes, {MAX_FRAME_BYTES} at most are allowed");
    }
    let mut data = vec![0; length];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}
