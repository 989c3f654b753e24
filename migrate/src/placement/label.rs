//! What a node must be labelled to hold a VM.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A node's labels.
type Labels = BTreeMap<String, String>;

/// The most bytes of a label's key or value.
const MAX_LABEL_BYTES: usize = 64;

/// One rule: `zone=a`, `zone!=a`, `zone!=` (another than the VM's own node has), `ssd` (has it, whatever the value).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelRule {
    /// `KEY=VALUE`.
    Is(String, String),
    /// `KEY!=VALUE`.
    IsNot(String, String),
    /// `KEY!=`: it has another value than the node the VM runs on.
    Other(String),
    /// `KEY`.
    Has(String),
}

/// Why a text is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no label rule: use KEY=VALUE, KEY!=VALUE, KEY!= (another than the VM's own node has) or KEY, of letters, \
     digits, '.', '_', '-' and '/'"
)]
pub struct LabelError(String);

/// Whether a text may be a label's key.
pub(super) fn is_key(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/');
    !text.is_empty() && text.len() <= MAX_LABEL_BYTES && text.bytes().all(allowed)
}

impl FromStr for LabelRule {
    type Err = LabelError;
    fn from_str(s: &str) -> Result<Self, LabelError> {
        let refused = || LabelError(s.chars().take(80).collect());
        let own = str::to_owned;
        let rule = match (s.split_once("!="), s.split_once('=')) {
            (Some((key, "")), _) => Self::Other(own(key)),
            (Some((key, value)), _) => Self::IsNot(own(key), own(value)),
            (None, Some((key, value))) => Self::Is(own(key), own(value)),
            (None, None) => Self::Has(own(s)),
        };
        let fits = match &rule {
            Self::Is(key, value) | Self::IsNot(key, value) => is_key(key) && is_key(value),
            Self::Other(key) | Self::Has(key) => is_key(key),
        };
        if fits { Ok(rule) } else { Err(refused()) }
    }
}

impl fmt::Display for LabelRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Is(key, value) => write!(f, "{key}={value}"),
            Self::IsNot(key, value) => write!(f, "{key}!={value}"),
            Self::Other(key) => write!(f, "{key}!="),
            Self::Has(key) => f.write_str(key),
        }
    }
}

impl Serialize for LabelRule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LabelRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl LabelRule {
    fn key(&self) -> &str {
        match self {
            Self::Is(key, _) | Self::IsNot(key, _) | Self::Other(key) | Self::Has(key) => key,
        }
    }

    /// What a node has of it, in words.
    pub(super) fn shown(&self, labels: &Labels) -> String {
        match labels.get(self.key()) {
            Some(value) => format!("it has {}={value}", self.key()),
            None => format!("it has no {}", self.key()),
        }
    }

    /// Why a node does not meet it; none when it does.
    pub(super) fn unmet(&self, labels: &Labels, owner: Option<&Labels>) -> Option<String> {
        let has = labels.get(self.key());
        let met = match self {
            Self::Is(_, value) => has == Some(value),
            Self::IsNot(_, value) => has != Some(value),
            Self::Has(_) => has.is_some(),
            Self::Other(key) => match owner.and_then(|o| o.get(key)) {
                // Unlabelled it could be anywhere.
                Some(own) => has.is_some_and(|has| has != own),
                None => {
                    return Some(format!(
                        "{self} cannot be told: the node the VM runs on has no label {key}"
                    ));
                }
            },
        };
        (!met).then(|| format!("{self} is asked for, and {}", self.shown(labels)))
    }
}
