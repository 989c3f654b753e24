//! A TCP stream both ways with content that is checked, its other end, ping, and the peer's clock beside ours.
//!
//! Each side sends the words mix64(1), mix64(2) .. and expects the same of the other: one that is lost, doubled or
//! damaged is seen at once.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::content::mix64;
use crate::work::{Keys, Worker, bad};

/// Words sent at once, and how often: 100 KiB a second, so that a slow machine has time for the rest.
const WORDS: u64 = 512;
const PAUSE: Duration = Duration::from_millis(40);
/// How often a connection is tried, a second apart.
const TRIES: u32 = 60;

pub fn tcp(keys: &Keys) {
    let worker = Worker::begin("tcp", &["received", "sent"]);
    let address = keys.peer.clone().unwrap_or_default();
    for _ in 1..TRIES {
        if let Ok(stream) = TcpStream::connect(&address) {
            return both_ways(stream, &worker, false);
        }
        thread::sleep(Duration::from_secs(1));
    }
    worker.bad(format_args!("nobody listens at {address}"));
}

/// On the host: serves every connection, each with totals of its own.
pub fn peer(keys: &Keys) {
    let address = keys.listen.clone().unwrap_or_else(|| "0.0.0.0:7500".into());
    let listener = match TcpListener::bind(&address) {
        Ok(listener) => listener,
        Err(error) => return bad("peer", format_args!("cannot listen at {address}: {error}")),
    };
    match UdpSocket::bind(&address) {
        Ok(socket) => drop(thread::spawn(move || tell_the_time(&socket))),
        Err(error) => bad("peer", format_args!("cannot answer at {address}: {error}")),
    }
    thread::spawn(move || {
        for (number, stream) in (1..).zip(listener.incoming().flatten()) {
            let worker = Worker::begin(format!("peer-{number}"), &["received", "sent"]);
            thread::spawn(move || both_ways(stream, &worker, true));
        }
    });
}

/// `may_end`: whether the other side may close the stream, as a guest does in the end.
fn both_ways(mut stream: TcpStream, worker: &Arc<Worker>, may_end: bool) {
    let lost = move |worker: &Worker, error: std::io::Error| {
        let closed = matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe);
        if may_end && closed {
            worker.end();
        } else {
            worker.bad(format_args!("the stream broke: {error}"));
        }
    };
    match stream.try_clone() {
        Ok(mut out) => {
            let worker = Arc::clone(worker);
            thread::spawn(move || {
                for chunk in 0.. {
                    let words = (chunk * WORDS + 1..).take(WORDS as usize);
                    let bytes: Vec<u8> = words.flat_map(|word| mix64(word).to_le_bytes()).collect();
                    if let Err(error) = out.write_all(&bytes) {
                        return lost(&worker, error);
                    }
                    worker.add(1, WORDS);
                    thread::sleep(PAUSE);
                }
            });
        }
        Err(error) => return lost(worker, error),
    }
    for next in 1_u64.. {
        let mut word = [0; 8];
        if let Err(error) = stream.read_exact(&mut word) {
            return lost(worker, error);
        }
        if u64::from_le_bytes(word) != mix64(next) {
            // What follows would all be wrong too.
            return worker.bad(format_args!("word {next} of the stream is wrong"));
        }
        worker.add(0, 1);
    }
}

/// Lost answers are counted, not findings: a network may lose. No answer at all is seen by the watch.
pub fn ping(keys: &Keys) {
    let worker = Worker::begin("ping", &["answers", "newest"]);
    let address = keys.ping.clone().unwrap_or_default();
    let child = Command::new("ping")
        .arg(&address)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return worker.bad(format_args!("cannot start ping: {error}")),
    };
    let mut newest = 0;
    let lines = child.stdout.take().map(|out| BufReader::new(out).lines());
    for line in lines.into_iter().flatten().map_while(Result::ok) {
        let word = line
            .split_whitespace()
            .find_map(|word| word.split_once("seq=")?.1.parse().ok());
        if let Some(number @ 0_u64..) = word {
            if number < newest {
                worker.bad(format_args!("answer {number} after {newest}"));
            }
            newest = number;
            worker.add(0, 1);
            worker.set(1, newest);
        }
    }
    worker.bad(format_args!("ping ended"));
}

/// How often the peer is asked for its time, how long for an answer, and how many answers are judged together.
const ASK: Duration = Duration::from_millis(100);
const ANSWER: Duration = Duration::from_secs(1);
const TOGETHER: usize = 20;

/// Microseconds since 1970.
fn wall_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_micros() as i64
}

/// On the host: answers each number with it and the time.
fn tell_the_time(socket: &UdpSocket) {
    let mut question = [0; 8];
    loop {
        let Ok((8, from)) = socket.recv_from(&mut question) else {
            continue;
        };
        let answer = [question, wall_us().to_le_bytes()].concat();
        // One that is lost is asked for again.
        let _ = socket.send_to(&answer, from);
    }
}

/// One answer: how far the peer's clock is ahead, and how long the answer took, in microseconds. The answer was made at some
/// moment in that time, so half of it is how wrong the first can be.
#[derive(Clone, Copy)]
struct Sample {
    ahead: i64,
    took: i64,
}

/// Our clock must stay where it was beside the peer's: the first answers say where that is.
pub fn time(keys: &Keys) {
    let worker = Worker::begin("time", &["answers", "off_us", "took_us", "most_us"]);
    let address = keys.time.clone().unwrap_or_default();
    if let Err(error) = compare(keys, &address, &worker) {
        worker.bad(format_args!("ask {address}: {error}"));
    }
}

fn compare(keys: &Keys, address: &str, worker: &Worker) -> std::io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(ANSWER))?;
    let (mut first, mut samples, mut last) = (None, Vec::new(), Instant::now());
    for number in 0_u64.. {
        thread::sleep(ASK);
        let asked = wall_us();
        // A network that is not there yet, or no more.
        if socket.send_to(&number.to_le_bytes(), address).is_err() {
            continue;
        }
        let mut answer = [0; 16];
        let peer = loop {
            match socket.recv(&mut answer) {
                Ok(16) if answer[..8] == number.to_le_bytes() => {
                    let mut time = [0; 8];
                    time.copy_from_slice(&answer[8..]);
                    break Some(i64::from_le_bytes(time));
                }
                // Of an earlier question.
                Ok(_) => {}
                Err(_) => break None,
            }
        };
        let now = Instant::now();
        if now < last {
            worker.bad(format_args!("monotonic time went back by {:?}", last - now));
        }
        last = now;
        let Some(peer) = peer else { continue };
        let took = wall_us() - asked;
        worker.add(0, 1);
        // The clock was set between the two.
        if took < 0 {
            continue;
        }
        samples.push(Sample {
            ahead: peer - asked - took / 2,
            took,
        });
        if samples.len() < TOGETHER {
            continue;
        }
        let Some(best) = samples.drain(..).min_by_key(|sample| sample.took) else {
            continue;
        };
        let first = *first.get_or_insert(best);
        let off = (best.ahead - first.ahead).unsigned_abs();
        worker.set(1, off);
        worker.set(2, best.took.unsigned_abs());
        worker.most(3, off);
        let doubt = (best.took + first.took).unsigned_abs() / 2;
        if off > keys.time_ms * 1000 + doubt {
            worker.bad(format_args!("the wall clock is off by {off} us, of which at most {doubt} are the network's"));
        }
    }
    Ok(())
}
