//! Who a certificate says its holder is, and what it may do.
//!
//! A certificate of `standby ca issue` carries one URI among its subject alternative names:
//!
//! ```text
//! understudy://CLUSTER/NODE?roles=execute,store
//! ```
//!
//! A certificate of another authority has none; then `roles.toml`, beside the node's own certificate, says what the
//! holders of which names are:
//!
//! ```text
//! ["alder.example.com"]        # a DNS or URI name in the certificate
//! node = "alder"
//! roles = ["execute", "store"]
//! ```
//!
//! Invariants: a name and a role come from a certificate that was verified, never from what a peer says of itself.
//!
//! What it never does: it verifies no signature (that is rustls's part), and decides nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// How the URI of a certificate begins.
const SCHEME: &str = "understudy://";
/// The longest name of a node or a cluster, in bytes.
pub const MAX_NODE_NAME_BYTES: usize = 64;

/// What the holder of a certificate may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CertRole {
    /// Run VMs and take them over.
    Execute,
    /// Keep segments for others.
    Store,
    /// Run VMs of its own, and ship them.
    Owner,
    /// Give orders: promote, forget, look at everything.
    Operator,
}

impl CertRole {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Execute, Self::Store, Self::Owner, Self::Operator];
}

impl fmt::Display for CertRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Execute => "execute",
            Self::Store => "store",
            Self::Owner => "owner",
            Self::Operator => "operator",
        })
    }
}

impl FromStr for CertRole {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|role| role.to_string() == s);
        found.ok_or_else(|| format!("{s:?} is not a role: use execute, store, owner or operator"))
    }
}

/// Whether `name` can be a node's or a cluster's: 1 to [`MAX_NODE_NAME_BYTES`] of letters, digits, '.', '_' and '-'.
#[must_use]
pub fn is_node_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !name.is_empty() && name.len() <= MAX_NODE_NAME_BYTES && name.bytes().all(allowed)
}

/// A node, by its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeIdentity {
    /// The cluster; none when the certificate is another authority's.
    pub cluster: Option<String>,
    /// The node's name, unique in the cluster.
    pub name: String,
    /// What it may do.
    pub roles: Vec<CertRole>,
}

impl NodeIdentity {
    /// Whether it has `role`.
    #[must_use]
    pub fn has(&self, role: CertRole) -> bool {
        self.roles.contains(&role)
    }

    /// As the URI of a certificate.
    #[must_use]
    pub fn to_uri(&self) -> String {
        let roles: Vec<_> = self.roles.iter().map(CertRole::to_string).collect();
        let cluster = self.cluster.as_deref().unwrap_or_default();
        format!("{SCHEME}{cluster}/{}?roles={}", self.name, roles.join(","))
    }

    /// From the URI of a certificate.
    fn from_uri(uri: &str) -> Option<Self> {
        let (cluster, rest) = uri.strip_prefix(SCHEME)?.split_once('/')?;
        let (name, roles) = rest.split_once("?roles=")?;
        let roles: Result<Vec<CertRole>, _> = roles.split(',').map(str::parse).collect();
        (is_node_name(cluster) && is_node_name(name)).then_some(())?;
        Some(Self {
            cluster: Some(cluster.to_owned()),
            name: name.to_owned(),
            roles: roles.ok()?,
        })
    }
}

/// One entry of `roles.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleEntry {
    /// The node's name in the cluster.
    pub node: String,
    /// What it may do.
    pub roles: Vec<CertRole>,
}

/// `roles.toml`: what the holders of certificates of another authority are, by a name in the certificate.
pub type RoleMap = BTreeMap<String, RoleEntry>;

/// Why a certificate makes nobody.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// It cannot be read.
    #[error("the certificate cannot be read ({0})")]
    Unreadable(String),
    /// It names no role.
    #[error(
        "the certificate (of {names}) says nothing of a role in this cluster: issue it with `standby ca issue`, or name \
         it in roles.toml beside the node's own certificate"
    )]
    NoRole {
        /// The names it has.
        names: String,
    },
    /// Its URI is damaged, or there are several.
    #[error("the certificate has {uri:?} where understudy://CLUSTER/NODE?roles=.. is due: issue it again")]
    Uri {
        /// What stands there.
        uri: String,
    },
}

/// A certificate, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Who holds it.
    pub node: NodeIdentity,
    /// From when it holds, in seconds of Unix time.
    pub not_before: i64,
    /// Until when it holds, in seconds of Unix time.
    pub not_after: i64,
}

impl Certificate {
    /// Reads a certificate; `roles` says what those of another authority are.
    ///
    /// # Errors
    /// When it is none, or makes nobody.
    pub fn read(der: &[u8], roles: &RoleMap) -> Result<Self, CertificateError> {
        let unreadable = |e: &dyn fmt::Display| CertificateError::Unreadable(e.to_string());
        let (_, certificate) = X509Certificate::from_der(der).map_err(|e| unreadable(&e))?;
        let alternative = certificate
            .subject_alternative_name()
            .map_err(|e| unreadable(&e))?;
        let mut names = Vec::new();
        let mut ours = Vec::new();
        for name in alternative.iter().flat_map(|n| &n.value.general_names) {
            match name {
                GeneralName::URI(uri) if uri.starts_with(SCHEME) => ours.push(*uri),
                GeneralName::URI(name) | GeneralName::DNSName(name) => names.push(*name),
                _ => {}
            }
        }
        let node = match ours.as_slice() {
            [uri] => NodeIdentity::from_uri(uri).ok_or_else(|| CertificateError::Uri { uri: short(uri) })?,
            [] => {
                let entry = names.iter().find_map(|name| roles.get(*name));
                let entry = entry.ok_or_else(|| CertificateError::NoRole {
                    names: short(&format!("{} {}", certificate.subject(), names.join(" "))),
                })?;
                NodeIdentity {
                    cluster: None,
                    name: entry.node.clone(),
                    roles: entry.roles.clone(),
                }
            }
            // Which of them would be believed must not be a matter of order.
            several => {
                return Err(CertificateError::Uri {
                    uri: short(&several.join(" ")),
                });
            }
        };
        let validity = certificate.validity();
        Ok(Self {
            node,
            not_before: validity.not_before.timestamp(),
            not_after: validity.not_after.timestamp(),
        })
    }
}

/// What a message may carry of a peer's text.
fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_read_back_and_nothing_else_is() {
        let node = NodeIdentity {
            cluster: Some("lab".into()),
            name: "alder".into(),
            roles: vec![CertRole::Execute, CertRole::Store],
        };
        assert_eq!(node.to_uri(), "understudy://lab/alder?roles=execute,store");
        assert_eq!(NodeIdentity::from_uri(&node.to_uri()), Some(node));
        for wrong in [
            "understudy://lab/alder",
            "understudy://lab/alder?roles=",
            "understudy://lab/alder?roles=root",
            "understudy://lab/alder?roles=store,",
            "understudy://lab/?roles=store",
            "understudy:///alder?roles=store",
            "understudy://lab/al/der?roles=store",
            "understudy://lab/alder?roles=store&roles=execute",
            "https://lab/alder?roles=store",
        ] {
            assert_eq!(NodeIdentity::from_uri(wrong), None, "{wrong}");
        }
    }
}
