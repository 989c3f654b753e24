//! Answers as tables and as JSON.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;
use comfy_table::{Table, presets};
use segment::VmId;
use serde_json::{Map, Value, json};

use crate::registry::{HistoryEntry, NodeRecord, VmRecord};
use crate::wire::{
    AgentStatus, FoldReport, ForgetReport, KeepReport, LastDrill, PromoteReport, SegmentBrief, SegmentDetail,
    VerifyReport,
};

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

pub(super) fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

fn kind(segment: &SegmentBrief) -> &'static str {
    if segment.parent.is_some() { "delta" } else { "full" }
}

/// How long ago, in one or two units.
fn age(created: Duration) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    match now.checked_sub(created) {
        Some(age) if age < Duration::from_secs(10) => format!("{:.1}s", age.as_secs_f64()),
        Some(age) if age < Duration::from_secs(120) => format!("{}s", age.as_secs()),
        Some(age) if age < Duration::from_secs(7200) => format!("{}min", age.as_secs() / 60),
        Some(age) if age < Duration::from_secs(48 * 3600) => format!("{}h", age.as_secs() / 3600),
        Some(age) => format!("{}d", age.as_secs() / 86_400),
        None => "in the future".to_owned(),
    }
}

fn when(unix_ns: u64) -> String {
    match jiff::Timestamp::from_nanosecond(unix_ns.into()) {
        Ok(at) => at
            .to_zoned(jiff::tz::TimeZone::system())
            .strftime("%Y-%m-%d %H:%M:%S%.3f %Z")
            .to_string(),
        Err(_) => format!("{unix_ns} ns"),
    }
}

/// What happened to a VM, oldest first.
pub(super) fn history(vm: &VmId, entries: &[HistoryEntry]) -> String {
    if entries.is_empty() {
        return format!("nothing is known to have happened to {vm}");
    }
    let mut t = table(&["WHEN", "GENERATION", "NODE", "WHAT", "HOW"]);
    for entry in entries {
        t.add_row([
            when(entry.at_unix_ms.saturating_mul(1_000_000)),
            entry.generation.to_string(),
            entry.node.clone(),
            entry.event.clone(),
            entry.detail.clone(),
        ]);
    }
    trimmed(&t)
}

pub(super) fn segments(segments: &[SegmentBrief], node: &str) -> String {
    if segments.is_empty() {
        return format!("{node} holds no segments");
    }
    let mut t = table(&["SEGMENT", "KIND", "SIZE", "AGE", "LINKS", "LABEL"]);
    for s in segments {
        let links = match s.links {
            0 => "incomplete".to_owned(),
            links => links.to_string(),
        };
        let age = age(Duration::from_nanos(s.created_unix_ns));
        let label = s.label.clone().unwrap_or_default();
        t.add_row([
            s.name.to_string(),
            kind(s).into(),
            size(s.bytes),
            age,
            links,
            label,
        ]);
    }
    let total: u64 = segments.iter().map(|s| s.bytes).sum();
    format!(
        "{}\n{} segments, {} at {node}",
        trimmed(&t),
        segments.len(),
        size(total)
    )
}

/// How the last drill went.
pub(super) fn drilled(last: &LastDrill) -> String {
    let ago = age(Duration::from_millis(last.at_unix_ms));
    match (&last.failed, &last.segment) {
        (Some(why), _) => format!("the last drill, {ago} ago, FAILED: {why}"),
        (None, segment) => format!(
            "the last drill, {ago} ago: a copy of {} ran after {} ms, {:.1} s old",
            segment.as_ref().map(ToString::to_string).unwrap_or_default(),
            last.recovery_us.unwrap_or_default() / 1000,
            last.age_ms.unwrap_or_default() as f64 / 1000.0
        ),
    }
}

/// Below the list of one VM's segments: what is kept of them, and what is wrong.
pub(super) fn points(vm: &VmId, list: &str, report: &KeepReport, status: &AgentStatus) -> String {
    let of = if report.is_default {
        "the agent's policy"
    } else {
        "its policy"
    };
    let mut out = format!(
        "{list}\n{} restore points; {of} {} keeps {}",
        report.points, report.policy, report.kept
    );
    for held in status.vms.iter().filter(|held| held.vm == *vm) {
        if let Some(at) = &held.hot_at {
            let _ = write!(out, "\nits image is at {at}: a takeover here runs on it");
        }
        if let Some(why) = &held.cold {
            let _ = write!(out, "\nit has no image to be taken over from: {why}");
        }
        if let Some(last) = &held.drill {
            let _ = write!(out, "\n{}", drilled(last));
        }
    }
    if let Some(global) = &status.global {
        let of = global.vms.iter().find(|of| of.vm == *vm);
        match of.and_then(|of| of.newest.as_ref().map(|newest| (newest, of.points))) {
            Some((newest, points)) => {
                let _ = write!(
                    out,
                    "\n{}: {points} restore points, the newest {newest}",
                    global.address
                );
            }
            None => {
                let _ = write!(out, "\n{}: nothing of it yet", global.address);
            }
        }
        for problem in of
            .and_then(|of| of.problem.as_ref())
            .into_iter()
            .chain(&global.problem)
        {
            let _ = write!(out, "\nnot uploaded: {problem}");
        }
    }
    for damaged in &status.damaged {
        let _ = write!(out, "\ndamaged, set aside: {damaged}");
    }
    if let Some(problem) = &status.store_problem {
        let _ = write!(out, "\n{problem}");
    }
    out
}

pub(super) fn kept(vm: &VmId, report: &KeepReport) -> String {
    let of = if report.is_default {
        " (the agent's default)"
    } else {
        ""
    };
    let mut out = format!(
        "{vm}: {}{of}, which keeps {} of the {} restore points here",
        report.policy, report.kept, report.points
    );
    for note in &report.notes {
        let _ = write!(out, "\n  {note}");
    }
    out
}

pub(super) fn folded(report: &FoldReport) -> String {
    format!(
        "{} is one full segment of {}; it was a chain of {} links and {}",
        report.segment.name,
        size(report.segment.bytes),
        report.links,
        size(report.bytes)
    )
}

pub(super) fn verified(report: &VerifyReport) -> String {
    let mut out = format!(
        "{} segments, {}, were read and checked: {} bad, {} of them repaired",
        report.checked,
        size(report.bytes),
        report.bad,
        report.repaired
    );
    if report.incomplete > 0 {
        let _ = write!(
            out,
            "\n{} segments cannot be restored: something they stand on is not here",
            report.incomplete
        );
    }
    for problem in &report.problems {
        let _ = write!(out, "\n  {problem}");
    }
    out
}

pub(super) fn segment_json(segment: &SegmentBrief) -> Value {
    let mut value = serde_json::to_value(segment).unwrap_or_default();
    if let Value::Object(fields) = &mut value {
        fields.insert("kind".into(), kind(segment).into());
    }
    value
}

pub(super) fn segment(detail: &SegmentDetail) -> String {
    let s = &detail.segment;
    let mut out = String::new();
    let mut line = |key: &str, value: &str| {
        // A String takes everything.
        let _ = writeln!(out, "{key:<12} {value}");
    };
    line("name", &s.name.to_string());
    line("kind", kind(s));
    if let Some(parent) = &s.parent {
        line(
            "parent",
            &format!("{} (checkpoint {})", parent.name, parent.checkpoint),
        );
    }
    line("checkpoint", &s.checkpoint.to_string());
    line("digest", &s.digest.to_string());
    line("size", &format!("{} ({} bytes)", size(s.bytes), s.bytes));
    line(
        "taken",
        &format!(
            "{} ({} ago)",
            when(s.created_unix_ns),
            age(Duration::from_nanos(s.created_unix_ns))
        ),
    );
    line("links", &s.links.to_string());
    if let Some(first) = detail.first_epoch {
        line("merged from", &format!("epoch {first}"));
    }
    if let Some(label) = &s.label {
        line("label", label);
    }
    line("producer", &detail.producer);
    let counted = format!("{} records, {} frames", detail.records, detail.frames);
    match (&detail.key, detail.records) {
        // A checkpoint of a VM has records: they are not counted where the key is not.
        (Some(_), 0) => line("content", &format!("{} frames", detail.frames)),
        (Some(_) | None, _) => line("content", &counted),
    }
    if let Some(key) = &detail.key {
        line("encrypted", &format!("with key {key}"));
    }
    for space in &detail.spaces {
        let bytes = space.pages.saturating_mul(space.page_bytes.into());
        line(
            "space",
            &format!(
                "{} {}: {} in pages of {}",
                space.id,
                space.name,
                size(bytes),
                space.page_bytes
            ),
        );
    }
    line("complete", detail.incomplete.as_deref().map_or("yes", |why| why));
    out
}

fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

pub(super) fn promote(report: &PromoteReport, node: &str) -> String {
    let from = report
        .resumed_from
        .as_ref()
        .map(|h| h.name.to_string())
        .unwrap_or_default();
    let mut out = String::new();
    if report.dry_run {
        let _ = writeln!(
            out,
            "{} is under generation {}; nothing was changed",
            report.vm, report.generation
        );
    } else {
        let _ = writeln!(
            out,
            "{} runs on {node} from {from}, generation {}, {:.1} ms after the request",
            report.vm,
            report.generation,
            ms(report.total_us)
        );
        let phases: Vec<_> = report
            .phases
            .iter()
            .map(|p| format!("{} {:.1} ms", p.phase, ms(p.us)))
            .collect();
        let _ = writeln!(out, "  {}", phases.join(", "));
        if let (Some(pid), Some(socket)) = (report.pid, &report.socket) {
            let _ = writeln!(out, "  pid {pid}, control socket {socket}");
        }
    }
    for note in &report.notes {
        let _ = writeln!(out, "  {note}");
    }
    out
}

pub(super) fn promote_json(report: &PromoteReport) -> Value {
    let phases: Map<_, _> = report
        .phases
        .iter()
        .map(|p| (p.phase.clone(), json!(ms(p.us))))
        .collect();
    json!({
        "vm": report.vm.to_string(),
        "generation": report.generation.0,
        "resumed_from": report.resumed_from.as_ref().map(|h| h.name.to_string()),
        "checkpoint": report.resumed_from.as_ref().map(|h| h.checkpoint.to_string()),
        "promote_to_running_ms": ms(report.total_us),
        "phases": phases,
        "pid": report.pid,
        "socket": report.socket,
        "dry_run": report.dry_run,
        "notes": report.notes,
    })
}

pub(super) fn forgotten(vm: &VmId, report: &ForgetReport) -> String {
    let mut out = format!(
        "{vm} is forgotten: {} segments, {}, were removed",
        report.segments,
        size(report.bytes)
    );
    for note in &report.notes {
        let _ = write!(out, "\n  {note}");
    }
    out
}

pub(super) fn status(agent: &AgentStatus, nodes: &[NodeRecord], vms: &[VmRecord]) -> String {
    let budget = agent
        .budget_bytes
        .map_or("no budget".to_owned(), |b| format!("of {}", size(b)));
    let mut out = format!(
        "{} at {} ({}): {} used, {budget}; roles {}; registry {}\n",
        agent.node,
        agent.address,
        agent.software,
        size(agent.used_bytes),
        agent.roles.join(","),
        agent.registry
    );
    if let Some(keep) = &agent.keep {
        let checked = agent.verified_unix_s.map_or_else(String::new, |at| {
            format!(
                "; every segment was last verified {} ago",
                age(Duration::from_secs(at))
            )
        });
        let _ = writeln!(out, "  keeps {keep}{checked}");
    }
    for damaged in &agent.damaged {
        let _ = writeln!(out, "  damaged, set aside: {damaged}");
    }
    if let Some(problem) = &agent.store_problem {
        let _ = writeln!(out, "  the store could not be collected: {problem}");
    }
    if let Some(global) = &agent.global {
        let points: u64 = global.vms.iter().map(|vm| vm.points).sum();
        let _ = writeln!(
            out,
            "  {}: {points} restore points of {} VMs that are held here; keeps {}",
            global.address,
            global.vms.len(),
            global.keep
        );
        if let Some(problem) = &global.problem {
            let _ = writeln!(out, "  nothing is uploaded: {problem}");
        }
        for vm in &global.vms {
            if let Some(problem) = &vm.problem {
                let _ = writeln!(out, "  {} is not uploaded: {problem}", vm.vm);
            }
        }
    }
    if !agent.vms.is_empty() {
        let mut t = table(&[
            "HELD HERE",
            "SEGMENTS",
            "SIZE",
            "NEWEST COMPLETE",
            "AGE",
            "PROMISED",
            "SHIPPED BY",
            "STANDBY",
        ]);
        for vm in &agent.vms {
            let newest = vm.newest.as_ref();
            t.add_row([
                vm.vm.to_string(),
                vm.segments.to_string(),
                size(vm.bytes),
                newest.map_or("none".into(), |n| n.name.to_string()),
                newest.map_or(String::new(), |n| age(Duration::from_nanos(n.created_unix_ns))),
                vm.promised.to_string(),
                vm.shipping.clone().unwrap_or_else(|| "-".into()),
                if vm.hot_at.is_some() { "hot" } else { "cold" }.into(),
            ]);
        }
        let _ = writeln!(out, "\n{}", trimmed(&t));
        for vm in &agent.vms {
            if let Some(why) = &vm.cold {
                let _ = writeln!(out, "  {} is cold: {why}", vm.vm);
            }
            if let Some(last) = &vm.drill {
                let _ = writeln!(out, "  {}: {}", vm.vm, drilled(last));
            }
        }
    }
    if let Some(problem) = &agent.registry_problem {
        let _ = writeln!(
            out,
            "\nthe registry does not answer, so nothing is known of nodes and VMs: {problem}"
        );
        return out;
    }
    if !nodes.is_empty() {
        let mut t = table(&["NODE", "ADDRESS", "ROLES"]);
        for node in nodes {
            t.add_row([node.name.clone(), node.address.clone(), node.roles.join(",")]);
        }
        let _ = writeln!(out, "\n{}", trimmed(&t));
    }
    if !vms.is_empty() {
        let mut t = table(&[
            "VM",
            "STATE",
            "OWNER",
            "GENERATION",
            "COMMITTED",
            "HOLDERS",
            "QUORUM",
            "EVERY",
        ]);
        for vm in vms {
            t.add_row([
                vm.vm.to_string(),
                vm.state.to_string(),
                vm.owner.clone(),
                vm.generation.to_string(),
                vm.newest.as_ref().map_or("none".into(), |h| h.name.to_string()),
                vm.holders.join(","),
                vm.ack_quorum.to_string(),
                format!("{}ms", vm.every_ms),
            ]);
        }
        let _ = writeln!(out, "\n{}", trimmed(&t));
    }
    out
}

/// Without the blanks at the ends of lines.
fn trimmed(table: &Table) -> String {
    let text = table.to_string();
    let lines: Vec<_> = text
        .lines()
        .map(|l| l.trim_end().trim_start_matches(' '))
        .collect();
    lines.join("\n")
}
