//! What goes wrong with a global store, in the words of who has to mend it.

use std::fmt;

use segment::{CheckpointId, SegmentName, VmId};

use crate::store::{ChainError, StoreError};

/// The most characters of what a server says that are passed on.
const MAX_SAID: usize = 300;

/// Why a global store was not used, or does not have what was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GlobalError {
    /// It cannot be set up so.
    #[error("the global store {place} cannot be used: {why}")]
    Setup {
        /// Where.
        place: String,
        /// Why.
        why: String,
    },
    /// It does not do what it is asked.
    #[error("cannot {doing} in the global store {place}: {trouble}")]
    Refused {
        /// What was to be done.
        doing: &'static str,
        /// Where.
        place: String,
        /// Why.
        trouble: Trouble,
    },
    /// Two states have one name.
    #[error(
        "{name} is in the global store {place} as checkpoint {held}, and here as {offered}: one of them is of another VM \
         that had this name. Nothing was replaced; use another prefix, or another name for the VM"
    )]
    DuplicateName {
        /// The name.
        name: SegmentName,
        /// Where.
        place: String,
        /// What is there.
        held: CheckpointId,
        /// What is here.
        offered: CheckpointId,
    },
    /// What is there is newer than anything that was ever committed.
    #[error(
        "{name} is in the global store {place}, and the registry has nothing newer than {committed} as committed: it is of \
         another VM that had this name, or the registry lost what it knew. Nothing is uploaded; use another prefix, or \
         another name for the VM"
    )]
    Ahead {
        /// What is there.
        name: SegmentName,
        /// Where.
        place: String,
        /// The newest that is committed.
        committed: SegmentName,
    },
    /// What is there is not what it should be.
    #[error("{object} in the global store {place} is damaged or was tampered with: {why}")]
    Damaged {
        /// Which.
        object: String,
        /// Where.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// It is not there.
    #[error("the global store {place} has no restore point {name}")]
    NoPoint {
        /// Which.
        name: SegmentName,
        /// Where.
        place: String,
    },
    /// Nothing is there.
    #[error("the global store {place} has no restore point of VM {vm}")]
    Nothing {
        /// The VM.
        vm: VmId,
        /// Where.
        place: String,
    },
    /// More than is looked at.
    #[error("there is more in the global store {place} than is looked at: {what}")]
    TooMany {
        /// Where.
        place: String,
        /// What.
        what: &'static str,
    },
    /// The chain that is to be uploaded changed.
    #[error("{name} changed while it was read: it is tried again later")]
    Changed {
        /// Which.
        name: SegmentName,
    },
    /// It took so long that what it builds on may be gone.
    #[error("uploading {name} took longer than half of --global-grace: it is tried again from the beginning")]
    TooSlow {
        /// Which.
        name: SegmentName,
    },
    /// The local chain.
    #[error("the chain of {name} is not whole here")]
    Chain {
        /// Which.
        name: SegmentName,
        /// What is missing.
        #[source]
        source: Box<ChainError>,
    },
    /// The local store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No restore point is meant.
    #[error(transparent)]
    Moment(crate::store::MomentError),
    /// The agent ends.
    #[error("the agent ends")]
    Stopped,
}

/// Why a global store does not do what it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// There is no such bucket or folder.
    Missing,
    /// The credentials are wrong, or over.
    Credentials(String),
    /// They are right, and not enough.
    Permission,
    /// It is not reached, or does not answer.
    Away(String),
    /// Something else.
    Other(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("it does not exist: make it, or correct --global"),
            Self::Credentials(why) => write!(
                f,
                "it does not accept the credentials ({why}): look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or at \
                 the file of --global-credentials"
            ),
            Self::Permission => f.write_str(
                "the credentials may not: allow them s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject and \
                 s3:DeleteObject on what is in it (of a folder: reading and writing it)",
            ),
            Self::Away(why) => write!(f, "it does not answer ({why}): look at --global-endpoint and the network"),
            Self::Other(why) => f.write_str(why),
        }
    }
}

impl Trouble {
    /// Of an error that the library reports.
    pub(super) fn of(error: &object_store::Error) -> Self {
        use object_store::Error;
        let said = said(error);
        let has = |word: &str| said.contains(word);
        // The library has no kinds for these: S3's own words, in what it passes on.
        for word in [
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "ExpiredToken",
            "InvalidToken",
            "RequestTimeTooSkewed",
            "InvalidClientTokenId",
        ] {
            if has(word) {
                return Self::Credentials(word.to_owned());
            }
        }
        if has("NoSuchBucket") {
            return Self::Missing;
        }
        match error {
            Error::Unauthenticated { .. } => Self::Credentials("it asks for others".to_owned()),
            Error::PermissionDenied { .. } => Self::Permission,
            // Of a list, and of a folder.
            _ if has("AccessDenied") || has("Permission denied") => Self::Permission,
            _ if has("credentials") || has("169.254.169.254") => {
                Self::Credentials("there are none, or they could not be had".to_owned())
            }
            _ if [
                "error sending request",
                "timed out",
                "operation timed out",
                "Connect",
                "503",
                "502",
                "504",
            ]
            .iter()
            .any(|word| has(word)) =>
            {
                Self::Away(cut(&said))
            }
            _ => Self::Other(cut(&said)),
        }
    }
}

/// An error and its causes, each once.
fn said(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(c) = cause {
        let more = c.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = c.source();
    }
    text
}

/// For a terminal and a log: what a server says is untrusted too.
fn cut(text: &str) -> String {
    let mut short: String = text.chars().take(MAX_SAID).collect();
    if short.len() < text.len() {
        short.push_str("..");
    }
    short.replace(char::is_control, " ")
}
