//! A restore point out of the global store, into a local one; and looking whether one is whole there.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;

use segment::{FormatError, Generation, SegmentName, SegmentReader};

use super::bucket::{part_bytes, parts};
use super::upload::blocking;
use super::{Bucket, ChainRecord, GlobalError, LinkRecord, Remote};
use crate::store::{FsStore, Incoming, StoreError, Stored};
use crate::transport::in_full;
use crate::wire::Held;

/// Brings the links of `chain` here, the full one first, on behalf of an owner of `generation`. What is here of it as
/// the same checkpoint stays; returns what had to be replaced, in words.
///
/// # Errors
/// [`GlobalError`]; what came until then is whole, and stays.
pub async fn fetch(
    bucket: &Bucket,
    store: &Arc<FsStore>,
    chain: &ChainRecord,
    generation: Generation,
) -> Result<Vec<String>, GlobalError> {
    let mut replaced = Vec::new();
    let mut leases = Vec::new();
    // What is whole here as the same checkpoint is as good, whatever links it has.
    let whole = |link: &LinkRecord| {
        let held = store.get(&link.name);
        held.is_some_and(|entry| entry.checkpoint == link.checkpoint) && store.chain(&link.name).is_ok()
    };
    let here = chain.links().iter().rposition(whole);
    let mut below = here.map(|i| &chain.links()[i]);
    leases.extend(below.and_then(|link| store.lease(&link.name).ok()));
    for link in &chain.links()[here.map_or(0, |i| i + 1)..] {
        if let Some(entry) = store.get(&link.name) {
            // Of a chain that is not whole here only what stands on the same links is of use.
            let stands = entry.parent().map(|(name, id)| (name.clone(), id));
            let wanted = below.map(|below| (below.name.clone(), below.checkpoint));
            if entry.checkpoint != link.checkpoint && store.chain(&link.name).is_ok() {
                // Whole here: the store's word is not enough to take it away, nor what stands on it.
                return Err(GlobalError::DuplicateName {
                    name: link.name.clone(),
                    place: "this agent's store".into(),
                    held: entry.checkpoint,
                    offered: link.checkpoint,
                });
            }
            if entry.checkpoint != link.checkpoint || stands != wanted {
                let (of, name) = (store.clone(), link.name.clone());
                blocking(move || Ok(of.set_aside(&name)?)).await?;
                replaced.push(format!("{} was replaced by the copy of {bucket}", link.name));
            }
        }
        if store.get(&link.name).is_none() {
            let stored = receive(bucket, store, link, generation).await?;
            let entry = stored.entry();
            let stands = entry.parent().map(|(name, id)| (name.clone(), id));
            let wanted = below.map(|below| (below.name.clone(), below.checkpoint));
            let lie = if entry.checkpoint != link.checkpoint || entry.digest != link.digest {
                Some("it is not the segment that the restore point names")
            } else if stands != wanted {
                Some("it does not stand on the link before it")
            } else {
                None
            };
            if let Some(why) = lie {
                let (of, name) = (store.clone(), link.name.clone());
                blocking(move || Ok(of.set_aside(&name)?)).await?;
                return Err(damaged(bucket, link, why.to_owned()));
            }
            tracing::info!(name = %link.name, bytes = link.bytes, from = %bucket, "fetched");
        }
        // None is collected before what stands on it is here.
        leases.extend(store.lease_parent(&link.name));
        below = Some(link);
    }
    let tip = chain.tip();
    store.chain(&tip.name).map_err(|source| GlobalError::Chain {
        name: tip.name.clone(),
        source: Box::new(source),
    })?;
    Ok(replaced)
}

fn damaged(bucket: &Bucket, link: &LinkRecord, why: String) -> GlobalError {
    GlobalError::Damaged {
        object: link.name.to_string(),
        place: bucket.to_string(),
        why,
    }
}

/// One link's file: verified, and stored durably.
async fn receive(
    bucket: &Bucket,
    store: &Arc<FsStore>,
    link: &LinkRecord,
    generation: Generation,
) -> Result<Stored, GlobalError> {
    let (of, name, bytes) = (store.clone(), link.name.clone(), link.bytes);
    let mut incoming: Incoming = blocking(move || Ok(of.begin_under(&name, bytes, generation)?)).await?;
    for part in 0..parts(link.bytes) {
        let piece = bucket
            .read_part(link, part, 0..part_bytes(link.bytes, part))
            .await?;
        let name = link.name.clone();
        incoming = blocking(move || match incoming.write_all(&piece) {
            Ok(()) => Ok(incoming),
            Err(source) => Err(match incoming.take_failure() {
                Some(error) => error.into(),
                None => StoreError::Io {
                    what: "write",
                    path: name.to_string().into(),
                    source,
                }
                .into(),
            }),
        })
        .await?;
    }
    let committed = blocking(move || Ok(incoming.commit()?)).await;
    committed.map_err(|error| match error {
        // What came is bad, not the store here.
        GlobalError::Store(error @ (StoreError::Damaged { .. } | StoreError::OtherName { .. })) => {
            damaged(bucket, link, in_full(&error))
        }
        error => error,
    })
}

/// Links that were read whole and found good, and what each stands on: several points have them in common.
#[derive(Debug, Default)]
pub struct Checked(HashMap<([u8; 16], SegmentName), (Option<Held>, u64)>);

impl Checked {
    /// How many.
    #[must_use]
    pub fn segments(&self) -> u64 {
        self.0.len() as u64
    }

    /// How many bytes they have.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.values().map(|(_, bytes)| bytes).sum()
    }
}

/// Reads every byte of a restore point's links that was not read before, and checks them, each by itself and against
/// the chain.
///
/// # Errors
/// The first thing that is not right.
pub async fn verify(bucket: &Bucket, chain: &ChainRecord, checked: &mut Checked) -> Result<(), GlobalError> {
    let remote = Remote::new(bucket.clone())?;
    let (of, chain, mut done) = (bucket.clone(), chain.clone(), std::mem::take(checked));
    let work = blocking(move || {
        let result = verify_links(&of, &remote, &chain, &mut done);
        Ok((done, result))
    });
    let result;
    (*checked, result) = work.await?;
    result
}

fn verify_links(
    bucket: &Bucket,
    remote: &Remote,
    chain: &ChainRecord,
    checked: &mut Checked,
) -> Result<(), GlobalError> {
    let mut below: Option<&LinkRecord> = None;
    for link in chain.links() {
        let stands = below.map(LinkRecord::held);
        below = Some(link);
        let key = (link.upload, link.name.clone());
        if checked
            .0
            .get(&key)
            .is_some_and(|(on, bytes)| *on == stands && *bytes == link.bytes)
        {
            continue;
        }
        let unreadable = |e: FormatError| match e {
            // Not what is there, but that it was not reached: the source says so itself.
            FormatError::Io { source, .. } if source.get_ref().is_some_and(|e| e.is::<GlobalError>()) => {
                let inner = source.into_inner().and_then(|e| e.downcast::<GlobalError>().ok());
                inner.map_or(GlobalError::Stopped, |error| *error)
            }
            e => damaged(bucket, link, in_full(&e)),
        };
        let reader = SegmentReader::open(remote.file(link)).map_err(unreadable)?;
        remote.check_link(link, stands.as_ref(), reader.manifest(), reader.digest())?;
        reader.verify().map_err(unreadable)?;
        checked.0.insert(key, (stands, link.bytes));
    }
    Ok(())
}
