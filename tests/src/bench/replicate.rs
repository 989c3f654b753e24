//! How many checkpoints a second a holder can be given.
//!
//! The guest is the busy one of [`overhead`](super::overhead), in a protected session of this process; the holder is
//! an agent in this process, over loopback TCP, which acknowledges what is on its disk.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use migrate::transport::{CertRole, IdentityArgs};
use tempfile::TempDir;
use vmm::config::CheckpointConfig;
use vmm::session::{Protection, Session, SessionConfig};

use super::guest::{Console, Guest, boot_source, machine};
use super::lab::Lab;
use super::limits::{self, Random};
use super::overhead::busy_guest;
use super::row::Row;
use super::ship::agent;
use super::stats::Samples;

const NAME: &str = "capture.rate";
const TARGET: f64 = 200.0;
/// Asked for a little faster than the target, so that the target is not all there can be.
const EVERY_MS: u64 = 4;
/// About what a checkpoint of this guest takes, for the disk's limit.
const SEGMENT_BYTES: usize = 20_000;
/// How much of its work the guest must still do, in percent.
const WORK_PERCENT: f64 = 90.0;
const VM: &str = "rate";

pub(crate) fn measure(lab: &Lab) -> Result<Vec<Row>> {
    let (command_line, memory_mib) = busy_guest(lab)?;
    let undisturbed = |lab: &Lab| -> Result<f64> {
        let mut guest = Guest::filled(lab, &command_line, memory_mib)?;
        let (first, last) = guest.console.stretch(lab.stretch())?;
        Ok(last.work_since(&first))
    };
    let before = undisturbed(lab)?;
    let puts_before = puts(lab)?;
    let seen = protected(lab, &command_line, memory_mib)?;
    // The better of the two, as a disk's speed drifts.
    let puts = puts(lab)?.max(puts_before);
    let after = undisturbed(lab)?;

    let work = 100.0 * seen.work / ((before + after) / 2.0);
    let row = Row::new(NAME, "epochs/s", &seen.rates)?
        .limit(
            puts.min(1000.0 / EVERY_MS as f64),
            "one durable write of such a segment after the other, and no faster than asked for",
        )
        .at_least(TARGET)
        .also(
            work >= WORK_PERCENT,
            format!("guest at {WORK_PERCENT} % of its work"),
        )
        .param("every_ms", EVERY_MS)
        .param("holders", 1)
        .param("disk", lab.disk())
        .param("segment_bytes", seen.segment_bytes.round())
        .seen("stop_us", seen.stop_us)
        .seen("guest_work_percent", work);
    Ok(vec![row])
}

/// Durable writes of such a segment, one after the other, that the disk takes a second.
fn puts(lab: &Lab) -> Result<f64> {
    let folder = lab.temporary("limit-")?;
    let segment = Random(3).bytes(SEGMENT_BYTES);
    let seconds = Samples::collect(lab.samples(200, 20), |index| {
        limits::put(folder.path(), &format!("{index}.seg"), &segment).map(|time| time.as_secs_f64())
    })?;
    Ok(1.0 / seconds.median().max(1e-9))
}

struct Seen {
    rates: Samples,
    /// Pages the guest verified a second.
    work: f64,
    segment_bytes: f64,
    stop_us: f64,
}

fn protected(lab: &Lab, command_line: &str, memory_mib: u64) -> Result<Seen> {
    let (own, held) = (lab.temporary("owner-")?, lab.temporary("holder-")?);
    let agent = lab.runtime().block_on(agent(lab, held.path()))?;
    let session = lab
        .runtime()
        .block_on(start(lab, &own, agent.address(), command_line, memory_mib))?;
    let seen = watch(lab, &session);
    let stopped = lab.runtime().block_on(session.stop(Duration::from_secs(1)));
    lab.runtime().block_on(agent.stop());
    stopped.context("stop the VM")?;
    seen
}

async fn start(
    lab: &Lab,
    own: &TempDir,
    holder: &str,
    command_line: &str,
    memory_mib: u64,
) -> Result<Session> {
    let config = SessionConfig {
        name: VM.parse().context("name the VM")?,
        store: own.path().to_owned(),
        store_budget: None,
        checkpoints: CheckpointConfig::default(),
        protection: Some(Protection {
            holders: vec![holder.to_owned()],
            every_ms: EVERY_MS,
            ack_quorum: None,
            registry: None,
            policy: None,
            failover: None,
            detect: None,
            on_lapse: None,
        }),
        generation: None,
        trust: IdentityArgs {
            tls: Some(lab.certificate("owner", &[CertRole::Owner])?),
            insecure_plaintext: false,
        },
        second_copy: false,
        keys: Default::default(),
    };
    let source = boot_source(lab, "churn", command_line);
    let session = Session::boot(config, machine(memory_mib), &source)
        .await
        .context("boot a protected VM")?;
    session.resume().await.context("let the guest run")?;
    Ok(session)
}

/// Counts what the holder commits, second by second, once the guest has filled its memory and the holder keeps up.
fn watch(lab: &Lab, session: &Session) -> Result<Seen> {
    let mut console = Console::new(session.vm());
    lab.say("  protected, filling its memory");
    console.wait_filled()?;
    std::thread::sleep(Duration::from_secs(1));
    let (mut rates, mut stops) = (Samples::default(), Samples::default());
    let (begin, first) = (committed(session)?, console.beat()?);
    let stored = session.status();
    let mut last = (begin, Instant::now());
    for _ in 0..lab.samples(10, 3) {
        let end = last.1 + Duration::from_secs(1);
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
            stops.push(
                session
                    .status()
                    .newest
                    .map_or(0.0, |report| report.stop_us as f64),
            );
        }
        let now = (committed(session)?, Instant::now());
        rates.push((now.0 - last.0) as f64 / (now.1 - last.1).as_secs_f64());
        last = now;
    }
    let (end, done) = (console.beat()?, session.status());
    let taken = (done.checkpoints - stored.checkpoints).max(1);
    Ok(Seen {
        rates,
        work: end.work_since(&first),
        segment_bytes: (done.stored_bytes - stored.stored_bytes) as f64 / taken as f64,
        stop_us: stops.median(),
    })
}

/// The number of the newest checkpoint that the holder has.
fn committed(session: &Session) -> Result<u64> {
    let status = session.status();
    if status.state != "running" {
        bail!(
            "the guest is {}: {}",
            status.state,
            status.reason.unwrap_or_default()
        );
    }
    let name = status
        .committed
        .with_context(|| format!("nothing is committed: {}", status.problem.unwrap_or_default()))?;
    let epoch = name.rsplit('/').next().and_then(|epoch| epoch.parse().ok());
    epoch.with_context(|| format!("{name} has no epoch"))
}
