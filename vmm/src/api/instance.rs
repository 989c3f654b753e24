//! The VM behind a control socket: first a configuration, then a session.
//!
//! ```text
//! Configuring --InstanceStart / snapshot load--> Starting --ok--> Live --stop--> stopped
//!      ^                                            |
//!      +-------------------- failed ----------------+
//! ```
//!
//! What takes long runs in a task of its own: a client that hangs up neither cancels it half-way nor leaves the
//! instance in between.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migrate::transport::IdentityArgs;
use segment::{Generation, Keyring, VmId};
use tokio::sync::watch;

use super::fault::Fault;
use crate::clock::ClockPolicy;
use crate::config::{LoggerConfig, VmConfig};
use crate::session::{Bindings, RestoreFrom, Session, SessionConfig, StopReport};

/// What is done with a `PUT /logger`.
pub type LogControl = Box<dyn Fn(&LoggerConfig) -> Result<(), String> + Send + Sync>;

/// What the instance is, whatever it runs.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The VM's id.
    pub name: VmId,
    /// The folder of its local store, unless the configuration names another.
    pub store: PathBuf,
    /// The most bytes in it, unless the configuration says.
    pub store_budget: Option<u64>,
    /// The generation this process was given, if it was.
    pub generation: Option<Generation>,
    /// Who this process is to the holders and the registry.
    pub trust: IdentityArgs,
    /// See [`SessionConfig::second_copy`].
    pub second_copy: bool,
    /// See [`SessionConfig::keys`].
    pub keys: Keyring,
    /// Where the Unix socket of its stream sockets is, unless it is said.
    pub vsock: PathBuf,
}

enum Phase {
    Configuring,
    Starting,
    Live(Arc<Session>),
}

/// The VM of this process, for the API and for the command that serves it.
pub struct Instance {
    identity: Identity,
    /// Looked at and replaced; never held across an await.
    inner: Mutex<Inner>,
    session: watch::Sender<Option<Arc<Session>>>,
    /// The stop that is under way or done; the lock makes a second asker wait for the first.
    stopped: tokio::sync::Mutex<Option<Option<StopReport>>>,
    quit: watch::Sender<bool>,
    log: Option<LogControl>,
}

struct Inner {
    phase: Phase,
    config: VmConfig,
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Instance")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// What a VM is made of.
#[derive(Debug, Clone)]
pub enum Origin {
    /// The configuration's kernel.
    Boot,
    /// A checkpoint, and what the guest's clocks do about the time since.
    Restore(RestoreFrom, ClockPolicy),
}

impl Instance {
    /// An instance that is not started yet.
    #[must_use]
    pub fn new(identity: Identity, config: VmConfig, log: Option<LogControl>) -> Arc<Self> {
        Arc::new(Self {
            identity,
            inner: Mutex::new(Inner {
                phase: Phase::Configuring,
                config,
            }),
            session: watch::Sender::new(None),
            stopped: tokio::sync::Mutex::new(None),
            quit: watch::Sender::new(false),
            log,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> VmConfig {
        self.lock().config.clone()
    }

    /// Changes the configuration of an instance that is not started.
    ///
    /// # Errors
    /// What `change` returned, or that the instance is started.
    pub fn configure(&self, change: impl FnOnce(&mut VmConfig) -> Result<(), Fault>) -> Result<(), Fault> {
        let mut inner = self.lock();
        match inner.phase {
            Phase::Configuring => change(&mut inner.config),
            Phase::Starting | Phase::Live(_) => Err(already_started()),
        }
    }

    /// Changes what may be changed at any time.
    pub fn reconfigure(&self, change: impl FnOnce(&mut VmConfig)) {
        change(&mut self.lock().config);
    }

    /// The session, once there is one.
    #[must_use]
    pub fn session(&self) -> Option<Arc<Session>> {
        match &self.lock().phase {
            Phase::Live(session) => Some(Arc::clone(session)),
            Phase::Configuring | Phase::Starting => None,
        }
    }

    /// The session.
    ///
    /// # Errors
    /// That there is none yet.
    pub fn started(&self) -> Result<Arc<Session>, Fault> {
        self.session().ok_or_else(|| {
            Fault::bad(format!(
                "VM {} has not been started: configure it and PUT /actions {{\"action_type\": \"InstanceStart\"}}",
                self.identity.name
            ))
        })
    }

    /// Becomes `Some` when there is a session.
    #[must_use]
    pub fn watch_session(&self) -> watch::Receiver<Option<Arc<Session>>> {
        self.session.subscribe()
    }

    /// Becomes true when this process is to end.
    #[must_use]
    pub fn watch_quit(&self) -> watch::Receiver<bool> {
        self.quit.subscribe()
    }

    /// Applies a log configuration to this process.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn set_log(&self, config: &LoggerConfig) -> Result<(), Fault> {
        self.log
            .as_ref()
            .map_or(Ok(()), |apply| apply(config))
            .map_err(Fault::bad)
    }

    /// Makes the VM, and lets it run if `resume`.
    ///
    /// # Errors
    /// Why not. The instance can then be configured anew, or, where the VM was made and only could not be let run,
    /// it is paused.
    pub async fn start(self: &Arc<Self>, origin: Origin, resume: bool) -> Result<Arc<Session>, Fault> {
        let config = {
            let mut inner = self.lock();
            match inner.phase {
                Phase::Configuring => inner.phase = Phase::Starting,
                Phase::Starting | Phase::Live(_) => return Err(already_started()),
            }
            inner.config.clone()
        };
        let this = Arc::clone(self);
        unhurried(async move {
            let made = this.make(config, origin).await;
            this.lock().phase = match &made {
                Ok(session) => Phase::Live(Arc::clone(session)),
                Err(_) => Phase::Configuring,
            };
            let session = made?;
            this.session.send_replace(Some(Arc::clone(&session)));
            if resume {
                session.resume().await?;
            }
            Ok(session)
        })
        .await
    }

    async fn make(&self, mut config: VmConfig, origin: Origin) -> Result<Arc<Session>, Fault> {
        config.validate()?;
        if let Some(vsock) = &mut config.vsock {
            vsock.uds_path.get_or_insert_with(|| self.identity.vsock.clone());
        }
        let (store, store_budget) = match &config.store {
            Some(store) => (
                store.path.clone(),
                store.budget_bytes.or(self.identity.store_budget),
            ),
            None => (self.identity.store.clone(), self.identity.store_budget),
        };
        let session_config = SessionConfig {
            name: self.identity.name.clone(),
            store,
            store_budget,
            checkpoints: config.checkpoints.clone(),
            protection: config.protection.clone(),
            generation: self.identity.generation,
            trust: self.identity.trust.clone(),
            second_copy: self.identity.second_copy,
            keys: self.identity.keys.clone(),
        };
        let session = match origin {
            Origin::Boot => {
                let source = config.boot()?;
                Session::boot_with(
                    session_config,
                    config.machine_config.machine(),
                    &source,
                    &config.devices()?,
                )
                .await?
            }
            Origin::Restore(from, clock) => {
                let bindings = Bindings {
                    named: config.bindings.clone(),
                    offered: config.offers.clone(),
                }
                .or_vsock(&self.identity.vsock);
                let session = Session::restore_with(session_config, from, clock, &bindings).await?;
                let machine = session.vm().config();
                self.reconfigure(|config| {
                    config.machine_config.vcpu_count = machine.vcpus;
                    config.machine_config.mem_size_mib = machine.memory_bytes >> 20;
                    config.machine_config.cpu = Some(machine.cpu.to_string());
                });
                session
            }
        };
        let session = Arc::new(session);
        session.serve_guest();
        Ok(session)
    }

    /// Ends the VM, if there is one, and then this process; how it went. A second call waits for the first.
    ///
    /// # Errors
    /// Why the VM could not be ended.
    pub async fn stop(self: &Arc<Self>, drain: Duration) -> Result<Option<StopReport>, Fault> {
        let this = Arc::clone(self);
        unhurried(async move {
            let mut stopped = this.stopped.lock().await;
            let report = match stopped.clone() {
                Some(report) => report,
                None => match this.session() {
                    Some(session) => Some(session.stop(drain).await?),
                    None => None,
                },
            };
            *stopped = Some(report.clone());
            this.quit.send_replace(true);
            Ok(report)
        })
        .await
    }
}

fn already_started() -> Fault {
    Fault::bad("The requested operation is not supported after starting the microVM.")
}

/// Runs `work` to its end, also when the asker goes away.
pub(super) async fn unhurried<T: Send + 'static>(
    work: impl Future<Output = Result<T, Fault>> + Send + 'static,
) -> Result<T, Fault> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(Fault {
            status: axum::http::StatusCode::INTERNAL_SERVER_ERROR,
            message: format!("the monitor failed while it worked on this: {error}"),
        }),
    }
}
