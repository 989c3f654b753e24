//! The links between hosts, as proxies in the middle: what a host dials is passed on as long as the link between the two lets
//! it.
//!
//! ```text
//!   birch dials alder's address --> 10.77.0.21:7400 --link(alder, birch)--> 10.77.0.11:7400, where alder's agent listens
//!   birch dials the registry   ---> 10.77.0.2:2379 ---link(birch, etcd)---> 10.77.0.1:2379
//! ```
//!
//! Who dials is known by its address. What a host says to itself always passes.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::hosts::address;

/// What is under way in one direction at most, in pieces.
const PIECES: usize = 256;
const PIECE_BYTES: usize = 16 << 10;

/// How a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    /// What is said arrives.
    Open,
    /// It arrives so much later.
    Delayed(Duration),
    /// Nothing arrives, and nobody is told.
    Cut,
    /// Connections are ended, and new ones too.
    Broken,
}

/// A host, by its number from 0, or the registry, which comes after them.
pub(super) type End = usize;

/// All links, and the thread that passes on what is said; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Links {
    links: HashMap<(End, End), watch::Sender<Link>>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

fn pair(a: End, b: End) -> (End, End) {
    (a.min(b), a.max(b))
}

impl Links {
    /// All links between `ends`, of which each has an address where it is dialled and one where it really is.
    pub(super) fn start(ends: &[(SocketAddr, SocketAddr)]) -> Result<Self> {
        let mut links = HashMap::new();
        for a in 0..ends.len() {
            for b in a + 1..ends.len() {
                links.insert((a, b), watch::Sender::new(Link::Open));
            }
        }
        let (end, ended) = oneshot::channel();
        let (ready, is_ready) = channel();
        let (all, ends) = (links.clone(), ends.to_vec());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime")?;
        let thread = std::thread::Builder::new()
            .name("links".into())
            .spawn(move || runtime.block_on(serve(&ends, &all, ended, &ready)))
            .context("start the links")?;
        is_ready
            .recv()
            .map_err(|_| anyhow!("the links did not come up"))??;
        Ok(Self {
            links,
            end: Some(end),
            thread: Some(thread),
        })
    }

    /// The pairs of ends that have a link, in order.
    pub(super) fn pairs(&self) -> Vec<(End, End)> {
        let mut pairs: Vec<_> = self.links.keys().copied().collect();
        pairs.sort_unstable();
        pairs
    }

    /// Makes a link so.
    pub(super) fn set(&self, between: (End, End), to: Link) {
        if let Some(link) = self.links.get(&pair(between.0, between.1)) {
            link.send_replace(to);
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by itself.
            let _ = thread.join();
        }
    }
}

async fn serve(
    ends: &[(SocketAddr, SocketAddr)],
    links: &HashMap<(End, End), watch::Sender<Link>>,
    ended: oneshot::Receiver<()>,
    ready: &Sender<Result<()>>,
) {
    for (to, (dialled, real)) in ends.iter().enumerate() {
        let listener = match TcpListener::bind(dialled).await {
            Ok(listener) => listener,
            Err(error) => {
                let error = anyhow!(error).context(format!("listen on {dialled}"));
                // Who waits for it is told, or gone.
                let _ = ready.send(Err(error));
                return;
            }
        };
        let (links, real) = (links.clone(), *real);
        tokio::spawn(async move {
            loop {
                let Ok((stream, from)) = listener.accept().await else {
                    // No more files for a moment.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                };
                let link = from_host(from.ip()).and_then(|from| links.get(&pair(from, to)));
                let link = link.map(watch::Sender::subscribe);
                tokio::spawn(pass(stream, real, link));
            }
        });
    }
    let _ = ready.send(Ok(()));
    // Sent or dropped, it is the end.
    let _ = ended.await;
}

fn from_host(ip: IpAddr) -> Option<End> {
    let IpAddr::V4(ip) = ip else { return None };
    (0..90).find(|host| address(11 + host) == ip).map(usize::from)
}

/// Passes on what is said in one connection. Without a link everything passes.
async fn pass(stream: TcpStream, real: SocketAddr, link: Option<watch::Receiver<Link>>) {
    let link = link.unwrap_or_else(|| watch::channel(Link::Open).1);
    let mut broken = link.clone();
    let broken = async {
        if broken.wait_for(|link| *link == Link::Broken).await.is_err() {
            // Nobody will break it any more.
            std::future::pending::<()>().await;
        }
    };
    let passing = async {
        opened(&mut link.clone()).await;
        let Ok(other) = TcpStream::connect(real).await else {
            return;
        };
        // As it would be without anyone in between.
        let _ = (stream.set_nodelay(true), other.set_nodelay(true));
        let (near_in, near_out) = stream.into_split();
        let (far_in, far_out) = other.into_split();
        tokio::join!(
            one_way(near_in, far_out, link.clone()),
            one_way(far_in, near_out, link.clone())
        );
    };
    tokio::select! {
        () = passing => {}
        () = broken => {}
    }
}

/// Waits until something may pass; how much later it arrives.
async fn opened(link: &mut watch::Receiver<Link>) -> Duration {
    match link
        .wait_for(|link| matches!(link, Link::Open | Link::Delayed(_)))
        .await
        .as_deref()
    {
        Ok(Link::Delayed(by)) => *by,
        Ok(_) | Err(_) => Duration::ZERO,
    }
}

async fn one_way(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut link: watch::Receiver<Link>,
) {
    let (under_way, mut arriving) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES);
    let mut arrival = link.clone();
    let leave = async move {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let read = from.read(&mut piece).await.unwrap_or(0);
            let by = opened(&mut link).await;
            if read == 0
                || under_way
                    .send((Instant::now() + by, piece[..read].to_vec()))
                    .await
                    .is_err()
            {
                return;
            }
        }
    };
    let arrive = async move {
        while let Some((due, piece)) = arriving.recv().await {
            tokio::time::sleep_until(due).await;
            opened(&mut arrival).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        // The other end may be gone.
        let _ = to.shutdown().await;
    };
    tokio::join!(leave, arrive);
}
