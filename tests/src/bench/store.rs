//! How long a store takes to have a segment for good.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use migrate::store::{Durability, FsStore};

use super::lab::Lab;
use super::limits::{self, Random, timed};
use super::pages::{self, Bytes};
use super::row::Row;
use super::stats::Samples;
use vmm::memory::PAGE_BYTES;

const NAME: &str = "store.put_ms";
/// Random pages of a segment: about 100 KB.
const PAGES: usize = 24;
/// Beside the bare write: twice its time would be a store that syncs everything twice.
const SHARE: f64 = 1.25;

pub(crate) fn measure(lab: &Lab) -> Result<Vec<Row>> {
    let folder = lab.temporary("holder-")?;
    let bare = lab.temporary("limit-")?;
    let store = FsStore::open(folder.path(), None, Durability::Durable).context("open a store")?;
    let bytes = Bytes(Random(1).bytes(PAGES * PAGE_BYTES).into());
    let (mut times, mut limit, mut length) = (Samples::default(), Samples::default(), 0);
    for epoch in 1..=lab.samples(200, 20) as u64 {
        let name = pages::name("put", epoch)?;
        let segment = pages::segment(&name, &bytes)?;
        length = segment.len();
        // In turn, as a disk's speed drifts.
        limit.push_ms(limits::put(bare.path(), &format!("{epoch}.seg"), &segment)?);
        let put = || -> Result<()> {
            let mut incoming = store
                .begin(&name, segment.len() as u64)
                .context("begin a segment")?;
            incoming.write_all(&segment).context("write a segment")?;
            incoming.commit().context("commit a segment")?;
            Ok(())
        };
        let (done, time) = timed(put);
        done?;
        times.push_ms(time);
    }
    let row = Row::new(NAME, "ms", &times)?
        .limit(
            limit.median(),
            "write, sync, rename, sync the folder, and nothing else",
        )
        .at_most_of_limit(SHARE)
        .tail(&times)
        .param("bytes", length)
        .param("disk", lab.disk());
    Ok(vec![row])
}
