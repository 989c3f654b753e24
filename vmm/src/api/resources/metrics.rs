//! `GET /metrics`: the numbers of a VM's status as OpenMetrics text, for Prometheus and its kin.
//!
//! `docs/metrics.md` lists them; a test holds it to what is told here.

use std::fmt;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use migrate::openmetrics::{self, BYTES, Labelled, SECONDS, counter, each, gauge};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::api::fault::{Fault, FaultMessage};
use crate::api::instance::Instance;
use crate::control::RunState;
use crate::session::{HolderReport, SessionStatus};

/// What every name begins with. (The agents' begin with `understudy_`, and theirs of single VMs with `understudy_vm_`.)
const PREFIX: &str = "understudy_vmm";

#[utoipa::path(get, path = "/metrics", tag = "understudy",
    responses((status = 200, description = "OpenMetrics text", content_type = "application/openmetrics-text"),
              (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn read(State(app): State<Arc<Instance>>) -> Result<impl IntoResponse, Fault> {
    let status = app.started()?.status();
    let text = text(status).map_err(|_| Fault::bad("the metrics could not be told"))?;
    Ok(([(CONTENT_TYPE, openmetrics::CONTENT_TYPE)], text))
}

/// A status as text.
fn text(status: SessionStatus) -> Result<String, fmt::Error> {
    let label = ("vm".into(), status.name.clone().into());
    let mut registry = Registry::with_prefix_and_labels(PREFIX, [label].into_iter());
    registry.register_collector(Box::new(Told(status)));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Told(SessionStatus);

impl Collector for Told {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let e = &mut encoder;
        self.machine(e)?;
        self.checkpoints(e)?;
        self.store(e)?;
        self.protection(e)
    }
}

impl Labelled for HolderReport {
    const LABEL: &'static str = "holder";

    fn label(&self) -> &str {
        &self.address
    }
}

/// The epoch of `<vm>/<generation>/<epoch>`.
fn epoch(name: &str) -> Option<u64> {
    name.rsplit('/').next()?.parse().ok()
}

impl Told {
    fn machine(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let status = &self.0;
        let mut state = e.encode_descriptor(
            "state",
            "1 of the state the VM is in, 0 of the others.",
            None,
            MetricType::Gauge,
        )?;
        for name in RunState::WORDS {
            state
                .encode_family(&[("state", name)])?
                .encode_gauge(&u64::from(status.state == name))?;
        }
        gauge(
            e,
            ("generation", None),
            "The generation this process owns.",
            status.generation,
        )?;
        gauge(
            e,
            ("uptime", SECONDS),
            "Since the VM was made in this process.",
            status.up_ms as f64 / 1e3,
        )?;
        gauge(e, ("vcpus", None), "Virtual CPUs.", u64::from(status.vcpus))?;
        gauge(
            e,
            ("memory", BYTES),
            "The guest's memory.",
            status.memory_mib.saturating_mul(1 << 20),
        )
    }

    fn checkpoints(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let status = &self.0;
        counter(
            e,
            ("checkpoints", None),
            "Checkpoints taken in this process.",
            status.checkpoints,
        )?;
        counter(
            e,
            ("checkpoint_raw", BYTES),
            "Bytes of changed pages in them.",
            status.raw_bytes,
        )?;
        counter(
            e,
            ("checkpoint_stored", BYTES),
            "Bytes of their segments.",
            status.stored_bytes,
        )?;
        counter(
            e,
            ("shipped", BYTES),
            "Bytes sent to holders.",
            status.shipped_bytes,
        )?;
        gauge(
            e,
            ("checkpoint_failing", None),
            "1 when something went wrong with a checkpoint, and has not gone right since.",
            u64::from(status.problem.is_some()),
        )?;
        if let Some(epoch) = status.committed.as_deref().and_then(epoch) {
            gauge(
                e,
                ("committed_epoch", None),
                "Epoch of the newest checkpoint that the ack quorum has.",
                epoch,
            )?;
        }
        let Some(newest) = &status.newest else {
            return Ok(());
        };
        if let Some(epoch) = epoch(&newest.name) {
            gauge(
                e,
                ("newest_epoch", None),
                "Epoch of the newest checkpoint taken.",
                epoch,
            )?;
        }
        gauge(
            e,
            ("last_stop", SECONDS),
            "For how long the guest stood still for it.",
            newest.stop_us as f64 / 1e6,
        )?;
        gauge(
            e,
            ("last_encode", SECONDS),
            "How long encoding and storing it took after that.",
            newest.encode_us as f64 / 1e6,
        )
    }

    fn store(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        gauge(
            e,
            ("store_used", BYTES),
            "Bytes in the local store.",
            self.0.store_bytes,
        )?;
        if let Some(budget) = self.0.store_budget {
            gauge(e, ("store_budget", BYTES), "The most that they may be.", budget)?;
        }
        Ok(())
    }

    fn protection(&self, e: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(protection) = &self.0.protection else {
            return Ok(());
        };
        gauge(
            e,
            ("checkpoint_interval", SECONDS),
            "From one checkpoint to the next.",
            protection.every_ms as f64 / 1e3,
        )?;
        gauge(
            e,
            ("ack_quorum", None),
            "Holders that must have a checkpoint for it to be committed.",
            protection.ack_quorum as u64,
        )?;
        let holders = &protection.holders;
        each(
            e,
            ("holder_connected", None),
            "1 when the holder is connected and takes checkpoints.",
            holders,
            |holder| {
                let connected = ["synchronising", "up-to-date"].contains(&holder.state.as_str());
                Some(u64::from(connected))
            },
        )?;
        each(
            e,
            ("holder_acked_epoch", None),
            "Epoch of the newest checkpoint that it has stored durably.",
            holders,
            |holder| holder.acked.as_deref().and_then(epoch),
        )?;
        each(
            e,
            ("holder_lag_epochs", None),
            "Checkpoints it lacks.",
            holders,
            |holder| Some(holder.lag_epochs),
        )?;
        each(e, ("holder_lag", BYTES), "Their bytes.", holders, |holder| {
            Some(holder.lag_bytes)
        })?;
        each(
            e,
            ("holder_sent", BYTES),
            "Bytes sent to it by this process.",
            holders,
            |holder| Some(holder.bytes_sent),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::vcpu::GuestEnd;

    fn status() -> SessionStatus {
        serde_json::from_value(json!({
            "name": "web", "generation": 3, "state": "running", "pid": 7, "vcpus": 2, "memory_mib": 256, "up_ms": 1500,
            "newest": { "name": "web/3/12", "kind": "delta", "stop_us": 250, "encode_us": 4000, "data_pages": 1,
                        "zero_pages": 0, "raw_bytes": 4096, "stored_bytes": 900, "digest": "x" },
            "committed": "web/3/11", "checkpoints": 12, "raw_bytes": 40960, "stored_bytes": 9000, "shipped_bytes": 18000,
            "store": "/x", "store_bytes": 100, "store_budget": 200,
            "protection": { "every_ms": 200, "ack_quorum": 1, "holders": [
                { "address": "10.0.0.1:7400", "state": "up-to-date", "acked": "web/3/11", "lag_epochs": 1,
                  "lag_bytes": 900, "bytes_sent": 8100 },
                { "address": "10.0.0.2:7400", "state": "unreachable", "lag_epochs": 12, "lag_bytes": 9000,
                  "bytes_sent": 0 } ] }
        }))
        .unwrap()
    }

    #[test]
    fn numbers_are_those_of_the_status() {
        let text = text(status()).unwrap();
        for line in [
            "understudy_vmm_state{state=\"running\",vm=\"web\"} 1",
            "understudy_vmm_state{state=\"fenced\",vm=\"web\"} 0",
            "understudy_vmm_checkpoints_total{vm=\"web\"} 12",
            "understudy_vmm_last_stop_seconds{vm=\"web\"} 0.00025",
            "understudy_vmm_newest_epoch{vm=\"web\"} 12",
            "understudy_vmm_committed_epoch{vm=\"web\"} 11",
            "understudy_vmm_shipped_bytes_total{vm=\"web\"} 18000",
            "understudy_vmm_holder_connected{holder=\"10.0.0.1:7400\",vm=\"web\"} 1",
            "understudy_vmm_holder_connected{holder=\"10.0.0.2:7400\",vm=\"web\"} 0",
            "understudy_vmm_holder_lag_bytes{holder=\"10.0.0.2:7400\",vm=\"web\"} 9000",
        ] {
            // The order of labels means nothing.
            let same = |told: &str| sorted(told) == sorted(line);
            assert!(text.lines().any(same), "{line} is not in {text}");
        }
        assert!(!text.contains("holder_acked_epoch{holder=\"10.0.0.2"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn whatever_state_a_vm_is_in_one_of_them_is_it() {
        let reason = || "r".to_owned();
        for state in [
            RunState::Paused,
            RunState::Running,
            RunState::Lapsed { reason: reason() },
            RunState::Fenced { reason: reason() },
            RunState::Ended(GuestEnd::PowerOff),
            RunState::Ended(GuestEnd::TripleFault),
            RunState::Stopped,
        ] {
            let mut status = status();
            status.state = state.word().into();
            let text = text(status).unwrap();
            let told = text
                .lines()
                .filter(|line| line.starts_with("understudy_vmm_state{"));
            let (is, not): (Vec<_>, Vec<_>) = told.partition(|line| line.ends_with(" 1"));
            assert_eq!(
                (is.len(), not.len()),
                (1, RunState::WORDS.len() - 1),
                "{state:?}: {text}"
            );
            assert!(is[0].contains(&format!("state=\"{}\"", state.word())), "{is:?}");
        }
    }

    /// A sample with its labels in order.
    fn sorted(line: &str) -> Option<(String, Vec<String>, String)> {
        let (name, rest) = line.split_once('{')?;
        let (labels, value) = rest.split_once("} ")?;
        let mut labels: Vec<_> = labels.split(',').map(str::to_owned).collect();
        labels.sort();
        Some((name.to_owned(), labels, value.to_owned()))
    }

    #[test]
    fn every_metric_is_in_the_documentation_and_the_other_way_round() {
        let text = text(status()).unwrap();
        let told: BTreeMap<String, String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
            .map(|(name, kind)| {
                let ending = if kind == "counter" { "_total" } else { "" };
                (format!("{name}{ending}"), kind.to_owned())
            })
            .collect();
        let documented: BTreeMap<String, String> = include_str!("../../../../docs/metrics.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| `understudy_vmm_"))
            .filter_map(|line| {
                let mut cells = line.split(" | ");
                let name = cells.next()?.split(['`', '{']).next()?;
                Some((format!("understudy_vmm_{name}"), cells.next()?.to_owned()))
            })
            .collect();
        assert_eq!(told, documented);
    }
}
