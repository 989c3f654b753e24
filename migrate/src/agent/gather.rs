//! Makes a chain whole in the local store, with what is here and what other holders have.
//!
//! From the tip down, each link from here when it is here, else from the first holder that has it. Holders may have the
//! same checkpoint in other files (deltas merged, a chain folded), so that links of different holders need not meet:
//! then, and when what is here turns out to be damaged, the local copy is set aside and one holder's chain is taken as
//! it is. Links that several holders have are fetched from all of them at once before that. Every link is verified and
//! stored durably; what is here is not asked for again, so a holder that dies costs what it had half sent. What no
//! holder has comes from the global store, when there is one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use segment::{Generation, SegmentName};

use super::{Inner, blocking, copy, global};
use crate::protocol::parent_of;
use crate::store::{MAX_CHAIN_LINKS, Pace, Stored};
use crate::transport::{Client, in_full};
use crate::wire::{Call, Held, NameCall, Reply, SegmentBrief};

/// How long a holder may take to begin sending a segment.
const FETCH_DEADLINE: Duration = Duration::from_secs(10);

/// Where a chain is put together.
struct Gathering<'a> {
    inner: &'a Arc<Inner>,
    generation: Generation,
    /// Connections, made when they are needed; an error is that of the first try.
    clients: HashMap<String, Result<Client, String>>,
    /// What was replaced, in words.
    replaced: Vec<String>,
}

/// Makes the chain of `tip` whole here; what had to be replaced for it, in words. `thorough` checks every byte of the
/// links that are here already.
///
/// # Errors
/// In words, when no holder has what is missing.
pub(super) async fn gather(
    inner: &Arc<Inner>,
    from: &[String],
    tip: &SegmentBrief,
    generation: Generation,
    thorough: bool,
) -> Result<Vec<String>, String> {
    gather_held(inner, from, tip.held(), generation, thorough).await
}

/// Fetches what was lost here, and what it stands on there, from the other holders of its VM.
///
/// # Errors
/// In words, when none has it.
pub(super) async fn fetch_again(inner: &Arc<Inner>, lost: Held) -> Result<(), String> {
    let vm = &lost.name.vm;
    let record = inner.registry.get_vm(vm).await.map_err(|e| e.to_string())?;
    let others: Vec<_> = record
        .holders
        .into_iter()
        .filter(|h| *h != inner.address)
        .collect();
    if others.is_empty() && inner.global.is_none() {
        return Err("the VM has no other holder".into());
    }
    let generation = inner.store.promised(vm).max(record.generation);
    gather_held(inner, &others, lost, generation, false)
        .await
        .map(|_| ())
}

async fn gather_held(
    inner: &Arc<Inner>,
    from: &[String],
    tip: Held,
    generation: Generation,
    thorough: bool,
) -> Result<Vec<String>, String> {
    let mut gathering = Gathering {
        inner,
        generation,
        clients: HashMap::new(),
        replaced: Vec::new(),
    };
    if thorough {
        gathering.check(&tip).await?;
    }
    if is_whole(inner, &tip) {
        return Ok(gathering.replaced);
    }
    // Not the agent itself: what it has is here.
    let from: Vec<_> = from.iter().filter(|h| **h != inner.address).cloned().collect();
    // What several have comes from all of them at once; what is left then, link by link.
    copy::prefetch(inner, &from, &tip, generation).await;
    let mixed = match gathering.links(&from, &tip).await {
        Ok(()) => return Ok(gathering.replaced),
        Err(why) => why,
    };
    let mut failures = vec![mixed];
    for holder in &from {
        let alone = std::slice::from_ref(holder);
        if let Err(why) = gathering.clear(holder, &tip).await {
            failures.push(why);
            continue;
        }
        match gathering.links(alone, &tip).await {
            Ok(()) => return Ok(gathering.replaced),
            Err(why) => failures.push(why),
        }
    }
    // Last, as it is the farthest.
    if inner.global.is_some() {
        match global::bring(inner, &tip, generation).await {
            Ok(replaced) => {
                gathering.replaced.extend(replaced);
                return Ok(gathering.replaced);
            }
            Err(why) => failures.push(why),
        }
    }
    Err(failures.join("; "))
}

fn is_whole(inner: &Inner, held: &Held) -> bool {
    let here = inner
        .store
        .get(&held.name)
        .is_some_and(|e| e.checkpoint == held.checkpoint);
    here && inner.store.chain(&held.name).is_ok()
}

impl Gathering<'_> {
    /// Checks every byte of the links that are here, and sets aside what is damaged.
    async fn check(&mut self, tip: &Held) -> Result<(), String> {
        for name in self.here(tip) {
            let store = self.inner.store.clone();
            let checked = blocking(move || store.set_aside_if_damaged(&name)).await;
            self.replaced.extend(
                checked
                    .map_err(|e| in_full(&e))?
                    .map(|why| format!("a damaged copy was replaced: {why}")),
            );
        }
        Ok(())
    }

    /// The links of the chain that are here, from the tip down, as far as they meet.
    fn here(&self, tip: &Held) -> Vec<SegmentName> {
        let mut names = Vec::new();
        let mut next = Some(tip.clone());
        while let Some(held) = next.take().filter(|_| names.len() < MAX_CHAIN_LINKS) {
            if let Some(entry) = self.inner.store.get(&held.name)
                && entry.checkpoint == held.checkpoint
            {
                next = parent_of(&entry);
                names.push(held.name);
            }
        }
        names
    }

    /// Makes way for the chain of one holder that has all of it: what is here of an unfinished one is set aside.
    async fn clear(&mut self, holder: &str, tip: &Held) -> Result<(), String> {
        let shown = self
            .ask(
                holder,
                Call::Show(NameCall {
                    name: tip.name.clone(),
                }),
            )
            .await?;
        let whole = matches!(&shown, Reply::Show(detail)
            if detail.segment.complete && detail.segment.checkpoint == tip.checkpoint);
        if !whole {
            return Err(format!("{holder} does not have all of {}", tip.name));
        }
        for name in self.here(tip) {
            let (store, of) = (self.inner.store.clone(), name.clone());
            blocking(move || store.set_aside(&of))
                .await
                .map_err(|e| in_full(&e))?;
            self.replaced.push(format!(
                "{name} was replaced by the copy of {holder}: a link below it was missing here"
            ));
        }
        Ok(())
    }

    /// From the tip down until a full one is here.
    async fn links(&mut self, from: &[String], tip: &Held) -> Result<(), String> {
        let mut wanted = Some(tip.clone());
        for _ in 0..MAX_CHAIN_LINKS {
            let Some(held) = wanted else {
                return self
                    .inner
                    .store
                    .chain(&tip.name)
                    .map(drop)
                    .map_err(|e| e.to_string());
            };
            wanted = match self.inner.store.get(&held.name) {
                Some(entry) if entry.checkpoint == held.checkpoint => parent_of(&entry),
                Some(entry) => {
                    return Err(format!(
                        "{} is stored here as checkpoint {}, and checkpoint {} is needed",
                        held.name, entry.checkpoint, held.checkpoint
                    ));
                }
                None => parent_of(self.link(from, &held).await?.entry()),
            };
        }
        Err(format!(
            "the chain of {} has more than {MAX_CHAIN_LINKS} links",
            tip.name
        ))
    }

    /// One link, from the first holder that has it.
    async fn link(&mut self, from: &[String], held: &Held) -> Result<Stored, String> {
        let mut failures = Vec::new();
        for holder in from {
            match self.fetch(holder, held).await {
                Ok(stored) => return Ok(stored),
                Err(why) => failures.push(format!("{holder}: {why}")),
            }
        }
        match failures.is_empty() {
            true => Err(format!(
                "no other holder was reached that could have {}",
                held.name
            )),
            false => Err(format!("{}: {}", held.name, failures.join("; "))),
        }
    }

    async fn ask(&mut self, holder: &str, call: Call) -> Result<Reply, String> {
        if !self.clients.contains_key(holder) {
            let connected = Client::connect(holder, &self.inner.identity).await;
            self.clients
                .insert(holder.to_owned(), connected.map_err(|e| e.in_full()));
        }
        match self.clients.get_mut(holder) {
            Some(Ok(client)) => client.call(call, FETCH_DEADLINE).await.map_err(|e| in_full(&e)),
            Some(Err(why)) => Err(why.clone()),
            None => Err("it was not reached".to_owned()),
        }
    }

    async fn fetch(&mut self, holder: &str, held: &Held) -> Result<Stored, String> {
        let name = &held.name;
        let brief = match self
            .ask(holder, Call::Fetch(NameCall { name: name.clone() }))
            .await?
        {
            Reply::Fetch(brief) if brief.name == *name => brief,
            _ => return Err("it answered something else".into()),
        };
        let received = self.receive(holder, &brief, held).await;
        if received.is_err() {
            // What is left of the stream is not read: another question needs another connection.
            self.clients.remove(holder);
        }
        received
    }

    async fn receive(&mut self, holder: &str, brief: &SegmentBrief, held: &Held) -> Result<Stored, String> {
        let Some(Ok(client)) = self.clients.get_mut(holder) else {
            return Err("it was not reached".to_owned());
        };
        let pace = Pace::unlimited();
        copy::receive(self.inner, client, brief, held, self.generation, &pace).await
    }
}
