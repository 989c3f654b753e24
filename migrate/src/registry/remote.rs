//! A registry that agents answer for: the same requests, over the wire.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;

use super::{Answer, Answered, Backend, RegistryError, RegistryRequest, RegistryResponse, Stamp};
use crate::transport::{CallError, Client, Identity};
use crate::wire::{Call, Reply};

/// How long a request may take at one agent, connecting included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// A registry at agents: one is asked, and when it is away the next.
#[derive(Debug)]
pub struct Remote {
    addresses: Vec<String>,
    identity: Identity,
    /// The one that answered last.
    current: AtomicUsize,
    // One question at a time on one connection; a task that waits for the answer holds it.
    client: Mutex<Option<Client>>,
    // Questions that wait for changes have a connection of their own, so that no other waits behind them.
    watching: Mutex<Option<Client>>,
}

impl Remote {
    /// At `address` (HOST:PORT, or several separated by commas), asked by `identity`. Connects when it is first asked.
    #[must_use]
    pub fn new(address: &str, identity: &Identity) -> Self {
        Self {
            addresses: address.split(',').map(|a| a.trim().to_owned()).collect(),
            identity: identity.clone(),
            current: AtomicUsize::new(0),
            client: Mutex::new(None),
            watching: Mutex::new(None),
        }
    }

    async fn ask(&self, request: &RegistryRequest) -> Answered {
        let (kept, longer) = match request {
            RegistryRequest::AwaitChanges { wait_ms, .. } => {
                (&self.watching, Duration::from_millis((*wait_ms).into()))
            }
            _ => (&self.client, Duration::ZERO),
        };
        let mut kept = kept.lock().await;
        let mut failures = Vec::new();
        let first = self.current.load(Ordering::Relaxed);
        for at in (0..self.addresses.len()).map(|i| (first + i) % self.addresses.len()) {
            let address = &self.addresses[at];
            match self
                .ask_one(address, &mut kept, request, REQUEST_TIMEOUT + longer)
                .await
            {
                Ok(answered) => {
                    self.current.store(at, Ordering::Relaxed);
                    return answered;
                }
                Err(why) if self.addresses.len() == 1 => failures.push(why),
                Err(why) => failures.push(format!("{address}: {why}")),
            }
        }
        self.away(failures.join("; "))
    }

    async fn ask_one(
        &self,
        address: &str,
        kept: &mut Option<Client>,
        request: &RegistryRequest,
        deadline: Duration,
    ) -> Result<Answered, String> {
        // A kept connection may have died unseen (the agent was restarted): then once more on a new one. Every
        // request may be repeated: see the claims.
        let mut again = kept.as_ref().is_some_and(|c| c.peer() == address);
        loop {
            let mut client = match kept.take() {
                Some(client) if client.peer() == address => client,
                Some(_) | None => Client::connect(address, &self.identity)
                    .await
                    .map_err(|e| e.in_full())?,
            };
            match client.call(Call::Registry(request.clone()), deadline).await {
                Ok(Reply::Registry(response, stamp)) => {
                    *kept = Some(client);
                    return Ok(answered(Ok(response), stamp));
                }
                // Of several, another one may have reached the registry.
                Ok(Reply::RegistryRefused(error @ RegistryError::Unavailable { .. }, _))
                    if self.addresses.len() > 1 =>
                {
                    *kept = Some(client);
                    return Err(error.to_string());
                }
                Ok(Reply::RegistryRefused(error, stamp)) => {
                    *kept = Some(client);
                    return Ok(answered(Err(error), stamp));
                }
                Ok(_) => return Err("it answered something else".into()),
                Err(CallError::Transport(_)) if again => again = false,
                Err(e) => return Err(crate::transport::in_full(&e)),
            }
        }
    }

    fn away(&self, why: String) -> Answered {
        let address = self.addresses.join(",");
        answered(Err(RegistryError::Unavailable { address, why }), None)
    }
}

fn answered(outcome: Result<RegistryResponse, RegistryError>, stamp: Option<Stamp>) -> Answered {
    Answered { outcome, stamp }
}

impl Backend for Remote {
    fn call(&self, request: RegistryRequest) -> Answer<'_> {
        Box::pin(async move {
            let mut limit = 2 * REQUEST_TIMEOUT * self.addresses.len() as u32;
            if let RegistryRequest::AwaitChanges { wait_ms, .. } = &request {
                limit += Duration::from_millis((*wait_ms).into());
            }
            match tokio::time::timeout(limit, self.ask(&request)).await {
                Ok(answered) => answered,
                Err(_) => self.away(format!("no answer within {} s", limit.as_secs())),
            }
        })
    }

    fn address(&self) -> String {
        self.addresses.join(",")
    }
}
