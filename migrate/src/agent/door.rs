//! Who comes in: connections are bounded before and after it is known whose they are.
//!
//! ```text
//! accept --> stranger (TLS, Hello: HANDSHAKE_TIMEOUT each) --> known (a place of MAX_CONNECTIONS) --> served
//!               at most MAX_STRANGERS; one more,                  at most MAX_OF_NODE of one node;
//!               and the oldest of them is dropped                 else Reject BUSY
//! ```
//!
//! Invariants: who says nothing, or says it slowly, costs one place among the strangers, which the next one takes: an
//! honest peer is known in milliseconds, so that a crowd of silent ones does not keep it out. A node that opens as many
//! connections as it can leaves places for the others. Nothing is allocated by a length that a stranger names.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

use super::{ACCEPT_AGAIN, Inner, SHUTDOWN, calls, replicate, welcome};
use crate::transport::{Link, Peer, TransportError, expect_hello, in_full};
use crate::wire::{Message, Purpose, Reject};

/// The most connections at once whose peers are known.
pub const MAX_CONNECTIONS: usize = 256;
/// The most of them that are one node's.
pub const MAX_OF_NODE: usize = 192;
/// The most connections at once whose peers are not known yet.
pub const MAX_STRANGERS: usize = 64;

/// Who is at the door, and who is in.
#[derive(Debug)]
struct Door {
    // Each connection's task enters and leaves; held for moments.
    strangers: Mutex<Strangers>,
    places: Arc<Semaphore>,
    // As above.
    of_node: Mutex<HashMap<String, usize>>,
}

#[derive(Debug, Default)]
struct Strangers {
    last: u64,
    waiting: VecDeque<(u64, AbortHandle)>,
}

/// A place inside; left when dropped.
struct Place {
    door: Arc<Door>,
    inner: Arc<Inner>,
    node: Option<String>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.inner.connections.fetch_sub(1, Ordering::Relaxed);
        let Some(node) = &self.node else { return };
        let mut of_node = self.door.of_node();
        if let Some(count) = of_node.get_mut(node) {
            *count -= 1;
            if *count == 0 {
                of_node.remove(node);
            }
        }
    }
}

impl Door {
    fn new() -> Self {
        Self {
            strangers: Mutex::default(),
            places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            of_node: Mutex::default(),
        }
    }

    fn strangers(&self) -> MutexGuard<'_, Strangers> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of_node(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.of_node.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stranger is known now; false when it was dropped meanwhile.
    fn known(&self, number: u64) -> bool {
        let mut strangers = self.strangers();
        let at = strangers.waiting.iter().position(|(n, _)| *n == number);
        at.and_then(|at| strangers.waiting.remove(at)).is_some()
    }

    /// A place for `who`, or why there is none.
    fn enter(self: &Arc<Self>, inner: &Arc<Inner>, who: &Peer) -> Result<Place, String> {
        let full = || format!("{MAX_CONNECTIONS} connections are open here: try again later");
        let permit = self.places.clone().try_acquire_owned().map_err(|_| full())?;
        let node = match who {
            Peer::Anyone => None,
            Peer::Node(node) => Some(node.name.clone()),
        };
        if let Some(node) = &node {
            let mut of_node = self.of_node();
            let count = of_node.entry(node.clone()).or_default();
            if *count >= MAX_OF_NODE {
                return Err(format!(
                    "{MAX_OF_NODE} connections of {node} are open here: try again later"
                ));
            }
            *count += 1;
        }
        inner.connections.fetch_add(1, Ordering::Relaxed);
        Ok(Place {
            door: self.clone(),
            inner: inner.clone(),
            node,
            _permit: permit,
        })
    }
}

/// Takes connections until the agent stops.
pub(super) async fn accept(inner: Arc<Inner>, listener: TcpListener) {
    let door = Arc::new(Door::new());
    let mut stop = inner.stop.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.changed() => break,
        };
        match accepted {
            Ok((stream, address)) => meet(&inner, &door, stream, address.to_string()),
            Err(error) => {
                tracing::warn!(%error, "accept");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    drop(listener);
    for (_, stranger) in door.strangers().waiting.drain(..) {
        stranger.abort();
    }
    // All of them: their tasks end by `stop`.
    let all = door.places.acquire_many(MAX_CONNECTIONS as u32);
    let _ = tokio::time::timeout(SHUTDOWN, all).await;
}

/// Gives a connection a task of its own, among the strangers first.
fn meet(inner: &Arc<Inner>, door: &Arc<Door>, stream: TcpStream, address: String) {
    // Held until it is entered, so that the task cannot be known before.
    let mut strangers = door.strangers();
    if strangers.waiting.len() >= MAX_STRANGERS
        && let Some((_, oldest)) = strangers.waiting.pop_front()
    {
        tracing::debug!("a connection was dropped: {MAX_STRANGERS} newer ones have not said who they are");
        oldest.abort();
    }
    strangers.last += 1;
    let number = strangers.last;
    let (inner, door, mut stop) = (inner.clone(), door.clone(), inner.stop.clone());
    let task = tokio::spawn(async move {
        let served = async {
            let served = serve(&inner, &door, number, stream, &address).await;
            door.known(number);
            served
        };
        tokio::select! {
            served = served => tell(&address, served),
            _ = stop.changed() => {}
        }
    });
    strangers.waiting.push_back((number, task.abort_handle()));
}

fn tell(peer: &str, served: Result<(), TransportError>) {
    match served {
        Ok(()) => {}
        // Someone has to do something about it.
        Err(
            error @ (TransportError::Untrusted { .. }
            | TransportError::Mixed { .. }
            | TransportError::Version { .. }),
        ) => tracing::warn!(peer, error = %in_full(&error), "a connection was refused"),
        Err(error) => tracing::debug!(peer, error = %in_full(&error), "a connection ended"),
    }
}

async fn serve(
    inner: &Arc<Inner>,
    door: &Arc<Door>,
    number: u64,
    stream: TcpStream,
    address: &str,
) -> Result<(), TransportError> {
    let (stream, who) = inner.identity.accept(stream, address).await?;
    let mut link = Link::new(stream, address);
    let (hello, version) = expect_hello(&mut link, "").await?;
    if !door.known(number) {
        return Ok(());
    }
    let _place = match door.enter(inner, &who) {
        Ok(place) => place,
        Err(why) => {
            tracing::warn!(address, %who, why, "refused");
            link.reject(Reject::BUSY, &why).await;
            return Ok(());
        }
    };
    tracing::debug!(address, %who, "connected");
    link.writer
        .send(0, &Message::Welcome(welcome(inner, version)))
        .await?;
    match hello.purpose {
        Purpose::Ship => {
            replicate::serve(inner.clone(), link, &who).await;
            Ok(())
        }
        Purpose::Call => calls::serve(inner.clone(), link, &who).await,
    }
}
