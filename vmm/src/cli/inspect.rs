//! `vmm inspect`: a VM that runs, or a segment file.

use std::fmt::Write;
use std::fs::File;
use std::path::{Path, PathBuf};

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use kvm_bindings::{kvm_regs, kvm_sregs};
use migrate::keyfile::KeyFileArgs;
use migrate::store::FsStore;
use segment::{Codec, Keyring, Kind, Record, SegmentName, SegmentReader, Summary};
use serde::Serialize;
use serde_json::{Value, json};

use super::control::find;
use super::options::RunDir;
use super::{CliError, Outcome, frames, looks_like_a_path, picture, print, print_json, rundir, size};
use crate::api::Client;
use crate::api::client::ClientError;
use crate::api::resources::machine::InstanceInfo;
use crate::session::{SessionError, SessionStatus, chain};
use crate::state;
use crate::vcpu::state::VcpuState;
use crate::vm::MachineState;

/// Shows all that is known of a VM that runs, or what is in a segment: its file, every byte of it verified, or its
/// name in a store.
#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// A VM's name, a segment file, or a checkpoint's name
    #[arg(value_name = "VM|FILE|CHECKPOINT")]
    what: PathBuf,
    /// More segment files of the same chain, in any order, for the picture
    #[arg(value_name = "FILE")]
    more: Vec<PathBuf>,
    /// Write a picture of the guest's memory: what the checkpoint holds, and what each of its chain changed (of a
    /// checkpoint in a store the whole chain, of files those that are named)
    #[arg(long, value_name = "FILE.png")]
    picture: Option<PathBuf>,
    /// Each frame with its sizes
    #[arg(long)]
    frames: bool,
    /// The store a checkpoint's name is looked up in [default: its VM's own on this host]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    key_file: KeyFileArgs,
    #[command(flatten)]
    run_dir: RunDir,
}

impl Inspect {
    pub(super) async fn run(self) -> Result<Outcome, CliError> {
        let text = self.what.to_str().unwrap_or_default();
        let keys = self.key_file.keys()?;
        if let (false, Ok(name)) = (self.what.exists(), text.parse::<SegmentName>()) {
            let dir = self
                .store
                .clone()
                .unwrap_or_else(|| rundir::default_store(&name.vm));
            let store = FsStore::open_chain(&dir, &name.vm, Some(&name)).map_err(SessionError::Store)?;
            store.set_keys(keys);
            let open = |name: &SegmentName| store.open_segment(name).map_err(SessionError::Store);
            if self.picture.is_some() {
                let chain = store.chain(&name).map_err(|source| SessionError::Chain {
                    name: name.clone(),
                    source: Box::new(source),
                })?;
                let links: Result<Vec<_>, _> = chain.iter().map(|entry| open(&entry.name)).collect();
                self.draw(&links?)?;
            }
            return self.segment(&self.what, &open(&name)?);
        }
        if looks_like_a_path(self.what.as_os_str()) {
            if self.picture.is_some() {
                let files = std::iter::once(&self.what).chain(&self.more);
                let mut links = files
                    .map(|path| open_file(path, &keys))
                    .collect::<Result<Vec<_>, _>>()?;
                links.sort_by(|a, b| a.manifest().name.cmp(&b.manifest().name));
                self.draw(&links)?;
            }
            return self.segment(&self.what, &open_file(&self.what, &keys)?);
        }
        if self.picture.is_some() || self.frames {
            return Err(CliError::Said(format!(
                "{text} is a VM: --picture and --frames are of a checkpoint, like `vmm inspect {text}/1/42 --picture \
                 {text}.png`"
            )));
        }
        self.vm(text).await
    }

    async fn vm(&self, name: &str) -> Result<Outcome, CliError> {
        let client = Client::new(find(&self.run_dir.path(), name)?.socket());
        match client.get::<SessionStatus>("/status").await {
            Ok(status) if self.json => print_json(&status),
            Ok(status) => print(show_status(&status).as_bytes()),
            Err(ClientError::Refused { .. }) => {
                let info: InstanceInfo = client.get("/").await?;
                if self.json {
                    return print_json(&info);
                }
                print(format!("{}: {}\n", info.id, info.state.to_lowercase()).as_bytes())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes the picture of a chain, oldest first.
    fn draw(&self, links: &[SegmentReader<File>]) -> Result<(), CliError> {
        let Some(to) = &self.picture else { return Ok(()) };
        let png = picture::png(links).map_err(|source| CliError::Picture {
            what: self.what.clone(),
            source,
        })?;
        std::fs::write(to, png).map_err(CliError::io(format!("write the picture {to:?}")))
    }

    fn segment(&self, path: &Path, reader: &SegmentReader<File>) -> Result<Outcome, CliError> {
        let damaged = |source| CliError::Segment {
            path: path.to_owned(),
            source,
        };
        let summary = reader.verify().map_err(damaged)?;
        let (records, machine) = match (reader.is_open(), reader.manifest().encryption) {
            (false, Some(encryption)) => {
                let why = format!(
                    "it is encrypted with key {}, which is not among the keys given (--key-file)",
                    encryption.key
                );
                (Vec::new(), Err(why))
            }
            (true, _) | (false, None) => {
                let records = reader.records().map_err(damaged)?;
                let machine = state::from_records(&records).map_err(|error| chain(&error));
                (records, machine)
            }
        };
        if self.json {
            let mut shown = segment_json(reader, &summary, &records, machine.as_ref());
            if self.frames {
                shown["index"] = frames::json(reader);
            }
            return print_json(&shown);
        }
        let mut text = show_segment(reader, &summary, &records, machine.as_ref());
        if self.frames {
            text.push_str(&frames::show(reader));
        }
        if let Some(to) = &self.picture {
            text.push_str(&format!("\nthe picture is in {}\n", to.display()));
        }
        print(text.as_bytes())
    }
}

fn open_file(path: &Path, keys: &Keyring) -> Result<SegmentReader<File>, CliError> {
    let file = migrate::regular::open(path).map_err(CliError::io(format!("open the segment {path:?}")))?;
    SegmentReader::open_with(file, keys).map_err(|source| CliError::Segment {
        path: path.to_owned(),
        source,
    })
}

/// Lines of `name  value`, the values below each other.
#[derive(Default)]
struct Lines(Vec<(String, String)>);

impl Lines {
    fn add(&mut self, name: impl Into<String>, value: impl std::fmt::Display) {
        self.0.push((name.into(), value.to_string()));
    }

    fn add_some(&mut self, name: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.add(name, value);
        }
    }

    fn text(&self) -> String {
        let width = self
            .0
            .iter()
            .map(|(name, _)| name.chars().count())
            .max()
            .unwrap_or(0);
        self.0.iter().fold(String::new(), |mut text, (name, value)| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:width$}  {value}");
            text
        })
    }
}

fn show_status(status: &SessionStatus) -> String {
    let mut lines = Lines::default();
    lines.add("name", &status.name);
    lines.add(
        "state",
        match &status.reason {
            Some(reason) => format!("{} ({reason})", status.state),
            None => status.state.clone(),
        },
    );
    lines.add("generation", status.generation);
    lines.add("pid", status.pid);
    lines.add(
        "machine",
        format!("{} vCPUs, {} MiB", status.vcpus, status.memory_mib),
    );
    let up = std::time::Duration::from_millis(status.up_ms);
    lines.add("up", humantime::format_duration(up));
    lines.add_some("restored from", status.restored_from.as_ref());
    lines.add(
        "checkpoints",
        format!(
            "{} here, {} of pages as {}",
            status.checkpoints,
            size::show_bytes(status.raw_bytes),
            size::show_bytes(status.stored_bytes)
        ),
    );
    if let Some(newest) = &status.newest {
        let stop = std::time::Duration::from_micros(newest.stop_us);
        lines.add(
            "newest",
            format!(
                "{} ({}, {}, stopped {})",
                newest.name,
                newest.kind,
                size::show_bytes(newest.stored_bytes),
                humantime::format_duration(stop)
            ),
        );
    }
    lines.add_some("committed", status.committed.as_ref());
    lines.add_some("problem", status.problem.as_ref());
    lines.add(
        "store",
        match status.store_budget {
            Some(budget) => {
                format!(
                    "{} ({} of {})",
                    status.store,
                    size::show_bytes(status.store_bytes),
                    size::show_bytes(budget)
                )
            }
            None => format!("{} ({})", status.store, size::show_bytes(status.store_bytes)),
        },
    );
    match &status.protection {
        None => lines.add("protection", "off"),
        Some(protection) => {
            lines.add(
                "protection",
                format!(
                    "every {} ms, committed by {} of {} holders",
                    protection.every_ms,
                    protection.ack_quorum,
                    protection.holders.len()
                ),
            );
            lines.add_some("registry", protection.registry.as_ref());
            for holder in &protection.holders {
                let node = holder
                    .node
                    .as_ref()
                    .map_or(String::new(), |node| format!("{node}, "));
                let why = holder
                    .why
                    .as_ref()
                    .map_or(String::new(), |why| format!(" ({why})"));
                lines.add(
                    format!("  {}", holder.address),
                    format!(
                        "{node}{}{why}: has {}, lacks {} checkpoints ({}), {} sent",
                        holder.state,
                        holder.acked.as_deref().unwrap_or("nothing"),
                        holder.lag_epochs,
                        size::show_bytes(holder.lag_bytes),
                        size::show_bytes(holder.bytes_sent)
                    ),
                );
            }
        }
    }
    lines.text()
}

/// How many frames are stored in each way, with their bytes.
fn codecs(reader: &SegmentReader<File>) -> Vec<(&'static str, u64, u64, u64)> {
    let mut sums = [("zstd", 0, 0, 0), ("as they are", 0, 0, 0)];
    for frame in reader.index() {
        let sum = match frame.codec {
            Codec::Zstd => &mut sums[0],
            Codec::Stored => &mut sums[1],
        };
        sum.1 += 1;
        sum.2 += u64::from(frame.raw_bytes);
        sum.3 += u64::from(frame.stored_bytes);
    }
    sums.into_iter().filter(|sum| sum.1 > 0).collect()
}

fn when(unix_ns: u64) -> String {
    jiff::Timestamp::from_nanosecond(unix_ns.into())
        .map_or_else(|_| format!("{unix_ns} ns"), |time| time.to_string())
}

fn show_segment(
    reader: &SegmentReader<File>,
    summary: &Summary,
    records: &[Record],
    machine: Result<&MachineState, &String>,
) -> String {
    let (header, manifest) = (reader.header(), reader.manifest());
    let mut lines = Lines::default();
    lines.add("segment", &manifest.name);
    lines.add(
        "format",
        format!(
            "version {}.{}, features needed: {}, to be ignored: {:#x}",
            header.major, header.minor, header.features_required, header.features_optional
        ),
    );
    lines.add("digest", summary.digest);
    lines.add(
        "file",
        format!(
            "{} ({} bytes), every byte verified",
            size::show_bytes(summary.file_bytes),
            summary.file_bytes
        ),
    );
    lines.add(
        "parts",
        format!(
            "manifest {}, records {}, frames {}, index {}",
            size::show_bytes(header.manifest_bytes.into()),
            size::show_bytes(header.records_stored_bytes.into()),
            size::show_bytes(header.body_bytes),
            size::show_bytes(header.index_bytes)
        ),
    );
    lines.add("checkpoint", manifest.checkpoint);
    match &manifest.kind {
        Kind::Full => lines.add("kind", "full: it stands alone"),
        Kind::Delta {
            parent,
            parent_checkpoint,
        } => {
            lines.add("kind", "delta");
            lines.add("parent", format!("{parent} (checkpoint {parent_checkpoint})"));
            lines.add(
                "links",
                format!("{} down to the full one, when it was taken", manifest.links),
            );
        }
    }
    lines.add_some("merged from epoch", manifest.first_epoch);
    lines.add_some("label", manifest.label.as_ref());
    if let Some(encryption) = manifest.encryption {
        lines.add("encrypted", format!("with key {}", encryption.key));
    }
    lines.add(
        "taken",
        format!("{} by {}", when(manifest.created_unix_ns), manifest.producer),
    );
    for space in &manifest.spaces {
        lines.add(
            format!("space {}", space.id),
            format!(
                "{}, {} pages of {} bytes ({})",
                space.name,
                space.pages,
                space.page_bytes,
                size::show_bytes(space.bytes())
            ),
        );
    }
    lines.add(
        "pages",
        format!(
            "{} with data ({} as changes of the parent's), {} the same as others, {} zero",
            summary.data_pages, summary.change_pages, summary.same_pages, summary.zero_pages
        ),
    );
    lines.add(
        "frames",
        format!(
            "{}: {} of pages in {}",
            summary.frames,
            size::show_bytes(summary.raw_bytes),
            size::show_bytes(summary.stored_bytes)
        ),
    );
    for (codec, frames, raw, stored) in codecs(reader) {
        lines.add(
            format!("  {codec}"),
            format!(
                "{frames} frames, {} in {}",
                size::show_bytes(raw),
                size::show_bytes(stored)
            ),
        );
    }
    let mut text = lines.text();
    text.push_str(&show_records(records));
    match machine {
        Ok(machine) => machine
            .vcpus
            .iter()
            .enumerate()
            .for_each(|(id, vcpu)| text.push_str(&show_vcpu(id, vcpu))),
        Err(why) => text.push_str(&format!("\nthis monitor cannot read its machine: {why}\n")),
    }
    text
}

fn show_records(records: &[Record]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["RECORD", "VERSION", "BYTES", "MUST BE KNOWN"]);
    for record in records {
        let must = if record.critical { "yes" } else { "no" };
        table.add_row([
            &record.tag,
            &record.version.to_string(),
            &record.payload.len().to_string(),
            must,
        ]);
    }
    for column in [1, 2] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("\n{table}\n")
}

fn general(regs: &kvm_regs) -> [(&'static str, u64); 18] {
    [
        ("rax", regs.rax),
        ("rbx", regs.rbx),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("rsp", regs.rsp),
        ("rbp", regs.rbp),
        ("r8", regs.r8),
        ("r9", regs.r9),
        ("r10", regs.r10),
        ("r11", regs.r11),
        ("r12", regs.r12),
        ("r13", regs.r13),
        ("r14", regs.r14),
        ("r15", regs.r15),
        ("rip", regs.rip),
        ("rflags", regs.rflags),
    ]
}

fn control(sregs: &kvm_sregs) -> [(&'static str, u64); 5] {
    [
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
        ("efer", sregs.efer),
    ]
}

/// What the control registers say of the mode the vCPU is in.
fn mode(sregs: &kvm_sregs) -> &'static str {
    const PROTECTION: u64 = 1;
    const PAGING: u64 = 1 << 31;
    const LONG_ACTIVE: u64 = 1 << 10;
    match (
        sregs.cr0 & PROTECTION != 0,
        sregs.efer & LONG_ACTIVE != 0,
        sregs.cs.l == 1,
    ) {
        (false, _, _) => "real mode",
        (true, true, true) => "64-bit mode",
        (true, true, false) => "compatibility mode",
        (true, false, _) if sregs.cr0 & PAGING != 0 => "protected mode with paging",
        (true, false, _) => "protected mode without paging",
    }
}

/// `enum` of `KVM_MP_STATE_*`, in words.
fn activity(mp_state: u32) -> String {
    match mp_state {
        kvm_bindings::KVM_MP_STATE_RUNNABLE => "runs".into(),
        kvm_bindings::KVM_MP_STATE_UNINITIALIZED => "waits to be initialised".into(),
        kvm_bindings::KVM_MP_STATE_INIT_RECEIVED => "waits for its start address".into(),
        kvm_bindings::KVM_MP_STATE_HALTED => "halted, waits for an interrupt".into(),
        kvm_bindings::KVM_MP_STATE_SIPI_RECEIVED => "about to start".into(),
        other => format!("mp_state {other}"),
    }
}

fn show_vcpu(id: usize, vcpu: &VcpuState) -> String {
    let mut text = format!(
        "\nvCPU {id}: {}, {}, privilege level {}, TSC {} kHz, {} MSRs, {} CPUID entries\n",
        activity(vcpu.mp_state.mp_state),
        mode(&vcpu.sregs),
        vcpu.sregs.ss.dpl,
        vcpu.tsc_khz,
        vcpu.msrs.len(),
        vcpu.cpuid.len()
    );
    let registers: Vec<_> = general(&vcpu.regs)
        .into_iter()
        .chain(control(&vcpu.sregs))
        .collect();
    for line in registers.chunks(4) {
        let words: Vec<String> = line
            .iter()
            .map(|(name, value)| format!("{name:>6} {value:016x}"))
            .collect();
        text.push_str(&format!("{}\n", words.join("  ")));
    }
    text
}

#[derive(Serialize)]
struct RecordJson<'a> {
    tag: &'a str,
    version: u16,
    critical: bool,
    bytes: usize,
}

fn segment_json(
    reader: &SegmentReader<File>,
    summary: &Summary,
    records: &[Record],
    machine: Result<&MachineState, &String>,
) -> Value {
    let (header, manifest) = (reader.header(), reader.manifest());
    let (parent, parent_checkpoint) = match &manifest.kind {
        Kind::Full => (None, None),
        Kind::Delta {
            parent,
            parent_checkpoint,
        } => (Some(parent.to_string()), Some(parent_checkpoint.to_string())),
    };
    let records: Vec<RecordJson<'_>> = records
        .iter()
        .map(
            |Record {
                 tag,
                 version,
                 critical,
                 payload,
             }| RecordJson {
                tag,
                version: *version,
                critical: *critical,
                bytes: payload.len(),
            },
        )
        .collect();
    let hex = |list: &[(&'static str, u64)]| -> Value {
        list.iter()
            .map(|(name, value)| ((*name).to_owned(), json!(format!("{value:#x}"))))
            .collect()
    };
    let machine = match machine {
        Err(why) => json!({"problem": why}),
        Ok(machine) => json!({
            "memory_bytes": machine.config.memory_bytes,
            "vcpus": machine.vcpus.iter().map(|vcpu| json!({
                "activity": activity(vcpu.mp_state.mp_state),
                "mode": mode(&vcpu.sregs),
                "privilege_level": vcpu.sregs.ss.dpl,
                "tsc_khz": vcpu.tsc_khz,
                "msrs": vcpu.msrs.len(),
                "cpuid_entries": vcpu.cpuid.len(),
                "registers": hex(&general(&vcpu.regs)),
                "control_registers": hex(&control(&vcpu.sregs)),
            })).collect::<Vec<_>>(),
        }),
    };
    json!({
        "name": manifest.name.to_string(),
        "format": {"major": header.major, "minor": header.minor,
                   "features_required": header.features_required.0,
                   "features": header.features_required.names().collect::<Vec<_>>(),
                   "features_optional": header.features_optional},
        "digest": summary.digest.to_string(),
        "file_bytes": summary.file_bytes,
        "parts": {"manifest_bytes": header.manifest_bytes, "records_stored_bytes": header.records_stored_bytes,
                  "records_raw_bytes": header.records_raw_bytes, "body_bytes": header.body_bytes,
                  "index_bytes": header.index_bytes},
        "checkpoint": manifest.checkpoint.to_string(),
        "kind": if manifest.kind.is_full() { "full" } else { "delta" },
        "parent": parent,
        "parent_checkpoint": parent_checkpoint,
        "links": manifest.links,
        "first_epoch": manifest.first_epoch.map(|epoch| epoch.0),
        "label": manifest.label,
        "key": manifest.encryption.map(|encryption| encryption.key.to_string()),
        "created_unix_ns": manifest.created_unix_ns,
        "producer": manifest.producer,
        "spaces": manifest.spaces.iter().map(|space| json!({
            "id": space.id.0, "name": space.name, "page_bytes": space.page_bytes, "pages": space.pages,
        })).collect::<Vec<_>>(),
        "frames": {"count": summary.frames, "data_pages": summary.data_pages, "zero_pages": summary.zero_pages,
                   "same_pages": summary.same_pages, "change_pages": summary.change_pages,
                   "raw_bytes": summary.raw_bytes, "stored_bytes": summary.stored_bytes},
        "records": records,
        "machine": machine,
    })
}
