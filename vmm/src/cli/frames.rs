//! The frames of a segment, one by one: `vmm inspect --frames`.

use std::fs::File;

use comfy_table::{CellAlignment, Table, presets};
use segment::{Codec, SegmentReader};
use serde_json::{Value, json};

fn codec(codec: Codec) -> &'static str {
    match codec {
        Codec::Stored => "as it is",
        Codec::Zstd => "zstd",
    }
}

/// For people.
pub(super) fn show(reader: &SegmentReader<File>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "FRAME", "SPACE", "PAGES", "DATA", "CHANGES", "SAME", "ZERO", "BYTES", "STORED", "AS",
    ]);
    for (i, frame) in reader.index().iter().enumerate() {
        table.add_row([
            i.to_string(),
            frame.space.to_string(),
            format!("{}..{}", frame.first_page, frame.end_page),
            frame.data_pages.to_string(),
            frame.change_pages.to_string(),
            frame.same_pages.to_string(),
            frame.zero_pages.to_string(),
            frame.raw_bytes.to_string(),
            frame.stored_bytes.to_string(),
            codec(frame.codec).to_owned(),
        ]);
    }
    for column in [0, 1, 3, 4, 5, 6, 7, 8] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("\n{table}\n")
}

/// For programs.
pub(super) fn json(reader: &SegmentReader<File>) -> Value {
    let frames = reader.index().iter().map(|frame| {
        json!({
            "space": frame.space.0, "first_page": frame.first_page.0, "end_page": frame.end_page.0,
            "data_pages": frame.data_pages, "change_pages": frame.change_pages, "same_pages": frame.same_pages,
            "zero_pages": frame.zero_pages, "offset": frame.offset, "raw_bytes": frame.raw_bytes,
            "stored_bytes": frame.stored_bytes, "codec": codec(frame.codec), "digest": frame.digest.to_string(),
        })
    });
    frames.collect()
}
