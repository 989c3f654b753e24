//! Pages that are the same as others, and pages that are changes of the parent's: read, merged, and refused when they
//! lie.

use std::collections::BTreeMap;
use std::io::Cursor;

use proptest::prelude::*;
use segment::{
    Features, Form, FrameBuf, FrameEncoder, Manifest, MergeError, Page, PageCheck, PageContent, PageIn,
    PageIndex, SamePages, SegmentReader, SegmentWriter, SpaceId, is_zero, merge, pages_per_frame, sample,
    xor_into,
};

use crate::common::{delta, full, noise, space};
use crate::forge::{Parts, assert_refused, u16_at};

const PAGES: u64 = 400;
const BYTES: usize = 512;

type Memory = Vec<u8>;

fn page_of(memory: &[u8], page: u64) -> &[u8] {
    &memory[page as usize * BYTES..][..BYTES]
}

/// The checkpoint of `now` (these pages of it), a delta on `before` when there is one. Frames of 32 pages, so that
/// there are many.
fn write(manifest: &Manifest, before: Option<&Memory>, now: &Memory, pages: &[u64]) -> Vec<u8> {
    let space = &manifest.spaces[0];
    let mut writer = SegmentWriter::new(Cursor::new(Vec::new()), manifest, &[]).expect("begin");
    let mut encoder = FrameEncoder::new(1);
    let mut same = SamePages::new(PAGES);
    for batch in pages.chunks(32) {
        same.next_frame();
        let forms: Vec<PageIn<'_>> = batch
            .iter()
            .map(|&page| {
                let bytes = page_of(now, page);
                let base = before
                    .map(|before| page_of(before, page))
                    .filter(|base| !is_zero(base));
                let source = sample(bytes).and_then(|hash| {
                    same.find(PageIndex(page), hash, base.is_none(), |other| {
                        page_of(now, other.0) == bytes
                    })
                });
                let form = match (source, base) {
                    (Some(source), _) => Form::Same(source),
                    (None, Some(base)) => Form::Changed { now: bytes, base },
                    (None, None) => Form::Data(bytes),
                };
                PageIn {
                    page: PageIndex(page),
                    form,
                }
            })
            .collect();
        let full = manifest.kind.is_full();
        if let Some(frame) = encoder.encode_pages(space, full, &forms).expect("encode") {
            writer.push(frame).expect("push");
        }
    }
    writer.finish().expect("finish").0.into_inner()
}

/// Oldest first, every page applied to what was there: the obvious way.
fn apply(memory: &mut Memory, reader: &SegmentReader<Vec<u8>>) {
    let mut buf = FrameBuf::new();
    for i in 0..reader.index().len() {
        for (page, content) in reader.read_frame(i, &mut buf).expect("frame").pages() {
            let to = &mut memory[page.0 as usize * BYTES..][..BYTES];
            match content {
                Page::Zero => to.fill(0),
                Page::Data(bytes) => to.copy_from_slice(bytes),
                Page::Change { xor, check } => {
                    xor_into(to, xor);
                    assert_eq!(PageCheck::of(to), check);
                }
            }
        }
    }
}

/// What is written to a page: nothing, a pattern many have, noise, or a few bytes.
#[derive(Debug, Clone, Copy)]
enum Op {
    Zero,
    Pattern(u8),
    Noise(u64),
    Touch(u8),
    Nothing,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        1 => Just(Op::Zero),
        3 => (1u8..4).prop_map(Op::Pattern),
        2 => any::<u64>().prop_map(Op::Noise),
        4 => any::<u8>().prop_map(Op::Touch),
        1 => Just(Op::Nothing),
    ]
}

fn run(memory: &mut Memory, page: u64, op: Op) {
    let to = &mut memory[page as usize * BYTES..][..BYTES];
    match op {
        Op::Zero => to.fill(0),
        Op::Pattern(byte) => to.fill(byte),
        Op::Noise(seed) => to.copy_from_slice(&noise(seed, BYTES)),
        Op::Touch(byte) => to[usize::from(byte)] = to[usize::from(byte)].wrapping_add(1),
        Op::Nothing => {}
    }
}

fn dirty() -> impl Strategy<Value = BTreeMap<u64, Op>> {
    prop_oneof![
        proptest::collection::btree_map(0..PAGES, op(), 0..80),
        proptest::collection::btree_map(0..20u64, op(), 0..20),
    ]
}

/// The chain that these writes make: what the memory was at each checkpoint, and the segments.
fn chain(first: &BTreeMap<u64, Op>, then: &[BTreeMap<u64, Op>]) -> Vec<(Memory, Vec<u8>)> {
    let spaces = [space(0, BYTES as u32, PAGES)];
    let mut memory = vec![0; PAGES as usize * BYTES];
    first.iter().for_each(|(page, op)| run(&mut memory, *page, *op));
    let all: Vec<u64> = (0..PAGES).collect();
    let mut links = vec![(memory.clone(), write(&full(1, &spaces), None, &memory, &all))];
    for (i, writes) in then.iter().enumerate() {
        let before = memory.clone();
        writes.iter().for_each(|(page, op)| run(&mut memory, *page, *op));
        let pages: Vec<u64> = writes.keys().copied().collect();
        let manifest = delta(i as u64 + 2, &spaces);
        links.push((memory.clone(), write(&manifest, Some(&before), &memory, &pages)));
    }
    links
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Read one after the other, and merged at any place and again, a chain is what the memory was.
    #[test]
    fn a_chain_is_what_the_memory_was(
        first in dirty(),
        then in proptest::collection::vec(dirty(), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let links = chain(&first, &then);
        let open = |bytes: &Vec<u8>| SegmentReader::open(bytes.clone()).expect("open");
        let readers = || links.iter().map(|(_, bytes)| open(bytes)).collect::<Vec<_>>();
        let mut memory = vec![0; PAGES as usize * BYTES];
        for (reader, (was, _)) in readers().iter().zip(&links) {
            reader.verify().expect("verify");
            apply(&mut memory, reader);
            prop_assert!(&memory == was);
        }
        // A merge of the deltas alone keeps changes; merged into what is below them they are gone.
        let at = 1 + cut.index(links.len() - 1);
        let joined = |segments: &[SegmentReader<Vec<u8>>]| {
            let (out, summary) = merge(segments, Cursor::new(Vec::new()), 1).expect("merge");
            let reader = open(&out.into_inner());
            assert_eq!(reader.verify().expect("verify"), summary);
            reader
        };
        let all = readers();
        let (older, newer) = (joined(&all[..at]), joined(&all[at..]));
        let mut memory = vec![0; PAGES as usize * BYTES];
        apply(&mut memory, &older);
        prop_assert!(memory == links[at - 1].0);
        apply(&mut memory, &newer);
        prop_assert!(memory == links[links.len() - 1].0);
        let fold = joined(&[older, newer]);
        prop_assert!(!fold.header().features_required.has(Features::PAGE_CHANGES));
        let mut memory = vec![0; PAGES as usize * BYTES];
        apply(&mut memory, &fold);
        prop_assert!(memory == links[links.len() - 1].0);
    }
}

/// A delta with a page of each form: 1 whole, 2 the same, 40 the same from another frame, 50 a change.
fn each_form() -> (Memory, Memory, Vec<u8>) {
    let mut before = vec![0; PAGES as usize * BYTES];
    run(&mut before, 50, Op::Noise(50));
    let mut now = before.clone();
    for page in [1, 2, 40] {
        run(&mut now, page, Op::Pattern(9));
    }
    run(&mut now, 50, Op::Touch(3));
    let pages: Vec<u64> = (1..60).collect();
    let manifest = delta(2, &[space(0, BYTES as u32, PAGES)]);
    let bytes = write(&manifest, Some(&before), &now, &pages);
    (before, now, bytes)
}

#[test]
fn each_form_is_used_and_counted() {
    let (before, now, bytes) = each_form();
    let reader = SegmentReader::open(bytes).unwrap();
    let summary = reader.verify().unwrap();
    assert_eq!(
        (summary.data_pages, summary.same_pages, summary.change_pages),
        (2, 2, 1)
    );
    assert_eq!(
        reader.header().features_required,
        Features::SAME_PAGES.with(Features::PAGE_CHANGES)
    );
    assert_eq!(reader.header().minor, 1);
    let page = |page| reader.read_page(SpaceId::MEMORY, PageIndex(page)).unwrap();
    for n in [1, 2, 40] {
        assert_eq!(page(n), PageContent::Data(page_of(&now, n).to_vec()));
    }
    let PageContent::Change { mut xor, check } = page(50) else {
        panic!("not a change")
    };
    xor_into(&mut xor, page_of(&before, 50));
    assert_eq!(xor, page_of(&now, 50));
    assert_eq!(check, PageCheck::of(&xor));
}

#[test]
fn a_page_that_was_written_and_is_as_before_is_left_out() {
    let before: Memory = noise(1, PAGES as usize * BYTES);
    let manifest = delta(2, &[space(0, BYTES as u32, PAGES)]);
    let reader = SegmentReader::open(write(&manifest, Some(&before), &before.clone(), &[3, 4, 5])).unwrap();
    assert_eq!(reader.index().len(), 0);
}

#[test]
fn a_page_of_which_more_than_half_has_changed_is_stored_whole() {
    let before: Memory = noise(1, PAGES as usize * BYTES);
    let manifest = delta(2, &[space(0, BYTES as u32, PAGES)]);
    let words = BYTES / 8;
    for (changed, change_pages) in [(words / 2, 1), (words / 2 + 1, 0)] {
        let mut now = before.clone();
        for word in 0..changed {
            now[3 * BYTES + word * 8] ^= 1;
        }
        let reader = SegmentReader::open(write(&manifest, Some(&before), &now, &[3])).unwrap();
        let summary = reader.verify().unwrap();
        assert_eq!(
            (summary.data_pages, summary.change_pages),
            (1, change_pages),
            "{changed} of {words} words"
        );
    }
}

#[test]
fn the_encoder_refuses_what_cannot_be() {
    let space = space(0, BYTES as u32, PAGES);
    let one = vec![1; BYTES];
    let why = |full: bool, page: u64, form: Form<'_>| {
        let page = PageIndex(page);
        let pages = [PageIn { page, form }];
        let error = FrameEncoder::new(1)
            .encode_pages(&space, full, &pages)
            .unwrap_err();
        error.to_string()
    };
    let base = &one;
    assert!(why(false, 5, Form::Same(PageIndex(5))).contains("comes after it"));
    assert!(why(true, 5, Form::Changed { now: &one, base }).contains("full segment"));
    assert!(why(false, 5, Form::Data(&one[1..])).contains("as long as a page"));
    assert!(
        why(
            false,
            5,
            Form::Changed {
                now: &one,
                base: &one[1..]
            }
        )
        .contains("as long as a page")
    );
    assert!(why(false, PAGES, Form::Data(&one)).contains("page 400 of space 0"));
}

/// Replaces the table of frame 0 of [`each_form`], which is `runs 2: data 0 1, same 0 1 1`, gaps and zero pages.
fn forged(i: usize, edit: impl FnOnce(&mut Vec<u8>)) -> Parts {
    let mut parts = Parts::of(&each_form().2);
    let mut raw = parts.raw(i);
    edit(&mut raw);
    parts.set_frame(i, 0, &raw, raw.len() as u32);
    parts
}

#[test]
fn the_bytes_are_as_documented() {
    let parts = Parts::of(&each_form().2);
    // Frame 0: page 1 data, 2 the same as the one before it, 3 to 32 zero.
    assert_eq!(parts.raw(0)[..14], [3, 0, 0, 0, 1, 0, 1, 3, 0, 1, 1, 2, 0, 30]);
    // Frame 1: 33 to 39 zero, 40 the same as the one 39 before, 41 to 49 zero, 50 a change, 51 to 59 zero.
    let raw = parts.raw(1);
    assert_eq!(
        raw[..20],
        [5, 0, 0, 0, 2, 0, 7, 3, 0, 1, 39, 2, 0, 9, 4, 0, 1, 2, 0, 9]
    );
    assert_eq!(raw.len(), 20 + 8 + BYTES);
    assert_eq!([4, 6].map(|at| u16_at(&parts.entries[0], at)), [1, 0]);
    assert_eq!([4, 6].map(|at| u16_at(&parts.entries[1], at)), [1, 1]);
}

#[test]
fn tables_that_lie() {
    let cases: [(Parts, &str); 8] = [
        (
            forged(0, |raw| raw[10] = 0),
            "run 1 is not valid: the page its pages are the same as is not before it",
        ),
        (
            forged(0, |raw| raw[10] = 3),
            "run 1 is not valid: the page its pages are the same as is not before it",
        ),
        (
            forged(0, |raw| raw[10] = 2),
            "page 0, which its pages are the same as, has no data of its own",
        ),
        // 35 is zero, 60 before is beyond the beginning.
        (
            forged(1, |raw| raw[10] = 5),
            "page 35, which its pages are the same as, has no data of its own",
        ),
        (
            forged(1, |raw| raw[10] = 38),
            "page 2, which its pages are the same as, has no data of its own",
        ),
        (forged(1, |raw| raw[10] = 60), "is not before it"),
        (
            forged(1, |raw| raw[14] = 1),
            "1 pages that are the same as others and 0 changes, the index says 1 and 1",
        ),
        (forged(1, |raw| raw[4] = 3), "frame 1"),
    ];
    for (parts, why) in cases {
        assert_refused(&parts, why);
    }
    let u16 = |value: u16| value.to_le_bytes();
    let parts = || Parts::of(&each_form().2);
    assert_refused(
        &parts().entry(0, 4, u16(0)),
        "more pages that are the same as others than",
    );
    assert_refused(&parts().entry(0, 4, u16(5000)), "pages is too large");
    assert_refused(&parts().entry(0, 4, u16(2)), "33 pages in the range 1 to 33");
    assert_refused(&parts().entry(1, 6, u16(2)), "2 changes among 1 pages with data");
    assert_refused(&parts().entry(1, 6, u16(0)), "frame 1");
    // What is used has to be named.
    assert_refused(
        &parts().patch(16, [1]),
        "page-changes, which the header does not name",
    );
    assert_refused(
        &parts().patch(16, [2]),
        "same-pages, which the header does not name",
    );
}

#[test]
fn a_full_segment_has_no_changes() {
    let mut parts = Parts::of(&each_form().2);
    let manifest = full(2, &[space(0, BYTES as u32, PAGES)]);
    let other = write(&manifest, None, &vec![0; PAGES as usize * BYTES], &[]);
    parts.manifest = Parts::of(&other).manifest;
    for entry in &mut parts.entries {
        // Zero pages are refused too, and not what is asked for here.
        entry[44..48].fill(0);
    }
    assert_refused(
        &parts,
        "a full segment has nothing that a page could be a change of",
    );
}

#[test]
fn a_frame_whose_pages_are_the_same_as_many_frames_pages_is_refused() {
    // 12 frames of one page each, and one whose pages are the same as those of all of them.
    let space = space(0, BYTES as u32, PAGES);
    let manifest = delta(2, std::slice::from_ref(&space));
    let mut writer = SegmentWriter::new(Cursor::new(Vec::new()), &manifest, &[]).unwrap();
    let mut encoder = FrameEncoder::new(1);
    let mut push = |pages: &[PageIn<'_>]| {
        let frame = encoder.encode_pages(&space, false, pages).unwrap().unwrap();
        writer.push(frame).unwrap();
    };
    for page in 0..12 {
        let data = noise(page + 1, BYTES);
        let page = PageIndex(page);
        push(&[PageIn {
            page,
            form: Form::Data(&data),
        }]);
    }
    let forms: Vec<PageIn<'_>> = (0..12)
        .map(|n| PageIn {
            page: PageIndex(100 + n),
            form: Form::Same(PageIndex(n)),
        })
        .collect();
    push(&forms);
    let bytes = writer.finish().unwrap().0.into_inner();
    assert_refused(
        &Parts::of(&bytes),
        "frames its pages are the same as pages of is too large: 9, at most 8",
    );
}

#[test]
fn a_change_on_the_wrong_base_is_noticed() {
    let (mut before, _, bytes) = each_form();
    let spaces = [space(0, BYTES as u32, PAGES)];
    before[50 * BYTES] ^= 1;
    let all: Vec<u64> = (0..PAGES).collect();
    let wrong = write(&full(1, &spaces), None, &before, &all);
    let none = write(&full(1, &spaces), None, &vec![0; PAGES as usize * BYTES], &all);
    let merged = |base: &Vec<u8>| {
        let open = |bytes: &Vec<u8>| SegmentReader::open(bytes.clone()).unwrap();
        merge(&[open(base), open(&bytes)], Cursor::new(Vec::new()), 1).unwrap_err()
    };
    match merged(&wrong) {
        MergeError::Read { name, source } => {
            assert_eq!(name.to_string(), "web/1/2");
            assert!(
                source
                    .to_string()
                    .contains("page 50 as a change of what web/1/1 has"),
                "{source}"
            );
        }
        other => panic!("{other:?}"),
    }
    match merged(&none) {
        MergeError::NoBase { name, page, .. } => {
            assert_eq!((name.to_string(), page.0), ("web/1/2".into(), 50))
        }
        other => panic!("{other:?}"),
    }
    assert!(pages_per_frame(512) > 32);
}

fn golden() -> std::path::PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "testdata", "v1.1-forms.seg"]
        .iter()
        .collect()
}

/// A segment with pages of every form as it was first written: read for ever.
#[test]
fn the_golden_segment_of_forms_is_read() {
    let (before, now, made) = each_form();
    let bytes = std::fs::read(golden()).unwrap();
    let reader = SegmentReader::open(bytes.clone()).unwrap();
    reader.verify().unwrap();
    let mut memory = before;
    apply(&mut memory, &reader);
    assert!(memory == now);
    // And written the same, but for what zstd decides.
    let (was, is) = (Parts::of(&bytes), Parts::of(&made));
    assert_eq!(was.manifest, is.manifest);
    for i in 0..was.entries.len() {
        assert_eq!(was.raw(i), is.raw(i), "frame {i}");
        assert_eq!(was.entries[i][..24], is.entries[i][..24], "entry {i}");
    }
    assert_eq!(was.header[..32], is.header[..32]);
}

#[test]
#[ignore = "writes testdata/; only for a new version of the format"]
fn regenerate_the_golden_segment_of_forms() {
    std::fs::write(golden(), each_form().2).unwrap();
}
