//! A disk seen by its driver.

use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::bus::MmioDevice;
use crate::devices::virtio::Transport;
use crate::devices::virtio::testing::{Driver, SIZE};
use crate::memory::GuestRam;

const MIB: u64 = 1 << 20;
const ALL: u64 = 1 << 9 | 1 << 13 | 1 << 14;

fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn block(file: &tempfile::NamedTempFile, read_only: bool) -> Box<Block> {
    let disk = Disk::open("disk:root", file.path(), read_only).unwrap();
    Box::new(Block::new(disk, true).unwrap())
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend(0u32.to_le_bytes());
    header.extend(sector.to_le_bytes());
    header
}

fn write(driver: &mut Driver, sector: u64, data: &[u8]) -> u8 {
    let mut out = header(1, sector);
    out.extend(data);
    driver.ask(0, &out, 1)[0]
}

fn read(driver: &mut Driver, sector: u64, bytes: u32) -> (Vec<u8>, u8) {
    let mut answer = driver.ask(0, &header(0, sector), bytes + 1);
    let status = answer.pop().unwrap();
    (answer, status)
}

fn segment(kind: u32, sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut out = header(kind, 0);
    out.extend(sector.to_le_bytes());
    out.extend(sectors.to_le_bytes());
    out.extend(flags.to_le_bytes());
    out
}

#[test]
fn what_is_written_is_in_the_file_and_is_read_back() {
    let mut file = image(8 * MIB);
    let mut driver = Driver::new(block(&file, false), ALL | 1 << 29 | 1 << 28);
    assert_eq!(driver.get(0x08), 2);
    assert_eq!(driver.get(0x100), (8 * MIB / 512) as u32, "capacity in sectors");
    let data: Vec<u8> = (0..4096u32).map(|n| (n % 251) as u8).collect();
    assert_eq!(write(&mut driver, 3, &data), OK);
    assert_eq!(driver.ask(0, &header(4, 0), 1), [OK], "flush");
    let mut found = vec![0; data.len()];
    file.seek(SeekFrom::Start(3 * 512)).unwrap();
    file.read_exact(&mut found).unwrap();
    assert_eq!(found, data);
    assert_eq!(read(&mut driver, 3, 4096), (data, OK));
    let id = driver.ask(0, &header(8, 0), 21);
    assert_eq!((&id[..5], id[20]), (&b"root\0"[..], OK));
    // A hole, and zeros.
    assert_eq!(driver.ask(0, &segment(11, 3, 2, 0), 1), [OK]);
    assert_eq!(driver.ask(0, &segment(13, 5, 6, 1), 1), [OK]);
    assert_eq!(read(&mut driver, 3, 4096), (vec![0; 4096], OK));
}

#[test]
fn requests_that_cannot_be_are_refused_each_with_its_status() {
    let file = image(MIB);
    let mut driver = Driver::new(block(&file, false), ALL);
    let sectors = MIB / 512;
    assert_eq!(write(&mut driver, sectors, &[1; 512]), IO_ERROR, "behind the end");
    assert_eq!(
        write(&mut driver, sectors - 1, &[1; 1024]),
        IO_ERROR,
        "over the end"
    );
    assert_eq!(write(&mut driver, u64::MAX, &[1; 512]), IO_ERROR);
    assert_eq!(write(&mut driver, u64::MAX / 512, &[1; 512]), IO_ERROR);
    assert_eq!(write(&mut driver, 0, &[1; 100]), IO_ERROR, "half a sector");
    assert_eq!(read(&mut driver, sectors, 512).1, IO_ERROR);
    assert_eq!(driver.ask(0, &header(99, 0), 1), [UNSUPPORTED]);
    assert_eq!(driver.ask(0, &segment(11, sectors, 1, 0), 1), [IO_ERROR]);
    assert_eq!(driver.ask(0, &segment(11, 0, u32::MAX, 0), 1), [IO_ERROR]);
    assert_eq!(driver.ask(0, &segment(13, 0, 1, 6), 1), [UNSUPPORTED]);
    assert_eq!(write(&mut driver, 0, &[]), OK, "nothing is fine");
    assert_eq!(write(&mut driver, 0, &[7; 512]), OK, "and it still works");
    drop(driver);
    let mut driver = Driver::new(block(&file, true), 1 << 5);
    assert_eq!(write(&mut driver, 0, &[1; 512]), IO_ERROR, "read-only");
    assert_eq!(read(&mut driver, 0, 512), (vec![7; 512], OK));
}

#[test]
fn a_file_that_cannot_be_a_disk_is_refused_and_says_why() {
    let file = image(MIB);
    let first = Disk::open("disk:root", file.path(), false).unwrap();
    let error = Disk::open("disk:root", file.path(), false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("in use by another VM"), "{error}");
    assert!(Disk::open("disk:root", file.path(), true).is_err());
    drop(first);
    let readers = [true, true].map(|ro| Disk::open("disk:a", file.path(), ro).unwrap());
    assert!(Disk::open("disk:root", file.path(), false).is_err());
    drop(readers);
    file.as_file().set_len(1000).unwrap();
    let error = Disk::open("disk:root", file.path(), false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("multiple of 512"), "{error}");
    file.as_file().set_len(0).unwrap();
    assert!(Disk::open("disk:root", file.path(), false).is_err());
    let folder = Disk::open("disk:root", std::path::Path::new("/"), false)
        .unwrap_err()
        .to_string();
    assert!(folder.contains("neither a regular file"), "{folder}");
}

#[test]
fn a_driver_that_breaks_a_ring_is_cut_off_until_it_resets() {
    let file = image(MIB);
    for chain in [
        // No room for a status, outside memory, and wrapping around the address space.
        vec![(0x20_0000, 16, 0)],
        vec![(0x20_0000, 16, 0), (0xffff_ffff_ffff_fff0, 512, 2)],
        vec![(1 << 40, 16, 0), (0x20_0000, 1, 2)],
        // Readable after writable.
        vec![(0x20_0000, 1, 2), (0x20_1000, 16, 0)],
    ] {
        let mut driver = Driver::new(block(&file, false), ALL);
        driver.put(0, &chain);
        driver.kick(0);
        driver.wait_broken();
        assert_eq!(driver.used(0), 0);
        assert_ne!(driver.get(0x60) & 2, 0, "a configuration interrupt tells of it");
        driver.set(0x70, 0);
        assert_eq!(driver.get(0x70), 0);
    }
}

#[test]
fn a_device_restored_in_mid_work_does_what_was_asked() {
    let (file, other) = (image(MIB), image(MIB));
    let mut driver = Driver::new(block(&file, false), ALL);
    assert_eq!(write(&mut driver, 1, &[5; 512]), OK);
    // Paused, then kicked: the request is in the ring and in nobody's hands.
    driver.device.pause().unwrap();
    let mut out = header(1, 2);
    out.extend([6; 512]);
    let (to, from) = (driver.buffer(&out), driver.buffer(&[0xee]));
    driver.put(0, &[(to, 528, 0), (from, 1, 2)]);
    driver.kick(0);
    let state = driver.device.state();
    let mut driver = driver.moved_to(|ram| Transport::from_state(block(&other, false), &state, ram).unwrap());
    assert_eq!(driver.used(0), 0);
    driver.device.unpause();
    driver.wait(0);
    assert_eq!(read(&mut driver, 2, 512), (vec![6; 512], OK));
    // What the old device had told of and the guest had not seen is told again.
    assert_eq!(driver.get(0x60) & 1, 1);
    // A device that lacks what the guest uses is refused.
    driver.device.pause().unwrap();
    let state = driver.device.state();
    let ram = Arc::clone(&driver.ram);
    let error = Transport::from_state(block(&file, true), &state, &ram).unwrap_err();
    assert!(error.to_string().contains("features"), "{error}");
    type Spoil = fn(&mut crate::devices::virtio::state::VirtioState);
    let spoils: [Spoil; 5] = [
        |s| s.queues[0].desc_table = 1 << 40,
        |s| s.queues[0].size = 3,
        |s| s.queues[0].max_size = 32,
        |s| s.queues.clear(),
        |s| s.status = 1 << 30,
    ];
    for spoil in spoils {
        let mut bad = state.clone();
        spoil(&mut bad);
        assert!(
            Transport::from_state(block(&file, false), &bad, &ram).is_err(),
            "{bad:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a guest writes into registers, of any width and in any order, the device answers and still works
    /// after a reset.
    #[test]
    fn registers_in_any_order(accesses in prop::collection::vec(
        (any::<bool>(), prop_oneof![0u64..0x140, 0u64..0x1000], 1usize..9,
         prop_oneof![any::<u64>(), 0u64..16, Just(0x10_0000u64)]), 0..200))
    {
        let file = image(MIB);
        let ram = Arc::new(GuestRam::new(4 << 20).unwrap());
        let device = Transport::new(block(&file, false), &ram).unwrap();
        device.unpause();
        for (write, offset, width, value) in accesses {
            let mut bytes = value.to_le_bytes();
            if write {
                device.write(offset, &bytes[..width]);
            } else {
                device.read(offset, &mut bytes[..width]);
            }
        }
        let mut driver = Driver::around(ram, device);
        driver.negotiate(ALL);
        prop_assert_eq!(write(&mut driver, 0, &[9; 512]), OK);
    }

    /// Whatever is in the rings, the device neither hangs nor panics, and works again after a reset.
    #[test]
    fn rings_of_any_content(
        rings in prop::collection::vec((0u64..0x3000, any::<u64>()), 0..64),
        descriptors in prop::collection::vec(
            (prop_oneof![0u64..(17 << 20), any::<u64>()], prop_oneof![0u32..2048, any::<u32>()], 0u16..8, 0u16..20),
            1..usize::from(SIZE)),
        available in prop_oneof![0u16..32, any::<u16>()])
    {
        use vm_memory::{Bytes, GuestAddress};
        let file = image(MIB);
        let driver = Driver::new(block(&file, false), ALL);
        let memory = driver.memory();
        for (at, value) in rings {
            memory.write_obj(value, GuestAddress(0x10_0000 + at)).unwrap();
        }
        for (number, (address, bytes, flags, next)) in descriptors.into_iter().enumerate() {
            let at = 0x10_0000 + 16 * number as u64;
            memory.write_obj(address, GuestAddress(at)).unwrap();
            memory.write_obj(bytes, GuestAddress(at + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(next, GuestAddress(at + 14)).unwrap();
        }
        memory.write_obj(available, GuestAddress(0x10_1002)).unwrap();
        driver.kick(0);
        driver.device.pause().unwrap();
        driver.device.unpause();
        driver.set(0x70, 0);
        let mut fresh = Driver::around(Arc::clone(&driver.ram), driver.device);
        for page in 0..3u64 {
            fresh.memory().write_slice(&[0; 4096], GuestAddress(0x10_0000 + page * 4096)).unwrap();
        }
        fresh.negotiate(ALL);
        prop_assert_eq!(write(&mut fresh, 0, &[9; 512]), OK);
    }
}

#[test]
fn many_requests_in_flight_all_come_back() {
    let mut file = image(MIB);
    file.write_all(&[3; 4096]).unwrap();
    let mut driver = Driver::new(block(&file, false), ALL | 1 << 29);
    for round in 0..50 {
        let out = driver.buffer(&header(0, round % 8));
        let rooms: Vec<u64> = (0..4).map(|_| driver.buffer(&[0xee; 513])).collect();
        for &room in &rooms {
            driver.put(0, &[(out, 16, 0), (room, 513, 2)]);
        }
        driver.kick(0);
        for _ in 0..4 {
            assert_eq!(driver.wait(0).1, 513);
        }
    }
    driver.device.pause().unwrap();
    assert_eq!(driver.device.state().queues[0].next_used, 200);
}
