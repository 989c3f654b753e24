//! Where a registry is.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The most members of an etcd cluster, or agents, that are named.
pub const MAX_ENDPOINTS: usize = 16;
/// Under which every key stands in etcd, unless another is named.
const PREFIX: &str = "understudy";

/// Where a registry is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RegistryAddr {
    /// In this agent's own data directory.
    Embedded,
    /// At agents that answer for it, HOST:PORT, separated by commas: each is asked when the one before is away.
    Agent(String),
    /// In etcd.
    Etcd(EtcdAddr),
}

/// An etcd cluster: `etcd://HOST:PORT[,HOST:PORT..][/PREFIX]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EtcdAddr {
    /// Its members, HOST:PORT.
    pub endpoints: Vec<String>,
    /// Under which our keys stand, so that several clusters may share one etcd.
    pub prefix: String,
}

/// How an etcd is reached that does not let everyone in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EtcdAccess {
    /// The certificates that its servers' are signed by (PEM). With it TLS is spoken.
    pub ca: Option<PathBuf>,
    /// Our certificate, with its chain (PEM).
    pub cert: Option<PathBuf>,
    /// The key of our certificate (PEM).
    pub key: Option<PathBuf>,
    /// The user.
    pub user: Option<String>,
    /// The file that has the user's password, in its first line.
    pub password_file: Option<PathBuf>,
}

impl fmt::Display for RegistryAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded"),
            Self::Agent(address) => f.write_str(address),
            Self::Etcd(etcd) => etcd.fmt(f),
        }
    }
}

impl fmt::Display for EtcdAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd://{}", self.endpoints.join(","))?;
        match self.prefix.as_str() {
            PREFIX => Ok(()),
            other => write!(f, "/{other}"),
        }
    }
}

fn endpoints(list: &str) -> Option<Vec<String>> {
    let each = |s: &str| match s.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok() => {
            Some(s.to_owned())
        }
        _ => None,
    };
    let all: Vec<String> = list.split(',').map(each).collect::<Option<_>>()?;
    (all.len() <= MAX_ENDPOINTS).then_some(all)
}

impl FromStr for RegistryAddr {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        if s == "embedded" {
            return Ok(Self::Embedded);
        }
        if let Some(rest) = s.strip_prefix("etcd://") {
            let (list, prefix) = rest.split_once('/').unwrap_or((rest, PREFIX));
            let prefix = if prefix.is_empty() { PREFIX } else { prefix };
            let named = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
            if let Some(endpoints) = endpoints(list)
                && prefix.bytes().all(named)
            {
                let prefix = prefix.to_owned();
                return Ok(Self::Etcd(EtcdAddr { endpoints, prefix }));
            }
            return Err(format!(
                "{s:?} is no etcd: use etcd://HOST:PORT,HOST:PORT,HOST:PORT (at most {MAX_ENDPOINTS}), with /PREFIX \
                 after it when several clusters share it"
            ));
        }
        match endpoints(s) {
            Some(_) => Ok(Self::Agent(s.to_owned())),
            None => Err(format!(
                "{s:?} is no registry: use `embedded`, etcd://HOST:PORT,.., or HOST:PORT of an agent that answers for \
                 it"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in [
            "embedded",
            "10.0.0.1:7400",
            "a:1,b:2",
            "etcd://a:2379,b:2379,c:2379",
            "etcd://a:2379/lab",
        ] {
            let read: RegistryAddr = text.parse().unwrap();
            assert_eq!(read.to_string(), text);
        }
        for bad in [
            "",
            "a",
            "a:b",
            "etcd://",
            "etcd://a",
            "etcd://a:1/x/y",
            "a:1,,b:2",
            "http://a:1",
        ] {
            assert!(bad.parse::<RegistryAddr>().is_err(), "{bad}");
        }
    }
}
