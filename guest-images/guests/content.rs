//! What the pages of `churn` hold: a pure function of seed, page number and write count.
//!
//! ```text
//! words 0..8     stamp: magic, seed, page, write count, kind, checksum, !page, !write count
//! words 8..512   nine chunks of 56 words
//! ```
//!
//! Writes of a page are numbered from 1. Sixteen of them in a row form a generation: its first write picks the
//! page's kind by the mix and writes the whole page; each later write replaces the stamp and one chunk (448 of
//! 4096 bytes, contiguous, the next one round each time), so consecutive versions differ in about an eighth of
//! the page and a delta has something to find. A page of kind zero holds only zeros, stamp included, and its
//! later writes store zeros again: dirty, but not changed.
//!
//! Because every chunk knows from the write count alone which write made it, any version can be produced
//! without the earlier ones. The checksum is computed from that, never from memory, so a page that went bad
//! is not sealed as good.

pub(crate) const PAGE_BYTES: u64 = 4096;
pub(crate) const PAGE_WORDS: usize = 512;
const STAMP_WORDS: usize = 8;
const CHUNKS: u32 = 9;
const CHUNK_WORDS: usize = 56;
const GENERATION: u32 = 16;

const MAGIC: u64 = u64::from_le_bytes(*b"CHURNPG1");
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Four-letter pieces that text-like pages are made of.
const SYLLABLES: [[u8; 4]; 64] = [
    *b"the ", *b"and ", *b"of a", *b" to ", *b"in t", *b"he s", *b"tion", *b"ing ", *b"ment", *b"ed t",
    *b"er, ", *b"that", *b" is ", *b"was ", *b"for ", *b"it w", *b"as h", *b"is p", *b"re-c", *b"onve",
    *b"rsat", *b"ion\n", *b"page", *b"memo", *b"ry: ", *b"stan", *b"dby ", *b"host", *b"ship", *b"ped ",
    *b"chec", *b"kpoi", *b"nt. ", *b"virt", *b"ual ", *b"mach", *b"ine ", *b"run ", *b"slow", *b"ly, ",
    *b"with", *b"out ", *b"loss", *b"es; ", *b"key=", *b"valu", *b"e 0x", *b"1234", *b"5678", *b"90, ",
    *b"true", *b"fals", *b"e = ", *b"null", *b" => ", *b"user", *b"name", *b"date", *b"2026", *b"-11-",
    *b"info", *b"warn", *b"erro", *b"r!\n\n",
];

/// What a page looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Zero = 0,
    Text = 1,
    Random = 2,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Text => "text",
            Self::Random => "random",
        }
    }
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Stamp,
    Content,
}

impl Fault {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stamp => "stamp",
            Self::Content => "content",
        }
    }
}

/// A bijection of 64 bits that leaves no pattern (the finalizer of SplitMix64).
pub(crate) fn mix64(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The two numbers that, with page and write count, determine all content.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe {
    seed: u64,
    /// Running totals of the shares of zero, text and random pages.
    bounds: [u64; 3],
}

impl Recipe {
    /// `mix` holds the shares of zero, text-like and random pages, not all zero.
    pub(crate) fn new(seed: u64, mix: [u32; 3]) -> Self {
        let [zero, text, random] = mix.map(u64::from);
        Self {
            seed,
            bounds: [zero, zero + text, zero + text + random],
        }
    }

    /// The page numbered `page` as its write number `count` (from 1) leaves it.
    pub(crate) fn version(&self, page: u64, count: u32) -> Version {
        let (generation, offset) = ((count - 1) / GENERATION, (count - 1) % GENERATION);
        let key = mix64(self.seed ^ mix64(page.wrapping_mul(GOLDEN) ^ u64::from(generation)));
        let draw = (u128::from(mix64(key)) * u128::from(self.bounds[2])) >> 64;
        let kind = match draw as u64 {
            draw if draw < self.bounds[0] => Kind::Zero,
            draw if draw < self.bounds[1] => Kind::Text,
            _ => Kind::Random,
        };
        Version {
            seed: self.seed,
            page,
            count,
            offset,
            key,
            kind,
        }
    }
}

/// One version of one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Version {
    seed: u64,
    page: u64,
    count: u32,
    /// Writes since the one that began the generation.
    offset: u32,
    key: u64,
    pub(crate) kind: Kind,
}

impl Version {
    /// The number of the write that leaves this version.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Hands `store(index, word)` every word in which this version may differ from the one before it.
    pub(crate) fn write(&self, store: impl FnMut(usize, u64)) {
        self.write_parts(self.offset == 0, store);
    }

    /// Hands `store(index, word)` every word of the page.
    pub(crate) fn write_whole(&self, store: impl FnMut(usize, u64)) {
        self.write_parts(true, store);
    }

    fn write_parts(&self, whole: bool, mut store: impl FnMut(usize, u64)) {
        let chunk = self.chunk_of(self.offset) as usize;
        let fresh = STAMP_WORDS + chunk * CHUNK_WORDS..STAMP_WORDS + (chunk + 1) * CHUNK_WORDS;
        let mut checksum = 0;
        self.body(|index, word| {
            checksum = fold(checksum, word);
            if whole || fresh.contains(&index) {
                store(index, word);
            }
        });
        for (index, word) in self.stamp(checksum).into_iter().enumerate() {
            store(index, word);
        }
    }

    /// Compares the page that `load(index)` reads with this version.
    pub(crate) fn check(&self, load: impl Fn(usize) -> u64) -> Result<(), Fault> {
        let mut checksum = 0;
        let mut difference = 0;
        self.body(|index, word| {
            checksum = fold(checksum, word);
            difference |= word ^ load(index);
        });
        if self
            .stamp(checksum)
            .into_iter()
            .enumerate()
            .any(|(index, word)| load(index) != word)
        {
            return Err(Fault::Stamp);
        }
        if difference != 0 {
            Err(Fault::Content)
        } else {
            Ok(())
        }
    }

    fn stamp(&self, checksum: u64) -> [u64; STAMP_WORDS] {
        let count = u64::from(self.count);
        match self.kind {
            Kind::Zero => [0; STAMP_WORDS],
            kind => [
                MAGIC,
                self.seed,
                self.page,
                count,
                kind as u64,
                checksum,
                !self.page,
                !count,
            ],
        }
    }

    /// The chunk that the write `offset` of this generation replaces.
    fn chunk_of(&self, offset: u32) -> u32 {
        ((self.key % u64::from(CHUNKS)) as u32 + offset) % CHUNKS
    }

    /// The offset of the last write that touched `chunk`.
    fn writer_of(&self, chunk: u32) -> u32 {
        let first = (chunk + CHUNKS - self.chunk_of(0)) % CHUNKS;
        match first {
            _ if first + CHUNKS <= self.offset => first + CHUNKS,
            _ if first <= self.offset => first,
            _ => 0,
        }
    }

    /// Hands out every word after the stamp, in order.
    fn body(&self, mut each: impl FnMut(usize, u64)) {
        for chunk in 0..CHUNKS {
            let key = mix64(self.key ^ u64::from(chunk << 8 | self.writer_of(chunk)).wrapping_mul(GOLDEN));
            let first = STAMP_WORDS + chunk as usize * CHUNK_WORDS;
            match self.kind {
                Kind::Zero => (0..CHUNK_WORDS).for_each(|at| each(first + at, 0)),
                Kind::Text => (0..CHUNK_WORDS).for_each(|at| each(first + at, text(nth(key, at)))),
                Kind::Random => (0..CHUNK_WORDS).for_each(|at| each(first + at, nth(key, at))),
            }
        }
    }
}

fn nth(key: u64, at: usize) -> u64 {
    mix64(key.wrapping_add((at as u64).wrapping_mul(GOLDEN)))
}

fn text(random: u64) -> u64 {
    let piece = |bits: u64| u64::from(u32::from_le_bytes(SYLLABLES[(bits & 63) as usize]));
    piece(random) | piece(random >> 6) << 32
}

fn fold(checksum: u64, word: u64) -> u64 {
    checksum.rotate_left(5).wrapping_add(word)
}
