//! A balloon seen by its driver.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::MmioDevice;
use crate::devices::virtio::Transport;
use crate::devices::virtio::testing::{Driver, SIZE};
use crate::memory::PAGE_BYTES;

const ALL: u64 = STATISTICS | DEFLATE_ON_OOM | REPORTING;
/// Pages that hold neither rings nor the driver's buffers.
const FREE: u64 = 0xa00;

fn balloon() -> Balloon {
    Balloon::new(BalloonOptions {
        amount_mib: 2,
        deflate_on_oom: true,
        stats_interval_s: 1,
        reporting: true,
    })
    .unwrap()
}

fn driver(balloon: &Balloon, features: u64) -> Driver {
    let ram = Arc::new(GuestRam::new(16 << 20).unwrap());
    let device = Box::new(BalloonDevice::new(balloon, &ram).unwrap());
    let device = Transport::new(device, &ram).unwrap();
    device.unpause();
    let driver = Driver::around(ram, device);
    driver.negotiate(features);
    let bytes = vec![7; 16 * PAGE_BYTES];
    driver
        .memory()
        .write_slice(&bytes, GuestAddress(FREE << PAGE_SHIFT))
        .unwrap();
    driver
}

/// Which of the pages have content.
fn filled(driver: &Driver) -> Vec<u64> {
    let runs = driver.ram.populated().unwrap();
    let free = FREE..FREE + 16;
    runs.into_iter()
        .flatten()
        .filter(|page| free.contains(page))
        .map(|page| page - FREE)
        .collect()
}

fn numbers(pages: &[u64]) -> Vec<u8> {
    pages
        .iter()
        .flat_map(|page| ((FREE + page) as u32).to_le_bytes())
        .collect()
}

#[test]
fn what_is_put_into_it_or_reported_free_is_given_back() {
    let balloon = balloon();
    let mut driver = driver(&balloon, ALL);
    assert_eq!((driver.get(0x100), driver.get(0x104)), (512, 0));
    // In any order, one twice, and some that are no memory.
    let mut list = numbers(&[3, 1, 2, 9, 1]);
    list.extend([0xff; 8]);
    let at = driver.buffer(&list);
    driver.put(0, &[(at, list.len() as u32, 0)]);
    driver.kick(0);
    driver.wait(0);
    assert_eq!(filled(&driver), [0, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]);
    driver.device.write(0x104, &4u32.to_le_bytes());
    assert_eq!(balloon.state().actual_pages, 4);
    // Reports: the fourth queue, as statistics have the third.
    let page = PAGE_BYTES as u32;
    let run = |first: u64, pages: u32| ((FREE + first) << PAGE_SHIFT, pages * page, 2);
    driver.put(3, &[run(5, 2), run(12, 4), (1 << 50, page, 2)]);
    driver.kick(3);
    driver.wait(3);
    assert_eq!(filled(&driver), [0, 4, 7, 8, 10, 11]);
    // Taking back is nothing but using it.
    let at = driver.buffer(&numbers(&[3]));
    driver.put(1, &[(at, 4, 0)]);
    driver.kick(1);
    driver.wait(1);
    driver
        .memory()
        .write_obj(1u8, GuestAddress((FREE + 3) << PAGE_SHIFT))
        .unwrap();
    assert_eq!(filled(&driver), [0, 3, 4, 7, 8, 10, 11]);
    // A driver that takes no statistics has its reports in the third queue.
    driver.set(0x70, 0);
    let mut driver = driver.renewed();
    driver.negotiate(REPORTING);
    assert_eq!(balloon.state().actual_pages, 0);
    driver.put(2, &[run(7, 2)]);
    driver.kick(2);
    driver.wait(2);
    assert_eq!(filled(&driver), [0, 3, 4, 10, 11]);
}

#[test]
fn another_size_is_told_and_the_guests_numbers_come_again_and_again() {
    let balloon = balloon();
    let mut driver = driver(&balloon, ALL);
    let generation = driver.get(0xfc);
    balloon.set_target(5);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while driver.get(0xfc) == generation {
        assert!(std::time::Instant::now() < deadline, "nothing is told");
        std::thread::yield_now();
    }
    assert_eq!(driver.get(0x60) & 2, 2, "the configuration changed");
    assert_eq!(driver.get(0x100), 5 * 256);
    for round in 1..3u64 {
        // Free memory, and one of a kind that is not known.
        let mut list = 4u16.to_le_bytes().to_vec();
        list.extend((round << 20).to_le_bytes());
        list.extend([0xff; STATISTIC_BYTES]);
        let at = driver.buffer(&list);
        driver.put(2, &[(at, list.len() as u32, 0)]);
        driver.kick(2);
        // Given back only to be filled again.
        driver.wait(2);
        assert_eq!(balloon.statistics().get(Statistic::FreeMemory), Some(round << 20));
    }
    assert_eq!(balloon.statistics().get(Statistic::SwapIn), None);
}

#[test]
fn a_restored_balloon_is_as_it_was() {
    let balloon = balloon();
    let mut driver = driver(&balloon, ALL);
    let list = 4u16.to_le_bytes().into_iter().chain([1; 8]).collect::<Vec<_>>();
    let at = driver.buffer(&list);
    driver.put(2, &[(at, 10, 0)]);
    driver.kick(2);
    driver.device.write(0x104, &9u32.to_le_bytes());
    driver.device.pause().unwrap();
    let state = driver.device.state();
    let DeviceState::Balloon(saved) = state.device else {
        panic!("{state:?}");
    };
    assert_eq!((saved.target_pages, saved.actual_pages), (512, 9));
    let other = Balloon::from_state(&saved).unwrap();
    let mut driver = driver.moved_to(|ram| {
        let device = Box::new(BalloonDevice::new(&other, ram).unwrap());
        Transport::from_state(device, &state, ram).unwrap()
    });
    driver.device.unpause();
    assert_eq!(driver.get(0x104), 9);
    // The statistics' buffer was in nobody's hands: it comes back.
    assert_eq!(driver.wait(2).0, 0);
    assert!(other.statistics().get(Statistic::FreeMemory).is_some());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is in the rings, the device neither hangs nor panics, and works again after a reset.
    #[test]
    fn rings_of_any_content(
        queue in 0u64..4,
        rings in prop::collection::vec((0u64..0x3000, any::<u64>()), 0..64),
        descriptors in prop::collection::vec(
            (prop_oneof![0u64..(17 << 20), any::<u64>()], prop_oneof![0u32..2048, any::<u32>()], 0u16..8, 0u16..20),
            1..usize::from(SIZE)),
        available in prop_oneof![0u16..32, any::<u16>()])
    {
        let balloon = balloon();
        let driver = driver(&balloon, ALL);
        driver.spoil(queue, rings, descriptors, available);
        (0..4).for_each(|queue| driver.kick(queue));
        driver.device.pause().unwrap();
        driver.device.unpause();
        driver.set(0x70, 0);
        let mut driver = driver.renewed();
        driver.negotiate(ALL);
        driver.memory().write_obj(7u8, GuestAddress((FREE + 3) << PAGE_SHIFT)).unwrap();
        let at = driver.buffer(&numbers(&[3]));
        driver.put(0, &[(at, 4, 0)]);
        driver.kick(0);
        driver.wait(0);
        prop_assert!(!filled(&driver).contains(&3));
    }
}
