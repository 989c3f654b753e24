//! A capture is the disk at one instant, whatever is written meanwhile. The oracle is a copy of the file.

use std::fs;

use proptest::prelude::*;

use super::*;

const BLOCK: usize = 4096;

fn image(bytes: &[u8]) -> (tempfile::NamedTempFile, Arc<Disk>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let disk = Disk::open("disk:t", file.path(), false).unwrap();
    (file, disk)
}

/// Puts a capture's blocks over `base`.
fn apply(base: &[u8], capture: &DiskCapture, batch: usize) -> Vec<u8> {
    let mut whole = base.to_vec();
    whole.resize(base.len().next_multiple_of(BLOCK), 0);
    for blocks in capture.blocks().chunks(batch) {
        let mut pages = vec![0xaa; blocks.len() * BLOCK];
        capture.read(blocks, &mut pages).unwrap();
        for (&block, page) in blocks.iter().zip(pages.chunks_exact(BLOCK)) {
            whole[block as usize * BLOCK..][..BLOCK].copy_from_slice(page);
        }
    }
    whole.truncate(base.len());
    whole
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
}

fn steps(bytes: u64) -> impl Strategy<Value = Vec<Step>> {
    let sectors = bytes / 512;
    let step = prop_oneof![
        (0..sectors, 1usize..40, 1u8..255).prop_map(|(at, count, value)| Step::Write(at, count, value)),
        (0..sectors, 1u64..40, any::<bool>()).prop_map(|(at, count, unmap)| Step::Zero(at, count, unmap)),
    ];
    prop::collection::vec(step, 0..12)
}

fn run(disk: &Disk, steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Write(at, count, value) => {
                let count = (count * 512).min((disk.bytes() - at * 512) as usize);
                disk.write(at * 512, &vec![value; count]).unwrap();
            }
            Step::Zero(at, count, unmap) => {
                let count = (count * 512).min(disk.bytes() - at * 512);
                disk.zero(at * 512, count, unmap).unwrap();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn every_capture_is_of_its_instant(
        // The last block is not whole.
        first in steps(40 * 4096 + 1024),
        before in steps(40 * 4096 + 1024),
        during in steps(40 * 4096 + 1024),
        after in steps(40 * 4096 + 1024),
        batch in 1usize..9,
        fails in any::<bool>())
    {
        let (file, disk) = image(&vec![0; 40 * BLOCK + 1024]);
        run(&disk, &first);
        let at_full = fs::read(file.path()).unwrap();
        let full = disk.freeze(true).unwrap();
        run(&disk, &before);
        prop_assert!(disk.freeze(false).is_err(), "one at a time");
        let restored = apply(&vec![0; at_full.len()], &full, batch);
        prop_assert!(restored == at_full, "the full capture");
        drop(full);

        let at_delta = fs::read(file.path()).unwrap();
        let delta = disk.freeze(false).unwrap();
        run(&disk, &during);
        let restored = apply(&at_full, &delta, batch);
        prop_assert!(restored == at_delta, "the delta");
        let mut base = at_delta;
        if fails {
            delta.put_back();
            base = at_full;
        }
        drop(delta);

        run(&disk, &after);
        let now = fs::read(file.path()).unwrap();
        let last = disk.freeze(false).unwrap();
        prop_assert!(apply(&base, &last, batch) == now, "the delta after");
    }
}

#[test]
fn a_stop_looks_at_no_block_and_only_what_changed_is_taken() {
    let (_file, disk) = image(&vec![1; 64 * BLOCK]);
    assert_eq!(disk.freeze(true).unwrap().blocks().len(), 64);
    assert_eq!(disk.freeze(false).unwrap().blocks(), Vec::<u64>::new());
    disk.write(5 * 4096 + 512, &[2; 512]).unwrap();
    disk.write(9 * 4096 - 512, &[2; 1024]).unwrap();
    assert_eq!(disk.freeze(false).unwrap().blocks(), vec![5, 8, 9]);
}

#[test]
fn a_block_is_never_read_twice() {
    let (_file, disk) = image(&vec![1; 8 * BLOCK]);
    let capture = disk.freeze(true).unwrap();
    let mut page = vec![0; BLOCK];
    capture.read(&[3], &mut page).unwrap();
    disk.write(3 * 4096, &[2; BLOCK]).unwrap();
    assert!(
        capture.read(&[3], &mut page).is_err(),
        "it is of another instant by now"
    );
}

#[test]
fn writes_beyond_what_can_be_saved_wait_for_the_reader() {
    let blocks = (MAX_SAVED_BYTES / BLOCK) as u64 + 64;
    let (file, disk) = image(&vec![7; blocks as usize * BLOCK]);
    let capture = disk.freeze(true).unwrap();
    let writer = {
        let disk = Arc::clone(&disk);
        std::thread::spawn(move || {
            for at in (0..blocks).step_by(256) {
                let count = 256.min(blocks - at) as usize;
                disk.write(at * 4096, &vec![8; count * BLOCK]).unwrap();
            }
        })
    };
    // The writer gets only so far alone, and to the end once the blocks are read.
    let mut page = vec![0; 64 * BLOCK];
    for first in (0..blocks).step_by(64) {
        let run: Vec<u64> = (first..(first + 64).min(blocks)).collect();
        let room = run.len() * BLOCK;
        capture.read(&run, &mut page[..room]).unwrap();
        assert!(page[..room].iter().all(|&byte| byte == 7), "block {first}");
        assert!(disk.lock().capture.as_ref().unwrap().saved_bytes <= MAX_SAVED_BYTES);
    }
    writer.join().unwrap();
    assert!(fs::read(file.path()).unwrap().iter().all(|&byte| byte == 8));
}

#[test]
fn loading_fills_a_disk_and_refuses_what_is_not_on_it() {
    let (file, disk) = image(&[0; 2 * BLOCK + 512]);
    disk.load(1, &[3; BLOCK]).unwrap();
    let mut last = vec![0; BLOCK];
    last[..512].fill(4);
    disk.load(2, &last).unwrap();
    last[512] = 1;
    assert!(disk.load(2, &last).is_err(), "content behind the end");
    assert!(disk.load(3, &[0; BLOCK]).is_err());
    assert!(disk.load(u64::MAX, &[0; BLOCK]).is_err());
    let content = fs::read(file.path()).unwrap();
    assert!(content[..BLOCK].iter().all(|&b| b == 0) && content[BLOCK..2 * BLOCK].iter().all(|&b| b == 3));
    assert_eq!((content[2 * BLOCK], content.len()), (4, 2 * BLOCK + 512));
    assert!(
        disk.freeze(false).unwrap().blocks().is_empty(),
        "nothing of it is a change"
    );
}
