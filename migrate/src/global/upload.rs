//! A committed checkpoint, with all it stands on, into the global store.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use segment::{ReadAt, SegmentReader};

use super::bucket::{new_upload, part_bytes, parts};
use super::{Bucket, ChainRecord, GlobalError, LinkRecord, PART_BYTES};
use crate::clock::boottime;
use crate::store::{Entry, FsStore, Pace, StoreError};
use crate::wire::Held;

/// What an upload did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    /// The restore point, as it is there.
    pub chain: ChainRecord,
    /// Segments that were stored for it.
    pub segments: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Whether this upload made the point: another may have.
    pub made: bool,
}

/// What an upload that did not come to its end has stored: the next one goes on from there.
#[derive(Debug, Clone, Default)]
pub struct Begun(Vec<Sent>);

/// A link whose parts are on their way.
#[derive(Debug, Clone)]
struct Sent {
    link: LinkRecord,
    /// Of its first so many parts it is known that they are there.
    parts: u64,
    /// When the first of them was begun.
    since: Duration,
}

impl Begun {
    /// What was begun of this segment; or it begins now, as a part of `upload`.
    fn of(&mut self, entry: &Entry, upload: [u8; 16]) -> &mut Sent {
        let found = self
            .0
            .iter()
            .position(|sent| sent.link == LinkRecord::of(entry, sent.link.upload));
        let at = found.unwrap_or_else(|| {
            self.0.push(Sent {
                link: LinkRecord::of(entry, upload),
                parts: 0,
                since: boottime(),
            });
            self.0.len() - 1
        });
        &mut self.0[at]
    }

    /// Forgets what is too old to become part of a point in time.
    fn retain(&mut self, now: Duration, within: Duration) {
        self.0.retain(|sent| now.saturating_sub(sent.since) < within);
    }
}

/// Uploads checkpoints of a store.
#[derive(Debug, Clone, Copy)]
pub struct Uploader<'a> {
    /// To there.
    pub bucket: &'a Bucket,
    /// From here.
    pub store: &'a Arc<FsStore>,
    /// The longest chain that an upload takes up.
    pub max_links: u32,
    /// A point is made so long after the first of its parts was begun, or not at all: see `collect`.
    pub within: Duration,
    /// How fast.
    pub pace: &'a Pace,
}

impl Uploader<'_> {
    /// Stores `tip` and what it stands on, as far as that is not there: what `newest` (the newest point there) has is taken
    /// up, as long as the chain has no more than `max_links` links then, and so is what an earlier try has `begun`.
    ///
    /// # Errors
    /// [`GlobalError`]; every restore point that was there is as it was.
    pub async fn upload(
        &self,
        tip: &Held,
        newest: Option<&ChainRecord>,
        begun: &mut Begun,
    ) -> Result<Uploaded, GlobalError> {
        let now = boottime();
        // The other half is left for what is not there yet.
        begun.retain(now, self.within / 2);
        // Nothing of it is merged or dropped meanwhile.
        let whole = |source| GlobalError::Chain {
            name: tip.name.clone(),
            source: Box::new(source),
        };
        let lease = self.store.lease(&tip.name).map_err(whole)?;
        let chain = self.store.chain(&tip.name).map_err(whole)?;
        if chain
            .last()
            .is_none_or(|entry| entry.checkpoint != tip.checkpoint)
        {
            return Err(GlobalError::Changed {
                name: tip.name.clone(),
            });
        }
        let (mut links, rest) = plan(&chain, newest, self.max_links);
        let upload = new_upload();
        let (mut started, mut bytes) = (now, 0);
        for entry in rest {
            let sent = begun.of(entry, upload);
            started = started.min(sent.since);
            bytes += self.send(entry, sent).await?;
            links.push(sent.link.clone());
        }
        drop(lease);
        let unfit = |why: String| GlobalError::Damaged {
            object: tip.name.to_string(),
            place: "of this agent".into(),
            why,
        };
        let chain = ChainRecord::new(links).map_err(unfit)?;
        // What it takes up, and its own parts that nothing names yet, are there for as long as this: see `collect`.
        if boottime().saturating_sub(started) >= self.within {
            *begun = Begun::default();
            return Err(GlobalError::TooSlow {
                name: tip.name.clone(),
            });
        }
        // Of another's, the parts that were sent here are nobody's.
        let (chain, made) = self.bucket.put_point(chain).await?;
        *begun = Begun::default();
        Ok(Uploaded {
            chain,
            segments: rest.len() as u64,
            bytes,
            made,
        })
    }

    /// The parts of one link's file that are not there, checked before they are sent: what is damaged here shall not be
    /// what outlives it. How many bytes those were.
    async fn send(&self, entry: &Entry, sent: &mut Sent) -> Result<u64, GlobalError> {
        let all = parts(entry.bytes);
        if sent.parts == all {
            return Ok(0);
        }
        let (of, expected, paced) = (self.store.clone(), entry.clone(), self.pace.clone());
        let opened = blocking(move || {
            let (file, there) = of.open_raw(&expected.name)?;
            if there != expected {
                return Err(GlobalError::Changed { name: expected.name });
            }
            let damaged = |source| {
                GlobalError::Store(StoreError::Damaged {
                    name: expected.name.clone(),
                    source,
                })
            };
            let reader = SegmentReader::open(paced.of(&file)).map_err(damaged)?;
            reader.verify().map_err(damaged)?;
            drop(reader);
            Ok(file)
        });
        let mut file = opened.await?;
        let mut bytes = 0;
        for part in sent.parts..all {
            let (pace, name, length) = (
                self.pace.clone(),
                entry.name.clone(),
                part_bytes(entry.bytes, part),
            );
            let read = blocking(move || {
                pace.spend(length).map_err(|_| GlobalError::Stopped)?;
                let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
                read(&file, part, &mut piece).map_err(|_| GlobalError::Changed { name })?;
                Ok((file, piece))
            });
            let piece;
            (file, piece) = read.await?;
            self.bucket.put_part(&sent.link, part, piece).await?;
            sent.parts = part + 1;
            bytes += length;
        }
        Ok(bytes)
    }
}

/// The links that are there already, and the entries that are not: pure. The newest link of `chain` that `newest` has
/// too, by name and checkpoint, is built on.
pub(super) fn plan<'a>(
    chain: &'a [Entry],
    newest: Option<&ChainRecord>,
    max_links: u32,
) -> (Vec<LinkRecord>, &'a [Entry]) {
    let there = newest.map(ChainRecord::links).unwrap_or_default();
    for (i, entry) in chain.iter().enumerate().rev() {
        let found = there
            .iter()
            .position(|link| link.name == entry.name && link.checkpoint == entry.checkpoint);
        let Some(at) = found else { continue };
        let rest = &chain[i + 1..];
        if at + 1 + rest.len() <= max_links as usize {
            return (there[..=at].to_vec(), rest);
        }
        break;
    }
    (Vec::new(), chain)
}

fn read(file: &File, part: u64, piece: &mut [u8]) -> std::io::Result<()> {
    ReadAt::read_exact_at(file, part * PART_BYTES, piece)
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, GlobalError> + Send + 'static,
) -> Result<T, GlobalError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => Err(GlobalError::Stopped),
    }
}
