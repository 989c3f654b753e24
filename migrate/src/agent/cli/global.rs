//! The options about a global store.

use std::time::Duration;

use clap::Args;

use crate::agent::GlobalOptions;
use crate::global::{GlobalAddr, GlobalArgs, Place};
use crate::store::KeepPolicy;

#[derive(Debug, Args)]
pub(super) struct Global {
    /// Where committed checkpoints are kept for when no node is left: s3://BUCKET/PREFIX of any S3-compatible store, or
    /// file:///FOLDER that every node sees. Give it to all holders of a VM.
    #[arg(long, value_name = "s3://..|file://..")]
    global: Option<GlobalAddr>,
    #[command(flatten)]
    args: GlobalArgs,
    /// How often the newest committed checkpoint of each VM is uploaded there.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = time)]
    global_every: Duration,
    /// Which restore points stay there, as with --keep.
    #[arg(long, value_name = "POLICY", default_value = "last=60,hourly=24,daily=7")]
    global_keep: KeepPolicy,
    /// How long what is not needed there stays: 10m at least. An upload has half as long.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = grace)]
    global_grace: Duration,
}

fn time(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time >= Duration::from_millis(100) => Ok(time),
        Ok(_) => Err("it has to be 100ms at least".into()),
        Err(e) => Err(format!("{e}: write it like 60s or 24h")),
    }
}

/// What an upload makes may need a last request that is as slow as requests may be.
fn grace(text: &str) -> Result<Duration, String> {
    const LEAST: Duration = Duration::from_secs(10 * 60);
    match time(text)? {
        grace if grace >= LEAST => Ok(grace),
        _ => {
            Err("it has to be 10m at least: an upload that is under way would lose what it has stored".into())
        }
    }
}

impl Global {
    pub(super) fn options(self) -> Option<GlobalOptions> {
        Some(GlobalOptions {
            place: Place {
                addr: self.global?,
                args: self.args,
            },
            every: self.global_every,
            keep: self.global_keep,
            grace: self.global_grace,
        })
    }
}
