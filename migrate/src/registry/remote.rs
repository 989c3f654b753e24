//! A registry that another agent keeps: the same requests, over the wire.

use std::time::Duration;

use tokio::sync::Mutex;

use super::{Answer, Backend, RegistryError, RegistryRequest, RegistryResponse};
use crate::transport::{CallError, Client};
use crate::wire::{Call, Reply};

/// How long a request may take, connecting included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// A registry at an agent.
#[derive(Debug)]
pub struct Remote {
    address: String,
    name: String,
    // One question at a time on one connection; a task that waits for the answer holds it.
    client: Mutex<Option<Client>>,
}

impl Remote {
    /// At `address`, asked by `name`. Connects when it is first asked.
    #[must_use]
    pub fn new(address: &str, name: &str) -> Self {
        Self {
            address: address.to_owned(),
            name: name.to_owned(),
            client: Mutex::new(None),
        }
    }

    async fn ask(&self, request: RegistryRequest) -> Result<RegistryResponse, RegistryError> {
        let mut kept = self.client.lock().await;
        // A kept connection may have died unseen (the agent was restarted): then once more on a new one. Every
        // request may be repeated: see the claims.
        let mut again = kept.is_some();
        loop {
            let mut client = match kept.take() {
                Some(client) => client,
                None => Client::connect(&self.address, &self.name)
                    .await
                    .map_err(|e| self.away(e.in_full()))?,
            };
            match client
                .call(Call::Registry(request.clone()), REQUEST_TIMEOUT)
                .await
            {
                Ok(Reply::Registry(response)) => {
                    *kept = Some(client);
                    return Ok(response);
                }
                Ok(Reply::RegistryRefused(error)) => {
                    *kept = Some(client);
                    return Err(error);
                }
                Ok(_) => return Err(self.away("it answered something else".into())),
                Err(CallError::Transport(_)) if again => again = false,
                Err(e) => return Err(self.away(crate::transport::in_full(&e))),
            }
        }
    }

    fn away(&self, why: String) -> RegistryError {
        RegistryError::Unavailable {
            address: self.address.clone(),
            why,
        }
    }
}

impl Backend for Remote {
    fn call(&self, request: RegistryRequest) -> Answer<'_> {
        Box::pin(async move {
            match tokio::time::timeout(2 * REQUEST_TIMEOUT, self.ask(request)).await {
                Ok(answer) => answer,
                Err(_) => Err(self.away(format!("no answer within {} s", 2 * REQUEST_TIMEOUT.as_secs()))),
            }
        })
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}
