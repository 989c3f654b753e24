//! Who owns the VM, as the registry has it: claimed before anything runs, announced when it does.

use std::time::Duration;

use migrate::failover::{SealFailure, lease_left, seals_needed};
use migrate::lease::{Electors, LeaseTerms};
use migrate::placement::{Placing, Policy, place};
use migrate::process;
use migrate::registry::{Failover, HistoryEntry, NewVm, Registry, RegistryError, VmRecord, VmState};
use migrate::seal::seal;
use migrate::spool::Position;
use migrate::transport::{Client, Identity, IdentityArgs};
use migrate::wire::LEASE_VERSION;
use segment::{Generation, VmId};

use super::report::{FailoverMode, OnLapse};
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
    /// The holders as they were when protection was asked for; those it has now are in `protection`.
    named: Vec<String>,
    /// The lease the guest runs under; none when only a person's word takes it over.
    pub(super) lease: Option<LeaseTerms>,
}

impl Ownership {
    /// Checks the protection asked for, and finds the registry and enough holders. When the takeover has been decided
    /// already (`confirmed`: the generation is given), a holder that is away keeps nothing from running: its time to
    /// commit comes when it is back.
    pub(super) async fn prepare(
        vm: &VmId,
        mut protection: Protection,
        trust: &IdentityArgs,
        confirmed: bool,
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
        let wanted = terms(&protection)?;
        let (mut up, mut can_grant, mut down) = (0, 0, Vec::new());
        // Every agent that answers for the registry: when one of them is gone another is asked. (Should they belong to
        // two registries, the answers of one are refused by what was seen of the other.)
        let mut found: Vec<String> = Vec::new();
        let mut nodes: Vec<(String, String)> = Vec::new();
        // Where it is decided and the registry is named, nothing that holders could say now is needed: one whose host is
        // gone would only keep the guest from running for as long as it is waited for.
        let asked = match confirmed && protection.registry.is_some() {
            true => &[],
            false => protection.holders.as_slice(),
        };
        for address in asked {
            match Client::connect(address, &identity).await {
                Ok(client) => {
                    up += 1;
                    if client.welcome().version >= LEASE_VERSION {
                        can_grant += 1;
                    }
                    let node = client.welcome().node.clone();
                    if let Some((_, before)) = nodes.iter().find(|(known, _)| *known == node) {
                        return Err(SessionError::Protection(format!(
                            "{before} and {address} are the same agent ({node}): one copy would count as two. Name each \
                             agent once"
                        )));
                    }
                    nodes.push((node, address.clone()));
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
        if up < ack_quorum && !confirmed {
            let holders = protection.holders.len();
            return Err(SessionError::Holders {
                up,
                holders,
                quorum: ack_quorum,
                why: down.join("; "),
            });
        }
        if wanted.is_some() && can_grant < ack_quorum && !confirmed {
            return Err(SessionError::Protection(format!(
                "--failover auto needs {ack_quorum} holders that grant leases, and {can_grant} of those that answer do: \
                 update the others, or let it be taken over by hand with --failover manual"
            )));
        }
        let address = protection.registry.get_or_insert_with(|| found.join(","));
        let registry = Registry::remote(address, &identity);
        Ok(Self {
            vm: vm.clone(),
            named: protection.holders.clone(),
            identity,
            registry,
            protection,
            ack_quorum,
            lease: wanted,
        })
    }

    /// What becomes of this process without a lease.
    pub(super) fn on_lapse(&self) -> OnLapse {
        self.protection.on_lapse.unwrap_or_default()
    }

    /// Who grants the guest its time.
    pub(super) fn electors(&self) -> Electors {
        Electors::new(&self.protection.holders, self.quorum())
    }

    /// Says in the registry how the VM fails over, and which process may run it: before its guest runs. Learns the
    /// holders that the record names, which may have changed since this process asked for them.
    pub(super) async fn arrange(&mut self, generation: Generation) -> Result<(), SessionError> {
        let failover = match self.lease {
            None => None,
            Some(LeaseTerms { ttl, renew_every }) => Some(Failover {
                ttl_ms: ttl.as_millis() as u64,
                renew_every_ms: renew_every.as_millis() as u64,
                stop_on_lapse: (self.on_lapse() == OnLapse::Stop).then_some(true),
                process: Some(process::this().map_err(SessionError::Thread)?),
            }),
        };
        match self.registry.set_failover(&self.vm, generation, failover).await {
            Ok(record) => {
                self.ack_quorum = record.ack_quorum as usize;
                self.protection.holders = record.holders;
                Ok(())
            }
            // One of the version before cannot be told, and does not have to be.
            Err(error) if failover.is_none() && !matches!(error, RegistryError::Fenced { .. }) => {
                tracing::warn!(vm = %self.vm, %error, "the registry was not told that the VM is taken over by hand only");
                Ok(())
            }
            Err(error) => Err(self.refused(error)),
        }
    }

    /// Says in the registry that the VM does not fail over by itself any more.
    pub(super) async fn disarrange(&self, generation: Generation) -> Result<(), SessionError> {
        let told = self.registry.set_failover(&self.vm, generation, None).await;
        told.map(drop).map_err(|e| self.refused(e))
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
                let raised = self.raise(&record).await?;
                self.run_out(&record, &raised).await?;
                raised
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

    /// Stopped may also mean that a takeover did not come to its end: then the owner before may run still, and its time has
    /// to run out as after any takeover.
    async fn run_out(&self, before: &VmRecord, raised: &VmRecord) -> Result<(), SessionError> {
        if raised.failover.is_none() {
            return Ok(());
        }
        let mut left = lease_left(before, raised);
        // One that had a lease under this generation has said itself that it stopped, and is granted nothing.
        if before.leased != Some(before.generation.0) {
            let needed = seals_needed(raised.holders.len(), raised.ack_quorum as usize);
            let (mut sealed, mut down) = (0, Vec::new());
            for holder in &raised.holders {
                match seal(
                    holder,
                    &self.identity,
                    &self.vm,
                    raised.generation,
                    ANNOUNCE_DEADLINE,
                )
                .await
                {
                    Ok(report) => {
                        sealed += 1;
                        left = left.max(report.granted());
                    }
                    Err(SealFailure::Fenced { current }) => {
                        down.push(format!("{holder}: it has promised generation {current}"));
                    }
                    Err(SealFailure::Unreachable { why }) => down.push(format!("{holder}: {why}")),
                }
            }
            if sealed < needed {
                return Err(SessionError::Holders {
                    up: sealed,
                    holders: raised.holders.len(),
                    quorum: needed,
                    why: down.join("; "),
                });
            }
        }
        if !left.is_zero() {
            tracing::info!(vm = %self.vm, time = ?left, "waiting until the owner before has to stand still");
            tokio::time::sleep(left).await;
        }
        Ok(())
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
            Ok(answer) => {
                answer.map_err(|e| self.refused(e))?;
                self.note(generation, state);
                Ok(())
            }
            Err(_) => Err(self.refused(RegistryError::Unavailable {
                address: self.registry.address(),
                why: format!("no answer for {} s", ANNOUNCE_DEADLINE.as_secs()),
            })),
        }
    }

    /// For the VM's history; not waited for.
    fn note(&self, generation: Generation, state: VmState) {
        let (registry, vm) = (self.registry.clone(), self.vm.clone());
        let how = format!("by process {}", std::process::id());
        let entry = HistoryEntry::new(generation, self.identity.name(), &state.to_string(), how);
        tokio::spawn(async move {
            let noted = tokio::time::timeout(ANNOUNCE_DEADLINE, registry.note(&vm, entry)).await;
            if !matches!(noted, Ok(Ok(()))) {
                tracing::debug!(%vm, "the VM's history lacks an entry");
            }
        });
    }

    /// Whether `other` differs in the pace at most.
    pub(super) fn same_cluster(&self, other: &Protection) -> bool {
        // Chosen by a policy: they are the ones it has, whatever has become of them since.
        let chosen =
            other.holders.is_empty() && other.policy.is_some() && other.policy == self.protection.policy;
        (chosen || other.holders == self.named || other.holders == self.protection.holders)
            && other.ack_quorum.is_none_or(|quorum| quorum == self.ack_quorum)
            && (other.failover.is_none() || other.failover == self.protection.failover)
            && (other.on_lapse.is_none() || other.on_lapse == self.protection.on_lapse)
            && (other.detect.is_none() || other.detect == self.protection.detect)
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

/// The lease that a protection asks for.
fn terms(protection: &Protection) -> Result<Option<LeaseTerms>, SessionError> {
    let terms = protection
        .detect
        .as_deref()
        .map(str::parse::<LeaseTerms>)
        .transpose();
    let terms = terms.map_err(SessionError::Protection)?;
    match (protection.failover.unwrap_or_default(), terms) {
        (FailoverMode::Auto, terms) => Ok(Some(terms.unwrap_or_default())),
        (FailoverMode::Manual, None) if protection.on_lapse.is_none() => Ok(None),
        (FailoverMode::Manual, None) => Err(SessionError::Protection(
            "--on-lapse says what becomes of an owner without a lease: it goes with --failover auto".into(),
        )),
        (FailoverMode::Manual, Some(_)) => Err(SessionError::Protection(
            "--detect says how fast a lost owner is noticed: it goes with --failover auto".into(),
        )),
    }
}

fn taken(record: VmRecord) -> RegistryError {
    RegistryError::VmTaken {
        vm: record.vm,
        owner: record.owner,
        generation: record.generation,
        state: record.state.to_string(),
    }
}

/// Checks how often checkpoints are asked for.
pub(super) fn check_pace(protection: &Protection) -> Result<(), SessionError> {
    if (MIN_EVERY_MS..=MAX_EVERY_MS).contains(&protection.every_ms) {
        return Ok(());
    }
    Err(SessionError::Protection(format!(
        "a checkpoint every {} ms: 1 ms to 1 h is possible",
        protection.every_ms
    )))
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
    check_pace(protection)?;
    let quorum = protection.ack_quorum.unwrap_or(holders.len() / 2 + 1);
    if quorum == 0 || quorum > holders.len() {
        return refuse(format!(
            "an ack quorum of {quorum} with {} holders: 1 to all of them",
            holders.len()
        ));
    }
    Ok(quorum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_takeover_that_is_decided_waits_for_no_holder() {
        // Takes connections and never says a word, as one whose host is gone does not.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        silent.set_nonblocking(true).unwrap();
        let protection = serde_json::json!({
            "holders": [silent.local_addr().unwrap().to_string()],
            "registry": "127.0.0.1:1",
        });
        let protection: Protection = serde_json::from_value(protection).unwrap();
        let trust = IdentityArgs {
            insecure_plaintext: true,
            ..IdentityArgs::default()
        };
        let vm = VmId::new("web").unwrap();
        let ownership = Ownership::prepare(&vm, protection, &trust, true).await.unwrap();
        assert_eq!(ownership.quorum(), 1);
        let asked = silent.accept().map(drop).map_err(|e| e.kind());
        assert_eq!(asked, Err(std::io::ErrorKind::WouldBlock), "a holder was asked");
    }
}
