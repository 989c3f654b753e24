//! A node's certificate, and TLS made of it: in a folder of `cert.pem`, `key.pem`, `ca.pem` and, for certificates of
//! another authority, `roles.toml`.
//!
//! TLS 1.3 only, with a certificate from both sides, both of the authority in `ca.pem`. Files that changed are read
//! again for the next connection; what cannot be used is said once, and what was read before goes on.
//!
//! Invariants: no session is resumed, so that every connection shows a certificate that holds now; a key that others
//! on this host can read is refused.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::certificate::{Certificate, CertificateError, NodeIdentity, RoleMap};
use super::explain;

/// The protocol's name inside TLS: what else speaks TLS is told apart by it.
const ALPN: &[u8] = b"understudy";
/// How often the files are looked at, at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The longest file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// The certificate, with those between it and the authority's.
pub const CERT_FILE: &str = "cert.pem";
/// Its private key.
pub const KEY_FILE: &str = "key.pem";
/// The authorities whose certificates are believed.
pub const CA_FILE: &str = "ca.pem";
/// What the holders of another authority's certificates are.
pub const ROLES_FILE: &str = "roles.toml";

/// Why a node's certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error(
        "read {}: a certificate's folder has cert.pem, key.pem and ca.pem, as `standby ca issue` writes them",
        path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is none of what it should be.
    #[error("{} is not usable: {why}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Others can read the key.
    #[error(
        "{} can be used by others on this host (mode {mode:04o}): chmod 600 it, and issue a new certificate if one may \
         have",
        path.display()
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The certificate makes nobody.
    #[error("use {}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: CertificateError,
    },
    /// The certificate does not hold now.
    #[error(
        "{} holds from {} to {}, and the clock here says {}: issue a new one with `standby ca issue`, or set the clock",
        path.display(), explain::moment(*not_before), explain::moment(*not_after), explain::moment(explain::now())
    )]
    Validity {
        /// The file.
        path: PathBuf,
        /// From when, in seconds of Unix time.
        not_before: i64,
        /// Until when, in seconds of Unix time.
        not_after: i64,
    },
}

/// TLS as it is made now.
#[derive(Debug)]
pub(super) struct Tls {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
    /// This node.
    pub(super) me: Certificate,
    pub(super) roles: RoleMap,
}

impl Tls {
    fn read(dir: &Path) -> Result<Self, TlsError> {
        let (cert_path, key_path, ca_path) = (dir.join(CERT_FILE), dir.join(KEY_FILE), dir.join(CA_FILE));
        let content = |path: &Path, why: String| TlsError::Content {
            path: path.to_owned(),
            why,
        };
        private(&key_path)?;
        let chain = certificates(&cert_path)?;
        let key = PrivateKeyDer::from_pem_slice(&file(&key_path)?)
            .map_err(|e| content(&key_path, format!("it holds no private key ({e})")))?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&ca_path)? {
            roots
                .add(certificate)
                .map_err(|e| content(&ca_path, e.to_string()))?;
        }
        let roots = Arc::new(roots);
        let roles = role_map(&dir.join(ROLES_FILE))?;
        let me = Certificate::read(&chain[0], &roles).map_err(|source| TlsError::Certificate {
            path: cert_path.clone(),
            source,
        })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let unusable = |e: rustls::Error| content(&cert_path, format!("{e}. Is key.pem this certificate's?"));

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unusable)?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![ALPN.to_vec()];

        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|e| content(&ca_path, e.to_string()))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(unusable)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            me,
            roles,
        })
    }

    /// Who holds a certificate that rustls has verified.
    pub(super) fn node(&self, der: &[u8]) -> Result<NodeIdentity, CertificateError> {
        Certificate::read(der, &self.roles).map(|certificate| certificate.node)
    }
}

/// A file as it was last seen: changed when any of it is.
type Stamp = Option<(u64, i64, i64, u64)>;

#[derive(Debug)]
struct Loaded {
    tls: Arc<Tls>,
    seen: [Stamp; 4],
    looked: Instant,
}

/// The folder of a node's certificate.
#[derive(Debug)]
pub(super) struct TlsFolder {
    pub(super) dir: PathBuf,
    // Read by every new connection, changed when the files were; held while they are read.
    loaded: Mutex<Loaded>,
}

impl TlsFolder {
    /// Reads it, and refuses a certificate that does not hold now.
    pub(super) fn open(dir: &Path) -> Result<Self, TlsError> {
        let seen = stamps(dir);
        let tls = Tls::read(dir)?;
        let (not_before, not_after) = (tls.me.not_before, tls.me.not_after);
        if !(not_before..=not_after).contains(&explain::now()) {
            return Err(TlsError::Validity {
                path: dir.join(CERT_FILE),
                not_before,
                not_after,
            });
        }
        Ok(Self {
            dir: dir.to_owned(),
            loaded: Mutex::new(Loaded {
                tls: Arc::new(tls),
                seen,
                looked: Instant::now(),
            }),
        })
    }

    /// TLS by the files as they are, looked at a second ago at most.
    pub(super) fn current(&self) -> Arc<Tls> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.looked.elapsed() >= LOOK_EVERY {
            self.look(&mut loaded);
        }
        loaded.tls.clone()
    }

    /// Looks at the files now.
    pub(super) fn reload(&self) {
        self.look(&mut self.loaded.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn look(&self, loaded: &mut Loaded) {
        loaded.looked = Instant::now();
        let seen = stamps(&self.dir);
        if seen == loaded.seen {
            return;
        }
        // Noted also when they cannot be used: said once, and tried again when they change (key and certificate are
        // not replaced at one instant).
        loaded.seen = seen;
        match Tls::read(&self.dir) {
            Ok(tls) if tls.me.node.name != loaded.tls.me.node.name => {
                let (was, is) = (&loaded.tls.me.node.name, &tls.me.node.name);
                tracing::error!(
                    was,
                    is,
                    "the new certificate is another node's: the old one is kept"
                );
            }
            Ok(tls) => {
                let until = explain::moment(tls.me.not_after);
                tracing::info!(dir = %self.dir.display(), until, "the certificate was read again");
                loaded.tls = Arc::new(tls);
            }
            Err(error) => {
                let error = super::in_full(&error);
                tracing::error!(
                    error,
                    "the changed certificate cannot be used: the old one is kept"
                );
            }
        }
    }
}

fn stamps(dir: &Path) -> [Stamp; 4] {
    [CERT_FILE, KEY_FILE, CA_FILE, ROLES_FILE].map(|name| {
        let of = fs::metadata(dir.join(name)).ok()?;
        Some((of.ino(), of.mtime(), of.mtime_nsec(), of.len()))
    })
}

fn file(path: &Path) -> Result<Vec<u8>, TlsError> {
    crate::regular::read(path, MAX_FILE_BYTES).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Refuses a key that anyone but its owner can read.
fn private(path: &Path) -> Result<(), TlsError> {
    let of = fs::metadata(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })?;
    match of.mode() & 0o777 {
        mode if mode & 0o077 == 0 => Ok(()),
        mode => Err(TlsError::Mode {
            path: path.to_owned(),
            mode,
        }),
    }
}

/// The certificates in a file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let content = |why: String| TlsError::Content {
        path: path.to_owned(),
        why,
    };
    let bytes = file(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|e| content(format!("it is not PEM ({e})")))?;
    match found.is_empty() {
        true => Err(content("it holds no certificate".into())),
        false => Ok(found),
    }
}

fn role_map(path: &Path) -> Result<RoleMap, TlsError> {
    let content = |why: String| TlsError::Content {
        path: path.to_owned(),
        why,
    };
    if !path.exists() {
        return Ok(RoleMap::new());
    }
    let text = String::from_utf8(file(path)?).map_err(|_| content("it is no text".into()))?;
    let map: RoleMap = toml::from_str(&text).map_err(|e| content(e.to_string()))?;
    match map.values().find(|e| !super::certificate::is_node_name(&e.node)) {
        Some(entry) => Err(content(format!("{:?} is no name for a node", entry.node))),
        None => Ok(map),
    }
}
