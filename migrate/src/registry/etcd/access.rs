//! Who we are for an etcd: certificates, and a user with a password.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring, version::TLS13};

use crate::registry::addr::EtcdAccess;

/// The most bytes of a password.
const MAX_PASSWORD_BYTES: usize = 4096;

/// Why it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// A file of certificates or a key.
    #[error("read {what} for etcd from {}: {why}", path.display())]
    Pem {
        /// What it should have.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The password's file.
    #[error("read the password for etcd from {}", path.display())]
    Password {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What belongs together and was not given together.
    #[error("{0}")]
    Incomplete(&'static str),
    /// The certificates cannot be used.
    #[error("use the certificates for etcd")]
    Tls(#[source] tokio_rustls::rustls::Error),
}

/// What [`EtcdAccess`] names, read.
#[derive(Clone, Default)]
pub(super) struct Access {
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) login: Option<(String, String)>,
}

impl Access {
    pub(super) fn read(given: &EtcdAccess) -> Result<Self, AccessError> {
        let EtcdAccess {
            ca,
            cert,
            key,
            user,
            password_file,
        } = given;
        let login = match (user, password_file) {
            (Some(user), Some(path)) => Some((user.clone(), password(path)?)),
            (None, None) => None,
            _ => {
                return Err(AccessError::Incomplete(
                    "a user of etcd needs a password: give --etcd-user and --etcd-password-file together",
                ));
            }
        };
        let Some(ca) = ca else {
            if cert.is_some() || key.is_some() {
                return Err(AccessError::Incomplete(
                    "a certificate for etcd is of use with TLS only: give the servers' authority with --etcd-ca too",
                ));
            }
            return Ok(Self { tls: None, login });
        };
        let mut roots = RootCertStore::empty();
        for authority in certificates("the authority's certificate", ca)? {
            roots.add(authority).map_err(AccessError::Tls)?;
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(AccessError::Tls)?
            .with_root_certificates(roots);
        let config = match (cert, key) {
            (None, None) => config.with_no_client_auth(),
            (Some(cert), Some(key)) => {
                let chain = certificates("our certificate", cert)?;
                let key = PrivateKeyDer::from_pem_file(key).map_err(|e| AccessError::Pem {
                    what: "our key",
                    path: key.clone(),
                    why: e.to_string(),
                })?;
                config
                    .with_client_auth_cert(chain, key)
                    .map_err(AccessError::Tls)?
            }
            _ => {
                return Err(AccessError::Incomplete(
                    "a certificate needs its key: give --etcd-cert and --etcd-key together",
                ));
            }
        };
        let tls = Some(Arc::new(config));
        Ok(Self { tls, login })
    }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, AccessError> {
    let failed = |why: String| AccessError::Pem {
        what,
        path: path.to_owned(),
        why,
    };
    let all = CertificateDer::pem_file_iter(path).map_err(|e| failed(e.to_string()))?;
    let all: Vec<_> = all.collect::<Result<_, _>>().map_err(|e| failed(e.to_string()))?;
    if all.is_empty() {
        return Err(failed("there is none in it".into()));
    }
    Ok(all)
}

fn password(path: &Path) -> Result<String, AccessError> {
    let failed = |source| AccessError::Password {
        path: path.to_owned(),
        source,
    };
    let text = fs::read_to_string(path).map_err(failed)?;
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() || line.len() > MAX_PASSWORD_BYTES {
        let why = format!("its first line should be the password, of 1 to {MAX_PASSWORD_BYTES} bytes");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, why)));
    }
    Ok(line.to_owned())
}
