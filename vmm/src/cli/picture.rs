//! A picture of guest memory: a map of what a checkpoint holds, and for a chain what each of its links changed.
//!
//! ```text
//! title
//! map       a cell is a few pages, row after row from address 0; its colour says what they are and how many of them
//! strips    only of a chain: a row is a link (or some), the oldest above; from left to right the memory
//! legend
//! ```
//!
//! What it never does: it shows where something is, never what.

use std::io;

use font8x8::{BASIC_FONTS, UnicodeFonts};
use segment::{FormatError, FrameBuf, Page, ReadAt, SegmentReader, Space, SpaceId};

use super::size;

/// Cells of a row of the map.
const COLUMNS: usize = 128;
/// The most rows of the map.
const MAX_ROWS: u64 = 96;
/// Pixels of a cell, both ways.
const CELL: usize = 6;
/// The most strips; a longer chain has several links in one.
const MAX_STRIPS: usize = 120;
/// Pixels around everything, and left of it for the labels.
const MARGIN: usize = 16;
const LABELS: usize = 96;
const LETTER: usize = 8;
const LINE: usize = 14;
const WIDTH: usize = LABELS + COLUMNS * CELL + MARGIN;
/// The largest memory that a picture is made of: 16 TiB of pages of 4 KiB, a byte each.
const MAX_PAGES: u64 = 1 << 32;

type Colour = [u8; 3];

const PAPER: Colour = [255, 255, 255];
const INK: Colour = [40, 40, 48];
const ZERO: Colour = [238, 238, 240];
const BECAME_ZERO: Colour = [80, 190, 200];
/// From few of a cell's pages to all of them.
const HELD: [Colour; 2] = [[205, 216, 235], [38, 70, 128]];
const CHANGED: [Colour; 3] = [[255, 224, 130], [240, 110, 40], [140, 0, 20]];

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub(super) enum PictureError {
    /// The segment has no guest memory.
    #[error("it has no guest memory to make a picture of")]
    NoMemory,
    /// It has too much.
    #[error("its memory has {pages} pages, and a picture is made of {MAX_PAGES} at most")]
    TooLarge {
        /// How many.
        pages: u64,
    },
    /// A link could not be read.
    #[error("read {name}")]
    Read {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: FormatError,
    },
    /// The picture could not be packed.
    #[error("make the picture")]
    Encode(#[source] png::EncodingError),
}

/// What is known of a page; each link may raise it.
const PAGE_HELD: u8 = 1;
const PAGE_CHANGED: u8 = 2;
const PAGE_ZEROED: u8 = 3;

/// One link: its name, and how many pages of each column it changed.
struct Strip {
    name: String,
    changed: Vec<u32>,
}

/// What is drawn.
struct Scene {
    title: String,
    space: Space,
    /// Whether the oldest link is full: then what no link has is zero.
    full: bool,
    pages: Vec<u8>,
    strips: Vec<Strip>,
}

/// The PNG of `links`, oldest first: of one segment, or of a chain.
pub(super) fn png<R: ReadAt>(links: &[SegmentReader<R>]) -> Result<Vec<u8>, PictureError> {
    Scene::of(links)?.draw().encode().map_err(PictureError::Encode)
}

impl Scene {
    fn of<R: ReadAt>(links: &[SegmentReader<R>]) -> Result<Self, PictureError> {
        let (Some(oldest), Some(newest)) = (links.first(), links.last()) else {
            return Err(PictureError::NoMemory);
        };
        let space = newest
            .manifest()
            .space(SpaceId::MEMORY)
            .cloned()
            .ok_or(PictureError::NoMemory)?;
        if space.pages > MAX_PAGES {
            return Err(PictureError::TooLarge { pages: space.pages });
        }
        let mut scene = Self {
            title: String::new(),
            full: oldest.manifest().kind.is_full(),
            pages: vec![0; space.pages as usize],
            strips: Vec::with_capacity(links.len()),
            space,
        };
        let mut buf = FrameBuf::new();
        for link in links {
            scene.add(link, &mut buf).map_err(|source| PictureError::Read {
                name: link.manifest().name.to_string(),
                source,
            })?;
        }
        let bytes = size::show_bytes(scene.space.bytes());
        scene.title = match links.len() {
            1 if scene.full => format!("{}: memory of {bytes}, full checkpoint", newest.manifest().name),
            1 => format!("{}: memory of {bytes}, what changed", newest.manifest().name),
            n => format!(
                "{} to {}: memory of {bytes}, {n} checkpoints",
                oldest.manifest().name,
                newest.manifest().name
            ),
        };
        Ok(scene)
    }

    fn add<R: ReadAt>(&mut self, link: &SegmentReader<R>, buf: &mut FrameBuf) -> Result<(), FormatError> {
        let full = link.manifest().kind.is_full();
        let mut changed = vec![0; COLUMNS];
        let end = segment::PageIndex(self.space.pages);
        for i in link.frames_in(SpaceId::MEMORY, segment::PageIndex(0)..end) {
            for (page, content) in link.read_frame(i, buf)?.pages() {
                // Inside: the reader checks every page against its manifest; a link with more pages is not of a chain.
                let Some(known) = self.pages.get_mut(page.0 as usize) else {
                    continue;
                };
                *known = match content {
                    Page::Zero => PAGE_ZEROED,
                    Page::Data(_) | Page::Change { .. } if full => PAGE_HELD,
                    Page::Data(_) | Page::Change { .. } => PAGE_CHANGED,
                };
                let column = u128::from(page.0) * COLUMNS as u128 / u128::from(self.space.pages.max(1));
                changed[column as usize] += 1;
            }
        }
        self.strips.push(Strip {
            name: link.manifest().name.to_string(),
            changed,
        });
        Ok(())
    }

    /// Pages of one cell of the map.
    fn cell_pages(&self) -> u64 {
        // A power of two, so that rows begin at round addresses.
        self.space
            .pages
            .div_ceil(COLUMNS as u64 * MAX_ROWS)
            .next_power_of_two()
    }

    fn draw(&self) -> Canvas {
        let cells = self.space.pages.div_ceil(self.cell_pages()) as usize;
        let rows = cells.div_ceil(COLUMNS).max(1);
        let (per_strip, strips) = self.strip_count();
        let strip = 360usize
            .checked_div(strips)
            .map_or(0, |height| height.clamp(3, 14));
        let map_top = MARGIN + 2 * LINE;
        let strips_top = map_top + rows * CELL + 3 * LINE;
        let legend_top = if strips == 0 {
            map_top + rows * CELL + LINE
        } else {
            strips_top + strips * strip + 2 * LINE
        };
        let mut canvas = Canvas::new(WIDTH, legend_top + self.legend_lines() * LINE + MARGIN);
        canvas.text(MARGIN, MARGIN, &self.title);
        self.draw_map(&mut canvas, map_top, rows);
        if strips > 0 {
            self.draw_strips(&mut canvas, strips_top, strip, per_strip);
        }
        self.draw_legend(&mut canvas, legend_top, strips > 0);
        canvas
    }

    /// How many links go into one strip, and how many strips there are.
    fn strip_count(&self) -> (usize, usize) {
        if self.strips.len() < 2 {
            return (1, 0);
        }
        // The full link is in the map: a strip of it would be one block.
        let links = self.strips.len() - usize::from(self.full);
        let per = links.div_ceil(MAX_STRIPS).max(1);
        (per, links.div_ceil(per))
    }

    /// As many lines as [`Self::draw_legend`] writes.
    fn legend_lines(&self) -> usize {
        match (self.full, self.strips.len() > 1) {
            (true, false) => 3,
            (false, _) => 4,
            (true, true) => 5,
        }
    }

    fn draw_map(&self, canvas: &mut Canvas, top: usize, rows: usize) {
        let per_cell = self.cell_pages() as usize;
        for (at, pages) in self.pages.chunks(per_cell).enumerate() {
            let (x, y) = (LABELS + at % COLUMNS * CELL, top + at / COLUMNS * CELL);
            canvas.fill(x, y, CELL, CELL, cell_colour(pages));
        }
        let row_bytes = (COLUMNS * per_cell) as u64 * u64::from(self.space.page_bytes);
        for row in (0..rows).step_by((rows / 8).max(2)) {
            let label = size::show_bytes(row as u64 * row_bytes);
            canvas.label(top + row * CELL, &label);
        }
    }

    fn draw_strips(&self, canvas: &mut Canvas, top: usize, height: usize, per_strip: usize) {
        canvas.text(
            MARGIN,
            top - 2 * LINE,
            "What each checkpoint changed: the oldest above, from left to right the memory from its begin to its end",
        );
        let pages_of_column = self.space.pages as f64 / COLUMNS as f64;
        let links = &self.strips[usize::from(self.full)..];
        let mut free = 0;
        for (at, strip) in links.chunks(per_strip).enumerate() {
            let y = top + at * height;
            for column in 0..COLUMNS {
                let changed: u32 = strip.iter().map(|link| link.changed[column]).sum();
                let share = f64::from(changed) / (pages_of_column * strip.len() as f64).max(1.0);
                let colour = if changed == 0 { ZERO } else { ramp(&CHANGED, share) };
                canvas.fill(LABELS + column * CELL, y, CELL, height.saturating_sub(1), colour);
            }
            if y >= free {
                // `web/1/42` without the VM's name, which is in the title.
                let name = strip.first().map_or("", |link| link.name.as_str());
                canvas.label(y, name.split_once('/').map_or(name, |(_, rest)| rest));
                free = y + LINE;
            }
        }
        let end = top + links.len().div_ceil(per_strip) * height;
        for quarter in 0..=4usize {
            let label = size::show_bytes(self.space.bytes() / 4 * quarter as u64);
            let x = LABELS + quarter * COLUMNS * CELL / 4;
            let back = [0, 1, 1, 1, 2][quarter] * label.len() * LETTER / 2;
            canvas.text(x - back, end + 4, &label);
        }
    }

    fn draw_legend(&self, canvas: &mut Canvas, top: usize, chain: bool) {
        let cell = size::show_bytes(self.cell_pages() * u64::from(self.space.page_bytes));
        let block = size::show_bytes(self.space.bytes() / COLUMNS as u64);
        let of_strips = if chain {
            format!(", a block of a strip {block}")
        } else {
            String::new()
        };
        canvas.text(
            MARGIN,
            top,
            &format!("A cell of the map is {cell}{of_strips}. Its colour:"),
        );
        let mut line = top + LINE + 4;
        let mut entry = |colours: &[Colour], text: &str| {
            for step in 0..12 {
                let colour = ramp(colours, step as f64 / 11.0);
                canvas.fill(MARGIN + step * 6, line, 6, LETTER, colour);
            }
            canvas.text(MARGIN + 84, line, text);
            line += LINE;
        };
        let since = if chain { " and unchanged since" } else { "" };
        if self.full {
            let strips = if chain { "; in a strip: unchanged" } else { "" };
            entry(&[ZERO], &format!("zero, or never written{strips}"));
            entry(
                &HELD,
                &format!("has content{since}: from a few of its pages (left) to all of them (right)"),
            );
        } else {
            entry(&[ZERO], "unchanged");
        }
        if chain || !self.full {
            entry(
                &CHANGED,
                "changed: from a few of its pages (left) to all of them (right)",
            );
            entry(&[BECAME_ZERO], "became zero");
        }
    }
}

/// The colour of some pages.
fn cell_colour(pages: &[u8]) -> Colour {
    let count = |what: u8| pages.iter().filter(|page| **page == what).count();
    let share = |n: usize| n as f64 / pages.len().max(1) as f64;
    let (held, changed, zeroed) = (count(PAGE_HELD), count(PAGE_CHANGED), count(PAGE_ZEROED));
    match (changed, zeroed, held) {
        (0, 0, 0) => ZERO,
        (0, 0, held) => ramp(&HELD, share(held)),
        (0, _, _) => BECAME_ZERO,
        (changed, _, _) => ramp(&CHANGED, share(changed)),
    }
}

/// The colour at a place from 0 to 1 between `colours`.
fn ramp(colours: &[Colour], at: f64) -> Colour {
    let last = colours.len().saturating_sub(1);
    let at = at.clamp(0.0, 1.0) * last as f64;
    let low = (at as usize).min(last.saturating_sub(1));
    let (a, b) = (colours[low], colours[(low + 1).min(last)]);
    let part = at - low as f64;
    [0, 1, 2].map(|c| (f64::from(a[c]) + (f64::from(b[c]) - f64::from(a[c])) * part).round() as u8)
}

/// Pixels.
struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            pixels: PAPER.repeat(width * height),
        }
    }

    /// Fills a rectangle, as far as it is inside.
    fn fill(&mut self, x: usize, y: usize, width: usize, height: usize, colour: Colour) {
        let end = (x + width).min(self.width);
        for row in y..(y + height).min(self.height) {
            for column in x..end {
                self.pixels[(row * self.width + column) * 3..][..3].copy_from_slice(&colour);
            }
        }
    }

    fn text(&mut self, x: usize, y: usize, text: &str) {
        for (at, letter) in text.chars().enumerate() {
            let Some(glyph) = BASIC_FONTS.get(letter) else {
                continue;
            };
            for (row, bits) in glyph.iter().enumerate() {
                for column in (0..LETTER).filter(|column| bits & (1 << column) != 0) {
                    self.fill(x + at * LETTER + column, y + row, 1, 1, INK);
                }
            }
        }
    }

    /// Text that ends left of the map.
    fn label(&mut self, y: usize, text: &str) {
        let width = text.chars().count() * LETTER;
        self.text((LABELS - 6).saturating_sub(width), y, text);
    }

    fn encode(&self) -> Result<Vec<u8>, png::EncodingError> {
        let mut out = io::Cursor::new(Vec::new());
        // At most a few thousand pixels each way.
        let mut encoder = png::Encoder::new(&mut out, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(out.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_say_what_pages_are() {
        assert_eq!(cell_colour(&[0, 0, 0, 0]), ZERO);
        assert_eq!(cell_colour(&[PAGE_HELD; 4]), HELD[1]);
        assert_eq!(cell_colour(&[PAGE_CHANGED; 4]), CHANGED[2]);
        assert_eq!(cell_colour(&[PAGE_HELD, PAGE_ZEROED]), BECAME_ZERO);
        // One changed page is seen among many that are not.
        assert_ne!(
            cell_colour(&[PAGE_HELD, PAGE_HELD, PAGE_CHANGED]),
            cell_colour(&[PAGE_HELD; 3])
        );
        assert_eq!(ramp(&CHANGED, 0.5), CHANGED[1]);
        assert_eq!(ramp(&[ZERO], 0.7), ZERO);
    }

    #[test]
    fn any_size_of_memory_is_drawn_within_bounds() {
        for (pages, links) in [(1, 1), (127, 2), (32_768, 300), (1 << 20, 2000)] {
            let strip = |n: usize| Strip {
                name: format!("web/1/{n}"),
                changed: vec![n as u32 % 3; COLUMNS],
            };
            let space = Space {
                id: SpaceId::MEMORY,
                name: "memory".into(),
                page_bytes: 4096,
                pages,
            };
            let scene = Scene {
                title: "t".into(),
                full: links % 2 == 0,
                pages: vec![PAGE_HELD; pages as usize],
                strips: (0..links).map(strip).collect(),
                space,
            };
            let canvas = scene.draw();
            assert!(canvas.height < 1400, "{} pixels high", canvas.height);
            assert!(!canvas.encode().unwrap().is_empty());
        }
    }
}
