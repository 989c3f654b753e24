//! A small cluster's own authority: `standby ca init` and `standby ca issue`.
//!
//! ```text
//! DIR/ca.pem       the authority's certificate: what every node believes
//! DIR/ca-key.pem   its key: whoever has it can be any node. Keep it off the nodes
//! NODE/cert.pem    a node's certificate: its name, roles and addresses
//! NODE/key.pem     its key
//! NODE/ca.pem      a copy
//! ```
//!
//! Keys are ECDSA on P-256. Invariants: a key is readable by its owner alone from its first byte on; nothing that is
//! there is written over, except a node's certificate with `--renew`.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::crashsafe::{Disk, folder_of};
use crate::transport::certificate::{MAX_NODE_NAME_BYTES, is_node_name};
use crate::transport::{CA_FILE, CERT_FILE, CertRole, KEY_FILE, NodeIdentity};

/// The authority's key.
const CA_KEY_FILE: &str = "ca-key.pem";
/// How long before now a certificate is valid already, for nodes whose clocks are a little behind.
const BACKDATED: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// The most days a certificate may hold.
const MAX_DAYS: u32 = 36_500;
/// What the authority's name begins with.
const CA_NAME: &str = "Understudy CA of ";

/// Why a certificate was not made.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file cannot be read or written.
    #[error("{what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is one already.
    #[error("{} is there already: {hint}", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// There is no authority.
    #[error("there is no authority in {}: make one with `standby ca init`, or name its folder with --ca", dir.display())]
    NoCa {
        /// The folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A name is none.
    #[error("{name:?} is no name: use 1 to {MAX_NODE_NAME_BYTES} of letters, digits, '.', '_' and '-'")]
    Name {
        /// As it was given.
        name: String,
    },
    /// An address is none.
    #[error("{address:?} is neither an IP address nor a DNS name")]
    Address {
        /// As it was given.
        address: String,
    },
    /// The authority's files are not what they should be.
    #[error("make a certificate with {}", dir.display())]
    Make {
        /// The folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
}

/// `standby ca`.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make an authority for a cluster: ca.pem, which every node has, and ca-key.pem, which no node should have.
    Init {
        /// The folder.
        dir: PathBuf,
        /// The cluster's name, which is in every certificate.
        #[arg(long, default_value = "understudy")]
        cluster: String,
        /// For how long it holds.
        #[arg(long, value_name = "DAYS", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS as i64))]
        days: u32,
    },
    /// Issue a node's certificate: a folder with cert.pem, key.pem and ca.pem, to be copied to the node.
    Issue(IssueArgs),
}

/// `standby ca issue`.
#[derive(Debug, Args)]
pub struct IssueArgs {
    /// The node's name, unique in the cluster.
    node: String,
    /// What it may do: execute (run VMs and take them over), store (hold segments), owner (run VMs of its own),
    /// operator (give orders).
    #[arg(long, value_delimiter = ',', default_value = "execute,store")]
    role: Vec<CertRole>,
    /// An address or a DNS name by which others reach it; its name and this host's loopback addresses are always in
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    address: Vec<String>,
    /// The authority's folder.
    #[arg(long, value_name = "DIR", default_value = "/etc/understudy/ca")]
    ca: PathBuf,
    /// Where to write [default: the folder NODE beside the authority's files]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// For how long it holds.
    #[arg(long, value_name = "DAYS", default_value_t = 825, value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS as i64))]
    days: u32,
    /// Replace the certificate that is there: running agents and VMs take it up by themselves
    #[arg(long)]
    renew: bool,
}

/// A certificate to be issued.
#[derive(Debug, Clone)]
pub struct NewCertificate {
    /// The node's name.
    pub node: String,
    /// What it may do.
    pub roles: Vec<CertRole>,
    /// Addresses and DNS names beside its name and loopback.
    pub addresses: Vec<String>,
    /// From when it holds.
    pub not_before: SystemTime,
    /// Until when it holds.
    pub not_after: SystemTime,
}

impl NewCertificate {
    /// One that holds from now on, for `days`.
    #[must_use]
    pub fn new(node: &str, roles: &[CertRole], days: u32) -> Self {
        let now = SystemTime::now();
        Self {
            node: node.to_owned(),
            roles: roles.to_vec(),
            addresses: Vec::new(),
            not_before: now - BACKDATED,
            not_after: now + DAY * days,
        }
    }
}

impl CaCommand {
    /// Does it; what to say of it.
    ///
    /// # Errors
    /// [`CaError`]; nothing half-made is left that would be taken for whole.
    pub fn run(self) -> Result<String, CaError> {
        match self {
            Self::Init { dir, cluster, days } => {
                init(&dir, &cluster, days)?;
                Ok(format!(
                    "{} is the authority of cluster {cluster}. Whoever has {} can be any node: keep it off the nodes.\n\
                     Next: standby ca issue NODE --ca {}",
                    dir.join(CA_FILE).display(),
                    dir.join(CA_KEY_FILE).display(),
                    dir.display()
                ))
            }
            Self::Issue(args) => {
                let out = args.out.unwrap_or_else(|| args.ca.join(&args.node));
                let wanted = NewCertificate {
                    addresses: args.address,
                    ..NewCertificate::new(&args.node, &args.role, args.days)
                };
                issue(&args.ca, &out, &wanted, args.renew)?;
                let roles: Vec<_> = args.role.iter().map(CertRole::to_string).collect();
                Ok(format!(
                    "{} is the certificate of {} ({}) for {} days. Copy the folder to the node, as /etc/understudy/tls or \
                     for --tls.",
                    out.join(CERT_FILE).display(),
                    args.node,
                    roles.join(","),
                    args.days
                ))
            }
        }
    }
}

/// Makes an authority in `dir`.
///
/// # Errors
/// When there is one, or it cannot be written.
pub fn init(dir: &Path, cluster: &str, days: u32) -> Result<(), CaError> {
    if !is_node_name(cluster) {
        return Err(CaError::Name {
            name: cluster.chars().take(80).collect(),
        });
    }
    let make = |source| CaError::Make {
        dir: dir.to_owned(),
        source,
    };
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("{CA_NAME}{cluster}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + DAY * days).into();
    let key = KeyPair::generate().map_err(make)?;
    let certificate = params.self_signed(&key).map_err(make)?;
    folder(dir)?;
    let hint = "an authority is made once; name another folder for another cluster";
    // The key first: a certificate without its key would look like an authority.
    write_new(&dir.join(CA_KEY_FILE), &key.serialize_pem(), 0o600, hint)?;
    write_new(&dir.join(CA_FILE), &certificate.pem(), 0o644, hint)
}

/// Issues a certificate of the authority in `ca` into the folder `out`.
///
/// # Errors
/// When there is no authority, or a certificate is there already and `renew` is not set.
pub fn issue(ca: &Path, out: &Path, wanted: &NewCertificate, renew: bool) -> Result<(), CaError> {
    if !is_node_name(&wanted.node) {
        return Err(CaError::Name {
            name: wanted.node.chars().take(80).collect(),
        });
    }
    let make = |source| CaError::Make {
        dir: ca.to_owned(),
        source,
    };
    let read = |name: &str| {
        fs::read_to_string(ca.join(name)).map_err(|source| CaError::NoCa {
            dir: ca.to_owned(),
            source,
        })
    };
    let (ca_pem, ca_key) = (read(CA_FILE)?, read(CA_KEY_FILE)?);
    let cluster = cluster_of(&ca_pem).ok_or_else(|| make(rcgen::Error::CouldNotParseCertificate))?;
    let ca_key = KeyPair::from_pem(&ca_key).map_err(make)?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key).map_err(make)?;

    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, wanted.node.clone());
    let identity = NodeIdentity {
        cluster: Some(cluster),
        name: wanted.node.clone(),
        roles: wanted.roles.clone(),
    };
    let uri = Ia5String::try_from(identity.to_uri()).map_err(make)?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    let loopback = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let mut names = vec![wanted.node.clone()];
    names.extend(loopback.into_iter().chain(wanted.addresses.iter().cloned()));
    for name in names {
        params.subject_alt_names.push(alternative(&name)?);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if identity.has(CertRole::Store) || identity.has(CertRole::Execute) {
        // Only an agent is ever connected to.
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.not_before = wanted.not_before.into();
    params.not_after = wanted.not_after.into();
    let key = KeyPair::generate().map_err(make)?;
    let certificate = params.signed_by(&key, &issuer).map_err(make)?;

    folder(out)?;
    let cert_path = out.join(CERT_FILE);
    if !renew && cert_path.exists() {
        return Err(CaError::Exists {
            path: cert_path,
            hint: "replace it with --renew",
        });
    }
    // Each in one step, so that a process that reads them meanwhile sees whole files; a key and a certificate that do
    // not fit yet are tried again by it when the next file changes.
    replace(&out.join(CA_FILE), &ca_pem, 0o644)?;
    replace(&out.join(KEY_FILE), &key.serialize_pem(), 0o600)?;
    replace(&cert_path, &certificate.pem(), 0o644)
}

/// The cluster's name, which is in the authority's.
fn cluster_of(ca_pem: &str) -> Option<String> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(ca_pem.as_bytes()).ok()?;
    let certificate = pem.parse_x509().ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    let cluster = name.strip_prefix(CA_NAME)?;
    is_node_name(cluster).then(|| cluster.to_owned())
}

fn alternative(name: &str) -> Result<SanType, CaError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let unusable = || CaError::Address {
        address: name.chars().take(80).collect(),
    };
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > 253 || !name.bytes().all(allowed) {
        return Err(unusable());
    }
    let name = Ia5String::try_from(name).map_err(|_| unusable())?;
    Ok(SanType::DnsName(name))
}

fn folder(dir: &Path) -> Result<(), CaError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| CaError::File {
        what: "make the folder",
        path: dir.to_owned(),
        source,
    })
}

fn write_new(path: &Path, text: &str, mode: u32, hint: &'static str) -> Result<(), CaError> {
    let written = (|| {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)?;
        file.write_all(text.as_bytes())?;
        file.flush()
    })();
    written.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => CaError::Exists {
            path: path.to_owned(),
            hint,
        },
        _ => CaError::File {
            what: "write",
            path: path.to_owned(),
            source,
        },
    })
}

/// Writes a file in one step, whatever is there.
fn replace(path: &Path, text: &str, mode: u32) -> Result<(), CaError> {
    let failed = |source| CaError::File {
        what: "write",
        path: path.to_owned(),
        source,
    };
    let temp = Disk::durable().secret_temp(folder_of(path), &format!(".new.{}", std::process::id()));
    let mut temp = temp.map_err(|e| failed(e.source))?;
    temp.file()
        .set_permissions(fs::Permissions::from_mode(mode))
        .and_then(|()| temp.write_all(text.as_bytes()))
        .map_err(failed)?;
    temp.replace(path).map_err(|e| failed(e.source))
}
