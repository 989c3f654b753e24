//! How a takeover ends badly, in the words of who asked for it.

use std::fmt;

use segment::{Generation, SegmentName, VmId};

use crate::registry::RegistryError;

/// How it ended badly. In every case nothing was started by this plan, unless it says so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromoteError {
    /// The record could not be read.
    #[error("cannot promote VM {vm}: {source}. Nothing was changed")]
    Read {
        /// The VM.
        vm: VmId,
        /// Why. (Told in the text: it has to cross the wire whole.)
        source: RegistryError,
    },
    /// The compare-and-swap was lost, or not answered.
    #[error("cannot promote VM {vm}: {source}. Nothing was started; promoting again is safe")]
    Raise {
        /// The VM.
        vm: VmId,
        /// Why.
        source: RegistryError,
    },
    /// The owner is another than the one that was judged to be lost.
    #[error(
        "VM {vm} is not taken over: the owner of generation {judged} was lost, and by now {owner} has generation {current}. \
         Nothing was changed"
    )]
    NotJudged {
        /// The VM.
        vm: VmId,
        /// Whose owner was judged.
        judged: Generation,
        /// What the registry names.
        current: Generation,
        /// Who has that.
        owner: String,
    },
    /// Another candidate is ahead.
    #[error(
        "VM {vm} is being taken over by someone else: {holder} has promised generation {current}, this promote had \
         {generation}. Nothing was started here; see `standby status` for who owns it"
    )]
    Overtaken {
        /// The VM.
        vm: VmId,
        /// Who said so.
        holder: String,
        /// The generation of this plan.
        generation: Generation,
        /// What is promised.
        current: Generation,
    },
    /// Not enough holders.
    #[error(
        "cannot promote VM {vm}: {sealed} of its {holders} holders answer and {needed} are needed, so a \
         committed checkpoint could be missed. {state}. Not reached: {failures}. Start those agents, then promote again; when they are gone for good and \
         the owner's host is off for certain, --force goes on without them"
    )]
    TooFewSeals {
        /// The VM.
        vm: VmId,
        /// How many were sealed.
        sealed: usize,
        /// How many holders there are.
        holders: usize,
        /// How many are needed.
        needed: usize,
        /// What state it is left in.
        state: Left,
        /// Who failed, and why.
        failures: String,
    },
    /// No holder has anything.
    #[error(
        "cannot promote VM {vm}: none of the holders that answer has a complete checkpoint of it, so none was ever \
         committed. {state}"
    )]
    Nothing {
        /// The VM.
        vm: VmId,
        /// What state it is left in.
        state: Left,
    },
    /// What was committed is not to be had from who answers.
    #[error(
        "cannot promote VM {vm} without losing committed state: {why}; the newest whole checkpoint at the holders that \
         answer is {}. {state}. Not reached: {failures}. Start or repair the holders that have more, then promote \
         again. {}",
        or_none(best.as_deref()), way_out(vm, best.as_deref())
    )]
    WouldLose {
        /// The VM.
        vm: VmId,
        /// What is missing, and who lost it.
        why: String,
        /// The newest that could be run.
        best: Option<Box<SegmentName>>,
        /// What state it is left in.
        state: Left,
        /// Who was not reached, and why.
        failures: String,
    },
    /// The chain could not be brought here.
    #[error("cannot promote VM {vm}: {tip} could not be loaded here: {why}. {state}")]
    Fetch {
        /// The VM.
        vm: VmId,
        /// The checkpoint.
        tip: SegmentName,
        /// Why.
        why: String,
        /// What state it is left in.
        state: Left,
    },
    /// The guest could not be started.
    #[error("VM {vm} could not be started from {tip}: {why}. {state}")]
    Start {
        /// The VM.
        vm: VmId,
        /// The checkpoint.
        tip: SegmentName,
        /// Why.
        why: String,
        /// What state it is left in.
        state: Left,
    },
}

fn or_none(name: Option<&SegmentName>) -> String {
    name.map_or_else(|| "none".to_owned(), ToString::to_string)
}

/// What the flag does, and what it costs.
fn way_out(vm: &VmId, best: Option<&SegmentName>) -> String {
    match best {
        Some(best) => format!(
            "Only if they are gone for good: `standby promote {vm} --accept-loss` goes on from {best}. Everything the \
             guest did after it is then lost for ever, though others may have seen it already"
        ),
        None => "There is nothing it could go on from".to_owned(),
    }
}

/// What state a promote that failed leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Nothing was changed.
    Unchanged,
    /// The generation was raised and nothing runs.
    Raised(Generation),
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unchanged => f.write_str("Nothing was changed"),
            Self::Raised(generation) => write!(
                f,
                "It is stopped under generation {generation} and nothing was removed; promoting again, \
                 here or elsewhere, is safe"
            ),
        }
    }
}
