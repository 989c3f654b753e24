//! A VM in this process, whole: the machine, its name and generation, its local store, and its protection.
//!
//! ```text
//! VmHandle (owner thread) <--- protect thread: Protector<VmSource> ---> local store (spool) ---> Shipper ---> holders
//!                                  ^ every / on request                                            |
//!                                  +------------------- Fenced, NeedFull, Committed ---------------+
//! ```

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migrate::global::{Bucket, Found, Place, Remote};
use migrate::load::{LoadError, LoadPlan};
use migrate::protect::{CheckpointRequest, Parent, ProtectOptions, Protector};
use migrate::registry::VmState;
use migrate::shipper::{ShipStatus, Shipper, ShipperConfig};
use migrate::spool::{Position, Spool};
use migrate::store::{ChainError, Durability, FsStore, StoreError};
use migrate::transport::IdentityArgs;
use segment::{Generation, Keyring, SegmentName, Space, VmId};
use tokio::sync::{mpsc, watch};

use crate::boot::BootSource;
use crate::clock::ClockPolicy;
use crate::config::CheckpointConfig;
use crate::control::{RunState, VmHandle};
use crate::devices::virtio::disk::Disk;
use crate::devices::virtio::setup::{DeviceConfig, Devices};
use crate::memory::GuestRam;
use crate::preflight::{self, Lack};
use crate::replica::{VmSource, disk_space};
use crate::state;
use crate::vm::{MachineConfig, Vm};
use checkpoints::{Checkpoints, Progress};
use follower::Follower;
use image::Content;
use lease::LeaseKeeper;
use ownership::Ownership;

mod checkpoints;
mod disks;
mod error;
mod follower;
mod image;
mod lease;
mod ownership;
mod report;
pub mod requests;
mod sole;

pub use disks::{BindError, Bindings};
pub use error::{SessionError, chain};
pub use image::ImageFiles;
pub use report::{
    CheckpointReport, FailoverMode, HolderReport, OnLapse, Protection, ProtectionStatus, SessionStatus,
    StopReport,
};

/// What a session is made with.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// The VM's id in the cluster.
    pub name: VmId,
    /// Where its checkpoints are kept on this host.
    pub store: PathBuf,
    /// The most bytes they may take.
    pub store_budget: Option<u64>,
    /// How its checkpoints are written.
    pub checkpoints: CheckpointConfig,
    /// Protection from the start.
    pub protection: Option<Protection>,
    /// The generation this process owns; `None` to be given one by the registry (a new VM), or 1 without one.
    pub generation: Option<Generation>,
    /// Who this process is to the holders and the registry.
    pub trust: IdentityArgs,
    /// The user is certain that a restore under the VM's own name is not a second copy of it.
    pub second_copy: bool,
    /// What its checkpoints are encrypted with, and those it is restored from.
    pub keys: Keyring,
}

/// What a restore starts from.
#[derive(Debug, Clone)]
pub enum RestoreFrom {
    /// A store folder, and which checkpoint in it: the newest complete one of the VM when `None`.
    Store {
        /// The folder, of an agent or of a VM's own store.
        dir: PathBuf,
        /// The checkpoint.
        segment: Option<SegmentName>,
        /// The user named it, and may mean to go back to an older state than the cluster has.
        chosen: bool,
    },
    /// Segment files that make up a chain.
    Files(Vec<PathBuf>),
    /// A checkpoint of a store, whose content is in an image.
    Image {
        /// The folder.
        dir: PathBuf,
        /// The checkpoint.
        segment: SegmentName,
        /// The image.
        image: ImageFiles,
    },
    /// A restore point in a global store, read where it is.
    Global {
        /// The global store.
        place: Place,
        /// The restore point.
        segment: SegmentName,
    },
}

/// A VM in this process.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    vm: VmHandle,
    generation: Generation,
    restored_from: Option<SegmentName>,
    /// Where its stream sockets meet, if it has them.
    vsock: Option<PathBuf>,
    started: Instant,
    store: Arc<FsStore>,
    spool: Arc<Spool>,
    checkpoints: Checkpoints,
    /// What the checkpoint thread and the shipper's events report; held for a copy.
    progress: Arc<Mutex<Progress>>,
    /// The newest checkpoint that is committed.
    committed: watch::Sender<Option<SegmentName>>,
    /// The guest may ask for checkpoints: not during a stop, whose last one is to be the last. Held while one is taken.
    asking: tokio::sync::RwLock<bool>,
    /// Protection is turned on and off by requests that may overlap, and stopped at the end.
    guard: tokio::sync::Mutex<Option<Guard>>,
    /// Who acts on what the shipper reports; held for a moment.
    follower: Mutex<Option<tokio::task::JoinHandle<()>>>,
    /// What `status` shows of the guard, without waiting for a change under way; held for a copy.
    shown: Mutex<Option<(Protection, usize)>>,
}

/// A VM's place in the cluster. Once had it is kept until the end, protection on or off: as long as the guest may run
/// here, the registry must not take it for stopped.
#[derive(Debug)]
struct Guard {
    ownership: Ownership,
    /// Protection is on.
    shipping: bool,
}

/// How long a guest that is about to run waits for its first lease.
const FIRST_LEASE: Duration = Duration::from_secs(10);
/// How often it looks meanwhile.
const LEASE_LOOK: Duration = Duration::from_millis(2);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a session is built around.
struct Origin {
    vm: VmHandle,
    store: Arc<FsStore>,
    ownership: Option<Ownership>,
    generation: Generation,
    /// What its first checkpoint may build on.
    parent: Option<Parent>,
    restored_from: Option<SegmentName>,
    vsock: Option<PathBuf>,
}

impl Session {
    /// A new VM, about to execute its kernel's first instruction: [`Session::resume`] starts it.
    ///
    /// # Errors
    /// [`SessionError`]; nothing runs, and nothing is registered unless everything else was fine.
    pub async fn boot(
        config: SessionConfig,
        machine: MachineConfig,
        source: &BootSource,
    ) -> Result<Self, SessionError> {
        Self::boot_with(config, machine, source, &[]).await
    }

    /// The same, with devices.
    ///
    /// # Errors
    /// As [`Session::boot`], and what is wrong with a device.
    pub async fn boot_with(
        config: SessionConfig,
        machine: MachineConfig,
        source: &BootSource,
        devices: &[DeviceConfig],
    ) -> Result<Self, SessionError> {
        let devices = Devices::open(devices)?;
        let vsock = devices.vsock();
        // A new store waits for the disk, and the machine does not need it yet.
        let (settings, memory_bytes) = (config.clone(), machine.memory_bytes);
        let booted_from = file_bytes(&source.kernel) + source.initrd.as_deref().map_or(0, file_bytes);
        let opened = blocking(move || open_store(&settings, memory_bytes + booted_from));
        // The machine before the registry: a kernel that is none must not leave a VM behind in the cluster.
        let source = source.clone();
        let made = blocking(move || {
            VmHandle::start(|outbox, ended| {
                let leash = outbox.leash();
                let attach = |ram: &Arc<GuestRam>| devices.attach(ram, &leash, None).map_err(Into::into);
                Vm::boot(machine, &source, &attach, outbox, ended)
            })
        });
        let (store, vm) = tokio::join!(opened, made);
        let (store, vm) = (store??, vm??);
        let (ownership, generation) = own(&config, &store, None).await?;
        Self::new(
            config,
            Origin {
                vm,
                store,
                ownership,
                generation,
                parent: None,
                restored_from: None,
                vsock,
            },
        )
    }

    /// A VM from a checkpoint, not running yet. `clock` is about the time since the checkpoint.
    ///
    /// # Errors
    /// [`SessionError`]; nothing runs, and the checkpoint is as it was.
    pub async fn restore(
        config: SessionConfig,
        from: RestoreFrom,
        clock: ClockPolicy,
    ) -> Result<Self, SessionError> {
        Self::restore_with(config, from, clock, &Bindings::default()).await
    }

    /// The same, with the logical names of its devices bound to what this host has.
    ///
    /// # Errors
    /// As [`Session::restore`], and [`SessionError::Bind`].
    pub async fn restore_with(
        config: SessionConfig,
        from: RestoreFrom,
        clock: ClockPolicy,
        bindings: &Bindings,
    ) -> Result<Self, SessionError> {
        let content = Content::open(&config, &from)?;
        let tip = content.manifest().name.clone();
        sole::check(&config, &from, &tip)?;
        let records = content.records()?;
        let saved = state::from_records(&records).map_err(|source| SessionError::State {
            name: tip.clone(),
            source,
        })?;
        disks::check(&saved.virtio, bindings)?;
        let booted_from = content.booted_from().map_or(0, Space::bytes);
        let store = open_store(&config, saved.config.memory_bytes.saturating_add(booted_from))?;
        let (devices, filling) =
            disks::prepare(&saved.virtio, bindings, &config.store, content.disks().as_ref())?;
        let boot = content.boot()?;
        let disks: Vec<_> = devices.disks().chain(&boot).cloned().collect();
        check_spaces(&tip, content.spaces(), saved.config.memory_bytes, &disks)?;
        let vsock = devices.vsock();
        let manifest = content.manifest();
        let parent = Parent {
            name: tip.clone(),
            checkpoint: manifest.checkpoint,
            links: manifest.links,
        };
        // The machine before the registry: a host that cannot run the VM must not become its owner.
        let vm = blocking(move || {
            VmHandle::start(|outbox, ended| {
                let memory = |bytes| content.memory(bytes);
                let load = |ram: &GuestRam| content.fill(ram, &disks);
                let leash = outbox.leash();
                let attach = |ram: &Arc<GuestRam>| {
                    devices
                        .attach(ram, &leash, Some(&saved.virtio))
                        .map_err(Into::into)
                };
                let mut vm = Vm::restore(&saved, clock, memory, load, &attach, outbox, ended)?;
                if let Some(boot) = boot {
                    vm.set_boot(boot);
                }
                Ok(vm)
            })
        })
        .await??;
        // Everything written from here on is in the first delta.
        vm.log_from_now().await?;
        // Every restore: the guest may have been heard after the checkpoint, and other copies of it may run.
        vm.new_generation_id().await?;
        let implied = matches!(from, RestoreFrom::Store { chosen: false, .. }).then(|| Position {
            name: tip.clone(),
            checkpoint: parent.checkpoint,
        });
        let (ownership, generation) = own(&config, &store, implied).await?;
        // The last thing that may fail for the disks, and before the guest may run on them.
        blocking(move || disks::publish(filling)).await??;
        // A delta on it is of use only to those who have it: holders of the same VM, or this very store.
        let reachable = tip.vm == config.name && (ownership.is_some() || store.get(&tip).is_some());
        let parent = reachable.then_some(parent);
        Self::new(
            config,
            Origin {
                vm,
                store,
                ownership,
                generation,
                parent,
                restored_from: Some(tip),
                vsock,
            },
        )
    }

    /// What this host lacks to run a checkpoint with its devices bound so; nothing is made or changed. The memory's
    /// content is not looked at.
    ///
    /// # Errors
    /// [`SessionError`] when the checkpoint cannot be read, or /dev/kvm cannot be asked.
    pub fn preflight(
        config: &SessionConfig,
        from: &RestoreFrom,
        bindings: &Bindings,
    ) -> Result<(SegmentName, Vec<Lack>), SessionError> {
        let plan = load_plan(config, from)?;
        let name = plan.manifest().name.clone();
        if let Some((link, key)) = plan.missing_key() {
            // What else it needs is encrypted.
            let why =
                format!("{key}, which {link} is encrypted with: name the file that has it (--key-file)");
            return Ok((name, vec![Lack::Key(why)]));
        }
        let saved = state::from_records(&plan.records()?).map_err(|source| SessionError::State {
            name: name.clone(),
            source,
        })?;
        let mut lacks = preflight::check(&saved)?;
        let devices = disks::lacks(&saved.virtio, bindings, &config.store);
        lacks.extend(devices.into_iter().map(Lack::Device));
        Ok((name, lacks))
    }

    fn new(config: SessionConfig, origin: Origin) -> Result<Self, SessionError> {
        let Origin {
            vm,
            store,
            ownership,
            generation,
            parent,
            restored_from,
            vsock,
        } = origin;
        let options = ProtectOptions {
            level: 1,
            threads: cores(),
            producer: crate::PRODUCER.into(),
            max_links: MAX_LINKS,
            delta_cache: usize::try_from(config.checkpoints.delta_cache_bytes).unwrap_or(usize::MAX),
            first: parent,
        };
        let spool = Spool::new(Arc::clone(&store), config.name.clone(), options.level);
        let source = VmSource::new(vm.clone());
        let protector = Protector::new(
            source,
            Arc::clone(&store),
            config.name.clone(),
            generation,
            options,
        );
        let progress = Arc::default();
        let checkpoints = Checkpoints::start(protector, &vm, Arc::clone(&spool), Arc::clone(&progress))?;
        let session = Self {
            config,
            vm,
            generation,
            restored_from,
            vsock,
            started: Instant::now(),
            store,
            spool,
            checkpoints,
            progress,
            committed: watch::Sender::new(None),
            asking: tokio::sync::RwLock::new(true),
            guard: tokio::sync::Mutex::new(None),
            follower: Mutex::new(None),
            shown: Mutex::new(None),
        };
        if let Some(ownership) = ownership {
            if ownership.lease.is_some() {
                // It does not run yet, and will not before time is granted.
                session.vm.leash().hold();
            }
            session.begin_shipping(&ownership)?;
            *session.guard.try_lock().map_err(|_| SessionError::Stopping)? = Some(Guard {
                ownership,
                shipping: true,
            });
        }
        Ok(session)
    }

    /// Starts to ship, and to take checkpoints at the protection's pace.
    fn begin_shipping(&self, ownership: &Ownership) -> Result<(), SessionError> {
        let (events, inbox) = mpsc::unbounded_channel();
        let quorum = ownership.ack_quorum;
        let (adopted, by) = watch::channel(0);
        let lease = ownership.lease.map(|terms| {
            let name = self.config.name.clone();
            LeaseKeeper::start(
                name,
                self.vm.clone(),
                terms,
                ownership.electors(),
                adopted,
                ownership.on_lapse(),
            )
        });
        let lease = lease.transpose()?;
        let mut config = ShipperConfig::new(
            self.config.name.clone(),
            self.generation,
            &ownership.identity,
            ownership.protection.holders.clone(),
            quorum,
            Some(ownership.registry.clone()),
        );
        config.sender.lease = ownership.lease;
        config.adopted = Some(by);
        let shipper = Shipper::start(
            &tokio::runtime::Handle::current(),
            config,
            Arc::clone(&self.spool),
            events,
        );
        let follower = Follower {
            vm: self.vm.clone(),
            name: self.config.name.clone(),
            generation: self.generation,
            orders: self.checkpoints.orders(),
            progress: Arc::clone(&self.progress),
            committed: self.committed.clone(),
            lease,
        };
        *lock(&self.follower) = Some(tokio::spawn(follower.follow(inbox)));
        self.checkpoints.ship(Some(shipper));
        self.checkpoints
            .every(Some(Duration::from_millis(ownership.protection.every_ms)));
        *lock(&self.shown) = Some((ownership.protection.clone(), quorum));
        Ok(())
    }

    /// The machine: its state to watch, its outbox, its input.
    #[must_use]
    pub fn vm(&self) -> &VmHandle {
        &self.vm
    }

    /// The VM's id.
    #[must_use]
    pub fn name(&self) -> &VmId {
        &self.config.name
    }

    /// The generation this process owns.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Stops the guest; fine if it already stands still.
    ///
    /// # Errors
    /// [`SessionError::Control`] when it has ended.
    pub async fn pause(&self) -> Result<(), SessionError> {
        Ok(self.vm.pause().await?)
    }

    /// Lets the guest run; fine if it does. A protected VM runs only after the registry has agreed that it runs here.
    ///
    /// # Errors
    /// [`SessionError::Registry`] when another owns the VM or the registry is away, [`SessionError::Control`] when
    /// the guest is fenced or has ended.
    pub async fn resume(&self) -> Result<(), SessionError> {
        // Held over the resume: a stop that overlaps comes wholly before or after it.
        let guard = self.guard.lock().await;
        if let Some(guard) = guard.as_ref() {
            // Each time: while it stood still another may have become the owner.
            if *self.vm.state().borrow() != RunState::Running {
                guard
                    .ownership
                    .announce(self.generation, VmState::Running)
                    .await?;
                if guard.shipping && guard.ownership.lease.is_some() {
                    self.first_lease().await;
                }
            }
        }
        Ok(self.vm.resume().await?)
    }

    /// Waits until the guest has a lease; the resume tells when it has none.
    async fn first_lease(&self) {
        let leash = self.vm.leash();
        let until = Instant::now() + FIRST_LEASE;
        while !leash.allows() && Instant::now() < until {
            tokio::time::sleep(LEASE_LOOK).await;
        }
    }

    /// Takes a checkpoint now, into the local store (and on to the holders, if there are any).
    ///
    /// # Errors
    /// [`SessionError::Checkpoint`]: the guest is as it was.
    pub async fn checkpoint(&self, request: CheckpointRequest) -> Result<CheckpointReport, SessionError> {
        self.checkpoints.take(request).await
    }

    /// The newest committed checkpoint, to wait for.
    #[must_use]
    pub fn committed(&self) -> watch::Receiver<Option<SegmentName>> {
        self.committed.subscribe()
    }

    /// Answers checkpoints that the guest asks for, if it has stream sockets: see [`requests`]. Without its port the VM
    /// runs as well, and the log says why it has none.
    pub fn serve_guest(self: &Arc<Self>) {
        if let Some(vsock) = &self.vsock
            && let Err(error) = requests::serve(self, vsock)
        {
            tracing::warn!(vm = %self.config.name, error = %chain(&error), "the guest cannot ask for checkpoints");
        }
    }

    /// The checkpoints in the local store, oldest first.
    #[must_use]
    pub fn stored(&self) -> Vec<migrate::store::Entry> {
        self.store.entries(&self.config.name)
    }

    /// The segment files of a checkpoint in the local store, the full one first.
    ///
    /// # Errors
    /// [`SessionError::Chain`] when a link is not here.
    pub fn chain_files(&self, name: &SegmentName) -> Result<Vec<PathBuf>, SessionError> {
        let chain = self.store.chain(name).map_err(|source| SessionError::Chain {
            name: name.clone(),
            source: Box::new(source),
        })?;
        Ok(chain
            .iter()
            .map(|entry| self.store.segment_path(&entry.name))
            .collect())
    }

    /// Turns protection on, or off (`None`).
    ///
    /// # Errors
    /// [`SessionError`]: protection is as it was.
    pub async fn protect(&self, protection: Option<Protection>) -> Result<(), SessionError> {
        let mut guard = self.guard.lock().await;
        self.leave_if_forgotten(&mut guard).await;
        match (guard.as_mut(), protection) {
            // Being without it is what is wanted, then.
            (None, None) => lock(&self.progress).forgotten = None,
            (Some(on), None) => {
                // First: without holders nobody may think that the owner runs under a lease.
                if on.shipping {
                    on.ownership.disarrange(self.generation).await?;
                }
                self.stop_shipping(on).await;
            }
            (Some(on), Some(new)) => {
                if !on.ownership.same_cluster(&new) {
                    return Err(SessionError::Protection(
                        "the holders, the quorum or the registry of a VM cannot be changed while it runs: stop it, \
                         and start it again with others"
                            .into(),
                    ));
                }
                ownership::check_pace(&new)?;
                on.ownership.protection.every_ms = new.every_ms;
                if on.shipping {
                    self.checkpoints.every(Some(Duration::from_millis(new.every_ms)));
                    *lock(&self.shown) = Some((on.ownership.protection.clone(), on.ownership.ack_quorum));
                } else {
                    self.announce_if_running(&on.ownership).await?;
                    on.ownership.arrange(self.generation).await?;
                    self.begin_shipping(&on.ownership)?;
                    on.shipping = true;
                }
            }
            (None, Some(new)) => {
                let mut ownership =
                    Ownership::prepare(&self.config.name, new, &self.config.trust, false).await?;
                // The session's generation is in every checkpoint it has taken, so it cannot change: the registry
                // must give the very same one.
                ownership.claim_exactly(self.generation).await?;
                self.store.promise(&self.config.name, self.generation)?;
                // Ours from here on, whatever fails below: a second try finds it.
                let on = guard.insert(Guard {
                    ownership,
                    shipping: false,
                });
                self.announce_if_running(&on.ownership).await?;
                on.ownership.arrange(self.generation).await?;
                self.begin_shipping(&on.ownership)?;
                on.shipping = true;
            }
        }
        Ok(())
    }

    /// Lets go of a place in the cluster that the registry does not know any more: what follows is as for a VM that never had
    /// one. (Its name goes on there with a higher generation, and this process has only its own: no protection is had for
    /// it again.)
    async fn leave_if_forgotten(&self, guard: &mut Option<Guard>) {
        let forgotten = lock(&self.progress).forgotten.is_some();
        if forgotten && let Some(mut on) = guard.take() {
            self.stop_shipping(&mut on).await;
        }
    }

    async fn announce_if_running(&self, ownership: &Ownership) -> Result<(), SessionError> {
        if *self.vm.state().borrow() == RunState::Running {
            ownership.announce(self.generation, VmState::Running).await?;
        }
        Ok(())
    }

    /// Protection off: the holders get nothing more, and the local store must stand by itself again.
    async fn stop_shipping(&self, on: &mut Guard) {
        self.checkpoints.every(None);
        if let Some(shipper) = self.checkpoints.ship(None) {
            shipper.stop().await;
        }
        // Ends with the shipper's last event, and who counts the lease with it: nobody holds the guest then.
        let follower = lock(&self.follower).take();
        if let Some(follower) = follower {
            let _ = follower.await;
        }
        // Those it has now: they may have changed since it began.
        for holder in self.spool.holders() {
            self.spool.remove_holder(&holder);
        }
        // What the holders had may be gone from here: the next checkpoint builds on nothing.
        self.checkpoints.orders().full();
        *lock(&self.shown) = None;
        self.vm.leash().free();
        on.shipping = false;
    }

    /// What the VM is doing.
    #[must_use]
    pub fn status(&self) -> SessionStatus {
        let state = self.vm.state().borrow().clone();
        let progress = lock(&self.progress).clone();
        let shipping = self.checkpoints.shipping();
        let protection = lock(&self.shown)
            .clone()
            .filter(|_| progress.forgotten.is_none())
            .map(|(protection, ack_quorum)| ProtectionStatus {
                every_ms: protection.every_ms,
                ack_quorum,
                registry: protection.registry,
                failover: protection.failover.unwrap_or_default(),
                detect: protection.detect,
                on_lapse: protection.on_lapse.unwrap_or_default(),
                holders: shipping
                    .iter()
                    .flat_map(|status| &status.holders)
                    .map(HolderReport::from)
                    .collect(),
            });
        let committed = shipping
            .as_ref()
            .and_then(|status| status.committed.as_ref())
            .map(ToString::to_string);
        let config = self.vm.config();
        SessionStatus {
            name: self.config.name.to_string(),
            generation: self.generation.0,
            state: state.word().into(),
            reason: state.reason(),
            pid: std::process::id(),
            vcpus: config.vcpus,
            memory_mib: config.memory_bytes >> 20,
            up_ms: self.started.elapsed().as_millis() as u64,
            restored_from: self.restored_from.as_ref().map(ToString::to_string),
            newest: progress.newest,
            committed,
            checkpoints: progress.checkpoints,
            raw_bytes: progress.raw_bytes,
            stored_bytes: progress.stored_bytes,
            shipped_bytes: shipping
                .iter()
                .flat_map(|status| &status.holders)
                .map(|h| h.bytes_sent)
                .sum(),
            problem: progress.forgotten.or(progress.problem),
            store: self.store.dir().display().to_string(),
            store_bytes: self.store.used_bytes(),
            store_budget: self.store.budget(),
            protection,
        }
    }

    /// The last state could not be committed: it is kept in the local store, which on its own has changes only.
    async fn keep_here(&self, shipping: &ShipStatus, report: &mut StopReport) {
        let full = CheckpointRequest {
            full: true,
            ..CheckpointRequest::default()
        };
        report.problems.push(match self.checkpoint(full).await {
            Ok(kept) => format!(
                "all of it is kept as {} in {}: start the agents, then `vmm restore --name {}` with the same \
                 --protect-to goes on from there",
                kept.name,
                self.config.store.display(),
                self.config.name
            ),
            Err(error) => format!(
                "it cannot be kept here either ({}): what the guest did since {} is lost",
                chain(&error),
                shipping
                    .committed
                    .as_ref()
                    .map_or("its start".to_owned(), ToString::to_string)
            ),
        });
    }

    /// Ends the VM: stops the guest, takes a last checkpoint of a protected one and gives the holders up to `drain`
    /// to get what they lack, and tells the registry that it is stopped.
    ///
    /// # Errors
    /// [`SessionError::Control`] when the VM is gone already.
    pub async fn stop(&self, drain: Duration) -> Result<StopReport, SessionError> {
        let mut report = StopReport::clean();
        let mut guard = self.guard.lock().await;
        self.leave_if_forgotten(&mut guard).await;
        self.checkpoints.every(None);
        *self.asking.write().await = false;
        let live = matches!(
            *self.vm.state().borrow(),
            RunState::Running | RunState::Paused | RunState::Lapsed { .. }
        );
        let shipping = guard.as_ref().is_some_and(|guard| guard.shipping);
        if live && shipping {
            // A guest that ends of itself meanwhile has no last state to save.
            let last = match self.vm.pause().await {
                Ok(()) => self.checkpoint(CheckpointRequest::default()).await.map(drop),
                Err(error) => Err(error.into()),
            };
            if let Err(error) = last {
                report.committed = false;
                report.problems.push(format!(
                    "the last checkpoint before the stop failed: {}",
                    chain(&error)
                ));
            }
        }
        // While the guest is there still: what cannot be committed is kept here in full. (Nobody lets it run meanwhile:
        // that waits for the guard.)
        let shipper = self.checkpoints.ship(None);
        if let Some(shipper) = shipper.as_ref().filter(|_| live) {
            report.committed &= shipper.drain(drain).await;
            report.add_lacking(&shipper.status());
            if !report.committed {
                self.keep_here(&shipper.status(), &mut report).await;
            }
        }
        self.checkpoints.end().await;
        let stopped = self.vm.stop().await;
        if let Some(shipper) = shipper {
            if stopped.is_ok() {
                // It never runs again here: nobody has to wait for its lease.
                shipper.release();
            }
            shipper.stop().await;
        }
        if let Some(guard) = guard.as_ref()
            && let Err(error) = guard.ownership.announce(self.generation, VmState::Stopped).await
        {
            report.problems.push(format!(
                "the registry was not told that it is stopped: {}",
                chain(&error)
            ));
        }
        for problem in &report.problems {
            tracing::warn!(vm = %self.config.name, problem, "at the stop");
        }
        stopped?;
        Ok(report)
    }
}

/// Runs what may take long without holding up the runtime's other work.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, SessionError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| SessionError::Stopping)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Links after which a periodic checkpoint is full: a restore never reads more.
const MAX_LINKS: u32 = 1000;

/// What the local store of a protected VM may take at least, beside its memory's share.
const SPOOL_BYTES: u64 = 256 << 20;

/// The length of a file; 0 when there is none, which is said where it is read.
fn file_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |file| file.len())
}

/// `memory_bytes`: of what is in a full checkpoint beside the disks.
fn open_store(config: &SessionConfig, memory_bytes: u64) -> Result<Arc<FsStore>, SessionError> {
    // A protected VM's local store dies with its host and is only a way to the holders; without holders it is all
    // there is.
    let (durability, usual) = match config.protection {
        // Room for a full checkpoint beside the one before it and the deltas meanwhile: with less, a holder that
        // lags too far could never be given a new start.
        Some(_) => (
            Durability::Spool,
            Some(memory_bytes.saturating_mul(3).saturating_add(SPOOL_BYTES)),
        ),
        None => (Durability::Durable, None),
    };
    let store = FsStore::open(&config.store, config.store_budget.or(usual), durability)?;
    store.set_keys(config.keys.clone());
    sole::check_own(config, &store)?;
    Ok(store)
}

/// Who this process is for the cluster, and under which generation.
async fn own(
    config: &SessionConfig,
    store: &FsStore,
    implied: Option<Position>,
) -> Result<(Option<Ownership>, Generation), SessionError> {
    // Above everything this store has seen under the name, so that no two states get one name.
    let newest = store
        .entries(&config.name)
        .last()
        .map_or(Generation(0), |entry| entry.name.generation);
    let floor = newest.max(store.promised(&config.name));
    let Some(protection) = config.protection.clone() else {
        return Ok((None, config.generation.unwrap_or(floor.next())));
    };
    let mut ownership = Ownership::prepare(
        &config.name,
        protection,
        &config.trust,
        config.generation.is_some(),
    )
    .await?;
    let generation = match config.generation {
        Some(generation) => ownership.confirm(generation).await?,
        None => ownership.claim(floor, implied.as_ref()).await?,
    };
    // A restore from this store has to ask the registry from now on.
    store.promise(&config.name, generation)?;
    ownership.arrange(generation).await?;
    Ok((Some(ownership), generation))
}

fn load_plan(config: &SessionConfig, from: &RestoreFrom) -> Result<LoadPlan, SessionError> {
    match from {
        RestoreFrom::Files(paths) => Ok(LoadPlan::from_files_with(paths, &config.keys)?),
        RestoreFrom::Image { dir, segment, .. } => {
            let store = FsStore::open_chain(dir, &segment.vm, Some(segment))?;
            plan_from(config, &store, Some(segment))
        }
        RestoreFrom::Global { place, segment } => {
            let failed = |error| SessionError::Global(Box::new(error));
            let remote = Bucket::open(place).and_then(Remote::new).map_err(failed)?;
            let found = Found::Name(segment.clone());
            let chain = remote.find(&segment.vm, found).map_err(failed)?;
            Ok(remote.plan(&chain, &config.keys)?)
        }
        RestoreFrom::Store { dir, segment, .. } => {
            let vm = segment.as_ref().map_or(&config.name, |name| &name.vm);
            let store = FsStore::open_chain(dir, vm, segment.as_ref()).map_err(|error| match error {
                // A folder without a store has no chain either; said in the terms of what was asked for.
                StoreError::NoStore { .. } => SessionError::NothingToRestore {
                    dir: dir.clone(),
                    vm: config.name.clone(),
                },
                error => error.into(),
            })?;
            plan_from(config, &store, segment.as_ref())
        }
    }
}

fn plan_from(
    config: &SessionConfig,
    store: &FsStore,
    segment: Option<&SegmentName>,
) -> Result<LoadPlan, SessionError> {
    store.set_keys(config.keys.clone());
    let tip = match segment {
        Some(name) => name.clone(),
        None => store
            .newest_complete(&config.name)
            .map(|entry| entry.name)
            .ok_or_else(|| SessionError::NothingToRestore {
                dir: store.dir().to_owned(),
                vm: config.name.clone(),
            })?,
    };
    LoadPlan::new(store, &tip).map_err(|error| {
        // "Missing" is not all there is to say of a link whose file is there.
        let missing = match &error {
            LoadError::Chain { source, .. } => match &**source {
                ChainError::Missing { link, .. } => Some(link),
                _ => None,
            },
            _ => None,
        };
        match store
            .damaged()
            .into_iter()
            .find(|file| Some(&file.name) == missing)
        {
            Some(file) => SessionError::Unusable {
                name: tip,
                path: file.path,
                why: file.why,
            },
            None => error.into(),
        }
    })
}

/// The memory and the disks that the records speak of, and what the guest was booted from, are those the pages are for.
fn check_spaces(
    tip: &SegmentName,
    spaces: &[Space],
    memory_bytes: u64,
    disks: &[Arc<Disk>],
) -> Result<(), SessionError> {
    let unfit = |why| SessionError::Unfit {
        name: tip.clone(),
        why,
    };
    let Some((memory, others)) = spaces.split_first() else {
        return Err(unfit("it has no address space".into()));
    };
    let bytes = memory.bytes();
    if memory.id != segment::SpaceId::MEMORY
        || bytes != memory_bytes
        || memory.page_bytes as usize != crate::memory::PAGE_BYTES
    {
        return Err(unfit(format!(
            "its memory space has {bytes} bytes and its machine {memory_bytes}"
        )));
    }
    let wanted = disks
        .iter()
        .enumerate()
        .map(|(index, disk)| disk_space(index, disk));
    if !wanted.eq(others.iter().cloned()) {
        return Err(unfit(
            "its address spaces are not those of the disks its machine has".into(),
        ));
    }
    Ok(())
}
