//! The stream sockets seen by their driver and by processes of the host.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::connection::ROOM_BYTES;
use super::mux::{MAX_CONNECTIONS, MAX_HANDSHAKES, MAX_RESETS};
use super::packet::{NO_RECEIVE, NO_SEND, Op, STREAM};
use super::*;
use crate::devices::virtio::Transport;
use crate::devices::virtio::testing::{Driver, SIZE};

const CID: u32 = 52;
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a buffer for packets to the guest, as Linux's driver gives them.
const BUFFER: u32 = 4096;

struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("vsock")
    }

    fn device(&self, leash: &Leash) -> Box<Vsock> {
        let socket = Arc::new(Socket::bind(&self.path()).unwrap());
        Box::new(Vsock::new(CID, socket, leash.clone()))
    }

    fn mux(&self) -> Mux {
        Mux::new(CID.into(), Arc::new(Socket::bind(&self.path()).unwrap()))
    }

    /// A process that asks for a port of the guest.
    fn connect(&self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream
    }

    /// A process that waits for the guest on a port.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.0.path().join(format!("vsock_{port}"))).unwrap()
    }
}

fn accept(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn packet(op: Op, (host_port, guest_port): Ports) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len: 0,
        kind: STREAM,
        op: Some(op),
        flags: 0,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
    }
}

struct Guest {
    driver: Driver,
    rooms: VecDeque<u64>,
}

impl Guest {
    fn new(device: Box<Vsock>) -> Self {
        let driver = Driver::new(device, 0);
        let mut guest = Self {
            driver,
            rooms: VecDeque::new(),
        };
        (0..SIZE / 4).for_each(|_| guest.supply());
        guest
    }

    fn supply(&mut self) {
        let room = self.driver.buffer(&[0xee; BUFFER as usize]);
        self.driver.put(RECEIVE, &[(room, BUFFER, 2)]);
        self.driver.kick(RECEIVE);
        self.rooms.push_back(room);
    }

    /// The next packet to the guest.
    fn next(&mut self) -> (Header, Vec<u8>) {
        let (_, bytes) = self.driver.wait(RECEIVE);
        let room = self.rooms.pop_front().unwrap();
        let mut packet = vec![0; bytes as usize];
        self.driver
            .memory()
            .read_slice(&mut packet, GuestAddress(room))
            .unwrap();
        self.supply();
        let data = packet.split_off(HEADER_BYTES);
        let header = Header::parse(&packet.try_into().unwrap());
        assert_eq!(header.len as usize, data.len());
        assert_eq!(header.dst_cid, u64::from(CID));
        (header, data)
    }

    fn expect(&mut self, op: Op, ports: Ports) -> Header {
        let (header, _) = self.next();
        assert_eq!(
            (header.op, header.src_port, header.dst_port),
            (Some(op), ports.0, ports.1)
        );
        header
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..header
        };
        let mut bytes = header.bytes().to_vec();
        bytes.extend(data);
        let at = self.driver.buffer(&bytes);
        self.driver.put(TRANSMIT, &[(at, bytes.len() as u32, 0)]);
        self.driver.kick(TRANSMIT);
        self.driver.wait(TRANSMIT);
    }

    /// A connection that a process has opened to port 80.
    fn opened(&mut self, host: &Host) -> (UnixStream, Ports) {
        let mut stream = host.connect("CONNECT 80\n");
        let (asked, _) = self.next();
        assert_eq!((asked.op, asked.dst_port), (Some(Op::Request), 80));
        let ports = (asked.src_port, 80);
        self.send(packet(Op::Response, ports), &[]);
        let mut line = format!("OK {}\n", ports.0).into_bytes();
        let expected = line.clone();
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line, expected);
        (stream, ports)
    }
}

#[test]
fn a_process_opens_a_stream_and_either_side_ends_it() {
    let host = Host::new();
    let mut guest = Guest::new(host.device(&Leash::default()));
    assert_eq!(guest.driver.get(0x100), CID);
    let (mut stream, ports) = guest.opened(&host);
    // Longer than a buffer: it comes in pieces, in order.
    let sent: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
    stream.write_all(&sent).unwrap();
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let (header, data) = guest.next();
        assert_eq!(header.op, Some(Op::Data));
        got.extend(data);
    }
    assert_eq!(got, sent);
    guest.send(packet(Op::Data, ports), b"hello");
    let mut word = [0; 5];
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"hello");
    // The process ends its direction only: the other goes on.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Shutdown, ports).flags, NO_SEND);
    guest.send(packet(Op::Data, ports), b"still");
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"still");
    guest.send(
        Header {
            flags: NO_SEND | NO_RECEIVE,
            ..packet(Op::Shutdown, ports)
        },
        &[],
    );
    guest.expect(Op::Reset, ports);
    assert_eq!(stream.read(&mut word).unwrap(), 0);

    // A process that goes away altogether.
    let (stream, ports) = guest.opened(&host);
    drop(stream);
    assert_eq!(guest.expect(Op::Shutdown, ports).flags, NO_SEND | NO_RECEIVE);
    guest.send(packet(Op::Reset, ports), &[]);
    // What was said at once with the line is the guest's.
    let mut stream = host.connect("CONNECT 81\nearly");
    let (asked, _) = guest.next();
    let ports = (asked.src_port, 81);
    guest.send(packet(Op::Response, ports), &[]);
    let (header, data) = guest.next();
    assert_eq!(
        (header.op, data.as_slice()),
        (Some(Op::Data), b"early".as_slice())
    );
    // One that the guest does not want is closed without a word.
    guest.send(packet(Op::Reset, ports), &[]);
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    assert!(said.starts_with(b"OK "));
    let mut refused = host.connect("CONNECT 82\n");
    let (asked, _) = guest.next();
    guest.send(packet(Op::Reset, (asked.src_port, 82)), &[]);
    assert_eq!(refused.read(&mut word).unwrap(), 0);
    for line in [
        "CONNECT\n",
        "CONNECT -1\n",
        "HELLO 80\n",
        "CONNECT 800000000000000000000000",
    ] {
        let mut wrong = host.connect(line);
        // Closed; a reset where it had said more than was read.
        let end = wrong.read(&mut word).map_err(|e| e.kind());
        assert!(
            matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)),
            "{line}: {end:?}"
        );
    }
}

#[test]
fn the_guest_opens_a_stream_to_who_listens_and_to_nobody_else() {
    let host = Host::new();
    let mut guest = Guest::new(host.device(&Leash::default()));
    guest.send(packet(Op::Request, (7, 1024)), &[]);
    guest.expect(Op::Reset, (7, 1024));
    let listener = host.listen(7);
    guest.send(packet(Op::Request, (7, 1024)), &[]);
    let response = guest.expect(Op::Response, (7, 1024));
    assert_eq!(response.buf_alloc, ROOM_BYTES);
    let mut stream = accept(&listener);
    guest.send(packet(Op::Data, (7, 1024)), b"a line\n");
    let mut line = [0; 7];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"a line\n");
    stream.write_all(b"an answer").unwrap();
    assert_eq!(guest.next().1, b"an answer");
    // Asked for its room it is told.
    guest.send(packet(Op::CreditRequest, (7, 1024)), &[]);
    assert_eq!(guest.expect(Op::CreditUpdate, (7, 1024)).fwd_cnt, 7);
}

#[test]
fn neither_side_gets_more_than_it_has_room_for() {
    let host = Host::new();
    let mut guest = Guest::new(host.device(&Leash::default()));
    let listener = host.listen(7);
    // Room for 10 bytes, then for 5 more.
    let small = |op, fwd_cnt| Header {
        buf_alloc: 10,
        fwd_cnt,
        ..packet(op, (7, 9))
    };
    guest.send(small(Op::Request, 0), &[]);
    guest.expect(Op::Response, (7, 9));
    let mut stream = accept(&listener);
    stream.write_all(b"0123456789abcdefghij").unwrap();
    assert_eq!(guest.next().1, b"0123456789");
    guest.send(small(Op::CreditUpdate, 5), &[]);
    assert_eq!(guest.next().1, b"abcde");
    guest.send(small(Op::CreditUpdate, 15), &[]);
    assert_eq!(guest.next().1, b"fghij");
    // The other way: the process does not read. What its socket takes is acknowledged, and then it is enough.
    let large = |op| packet(op, (7, 9));
    let mut sent = 0u32;
    let mut taken = 0u32;
    while sent.wrapping_sub(taken) < ROOM_BYTES {
        guest.send(large(Op::Data), &[5; 4096]);
        sent += 4096;
        while guest.driver.used(RECEIVE) > 0 {
            taken = guest.expect(Op::CreditUpdate, (7, 9)).fwd_cnt;
        }
    }
    guest.send(large(Op::CreditRequest), &[]);
    taken = guest.expect(Op::CreditUpdate, (7, 9)).fwd_cnt;
    assert!(sent - taken <= ROOM_BYTES, "{sent} {taken}");
    // As soon as the process reads there is room, and the guest hears of it.
    let mut read = vec![0; sent as usize];
    stream.read_exact(&mut read).unwrap();
    while taken < sent - ROOM_BYTES / 2 {
        taken = guest.expect(Op::CreditUpdate, (7, 9)).fwd_cnt;
    }
    // A guest that sends without room is cut off.
    loop {
        guest.send(large(Op::Data), &[6; 16 << 10]);
        if guest.driver.used(RECEIVE) > 0 {
            let (header, _) = guest.next();
            if header.op == Some(Op::Reset) {
                break;
            }
        }
    }
    let end = stream.read_to_end(&mut Vec::new());
    assert!(end.is_ok(), "{end:?}");
}

#[test]
fn a_restored_guest_loses_its_streams_knows_it_and_goes_on() {
    let host = Host::new();
    let mut guest = Guest::new(host.device(&Leash::default()));
    let (mut stream, ports) = guest.opened(&host);
    let event = guest.driver.buffer(&[0xee; 4]);
    guest.driver.put(EVENT, &[(event, 4, 2)]);
    guest.driver.kick(EVENT);
    guest.driver.device.pause().unwrap();
    let state = guest.driver.device.state();
    assert_eq!(state.device, DeviceState::Vsock(VsockState { guest_cid: CID }));
    let other = Host::new();
    let Guest { driver, rooms } = guest;
    let driver =
        driver.moved_to(|ram| Transport::from_state(other.device(&Leash::default()), &state, ram).unwrap());
    // With the old device the streams went, and its socket.
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!(!host.path().exists());
    let mut guest = Guest { driver, rooms };
    assert_eq!(guest.driver.used(EVENT), 0);
    guest.driver.device.unpause();
    assert_eq!(guest.driver.wait(EVENT).1, 4);
    let told: u32 = guest.driver.memory().read_obj(GuestAddress(event)).unwrap();
    assert_eq!(told, 0, "the transport was reset");
    // What it still sends on them is answered so.
    guest.send(packet(Op::Data, ports), b"lost");
    guest.expect(Op::Reset, ports);
    guest.opened(&other);
}

#[test]
fn a_guest_without_a_lease_is_not_heard_and_loses_nothing() {
    let host = Host::new();
    let leash = Leash::default();
    let mut guest = Guest::new(host.device(&leash));
    let (mut stream, ports) = guest.opened(&host);
    leash.hold();
    let bytes = [&packet(Op::Data, ports).bytes()[..], b"held"].concat();
    let mut bytes = bytes;
    bytes[24] = 4;
    let at = guest.driver.buffer(&bytes);
    guest.driver.put(TRANSMIT, &[(at, bytes.len() as u32, 0)]);
    guest.driver.kick(TRANSMIT);
    // In the other direction all goes on, and shows that the device has looked at what there is.
    for _ in 0..3 {
        stream.write_all(b"in").unwrap();
        assert_eq!(guest.next().1, b"in");
    }
    stream.set_nonblocking(true).unwrap();
    let mut got = [0; 4];
    assert_eq!(stream.read(&mut got).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(guest.driver.used(TRANSMIT), 0);
    stream.set_nonblocking(false).unwrap();
    leash.free();
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"held");
}

#[test]
fn what_a_guest_or_processes_open_is_bounded() {
    let host = Host::new();
    let mut mux = host.mux();
    let listener = host.listen(7);
    let mut streams = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        mux.packet(&packet(Op::Request, (7, port)), &[], true);
        streams.push(accept(&listener));
        assert_eq!(mux.next_control().unwrap().op, Some(Op::Response));
    }
    mux.packet(&packet(Op::Request, (7, 10_000)), &[], true);
    assert_eq!(mux.next_control().unwrap().op, Some(Op::Reset));
    // A process that says nothing gives way to the next.
    let mut waiting: Vec<_> = (0..=MAX_HANDSHAKES)
        .map(|_| {
            let stream = host.connect("");
            mux.accept();
            stream
        })
        .collect();
    assert_eq!(waiting[0].read(&mut [0; 1]).unwrap(), 0);
    waiting[1].set_nonblocking(true).unwrap();
    assert!(waiting[1].read(&mut [0; 1]).is_err(), "still there");
    // Every answer is owed once, and those nobody takes are not kept without end.
    for port in 0..2 * MAX_RESETS as u32 {
        mux.packet(&packet(Op::Data, (9, port)), b"x", true);
    }
    assert_eq!(mux.counts(), (MAX_CONNECTIONS, MAX_RESETS, 0));
    let told = std::iter::from_fn(|| mux.next_control()).count();
    assert_eq!(told, MAX_RESETS);
}

fn any_header() -> impl Strategy<Value = Header> {
    let port = || prop_oneof![Just(7u32), 1000u32..1003, any::<u32>()];
    let op = prop_oneof![
        Just(Some(Op::Request)),
        Just(Some(Op::Response)),
        Just(Some(Op::Reset)),
        Just(Some(Op::Shutdown)),
        Just(Some(Op::Data)),
        Just(Some(Op::CreditUpdate)),
        Just(Some(Op::CreditRequest)),
        Just(None)
    ];
    let cid = |usual: u64| prop_oneof![9 => Just(usual), 1 => any::<u64>()];
    let kind = prop_oneof![9 => Just(STREAM), 1 => any::<u16>()];
    let number = || prop_oneof![0u32..4, any::<u32>()];
    (
        cid(CID.into()),
        cid(HOST_CID),
        port(),
        port(),
        kind,
        op,
        number(),
        (number(), number()),
    )
        .prop_map(
            |(src_cid, dst_cid, src_port, dst_port, kind, op, flags, (buf_alloc, fwd_cnt))| Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len: 0,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever packets a guest sends, what is held for it stays within its bounds, and a well-behaved stream works
    /// afterwards.
    #[test]
    fn packets_of_any_content(packets in prop::collection::vec(
        (any_header(), prop_oneof![0usize..10, Just(MAX_DATA_BYTES)], any::<bool>(), any::<bool>()), 0..300))
    {
        let host = Host::new();
        let mut mux = host.mux();
        let listener = host.listen(7);
        listener.set_nonblocking(true).unwrap();
        let mut streams = Vec::new();
        for (header, bytes, whole, answer) in packets {
            let header = Header { len: bytes as u32, ..header };
            let parsed = Header::parse(&header.bytes());
            prop_assert_eq!(parsed, header);
            mux.packet(&header, &vec![1; if whole { bytes } else { 0 }], whole);
            // A process that never reads, and some that go away.
            while let Ok((stream, _)) = listener.accept() {
                streams.push(stream);
            }
            if answer {
                mux.next_control();
                streams.pop();
            }
            let (connections, resets, held) = mux.counts();
            prop_assert!(connections <= MAX_CONNECTIONS && resets <= MAX_RESETS && held <= ROOM_BYTES as usize);
            prop_assert_eq!(mux.interests(true).count() <= connections, true);
        }
        while mux.next_control().is_some() {}
        prop_assert!(!mux.owes());
        mux.clear();
        mux.packet(&packet(Op::Request, (7, 5)), &[], true);
        prop_assert_eq!(mux.next_control().unwrap().op, Some(Op::Response));
    }

    /// Whatever is in the rings, the device neither hangs nor panics, and works again after a reset.
    #[test]
    fn rings_of_any_content(
        queue in 0u64..3,
        rings in prop::collection::vec((0u64..0x3000, any::<u64>()), 0..64),
        descriptors in prop::collection::vec(
            (prop_oneof![0u64..(17 << 20), any::<u64>()], prop_oneof![0u32..2048, any::<u32>()], 0u16..8, 0u16..20),
            1..usize::from(SIZE)),
        available in prop_oneof![0u16..32, any::<u16>()])
    {
        let host = Host::new();
        let guest = Guest::new(host.device(&Leash::default()));
        let driver = guest.driver;
        driver.spoil(queue, rings, descriptors, available);
        (0..3).for_each(|queue| driver.kick(queue));
        let _asking = host.connect("CONNECT 80\n");
        driver.device.pause().unwrap();
        driver.device.unpause();
        driver.set(0x70, 0);
        let mut again = Guest { driver: driver.renewed(), rooms: VecDeque::new() };
        again.driver.negotiate(0);
        (0..SIZE / 4).for_each(|_| again.supply());
        again.send(packet(Op::Request, (7, 1024)), &[]);
        loop {
            // The process that asked may still be there.
            let (header, _) = again.next();
            if header.op == Some(Op::Reset) {
                break;
            }
            prop_assert_eq!(header.op, Some(Op::Request));
        }
    }
}
