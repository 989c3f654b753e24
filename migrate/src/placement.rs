//! Which nodes hold a VM's segments: pure. A policy and the nodes go in; holders come out, with the reason for each
//! choice and each refusal in words.
//!
//! ```text
//!   policy, nodes, who holds it now --> place() --> chosen (why), refused (why), how many are missing
//!   the VM's record, nodes, since when each is gone --> repair() --> at most one change of its holders
//! ```
//!
//! Invariants: a node counts once; who holds it now is kept as long as it may; what is chosen depends on nothing but the
//! arguments, so every agent that asks comes to the same answer.
//!
//! What it never does: it copies nothing and changes no record. A change of holders that it proposes is made by the VM's
//! owner, one at a time, after who joins has caught up.

mod label;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use bytesize::ByteSize;
use minicbor::{Decode, Encode};
use segment::VmId;
use serde::{Deserialize, Serialize};

use crate::registry::{HolderSwap, MAX_HOLDERS, NodeRecord, Role, VmRecord, VmState};
pub use label::{LabelError, LabelRule};

/// The most rules of one policy.
pub const MAX_RULES: usize = 32;

/// What a VM's holders are chosen by.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct Policy {
    /// How many nodes hold its segments.
    #[n(0)]
    pub replicas: u32,
    /// How many of them make a checkpoint committed.
    #[n(1)]
    pub ack_quorum: u32,
    /// What each of them must be labelled.
    #[cbor(n(2), with = "crate::wire::value")]
    #[serde(default)]
    pub labels: Vec<LabelRule>,
    /// The label whose values they should be spread over, evenly.
    #[n(3)]
    #[serde(default)]
    pub spread: Option<String>,
    /// How many bytes each must have free when it is chosen; 0 for any.
    #[n(4)]
    #[serde(default)]
    pub min_free_bytes: u64,
}

impl Policy {
    /// Of so many replicas, a majority of which make a checkpoint committed, anywhere.
    #[must_use]
    pub fn of(replicas: u32) -> Self {
        Self {
            replicas,
            ack_quorum: replicas / 2 + 1,
            labels: Vec::new(),
            spread: None,
            min_free_bytes: 0,
        }
    }

    /// Whether it can be met at all.
    ///
    /// # Errors
    /// In words, when not.
    pub fn check(&self) -> Result<(), String> {
        if self.replicas == 0 || self.replicas as usize > MAX_HOLDERS {
            return Err(format!(
                "{} replicas: a VM is protected by 1 to {MAX_HOLDERS}",
                self.replicas
            ));
        }
        if self.ack_quorum == 0 || self.ack_quorum > self.replicas {
            return Err(format!(
                "an ack quorum of {} with {} replicas: 1 to all of them",
                self.ack_quorum, self.replicas
            ));
        }
        if self.labels.len() > MAX_RULES {
            return Err(format!("{} label rules: at most {MAX_RULES}", self.labels.len()));
        }
        if let Some(key) = &self.spread
            && !label::is_key(key)
        {
            return Err(format!("{key:?} is no label to spread over"));
        }
        Ok(())
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} replicas, committed at {}", self.replicas, self.ack_quorum)?;
        for rule in &self.labels {
            write!(f, ", {rule}")?;
        }
        if let Some(key) = &self.spread {
            write!(f, ", spread over {key}")?;
        }
        if self.min_free_bytes > 0 {
            write!(f, ", {} free", bytes(self.min_free_bytes))?;
        }
        Ok(())
    }
}

/// A node that was chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// Its name.
    pub node: String,
    /// Where its agent listens.
    pub address: String,
    /// Whether it holds the VM already.
    pub held: bool,
    /// Why it, in words.
    pub why: String,
}

/// A node that was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// Its name, or its address when no node has that.
    pub node: String,
    /// Whether it holds the VM now all the same.
    pub held: bool,
    /// Why not, in words.
    pub why: String,
}

/// What was chosen for one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// In the order they were chosen.
    pub chosen: Vec<Choice>,
    /// Everyone else.
    pub refused: Vec<Refusal>,
    /// How many replicas have no place.
    pub missing: u32,
}

impl Placement {
    /// Where the segments go.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        self.chosen.iter().map(|c| c.address.clone()).collect()
    }

    /// Why replicas have no place, in words; empty when none is missing.
    #[must_use]
    pub fn shortage(&self) -> String {
        if self.missing == 0 {
            return String::new();
        }
        let why: Vec<_> = self
            .refused
            .iter()
            .map(|r| format!("{}: {}", r.node, r.why))
            .collect();
        let why = if why.is_empty() {
            "there is no other node".to_owned()
        } else {
            why.join("; ")
        };
        format!("{} of the replicas have no place ({why})", self.missing)
    }
}

/// A VM that needs holders.
#[derive(Debug, Clone, Copy)]
pub struct Placing<'a> {
    /// The VM.
    pub vm: &'a VmId,
    /// What they are chosen by.
    pub policy: &'a Policy,
    /// The node it runs on, by name or address: a copy there dies with it.
    pub owner: &'a str,
    /// Who holds it now, by address.
    pub held: &'a [String],
}

/// Chooses holders.
#[must_use]
pub fn place(placing: &Placing<'_>, nodes: &[NodeRecord]) -> Placement {
    let owner = nodes.iter().find(|n| n.name == placing.owner);
    let (mut able, mut refused) = (Vec::new(), Vec::new());
    for node in nodes {
        let held = placing.held.contains(&node.address);
        match unfit(placing, owner, node, held) {
            Some(why) => refused.push(Refusal {
                node: node.name.clone(),
                held,
                why,
            }),
            None => able.push((node, held)),
        }
    }
    for gone in placing
        .held
        .iter()
        .filter(|h| !nodes.iter().any(|n| n.address == **h))
    {
        refused.push(Refusal {
            node: gone.clone(),
            held: true,
            why: "no node of the registry listens there".into(),
        });
    }
    let mut chosen: Vec<Choice> = Vec::new();
    let mut used: BTreeMap<String, u32> = BTreeMap::new();
    while chosen.len() < placing.policy.replicas as usize {
        let rank = |(node, held): &(&NodeRecord, bool)| {
            let shared = spread_of(placing.policy, node).map_or(0, |v| used.get(v).copied().unwrap_or(0));
            // A holder is kept before another is taken; then who shares least; then who has most room, roughly; then
            // by a draw that is the same everywhere and another for each VM.
            (
                !*held,
                shared,
                std::cmp::Reverse(node.free_bytes.map_or(0, |b| b.checked_ilog2().unwrap_or(0))),
                draw(placing.vm, &node.name),
            )
        };
        let Some(at) = (0..able.len()).min_by_key(|at| rank(&able[*at])) else {
            break;
        };
        let (node, held) = able.remove(at);
        let why = reason(placing, node, held, &used);
        if let Some(value) = spread_of(placing.policy, node) {
            *used.entry(value.to_owned()).or_default() += 1;
        }
        chosen.push(Choice {
            node: node.name.clone(),
            address: node.address.clone(),
            held,
            why,
        });
    }
    for (node, held) in able {
        let why = match spread_of(placing.policy, node).and_then(|v| used.get(v).map(|n| (v, n))) {
            Some((value, n)) => format!("could, but is not needed; {n} of the chosen are in {value}"),
            None => "could, but is not needed".to_owned(),
        };
        refused.push(Refusal {
            node: node.name.clone(),
            held,
            why,
        });
    }
    let missing = placing.policy.replicas - chosen.len() as u32;
    Placement {
        chosen,
        refused,
        missing,
    }
}

fn spread_of<'a>(policy: &Policy, node: &'a NodeRecord) -> Option<&'a str> {
    let key = policy.spread.as_ref()?;
    Some(node.labels.get(key).map_or("", String::as_str))
}

/// Why a node cannot hold the VM; none when it can.
fn unfit(placing: &Placing<'_>, owner: Option<&NodeRecord>, node: &NodeRecord, held: bool) -> Option<String> {
    if node.name == placing.owner || node.address == placing.owner {
        return Some("the VM runs there: a copy would be lost with it".into());
    }
    if !node.has_role(Role::Store) {
        return Some(format!(
            "it does not store: its roles are {}",
            node.roles.join(",")
        ));
    }
    if !node.is_alive() {
        return Some("it does not live: its lease is gone".into());
    }
    if node.is_draining() {
        return Some("it is being drained".into());
    }
    for rule in &placing.policy.labels {
        if let Some(why) = rule.unmet(&node.labels, owner.map(|o| &o.labels)) {
            return Some(why);
        }
    }
    // What it holds already is in what it has used.
    if held || placing.policy.min_free_bytes == 0 {
        return None;
    }
    let needed = placing.policy.min_free_bytes;
    match node.free_bytes {
        None => Some(format!(
            "it does not say how much is free, and {} are needed",
            bytes(needed)
        )),
        Some(free) if free < needed => Some(format!(
            "it has {} free, and {} are needed",
            bytes(free),
            bytes(needed)
        )),
        Some(_) => None,
    }
}

fn reason(placing: &Placing<'_>, node: &NodeRecord, held: bool, used: &BTreeMap<String, u32>) -> String {
    let mut why = vec![
        if held {
            "holds it already"
        } else {
            "lives and stores"
        }
        .to_owned(),
    ];
    let rules = placing.policy.labels.iter();
    why.extend(rules.map(|rule| format!("{rule} is met ({})", rule.shown(&node.labels))));
    if let (Some(key), Some(value)) = (&placing.policy.spread, spread_of(placing.policy, node)) {
        let value = if value.is_empty() { "no value" } else { value };
        why.push(match used.get(value) {
            None => format!("none of the chosen has {key} {value} yet"),
            Some(n) => format!("no other {key} has fewer than {value} with {n}"),
        });
    }
    if let Some(free) = node.free_bytes {
        why.push(format!("{} free", bytes(free)));
    }
    why.join("; ")
}

/// The same for everyone who asks, and in another order for each VM.
fn draw(vm: &VmId, node: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(vm.as_str().as_bytes());
    // Neither has one: no two pairs give the same bytes.
    hasher.update(&[0]);
    hasher.update(node.as_bytes());
    *hasher.finalize().as_bytes()
}

fn bytes(n: u64) -> String {
    ByteSize(n).display().iec().to_string()
}

/// A node, and for how long its lease has been gone, by the clock of who asks.
#[derive(Debug, Clone)]
pub struct Watched {
    /// The node.
    pub node: NodeRecord,
    /// Absent while it lives.
    pub gone_for: Option<Duration>,
}

impl Watched {
    /// As one sees it who has not watched: it lives, or has just gone.
    #[must_use]
    pub fn at_first_sight(node: NodeRecord) -> Self {
        Self {
            gone_for: (!node.is_alive()).then_some(Duration::ZERO),
            node,
        }
    }
}

/// One change of a VM's holders that is called for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// Who joins, and who leaves for it.
    pub swap: HolderSwap,
    /// Why, in words.
    pub why: String,
    /// From whom the segments can be had, by address.
    pub sources: Vec<String>,
}

/// What is to be done about a VM's holders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// They are as the policy wants them.
    Right,
    /// They are not for long enough, or a change is under way.
    Wait(String),
    /// They are not, and nobody can take the place: in words.
    Short(String),
    /// A change that is under way cannot end: who joins is gone itself.
    GiveUp(String),
    /// This is the next change.
    Repair(Repair),
}

/// What is to be done about a VM's holders, one change at a time. A holder that is gone is replaced after `patience`.
#[must_use]
pub fn repair(vm: &VmRecord, nodes: &[Watched], patience: Duration) -> Verdict {
    let at = |address: &String| nodes.iter().find(|w| w.node.address == *address);
    if let Some(swap) = &vm.swap {
        return match at(&swap.joining) {
            None => Verdict::GiveUp(format!("no node listens at {}, which was to join", swap.joining)),
            Some(w) if w.gone_for.is_some_and(|gone| gone >= patience) || w.node.is_draining() => {
                Verdict::GiveUp(format!("{}, which was to join, is gone or drained", w.node.name))
            }
            Some(_) => Verdict::Wait(format!("{} joins", swap.joining)),
        };
    }
    if vm.holders.is_empty() {
        return Verdict::Right;
    }
    let drained = vm
        .holders
        .iter()
        .find(|h| at(h).is_some_and(|w| w.node.is_draining()));
    let named;
    let policy = match &vm.policy {
        Some(policy) => policy,
        // Named by a person: changed only by another word of a person, which a drain is.
        None if drained.is_none() => return Verdict::Right,
        None => {
            named = Policy {
                ack_quorum: vm.ack_quorum,
                ..Policy::of(vm.holders.len() as u32)
            };
            &named
        }
    };
    // Who is dead goes first: the drained one still serves.
    let mut waiting = None;
    let mut leaving = None;
    for holder in &vm.holders {
        match at(holder) {
            None if vm.policy.is_some() => {
                leaving = Some((holder, "no node of the registry listens there".to_owned()));
                break;
            }
            Some(Watched {
                node,
                gone_for: Some(gone),
            }) if vm.policy.is_some() => {
                if *gone >= patience {
                    leaving = Some((holder, format!("{} is gone for {} s", node.name, gone.as_secs())));
                    break;
                }
                waiting = Some(format!("{} is gone for {} s only", node.name, gone.as_secs()));
            }
            None | Some(_) => {}
        }
    }
    if leaving.is_none() {
        leaving = drained.and_then(|h| at(h).map(|w| (h, format!("{} is drained", w.node.name))));
    }
    let grows = leaving.is_none() && vm.holders.len() < policy.replicas as usize;
    if leaving.is_none() && !grows {
        return waiting.map_or(Verdict::Right, Verdict::Wait);
    }
    if vm.state == VmState::Stopped {
        // Whoever owns it next may be about to seal them, and only an owner knows what is committed.
        return Verdict::Wait("the VM is stopped: its holders change when it runs".into());
    }
    let stays: Vec<_> = vm
        .holders
        .iter()
        .filter(|h| leaving.as_ref().is_none_or(|(l, _)| l != h))
        .cloned()
        .collect();
    let living: Vec<_> = nodes.iter().map(|w| w.node.clone()).collect();
    let placed = place(
        &Placing {
            vm: &vm.vm,
            policy,
            owner: &vm.owner,
            held: &stays,
        },
        &living,
    );
    let Some(joins) = placed.chosen.iter().find(|c| !vm.holders.contains(&c.address)) else {
        let lost = leaving.map_or_else(|| "a replica is missing".to_owned(), |(_, why)| why);
        return Verdict::Short(format!("{lost}; {}", placed.shortage()));
    };
    let sources = vm
        .holders
        .iter()
        .filter(|h| at(h).is_some_and(|w| w.gone_for.is_none()));
    let sources: Vec<_> = sources.cloned().collect();
    if sources.is_empty() {
        return Verdict::Short("no holder lives that the segments could be copied from".into());
    }
    let why = leaving.as_ref().map_or_else(
        || format!("{} replicas are wanted", policy.replicas),
        |(_, why)| why.clone(),
    );
    Verdict::Repair(Repair {
        swap: HolderSwap {
            joining: joins.address.clone(),
            leaving: leaving.map(|(holder, _)| holder.clone()),
        },
        why,
        sources,
    })
}

/// Who looks after a VM's holders: the first of its living holders in an order that is the same for everyone; of a VM
/// without one, nobody can. Two who think differently for a moment do no harm: a change is a compare-and-swap.
#[must_use]
pub fn caretaker<'a>(vm: &'a VmRecord, nodes: &[Watched]) -> Option<&'a str> {
    let lives = |h: &&String| {
        let node = nodes.iter().find(|w| w.node.address == **h);
        node.is_some_and(|w| w.gone_for.is_none())
    };
    let holders = vm.holders.iter().filter(lives);
    holders.min_by_key(|h| draw(&vm.vm, h)).map(String::as_str)
}

#[cfg(test)]
mod tests;
