//! One row of the benchmark: what was measured, beside what the machine itself would allow.

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Map, Value};

use super::stats::{Samples, Summary};

/// A measured row. As JSON it is one object, see the test below.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Its name in MEASURE.md.
    pub name: String,
    /// What the numbers count.
    pub unit: String,
    /// The median.
    pub median: f64,
    /// The smallest sample.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many samples.
    pub n: usize,
    /// The 99th percentile, where the tail matters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99: Option<f64>,
    /// What this machine would allow, in the same unit, measured in the same run.
    pub limit: Option<f64>,
    /// What that is.
    pub limit_is: String,
    /// What was aimed at, in the same unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<f64>,
    /// Whether it was reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub met: Option<bool>,
    /// What it was measured with, and what else was seen.
    pub params: Map<String, Value>,
    /// The target in words, for people.
    #[serde(skip)]
    pub(crate) aim: String,
}

/// Which way a target is exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    AtMost,
    AtLeast,
}

impl Row {
    /// A row of these samples.
    ///
    /// # Errors
    /// When there are none.
    pub fn new(name: &str, unit: &str, samples: &Samples) -> Result<Self> {
        let Summary {
            median, min, max, n, ..
        } = samples
            .summary()
            .with_context(|| format!("{name}: nothing was measured"))?;
        Ok(Self {
            name: name.to_owned(),
            unit: unit.to_owned(),
            median,
            min,
            max,
            n,
            p99: None,
            limit: None,
            limit_is: String::new(),
            target: None,
            met: None,
            params: Map::new(),
            aim: String::new(),
        })
    }

    /// Notes what it was measured with.
    #[must_use]
    pub fn param(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.params.insert(name.to_owned(), value.into());
        self
    }

    /// Notes a number that was seen, with three digits.
    #[must_use]
    pub fn seen(self, name: &str, value: f64) -> Self {
        let number = short(value).parse::<f64>().unwrap_or(value);
        self.param(name, number)
    }

    /// What the machine would allow.
    #[must_use]
    pub fn limit(mut self, limit: f64, is: impl Into<String>) -> Self {
        self.limit = Some(limit);
        self.limit_is = is.into();
        self
    }

    /// The median shall be at most this.
    #[must_use]
    pub fn at_most(self, target: f64) -> Self {
        let aim = format!("at most {}", short(target));
        self.aim(Bound::AtMost, target, aim)
    }

    /// The median shall be at least this.
    #[must_use]
    pub fn at_least(self, target: f64) -> Self {
        let aim = format!("at least {}", short(target));
        self.aim(Bound::AtLeast, target, aim)
    }

    /// The median shall be at least this share of the limit, which is set before.
    #[must_use]
    pub fn at_least_of_limit(self, share: f64) -> Self {
        let target = self.limit.unwrap_or(f64::INFINITY) * share;
        let aim = format!("{share} of the limit, {}", short(target));
        self.aim(Bound::AtLeast, target, aim)
    }

    /// The median shall be at most this multiple of the limit, which is set before.
    #[must_use]
    pub fn at_most_of_limit(self, share: f64) -> Self {
        let target = self.limit.unwrap_or(0.0) * share;
        let aim = format!("{share} of the limit, {}", short(target));
        self.aim(Bound::AtMost, target, aim)
    }

    /// Shows the 99th percentile.
    #[must_use]
    pub fn tail(mut self, samples: &Samples) -> Self {
        self.p99 = samples.summary().map(|summary| summary.p99);
        self
    }

    /// Shows the 99th percentile, which shall be at most `times` the median. After the target for the median.
    #[must_use]
    pub fn tail_at_most(self, samples: &Samples, times: f64) -> Self {
        let row = self.tail(samples);
        let held = row.p99.is_some_and(|p99| p99 <= times * row.median);
        row.also(held, format!("p99 at most {times} times the median"))
    }

    /// Makes the target depend on another condition, after the target for the median.
    #[must_use]
    pub fn also(mut self, held: bool, condition: String) -> Self {
        self.met = self.met.map(|met| met && held);
        self.aim = format!("{}; {condition}", self.aim);
        self
    }

    fn aim(mut self, bound: Bound, target: f64, aim: String) -> Self {
        self.met = Some(match bound {
            Bound::AtMost => self.median <= target,
            Bound::AtLeast => self.median >= target,
        });
        self.target = Some(target);
        self.aim = aim;
        self
    }

    /// The target, and whether it was reached.
    #[must_use]
    pub fn verdict(&self) -> String {
        match self.met {
            None => "none".to_owned(),
            Some(met) => format!("{}: {}", self.aim, if met { "met" } else { "missed" }),
        }
    }
}

/// A number with three digits that count, or all of those before the point.
#[must_use]
pub(crate) fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[f64]) -> (Row, Samples) {
        let samples = Samples::collect(values.len(), |i| Ok::<_, ()>(values[i])).expect("no errors");
        (
            Row::new("a.row", "us", &samples).expect("there are samples"),
            samples,
        )
    }

    #[test]
    fn as_json_it_has_the_fields_of_measure_md() {
        let (row, samples) = row(&[1.0, 2.0, 9.0]);
        let row = row
            .limit(1.5, "a copy")
            .at_most(2.0)
            .tail_at_most(&samples, 2.0)
            .param("memory_mib", 128);
        let json = serde_json::to_value(&row).expect("a row is JSON");
        let expected = serde_json::json!({
            "name": "a.row", "unit": "us", "median": 2.0, "min": 1.0, "max": 9.0, "n": 3, "p99": 9.0,
            "limit": 1.5, "limit_is": "a copy", "target": 2.0, "met": false, "params": { "memory_mib": 128 },
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn what_is_not_there_is_left_out_but_the_limit() {
        let json = serde_json::to_value(row(&[1.0]).0).expect("a row is JSON");
        let keys: Vec<_> = json
            .as_object()
            .expect("an object")
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(
            keys,
            [
                "limit", "limit_is", "max", "median", "min", "n", "name", "params", "unit"
            ]
        );
        assert!(json["limit"].is_null());
    }

    #[test]
    fn targets_are_met_or_missed() {
        assert_eq!(row(&[250.0]).0.at_most(250.0).verdict(), "at most 250: met");
        assert_eq!(row(&[251.0]).0.at_most(250.0).verdict(), "at most 250: missed");
        assert_eq!(row(&[3.0]).0.at_least(2.0).verdict(), "at least 2.00: met");
        assert_eq!(
            row(&[3.0]).0.limit(4.0, "x").at_least_of_limit(0.8).met,
            Some(false)
        );
        assert_eq!(row(&[3.0]).0.verdict(), "none");
        let (tailed, samples) = row(&[1.0, 1.0, 5.0]);
        assert_eq!(tailed.at_most(2.0).tail_at_most(&samples, 2.0).met, Some(false));
        assert!(Row::new("empty", "us", &Samples::default()).is_err());
    }

    #[test]
    fn three_digits_count() {
        let shown: Vec<_> = [0.0, 0.1234, 1.234, 12.34, 123.4, 12345.6].map(short).into();
        assert_eq!(shown, ["0", "0.123", "1.23", "12.3", "123", "12346"]);
    }
}
