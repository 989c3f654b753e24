//! What is told is written down, and of how many VMs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::seen::{SeenGlobal, SeenNewest, SeenVm};
use super::*;

fn vm(number: usize) -> SeenVm {
    SeenVm {
        vm: format!("vm-{number}"),
        newest: Some(SeenNewest {
            generation: 1,
            epoch: number as u64,
            age: Duration::from_millis(1500),
            links: 3,
        }),
        committed: Some((1, 2)),
        image_behind: Some(0),
        drill: Some((true, Duration::from_secs(9))),
        global_lag: Some(Duration::ZERO),
        ..SeenVm::default()
    }
}

const TYPES: [&str; 4] = ["counter", "gauge", "histogram", "info"];

/// Everything that can be told.
fn everything(vms: Vec<SeenVm>) -> Seen {
    Seen {
        budget_bytes: Some(1 << 30),
        verified: Some(Duration::from_secs(1)),
        renewed: Some(Duration::from_secs(1)),
        global: Some(SeenGlobal {
            points: 1,
            bytes: 2,
            failures: 3,
            well: true,
        }),
        held: vms.len() as u64,
        vms,
        ..Seen::default()
    }
}

/// Each metric by its name, as an operator writes it, with its type.
fn told(text: &str) -> BTreeMap<String, String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let named = types.map(|line| {
        let (name, kind) = line.split_once(' ').unwrap();
        let ending = match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        (format!("{name}{ending}"), kind.to_owned())
    });
    named.collect()
}

#[test]
fn every_metric_is_in_the_documentation_and_the_other_way_round() {
    let metrics = Metrics::new(Duration::from_secs(6));
    let text = metrics.with(everything(vec![vm(1)])).unwrap();
    let documented: BTreeMap<String, String> = include_str!("../../../../docs/metrics.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|line| {
            let mut cells = line.split(" | ");
            let name = cells.next()?.trim_end_matches('`').split('{').next()?;
            Some((name.trim_end_matches('`').to_owned(), cells.next()?.to_owned()))
        })
        .filter(|(name, kind)| TYPES.contains(&kind.as_str()) && !name.starts_with("understudy_vmm_"))
        .collect();
    assert_eq!(told(&text), documented);
}

#[test]
fn no_name_is_told_twice_and_units_are_base_units() {
    let metrics = Metrics::new(Duration::from_secs(6));
    let text = metrics.with(everything(vec![vm(1)])).unwrap();
    let types: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
    assert_eq!(types.iter().collect::<BTreeSet<_>>().len(), types.len());
    for unit in text.lines().filter_map(|line| line.strip_prefix("# UNIT ")) {
        let (name, unit) = unit.split_once(' ').unwrap();
        assert!(
            name.ends_with(unit) && ["seconds", "bytes"].contains(&unit),
            "{name} {unit}"
        );
    }
    assert!(text.ends_with("# EOF\n"));
    assert!(
        text.contains("understudy_vm_newest_age_seconds{vm=\"vm-1\"} 1.5\n"),
        "{text}"
    );
}

#[test]
fn takeovers_are_counted_with_how_long_they_took() {
    let metrics = Metrics::new(Duration::from_secs(6));
    metrics.takeover_begins();
    metrics.takeover_begins();
    metrics.takeover_ended(Duration::from_millis(300), true);
    metrics.takeover_ended(Duration::from_secs(300), false);
    let text = metrics.with(Seen::default()).unwrap();
    for line in [
        "understudy_takeovers_begun_total 2",
        "understudy_takeovers_total{result=\"succeeded\"} 1",
        "understudy_takeovers_total{result=\"failed\"} 1",
        "understudy_takeover_duration_seconds_bucket{le=\"0.2\"} 0",
        "understudy_takeover_duration_seconds_bucket{le=\"0.5\"} 1",
        "understudy_takeover_duration_seconds_count 1",
    ] {
        assert!(text.lines().any(|told| told == line), "{line} is not in {text}");
    }
}
