//! The objects: made once, read by range, listed, removed. Everything that goes to the store goes through here.

use std::fmt;
use std::ops::Range;
use std::path::Path as FsPath;
use std::sync::{Arc, Once};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    RetryConfig,
};
use segment::{Epoch, Generation, SegmentName, VmId};

use super::addr::endpoint;
use super::chain::MAX_RECORD_BYTES;
use super::{
    ChainRecord, GlobalAddr, GlobalArgs, GlobalError, LinkRecord, MAX_OBJECTS, MAX_POINTS, PART_BYTES,
    Trouble,
};
use crate::registry::random_id;

/// How long a connection may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one request may take: a part on a slow line.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// How often one request is tried again before that is a failure.
const RETRIES: usize = 3;
/// How long that may take in all.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest file of credentials.
const MAX_CREDENTIALS_BYTES: u64 = 64 << 10;
/// How many records are read at once.
const READ_AT_ONCE: usize = 8;

/// Where a global store is, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its address.
    pub addr: GlobalAddr,
    /// What is beside it.
    pub args: GlobalArgs,
}

/// A global store.
#[derive(Clone)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    place: String,
    /// The folder, when it is one.
    folder: Option<std::path::PathBuf>,
    #[cfg(test)]
    pub(super) faults: Arc<super::tests::Faults>,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bucket({})", self.place)
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)
    }
}

/// A number in a key: of one length, so that the order of the keys is theirs.
fn padded(number: u64) -> String {
    format!("{number:020}")
}

fn position_key(name: &SegmentName) -> String {
    format!("{}-{}", padded(name.generation.0), padded(name.epoch.0))
}

/// The position that a key begins with.
fn position(vm: &VmId, text: &str) -> Option<SegmentName> {
    let (generation, epoch) = text.split_once('-')?;
    let number = |text: &str| {
        let digits = text.len() == 20 && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse::<u64>().ok()).flatten()
    };
    let (generation, epoch) = (Generation(number(generation)?), Epoch(number(epoch)?));
    Some(SegmentName::new(vm.clone(), generation, epoch))
}

fn upload_key(name: &SegmentName, upload: [u8; 16]) -> String {
    format!("{}-{:032x}", position_key(name), u128::from_be_bytes(upload))
}

/// How many parts a file of `bytes` bytes has.
pub(super) fn parts(bytes: u64) -> u64 {
    bytes.div_ceil(PART_BYTES).max(1)
}

/// The length of part `part` of a file of `bytes` bytes.
pub(super) fn part_bytes(bytes: u64, part: u64) -> u64 {
    bytes
        .saturating_sub(part.saturating_mul(PART_BYTES))
        .min(PART_BYTES)
}

/// One upload's parts of one link, as they are listed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Stored {
    /// The link's name.
    pub(super) name: SegmentName,
    /// Which upload.
    pub(super) upload: [u8; 16],
}

impl Bucket {
    /// Opens a global store; nothing is asked of it yet.
    ///
    /// # Errors
    /// [`GlobalError::Setup`].
    pub fn open(place: &Place) -> Result<Self, GlobalError> {
        let shown = place.addr.to_string();
        let setup = |why: String| GlobalError::Setup {
            place: shown.clone(),
            why,
        };
        let (store, prefix): (Arc<dyn ObjectStore>, _) = match &place.addr {
            GlobalAddr::Folder(path) => {
                // Not made when it is not there: a share that is not mounted would be a folder of this host.
                let store = LocalFileSystem::new_with_prefix(path)
                    .map_err(|_| setup("there is no such folder: is the share mounted?".into()))?;
                (Arc::new(store.with_fsync(true)), Path::default())
            }
            GlobalAddr::S3 { bucket, prefix } => {
                let store = s3(bucket, &place.args).map_err(setup)?;
                (Arc::new(store), Path::from(prefix.as_str()))
            }
        };
        Ok(Self::of(
            store,
            prefix,
            shown,
            match &place.addr {
                GlobalAddr::Folder(path) => Some(path.clone()),
                GlobalAddr::S3 { .. } => None,
            },
        ))
    }

    pub(super) fn of(
        store: Arc<dyn ObjectStore>,
        prefix: Path,
        place: String,
        folder: Option<std::path::PathBuf>,
    ) -> Self {
        Self {
            store,
            prefix,
            place,
            folder,
            #[cfg(test)]
            faults: Arc::default(),
        }
    }

    /// What an error of the library means.
    fn refused(&self, doing: &'static str, error: &object_store::Error) -> GlobalError {
        let mut trouble = Trouble::of(error);
        let gone = self.folder.as_ref().is_some_and(|folder| !folder.is_dir());
        if gone {
            trouble = Trouble::Missing;
        }
        GlobalError::Refused {
            doing,
            place: self.place.clone(),
            trouble,
        }
    }

    /// Before every request.
    #[cfg_attr(
        not(test),
        expect(clippy::unused_self, reason = "the tests inject faults here")
    )]
    fn step(&self, doing: &'static str) -> Result<(), GlobalError> {
        #[cfg(test)]
        self.faults.step(doing)?;
        let _ = doing;
        Ok(())
    }

    fn of_vm(&self, vm: &VmId, kind: &str) -> Path {
        self.prefix.clone().join(vm.as_str()).join(kind)
    }

    fn point_path(&self, name: &SegmentName) -> Path {
        self.of_vm(&name.vm, "points").join(position_key(name))
    }

    fn data_path(&self, name: &SegmentName, upload: [u8; 16]) -> Path {
        self.of_vm(&name.vm, "data").join(upload_key(name, upload))
    }

    fn part_path(&self, name: &SegmentName, upload: [u8; 16], part: u64) -> Path {
        self.data_path(name, upload).join(format!("{part:08}"))
    }

    /// Makes an object; false when there is one of that name.
    async fn put_new(&self, doing: &'static str, path: &Path, bytes: Vec<u8>) -> Result<bool, GlobalError> {
        self.step(doing)?;
        if let Some(folder) = &self.folder
            && !tokio::fs::metadata(folder)
                .await
                .is_ok_and(|found| found.is_dir())
        {
            // The library would make it.
            return Err(GlobalError::Refused {
                doing,
                place: self.place.clone(),
                trouble: Trouble::Missing,
            });
        }
        let options = PutOptions::from(PutMode::Create);
        match self.store.put_opts(path, bytes.into(), options).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(self.refused(doing, &error)),
        }
    }

    /// An object of at most `max` bytes; none when there is none.
    async fn get(&self, path: &Path, max: u64) -> Result<Option<Vec<u8>>, GlobalError> {
        const DOING: &str = "read a restore point";
        self.step(DOING)?;
        let found = match self.store.get(path).await {
            Ok(found) => found,
            // Not so when the bucket is not there.
            Err(error @ object_store::Error::NotFound { .. })
                if !matches!(Trouble::of(&error), Trouble::Missing) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(self.refused(DOING, &error)),
        };
        let mut bytes = Vec::new();
        let mut stream = found.into_stream();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|e| self.refused(DOING, &e))?;
            if bytes.len() as u64 + piece.len() as u64 > max {
                return Err(self.damaged(path, format!("it is longer than {max} bytes")));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(Some(bytes))
    }

    fn damaged(&self, path: &Path, why: String) -> GlobalError {
        GlobalError::Damaged {
            object: path.to_string(),
            place: self.place.clone(),
            why,
        }
    }

    /// Stores one part of a link's file.
    pub(super) async fn put_part(
        &self,
        link: &LinkRecord,
        part: u64,
        bytes: Vec<u8>,
    ) -> Result<(), GlobalError> {
        let path = self.part_path(&link.name, link.upload, part);
        // There already: this very upload made it, and did not hear of it. Nobody else has its id.
        self.put_new("store a segment", &path, bytes).await.map(drop)
    }

    /// Bytes of a link's file, `range` within one part.
    pub(super) async fn read_part(
        &self,
        link: &LinkRecord,
        part: u64,
        range: Range<u64>,
    ) -> Result<Vec<u8>, GlobalError> {
        const DOING: &str = "read a segment";
        self.step(DOING)?;
        let path = self.part_path(&link.name, link.upload, part);
        let (end, length) = (range.end, range.end.saturating_sub(range.start));
        let options = GetOptions::new().with_range(Some(GetRange::Bounded(range)));
        let found = match self.store.get_opts(&path, options).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => {
                return Err(self.damaged(&path, "it is missing".into()));
            }
            // A range beyond its end is refused in as many words as there are servers.
            Err(error) => match self.store.head(&path).await {
                Ok(object) if object.size < end => {
                    return Err(self.damaged(&path, format!("it ends after {} bytes", object.size)));
                }
                Ok(_) | Err(_) => return Err(self.refused(DOING, &error)),
            },
        };
        // Bounded by what was asked for, whatever is sent.
        let mut bytes = Vec::with_capacity(usize::try_from(length.min(PART_BYTES)).unwrap_or(0));
        let mut stream = found.into_stream();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|e| self.refused(DOING, &e))?;
            if bytes.len() as u64 + piece.len() as u64 > length {
                return Err(self.damaged(&path, "more came than was asked for".into()));
            }
            bytes.extend_from_slice(&piece);
        }
        match bytes.len() as u64 == length {
            true => Ok(bytes),
            false => Err(self.damaged(&path, format!("{} of {length} bytes came", bytes.len()))),
        }
    }

    /// Makes a restore point; that which is there then, and whether it was made by this. One of the very same checkpoint that is
    /// there already is as good, and has parts of its own.
    ///
    /// # Errors
    /// [`GlobalError::DuplicateName`] when that name is another checkpoint's.
    pub(super) async fn put_point(&self, chain: ChainRecord) -> Result<(ChainRecord, bool), GlobalError> {
        let tip = chain.tip();
        let path = self.point_path(&tip.name);
        if self
            .put_new("store a restore point", &path, chain.encode())
            .await?
        {
            return Ok((chain, true));
        }
        let there = self.point(&tip.name).await?;
        match there.tip().checkpoint == tip.checkpoint {
            true => Ok((there, false)),
            false => Err(GlobalError::DuplicateName {
                name: tip.name.clone(),
                place: self.place.clone(),
                held: there.tip().checkpoint,
                offered: tip.checkpoint,
            }),
        }
    }

    /// One restore point.
    ///
    /// # Errors
    /// [`GlobalError::NoPoint`], [`GlobalError::Damaged`], and what the store says.
    pub async fn point(&self, name: &SegmentName) -> Result<ChainRecord, GlobalError> {
        let path = self.point_path(name);
        let Some(bytes) = self.get(&path, MAX_RECORD_BYTES).await? else {
            return Err(GlobalError::NoPoint {
                name: name.clone(),
                place: self.place.clone(),
            });
        };
        ChainRecord::decode(&bytes, name).map_err(|why| self.damaged(&path, why))
    }

    /// The names of a VM's restore points, oldest first. What is not called like one is passed over.
    ///
    /// # Errors
    /// What the store says; [`GlobalError::TooMany`].
    pub async fn points(&self, vm: &VmId) -> Result<Vec<SegmentName>, GlobalError> {
        const DOING: &str = "list the restore points";
        let mut names = Vec::new();
        let mut listed = self.list(DOING, &self.of_vm(vm, "points"))?;
        while let Some(rest) = listed.next(self, DOING).await? {
            let [key] = rest.as_slice() else { continue };
            if let Some(name) = position(vm, key) {
                names.push(name);
            }
            if names.len() > MAX_POINTS {
                return Err(GlobalError::TooMany {
                    place: self.place.clone(),
                    what: "restore points of one VM",
                });
            }
        }
        names.sort_by_key(SegmentName::position);
        Ok(names)
    }

    /// The VMs that have something there.
    ///
    /// # Errors
    /// What the store says.
    pub async fn vms(&self) -> Result<Vec<VmId>, GlobalError> {
        const DOING: &str = "list the VMs";
        self.step(DOING)?;
        let prefix = (!self.prefix.as_ref().is_empty()).then_some(&self.prefix);
        let listed = self.store.list_with_delimiter(prefix).await;
        let listed = listed.map_err(|e| self.refused(DOING, &e))?;
        let names = listed
            .common_prefixes
            .iter()
            .filter_map(|path| path.parts().next_back());
        Ok(names.filter_map(|part| VmId::new(part.as_ref()).ok()).collect())
    }

    /// The records of several points, in their order.
    ///
    /// # Errors
    /// As [`Self::point`]; one that went away meanwhile is left out.
    pub async fn records(&self, names: &[SegmentName]) -> Result<Vec<ChainRecord>, GlobalError> {
        let read = futures_util::stream::iter(names.iter().cloned()).map(|name| async move {
            match self.point(&name).await {
                Ok(record) => Ok(Some(record)),
                Err(GlobalError::NoPoint { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        });
        let records: Vec<Option<ChainRecord>> = read.buffered(READ_AT_ONCE).try_collect().await?;
        Ok(records.into_iter().flatten().collect())
    }

    /// Every upload of a VM's links, whether a point names it or not, and the parts of each.
    pub(super) async fn stored(
        &self,
        vm: &VmId,
    ) -> Result<std::collections::BTreeMap<Stored, Vec<String>>, GlobalError> {
        const DOING: &str = "list the stored segments";
        let mut found: std::collections::BTreeMap<Stored, Vec<String>> = std::collections::BTreeMap::new();
        let mut listed = self.list(DOING, &self.of_vm(vm, "data"))?;
        let mut objects = 0;
        while let Some(rest) = listed.next(self, DOING).await? {
            objects += 1;
            if objects > MAX_OBJECTS {
                return Err(GlobalError::TooMany {
                    place: self.place.clone(),
                    what: "objects of one VM",
                });
            }
            let [key, part] = rest.as_slice() else { continue };
            let stored = key.rsplit_once('-').and_then(|(at, upload)| {
                let upload = (upload.len() == 32)
                    .then(|| u128::from_str_radix(upload, 16).ok())
                    .flatten()?;
                Some(Stored {
                    name: position(vm, at)?,
                    upload: upload.to_be_bytes(),
                })
            });
            if let Some(stored) = stored {
                found.entry(stored).or_default().push(part.clone());
            }
        }
        Ok(found)
    }

    pub(super) async fn remove_point(&self, name: &SegmentName) -> Result<(), GlobalError> {
        self.remove("remove a restore point", &self.point_path(name))
            .await
    }

    pub(super) async fn remove_parts(&self, stored: &Stored, parts: &[String]) -> Result<(), GlobalError> {
        let folder = self.data_path(&stored.name, stored.upload);
        for part in parts {
            self.remove("remove a segment", &folder.clone().join(part.as_str()))
                .await?;
        }
        Ok(())
    }

    async fn remove(&self, doing: &'static str, path: &Path) -> Result<(), GlobalError> {
        self.step(doing)?;
        match self.store.delete(path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.refused(doing, &error)),
        }
    }

    fn list(&self, doing: &'static str, below: &Path) -> Result<Listed, GlobalError> {
        self.step(doing)?;
        Ok(Listed {
            stream: self.store.list(Some(below)),
            below: below.clone(),
        })
    }
}

/// Objects below a path, one by one.
struct Listed {
    stream: futures_util::stream::BoxStream<'static, object_store::Result<object_store::ObjectMeta>>,
    below: Path,
}

impl Listed {
    /// What the next one is called below the path.
    async fn next(
        &mut self,
        bucket: &Bucket,
        doing: &'static str,
    ) -> Result<Option<Vec<String>>, GlobalError> {
        match self.stream.next().await {
            None => Ok(None),
            Some(Err(error)) => Err(bucket.refused(doing, &error)),
            Some(Ok(object)) => Ok(Some(
                object
                    .location
                    .prefix_match(&self.below)
                    .map(|parts| parts.map(|part| part.as_ref().to_owned()).collect())
                    .unwrap_or_default(),
            )),
        }
    }
}

/// A new upload.
pub(super) fn new_upload() -> [u8; 16] {
    random_id()
}

/// The library and the HTTP client it uses take TLS from whoever is installed.
fn install_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Someone else's is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

fn s3(bucket: &str, args: &GlobalArgs) -> Result<object_store::aws::AmazonS3, String> {
    install_provider();
    let mut builder = from_env(args.global_credentials.is_none()).with_bucket_name(bucket);
    if let Some(file) = &args.global_credentials {
        let (key, secret, token) = credentials(file)?;
        builder = builder.with_access_key_id(key).with_secret_access_key(secret);
        if let Some(token) = token {
            builder = builder.with_token(token);
        }
    }
    if let Some(region) = &args.global_region {
        builder = builder.with_region(region);
    } else if builder.get_config_value(&AmazonS3ConfigKey::Region).is_none() {
        builder = builder.with_region("us-east-1");
    }
    // The one for S3 alone goes before the other, and before what is set here unless it is set itself.
    let from_env = builder
        .get_config_value(&AmazonS3ConfigKey::S3Endpoint)
        .or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint));
    let mut options = ClientOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_timeout(REQUEST_TIMEOUT);
    if let Some(url) = args.global_endpoint.clone().or(from_env) {
        let url = endpoint(&url).map_err(|e| e.to_string())?;
        options = options.with_allow_http(url.starts_with("http://"));
        builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, url);
    }
    builder
        .with_client_options(options)
        .with_retry(RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: RETRIES,
            retry_timeout: RETRY_TIMEOUT,
        })
        .build()
        .map_err(|e| e.to_string())
}

/// What the environment says; of who asks only when `who`: a session's token belongs to its own keys alone.
fn from_env(who: bool) -> AmazonS3Builder {
    use AmazonS3ConfigKey::{AccessKeyId, SecretAccessKey, Token};
    if who {
        return AmazonS3Builder::from_env();
    }
    let settings = std::env::vars().filter(|(name, _)| name.starts_with("AWS_"));
    settings.fold(AmazonS3Builder::new(), |builder, (name, value)| {
        match name.to_ascii_lowercase().parse() {
            Ok(AccessKeyId | SecretAccessKey | Token) | Err(_) => builder,
            Ok(key) => builder.with_config(key, value),
        }
    })
}

type Keys = (String, String, Option<String>);

/// The keys in a file as the AWS tools write it: the section `default`, or what stands before any.
fn credentials(path: &FsPath) -> Result<Keys, String> {
    let shown = path.display();
    let text = crate::regular::read_text(path, MAX_CREDENTIALS_BYTES)
        .map_err(|e| format!("the credentials in {shown} cannot be read: {e}"))?;
    let (mut key, mut secret, mut token, mut applies) = (None, None, None, true);
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            applies = section.trim_end_matches(']').trim() == "default";
            continue;
        }
        let Some((name, value)) = line
            .split_once('=')
            .filter(|_| applies && !line.starts_with(['#', ';']))
        else {
            continue;
        };
        let value = Some(value.trim().to_owned());
        match name.trim() {
            "aws_access_key_id" => key = value,
            "aws_secret_access_key" => secret = value,
            "aws_session_token" => token = value,
            _ => {}
        }
    }
    match (key, secret) {
        (Some(key), Some(secret)) => Ok((key, secret, token)),
        _ => Err(format!(
            "{shown} has no aws_access_key_id and aws_secret_access_key in its section [default]"
        )),
    }
}
