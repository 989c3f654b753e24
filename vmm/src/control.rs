//! The owner of a machine: one thread that holds the [`Vm`] and does what it is told, one thing after the other.
//!
//! ```text
//! control API --+
//! checkpoints --+--> Command --> owner thread (Vm) --> RunState (watched by all)
//! vCPU threads -+
//! ```
//!
//! Nobody else touches the machine, so no lock is needed around it, and a pause, a checkpoint and a guest that ends
//! cannot overlap.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use crate::bus::Bus;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::disk::DiskCapture;
use crate::leash::Leash;
use crate::memory::{GuestRam, PAGE_BYTES};
use crate::outbox::Outbox;
use crate::vcpu::GuestEnd;
use crate::vm::{Ended, MachineConfig, MachineState, Vm, VmError};

/// What a machine is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// It stands still and can go on.
    Paused,
    /// It runs.
    Running,
    /// It stands still because its lease ran out: another host may take it over. It goes on when the lease is renewed.
    Lapsed {
        /// Who did not renew it.
        reason: String,
    },
    /// Another host may run this VM now; it stands still and can never go on here.
    Fenced {
        /// Who refused us, and the generation they named.
        reason: String,
    },
    /// The guest ended of itself.
    Ended(GuestEnd),
    /// It was stopped and is gone.
    Stopped,
}

impl RunState {
    /// The words for all of them.
    pub const WORDS: [&str; 7] = [
        "running", "paused", "lapsed", "fenced", "ended", "failed", "stopped",
    ];

    /// In one word, as `vmm ps` shows it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::Running => "running",
            Self::Lapsed { .. } => "lapsed",
            Self::Fenced { .. } => "fenced",
            Self::Ended(GuestEnd::Reset | GuestEnd::PowerOff) => "ended",
            Self::Ended(GuestEnd::TripleFault | GuestEnd::Failed(_)) => "failed",
            Self::Stopped => "stopped",
        }
    }

    /// Why, where there is more to say.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Paused | Self::Running | Self::Stopped => None,
            Self::Fenced { reason } | Self::Lapsed { reason } => Some(reason.clone()),
            Self::Ended(GuestEnd::Reset) => Some("the guest reset".into()),
            Self::Ended(GuestEnd::PowerOff) => Some("the guest switched itself off".into()),
            Self::Ended(GuestEnd::TripleFault) => {
                Some("the guest faulted with no way on (triple fault)".into())
            }
            Self::Ended(GuestEnd::Failed(why)) => Some(why.clone()),
        }
    }

    /// Whether the guest can never run again in this process.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Ended(_) | Self::Stopped)
    }
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Not in this state.
    #[error("cannot {command} a VM that is {state}{}", reason.as_deref().map(|r| format!(" ({r})")).unwrap_or_default())]
    State {
        /// What was asked.
        command: &'static str,
        /// The state's word.
        state: &'static str,
        /// The state's reason.
        reason: Option<String>,
    },
    /// It failed.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A buffer for the pages could not be had.
    #[error("{0}")]
    Memory(String),
    /// The owner's thread is gone.
    #[error("the VM is gone")]
    Gone,
}

/// The last stop of a capture: what the guest was at that instant.
#[derive(Debug)]
pub struct Stopped {
    /// Everything but the memory.
    pub state: MachineState,
    /// Pages that changed since the set was last taken, ascending.
    pub pages: Vec<u64>,
    /// Their bytes, back to back.
    pub bytes: Vec<u8>,
    /// Beside those, pages that changed and are zero now: their memory was given back. Ascending.
    pub zeros: Vec<u64>,
    /// Captures of its disks at the same instant, in the order of their slots.
    pub disks: Vec<DiskCapture>,
    /// When the guest was stopped, in nanoseconds since 1970.
    pub unix_ns: u64,
    /// How long it stood still.
    pub stopped: Duration,
}

type Reply<T> = oneshot::Sender<Result<T, ControlError>>;

enum Command {
    Pause(Reply<()>),
    Resume(Reply<()>),
    Fence(String, Reply<()>),
    /// The lease ran out.
    Lapse(String, Reply<()>),
    /// The lease is renewed.
    Renewed(Reply<()>),
    Stop(Reply<()>),
    /// Log writes from now on; true when they already were.
    StartLogging(Reply<bool>),
    /// Tell the guest that it is not the VM going on.
    NewGenerationId(Reply<()>),
    /// The dirty set, with the guest running.
    TakeDirty(Reply<Vec<u64>>),
    /// Stop, save, take the dirty set, copy its pages into the buffers given, begin to capture the disks (all of them,
    /// or what changed), go on.
    StopAndCopy(Buffers, bool, Reply<Stopped>),
    PutBack(Vec<Range<u64>>),
    /// Of which life of the machine, and on which vCPU.
    Ended(u64, u8, GuestEnd),
}

/// Room for a delta, used again and again: fresh memory costs microseconds a page at its first touch.
#[derive(Debug, Default)]
pub struct Buffers {
    /// Page numbers.
    pub pages: Vec<u64>,
    /// Page contents.
    pub bytes: Vec<u8>,
}

/// A handle to a machine's owner. Cheap to clone.
#[derive(Debug, Clone)]
pub struct VmHandle {
    commands: Sender<Command>,
    state: watch::Receiver<RunState>,
    config: MachineConfig,
    ram: Arc<GuestRam>,
    bus: Arc<Bus>,
    outbox: Outbox,
    balloon: Option<Balloon>,
    /// How often the guest was restarted in this process.
    restarts: Arc<AtomicU64>,
    /// The vCPU threads hold a way to the owner too, so its inbox never closes by itself: the last handle to go ends
    /// the machine.
    _last: Arc<LastHandle>,
}

#[derive(Debug)]
struct LastHandle(Sender<Command>);

impl Drop for LastHandle {
    fn drop(&mut self) {
        // Nobody waits for the answer, and a machine that was stopped has no owner left to ask.
        let (reply, _) = oneshot::channel();
        let _ = self.0.send(Command::Stop(reply));
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Command")
    }
}

impl VmHandle {
    /// Gives a machine that `make` builds an owner. The machine does not run yet.
    ///
    /// # Errors
    /// What `make` returned, or that the thread could not be started.
    pub fn start(make: impl FnOnce(&Outbox, &Ended) -> Result<Vm, VmError>) -> Result<Self, VmError> {
        let (commands, inbox) = channel();
        let (publish, state) = watch::channel(RunState::Paused);
        let outbox = Outbox::under(Leash::default());
        let to_owner = commands.clone();
        let ended: Ended = Arc::new(move |life, id, end| {
            // An owner that is gone needs not be told.
            let _ = to_owner.send(Command::Ended(life, id, end));
        });
        let vm = make(&outbox, &ended)?;
        let restarts: Arc<AtomicU64> = Arc::default();
        let handle = Self {
            _last: Arc::new(LastHandle(commands.clone())),
            commands,
            state,
            config: vm.config(),
            ram: Arc::clone(vm.ram()),
            bus: Arc::clone(vm.bus()),
            outbox: outbox.clone(),
            balloon: vm.attached().iter().find_map(|device| device.balloon.clone()),
            restarts: Arc::clone(&restarts),
        };
        std::thread::Builder::new()
            .name("vm".into())
            .spawn(move || {
                Owner {
                    vm: Some(vm),
                    publish,
                    outbox,
                    restarts,
                }
                .serve(&inbox)
            })
            .map_err(|source| crate::vcpu::VcpuError::Thread { id: 0, source })?;
        Ok(handle)
    }

    /// What the machine is doing, to look at or wait for.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<RunState> {
        self.state.clone()
    }

    /// Its size.
    #[must_use]
    pub fn config(&self) -> MachineConfig {
        self.config
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What it says.
    #[must_use]
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Its balloon, if it has one.
    #[must_use]
    pub fn balloon(&self) -> Option<&Balloon> {
        self.balloon.as_ref()
    }

    /// Types into its console; returns how many bytes the serial port took.
    #[must_use]
    pub fn input(&self, bytes: &[u8]) -> usize {
        self.bus.serial().input(bytes)
    }

    /// How often the guest was restarted: what it was before then is of little use to a delta.
    #[must_use]
    pub fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Acquire)
    }

    fn send<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> oneshot::Receiver<Result<T, ControlError>> {
        let (reply, answer) = oneshot::channel();
        // If the owner is gone, the reply end is dropped with the command and the answer says so.
        let _ = self.commands.send(command(reply));
        answer
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ControlError> {
        self.send(command).await.map_err(|_| ControlError::Gone)?
    }

    fn ask_blocking<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ControlError> {
        self.send(command)
            .blocking_recv()
            .map_err(|_| ControlError::Gone)?
    }

    /// Stops the guest; fine if it already stands still.
    ///
    /// # Errors
    /// [`ControlError::State`] when it has ended.
    pub async fn pause(&self) -> Result<(), ControlError> {
        self.ask(Command::Pause).await
    }

    /// Lets the guest run; fine if it does.
    ///
    /// # Errors
    /// [`ControlError::State`] when it is fenced or has ended.
    pub async fn resume(&self) -> Result<(), ControlError> {
        self.ask(Command::Resume).await
    }

    /// Ends the machine.
    ///
    /// # Errors
    /// [`ControlError::Gone`] when it already has.
    pub async fn stop(&self) -> Result<(), ControlError> {
        self.ask(Command::Stop).await
    }

    /// Stops the guest for good: another host may run this VM. Blocks until it stands still.
    ///
    /// # Errors
    /// [`ControlError`] when it could not be stopped.
    pub fn fence(&self, reason: &str) -> Result<(), ControlError> {
        self.ask_blocking(|reply| Command::Fence(reason.to_owned(), reply))
    }

    /// Until when the guest may run and be heard.
    #[must_use]
    pub fn leash(&self) -> Leash {
        self.outbox.leash()
    }

    /// Stops the guest, if it runs, until [`VmHandle::renewed`]. Blocks until it stands still.
    ///
    /// # Errors
    /// [`ControlError`] when it could not be stopped; it has no lease then all the same.
    pub fn lapse(&self, reason: &str) -> Result<(), ControlError> {
        self.ask_blocking(|reply| Command::Lapse(reason.to_owned(), reply))
    }

    /// Lets the guest go on that was stopped because its lease ran out. One that was paused since stays so.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn renewed(&self) -> Result<(), ControlError> {
        self.ask_blocking(Command::Renewed)
    }

    /// Logs writes from now on, so that a delta on the state as it is now can be taken.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn log_from_now(&self) -> Result<(), ControlError> {
        self.ask(Command::StartLogging).await.map(drop)
    }

    /// Gives the guest a new generation id, by which it learns that what it remembers may not be what was.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn new_generation_id(&self) -> Result<(), ControlError> {
        self.ask(Command::NewGenerationId).await
    }

    pub(crate) fn start_logging(&self) -> Result<bool, ControlError> {
        self.ask_blocking(Command::StartLogging)
    }

    pub(crate) fn take_dirty(&self) -> Result<Vec<u64>, ControlError> {
        self.ask_blocking(Command::TakeDirty)
    }

    pub(crate) fn stop_and_copy(&self, buffers: Buffers, whole_disks: bool) -> Result<Stopped, ControlError> {
        self.ask_blocking(|reply| Command::StopAndCopy(buffers, whole_disks, reply))
    }

    pub(crate) fn put_back(&self, pages: Vec<Range<u64>>) {
        let _ = self.commands.send(Command::PutBack(pages));
    }
}

struct Owner {
    vm: Option<Vm>,
    publish: watch::Sender<RunState>,
    outbox: Outbox,
    restarts: Arc<AtomicU64>,
}

impl Owner {
    fn serve(mut self, inbox: &Receiver<Command>) {
        while let Ok(command) = inbox.recv() {
            match command {
                Command::Pause(reply) => answer(reply, self.pause()),
                Command::Resume(reply) => answer(reply, self.resume()),
                Command::Fence(reason, reply) => answer(reply, self.fence(reason)),
                Command::Lapse(reason, reply) => answer(reply, self.lapse(reason)),
                Command::Renewed(reply) => answer(reply, self.renewed()),
                Command::Stop(reply) => {
                    self.vm = None;
                    self.become_state(RunState::Stopped);
                    self.outbox.close();
                    answer(reply, Ok(()));
                    return;
                }
                Command::StartLogging(reply) => answer(reply, self.start_logging()),
                Command::NewGenerationId(reply) => answer(reply, self.new_generation_id()),
                Command::TakeDirty(reply) => answer(reply, self.take_dirty()),
                Command::StopAndCopy(buffers, whole_disks, reply) => {
                    let result = self.stop_and_copy(buffers, whole_disks);
                    if let Err(Ok(lost)) = reply.send(result) {
                        // The asker is gone: its sets are not forgotten.
                        self.put_back(lost.pages.into_iter().chain(lost.zeros));
                        lost.disks.iter().for_each(DiskCapture::put_back);
                    }
                }
                Command::PutBack(ranges) => self.put_back(ranges.into_iter().flatten()),
                Command::Ended(life, id, end) => self.guest_ended(life, id, end),
            }
        }
    }

    fn become_state(&self, state: RunState) {
        self.publish.send_replace(state);
    }

    fn refuse<T>(&self, command: &'static str) -> Result<T, ControlError> {
        let state = self.publish.borrow();
        Err(ControlError::State {
            command,
            state: state.word(),
            reason: state.reason(),
        })
    }

    /// The machine, if the guest can still run.
    fn live(&mut self, command: &'static str) -> Result<&mut Vm, ControlError> {
        if self.publish.borrow().is_final() || self.vm.is_none() {
            return self.refuse(command);
        }
        self.vm.as_mut().ok_or(ControlError::Gone)
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        let vm = self.live("pause")?;
        if vm.running() {
            // Dropped at once: stopped it stays.
            let _ = pause_or_go_on(vm)?;
            self.become_state(RunState::Paused);
        } else if matches!(*self.publish.borrow(), RunState::Lapsed { .. }) {
            // Now by someone's wish: a renewal does not let it go on.
            self.become_state(RunState::Paused);
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        if matches!(
            *self.publish.borrow(),
            RunState::Fenced { .. } | RunState::Lapsed { .. }
        ) {
            return self.refuse("resume");
        }
        if !self.outbox.leash().allows() {
            return Err(ControlError::State {
                command: "resume",
                state: self.publish.borrow().word(),
                reason: Some("it has no lease: neither the registry nor enough holders answer".into()),
            });
        }
        let vm = self.live("resume")?;
        if !vm.running() {
            vm.pause()?.resume()?;
            self.become_state(RunState::Running);
        }
        Ok(())
    }

    fn fence(&mut self, reason: String) -> Result<(), ControlError> {
        let vm = self.live("fence")?;
        let stopped = vm.pause().map(drop);
        // Said even if a vCPU is stuck: it must never be resumed.
        self.become_state(RunState::Fenced { reason });
        Ok(stopped?)
    }

    fn lapse(&mut self, reason: String) -> Result<(), ControlError> {
        if *self.publish.borrow() != RunState::Running {
            return Ok(());
        }
        let stopped = self.live("hold")?.pause().map(drop);
        // Said even if a vCPU is stuck: it does not enter the guest without a lease.
        self.become_state(RunState::Lapsed { reason });
        Ok(stopped?)
    }

    fn renewed(&mut self) -> Result<(), ControlError> {
        if matches!(*self.publish.borrow(), RunState::Lapsed { .. }) {
            self.live("resume")?.pause()?.resume()?;
            self.become_state(RunState::Running);
        }
        self.outbox.wake();
        Ok(())
    }

    fn start_logging(&mut self) -> Result<bool, ControlError> {
        let vm = self.live("checkpoint")?;
        let already = vm.logging();
        vm.start_logging()?;
        Ok(already)
    }

    fn new_generation_id(&mut self) -> Result<(), ControlError> {
        Ok(self.live("give a generation id to")?.new_generation_id()?)
    }

    fn take_dirty(&mut self) -> Result<Vec<u64>, ControlError> {
        let mut pages = Vec::new();
        self.live("checkpoint")?.take_dirty(|page| pages.push(page))?;
        Ok(pages)
    }

    fn put_back(&mut self, pages: impl Iterator<Item = u64>) {
        if let Some(vm) = &mut self.vm {
            vm.put_back(pages);
        }
    }

    /// The short stop. On failure after the dirty set was taken, it is put back; a guest that ran, runs on.
    fn stop_and_copy(&mut self, buffers: Buffers, whole_disks: bool) -> Result<Stopped, ControlError> {
        if matches!(*self.publish.borrow(), RunState::Fenced { .. }) {
            return self.refuse("checkpoint");
        }
        let vm = self.live("checkpoint")?;
        let was_running = vm.running();
        let unix_ns = jiff::Timestamp::now().as_nanosecond().try_into().unwrap_or(0);
        let start = Instant::now();
        let mut paused = pause_or_go_on(vm)?;
        if paused.vm().ended() {
            // The word of it is in the inbox, behind this command. What follows a reset is no state to keep.
            return Err(ControlError::State {
                command: "checkpoint",
                state: "ended",
                reason: Some("the guest has just ended".into()),
            });
        }
        let result = capture(&mut paused, buffers, whole_disks);
        // Fails only before a machine's first run, and one that ran is past that.
        if was_running && let Err(error) = paused.resume() {
            tracing::error!(%error, "let the guest go on after a checkpoint");
            self.become_state(RunState::Paused);
        }
        let stopped = start.elapsed();
        let Capture {
            state,
            buffers,
            zeros,
            disks,
        } = result?;
        Ok(Stopped {
            state,
            pages: buffers.pages,
            bytes: buffers.bytes,
            zeros,
            disks,
            unix_ns,
            stopped,
        })
    }

    fn guest_ended(&mut self, life: u64, id: u8, mut end: GuestEnd) {
        let state = self.publish.borrow().clone();
        let Some(vm) = self
            .vm
            .as_mut()
            .filter(|vm| !state.is_final() && vm.life() == life)
        else {
            return;
        };
        // The other vCPUs have nothing left to run for.
        if let Err(error) = vm.pause().map(drop) {
            tracing::error!(%error, "stop the other vCPUs after the guest ended");
        }
        // A VM that another host may run stays fenced.
        if matches!(state, RunState::Fenced { .. }) {
            self.outbox.close();
            return;
        }
        if end == GuestEnd::Reset && vm.can_restart() {
            tracing::info!(vcpu = id, "the guest resets: it boots again");
            // Before the memory changes: a capture under way learns of it, at the latest with its next.
            self.restarts.fetch_add(1, Ordering::AcqRel);
            match vm.restart() {
                Ok(()) => {
                    if state == RunState::Running {
                        vm.run();
                    }
                    return;
                }
                Err(error) => end = GuestEnd::Failed(format!("restart it: {}", chain(&error))),
            }
        }
        match &end {
            GuestEnd::Reset => tracing::info!(vcpu = id, "the guest reset"),
            GuestEnd::PowerOff => tracing::info!(vcpu = id, "the guest switched itself off"),
            GuestEnd::TripleFault => {
                tracing::error!(vcpu = id, "the guest faulted with no way on (triple fault)")
            }
            GuestEnd::Failed(why) => tracing::error!(vcpu = id, %why, "the guest cannot go on"),
        }
        self.become_state(RunState::Ended(end));
        self.outbox.close();
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

fn answer<T>(reply: Reply<T>, result: Result<T, ControlError>) {
    // An asker that has gone away does not want the answer.
    let _ = reply.send(result);
}

/// What is taken while a machine stands still.
struct Capture {
    state: MachineState,
    buffers: Buffers,
    zeros: Vec<u64>,
    disks: Vec<DiskCapture>,
}

/// Stops a machine; when a device cannot be stopped, the guest goes on as it was.
fn pause_or_go_on(vm: &mut Vm) -> Result<crate::vm::Paused<'_>, VmError> {
    let was_running = vm.running();
    vm.stop_vcpus()?;
    if let Err(error) = vm.stop_devices() {
        if was_running {
            vm.run();
        }
        return Err(error);
    }
    vm.pause()
}

fn capture(
    paused: &mut crate::vm::Paused<'_>,
    mut buffers: Buffers,
    whole_disks: bool,
) -> Result<Capture, ControlError> {
    let state = paused.save()?;
    let vm = paused.vm();
    // Trap 12: after the state was saved: saving devices writes guest memory.
    let pages = &mut buffers.pages;
    pages.clear();
    // A page whose memory was given back is not read, which would fill it again: it is zero.
    let ram = Arc::clone(vm.ram());
    let (mut holes, mut zeros) = (ram.holes(), Vec::new());
    vm.take_dirty(|page| match holes.has(page) {
        true => zeros.push(page),
        false => pages.push(page),
    })?;
    let length = pages.len() * PAGE_BYTES;
    if let Err(error) = buffers
        .bytes
        .try_reserve(length.saturating_sub(buffers.bytes.len()))
    {
        vm.put_back(buffers.pages.into_iter().chain(zeros));
        return Err(ControlError::Memory(format!(
            "no memory for {length} bytes of changed pages: {error}"
        )));
    }
    buffers.bytes.resize(length, 0);
    for (&page, to) in buffers
        .pages
        .iter()
        .zip(buffers.bytes.chunks_exact_mut(PAGE_BYTES))
    {
        vm.ram().read_pages(page, to);
    }
    // Last, and in no time: what the disks' captures are of is read while the guest runs.
    let mut disks: Vec<DiskCapture> = Vec::new();
    let all: Vec<_> = vm.disks().cloned().collect();
    for disk in &all {
        match disk.freeze(whole_disks) {
            Ok(capture) => disks.push(capture),
            Err(why) => {
                disks.iter().for_each(DiskCapture::put_back);
                vm.put_back(buffers.pages.into_iter().chain(zeros));
                return Err(ControlError::Memory(why));
            }
        }
    }
    Ok(Capture {
        state,
        buffers,
        zeros,
        disks,
    })
}
