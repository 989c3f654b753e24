//! A vCPU and its thread.
//!
//! ```text
//!          run()                    stop() / the guest ends
//! Parked --------> Running -----------------------------------> Parked
//!    \                                                            |
//!     +--------------------- quit() -----> Finished <-------------+
//! ```
//!
//! The vCPU's thread holds the vCPU's lock while it runs and gives it up to park, so whoever gets the lock finds a
//! vCPU that stands still with no I/O half done. Stopping is race-free without a mask: the stopper sets the byte
//! `immediate_exit` that KVM looks at on entry, then sends a signal that makes KVM leave if it has already entered.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::register_signal_handler;

use crate::bus::Bus;
use crate::kvm::{self, KvmError};
use crate::leash::Leash;

pub mod msrs;
pub mod state;

/// How long a vCPU may take to stop. KVM leaves the guest within microseconds; a device that is stuck in the
/// monitor is the only thing that could take longer, and then saying so beats waiting for ever.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// How long the stopper spins before it sleeps: waking a sleeper costs as much as a whole short stop.
const STOP_SPIN: Duration = Duration::from_micros(200);
/// How long a vCPU's thread that was parked spins before it sleeps, for the same reason: most stops are for a
/// checkpoint and shorter than this.
const PARK_SPIN: Duration = Duration::from_micros(400);

/// How often a vCPU without a lease looks whether it has one again, until it is stopped.
const HELD_LOOK: Duration = Duration::from_millis(5);

/// Why a vCPU stopped of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEnd {
    /// The guest asked for a reset.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// The guest faulted with no way on (a triple fault).
    TripleFault,
    /// KVM could not go on; the text says what it reported.
    Failed(String),
}

/// Why a vCPU could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The thread could not be made.
    #[error("start the thread of vCPU {id}")]
    Thread {
        /// The vCPU.
        id: u8,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// It does not stop.
    #[error("vCPU {id} did not stop within {} s: the guest is left as it is", STOP_DEADLINE.as_secs())]
    Stuck {
        /// The vCPU.
        id: u8,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Parked,
    Running,
    Finished,
}

/// What the owner and the vCPU's thread share. The mutex guards three words for a few instructions and carries the
/// condition variable; the vCPU itself has a lock of its own that is held for as long as the guest runs.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// The same as `state`, to spin on.
    parked: AtomicBool,
    stop: AtomicBool,
    /// The guest ended of itself on this vCPU: it never runs again.
    ended: AtomicBool,
    tid: AtomicI32,
    /// Until when the guest may run.
    leash: Leash,
    /// `kvm_run.immediate_exit` of this vCPU; valid as long as `Vcpu` lives, which holds the mapping.
    immediate_exit: AtomicPtr<u8>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        let mut guard = self.lock();
        *guard = state;
        self.parked.store(state != State::Running, Ordering::Release);
        self.changed.notify_all();
    }

    fn set_immediate_exit(&self, value: u8) {
        let byte = self.immediate_exit.load(Ordering::Acquire);
        // SAFETY: the byte lies in the kvm_run page, which `Vcpu::fd` keeps mapped and which outlives this call
        // because `Vcpu` owns both; the kernel and other threads access it as a single byte.
        let byte = unsafe { AtomicU8::from_ptr(byte) };
        byte.store(value, Ordering::SeqCst);
    }
}

/// A pause inside a device that a stop can cut short.
pub struct Sleeper<'a>(&'a Shared);

impl Sleeper<'_> {
    /// Sleeps for `time`, or until the vCPU is told to stop.
    pub fn sleep(&self, time: Duration) {
        let deadline = Instant::now() + time;
        let mut guard = self.0.lock();
        while !self.0.stop.load(Ordering::Acquire) {
            let Some(left) = deadline
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())
            else {
                return;
            };
            guard = self
                .0
                .changed
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// One vCPU: KVM's handle and the thread that runs it.
pub struct Vcpu {
    id: u8,
    fd: Arc<Mutex<VcpuFd>>,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Vcpu {
    /// Makes the thread of vCPU `id`, parked. `ended` is called on that thread when the guest ends of itself.
    ///
    /// # Errors
    /// [`VcpuError::Thread`], or [`VcpuError::Kvm`] when the signal cannot be set up.
    pub fn start(
        id: u8,
        mut fd: VcpuFd,
        bus: Arc<Bus>,
        leash: Leash,
        ended: impl Fn(u8, GuestEnd) + Send + 'static,
    ) -> Result<Self, VcpuError> {
        install_kick_handler()?;
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        let shared = Arc::new(Shared {
            state: Mutex::new(State::Parked),
            changed: Condvar::new(),
            parked: AtomicBool::new(true),
            stop: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            tid: AtomicI32::new(0),
            leash,
            immediate_exit: AtomicPtr::new(immediate_exit),
        });
        let fd = Arc::new(Mutex::new(fd));
        let (fd_of_thread, shared_of_thread) = (Arc::clone(&fd), Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || vcpu_thread(id, &fd_of_thread, &shared_of_thread, &bus, ended))
            .map_err(|source| VcpuError::Thread { id, source })?;
        Ok(Self {
            id,
            fd,
            shared,
            thread: Some(thread),
        })
    }

    /// KVM's handle, for reading or setting state while the vCPU is parked. Blocks while it runs.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest ended of itself on it. To be asked while it is parked.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// Lets it run, unless the guest ended on it.
    pub fn run(&self) {
        if self.ended() {
            return;
        }
        self.shared.stop.store(false, Ordering::SeqCst);
        self.shared.set_immediate_exit(0);
        let mut state = self.shared.lock();
        if *state == State::Parked {
            *state = State::Running;
            self.shared.parked.store(false, Ordering::Release);
            self.shared.changed.notify_all();
        }
    }

    /// Asks it to stop, without waiting: [`Vcpu::wait_parked`] follows. Several vCPUs stop at once that way.
    pub fn ask_stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Before the signal: if the thread is not in KVM yet, KVM sees the byte on entry; if it is, the signal
        // gets it out.
        self.shared.set_immediate_exit(1);
        {
            // With the lock, so that a sleeper cannot miss it between its check and its wait.
            let _state = self.shared.lock();
            self.shared.changed.notify_all();
        }
        let tid = self.shared.tid.load(Ordering::Acquire);
        if tid != 0 && !self.shared.parked.load(Ordering::Acquire) {
            // A thread that is gone has parked.
            let _ = kvm::signal_thread(tid, kick_signal());
        }
    }

    /// Waits until it has stopped.
    ///
    /// # Errors
    /// [`VcpuError::Stuck`] after ten seconds.
    pub fn wait_parked(&self) -> Result<(), VcpuError> {
        let start = Instant::now();
        while start.elapsed() < STOP_SPIN {
            if self.shared.parked.load(Ordering::Acquire) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let mut state = self.shared.lock();
        while *state == State::Running {
            let Some(left) = STOP_DEADLINE.checked_sub(start.elapsed()) else {
                return Err(VcpuError::Stuck { id: self.id });
            };
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.ask_stop();
        if self.wait_parked().is_err() {
            // Its thread still uses the vCPU; both are left to the end of the process.
            tracing::error!(vcpu = self.id, "vCPU does not stop; its thread is abandoned");
            return;
        }
        self.shared.set(State::Finished);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal only has to interrupt KVM_RUN; a handler that does nothing is what makes it do so.
fn install_kick_handler() -> Result<(), KvmError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(kick_signal(), kicked).map_err(|e| e.errno()))
        .map_err(|errno| KvmError::Ioctl {
            ioctl: "rt_sigaction",
            on: "the vCPU kick signal".into(),
            source: vmm_sys_util::errno::Error::new(errno),
        })
}

fn vcpu_thread(id: u8, fd: &Mutex<VcpuFd>, shared: &Shared, bus: &Bus, ended: impl Fn(u8, GuestEnd)) {
    shared.tid.store(kvm::current_thread(), Ordering::Release);
    // Only where there is a core to spare: it must not take time from the thread it waits for.
    let spin = usize::from(id) + 1 < std::thread::available_parallelism().map_or(1, usize::from);
    let mut just_parked = false;
    loop {
        if spin && just_parked {
            let start = Instant::now();
            while shared.parked.load(Ordering::Acquire) && start.elapsed() < PARK_SPIN {
                std::hint::spin_loop();
            }
        }
        let mut state = shared.lock();
        while *state == State::Parked {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let finished = *state == State::Finished;
        drop(state);
        if finished {
            return;
        }
        let end = {
            let mut fd = fd.lock().unwrap_or_else(PoisonError::into_inner);
            let end = run_until_stop(&mut fd, shared, bus);
            complete_pending_io(&mut fd, shared);
            end
        };
        // Before it is seen parked: who stops it for a checkpoint must learn that there is no guest left.
        shared.ended.store(end.is_some(), Ordering::Release);
        shared.set(State::Parked);
        just_parked = end.is_none();
        if let Some(end) = end {
            ended(id, end);
        }
    }
}

/// Runs the guest until it is told to stop (`None`) or ends of itself.
fn run_until_stop(fd: &mut VcpuFd, shared: &Shared, bus: &Bus) -> Option<GuestEnd> {
    while !shared.stop.load(Ordering::SeqCst) {
        // Before every entry: a process that was stopped and continued comes by here before its guest runs on, for
        // KVM_RUN returns EINTR then.
        if !shared.leash.allows() {
            Sleeper(shared).sleep(HELD_LOOK);
            continue;
        }
        match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                if let Some(end) = bus.write(port, data, &Sleeper(shared)) {
                    return Some(end);
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => bus.read(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::Hlt) => {}
            Ok(VcpuExit::Shutdown) => return Some(GuestEnd::TripleFault),
            Ok(VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_CRASH, _)) => {
                return Some(GuestEnd::Failed("the guest reported a crash".into()));
            }
            Ok(VcpuExit::SystemEvent(..)) => return Some(GuestEnd::Reset),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Some(GuestEnd::Failed(format!(
                    "KVM could not enter the guest: reason {reason:#x}, CPU {cpu}"
                )));
            }
            Ok(VcpuExit::InternalError) => return Some(GuestEnd::Failed(internal_error(fd))),
            Ok(other) => {
                return Some(GuestEnd::Failed(format!(
                    "KVM left the guest for an unknown reason: {other:?}"
                )));
            }
            Err(error) => match error.errno() {
                // The kick, or a signal of no concern: the loop's condition decides.
                libc::EINTR | libc::EAGAIN => {}
                _ => return Some(GuestEnd::Failed(format!("KVM_RUN: {error}"))),
            },
        }
    }
    None
}

/// A port or MMIO access that KVM handed out is finished only when KVM_RUN is entered again: the register a read
/// goes to is written, and RIP moves on, at that entry. Saved before it, the access would be lost or done twice.
fn complete_pending_io(fd: &mut VcpuFd, shared: &Shared) {
    shared.set_immediate_exit(1);
    match fd.run() {
        Err(error) if error.errno() == libc::EINTR => {}
        // A vCPU that has ended (a triple fault) reports that again; there is nothing left to finish.
        other => tracing::debug!(?other, "entering KVM to finish pending I/O did not return EINTR"),
    }
}

/// KVM's internal error in words: the sub-error and what data came with it.
fn internal_error(fd: &mut VcpuFd) -> String {
    let run = fd.get_kvm_run();
    // SAFETY: exit_reason is KVM_EXIT_INTERNAL_ERROR (the only caller), for which KVM fills this member; all bit
    // patterns are valid integers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let what = match internal.suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "an instruction of the guest could not be emulated",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions piled up",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        _ => "unknown",
    };
    let count = (internal.ndata as usize).min(internal.data.len());
    let data: Vec<String> = internal.data[..count].iter().map(|d| format!("{d:#x}")).collect();
    let place = fd
        .get_regs()
        .map_or(String::new(), |regs| format!(" at rip {:#x}", regs.rip));
    format!(
        "KVM internal error {} ({what}){place}, data [{}]",
        internal.suberror,
        data.join(", ")
    )
}
