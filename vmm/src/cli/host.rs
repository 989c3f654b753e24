//! A VM in this process: its name, its socket, its console, and its end.
//!
//! ```text
//! take the name -> bind the socket -> make and start the VM -> say that it runs -> wait for the end -> stop -> note it
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use segment::VmId;
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::logging::Log;
use super::rundir::{EndNote, Place, Pointer, SOCKET};
use super::terminal::{self, RawMode, Typed};
use super::{CliError, Outcome};
use crate::api::instance::{Identity, Origin};
use crate::api::server::Socket;
use crate::api::{Instance, Server};
use crate::config::VmConfig;
use crate::control::{RunState, VmHandle};
use crate::outbox::Outbox;
use crate::session::Session;
use crate::vcpu::GuestEnd;

/// How long the holders are given at a stop that did not say.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the last of the console may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long the console's thread waits for output at a time.
const TURN: Duration = Duration::from_millis(500);
/// How often a guest that does not read what is typed is looked at again.
const TYPING_TURN: Duration = Duration::from_millis(5);

/// Who watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Audience {
    /// A person, or a pipe: the console is on standard input and output.
    Terminal,
    /// The process that started this one and waits for one line of JSON; a `detached` one has then to live without
    /// it, and goes away if it is gone already.
    Parent {
        /// In a session of its own, with a log file.
        detached: bool,
    },
}

/// How a VM is hosted.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) identity: Identity,
    pub(super) config: VmConfig,
    /// What to make at once; `None` waits for requests.
    pub(super) start: Option<(Origin, bool)>,
    pub(super) run_dir: PathBuf,
    pub(super) api_sock: Option<PathBuf>,
    pub(super) console_log: Option<PathBuf>,
    pub(super) audience: Audience,
    /// See [`Place::take`].
    pub(super) over_older: bool,
    /// The VM's name was made up, so nobody can ask for its checkpoints when it is gone: they go with it.
    pub(super) nameless: bool,
}

/// The one line that the parent waits for.
#[derive(Debug, Serialize)]
struct Ready<'a> {
    state: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resumed_from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Ready<'_> {
    fn say(&self) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        let mut out = io::stdout().lock();
        out.write_all(&line)?;
        out.flush()
    }
}

/// Tells a parent that waits why there is no VM. `Failed` when it was told, so that nobody says it twice.
pub(super) fn tell_failure(audience: Audience, error: CliError) -> Result<Outcome, CliError> {
    if audience == Audience::Terminal {
        return Err(error);
    }
    let why = crate::session::chain(&error);
    let line = Ready {
        state: "failed",
        name: None,
        pid: None,
        socket: None,
        resumed_from: None,
        error: Some(why),
    };
    line.say().map(|()| Outcome::Failed).map_err(|_| error)
}

/// Why the wait for the end is over.
enum End {
    /// The VM's last state.
    Vm(RunState),
    /// The API's `PUT /stop`.
    Quit,
    /// A signal, or Ctrl-A x.
    Asked,
}

struct Signals([Signal; 4]);

impl Signals {
    fn new() -> Result<Self, CliError> {
        let one = |kind| signal(kind).map_err(CliError::io("listen for signals"));
        Ok(Self([
            one(SignalKind::interrupt())?,
            one(SignalKind::terminate())?,
            one(SignalKind::hangup())?,
            one(SignalKind::quit())?,
        ]))
    }

    async fn next(&mut self) {
        let [a, b, c, d] = &mut self.0;
        tokio::select! { _ = a.recv() => {}, _ = b.recv() => {}, _ = c.recv() => {}, _ = d.recv() => {} }
    }
}

impl Host {
    /// Hosts the VM to its end.
    pub(super) async fn run(self, log: &Log) -> Result<Outcome, CliError> {
        // From here on a signal ends the VM in order, whatever has been made of it.
        let mut signals = Signals::new()?;
        let place = Place::take(&self.run_dir, &self.identity.name, self.over_older)?;
        if self.audience == (Audience::Parent { detached: true }) {
            leave_the_terminal(place.dir())?;
        }
        let _pointer = (self.run_dir != super::rundir::run_dir(None))
            .then(|| Pointer::leave(place.dir()))
            .and_then(|left| {
                left.inspect_err(
                    |error| tracing::debug!(%error, "`vmm ps` will not find it in its run folder"),
                )
                .ok()
            });
        let socket_path = self.api_sock.clone().unwrap_or_else(|| place.dir().join(SOCKET));
        let socket = Socket::bind(&socket_path)?;
        if self.api_sock.is_some() {
            place.link_socket(&socket_path)?;
        }
        let console_log = self.console_log.as_deref().map(open_console_log).transpose()?;
        if let Some(logger) = &self.config.logger {
            (log.control())(logger).map_err(CliError::Said)?;
        }
        let instance = Instance::new(self.identity.clone(), self.config.clone(), Some(log.control()));
        let server = Server::start(socket, Arc::clone(&instance))?;
        let result = self
            .live(&instance, &socket_path, console_log, &mut signals)
            .await;
        server.shut_down().await;
        match &result {
            Ok(outcome) => self.note(place, outcome),
            Err(_) => drop(place),
        }
        self.forget();
        result
    }

    async fn live(
        &self,
        instance: &Arc<Instance>,
        socket: &Path,
        console_log: Option<File>,
        signals: &mut Signals,
    ) -> Result<Outcome, CliError> {
        if let Some((origin, resume)) = &self.start {
            tokio::select! {
                made = instance.start(origin.clone(), *resume) => {
                    if let Err(fault) = made {
                        // A VM that was made and may not run is not left standing.
                        if let Err(error) = instance.stop(Duration::ZERO).await {
                            tracing::warn!(error = error.message, "stop after a failed start");
                        }
                        return Err(fault.into());
                    }
                }
                () = signals.next() => return Err(CliError::Said("ended by a signal before the VM ran".into())),
            }
        }
        self.say_ready(instance, socket).await?;
        let mut sessions = instance.watch_session();
        let mut quit = instance.watch_quit();
        let session = tokio::select! {
            found = sessions.wait_for(Option::is_some) => found.ok().and_then(|found| found.clone()),
            _ = quit.wait_for(|quit| *quit) => None,
            () = signals.next() => None,
        };
        let Some(session) = session else {
            return Ok(Outcome::Done);
        };
        self.attend(instance, &session, console_log, signals).await
    }

    async fn say_ready(&self, instance: &Arc<Instance>, socket: &Path) -> Result<(), CliError> {
        let Audience::Parent { detached } = self.audience else {
            return Ok(());
        };
        let status = instance.session().map(|session| session.status());
        let line = Ready {
            state: status.as_ref().map_or("not started", |status| &status.state),
            name: Some(self.identity.name.as_str()),
            pid: Some(std::process::id()),
            socket: Some(socket),
            resumed_from: status.as_ref().and_then(|status| status.restored_from.clone()),
            error: None,
        };
        match line.say() {
            Ok(()) => Ok(()),
            Err(error) if detached => {
                // Whoever wanted it has given up, and nobody else knows of it.
                if let Err(error) = instance.stop(Duration::ZERO).await {
                    tracing::warn!(error = error.message, "stop a VM that nobody waits for");
                }
                Err(CliError::io(
                    "tell the process that waits for this VM that it runs",
                )(error))
            }
            Err(error) => {
                tracing::warn!(%error, "the process that started this VM is gone; it runs on");
                Ok(())
            }
        }
    }

    /// From the VM's start to its end.
    async fn attend(
        &self,
        instance: &Arc<Instance>,
        session: &Arc<Session>,
        console_log: Option<File>,
        signals: &mut Signals,
    ) -> Result<Outcome, CliError> {
        let (raw, typed) = match self.audience {
            Audience::Terminal => stdin_for_the_guest()?,
            Audience::Parent { .. } => (None, None),
        };
        let stdout = self.audience == Audience::Terminal;
        let written = write_console(session.vm().outbox(), stdout, console_log)?;
        let (leave, mut left) = oneshot::channel();
        if let Some(typed) = typed {
            tokio::spawn(type_in(session.vm().clone(), typed, leave));
        }
        let mut state = session.vm().state();
        let mut quit = instance.watch_quit();
        let end = tokio::select! {
            over = state.wait_for(|state| state.is_final() || matches!(state, RunState::Fenced { .. })) => {
                End::Vm(over.map_or(RunState::Stopped, |state| state.clone()))
            }
            _ = quit.wait_for(|quit| *quit) => End::Quit,
            () = signals.next() => End::Asked,
            Ok(()) = &mut left => End::Asked,
        };
        let outcome = match end {
            End::Vm(RunState::Fenced { reason }) => Outcome::Fenced(reason),
            End::Vm(RunState::Ended(GuestEnd::TripleFault)) => {
                Outcome::GuestFailed("it faulted with no way on (triple fault)".into())
            }
            End::Vm(RunState::Ended(GuestEnd::Failed(why))) => Outcome::GuestFailed(why),
            End::Vm(RunState::Ended(GuestEnd::Reset | GuestEnd::PowerOff)) => Outcome::Ended,
            End::Vm(RunState::Stopped | RunState::Paused | RunState::Lapsed { .. } | RunState::Running)
            | End::Quit
            | End::Asked => Outcome::Done,
        };
        // Of a fenced VM nothing is told to anyone: it is another's now, and its memory goes with this process.
        let stopped = match outcome {
            Outcome::Fenced(_) => {
                session.vm().outbox().close();
                Ok(None)
            }
            Outcome::Done | Outcome::Ended | Outcome::GuestFailed(_) | Outcome::Failed => tokio::select! {
                stopped = instance.stop(DRAIN) => stopped.map_err(CliError::from),
                () = signals.next() => Err(CliError::Said(
                    "ended by a second signal, before the holders had the last checkpoint".into()
                )),
            },
        };
        if tokio::time::timeout(LAST_WORDS, written).await.is_err() {
            tracing::warn!("the last of the console was not written: its reader is too slow");
        }
        drop(raw);
        if let Some(report) = stopped? {
            super::control::tell_stop(self.identity.name.as_str(), &report)?;
        }
        Ok(outcome)
    }

    /// What is left behind for `vmm ps`: nothing of a VM that was stopped, or that someone watched to a good end.
    fn note(&self, place: Place, outcome: &Outcome) {
        let (state, reason) = match outcome {
            Outcome::Fenced(why) => ("fenced", why.clone()),
            Outcome::GuestFailed(why) => ("failed", why.clone()),
            Outcome::Ended if self.audience != Audience::Terminal => {
                ("ended", "the guest reset or switched itself off".into())
            }
            Outcome::Ended | Outcome::Done | Outcome::Failed => return drop(place),
        };
        place.leave(&EndNote {
            state: state.into(),
            reason: Some(reason),
        });
    }

    /// Removes the checkpoints of a VM that nobody can name.
    fn forget(&self) {
        if self.nameless
            && let Err(error) = std::fs::remove_dir_all(&self.identity.store)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, store = ?self.identity.store, "the store of a VM without a name stays behind");
        }
    }
}

/// A session of its own, which no terminal can hang up, and its log in a file.
fn leave_the_terminal(dir: &Path) -> Result<(), CliError> {
    let path = dir.join("vmm.log");
    let log = open_console_log(&path)?;
    // Fails only if it leads a session already, which is as good.
    let _ = rustix::process::setsid();
    rustix::stdio::dup2_stderr(&log).map_err(|e| CliError::io(format!("log to {path:?}"))(e.into()))
}

fn open_console_log(path: &Path) -> Result<File, CliError> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    options
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(CliError::io(format!("open the log {path:?}")))
}

type Stdin = (Option<RawMode>, Option<mpsc::Receiver<Typed>>);

/// A terminal raw and with the escape, a pipe as it is; a terminal that belongs to another job is left alone.
fn stdin_for_the_guest() -> Result<Stdin, CliError> {
    use std::io::IsTerminal;
    let failed = CliError::io("read standard input for the guest");
    let raw = RawMode::enter().map_err(CliError::io("make the terminal raw"))?;
    if raw.is_none() && io::stdin().is_terminal() {
        return Ok((None, None));
    }
    let typed = terminal::read_stdin(raw.is_some()).map_err(failed)?;
    Ok((raw, Some(typed)))
}

/// Gives the guest what is typed, as fast as it reads.
async fn type_in(vm: VmHandle, mut typed: mpsc::Receiver<Typed>, leave: oneshot::Sender<()>) {
    while let Some(input) = typed.recv().await {
        let bytes = match input {
            Typed::Bytes(bytes) => bytes,
            Typed::Leave => {
                // Gone already is fine.
                let _ = leave.send(());
                return;
            }
        };
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            if vm.state().borrow().is_final() {
                return;
            }
            rest = &rest[vm.input(rest)..];
            if !rest.is_empty() {
                tokio::time::sleep(TYPING_TURN).await;
            }
        }
    }
}

/// Writes what the guest says, from its first word to its last, on a thread of its own; the receiver hears when all
/// is written. A reader that goes away costs the guest nothing.
fn write_console(
    outbox: &Outbox,
    stdout: bool,
    log: Option<File>,
) -> Result<oneshot::Receiver<()>, CliError> {
    let (done, written) = oneshot::channel();
    let outbox = outbox.clone();
    let mut sinks: Vec<(&'static str, Box<dyn Write + Send>)> = Vec::new();
    if stdout {
        sinks.push(("standard output", Box::new(io::stdout())));
    }
    if let Some(log) = log {
        sinks.push(("the console's log", Box::new(log)));
    }
    let write = move || {
        let mut position = 0;
        loop {
            let output = outbox.read(position, TURN);
            if output.lost > 0 {
                tracing::warn!(
                    bytes = output.lost,
                    "console output came too fast to be written and is lost"
                );
            }
            position = output.next;
            sinks.retain_mut(|(name, sink)| {
                match sink.write_all(&output.bytes).and_then(|()| sink.flush()) {
                    Ok(()) => true,
                    Err(error) => {
                        tracing::warn!(%error, "no more console output goes to {name}; the guest runs on");
                        false
                    }
                }
            });
            if output.closed && output.bytes.is_empty() {
                break;
            }
        }
        // Nobody waits any more when the process is ending.
        let _ = done.send(());
    };
    std::thread::Builder::new()
        .name("console".into())
        .spawn(write)
        .map_err(CliError::io("start a thread for the console"))?;
    Ok(written)
}

/// The VM's name, from the command line or the configuration.
pub(super) fn name(given: Option<&str>, config: &VmConfig) -> Result<Option<VmId>, CliError> {
    given
        .or(config.name.as_deref())
        .map(|name| VmId::new(name).map_err(CliError::from))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BootSourceConfig;

    fn host(dir: &Path, cmdline: &str) -> Host {
        guest_images::write_all(dir).unwrap();
        let config = VmConfig {
            boot_source: Some(BootSourceConfig {
                kernel_image_path: dir.join("ticker.elf"),
                initrd_path: None,
                boot_args: Some(cmdline.into()),
            }),
            ..Default::default()
        };
        Host {
            identity: Identity {
                name: VmId::new("web").unwrap(),
                store: dir.join("store"),
                store_budget: None,
                generation: None,
                trust: Default::default(),
                second_copy: false,
                keys: Default::default(),
                vsock: dir.join("vsock"),
            },
            config,
            start: None,
            run_dir: dir.join("run"),
            api_sock: None,
            console_log: None,
            audience: Audience::Parent { detached: false },
            over_older: false,
            nameless: false,
        }
    }

    /// What the host makes of a guest, to which `then` does something once it runs.
    async fn outcome(
        cmdline: &str,
        then: impl FnOnce(&VmHandle) + Send + 'static,
    ) -> (Outcome, Option<EndNote>) {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path(), cmdline);
        let place = Place::take(&host.run_dir, &host.identity.name, false).unwrap();
        let instance = Instance::new(host.identity.clone(), host.config.clone(), None);
        let session = instance.start(Origin::Boot, true).await.unwrap();
        let vm = session.vm().clone();
        let done = tokio::task::spawn_blocking(move || then(&vm));
        let mut signals = Signals::new().unwrap();
        let end = host.attend(&instance, &session, None, &mut signals);
        let end = tokio::time::timeout(Duration::from_secs(60), end).await;
        let outcome = end.expect("the host sees the end").unwrap();
        done.await.unwrap();
        host.note(place, &outcome);
        let found = super::super::rundir::Found::at(&host.run_dir, "web");
        (outcome, found.and_then(|found| found.note))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_fenced_vm_ends_its_process_and_is_remembered() {
        let (outcome, note) = outcome("period_ms=5", |vm| {
            vm.fence("generation 2 runs elsewhere").unwrap();
        })
        .await;
        assert_eq!(outcome, Outcome::Fenced("generation 2 runs elsewhere".into()));
        let note = note.unwrap();
        assert_eq!(
            (note.state.as_str(), note.reason.as_deref()),
            ("fenced", Some("generation 2 runs elsewhere"))
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_guest_that_ends_is_remembered_where_nobody_watched() {
        let (outcome, note) = outcome("period_ms=1 exit_after_ticks=3", |_| {}).await;
        assert_eq!((outcome, note.unwrap().state.as_str()), (Outcome::Ended, "ended"));
    }
}
