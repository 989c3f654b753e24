//! One emulated host: a QEMU process and our ends of its ports.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::plan::Event;
use super::qemu::Qemu;
use crate::harness::run;

/// Lines of the console that are kept.
const KEPT_LINES: usize = 500;
/// The size of the disk for the results, a sparse file.
const RESULTS_BYTES: u64 = 8 << 30;
const CONNECT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// The kinds of devices that a host has.
const VIRTIO: [&str; 4] = [
    "virtio-rng-pci",
    "virtio-serial-pci",
    "virtio-blk-pci",
    "virtio-net-pci",
];
/// What only the first host has besides.
const STREAMS: [&str; 3] = ["stdin", "stdout", "stderr"];

/// What a host is to be.
pub(crate) struct Spec<'a> {
    /// Its number, from 1.
    pub(crate) host: usize,
    pub(crate) cpus: usize,
    pub(crate) memory: &'a str,
    pub(crate) qemu: &'a Qemu,
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a Path,
    pub(crate) root: &'a Path,
    /// Whether it gets a disk for its results.
    pub(crate) results: bool,
    /// The hubs' sockets.
    pub(crate) networks: &'a [PathBuf],
    /// For its sockets and logs.
    pub(crate) folder: &'a Path,
    pub(crate) show_console: bool,
}

/// A running host. Killed when dropped.
pub(crate) struct Machine {
    pub(crate) host: usize,
    /// Shared with the thread that waits for its end.
    qemu: Arc<Mutex<Child>>,
    control: UnixStream,
    ports: Vec<(&'static str, UnixStream)>,
    /// Filled by the thread that reads the console.
    console: Arc<Mutex<VecDeque<String>>>,
    said: PathBuf,
    results: Option<PathBuf>,
}

impl Machine {
    /// Starts QEMU and connects its ports.
    pub(crate) fn start(spec: &Spec<'_>, events: &Sender<Event>) -> Result<Self> {
        let said = spec.folder.join("qemu.log");
        let results = spec.results.then(|| spec.folder.join("results.tar"));
        if let Some(path) = &results {
            File::create(path)?.set_len(RESULTS_BYTES)?;
        }
        let mut names = vec!["console", "control"];
        if spec.host == 1 {
            names.extend(STREAMS);
        }
        let listeners = names.into_iter().map(|name| {
            let path = spec.folder.join(name);
            let listener =
                UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
            listener.set_nonblocking(true)?;
            Ok((name, listener))
        });
        let listeners = listeners.collect::<Result<Vec<_>>>()?;
        let mut qemu = command(spec, results.as_deref(), &listeners)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&said)?)
            .spawn()
            .context("start qemu-system-x86_64 (Debian: qemu-system-x86)")?;
        let mut ports = Vec::new();
        for (name, listener) in listeners {
            match accept(&listener, &mut qemu) {
                Ok(stream) => ports.push((name, stream)),
                Err(error) => {
                    // It has ended, or is of no use.
                    let _ = qemu.kill().and_then(|()| qemu.wait());
                    let said = fs::read_to_string(&said).unwrap_or_default();
                    return Err(error.context(format!("host {}: QEMU: {}", spec.host, said.trim())));
                }
            }
        }
        let mut machine = Self {
            host: spec.host,
            control: take(&mut ports, "control")?,
            qemu: Arc::new(Mutex::new(qemu)),
            console: Arc::default(),
            ports,
            said,
            results,
        };
        machine.watch(spec.show_console, events)?;
        Ok(machine)
    }

    fn watch(&mut self, show_console: bool, events: &Sender<Event>) -> Result<()> {
        let host = self.host;
        let console = self.port("console")?;
        let kept = Arc::clone(&self.console);
        thread::spawn(move || read_console(console, host, &kept, show_console));
        let control = self.control.try_clone()?;
        let sender = events.clone();
        thread::spawn(move || read_control(control, host, &sender));
        let qemu = Arc::clone(&self.qemu);
        let sender = events.clone();
        thread::spawn(move || {
            loop {
                let ended = qemu.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
                if !matches!(ended, Ok(None)) {
                    // Nobody waits any more once the plan is over.
                    let _ = sender.send(Event::Ended { host });
                    return;
                }
                thread::sleep(POLL);
            }
        });
        Ok(())
    }

    /// Our end of one of its ports.
    pub(crate) fn port(&mut self, name: &str) -> Result<UnixStream> {
        take(&mut self.ports, name)
    }

    /// Tells its init what to do.
    pub(crate) fn order(&mut self, order: &str) {
        // A host that is gone is reported by its end.
        let _ = writeln!(self.control, "{order}");
    }

    /// Ends QEMU, if it still runs.
    pub(crate) fn kill(&mut self) {
        let mut qemu = self.qemu.lock().unwrap_or_else(PoisonError::into_inner);
        // It has ended already, mostly.
        let _ = qemu.kill();
        let _ = qemu.wait();
    }

    /// The last `count` lines of its console, and what QEMU said.
    pub(crate) fn last_words(&self, count: usize) -> String {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = format!("---- host {}: the last lines of its console ----\n", self.host);
        for line in console.iter().skip(console.len().saturating_sub(count)) {
            text += line;
            text.push('\n');
        }
        let said = fs::read_to_string(&self.said).unwrap_or_default();
        if !said.trim().is_empty() {
            text += &format!("---- host {}: QEMU said ----\n{}\n", self.host, said.trim());
        }
        text
    }

    /// Unpacks what was in /results into `folder`.
    pub(crate) fn take_results(&self, folder: &Path) -> Result<()> {
        let Some(archive) = &self.results else {
            return Ok(());
        };
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        // An archive's first block names its first file: a host that was killed wrote none.
        let mut first = [0];
        std::io::Read::read_exact(&mut File::open(archive)?, &mut first)?;
        if first == [0] {
            eprintln!("nested-host: host {} left no results", self.host);
            return Ok(());
        }
        let mut tar = Command::new("tar");
        tar.args(["--no-same-owner", "-xf"])
            .arg(archive)
            .arg("-C")
            .arg(folder);
        run(&mut tar).map(drop)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

fn take(ports: &mut Vec<(&'static str, UnixStream)>, name: &str) -> Result<UnixStream> {
    match ports.iter().position(|(port, _)| *port == name) {
        Some(at) => Ok(ports.swap_remove(at).1),
        None => bail!("the host has no port {name}"),
    }
}

fn command(spec: &Spec<'_>, results: Option<&Path>, ports: &[(&'static str, UnixListener)]) -> Command {
    // It must not outlive this process, however that ends.
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "--"])
        .arg(&spec.qemu.program)
        .args(
            spec.qemu
                .data
                .iter()
                .flat_map(|folder| [OsStr::new("-L"), folder.as_os_str()]),
        )
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-smp", &spec.cpus.to_string(), "-m", spec.memory])
        .arg("-kernel")
        .arg(spec.kernel)
        .arg("-initrd")
        .arg(spec.initrd)
        .arg("-append")
        // What protects real processors from real attackers only costs time here. KVM keeps its guests' clocks as on
        // real hosts only when this one runs on the TSC, and the emulated TSCs do agree.
        .arg("console=ttyS0 panic=-1 mitigations=off random.trust_cpu=on nowatchdog tsc=reliable")
        // No MSI-X: with it QEMU 7.2 ended now and then on an assertion in a write to a table of it, while the kernel
        // looked for devices.
        .args(
            VIRTIO
                .iter()
                .flat_map(|device| ["-global".into(), format!("{device}.vectors=0")]),
        )
        .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    // The order of the disks is the order of their names there: vda, vdb.
    qemu.arg("-drive")
        .arg(drive(spec.root, "snapshot=on,format=raw,cache=unsafe"));
    if let Some(results) = results {
        qemu.arg("-drive").arg(drive(results, "format=raw,cache=unsafe"));
    }
    for (name, _) in ports {
        let path = spec.folder.join(name);
        qemu.arg("-chardev")
            .arg(format!("socket,id={name},path={},server=off", escaped(&path)));
        match *name {
            "console" => qemu.args(["-serial", "chardev:console"]),
            _ => qemu.args(["-device", &format!("virtserialport,chardev={name},name={name}")]),
        };
    }
    for (at, path) in spec.networks.iter().enumerate() {
        let mac = format!("52:54:00:4e:{at:02x}:{:02x}", spec.host);
        qemu.arg("-netdev")
            .arg(format!(
                "stream,id=net{at},server=off,addr.type=unix,addr.path={}",
                escaped(path)
            ))
            .args(["-device", &format!("virtio-net-pci,netdev=net{at},mac={mac}")]);
    }
    qemu
}

fn drive(path: &Path, how: &str) -> String {
    format!("if=virtio,file={},{how}", escaped(path))
}

/// A path in an option of QEMU's, where commas separate.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// QEMU connects before it starts the machine, or ends with an error.
fn accept(listener: &UnixListener, qemu: &mut Child) -> Result<UnixStream> {
    let deadline = Instant::now() + CONNECT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("accept QEMU's connection"),
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("QEMU ended with {status}");
        }
        if Instant::now() > deadline {
            bail!("QEMU did not connect its ports within {} s", CONNECT.as_secs());
        }
        thread::sleep(POLL);
    }
}

fn read_console(console: UnixStream, host: usize, kept: &Mutex<VecDeque<String>>, show: bool) {
    for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if show {
            eprintln!("host-{host}| {line}");
        }
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(line);
    }
}

fn read_control(control: UnixStream, host: usize, events: &Sender<Event>) {
    for line in BufReader::new(control).lines().map_while(Result::ok) {
        let event = match line.trim().split_once(' ') {
            None if line.trim() == "ready" => Event::Ready { host },
            Some(("status", code)) => match code.parse() {
                Ok(code) => Event::Status { code },
                Err(_) => continue,
            },
            // Not ours: the console tells more about a host that went mad.
            _ => continue,
        };
        if events.send(event).is_err() {
            return;
        }
    }
}
