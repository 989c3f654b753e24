//! What a failed handshake means, in words: what, why, and what to do.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

/// A moment as people write it, in UTC.
pub(super) fn moment(unix_seconds: i64) -> String {
    match jiff::Timestamp::from_second(unix_seconds) {
        Ok(at) => at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
        Err(_) => format!("{unix_seconds} s"),
    }
}

/// Now, in seconds of Unix time.
pub(super) fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

const CLOCKS: &str = "or set the clock that is wrong (one that is hours off is a common cause)";

/// Why a handshake with `peer` failed; none when it is not TLS that failed.
pub(super) fn handshake(error: &io::Error, peer: &str) -> Option<String> {
    let tls = error.get_ref()?.downcast_ref::<Error>()?;
    Some(match tls {
        Error::InvalidCertificate(why) => certificate(why, peer),
        Error::NoCertificatesPresented => {
            format!("{peer} shows no certificate: give it one by `standby ca issue`, and its folder by --tls")
        }
        Error::AlertReceived(alert) => refused(*alert, peer),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            format!(
                "{peer} does not speak TLS: is it run with --insecure-plaintext, or is it another program?"
            )
        }
        Error::PeerIncompatible(why) => format!("{peer} speaks another TLS than 1.3 ({why:?}): update it"),
        other => format!("TLS with {peer}: {other}"),
    })
}

/// Why this node does not believe the peer's certificate.
fn certificate(why: &CertificateError, peer: &str) -> String {
    let here = moment(now());
    match why {
        CertificateError::Expired => format!(
            "the certificate of {peer} has expired (the clock here says {here}): issue it a new one with `standby ca \
             issue`, {CLOCKS}"
        ),
        CertificateError::ExpiredContext { not_after, .. } => {
            let until = i64::try_from(not_after.as_secs()).unwrap_or(i64::MAX);
            format!(
                "the certificate of {peer} expired at {} (the clock here says {here}): issue it a new one with `standby \
                 ca issue`, {CLOCKS}",
                moment(until)
            )
        }
        CertificateError::NotValidYet => {
            format!("the certificate of {peer} is not valid yet (the clock here says {here}): wait, {CLOCKS}")
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            let from = i64::try_from(not_before.as_secs()).unwrap_or(i64::MAX);
            format!(
                "the certificate of {peer} is valid from {} only (the clock here says {here}): wait, {CLOCKS}",
                moment(from)
            )
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => format!(
            "the certificate of {peer} is not from this cluster's authority: it belongs to another cluster, or one of \
             the two has an old ca.pem. Issue it with the authority whose ca.pem this node has"
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => format!(
            "the certificate of {peer} is not for that address: another node answers there, or the address is missing \
             in it. Issue it again with `standby ca issue NODE --address {}`",
            super::host_of(peer)
        ),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => format!(
            "the certificate of {peer} is not for this use: an operator's certificate, say, cannot run an agent. Issue \
             one with the role execute or store"
        ),
        CertificateError::Revoked => format!("the certificate of {peer} was revoked"),
        other => format!("the certificate of {peer} is not accepted: {other:?}"),
    }
}

/// Why the peer does not believe this node's certificate.
fn refused(alert: AlertDescription, peer: &str) -> String {
    let here = moment(now());
    match alert {
        AlertDescription::CertificateExpired => format!(
            "{peer} refuses this node's certificate as expired or not valid yet (the clock here says {here}): issue a \
             new one with `standby ca issue`, {CLOCKS}"
        ),
        AlertDescription::UnknownCA | AlertDescription::DecryptError => format!(
            "{peer} refuses this node's certificate as not from its cluster's authority: they belong to different \
             clusters, or one of the two has an old ca.pem"
        ),
        AlertDescription::CertificateRequired => {
            format!("{peer} asks for a certificate: name its folder with --tls")
        }
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied => {
            format!("{peer} refuses this node's certificate ({alert:?}): its log says why")
        }
        AlertDescription::NoApplicationProtocol => {
            format!("{peer} speaks TLS, and another protocol inside it: is the address an agent's?")
        }
        other => format!("{peer} ended the TLS handshake ({other:?}): its log says why"),
    }
}
