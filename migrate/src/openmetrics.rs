//! How agents and VMs write what they tell Prometheus: OpenMetrics text, from what was gathered before.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

/// The content type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The unit of times.
pub const SECONDS: Option<Unit> = Some(Unit::Seconds);
/// The unit of sizes.
pub const BYTES: Option<Unit> = Some(Unit::Bytes);

/// One of several things of which a metric tells each by itself.
pub trait Labelled {
    /// The label's name.
    const LABEL: &'static str;

    /// Which one it is.
    fn label(&self) -> &str;
}

/// One gauge without labels.
///
/// # Errors
/// When there is no room for the text.
pub fn gauge<V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, unit): (&str, Option<Unit>),
    help: &str,
    value: V,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
    metric.encode_gauge(&value)
}

/// One counter without labels.
///
/// # Errors
/// As [`gauge`].
pub fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    (name, unit): (&str, Option<Unit>),
    help: &str,
    value: u64,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
    metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

/// One gauge of each that has it.
///
/// # Errors
/// As [`gauge`].
pub fn each<T: Labelled, V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, unit): (&str, Option<Unit>),
    help: &str,
    of: &[T],
    value: impl Fn(&T) -> Option<V>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
    for one in of {
        if let Some(value) = value(one) {
            metric
                .encode_family(&[(T::LABEL, one.label())])?
                .encode_gauge(&value)?;
        }
    }
    Ok(())
}
