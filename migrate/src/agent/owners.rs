//! Whose which VM is, as the registry has said: remembered, so that an owner may go on while the registry is away.
//!
//! A generation has one owner for ever, so what was once read of it stays true; that a later generation was given out
//! meanwhile is what the store's promises are for. In DATA/owners there is a file for each VM that is shipped here:
//! its generation and its owner. It is lost without harm: then the registry is asked.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use segment::{Generation, VmId};

use super::authority::Owner;
use super::blocking;
use crate::crashsafe::{Disk, DiskError};
use crate::registry::{Registry, RegistryError};
use crate::regular;
use crate::transport::certificate::is_node_name;

/// The most VMs that are remembered in memory.
const MAX_KNOWN: usize = 10_000;
/// The longest file that is read.
const MAX_FILE_BYTES: u64 = 256;

/// What is remembered.
#[derive(Debug)]
pub(super) struct Owners {
    dir: PathBuf,
    // Read and written by the connections' tasks; held for moments.
    known: Mutex<HashMap<VmId, (Generation, String)>>,
}

impl Owners {
    /// Remembered in `dir`.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            known: Mutex::default(),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<VmId, (Generation, String)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose `vm` is; the registry is asked unless `asked` is a generation whose owner is known. With `unless_of`, it is
    /// asked too when that owner is another: then what is committed matters, which changes.
    pub(super) async fn of(
        &self,
        registry: &Registry,
        vm: &VmId,
        asked: Option<Generation>,
        unless_of: Option<&str>,
    ) -> Owner {
        let known = self.recall(vm).await;
        if let Some((generation, node)) = &known
            && asked.is_none_or(|asked| asked == *generation)
            && unless_of.is_none_or(|asking| asking == node)
        {
            return is(*generation, node.clone());
        }
        match registry.get_vm(vm).await {
            Ok(record) => {
                self.remember(vm, record.generation, &record.owner).await;
                Owner::Is {
                    generation: record.generation,
                    node: record.owner,
                    newest: record.newest.map(|held| held.name),
                }
            }
            Err(RegistryError::NoSuchVm { .. }) => Owner::Nobody,
            Err(error) => match known {
                // It was given out, so that what is asked for is over, whatever the registry says by now.
                Some((generation, node)) if asked.is_some_and(|asked| asked < generation) => {
                    is(generation, node)
                }
                _ => {
                    tracing::debug!(%vm, %error, "the registry does not say whose a VM is");
                    Owner::Unknown
                }
            },
        }
    }

    async fn recall(&self, vm: &VmId) -> Option<(Generation, String)> {
        if let Some(known) = self.known().get(vm) {
            return Some(known.clone());
        }
        let path = self.dir.join(vm.as_str());
        let read = tokio::task::spawn_blocking(move || read(&path)).await.ok()??;
        self.known().insert(vm.clone(), read.clone());
        Some(read)
    }

    async fn remember(&self, vm: &VmId, generation: Generation, node: &str) {
        {
            let mut known = self.known();
            if known.len() >= MAX_KNOWN {
                known.clear();
            }
            known.insert(vm.clone(), (generation, node.to_owned()));
        }
        let (dir, name, text) = (
            self.dir.clone(),
            vm.as_str().to_owned(),
            format!("{generation} {node}\n"),
        );
        let written = blocking(move || write(&dir, &name, &text)).await;
        if let Err(error) = written {
            let error = crate::transport::in_full(&error);
            tracing::warn!(%vm, error, "whose a VM is cannot be remembered: shipping it waits while the registry is away");
        }
    }
}

fn is(generation: Generation, node: String) -> Owner {
    Owner::Is {
        generation,
        node,
        newest: None,
    }
}

fn read(path: &Path) -> Option<(Generation, String)> {
    let text = regular::read_text(path, MAX_FILE_BYTES).ok()?;
    let (generation, node) = text.strip_suffix('\n')?.split_once(' ')?;
    is_node_name(node).then_some((Generation(generation.parse().ok()?), node.to_owned()))
}

fn write(dir: &Path, name: &str, text: &str) -> Result<(), DiskError> {
    std::fs::create_dir_all(dir).map_err(DiskError::new("create the directory", dir))?;
    // Whole after a crash of the process; after one of the host it is asked for again.
    Disk::unsynced().write(dir, &format!(".{name}"), &dir.join(name), text.as_bytes())
}
