//! Snapshots as Firecracker's clients ask for them: checkpoints whose segment file is given to the caller.
//!
//! A segment holds the memory too, so `snapshot_path` is all there is to a snapshot. A client may expect a second
//! file at `mem_file_path`, to move it along: it gets a line of text there that names the checkpoint, and a load
//! that is given it checks that the two belong together.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use migrate::crashsafe::{Disk, folder_of};
use migrate::protect::CheckpointRequest;
use segment::{Kind, SegmentName, SegmentReader};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::fault::{Body, Fault, FaultMessage};
use crate::api::instance::{Instance, Origin, unhurried};
use crate::clock::ClockPolicy;
use crate::devices::virtio::vsock;
use crate::session::{CheckpointReport, RestoreFrom, Session, chain};

type App = State<Arc<Instance>>;
type Done = Result<StatusCode, Fault>;

/// How the file at `mem_file_path` begins.
const MEMORY_NOTE: &str = "understudy: the memory of checkpoint ";
/// The longest such file that is read.
const MAX_NOTE_BYTES: u64 = 1024;

/// Which snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum SnapshotType {
    /// All of the machine.
    #[default]
    Full,
    /// What changed since the checkpoint before it.
    Diff,
}

/// A snapshot to take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Full by default.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Where the segment file goes.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// Where a line goes that names the checkpoint; none when left out.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub mem_file_path: Option<PathBuf>,
}

/// How memory is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MemBackendType {
    /// In a file.
    File,
    /// Not there.
    Uffd,
}

/// Where memory is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    /// How.
    pub backend_type: MemBackendType,
    /// Where.
    #[schema(value_type = String)]
    pub backend_path: PathBuf,
}

/// Where a network card is connected here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The card.
    pub iface_id: String,
    /// The TAP interface.
    pub host_dev_name: String,
}

/// Where the stream sockets' Unix socket is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// Its path.
    pub uds_path: String,
}

/// A snapshot to load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    /// The segment file of a full checkpoint.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// The file that `mem_file_path` made, or nothing.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub mem_file_path: Option<PathBuf>,
    /// The same, of type `File`.
    #[serde(default)]
    pub mem_backend: Option<MemBackend>,
    /// Taken: dirty pages are always tracked after a load.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Taken: dirty pages are always tracked after a load.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Let the VM run at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// What the guest's clocks do about the time since the snapshot: `catch-up` (when left out) or `frozen`.
    #[serde(default)]
    pub clock: ClockPolicy,
    /// The TAP interfaces of the network cards here.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Where the stream sockets' Unix socket is here; `vsock` in the VM's run folder when left out.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
    /// What other logical names are here: `{"disk:root": "PATH"}`. A disk without one gets a new file in the store.
    #[serde(default)]
    pub bindings: std::collections::BTreeMap<String, String>,
}

#[utoipa::path(put, path = "/snapshot/create", tag = "firecracker", request_body = CreateSnapshot,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn create(State(app): App, Body(request): Body<CreateSnapshot>) -> Done {
    let session = app.started()?;
    unhurried(async move {
        // Before the guest is disturbed for nothing.
        check_folder("snapshot_path", &request.snapshot_path)?;
        if let Some(path) = &request.mem_file_path {
            check_folder("mem_file_path", path)?;
        }
        let full = request.snapshot_type == SnapshotType::Full;
        let report = session
            .checkpoint(CheckpointRequest { full, label: None })
            .await?;
        let written = tokio::task::spawn_blocking(move || write_files(&session, &report, &request)).await;
        written.map_err(|error| Fault::bad(format!("write the snapshot: {error}")))??;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

fn check_folder(field: &str, path: &Path) -> Result<(), Fault> {
    let folder = folder_of(path);
    if !folder.is_dir() {
        return Err(Fault::bad(format!("{field}: {folder:?} is not a folder")));
    }
    if path.file_name().is_none() {
        return Err(Fault::bad(format!("{field}: {path:?} is not a file name")));
    }
    // What is there is replaced: a file may be, a device or a pipe may not.
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => Err(Fault::bad(format!(
            "{field}: {path:?} is there and no regular file: name another"
        ))),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn write_files(session: &Session, report: &CheckpointReport, request: &CreateSnapshot) -> Result<(), Fault> {
    let name: SegmentName = report
        .name
        .parse()
        .map_err(|e| Fault::bad(format!("own checkpoint's name: {e}")))?;
    let mut files = session.chain_files(&name)?;
    let Some(segment) = files.pop() else {
        return Err(Fault::bad(format!("checkpoint {name} has no file")));
    };
    replace(&request.snapshot_path, |to| {
        let mut from = File::open(&segment)?;
        // On file systems that can, the copy shares the blocks and takes no time.
        if rustix::fs::ioctl_ficlone(to.file(), &from).is_ok() {
            return Ok(());
        }
        let mut piece = vec![0; 1 << 20];
        loop {
            match from.read(&mut piece)? {
                0 => return Ok(()),
                count => to.write_all(&piece[..count])?,
            }
        }
    })?;
    let Some(note) = &request.mem_file_path else {
        return Ok(());
    };
    replace(note, |to| {
        writeln!(
            to,
            "{MEMORY_NOTE}{name} ({}) is in its segment file, which was written to snapshot_path with everything else.",
            report.digest
        )
    })
}

/// Writes a file whole or not at all, in the place of what was there.
fn replace(
    path: &Path,
    write: impl FnOnce(&mut migrate::crashsafe::Temp) -> std::io::Result<()>,
) -> Result<(), Fault> {
    let stem = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = format!(".{stem}.{}", std::process::id());
    let failed = |error: &dyn std::error::Error| Fault::bad(format!("write {path:?}: {}", chain(error)));
    let mut temp = Disk::durable()
        .temp(folder_of(path), &stem)
        .map_err(|e| failed(&e))?;
    write(&mut temp).map_err(|e| failed(&e))?;
    temp.replace(path).map_err(|e| failed(&e))
}

#[utoipa::path(put, path = "/snapshot/load", tag = "firecracker", request_body = LoadSnapshot,
    responses((status = 204), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn load(State(app): App, Body(request): Body<LoadSnapshot>) -> Done {
    if app.config().boot_source.is_some() {
        return Err(Fault::bad(
            "Loading a microVM snapshot not allowed after configuring boot-specific resources: a checkpoint brings its \
             own machine",
        ));
    }
    let path = request.snapshot_path.clone();
    let (resume, clock) = (request.resume_vm, request.clock);
    let mut bindings = request.bindings.clone();
    let cards = request.network_overrides.iter();
    bindings.extend(cards.map(|card| (format!("net:{}", card.iface_id), card.host_dev_name.clone())));
    let socket = request.vsock_override.iter();
    bindings.extend(socket.map(|socket| (vsock::NAME.to_owned(), socket.uds_path.clone())));
    let checked = tokio::task::spawn_blocking(move || check_load(&request)).await;
    checked.map_err(|error| Fault::bad(format!("look at the snapshot: {error}")))??;
    app.configure(|config| {
        config.bindings = bindings;
        Ok(())
    })?;
    app.start(Origin::Restore(RestoreFrom::Files(vec![path]), clock), resume)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What is refused before anything is made of it.
fn check_load(request: &LoadSnapshot) -> Result<(), Fault> {
    let note = match (&request.mem_file_path, &request.mem_backend) {
        (Some(_), Some(_)) => return Err(Fault::bad("give mem_file_path or mem_backend, not both")),
        (
            None,
            Some(MemBackend {
                backend_type: MemBackendType::Uffd,
                ..
            }),
        ) => {
            return Err(Fault::bad(format!(
                "mem_backend of type Uffd is not supported by this version ({}): leave mem_backend out, the memory is \
                 in the segment file at snapshot_path",
                crate::PRODUCER
            )));
        }
        (Some(path), None) => Some(path),
        (None, Some(backend)) => Some(&backend.backend_path),
        (None, None) => None,
    };
    let path = &request.snapshot_path;
    let file =
        migrate::regular::open(path).map_err(|e| Fault::bad(format!("open the snapshot {path:?}: {e}")))?;
    let reader = SegmentReader::open(file).map_err(|e| {
        Fault::bad(format!(
            "{path:?} is not a segment this monitor can load: {}",
            chain(&e)
        ))
    })?;
    let name = &reader.manifest().name;
    if let Kind::Delta { parent, .. } = &reader.manifest().kind {
        return Err(Fault::bad(format!(
            "{path:?} is a Diff snapshot: checkpoint {name} holds only what changed since {parent}. Take a Full one, \
             or restore the chain with `vmm restore FULL DIFF..`, naming the files of all links"
        )));
    }
    note.map_or(Ok(()), |note| {
        check_note(note, name, &reader.digest().to_string())
    })
}

fn check_note(path: &Path, name: &SegmentName, digest: &str) -> Result<(), Fault> {
    let mut text = Vec::new();
    migrate::regular::open(path)
        .and_then(|file| file.take(MAX_NOTE_BYTES).read_to_end(&mut text))
        .map_err(|e| Fault::bad(format!("read the memory file {path:?}: {e}")))?;
    let text = String::from_utf8_lossy(&text);
    let Some(of) = text.strip_prefix(MEMORY_NOTE) else {
        return Err(Fault::bad(format!(
            "{path:?} was not written by this monitor: its snapshots have their memory in the file at snapshot_path. \
             Give the file that its mem_file_path made, or none"
        )));
    };
    if of.starts_with(&format!("{name} ({digest})")) {
        return Ok(());
    }
    let of = of.split_whitespace().next().unwrap_or("nothing");
    Err(Fault::bad(format!(
        "{path:?} belongs to checkpoint {of}, and the snapshot is {name} ({digest})"
    )))
}
