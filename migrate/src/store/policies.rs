//! What a user wants kept of a VM: `policies/<vm>`, one line of text.
//!
//! A policy that cannot be read keeps everything: nothing is dropped by a guess.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use segment::VmId;

use super::keep::MAX_POLICY_BYTES;
use super::{FsStore, KeepPolicy, StoreError, lock};

impl FsStore {
    /// What is wanted kept of `vm`; none when nobody said.
    #[must_use]
    pub fn policy(&self, vm: &VmId) -> Option<KeepPolicy> {
        lock(&self.policies).get(vm).copied()
    }

    /// Sets what is kept of `vm`, durably; `None`: what the agent's default is.
    ///
    /// # Errors
    /// What the disk says. Then either holds after a restart.
    pub fn set_policy(&self, vm: &VmId, policy: Option<KeepPolicy>) -> Result<(), StoreError> {
        self.check_writable()?;
        let gate = self.gate(vm);
        let _open = lock(&gate);
        let disk = self.disk.made_durable();
        let to_error = |e| self.disk_error(e);
        let path = self.dir.join("policies").join(vm.as_str());
        match policy {
            Some(policy) => {
                let (stem, text) = (format!("policy-{vm}"), format!("{policy}\n"));
                disk.write(&self.dir.join("tmp"), &stem, &path, text.as_bytes())
                    .map_err(to_error)?;
                lock(&self.policies).insert(vm.clone(), policy);
            }
            None => {
                if path.exists() {
                    disk.unlink(&path).map_err(to_error)?;
                    disk.sync_parent(&path).map_err(to_error)?;
                }
                lock(&self.policies).remove(vm);
            }
        }
        Ok(())
    }

    pub(super) fn read_policies(&self) -> Result<(), StoreError> {
        let dir = self.dir.join("policies");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io {
                what: "read the policy",
                path,
                source,
            }
        };
        for file in fs::read_dir(&dir).map_err(failed(&dir))? {
            let path = file.map_err(failed(&dir))?.path();
            let Some(Ok(vm)) = path.file_name().and_then(|name| name.to_str()).map(VmId::new) else {
                tracing::warn!(path = %path.display(), "not a VM's policy: left alone");
                continue;
            };
            let policy = match read(&path).map_err(failed(&path))?.parse() {
                Ok(policy) => policy,
                Err(error) => {
                    let error: super::PolicyError = error;
                    tracing::error!(%vm, path = %path.display(), %error, "an unreadable policy: everything is kept, set it again");
                    KeepPolicy::ALL
                }
            };
            lock(&self.policies).insert(vm, policy);
        }
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    // One byte more than any policy is enough to see that it is none.
    crate::regular::open(path)?
        .take(MAX_POLICY_BYTES as u64 + 2)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
