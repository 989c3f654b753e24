//! One VM under load, taken over again and again.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use super::arena::{Arena, Guest, HOSTS, Ways};
use super::ears::Ears;
use super::lookout::{Lookout, Seen};
use super::witness::Point;
use super::{Dice, FailoverOptions, say};
use crate::harness::{self, run_json, wait_for};

const VM: &str = "torture";
/// What the guest does: 16 MiB of stamped pages, 400 written and 1,600 checked a second.
const WORK: &str = "mib=16 rate=400 verify=4 heartbeat_ms=20";
const MEMORY: &str = "32M";
const EVERY: &str = "60ms";
/// How many of the four hosts have each checkpoint (one of the owner's host is not chosen, and stays), and how many make it
/// committed.
const REPLICAS: &str = "3";
const QUORUM: &str = "2";
/// How many checkpoints a holder may be behind to count as whole again: some are always on their way.
const NEARLY: u64 = 3;
/// How old a status may be to say how it is.
const FRESH: Duration = Duration::from_millis(500);
/// At most so long after all is well again the next fault comes.
const REST_MS: u64 = 300;
/// How long the history may lack a takeover whose guest was heard.
const NOTED: Duration = Duration::from_secs(5);

/// What is done to the owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Fault {
    /// SIGKILL to the monitor.
    Kill,
    /// The host loses its power: its agent and the monitor are gone at once. It comes back after the takeover.
    KillHost,
    /// SIGSTOP to the monitor, SIGCONT when another runs the VM.
    Stop,
    /// The host's cable is pulled, and plugged in when another runs the VM.
    Cut,
}

const FAULTS: [Fault; 4] = [Fault::Kill, Fault::KillHost, Fault::Stop, Fault::Cut];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "SIGKILL",
            Self::KillHost => "host killed",
            Self::Stop => "SIGSTOP",
            Self::Cut => "link cut",
        })
    }
}

/// How long it took, over all takeovers of a kind.
#[derive(Debug, Clone, Serialize)]
struct Times {
    count: usize,
    /// From the fault to the verdict that the owner is lost.
    detected_ms: Option<Spread>,
    /// From the verdict to the running guest.
    takeover_ms: Option<Spread>,
    /// From the fault to the guest's first words elsewhere.
    heard_ms: Option<Spread>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    median: u64,
    most: u64,
}

impl Spread {
    fn of(values: impl Iterator<Item = u64>) -> Option<Self> {
        let mut values: Vec<u64> = values.collect();
        values.sort_unstable();
        Some(Self {
            median: *values.get(values.len() / 2)?,
            most: *values.last()?,
        })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (at most {})", self.median, self.most)
    }
}

/// The figures of a whole run.
#[derive(Debug, Serialize)]
struct Figures {
    seed: u64,
    failovers: u32,
    /// Takeovers that no fault was made for: the lease ran out on a machine that was too busy, or two candidates took over.
    unasked: u32,
    seconds: u64,
    by_fault: BTreeMap<Fault, Times>,
    /// Heartbeats of guests that the witness heard.
    heartbeats: u64,
    /// Times that a newer checkpoint was reported as committed.
    commits: u64,
    /// The shortest silence before the first word of a takeover, and for how long a word of the owner before would have been
    /// missed at most.
    silence_ms: u64,
    blind_ms: u64,
}

#[derive(Debug, Clone, Copy)]
struct Took {
    detected_ms: Option<u64>,
    takeover_ms: Option<u64>,
    heard_ms: u64,
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_millis() as u64
}

fn number(host: &str) -> Result<usize> {
    let found = HOSTS.iter().position(|h| *h == host);
    found.with_context(|| format!("{host} is no host of this run"))
}

struct Story {
    arena: Arena,
    ears: Ears,
    lookout: Lookout,
    dice: Dice,
    /// The generation that runs.
    generation: u64,
    unasked: u32,
}

/// Runs it all.
///
/// # Errors
/// When the witness refuses something, or something does not come in time.
pub(super) fn run(options: &FailoverOptions, folder: &Path) -> Result<()> {
    if options.count == 0 {
        bail!("--count 0: there is nothing to see");
    }
    let began = Instant::now();
    let seed = options.common.seed();
    let ways = Ways::default();
    let mut arena = Arena::new(folder, ways, &[])?;
    let ears = Ears::start(&folder.join("consoles"))?;
    arena.start_hosts(
        HOSTS.len(),
        ways,
        Some(&ears),
        &["--keep", "last=20", "--max-links", "200"],
    )?;
    let console = ears.console(1, HOSTS[0]);
    harness::run(Command::new("mkfifo").args(["-m", "600"]).arg(&console))?;
    let all: Vec<_> = arena.cluster.agents.iter().map(|a| a.address.clone()).collect();
    let more = [
        "--protect",
        "--replicas",
        REPLICAS,
        "--ack-quorum",
        QUORUM,
        "--every",
        EVERY,
        "--registry",
        &all.join(","),
        "--failover",
        "auto",
        "--detect",
        &options.detect,
    ];
    let guest = Guest {
        name: VM,
        cmdline: WORK,
        memory: MEMORY,
        more: &more,
    };
    arena.launch(0, guest, &console)?;
    say(format!(
        "a guest of {MEMORY} ({WORK}), a checkpoint every {EVERY}, {REPLICAS} replicas of which {QUORUM} commit, --detect {}",
        options.detect
    ));
    let hearings = HashMap::from([(VM.to_owned(), ears.share())]);
    let lookout = Lookout::start(arena.places(VM), hearings, |_, _| {})?;
    let mut story = Story {
        arena,
        ears,
        lookout,
        dice: Dice::new(seed),
        generation: 1,
        unasked: 0,
    };
    let mut took: BTreeMap<Fault, Vec<Took>> = BTreeMap::new();
    let mut order = Vec::new();
    for n in 1..=options.count {
        if order.is_empty() {
            order = FAULTS.into();
            story.dice.shuffle(&mut order);
        }
        let fault = order.pop().unwrap_or(Fault::Kill);
        let one = story
            .failover(n, fault)
            .with_context(|| format!("failover {n}, {fault}"))?;
        took.entry(fault).or_default().push(one);
    }
    // What the last one left is waited for too.
    story.settled()?;
    story.ears.check()?;
    let figures = story.figures(seed, options.count, began, &took);
    tell(&figures);
    options.common.write(&figures)
}

fn tell(figures: &Figures) {
    let text = |spread: Option<Spread>| spread.map_or("?".to_owned(), |spread| spread.to_string());
    for (fault, times) in &figures.by_fault {
        say(format!(
            "{:>4}  {fault:<12} detected after {} ms, taken over in {} ms, heard again after {} ms",
            times.count,
            text(times.detected_ms),
            text(times.takeover_ms),
            text(times.heard_ms)
        ));
    }
    say(format!(
        "{} failovers in {} s, {} more that nobody asked for; seed {}: never two VMs ({} heartbeats in order, at least {} ms of \
         silence before each takeover's first word, of which {} ms at most were not heard in order), no committed epoch lost ({} \
         commits)",
        figures.failovers,
        figures.seconds,
        figures.unasked,
        figures.seed,
        figures.heartbeats,
        figures.silence_ms,
        figures.blind_ms,
        figures.commits
    ));
}

impl Story {
    fn figures(
        &self,
        seed: u64,
        failovers: u32,
        began: Instant,
        took: &BTreeMap<Fault, Vec<Took>>,
    ) -> Figures {
        let times = |list: &Vec<Took>| Times {
            count: list.len(),
            detected_ms: Spread::of(list.iter().filter_map(|took| took.detected_ms)),
            takeover_ms: Spread::of(list.iter().filter_map(|took| took.takeover_ms)),
            heard_ms: Spread::of(list.iter().map(|took| took.heard_ms)),
        };
        let hearing = self.ears.hearing();
        Figures {
            seed,
            failovers,
            unasked: self.unasked,
            seconds: began.elapsed().as_secs(),
            by_fault: took.iter().map(|(fault, list)| (*fault, times(list))).collect(),
            heartbeats: hearing.witness.beats(),
            commits: hearing.witness.commits(),
            silence_ms: hearing.silence.unwrap_or_default().as_millis() as u64,
            blind_ms: hearing.blind.as_millis() as u64,
        }
    }

    /// Waits until the highest generation is heard and all of its holders are whole; what its owner says of itself.
    fn settled(&mut self) -> Result<Seen> {
        let seen = wait_for("the VM to run with all of its holders", || {
            self.ears.check()?;
            let Some(highest) = self.ears.hearing().witness.highest().cloned() else {
                return Ok(None);
            };
            let Some(seen) = self.lookout.of(VM, highest.generation) else {
                return Ok(None);
            };
            let whole = seen.holders_within(NEARLY).to_string() == REPLICAS;
            let committed = seen
                .point("/committed")
                .is_some_and(|p| p.generation == seen.generation);
            let fresh = seen.at.elapsed() < FRESH && seen.status["state"] == "running";
            Ok((fresh && whole && committed).then_some(seen))
        })
        .with_context(|| self.picture())?;
        if seen.generation > self.generation {
            self.unasked += 1;
            say(format!(
                "      it runs under generation {} at {}, and nothing was done to generation {}",
                seen.generation, seen.host, self.generation
            ));
            self.generation = seen.generation;
        }
        Ok(seen)
    }

    /// How it is, for who has to find out why it is not well.
    fn picture(&self) -> String {
        let highest = self.ears.hearing().witness.highest().map(ToString::to_string);
        let sights = self.lookout.sights();
        let last = sights.values().max_by_key(|seen| seen.generation);
        let last = last.map(|seen| format!("{} ms ago: {}", seen.at.elapsed().as_millis(), seen.status));
        format!(
            "last heard: {}; last seen {}",
            highest.unwrap_or_default(),
            last.unwrap_or_default()
        )
    }

    fn failover(&mut self, n: u32, fault: Fault) -> Result<Took> {
        self.settled()?;
        std::thread::sleep(Duration::from_millis(self.dice.below(REST_MS)));
        // Again: it may have been taken over meanwhile.
        let owner = self.settled()?;
        let (host, pid) = (
            number(&owner.host)?,
            owner.pid().context("a VM without a process")?,
        );
        self.registered(host)?;

        let (struck, struck_unix) = (Instant::now(), unix_ms());
        match fault {
            Fault::Kill => drop(self.arena.signal(host, "KILL", pid)?),
            Fault::Stop => drop(self.arena.signal(host, "STOP", pid)?),
            Fault::KillHost => self.arena.cluster.kill_host(host)?,
            Fault::Cut => self.arena.cluster.host(host).connect(false)?,
        }
        let (speaker, heard) = wait_for("another generation to be heard", || {
            self.ears.check()?;
            let hearing = self.ears.hearing();
            let highest = hearing
                .witness
                .highest()
                .filter(|h| h.generation > owner.generation);
            Ok(highest.cloned().zip(hearing.rose))
        })
        .with_context(|| self.picture())?;
        // Who runs it now knows how it went; who ran it before may be cut off.
        let (detected, running) = self.noted(owner.generation, speaker.generation, &speaker.host)?;
        match fault {
            Fault::Kill => {}
            Fault::KillHost => self.arena.cluster.revive_host(host)?,
            Fault::Stop => drop(self.arena.signal(host, "CONT", pid)?),
            Fault::Cut => self.arena.cluster.host(host).connect(true)?,
        }
        if fault != Fault::KillHost {
            wait_for(format!("process {pid} of {} to end", owner.host), || {
                self.ears.check()?;
                Ok((!self.arena.signal(host, "0", pid)?).then_some(()))
            })?;
        }
        let from = wait_for("it to be known what it went on from", || {
            self.ears.check()?;
            let known = self.ears.hearing().witness.from(speaker.generation);
            // The next may have taken over before it was asked.
            let highest = self.ears.hearing().witness.highest().map(|h| h.generation);
            Ok(known
                .map(Some)
                .or_else(|| (highest > Some(speaker.generation)).then_some(None)))
        })
        .with_context(|| self.picture())?;
        self.ears.check()?;
        self.generation = speaker.generation;

        let took = Took {
            detected_ms: detected.map(|at| at.saturating_sub(struck_unix)),
            takeover_ms: detected.zip(running).map(|(lost, ran)| ran.saturating_sub(lost)),
            heard_ms: heard.saturating_duration_since(struck).as_millis() as u64,
        };
        let text = |ms: Option<u64>| ms.map_or("?".to_owned(), |ms| ms.to_string());
        say(format!(
            "{n:>4}  {:<12} {:>5} -> {:<5}  generation {} from {}: detected after {} ms, taken over in {} ms, heard after {} ms",
            fault.to_string(),
            owner.host,
            speaker.host,
            speaker.generation,
            from.map_or("?".to_owned(), |from: Point| from.to_string()),
            text(took.detected_ms),
            text(took.takeover_ms),
            took.heard_ms
        ));
        Ok(took)
    }

    /// Tells the witness what the registry knows as committed.
    fn registered(&self, agent: usize) -> Result<()> {
        let explained = run_json(self.arena.cluster.standby(agent).args(["explain", VM, "--json"]))?;
        if let Some(newest) = explained["vm"]["newest"]["name"].as_str().and_then(Point::of) {
            self.ears.hearing().witness.committed(newest)?;
        }
        Ok(())
    }

    /// When the owner was found lost, and when the next ran, by the history. It is written after the fact, and may lack it.
    fn noted(&self, lost: u64, generation: u64, host: &str) -> Result<(Option<u64>, Option<u64>)> {
        let agent = number(host)?;
        let patience = Instant::now() + NOTED;
        loop {
            let history = run_json(self.arena.cluster.standby(agent).args(["history", VM, "--json"]));
            // The one that was asked may be lost in turn.
            let history = history.unwrap_or_default();
            let entries = history.as_array().map(Vec::as_slice).unwrap_or_default();
            let find = |event: &str, of: u64| {
                let mut found = entries
                    .iter()
                    .filter(|e| e["event"] == event && e["node"] == host && e["generation"] == of);
                found
                    .next()
                    .and_then(|entry: &Value| entry["at_unix_ms"].as_u64())
            };
            let ran = find("taken-over", generation);
            if ran.is_some() || Instant::now() > patience {
                return Ok((find("owner-lost", lost), ran));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
