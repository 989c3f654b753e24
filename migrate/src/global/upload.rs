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

/// Stores `tip` and what it stands on, as far as that is not there: what `newest` (the newest point there) has is taken
/// up, as long as the chain has no more than `max_links` links then.
///
/// # Errors
/// [`GlobalError`]; every restore point that was there is as it was.
pub async fn upload(
    bucket: &Bucket,
    store: &Arc<FsStore>,
    tip: &Held,
    newest: Option<&ChainRecord>,
    max_links: u32,
    within: Duration,
    pace: &Pace,
) -> Result<Uploaded, GlobalError> {
    let started = boottime();
    // Nothing of it is merged or dropped meanwhile.
    let whole = |source| GlobalError::Chain {
        name: tip.name.clone(),
        source: Box::new(source),
    };
    let lease = store.lease(&tip.name).map_err(whole)?;
    let chain = store.chain(&tip.name).map_err(whole)?;
    if chain
        .last()
        .is_none_or(|entry| entry.checkpoint != tip.checkpoint)
    {
        return Err(GlobalError::Changed {
            name: tip.name.clone(),
        });
    }
    let (mut links, rest) = plan(&chain, newest, max_links);
    let upload = new_upload();
    let (mut segments, mut bytes) = (0, 0);
    for entry in rest {
        let link = LinkRecord::of(entry, upload);
        send(bucket, store, entry, &link, pace).await?;
        segments += 1;
        bytes += entry.bytes;
        links.push(link);
    }
    drop(lease);
    let unfit = |why: String| GlobalError::Damaged {
        object: tip.name.to_string(),
        place: "of this agent".into(),
        why,
    };
    let chain = ChainRecord::new(links).map_err(unfit)?;
    // What it takes up, and its own parts that nothing names yet, are there for as long as this: see `collect`.
    if boottime().saturating_sub(started) >= within {
        return Err(GlobalError::TooSlow {
            name: tip.name.clone(),
        });
    }
    // Of another's, the parts that were sent here are nobody's.
    let (chain, made) = bucket.put_point(chain).await?;
    Ok(Uploaded {
        chain,
        segments,
        bytes,
        made,
    })
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

/// One link's file, checked before it is sent: what is damaged here shall not be what outlives it.
async fn send(
    bucket: &Bucket,
    store: &Arc<FsStore>,
    entry: &Entry,
    link: &LinkRecord,
    pace: &Pace,
) -> Result<(), GlobalError> {
    let (of, expected, paced) = (store.clone(), entry.clone(), pace.clone());
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
    for part in 0..parts(entry.bytes) {
        let (pace, name, length) = (pace.clone(), entry.name.clone(), part_bytes(entry.bytes, part));
        let read = blocking(move || {
            pace.spend(length).map_err(|_| GlobalError::Stopped)?;
            let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
            read(&file, part, &mut piece).map_err(|_| GlobalError::Changed { name })?;
            Ok((file, piece))
        });
        let piece;
        (file, piece) = read.await?;
        bucket.put_part(link, part, piece).await?;
    }
    Ok(())
}

fn read(file: &File, part: u64, piece: &mut [u8]) -> std::io::Result<()> {
    ReadAt::read_exact_at(file, part * PART_BYTES, piece)
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, GlobalError> + Send + 'static,
) -> Result<T, GlobalError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => Err(GlobalError::Stopped),
    }
}
