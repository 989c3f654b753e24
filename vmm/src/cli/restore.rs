//! `vmm restore`.

use std::path::{Path, PathBuf};

use clap::Args;
use migrate::global::GlobalArgs;
use migrate::store::{FsStore, Lineage, Moment, MomentError, StoreError};
use segment::{CheckpointId, Generation, SegmentName, SegmentReader, VmId};

use super::host::{self, Audience, Host};
use super::logging::Log;
use super::options::{Keeping, Manner, RunDir, absolute};
use super::{CliError, Outcome, devices, global, on_runtime, rundir};
use crate::api::instance::{Identity, Origin};
use crate::clock::ClockPolicy;
use crate::config::{CheckpointConfig, VmConfig};
use crate::session::{Bindings, ImageFiles, RestoreFrom, Session, SessionConfig, SessionError};

/// Runs a VM from a checkpoint: from a store (of a VM or of an agent), or from segment files.
#[derive(Debug, Args)]
#[command(
    after_help = "On a terminal, Ctrl-A x ends the VM and Ctrl-A Ctrl-A is one Ctrl-A for the \
                        guest.\nExit status: 0 the guest ended or was stopped, 1 an error, 3 fenced, 4 the guest cannot go \
                        on.\nExamples:\n  vmm restore --name web                      # its newest checkpoint here\n  \
                        vmm restore web/1/42 --name web             # that one\n  \
                        vmm restore --from /data/store web --name copy --store /tmp/copy\n  \
                        vmm restore web@-10m --from s3://pool/a --name copy     # of a global store\n  \
                        vmm restore --name copy full.seg delta.seg  # a chain of files\n  \
                        vmm restore --check full.seg                # can this host run it?"
)]
pub(super) struct Restore {
    /// Folder of the store to take the checkpoint from, or a global store: s3://BUCKET/PREFIX, file:///FOLDER [default:
    /// the VM's own]
    #[arg(long, value_name = "DIR|s3://..")]
    from: Option<PathBuf>,
    #[command(flatten)]
    global: GlobalArgs,
    /// The checkpoint, <vm>/<generation>/<epoch> [default: the newest that is whole]
    #[arg(long, value_name = "NAME")]
    segment: Option<SegmentName>,
    /// A VM or a checkpoint in the store, VM@TIME (like web@-10m, web@2026-11-24T09:30:00Z, web@42, web@3/42: the newest
    /// at or before it), or the segment files of a chain
    #[arg(value_name = "VM|CHECKPOINT|VM@TIME|FILES")]
    what: Vec<PathBuf>,
    /// The VM's id here [default: as in the checkpoint]
    #[arg(long)]
    name: Option<String>,
    /// Run it under its own name though another may run under that name: only when you are certain that none does
    #[arg(long)]
    allow_second_copy: bool,
    /// The generation that the registry has given this process
    #[arg(long, value_name = "G")]
    generation: Option<u64>,
    /// What a device of the VM is on this host: disk:NAME=FILE (made anew; without it, a file in the store),
    /// net:NAME=TAP or vsock:0=PATH (without it, RUN_DIR/NAME/vsock). Can be given again
    #[arg(long, value_name = "NAME=WHAT", value_parser = devices::binding)]
    bind: Vec<(String, String)>,
    /// What this host has for a device of that name, should the VM have it: like --bind, and ignored where it has not
    #[arg(long, value_name = "NAME=WHAT", value_parser = devices::binding)]
    offer: Vec<(String, String)>,
    /// Run on this image of the guest's memory instead of loading the chain: a memfd sealed against changes of its size,
    /// like /proc/self/fd/0. The VM keeps it
    #[arg(long, value_name = "FILE", requires_all = ["segment", "image_checkpoint"], conflicts_with_all = ["check", "detach"])]
    image: Option<PathBuf>,
    /// The id of the checkpoint that the image is of
    #[arg(long, value_name = "ID", requires = "image")]
    image_checkpoint: Option<CheckpointId>,
    /// The image of a disk: it becomes the disk's file; and, as boot, of what the guest was booted from. Can be given again
    #[arg(long, value_name = "disk:NAME=FILE", requires = "image", value_parser = devices::image_file)]
    image_disk: Vec<(String, String)>,
    #[command(flatten)]
    keeping: Keeping,
    #[command(flatten)]
    run_dir: RunDir,
    /// Path of the control socket [default: RUN_DIR/NAME/api.sock]
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// Say with one line of JSON on standard output that the VM runs, or why not, and nothing else there
    #[arg(long)]
    ready_stdout: bool,
    /// What the guest's clocks do about the time since the checkpoint: catch-up (right for a failover) or frozen
    #[arg(long, value_name = "POLICY", default_value = "catch-up")]
    clock: ClockPolicy,
    /// Only say whether this host can run it: what is missing, one a line. Nothing is made or run
    #[arg(long, conflicts_with_all = ["paused", "ready_stdout", "api_sock", "detach"])]
    check: bool,
    /// Leave it paused
    #[arg(long)]
    paused: bool,
    #[command(flatten)]
    manner: Manner,
}

/// What the arguments mean.
struct Wanted {
    name: VmId,
    from: RestoreFrom,
}

impl Restore {
    pub(super) fn run(self) -> Result<Outcome, CliError> {
        if self.check {
            return self.check();
        }
        if self.manner.detach && !self.manner.detached_child {
            self.host()?;
            return super::detach::detach();
        }
        let audience = self.audience();
        let log = Log::start(if audience == Audience::Terminal {
            "warn"
        } else {
            "info"
        })
        .map_err(CliError::Said)?;
        let result = self.host().and_then(|host| on_runtime(host.run(&log)));
        result.or_else(|error| host::tell_failure(audience, error))
    }

    /// `--check`.
    fn check(&self) -> Result<Outcome, CliError> {
        let mut config = VmConfig::default();
        self.keeping.apply(&mut config)?;
        let Wanted { name, from } = self.wanted(&config)?;
        let vsock = rundir::vsock(&self.run_dir.path(), &name);
        let session = SessionConfig {
            store: self.keeping.store(&name, &config),
            name,
            store_budget: None,
            protection: None,
            generation: None,
            trust: self.keeping.trust.clone(),
            checkpoints: CheckpointConfig::default(),
            second_copy: self.allow_second_copy,
            keys: self.keeping.keys()?,
        };
        let bindings = Bindings {
            named: self.bind.iter().cloned().collect(),
            offered: self.offer.iter().cloned().collect(),
        }
        .or_vsock(&vsock);
        let (checkpoint, lacks) = Session::preflight(&session, &from, &bindings)?;
        for lack in &lacks {
            println!("missing: {lack}");
        }
        if lacks.is_empty() {
            println!("this host can run {checkpoint}");
            return Ok(Outcome::Done);
        }
        Err(CliError::Said(format!(
            "this host cannot run {checkpoint}: {} of what it needs are missing, as listed",
            lacks.len()
        )))
    }

    fn audience(&self) -> Audience {
        match (self.manner.detached_child, self.ready_stdout) {
            (true, _) => Audience::Parent { detached: true },
            (false, true) => Audience::Parent { detached: false },
            (false, false) => Audience::Terminal,
        }
    }

    fn host(&self) -> Result<Host, CliError> {
        let mut config = VmConfig {
            bindings: self.bind.iter().cloned().collect(),
            offers: self.offer.iter().cloned().collect(),
            ..VmConfig::default()
        };
        self.keeping.apply(&mut config)?;
        let Wanted { name, from } = self.wanted(&config)?;
        let protected = config.protection.is_some();
        let run_dir = self.run_dir.path();
        let console_log = match (&self.manner.console_log, self.audience()) {
            (Some(log), _) => Some(absolute(log)),
            (None, Audience::Parent { detached: true }) => {
                Some(run_dir.join(name.as_str()).join("console.log"))
            }
            (None, Audience::Parent { detached: false } | Audience::Terminal) => None,
        };
        Ok(Host {
            identity: Identity {
                store: self.keeping.store(&name, &config),
                store_budget: self.keeping.budget(),
                generation: self.generation.map(Generation),
                trust: self.keeping.trust.clone(),
                second_copy: self.allow_second_copy,
                keys: self.keeping.keys()?,
                vsock: rundir::vsock(&run_dir, &name),
                name,
            },
            config,
            start: Some((Origin::Restore(from, self.clock), !self.paused)),
            run_dir,
            api_sock: self.api_sock.as_deref().map(absolute),
            console_log,
            audience: self.audience(),
            // Who was given a generation is the owner, whatever process of an earlier one is still there.
            over_older: self.generation.is_some() && (protected || self.allow_second_copy),
            nameless: false,
        })
    }

    fn wanted(&self, config: &VmConfig) -> Result<Wanted, CliError> {
        let given = self.name.as_deref().map(VmId::new).transpose()?;
        if let Some(place) = global::place(self.from.as_deref(), &self.global)? {
            let say = !self.manner.detached_child;
            let (name, from) = global::wanted(place, &self.what, self.segment.as_ref(), given, say)?;
            return Ok(Wanted { name, from });
        }
        let text = |path: &Path| path.to_str().map(str::to_owned);
        let one = match self.what.as_slice() {
            [one] if !one.is_file() => text(one),
            _ => None,
        };
        if let Some(one) = one.filter(|_| self.segment.is_none()) {
            if let Some((vm, moment)) = one.split_once('@') {
                return self.at(given, VmId::new(vm)?, moment, config);
            }
            if let Ok(segment) = one.parse::<SegmentName>() {
                return Ok(self.in_store(given, segment.vm.clone(), Some(segment), config));
            }
            if let Ok(vm) = VmId::new(&one) {
                return self.newest(given, vm, config);
            }
        }
        match (&self.segment, self.what.is_empty(), given) {
            (Some(segment), true, given) => {
                let mut wanted = self.in_store(given, segment.vm.clone(), Some(segment.clone()), config);
                if let (Some(memory), Some(checkpoint)) = (&self.image, self.image_checkpoint) {
                    wanted.from = RestoreFrom::Image {
                        dir: self.source(&segment.vm, config),
                        segment: segment.clone(),
                        image: ImageFiles {
                            memory: memory.clone(),
                            checkpoint,
                            disks: self
                                .image_disk
                                .iter()
                                .map(|(n, p)| (n.clone(), p.into()))
                                .collect(),
                        },
                    };
                }
                Ok(wanted)
            }
            (None, true, Some(name)) => self.newest(Some(name.clone()), name, config),
            (None, true, None) => Err(CliError::Said(
                "nothing to restore is named: give a VM, a checkpoint (--segment web/1/42), or segment files"
                    .into(),
            )),
            (None, false, _) if self.from.is_some() => Err(CliError::Said(
                "--from names a store: name a VM or a checkpoint in it, and no files".into(),
            )),
            (None, false, given) => self.files(given),
            (Some(_), false, _) => Err(CliError::Said(
                "--segment names the checkpoint: name no other beside it".into(),
            )),
        }
    }

    /// The store to take from: the one that was named, or the VM's own.
    fn source(&self, vm: &VmId, config: &VmConfig) -> PathBuf {
        self.from
            .clone()
            .unwrap_or_else(|| self.keeping.store(vm, config))
    }

    fn in_store(
        &self,
        given: Option<VmId>,
        vm: VmId,
        segment: Option<SegmentName>,
        config: &VmConfig,
    ) -> Wanted {
        let dir = self.source(&vm, config);
        Wanted {
            name: given.unwrap_or(vm),
            from: RestoreFrom::Store {
                dir,
                segment,
                chosen: true,
            },
        }
    }

    /// The restore point of `vm` that `moment` means.
    fn at(&self, given: Option<VmId>, vm: VmId, moment: &str, config: &VmConfig) -> Result<Wanted, CliError> {
        let said = |error: MomentError| CliError::Said(error.to_string());
        let moment: Moment = moment.parse().map_err(said)?;
        if self.from.is_some() && self.generation.is_none() && given.as_ref().is_none_or(|name| *name == vm) {
            // It would be a second VM of that name beside the one that the store is a holder of.
            return Err(CliError::Said(format!(
                "a restore point of {vm} from another store is a copy: give it a name of its own with --name"
            )));
        }
        let dir = self.source(&vm, config);
        let points = match FsStore::open_read_only(&dir) {
            Ok(store) => Lineage::new(store.entries(&vm)).points(),
            Err(StoreError::NoStore { .. }) => return Err(SessionError::NothingToRestore { dir, vm }.into()),
            Err(error) => return Err(SessionError::Store(error).into()),
        };
        let now = Moment::now();
        let point = moment.choose(&vm, &points, now).map_err(said)?;
        if !self.manner.detached_child {
            let age =
                std::time::Duration::from_secs(now.saturating_sub(point.created_unix_ns) / 1_000_000_000);
            let age = humantime::format_duration(age);
            eprintln!("{vm}@{moment} is {}, taken {age} ago", point.name);
        }
        let segment = Some(point.name.clone());
        Ok(self.in_store(given, vm, segment, config))
    }

    /// The newest whole checkpoint of `vm`, found here: under another name the session would look for that one's.
    fn newest(&self, given: Option<VmId>, vm: VmId, config: &VmConfig) -> Result<Wanted, CliError> {
        let dir = self.source(&vm, config);
        let (newest, newer) = match FsStore::open_chain(&dir, &vm, None) {
            Ok(store) => (
                store.newest_complete(&vm),
                store.damaged().into_iter().max_by(|a, b| a.name.cmp(&b.name)),
            ),
            Err(StoreError::NoStore { .. }) => (None, None),
            Err(error) => return Err(SessionError::Store(error).into()),
        };
        let Some(newest) = newest else {
            return Err(match newer {
                Some(bad) => CliError::Said(format!(
                    "no checkpoint of {vm} in {dir:?} can be restored: {}: {}",
                    bad.path.display(),
                    bad.why
                )),
                None => SessionError::NothingToRestore { dir, vm }.into(),
            });
        };
        // To go back is for the user to say, not for a file that cannot be read.
        if let Some(bad) = newer.filter(|bad| bad.name > newest.name) {
            return Err(CliError::Said(format!(
                "the newest checkpoint of {vm}, {}, cannot be used: {}. The newest that can is {}: `vmm restore {}` goes \
                 on from it",
                bad.name, bad.why, newest.name, newest.name
            )));
        }
        Ok(Wanted {
            name: given.unwrap_or(vm),
            from: RestoreFrom::Store {
                dir,
                segment: Some(newest.name),
                chosen: false,
            },
        })
    }

    fn files(&self, given: Option<VmId>) -> Result<Wanted, CliError> {
        let name = match given {
            Some(name) => name,
            None => {
                let Some(first) = self.what.first() else {
                    return Err(CliError::Said("no file is named".into()));
                };
                let file = migrate::regular::open(first)
                    .map_err(CliError::io(format!("open the segment {first:?}")))?;
                let reader = SegmentReader::open(file).map_err(|source| CliError::Segment {
                    path: first.clone(),
                    source,
                })?;
                reader.manifest().name.vm.clone()
            }
        };
        Ok(Wanted {
            name,
            from: RestoreFrom::Files(self.what.clone()),
        })
    }
}
