//! What a reader would refuse, the writer refuses.

use std::io::{self, Cursor, Seek, SeekFrom, Write};

use segment::{
    FormatError, FrameEncoder, Manifest, PageIndex, SegmentReader, SegmentWriter, SpaceId, WriteError,
};

use crate::common::{delta, full, noise, record, space};

fn pages(numbers: &[u64]) -> Vec<PageIndex> {
    numbers.iter().copied().map(PageIndex).collect()
}

#[test]
fn the_encoder_refuses_pages_that_are_not_right() {
    let space = space(0, 512, 100);
    let mut encoder = FrameEncoder::new(1);
    let mut why = |numbers: &[u64], bytes: usize| {
        encoder
            .encode(&space, false, &pages(numbers), &vec![1; bytes])
            .unwrap_err()
            .to_string()
    };
    assert!(why(&[2, 1], 1024).contains("ascend"));
    assert!(why(&[2, 2], 1024).contains("ascend"));
    assert!(why(&[99, 100], 1024).contains("page 100 of space 0, which has 100"));
    assert!(why(&[1, 2], 1023).contains("1023 bytes for 2 pages"));
    assert!(why(&(0..4097).collect::<Vec<_>>(), 0).contains("too large"));
    assert!(why(&[1], (1 << 20) + 1).contains("too large"));
    let odd = segment::Space {
        page_bytes: 0,
        ..space.clone()
    };
    assert!(encoder.encode(&odd, false, &pages(&[1]), &[]).is_err());
}

#[test]
fn frames_have_to_come_in_order() {
    let spaces = [space(0, 512, 100), space(1, 512, 100)];
    let mut encoder = FrameEncoder::new(1);
    let mut frame = |space: usize, numbers: &[u64]| {
        let data = vec![1; numbers.len() * 512];
        encoder
            .encode(&spaces[space], false, &pages(numbers), &data)
            .unwrap()
            .unwrap()
    };
    let mut writer = SegmentWriter::new(Cursor::new(Vec::new()), &delta(2, &spaces), &[]).unwrap();
    writer.push(frame(0, &[10, 20])).unwrap();
    for numbers in [&[5][..], &[20], &[15, 30]] {
        let error = writer.push(frame(0, numbers)).unwrap_err();
        assert!(
            matches!(error, WriteError::Format(FormatError::Invalid { .. })),
            "{error:?}"
        );
    }
    writer.push(frame(1, &[0])).unwrap();
    writer.push(frame(0, &[50])).unwrap_err();
    let mut other = frame(1, &[50]);
    other.entry.space = SpaceId(2);
    writer.push(other).unwrap_err();
    let mut cut = frame(1, &[50]);
    cut.bytes.pop();
    writer.push(cut).unwrap_err();
    // What was refused left nothing behind.
    let (out, summary) = writer.finish().unwrap();
    assert_eq!(
        SegmentReader::open(out.into_inner()).unwrap().verify().unwrap(),
        summary
    );
    assert_eq!(summary.frames, 2);
}

#[test]
fn a_delta_s_zero_pages_do_not_fit_a_full_segment() {
    let space = space(0, 512, 100);
    let frame = FrameEncoder::new(1)
        .encode(&space, false, &pages(&[1]), &[0; 512])
        .unwrap()
        .unwrap();
    let mut writer = SegmentWriter::new(Cursor::new(Vec::new()), &full(2, &[space]), &[]).unwrap();
    assert!(matches!(writer.push(frame), Err(WriteError::Format(_))));
}

#[test]
fn manifests_and_records_that_are_not_right() {
    let begin = |manifest: &Manifest, records: &[_]| {
        SegmentWriter::new(Cursor::new(Vec::new()), manifest, records)
            .map(|_| ())
            .map_err(|e| match e {
                WriteError::Format(e) => e.to_string(),
                other => panic!("{other:?}"),
            })
    };
    let good = full(1, &[space(0, 512, 1)]);
    begin(&good, &[record("a", &[]), record("b", &[])]).unwrap();
    assert!(
        begin(&good, &[record("a", &[]), record("a", &[])])
            .unwrap_err()
            .contains("two tagged")
    );
    assert!(
        begin(&good, &[record("", &[])])
            .unwrap_err()
            .contains("printable")
    );
    assert!(
        begin(&good, &[record("a b", &[])])
            .unwrap_err()
            .contains("printable")
    );
    assert!(
        begin(&good, &[record(&"a".repeat(65), &[])])
            .unwrap_err()
            .contains("too large")
    );
    let huge = record("a", &vec![0; (64 << 20) + 1]);
    assert!(begin(&good, &[huge]).unwrap_err().contains("too large"));
    let links = Manifest {
        links: 1,
        ..good.clone()
    };
    assert!(begin(&links, &[]).unwrap_err().contains("links"));
    let text = Manifest {
        producer: String::new(),
        ..good
    };
    assert!(begin(&text, &[]).unwrap_err().contains("producer"));
}

#[test]
fn a_segment_that_was_not_finished_is_not_one() {
    let space = space(0, 512, 100);
    let mut out = Cursor::new(Vec::new());
    let mut writer = SegmentWriter::new(&mut out, &delta(2, std::slice::from_ref(&space)), &[]).unwrap();
    let frame = FrameEncoder::new(1)
        .encode(&space, false, &pages(&[1]), &noise(1, 512))
        .unwrap()
        .unwrap();
    writer.push(frame).unwrap();
    drop(writer);
    let error = SegmentReader::open(out.into_inner()).unwrap_err();
    assert!(error.to_string().contains("not a segment file"), "{error}");
}

/// A disk that is full after so many bytes: from then on, or, when there are bytes behind, for one write.
struct FullDisk(Cursor<Vec<u8>>, usize, usize);

impl Write for FullDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.1.min(bytes.len());
        self.1 -= room;
        if room == 0 {
            self.1 = std::mem::take(&mut self.2);
            Err(io::ErrorKind::StorageFull.into())
        } else {
            self.0.write(&bytes[..room])
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for FullDisk {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

#[test]
fn a_full_disk_is_reported_wherever_it_ends() {
    let space = space(0, 512, 100);
    let write = |room: usize, afterwards: usize| {
        let disk = FullDisk(Cursor::new(Vec::new()), room, afterwards);
        let manifest = delta(2, std::slice::from_ref(&space));
        let mut writer = SegmentWriter::new(disk, &manifest, &[record("a", &[1])])?;
        let frame = FrameEncoder::new(1).encode(&space, false, &pages(&[1]), &noise(1, 512))?;
        frame.map_or(Ok(()), |frame| writer.push(frame))?;
        writer.finish()
    };
    let (_, summary) = write(usize::MAX, 0).unwrap();
    // The header is written twice.
    let needed = summary.file_bytes as usize + 128;
    assert!(write(needed, 0).is_ok());
    // Room that comes back does not bring back what was not written.
    for (room, afterwards) in (0..needed).flat_map(|room| [(room, 0), (room, usize::MAX)]) {
        assert!(
            matches!(write(room, afterwards), Err(WriteError::Io { .. })),
            "{room} of {needed} bytes, and {afterwards} afterwards"
        );
    }
}
