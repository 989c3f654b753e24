//! The rows as a table for people.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets::UTF8_HORIZONTAL_ONLY};
use serde_json::Value;

use super::row::{Row, short};

/// How wide the table is where nobody says.
const USUAL_WIDTH: u16 = 160;
/// The narrowest that can still be read.
const MIN_WIDTH: u16 = 100;

/// The table, and under it what the limits are.
#[must_use]
pub(crate) fn render(rows: &[Row]) -> String {
    let width =
        rustix::termios::tcgetwinsize(rustix::stdio::stdout()).map_or(USUAL_WIDTH, |size| size.ws_col);
    let mut table = Table::new();
    table
        .load_preset(UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(width.max(MIN_WIDTH))
        .set_header([
            "row", "params", "median", "p99", "min", "max", "n", "unit", "limit", "target",
        ]);
    for row in rows {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
        table.add_row([
            row.name.clone(),
            params(row),
            short(row.median),
            number(row.p99),
            short(row.min),
            short(row.max),
            row.n.to_string(),
            row.unit.clone(),
            number(row.limit),
            row.verdict(),
        ]);
    }
    for column in [2, 3, 4, 5, 6, 8] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = table.to_string();
    text.push_str("\n\nLimits, measured in the same run:\n");
    let mut said = Vec::new();
    for row in rows.iter().filter(|row| !row.limit_is.is_empty()) {
        let note = (&row.name, &row.limit_is);
        if !said.contains(&note) {
            let _ = writeln!(text, "  {}: {}", row.name, row.limit_is);
            said.push(note);
        }
    }
    text
}

fn params(row: &Row) -> String {
    let word = |(name, value): (&String, &Value)| match value {
        Value::String(text) => format!("{name}={text}"),
        other => format!("{name}={other}"),
    };
    row.params.iter().map(word).collect::<Vec<_>>().join(" ")
}
