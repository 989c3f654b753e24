//! A TCP stream both ways with content that is checked, its other end, and ping.
//!
//! Each side sends the words mix64(1), mix64(2) .. and expects the same of the other: one that is lost, doubled or
//! damaged is seen at once.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

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
