//! What can go wrong with a session.

use std::path::PathBuf;

use migrate::global::GlobalError;
use migrate::load::LoadError;
use migrate::protect::ProtectError;
use migrate::registry::RegistryError;
use migrate::store::{ChainError, StoreError};
use migrate::transport::TransportError;
use segment::{Generation, SegmentName, VmId};

use super::BindError;
use crate::control::ControlError;
use crate::devices::virtio::setup::SetupError;
use crate::state::StateError;
use crate::vm::VmError;

/// Why a session could not be made or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The machine.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The local store.
    #[error("use the local store")]
    Store(#[from] StoreError),
    /// The chain to restore from.
    #[error("load the checkpoint")]
    Load(#[from] LoadError),
    /// The global store it is in.
    #[error(transparent)]
    Global(Box<GlobalError>),
    /// The records in it.
    #[error("read the machine's state from {name}")]
    State {
        /// The checkpoint.
        name: SegmentName,
        /// What is wrong.
        #[source]
        source: StateError,
    },
    /// The checkpoint does not fit itself.
    #[error("checkpoint {name}: {why}")]
    Unfit {
        /// The checkpoint.
        name: SegmentName,
        /// What does not fit.
        why: String,
    },
    /// There is nothing to restore.
    #[error(
        "{dir:?} has no whole chain of VM {vm}: `vmm inspect` shows what a segment file is, `standby ls` what an agent holds"
    )]
    NothingToRestore {
        /// The store.
        dir: PathBuf,
        /// The VM.
        vm: VmId,
    },
    /// A checkpoint failed. The guest runs on.
    #[error("take a checkpoint (the guest is as it was, earlier checkpoints are in place)")]
    Checkpoint(#[source] ProtectError),
    /// A chain in the local store.
    #[error("the chain of {name} is not whole here")]
    Chain {
        /// The checkpoint.
        name: SegmentName,
        /// Which link.
        #[source]
        source: Box<ChainError>,
    },
    /// Without the registry nobody knows whether it runs elsewhere.
    #[error(
        "VM {vm} is in the care of a cluster ({dir:?} has promised its generation {generation}), and without asking it \
         a second copy could run under the same name. To take it over: `standby promote {vm}`. To go on with a VM that \
         was stopped: restore it with --protect-to and its holders. For a copy beside it: --name OTHER. If you are \
         certain that it runs nowhere else: --allow-second-copy"
    )]
    InCare {
        /// The VM.
        vm: VmId,
        /// What is promised.
        generation: Generation,
        /// Where.
        dir: PathBuf,
    },
    /// Nothing says that it does not run elsewhere.
    #[error(
        "VM {vm} may run already, and a second copy would act under the same name: without a registry to ask, it goes on \
         from its own store alone, which is {own:?} here (--store DIR for another). For a copy beside it: --name OTHER. \
         If you are certain that it runs nowhere else: --allow-second-copy"
    )]
    SecondCopy {
        /// The VM.
        vm: VmId,
        /// Its store on this host.
        own: PathBuf,
    },
    /// A file of the chain is there and of no use.
    #[error("checkpoint {name} cannot be restored: {} cannot be used: {why}", path.display())]
    Unusable {
        /// The checkpoint.
        name: SegmentName,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The store named for it is not its own.
    #[error("the store {dir:?} is that of VM {other}: give VM {vm} a folder of its own with --store")]
    StoreOfAnother {
        /// The VM.
        vm: VmId,
        /// Whose store it is.
        other: VmId,
        /// The folder.
        dir: PathBuf,
    },
    /// The image is none of this checkpoint.
    #[error("run {name} on the image {path:?}: {why}")]
    Image {
        /// The checkpoint.
        name: SegmentName,
        /// The image's memory.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The registry refused, or is away.
    #[error("agree with the registry on who owns VM {vm}")]
    Registry {
        /// The VM.
        vm: VmId,
        /// Its answer.
        #[source]
        source: RegistryError,
    },
    /// Too few holders answer.
    #[error(
        "{up} of {holders} holders answer, and {quorum} are needed for a commit ({why}). Start the agents with \
         `standby serve`, or name others with --protect-to"
    )]
    Holders {
        /// Those that answer.
        up: usize,
        /// All.
        holders: usize,
        /// The ack quorum.
        quorum: usize,
        /// Why the others do not.
        why: String,
    },
    /// This process has no certificate that others would believe.
    #[error("protect the VM")]
    Identity(#[source] TransportError),
    /// The protection asked for cannot be.
    #[error("{0}")]
    Protection(String),
    /// A device of a new VM.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A device of a restored VM.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The thread that takes checkpoints.
    #[error("start the checkpoint thread")]
    Thread(#[source] std::io::Error),
    /// The session has ended.
    #[error("the VM is being stopped")]
    Stopping,
}

impl From<VmError> for SessionError {
    fn from(error: VmError) -> Self {
        Self::Control(error.into())
    }
}

/// An error with its causes, for a log line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
