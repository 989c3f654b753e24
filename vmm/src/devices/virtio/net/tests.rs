//! A card seen by its driver, on a pair of sockets in place of a TAP.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::devices::virtio::Transport;
use crate::devices::virtio::testing::Driver;

#[derive(Clone)]
struct Pair(Arc<(UnixDatagram, AtomicU32)>);

impl AsRawFd for Pair {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

impl Wire for Pair {
    fn set_offload(&self, flags: u32) -> io::Result<()> {
        self.0.1.store(flags, Ordering::SeqCst);
        Ok(())
    }

    fn receive(&self, to: &mut [u8]) -> io::Result<usize> {
        self.0.0.recv(to)
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.0.send(frame).map(drop)
    }
}

const MAC: Mac = [2, 1, 2, 3, 4, 5];
const OFFLOADS: u64 = 1 << 1 | 1 << 7;

fn pair() -> (Pair, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs
        .set_read_timeout(Some(std::time::Duration::from_secs(60)))
        .unwrap();
    (Pair(Arc::new((ours, AtomicU32::new(0)))), theirs)
}

fn frame(bytes: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend((0..bytes).map(|n| (n % 253) as u8));
    frame
}

#[test]
fn frames_go_both_ways_over_as_many_buffers_as_they_need() {
    let (wire, host) = pair();
    let mut driver = Driver::new(
        Box::new(Net::on("net:0", MAC, wire.clone())),
        1 << 15 | 1 << 5 | OFFLOADS,
    );
    assert_eq!(
        wire.0.1.load(Ordering::SeqCst),
        3,
        "checksums and TSO4 are taken from the host"
    );
    assert_eq!(driver.get(0x100).to_le_bytes(), MAC[..4]);
    let sent = frame(300);
    let at = driver.buffer(&sent);
    driver.put(TRANSMIT, &[(at, 12, 0), (at + 12, 300, 0)]);
    driver.kick(TRANSMIT);
    let mut got = vec![0; 1000];
    let count = host.recv(&mut got).unwrap();
    assert_eq!(got[..count], sent);
    driver.wait(TRANSMIT);
    // A frame before there are buffers, into three of 512 bytes.
    host.send(&frame(1400)).unwrap();
    let rooms: Vec<u64> = (0..4).map(|_| driver.buffer(&[0xee; 512])).collect();
    for &room in &rooms {
        driver.put(RECEIVE, &[(room, 512, 2)]);
    }
    driver.kick(RECEIVE);
    let lengths: Vec<u32> = (0..3).map(|_| driver.wait(RECEIVE).1).collect();
    assert_eq!(lengths, [512, 512, 1412 - 1024]);
    let mut whole = Vec::new();
    for (&room, length) in rooms.iter().zip(lengths) {
        let mut piece = vec![0; length as usize];
        vm_memory::Bytes::read_slice(driver.memory(), &mut piece, vm_memory::GuestAddress(room)).unwrap();
        whole.extend(piece);
    }
    assert_eq!(whole[10..12], [3, 0], "three buffers");
    assert_eq!(whole[12..], frame(1400)[12..]);
    // The fourth buffer is not lost.
    host.send(&frame(60)).unwrap();
    assert_eq!(driver.wait(RECEIVE).1, 72);
}

#[test]
fn a_card_without_a_lease_is_not_heard() {
    let (wire, host) = pair();
    let leash = Leash::default();
    let mut driver = Driver::new(
        Box::new(Net::on("net:0", MAC, wire).under(leash.clone())),
        OFFLOADS,
    );
    let mut send = |bytes: usize| {
        let sent = frame(bytes);
        let at = driver.buffer(&sent);
        driver.put(TRANSMIT, &[(at, 12, 0), (at + 12, bytes as u32, 0)]);
        driver.kick(TRANSMIT);
        driver.wait(TRANSMIT);
    };
    leash.hold();
    send(300);
    leash.free();
    send(200);
    let mut got = vec![0; 1000];
    assert_eq!(host.recv(&mut got).unwrap(), 12 + 200, "the frame before is gone");
}

#[test]
fn a_restored_card_sets_its_offloads_again_and_says_where_it_is() {
    let (wire, _host) = pair();
    let driver = Driver::new(Box::new(Net::on("net:0", MAC, wire)), 1 << 15 | OFFLOADS);
    driver.device.pause().unwrap();
    let state = driver.device.state();
    assert_eq!(state.device, DeviceState::Net(NetState { mac: MAC }));
    let (wire, host) = pair();
    let driver = driver.moved_to(|ram| {
        Transport::from_state(Box::new(Net::on("net:0", MAC, wire.clone())), &state, ram).unwrap()
    });
    assert_eq!(wire.0.1.load(Ordering::SeqCst), 3);
    driver.device.unpause();
    let mut got = vec![0; 100];
    assert_eq!(host.recv(&mut got).unwrap(), 72);
    assert_eq!(got[12 + 6..12 + 14], [&MAC[..], &[0x80, 0x35]].concat());
}

#[test]
fn frames_no_buffer_holds_and_chains_no_frame_is_in_are_dropped() {
    let (wire, host) = pair();
    // Without mergeable buffers.
    let mut driver = Driver::new(Box::new(Net::on("net:0", MAC, wire)), 0);
    let room = driver.buffer(&[0; 512]);
    driver.put(RECEIVE, &[(room, 512, 2)]);
    driver.kick(RECEIVE);
    host.send(&frame(1400)).unwrap();
    host.send(&frame(100)).unwrap();
    assert_eq!(
        driver.wait(RECEIVE).1,
        112,
        "the first is dropped, the second is there"
    );
    let at = driver.buffer(&frame(60));
    driver.put(TRANSMIT, &[(at, 12, 0)]);
    driver.put(TRANSMIT, &[(at, 5, 0)]);
    driver.put(TRANSMIT, &[(0x20_0000, 10 << 20, 0)]);
    driver.put(TRANSMIT, &[(at, 72, 0)]);
    driver.kick(TRANSMIT);
    for _ in 0..4 {
        driver.wait(TRANSMIT);
    }
    let mut got = vec![0; 100];
    assert_eq!(host.recv(&mut got).unwrap(), 72, "only the whole one is sent");
    // Outside memory: the driver is cut off.
    driver.put(TRANSMIT, &[(1 << 50, 72, 0)]);
    driver.kick(TRANSMIT);
    driver.wait_broken();
}

#[test]
fn a_tap_that_is_not_there_says_how_to_make_it() {
    let error = Tap::open("net:0", "no-such-tap").unwrap_err().to_string();
    assert!(error.contains("ip tuntap add"), "{error}");
    assert!(matches!(
        Tap::open("net:0", "a/b"),
        Err(tap::TapError::Name { .. })
    ));
    assert!(matches!(
        Tap::open("net:0", "a-name-that-is-too-long"),
        Err(tap::TapError::Name { .. })
    ));
}
