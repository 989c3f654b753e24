//! `scripts/nested-host`: runs a command in a software-emulated machine that has a complete KVM.
//!
//! QEMU emulates an AMD processor with SVM and nested paging, in it runs Debian's cloud kernel with `kvm-amd`, and
//! there the command. With more than one host the machines share two networks (see [`remote`]).
//!
//! ```text
//! nested-host ---- listens on Unix sockets, starts one QEMU a host ----+
//!   stdin, stdout, stderr  <-> virtio-serial ports of host 1           |
//!   control                <-> a port of every host, lines of text     |
//!   console                <-  serial port, the last lines kept        |
//!   hub (two networks)     <-> virtio-net, frames                      |
//! ```
//!
//! It never changes the machine it runs on: packages are unpacked, not installed, and everything made lies in the
//! target folder or in one temporary folder.

mod disk;
mod hub;
mod machine;
mod plan;
mod qemu;
pub mod remote;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use guest_images::cpio::Archive;

use disk::Disks;
use machine::{Machine, Spec};
use plan::{Action, Event, Plan};
use qemu::Qemu;

/// The most emulated hosts of one run: memory and the two networks set no tighter limit.
pub const MAX_HOSTS: usize = 8;
/// The exit status when a host or this program failed, not the command.
pub const FAILED: u8 = plan::HOST_FAILED;
/// How long a host may take until it is up. It takes 7 s on an idle machine.
const BOOT: Duration = Duration::from_secs(240);
/// How long the hosts may take to hand over their results and power off.
const END: Duration = Duration::from_secs(120);
/// How often hosts that did not come up are started. The emulation fails now and then (an assertion of QEMU's in a write
/// to a device, a triple fault), and until the command runs nothing is lost by another try.
const BOOTS: u32 = 3;
/// Lines of each console that are shown when something went wrong.
const LAST_LINES: usize = 60;
/// Variables that go along when they begin so.
const PASSED_ON: [&str; 4] = ["RUST_", "NEXTEST_", "PROPTEST_", "UNDERSTUDY_"];

/// Runs COMMAND in a software-emulated x86-64 machine that has a complete KVM, however little KVM there is here.
///
/// The command finds the built programs at the paths they have here and on its PATH, the current folder (empty but
/// for what is shared), and an empty /results. Its output and exit status are this program's; its standard input is
/// passed on. Status 124 means that the time was up, 125 that a host failed: the consoles' last lines follow.
#[derive(Debug, Parser)]
#[command(name = "nested-host", version, max_term_width = 100)]
pub struct Options {
    /// How many such machines; COMMAND runs on the first, and `on-host 2 COMMAND..` there runs one on the second
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=MAX_HOSTS as i64))]
    pub hosts: u8,
    /// Processors of each machine [default: as many as here, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub cpus: Option<u8>,
    /// Memory of each machine, as QEMU takes it
    #[arg(long, value_name = "SIZE", default_value = "2G")]
    pub memory: String,
    /// How long COMMAND may take
    #[arg(long, value_name = "DURATION", default_value = "30m", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
    /// How long COMMAND may be silent [default: as long as it may take]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub silence: Option<Duration>,
    /// A file or folder that COMMAND needs, put at its own path there; may be repeated
    #[arg(long, value_name = "PATH")]
    pub share: Vec<PathBuf>,
    /// Where /results of each host is copied to in the end (of several hosts: into host-1, host-2 ..)
    #[arg(long, value_name = "DIR")]
    pub results: Option<PathBuf>,
    /// A variable for COMMAND; RUST_*, NEXTEST_*, PROPTEST_* and UNDERSTUDY_* go along by themselves
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Shows the machines' consoles on standard error
    #[arg(long)]
    pub console: bool,
    /// Says on standard error how long each step took
    #[arg(long)]
    pub times: bool,
    /// Where disks and packages are kept [default: nested-host in the target folder]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// The command and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub command: Vec<OsString>,
}

/// Runs the command; its exit status.
///
/// # Errors
/// When the machines cannot be made or started, or a host failed.
pub fn run(options: &Options) -> Result<u8> {
    let started = Instant::now();
    let mark = |what: &str| {
        if options.times {
            eprintln!("nested-host: {:6.1} s  {what}", started.elapsed().as_secs_f64());
        }
    };
    let cache = match &options.cache {
        Some(folder) => folder.clone(),
        None => guest_images::debian::cache()
            .context("this program is not in a target folder: name a folder with --cache")?,
    };
    let programs = programs_folder()?;
    let disks = disk::make(&cache, &shared(options, &programs)?)?;
    let qemu = Qemu::find(&cache)?;
    mark("disks are ready");
    let mut boots = 1;
    loop {
        match once(options, &disks, &qemu, &programs, &mark)? {
            Outcome::Ended { code } => {
                mark("done");
                return Ok(code);
            }
            Outcome::NotUp { why, last_words } if boots == BOOTS => {
                eprint!("{last_words}");
                eprintln!("nested-host: {why}, {BOOTS} times in a row");
                return Ok(FAILED);
            }
            Outcome::NotUp { why, last_words } => {
                // The last line is QEMU's own, if it said something.
                let said = last_words.trim_end().lines().next_back().unwrap_or_default();
                boots += 1;
                eprintln!("nested-host: {why} ({said}): start {boots} of {BOOTS}");
            }
        }
    }
}

/// What became of one start of the hosts.
enum Outcome {
    /// The command, or a host while it ran.
    Ended { code: u8 },
    /// No command has run.
    NotUp { why: String, last_words: String },
}

/// Starts the hosts and runs the command, once.
fn once(
    options: &Options,
    disks: &Disks,
    qemu: &Qemu,
    programs: &Path,
    mark: &dyn Fn(&str),
) -> Result<Outcome> {
    let folder = tempfile::Builder::new()
        .prefix("nested-host-")
        .tempdir()
        .context("make a temporary folder")?;
    let networks = networks(folder.path(), options.hosts)?;
    let (events, received) = channel();
    let mut machines = Vec::new();
    for host in 1..=options.hosts {
        let folder = folder.path().join(format!("host-{host}"));
        fs::create_dir(&folder)?;
        let initrd = folder.join("initrd");
        let mut bytes = fs::read(&disks.initramfs)?;
        bytes.extend(orders(options, host, programs)?);
        fs::write(&initrd, bytes)?;
        let spec = Spec {
            host: host.into(),
            cpus: options.cpus.map_or_else(default_cpus, usize::from),
            memory: &options.memory,
            qemu,
            kernel: &disks.kernel,
            initrd: &initrd,
            root: &disks.root,
            results: options.results.is_some(),
            networks: &networks,
            folder: &folder,
            show_console: options.console,
        };
        machines.push(Machine::start(&spec, &events)?);
    }
    mark("machines are started");
    let mut streams = None;
    let ended = drive(options, &mut machines, &received, mark, |first| {
        streams = Some(Streams::connect(first, &events)?);
        Ok(())
    });
    // All the command's output is in the sockets or in QEMU: it is out once QEMU has ended.
    for machine in &mut machines {
        machine.kill();
    }
    if let Some(streams) = streams {
        streams.finish();
    }
    let last_words = || -> String {
        machines
            .iter()
            .map(|machine| machine.last_words(LAST_LINES))
            .collect()
    };
    let code = match ended? {
        Over::Finished { code } => code,
        Over::Failed { code, why } => {
            eprint!("{}", last_words());
            eprintln!("nested-host: {why}");
            code
        }
        Over::NotUp { why } => {
            return Ok(Outcome::NotUp {
                why,
                last_words: last_words(),
            });
        }
    };
    if let Some(results) = &options.results {
        for machine in &machines {
            let to = if options.hosts == 1 {
                results.clone()
            } else {
                results.join(format!("host-{}", machine.host))
            };
            machine.take_results(&to)?;
        }
    }
    Ok(Outcome::Ended { code })
}

/// How the plan ended.
enum Over {
    Finished { code: u8 },
    Failed { code: u8, why: String },
    NotUp { why: String },
}

/// Carries out the plan until it is over; `connect` is called with the first host before its command runs.
fn drive(
    options: &Options,
    machines: &mut [Machine],
    events: &Receiver<Event>,
    mark: &dyn Fn(&str),
    mut connect: impl FnMut(&mut Machine) -> Result<()>,
) -> Result<Over> {
    let mut plan = Plan::new(
        usize::from(options.hosts),
        plan::Limits {
            boot: BOOT,
            command: options.timeout,
            silence: options.silence.unwrap_or(options.timeout),
            end: END,
        },
        Instant::now(),
    );
    loop {
        let wait = plan.deadline().saturating_duration_since(Instant::now());
        let event = match events.recv_timeout(wait) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => Event::TimeIsUp,
            // Each machine's threads hold a sender until they have said that it ended.
            Err(RecvTimeoutError::Disconnected) => Event::Ended { host: 1 },
        };
        for action in plan.step(&event, Instant::now()) {
            match action {
                Action::Run => {
                    mark("the command starts");
                    connect(&mut machines[0])?;
                    machines[0].order("run");
                }
                Action::End => {
                    mark("the command has ended");
                    machines.iter_mut().for_each(|machine| machine.order("end"));
                }
                Action::Finish { code } => return Ok(Over::Finished { code }),
                Action::Fail { code, why } => return Ok(Over::Failed { code, why }),
                Action::NotUp { why } => return Ok(Over::NotUp { why }),
            }
        }
    }
}

/// The command's standard streams.
struct Streams {
    out: Vec<thread::JoinHandle<()>>,
}

impl Streams {
    fn connect(first: &mut Machine, events: &Sender<Event>) -> Result<Self> {
        let mut input = first.port("stdin")?;
        // It may wait for input for ever: it ends with this process.
        thread::spawn(move || {
            // An end of either side is the end of it.
            let _ = io::copy(&mut io::stdin().lock(), &mut input);
            let _ = input.shutdown(std::net::Shutdown::Both);
        });
        let out = vec![
            pump(first.port("stdout")?, io::stdout(), events.clone()),
            pump(first.port("stderr")?, io::stderr(), events.clone()),
        ];
        Ok(Self { out })
    }

    /// Waits until everything the command said is out.
    fn finish(self) {
        for thread in self.out {
            // It does not panic, and the status stands whatever became of the output.
            let _ = thread.join();
        }
    }
}

fn pump(
    mut from: UnixStream,
    mut to: impl Write + Send + 'static,
    events: Sender<Event>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 16 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    // Nobody reads any more (`| head`): the command goes on, its status still counts.
                    let _ = to.write_all(&buffer[..count]).and_then(|()| to.flush());
                    // Nobody waits any more once the plan is over.
                    let _ = events.send(Event::Output);
                }
            }
        }
    })
}

fn default_cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(4)
}

/// The folder with the built programs: where this program, or of a test the one above, is.
fn programs_folder() -> Result<PathBuf> {
    let me = std::env::current_exe().context("find this program")?;
    match me
        .ancestors()
        .skip(1)
        .take(2)
        .find(|folder| folder.join("on-host").is_file())
    {
        Some(folder) => Ok(folder.to_owned()),
        None => bail!(
            "no on-host beside {}: build with `cargo build --workspace --bins`",
            me.display()
        ),
    }
}

/// The files for the root disk: the programs, the command's own, what was asked for.
fn shared(options: &Options, programs: &Path) -> Result<Vec<PathBuf>> {
    let mut shared = disk::programs(programs)?;
    for path in &options.share {
        shared.push(std::path::absolute(path)?);
    }
    let command = Path::new(&options.command[0]);
    if command.components().count() > 1 && command.is_file() {
        shared.push(std::path::absolute(command)?);
    }
    for path in &shared {
        if !path.exists() {
            bail!("{} does not exist and cannot be shared", path.display());
        }
    }
    Ok(shared)
}

/// The two networks, when there is more than one host.
fn networks(folder: &Path, hosts: u8) -> Result<Vec<PathBuf>> {
    if hosts == 1 {
        return Ok(Vec::new());
    }
    let paths = ["control", "data"].map(|name| folder.join(format!("network-{name}")));
    for path in &paths {
        hub::serve(path)?;
    }
    Ok(paths.to_vec())
}

/// What a host's init needs to know, as an archive laid behind the initramfs.
fn orders(options: &Options, host: u8, programs: &Path) -> Result<Vec<u8>> {
    let here = std::env::current_dir().context("find the current folder")?;
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display());
    let mut environment = format!("export PATH={}\n", quoted(path.as_ref()));
    let passed = std::env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        PASSED_ON.iter().any(|start| name.starts_with(start))
    });
    let mut assign = |name: &str, value: &std::ffi::OsStr| {
        let fine = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if fine {
            environment += &format!("export {name}={}\n", quoted(value));
        }
        fine
    };
    for (name, value) in passed {
        assign(&name.to_string_lossy(), &value);
    }
    for pair in &options.env {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !assign(name, value.as_ref()) {
            bail!("--env {pair}: the name of a variable has letters, digits and _ only");
        }
    }
    let words: Vec<String> = options.command.iter().map(|word| quoted(word)).collect();
    let here = quoted(here.as_os_str());
    let command = format!("mkdir -p {here}\ncd {here}\nexec {}\n", words.join(" "));
    let mut archive = Archive::new();
    archive.file("nested/host", 0o644, host.to_string());
    archive.file("nested/hosts", 0o644, options.hosts.to_string());
    archive.file("nested/environment", 0o644, environment);
    archive.file("nested/command", 0o644, command);
    Ok(archive.finish())
}

/// A word for a POSIX shell.
fn quoted(word: &std::ffi::OsStr) -> String {
    format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"))
}
