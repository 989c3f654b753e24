//! All streams of a guest: who is connected, who asks to be, and what the guest is to be told.
//!
//! ```text
//! host's process --connect PATH, "CONNECT PORT\n"--> Handshake --request--> Connection --"OK HOSTPORT\n"--> process
//! guest --request to port P--> connect PATH_P --response--> Connection
//! ```
//!
//! Bounds: [`MAX_CONNECTIONS`], each with [`ROOM_BYTES`](super::connection::ROOM_BYTES); [`MAX_HANDSHAKES`], of which
//! the oldest gives way; [`MAX_RESETS`] that the guest has not taken yet, beyond which it is told of none.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Over};
use super::packet::{HOST_CID, Header, Op, STREAM};
use crate::socket::Socket;

/// The most streams of a guest.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// The most processes of the host that have connected and not said to which port.
pub(super) const MAX_HANDSHAKES: usize = 64;
/// The most resets that wait for the guest to take them.
pub(super) const MAX_RESETS: usize = 256;
/// `CONNECT 4294967295`, with a carriage return some clients send.
const MAX_LINE_BYTES: usize = 20;
/// Processes that are let in before others have a turn.
const MAX_ACCEPTS: usize = 16;
/// Ports of the host's ends of what it opens, as Firecracker has them.
const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// Host's port, guest's port.
pub(super) type Ports = (u32, u32);

/// A process that has not said to which port.
#[derive(Debug)]
struct Handshake {
    stream: Arc<UnixStream>,
    line: Vec<u8>,
}

/// The guest is told that a stream is not there.
#[derive(Debug, Clone, Copy)]
struct Reset {
    /// Whom the guest spoke to.
    cid: u64,
    ports: Ports,
}

#[derive(Debug)]
pub(super) struct Mux {
    pub(super) guest_cid: u64,
    socket: Arc<Socket>,
    connections: BTreeMap<Ports, Connection>,
    by_id: HashMap<u64, Ports>,
    handshakes: BTreeMap<u64, Handshake>,
    resets: VecDeque<Reset>,
    next_id: u64,
    next_port: u32,
}

impl Mux {
    /// The first id of anything that is waited for.
    pub(super) const FIRST_ID: u64 = 16;

    pub(super) fn new(guest_cid: u64, socket: Arc<Socket>) -> Self {
        Self {
            guest_cid,
            socket,
            connections: BTreeMap::new(),
            by_id: HashMap::new(),
            handshakes: BTreeMap::new(),
            resets: VecDeque::new(),
            next_id: Self::FIRST_ID,
            next_port: HOST_PORTS.start,
        }
    }

    /// Nothing is connected any more.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.by_id.clear();
        self.handshakes.clear();
        self.resets.clear();
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn by_id(&mut self, id: u64) -> Option<(Ports, &mut Connection)> {
        let ports = *self.by_id.get(&id)?;
        Some((ports, self.connections.get_mut(&ports)?))
    }

    fn insert(&mut self, ports: Ports, connection: Connection) {
        self.by_id.insert(connection.id, ports);
        self.connections.insert(ports, connection);
    }

    fn reset(&mut self, cid: u64, ports: Ports) {
        // A guest that takes none of them has no use for more.
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(Reset { cid, ports });
        }
    }

    /// A connection is over.
    pub(super) fn end(&mut self, ports: Ports, over: Over) {
        if let Some(connection) = self.connections.remove(&ports) {
            self.by_id.remove(&connection.id);
            if over.tell_guest {
                self.reset(HOST_CID, ports);
            }
        }
    }

    /// A packet of the guest; `whole` when its data is all there is of it.
    pub(super) fn packet(&mut self, header: &Header, data: &[u8], whole: bool) {
        let ports = (header.dst_port, header.src_port);
        let ours = header.dst_cid == HOST_CID && header.src_cid == self.guest_cid;
        let fine = ours && whole && header.kind == STREAM;
        match self.connections.get_mut(&ports) {
            Some(connection) if fine => {
                if let Err(over) = connection.packet(header, data, ports.0) {
                    self.end(ports, over);
                }
            }
            Some(_) if ours => self.end(ports, Over { tell_guest: true }),
            None if fine && header.op == Some(Op::Request) => match self.connect(ports.0) {
                Ok(stream) => {
                    let id = self.id();
                    self.insert(ports, Connection::new(id, Arc::new(stream), Some(header)));
                }
                Err(error) => {
                    tracing::debug!(port = ports.0, %error, "the guest connects to nobody");
                    self.reset(HOST_CID, ports);
                }
            },
            // What says that there is nothing is not answered that there is nothing.
            Some(_) | None if header.op == Some(Op::Reset) => {}
            Some(_) | None => self.reset(header.dst_cid, ports),
        }
    }

    /// The process that listens for the guest on a port.
    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err(io::Error::other("it has as many connections as it may have"));
        }
        let mut path = self.socket.path().as_os_str().to_owned();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Refused at once, also by a process that has a full queue: nobody waits here.
        rustix::net::connect(&socket, &SocketAddrUnix::new(PathBuf::from(path))?)?;
        Ok(socket.into())
    }

    /// Lets processes of the host in.
    pub(super) fn accept(&mut self) {
        for _ in 0..MAX_ACCEPTS {
            let stream = match self.socket.listener().accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        tracing::debug!(%error, "accept a connection to the guest");
                    }
                    return;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.handshakes.len() >= MAX_HANDSHAKES {
                self.handshakes.pop_first();
            }
            let id = self.id();
            let handshake = Handshake {
                stream: Arc::new(stream),
                line: Vec::new(),
            };
            self.handshakes.insert(id, handshake);
        }
    }

    /// A process may have said to which port. False when there is no such process.
    pub(super) fn handshake(&mut self, id: u64) -> bool {
        let Some(handshake) = self.handshakes.get_mut(&id) else {
            return false;
        };
        loop {
            // A byte at a time: what follows the line is the guest's.
            let mut byte = [0];
            match (&*handshake.stream).read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break,
                Ok(1) if handshake.line.len() < MAX_LINE_BYTES => handshake.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    self.handshakes.remove(&id);
                    return true;
                }
            }
        }
        let Some(handshake) = self.handshakes.remove(&id) else {
            return true;
        };
        let port = std::str::from_utf8(&handshake.line)
            .ok()
            .and_then(|line| line.trim_end_matches('\r').strip_prefix("CONNECT "))
            .and_then(|port| port.parse::<u32>().ok());
        if let (Some(guest_port), true) = (port, self.connections.len() < MAX_CONNECTIONS) {
            let ports = (self.free_port(guest_port), guest_port);
            self.insert(ports, Connection::new(id, handshake.stream, None));
        }
        true
    }

    /// A host's port for a new connection to a port of the guest: there are far more than connections.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port + 1 < HOST_PORTS.end {
                port + 1
            } else {
                HOST_PORTS.start
            };
            if !self.connections.contains_key(&(port, guest_port)) {
                return port;
            }
        }
    }

    /// Whether the guest has to be told something.
    pub(super) fn owes(&self) -> bool {
        !self.resets.is_empty()
            || self
                .connections
                .values()
                .any(|connection| connection.owed != Default::default())
    }

    /// What the guest is told next, that is not data.
    pub(super) fn next_control(&mut self) -> Option<Header> {
        if let Some(Reset { cid, ports }) = self.resets.pop_front() {
            return Some(Header {
                src_cid: cid,
                ..self.header(ports, Op::Reset, (0, 0))
            });
        }
        let owing = |(_, connection): &(&Ports, &mut Connection)| connection.owed != Default::default();
        let (ports, connection) = self.connections.iter_mut().find(owing)?;
        let (op, flags) = connection.next_owed()?;
        let (ports, credit) = (*ports, connection.say_credit());
        Some(Header {
            flags,
            ..self.header(ports, op, credit)
        })
    }

    /// The header of data of a connection.
    pub(super) fn data_header(&mut self, ports: Ports, bytes: usize) -> Option<Header> {
        let credit = self.connections.get_mut(&ports)?.say_credit();
        Some(Header {
            // A packet is far shorter than 4 GiB.
            len: bytes as u32,
            ..self.header(ports, Op::Data, credit)
        })
    }

    fn header(&self, (host_port, guest_port): Ports, op: Op, (buf_alloc, fwd_cnt): (u32, u32)) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            len: 0,
            kind: STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// What is waited for: id, file, events. Processes are not read when the guest has no buffers.
    pub(super) fn interests(
        &self,
        buffers: bool,
    ) -> impl Iterator<Item = (u64, Arc<dyn AsRawFd + Send + Sync>, EventSet)> {
        let asking = self.handshakes.iter().map(|(&id, handshake)| {
            let stream: Arc<dyn AsRawFd + Send + Sync> = handshake.stream.clone();
            (id, stream, EventSet::IN)
        });
        let connected = self.connections.values().filter_map(move |connection| {
            let mut events = EventSet::empty();
            if buffers && connection.reads() {
                events |= EventSet::IN;
            }
            if connection.writes() {
                events |= EventSet::OUT;
            }
            let stream: Arc<dyn AsRawFd + Send + Sync> = connection.stream.clone();
            (!events.is_empty()).then_some((connection.id, stream, events))
        });
        asking.chain(connected)
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize, usize) {
        (
            self.connections.len(),
            self.resets.len(),
            self.connections.values().map(Connection::held).max().unwrap_or(0),
        )
    }
}

/// Whether the process at the other end is gone altogether, and has not only ended its direction.
pub(super) fn gone(stream: &UnixStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::empty())];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}
