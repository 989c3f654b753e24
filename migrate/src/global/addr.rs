//! Where a global store is, and how it is reached.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

/// The longest address, in bytes.
const MAX_BYTES: usize = 1024;

/// A bucket or a shared folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GlobalAddr {
    /// `s3://BUCKET/PREFIX`.
    S3 {
        /// The bucket.
        bucket: String,
        /// What its keys begin with; may be empty.
        prefix: String,
    },
    /// `file:///PATH`: a folder that every node sees.
    Folder(PathBuf),
}

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddrError {
    /// It is of no known form.
    #[error("{0:?} is no global store: write s3://BUCKET/PREFIX, or file:///FOLDER with the whole path")]
    Form(String),
    /// The bucket or the prefix is none.
    #[error(
        "{text:?} is no global store: {why}. A bucket is 3 to 63 of a-z, 0-9, '.' and '-'; a prefix is names of letters, \
         digits, '.', '_' and '-' with a slash between them"
    )]
    Name {
        /// As it was given.
        text: String,
        /// What is wrong.
        why: &'static str,
    },
    /// What is stored is guest memory.
    #[error(
        "{0:?} would carry guest memory and signed requests without TLS: use an https:// endpoint (plain http is for \
         loopback only)"
    )]
    Plain(String),
    /// The endpoint is no URL.
    #[error("{0:?} is no endpoint: write it like https://s3.example.com or http://127.0.0.1:9000")]
    Endpoint(String),
}

impl GlobalAddr {
    /// Whether a text is meant to be one: for where a folder of another kind may stand too.
    #[must_use]
    pub fn looks_like(text: &str) -> bool {
        text.starts_with("s3:") || text.starts_with("file:")
    }
}

impl FromStr for GlobalAddr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let short = || text.chars().take(80).collect::<String>();
        let form = || AddrError::Form(short());
        if text.len() > MAX_BYTES {
            return Err(form());
        }
        if let Some(path) = text.strip_prefix("file://") {
            let path = Path::new(path);
            return match path.is_absolute() {
                true => Ok(Self::Folder(path.to_owned())),
                false => Err(form()),
            };
        }
        let rest = text.strip_prefix("s3://").ok_or_else(form)?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let name = |why| AddrError::Name { text: short(), why };
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
        if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(fits) {
            return Err(name("that is no bucket"));
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        let part = |part: &str| {
            let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
            !part.is_empty() && part != "." && part != ".." && part.bytes().all(fits)
        };
        if !prefix.is_empty() && !prefix.split('/').all(part) {
            return Err(name("that is no prefix"));
        }
        Ok(Self::S3 {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
        })
    }
}

impl fmt::Display for GlobalAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            Self::Folder(path) => write!(f, "file://{}", path.display()),
        }
    }
}

/// How a global store is reached: what is beside its address. Nothing secret is on a command line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct GlobalArgs {
    /// The server of the global store, like https://s3.example.com [default: AWS_ENDPOINT_URL, or Amazon's].
    #[arg(long, value_name = "URL", value_parser = endpoint)]
    pub global_endpoint: Option<String>,
    /// Its region [default: AWS_REGION, or us-east-1].
    #[arg(long, value_name = "NAME")]
    pub global_region: Option<String>,
    /// A file with aws_access_key_id and aws_secret_access_key, in the form of ~/.aws/credentials [default: the
    /// environment's AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what the cloud gives its machines].
    #[arg(long, value_name = "FILE")]
    pub global_credentials: Option<PathBuf>,
}

/// A URL that guest memory may go to.
pub(super) fn endpoint(text: &str) -> Result<String, AddrError> {
    let none = || AddrError::Endpoint(text.chars().take(80).collect());
    let (scheme, rest) = text.split_once("://").ok_or_else(none)?;
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    // A name and password in it would be a secret on a command line.
    if authority.is_empty() || authority.contains('@') || text.len() > MAX_BYTES {
        return Err(none());
    }
    match scheme {
        "https" => Ok(text.to_owned()),
        "http" if is_loopback(authority) => Ok(text.to_owned()),
        "http" => Err(AddrError::Plain(text.to_owned())),
        _ => Err(none()),
    }
}

fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(six) => six.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    // Not `localhost`: what a name means is not ours to say.
    host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_bucket_or_a_whole_path() {
        let shown = |text: &str| text.parse::<GlobalAddr>().map(|addr| addr.to_string());
        for (text, is) in [
            ("s3://pool", "s3://pool"),
            ("s3://pool/", "s3://pool"),
            ("s3://pool/a/b_1/", "s3://pool/a/b_1"),
            ("file:///srv/pool", "file:///srv/pool"),
        ] {
            assert_eq!(shown(text).as_deref(), Ok(is));
        }
        for text in [
            "",
            "pool",
            "/srv/pool",
            "file://srv",
            "file:/srv",
            "s3:pool",
            "s3://",
            "s3://ab",
            "s3://Pool",
            "s3://po ol",
            "s3://pool//a",
            "s3://pool/../a",
            "s3://pool/a b",
            "gs://pool",
        ] {
            assert!(shown(text).is_err(), "{text}");
        }
    }

    #[test]
    fn without_tls_only_loopback_is_spoken_to() {
        for good in [
            "https://s3.example.com",
            "http://127.0.0.1:9000",
            "http://[::1]:9000/x",
        ] {
            assert_eq!(endpoint(good).as_deref(), Ok(good));
        }
        for bad in [
            "http://10.0.0.1:9000",
            "http://localhost:9000",
            "http://127.0.0.1.example.com",
        ] {
            assert_eq!(endpoint(bad), Err(AddrError::Plain(bad.into())));
        }
        for none in [
            "s3.example.com",
            "ftp://x",
            "https://",
            "https://user:secret@host",
        ] {
            assert!(matches!(endpoint(none), Err(AddrError::Endpoint(_))), "{none}");
        }
    }
}
