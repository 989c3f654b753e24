//! A restore point in a global store, as the command line names it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate::global::{Bucket, Found, GlobalAddr, GlobalArgs, Place, Remote};
use migrate::store::{Moment, MomentError};
use segment::{SegmentName, VmId};

use super::CliError;
use crate::session::{RestoreFrom, SessionError};

/// The global store that `from` is, when it is no folder of a store.
pub(super) fn place(from: Option<&Path>, args: &GlobalArgs) -> Result<Option<Place>, CliError> {
    let text = from
        .and_then(Path::to_str)
        .filter(|text| GlobalAddr::looks_like(text));
    match text {
        Some(text) => Ok(Some(Place {
            addr: text.parse().map_err(|e: migrate::global::AddrError| CliError::Said(e.to_string()))?,
            args: args.clone(),
        })),
        None if *args != GlobalArgs::default() => Err(CliError::Said(
            "--global-endpoint, --global-region and --global-credentials are about a global store: name it with --from \
             s3://BUCKET/PREFIX"
                .into(),
        )),
        None => Ok(None),
    }
}

/// What is meant by the arguments: the name the VM gets, and the restore point. `say` tells how old it is.
pub(super) fn wanted(
    place: Place,
    what: &[PathBuf],
    segment: Option<&SegmentName>,
    given: Option<VmId>,
    say: bool,
) -> Result<(VmId, RestoreFrom), CliError> {
    let (vm, found) = meant(what, segment, given.as_ref())?;
    let failed = |e| CliError::from(SessionError::Global(Box::new(e)));
    let remote = Bucket::open(&place).and_then(Remote::new).map_err(failed)?;
    let by_name = matches!(found, Found::Name(_));
    let chain = remote.find(&vm, found).map_err(failed)?;
    let tip = chain.tip();
    if say && !by_name {
        let age = Duration::from_secs(Moment::now().saturating_sub(tip.created_unix_ns) / 1_000_000_000);
        eprintln!(
            "{}, taken {} ago, of {}",
            tip.name,
            humantime::format_duration(age),
            place.addr
        );
    }
    let segment = tip.name.clone();
    Ok((given.unwrap_or(vm), RestoreFrom::Global { place, segment }))
}

fn meant(
    what: &[PathBuf],
    segment: Option<&SegmentName>,
    given: Option<&VmId>,
) -> Result<(VmId, Found), CliError> {
    let said = |text: &str| CliError::Said(text.to_owned());
    let one = match what {
        [] => None,
        [one] => Some(one.to_str().ok_or_else(|| said("what to restore is no text"))?),
        _ => {
            return Err(said(
                "--from names a global store: name one VM or restore point in it, and no files",
            ));
        }
    };
    match (segment, one, given) {
        (Some(name), None, _) => Ok((name.vm.clone(), Found::Name(name.clone()))),
        (Some(_), Some(_), _) => Err(said("--segment names the checkpoint: name no other beside it")),
        (None, Some(one), _) => match one.split_once('@') {
            Some((vm, moment)) => {
                let moment = moment
                    .parse()
                    .map_err(|e: MomentError| CliError::Said(e.to_string()))?;
                Ok((VmId::new(vm)?, Found::At(moment)))
            }
            None => match one.parse::<SegmentName>() {
                Ok(name) => Ok((name.vm.clone(), Found::Name(name))),
                Err(_) => Ok((VmId::new(one)?, Found::Newest)),
            },
        },
        (None, None, Some(vm)) => Ok((vm.clone(), Found::Newest)),
        (None, None, None) => Err(said(
            "nothing to restore is named: give a VM, or a restore point like web@-10m",
        )),
    }
}
