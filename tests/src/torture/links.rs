//! Three hosts whose links are cut, delayed and healed at random while their VMs are checkpointed; then everything is healed,
//! and what was committed is looked for at every holder, and read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::arena::{Arena, Guest, HOSTS, Ways};
use super::lookout::Lookout;
use super::proxy::{End, Link, Links};
use super::witness::{Beat, Point};
use super::{Dice, LinkOptions, say};
use crate::harness::{self, run_json, wait_within};
use crate::hosts::address;

/// How many hosts there are.
const COUNT: usize = 3;
/// A VM: where it runs, how often it is checkpointed, and how many of its holders, which are the two other hosts, make that
/// committed.
const VMS: [(&str, usize, &str, &str); 3] = [
    ("red", 0, "200ms", "2"),
    ("green", 1, "300ms", "2"),
    ("blue", 2, "250ms", "1"),
];
const REPLICAS: usize = 2;
const WORK: &str = "mib=8 rate=60 verify=4 heartbeat_ms=100";
const MEMORY: &str = "24M";
/// Where etcd is to be reached.
const ETCD: SocketAddr = SocketAddr::new(IpAddr::V4(address(2)), 2379);
const ETCD_ITSELF: SocketAddr = SocketAddr::new(IpAddr::V4(address(1)), 2379);
const AGENT_PORT: u16 = 7400;
/// What is done next comes at least and at most so long after what was done last.
const PACE_MS: (u64, u64) = (200, 1500);
/// The longest that what is said on a link is delayed.
const MOST_DELAY_MS: u64 = 400;
/// How often it is said how it goes.
const SAY_EVERY: Duration = Duration::from_secs(30);
/// How long it may take until all holders have everything, once all is healed.
const HEALING: Duration = Duration::from_secs(180);

/// Where the agent of a host is to be reached by the others.
fn dialled(host: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(address(21 + host as u8)), AGENT_PORT)
}

fn itself(host: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(address(11 + host as u8)), AGENT_PORT)
}

type Commits = BTreeMap<String, BTreeSet<Point>>;

/// The figures of a whole run.
#[derive(Debug, Default, Serialize)]
struct Figures {
    seed: u64,
    seconds: u64,
    cuts: u32,
    breaks: u32,
    delays: u32,
    heals: u32,
    cables: u32,
    /// Committed checkpoints that were seen, of all VMs.
    committed: u64,
    /// Segments at all holders, and of them those that were read whole.
    held: u64,
    verified: u64,
    verified_bytes: u64,
    /// From the moment that all was healed until all holders had everything.
    healed_ms: u64,
}

struct Story {
    arena: Arena,
    links: Links,
    lookout: Lookout,
    // The lookout's thread writes, the story reads; each for moments.
    commits: Arc<Mutex<Commits>>,
    dice: Dice,
    figures: Figures,
    /// The host whose cable is out.
    out: Option<usize>,
}

/// Runs it all.
///
/// # Errors
/// When something of what was committed is missing or bad, or does not come in time.
pub(super) fn run(options: &LinkOptions, folder: &Path) -> Result<()> {
    ensure!(
        options.minutes > 0.0 && options.minutes < 10_000.0,
        "--minutes {}: more than none, and less than a week",
        options.minutes
    );
    let seed = options.common.seed();
    let ways = Ways {
        etcd: ETCD,
        agent: Some(dialled),
    };
    let mut more = vec![address(2)];
    more.extend((0..COUNT).map(|host| address(21 + host as u8)));
    let mut arena = Arena::new(folder, ways, &more)?;
    let mut ends: Vec<_> = (0..COUNT).map(|host| (dialled(host), itself(host))).collect();
    ends.push((ETCD, ETCD_ITSELF));
    let links = Links::start(&ends)?;
    arena.start_hosts(COUNT, ways, None, &[])?;
    let all: Vec<_> = (0..COUNT).map(|host| dialled(host).to_string()).collect();
    for (name, host, every, quorum) in VMS {
        let replicas = REPLICAS.to_string();
        let registry = all.join(",");
        let protect = [
            "--protect",
            "--replicas",
            &replicas,
            "--ack-quorum",
            quorum,
            "--every",
            every,
            "--registry",
            &registry,
        ];
        let guest = Guest {
            name,
            cmdline: WORK,
            memory: MEMORY,
            more: &protect,
        };
        arena.launch(host, guest, &folder.join(format!("{name}.console")))?;
        say(format!(
            "{name}: a guest of {MEMORY} ({WORK}) at {}, a checkpoint every {every}, {replicas} replicas, committed at {quorum}",
            HOSTS[host]
        ));
    }
    let commits = Arc::<Mutex<Commits>>::default();
    let seen = Arc::clone(&commits);
    let places = VMS
        .iter()
        .flat_map(|(name, host, ..)| arena.places(name).into_iter().nth(*host));
    let lookout = Lookout::start(places.collect(), HashMap::new(), move |place, now| {
        if let Some(point) = now.point("/committed") {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.entry(place.vm.clone()).or_default().insert(point);
        }
    })?;
    let mut story = Story {
        arena,
        links,
        lookout,
        commits,
        dice: Dice::new(seed),
        figures: Figures {
            seed,
            ..Figures::default()
        },
        out: None,
    };
    story.torture(Duration::from_secs_f64(options.minutes * 60.0))?;
    let figures = story.reckon()?;
    say(format!(
        "{} s of cut links, seed {}: {} cuts, {} broken, {} delayed, {} healed, {} cables; {} committed checkpoints were seen, each \
         is at as many holders as it should be; {} segments at all holders, {} of them read and checked ({} MiB), none bad; whole {} \
         ms after all was healed",
        figures.seconds,
        figures.seed,
        figures.cuts,
        figures.breaks,
        figures.delays,
        figures.heals,
        figures.cables,
        figures.committed,
        figures.held,
        figures.verified,
        figures.verified_bytes >> 20,
        figures.healed_ms
    ));
    options.common.write(&figures)
}

impl Story {
    fn torture(&mut self, time: Duration) -> Result<()> {
        let (began, mut said) = (Instant::now(), Instant::now());
        while began.elapsed() < time {
            self.strike()?;
            let pause = PACE_MS.0 + self.dice.below(PACE_MS.1 - PACE_MS.0);
            std::thread::sleep(Duration::from_millis(pause).min(time.saturating_sub(began.elapsed())));
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                self.say_how_it_goes(began.elapsed());
            }
        }
        self.figures.seconds = began.elapsed().as_secs();
        Ok(())
    }

    fn say_how_it_goes(&self, after: Duration) {
        let commits = self.commits.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = commits
            .iter()
            .filter_map(|(vm, points)| Some(format!("{vm}/{}", points.last()?)));
        say(format!(
            "{:>4} s  {} cut or broken, {} delayed, {} healed; committed: {}",
            after.as_secs(),
            self.figures.cuts + self.figures.breaks + self.figures.cables,
            self.figures.delays,
            self.figures.heals,
            newest.collect::<Vec<_>>().join(", ")
        ));
    }

    /// Does something to one link, or to all links of a host.
    fn strike(&mut self) -> Result<()> {
        let pairs = self.links.pairs();
        let pair: (End, End) = pairs[self.dice.below(pairs.len() as u64) as usize];
        let roll = self.dice.below(20);
        let delay = Duration::from_millis(1 + self.dice.below(MOST_DELAY_MS));
        let host = self.dice.below(COUNT as u64) as usize;
        if let Some(host) = self.out.take() {
            self.arena.cluster.host(host).connect(true)?;
        }
        match roll {
            0..4 => {
                self.figures.cuts += 1;
                self.links.set(pair, Link::Cut);
            }
            4..7 => {
                self.figures.breaks += 1;
                self.links.set(pair, Link::Broken);
            }
            7..11 => {
                self.figures.delays += 1;
                self.links.set(pair, Link::Delayed(delay));
            }
            11..19 => {
                self.figures.heals += 1;
                self.links.set(pair, Link::Open);
            }
            _ => {
                self.figures.cables += 1;
                self.out = Some(host);
                self.arena.cluster.host(host).connect(false)?;
            }
        }
        Ok(())
    }

    /// Heals everything, and looks for all that was committed.
    fn reckon(mut self) -> Result<Figures> {
        if let Some(host) = self.out.take() {
            self.arena.cluster.host(host).connect(true)?;
        }
        for pair in self.links.pairs() {
            self.links.set(pair, Link::Open);
        }
        let healed = Instant::now();
        for (name, ..) in VMS {
            // What is taken from now on is no part of what is waited for.
            let now = self
                .newest(name)
                .with_context(|| format!("{name} was never seen"))?;
            self.caught_up(name, now)?;
        }
        self.figures.healed_ms = healed.elapsed().as_millis() as u64;
        for (name, host, ..) in VMS {
            // Its last checkpoint is everywhere before it returns, or it says what lacks it.
            let mut stop = self
                .arena
                .cluster
                .host(host)
                .command(&self.arena.cluster.binaries.vmm);
            stop.args(["stop", name, "--drain", "30s", "--run-dir"])
                .arg(self.arena.run_dir(host));
            harness::run(&mut stop)?;
        }
        let commits = {
            let commits = self.commits.lock().unwrap_or_else(PoisonError::into_inner);
            commits.clone()
        };
        for (name, ..) in VMS {
            let points = commits
                .get(name)
                .with_context(|| format!("{name} was never committed"))?;
            self.figures.committed += points.len() as u64;
            self.look_for(name, points)?;
            self.heard(name)?;
        }
        for (agent, name) in HOSTS.iter().enumerate().take(COUNT) {
            let report = run_json(self.arena.cluster.standby(agent).args(["verify", "--json"]))?;
            let number = |field: &str| {
                report[field]
                    .as_u64()
                    .with_context(|| format!("no {field} in {report}"))
            };
            ensure!(
                number("bad")? == 0 && number("incomplete")? == 0,
                "{name} has what does not verify: {report}"
            );
            self.figures.verified += number("checked")?;
            self.figures.verified_bytes += number("bytes")?;
        }
        Ok(self.figures)
    }

    /// The newest checkpoint that was taken of a VM.
    fn newest(&self, name: &str) -> Option<Point> {
        self.lookout.of(name, 1)?.point("/newest/name")
    }

    /// Waits until as many holders have everything up to `point` as should.
    fn caught_up(&self, name: &str, point: Point) -> Result<()> {
        let mut last = String::new();
        let all = wait_within(HEALING, format!("all holders of {name} to have {point}"), || {
            let Some(seen) = self.lookout.of(name, 1) else {
                return Ok(None);
            };
            let holders = seen.status["protection"]["holders"].as_array();
            let acked = holders.into_iter().flatten().filter(|holder| {
                let acked = holder["acked"].as_str().and_then(Point::of);
                acked >= Some(point)
            });
            let count = acked.count();
            last = seen.status["protection"]["holders"].to_string();
            Ok((count == REPLICAS).then_some(()))
        });
        all.with_context(|| format!("its holders at the end: {last}"))
    }

    /// Sees that each of these is whole at every holder that the registry names, and that these are as many as should be.
    fn look_for(&mut self, name: &str, points: &BTreeSet<Point>) -> Result<()> {
        let explained = run_json(self.arena.cluster.standby(0).args(["explain", name, "--json"]))?;
        let named: Vec<_> = explained["vm"]["holders"]
            .as_array()
            .into_iter()
            .flatten()
            .collect();
        ensure!(
            named.len() == REPLICAS,
            "{name} has {} holders and not {REPLICAS}: {explained}",
            named.len()
        );
        for holder in named {
            let agent = (0..COUNT).find(|host| *holder == dialled(*host).to_string().as_str());
            let agent = agent.with_context(|| format!("{holder} is no host of this run"))?;
            let listed = run_json(self.arena.cluster.standby(agent).args(["ls", name, "--json"]))?;
            let segments = listed.as_array().context("no list of segments")?;
            self.figures.held += segments.len() as u64;
            let whole: BTreeSet<Point> = segments
                .iter()
                .filter(|segment| segment["complete"] == true)
                .filter_map(|segment| Point::of(segment["name"].as_str()?))
                .collect();
            let missing: Vec<_> = points.difference(&whole).map(ToString::to_string).collect();
            if !missing.is_empty() {
                bail!(
                    "{} LACKS {} OF {} COMMITTED CHECKPOINTS of {name}: {}",
                    HOSTS[agent],
                    missing.len(),
                    points.len(),
                    missing.join(", ")
                );
            }
        }
        Ok(())
    }

    /// Sees that the guest went on to the end and found nothing bad.
    fn heard(&self, name: &str) -> Result<()> {
        let path = self.arena.cluster.folder().join(format!("{name}.console"));
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let mut beats = 0;
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        for line in whole.lines().map(str::trim) {
            ensure!(
                !line.starts_with("BAD") && !line.contains("ERROR"),
                "the guest of {name} said {line:?}"
            );
            beats += u64::from(Beat::of(line)?.is_some());
        }
        ensure!(beats > 0, "the guest of {name} was never heard");
        Ok(())
    }
}
