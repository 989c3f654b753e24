//! Who owns the VM, as the registry has it: claimed before anything runs, announced when it does.

use std::time::Duration;

use migrate::placement::{Placing, Policy, place};
use migrate::registry::{NewVm, Registry, RegistryError, VmRecord, VmState};
use migrate::spool::Position;
use migrate::transport::{Client, Identity, IdentityArgs};
use segment::{Generation, VmId};

use super::{Protection, SessionError};

/// The shortest pause between checkpoints that is taken for meant.
const MIN_EVERY_MS: u64 = 1;
/// The longest.
const MAX_EVERY_MS: u64 = 3_600_000;
/// How long the registry may take to be told of a change.
const ANNOUNCE_DEADLINE: Duration = Duration::from_secs(10);

/// A VM's place in the registry.
#[derive(Debug)]
pub(super) struct Ownership {
    vm: VmId,
    pub(super) identity: Identity,
    pub(super) registry: Registry,
    pub(super) protection: Protection,
    pub(super) ack_quorum: usize,
}

impl Ownership {
    /// Checks the protection asked for, and finds the registry and enough holders.
    pub(super) async fn prepare(
        vm: &VmId,
        mut protection: Protection,
        trust: &IdentityArgs,
    ) -> Result<Self, SessionError> {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let identity = trust.identity(&host).map_err(SessionError::Identity)?;
        if protection.holders.is_empty()
            && let Some(policy) = &protection.policy
        {
            protection.holders = choose(vm, &identity, policy, protection.registry.as_deref()).await?;
            protection.ack_quorum = Some(policy.ack_quorum as usize);
        }
        let ack_quorum = check(&protection)?;
        let (mut up, mut down) = (0, Vec::new());
        // Every agent that answers for the registry: when one of them is gone another is asked. (Should they belong to
        // two registries, the answers of one are refused by what was seen of the other.)
        let mut found: Vec<String> = Vec::new();
        for address in &protection.holders {
            match Client::connect(address, &identity).await {
                Ok(client) => {
                    up += 1;
                    let registry = client
                        .welcome()
                        .registry
                        .clone()
                        .unwrap_or_else(|| address.clone());
                    if !found.contains(&registry) {
                        found.push(registry);
                    }
                }
                Err(error) => down.push(super::chain(&error)),
            }
        }
        if up < ack_quorum {
            let holders = protection.holders.len();
            return Err(SessionError::Holders {
                up,
                holders,
                quorum: ack_quorum,
                why: down.join("; "),
            });
        }
        let address = protection.registry.get_or_insert_with(|| found.join(","));
        let registry = Registry::remote(address, &identity);
        Ok(Self {
            vm: vm.clone(),
            identity,
            registry,
            protection,
            ack_quorum,
        })
    }

    fn refused(&self, source: RegistryError) -> SessionError {
        SessionError::Registry {
            vm: self.vm.clone(),
            source,
        }
    }

    /// Becomes the owner of a VM that is new, or that its last owner stopped. A VM that runs is never taken over
    /// this way: that is a failover, which seals the holders (`standby promote`).
    ///
    /// `implied` is the checkpoint to go on from, when the user did not name it: it must not be older than what the
    /// cluster has.
    pub(super) async fn claim(
        &mut self,
        floor: Generation,
        implied: Option<&Position>,
    ) -> Result<Generation, SessionError> {
        let mut record = match self.registry.get_vm(&self.vm).await {
            Ok(record) if record.state == VmState::Stopped => {
                self.not_behind(&record, implied)?;
                self.raise(&record).await?
            }
            Ok(record) => return Err(self.refused(taken(record))),
            Err(RegistryError::NoSuchVm { .. }) => self.create().await?,
            Err(error) => return Err(self.refused(error)),
        };
        // A name this host has used before, outside the cluster, is not used again for another state.
        while record.generation <= floor {
            record = self.raise(&record).await?;
        }
        self.set_holders(record).await
    }

    /// Becomes the owner of a VM the registry does not know, under a generation it already has.
    pub(super) async fn claim_exactly(&mut self, generation: Generation) -> Result<(), SessionError> {
        let mut record = match self.registry.get_vm(&self.vm).await {
            Ok(record) if record.state == VmState::Stopped && record.generation <= generation => record,
            Ok(record) => return Err(self.refused(taken(record))),
            Err(RegistryError::NoSuchVm { .. }) => self.create().await?,
            Err(error) => return Err(self.refused(error)),
        };
        while record.generation < generation {
            record = self.raise(&record).await?;
        }
        if record.generation > generation {
            return Err(SessionError::Protection(format!(
                "the registry's generation of VM {} is {}, above this process's {generation}: stop the VM, and \
                 start it with --protect-to",
                self.vm, record.generation
            )));
        }
        self.set_holders(record).await.map(drop)
    }

    /// Is the owner already, by the agent that spawned this process.
    pub(super) async fn confirm(&mut self, generation: Generation) -> Result<Generation, SessionError> {
        let record = self
            .registry
            .get_vm(&self.vm)
            .await
            .map_err(|e| self.refused(e))?;
        // A generation is taken up once, from the state its raise left it in: a second process under the same one
        // would write other states under the same names.
        if record.generation == generation && record.state != VmState::Stopped {
            return Err(self.refused(taken(record)));
        }
        if record.generation != generation {
            return Err(self.refused(RegistryError::Fenced {
                vm: self.vm.clone(),
                asked: generation,
                current: record.generation,
                owner: record.owner,
            }));
        }
        self.set_holders(record).await
    }

    /// The state to go on from is not older than what is committed.
    fn not_behind(&self, record: &VmRecord, implied: Option<&Position>) -> Result<(), SessionError> {
        match (implied, &record.newest) {
            (Some(tip), Some(newest))
                if newest.name > tip.name
                    || (newest.name == tip.name && newest.checkpoint != tip.checkpoint) =>
            {
                Err(SessionError::Protection(format!(
                    "the cluster has checkpoint {} of VM {}, and the newest in this store is {}: go on from the \
                     cluster's with `standby promote {}`, or go back on purpose by naming one with --segment {}",
                    newest.name, self.vm, tip.name, self.vm, tip.name
                )))
            }
            _ => Ok(()),
        }
    }

    async fn create(&self) -> Result<VmRecord, SessionError> {
        let new = NewVm {
            vm: self.vm.clone(),
            owner: self.identity.name().to_owned(),
            holders: self.protection.holders.clone(),
            ack_quorum: self.quorum(),
            every_ms: self.protection.every_ms,
            policy: self.protection.policy.clone(),
        };
        self.registry.create_vm(new).await.map_err(|e| self.refused(e))
    }

    async fn raise(&self, record: &VmRecord) -> Result<VmRecord, SessionError> {
        self.registry
            .raise_generation(&self.vm, record.generation, self.identity.name())
            .await
            .map_err(|e| self.refused(e))
    }

    /// Rule 8: the holder set is in the registry, and changes only there.
    async fn set_holders(&self, record: VmRecord) -> Result<Generation, SessionError> {
        if record.holders != self.protection.holders || record.ack_quorum != self.quorum() {
            self.registry
                .set_holders(
                    &self.vm,
                    record.generation,
                    record.revision,
                    self.protection.holders.clone(),
                    self.quorum(),
                )
                .await
                .map_err(|e| self.refused(e))?;
        }
        Ok(record.generation)
    }

    fn quorum(&self) -> u32 {
        // At most MAX_HOLDERS, checked.
        self.ack_quorum as u32
    }

    /// Tells the registry whether the VM runs here; refused when it is another's by now.
    pub(super) async fn announce(&self, generation: Generation, state: VmState) -> Result<(), SessionError> {
        let told = self.registry.set_vm_state(&self.vm, generation, state);
        match tokio::time::timeout(ANNOUNCE_DEADLINE, told).await {
            Ok(answer) => answer.map(drop).map_err(|e| self.refused(e)),
            Err(_) => Err(self.refused(RegistryError::Unavailable {
                address: self.registry.address(),
                why: format!("no answer for {} s", ANNOUNCE_DEADLINE.as_secs()),
            })),
        }
    }

    /// Whether `other` differs in the pace at most.
    pub(super) fn same_cluster(&self, other: &Protection) -> bool {
        // Chosen by a policy: they are the ones it has, whatever has become of them since.
        let chosen = other.holders.is_empty() && other.policy == self.protection.policy;
        (chosen || other.holders == self.protection.holders)
            && other.ack_quorum.is_none_or(|quorum| quorum == self.ack_quorum)
            && (other.registry.is_none() || other.registry == self.protection.registry)
    }
}

/// The holders that a policy gives; those the VM has already stay as long as they may.
async fn choose(
    vm: &VmId,
    identity: &Identity,
    policy: &Policy,
    registry: Option<&str>,
) -> Result<Vec<String>, SessionError> {
    policy.check().map_err(SessionError::Protection)?;
    let Some(address) = registry else {
        return Err(SessionError::Protection(
            "holders are chosen among the registry's nodes: say where it is with --registry HOST:PORT (any agent)"
                .into(),
        ));
    };
    let refused = |source| SessionError::Registry {
        vm: vm.clone(),
        source,
    };
    let registry = Registry::remote(address, identity);
    let held = match registry.get_vm(vm).await {
        Ok(record) => record.holders,
        Err(RegistryError::NoSuchVm { .. }) => Vec::new(),
        Err(error) => return Err(refused(error)),
    };
    let nodes = registry.all_nodes().await.map_err(refused)?;
    let placing = Placing {
        vm,
        policy,
        owner: identity.name(),
        held: &held,
    };
    let placement = place(&placing, &nodes);
    if placement.chosen.len() < policy.ack_quorum as usize {
        return Err(SessionError::Protection(format!(
            "VM {vm} cannot be protected by {policy}: {}. Start more agents, or ask for less",
            placement.shortage()
        )));
    }
    for choice in &placement.chosen {
        tracing::info!(%vm, node = %choice.node, address = %choice.address, why = %choice.why, "a holder was chosen");
    }
    if placement.missing > 0 {
        tracing::warn!(%vm, why = %placement.shortage(), "fewer holders than asked for, until there are more nodes");
    }
    Ok(placement.addresses())
}

fn taken(record: VmRecord) -> RegistryError {
    RegistryError::VmTaken {
        vm: record.vm,
        owner: record.owner,
        generation: record.generation,
        state: record.state.to_string(),
    }
}

/// Checks a protection; returns its ack quorum.
fn check(protection: &Protection) -> Result<usize, SessionError> {
    let refuse = |why: String| Err(SessionError::Protection(why));
    let holders = &protection.holders;
    if holders.is_empty() || holders.len() > migrate::registry::MAX_HOLDERS {
        let max = migrate::registry::MAX_HOLDERS;
        return refuse(format!(
            "{} holders: a VM is protected by 1 to {max}",
            holders.len()
        ));
    }
    if let Some(twice) = holders
        .iter()
        .enumerate()
        .find(|(at, holder)| holders[..*at].contains(holder))
    {
        return refuse(format!(
            "holder {} is named twice: each must be another agent",
            twice.1
        ));
    }
    if !(MIN_EVERY_MS..=MAX_EVERY_MS).contains(&protection.every_ms) {
        return refuse(format!(
            "a checkpoint every {} ms: 1 ms to 1 h is possible",
            protection.every_ms
        ));
    }
    let quorum = protection.ack_quorum.unwrap_or(holders.len() / 2 + 1);
    if quorum == 0 || quorum > holders.len() {
        return refuse(format!(
            "an ack quorum of {quorum} with {} holders: 1 to all of them",
            holders.len()
        ));
    }
    Ok(quorum)
}
