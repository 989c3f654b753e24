//! The socket: who may connect, how many, how much, and how it goes away.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Frame, SizeHint};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::instance::Instance;
use super::places::{Busy, Place, Places};
use super::routes;
pub use crate::socket::{MAX_SOCKET_PATH_BYTES, Socket, SocketError};

/// Connections served at once; beyond, an idle one gives way.
const MAX_CONNECTIONS: usize = 64;
/// Headers of a request.
const MAX_HEADERS: usize = 64;
/// Bytes of a request's line and headers, and of what is buffered of a body.
const MAX_BUFFER_BYTES: usize = 64 << 10;
/// How long a client may take to send its headers, and an idle connection stays open.
const HEADER_DEADLINE: Duration = Duration::from_secs(30);
/// How long answers that are under way are given at the end.
const GRACE: Duration = Duration::from_secs(2);
/// The pause after a connection could not be accepted, for want of file descriptors for example.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// A control socket that is served.
#[derive(Debug)]
pub struct Server {
    socket: Socket,
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Serves `instance` on `socket`. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the runtime does not take the socket.
    pub fn start(socket: Socket, instance: Arc<Instance>) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Bind {
            path: socket.path().to_owned(),
            source,
        };
        let listener = socket
            .listener()
            .try_clone()
            .and_then(UnixListener::from_std)
            .map_err(failed)?;
        let (stop, stopped) = watch::channel(false);
        let accepting = tokio::spawn(accept(listener, instance, stopped));
        Ok(Self {
            socket,
            stop,
            accepting,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// Takes no more requests and gives the answers under way a moment to be sent.
    pub async fn shut_down(self) {
        self.stop.send_replace(true);
        if self.accepting.await.is_err() {
            tracing::warn!(socket = ?self.socket.path(), "the control socket's server failed");
        }
    }
}

async fn accept(listener: UnixListener, instance: Arc<Instance>, mut stop: watch::Receiver<bool>) {
    let router = routes::router(instance);
    let places = Places::new(MAX_CONNECTIONS);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        // An idle one gives way; when all are at work, the next waits for its turn here, and others in the queue.
        let place = tokio::select! {
            place = places.enter() => place,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) => {
                let (router, stop) = (router.clone(), stop.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = serve(stream, marked(router, &place), stop) => {}
                        () = place.given_away() => tracing::debug!("an idle control connection gave way"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a control connection could not be accepted");
                tokio::time::sleep(AFTER_FAILURE).await;
            }
        }
    }
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, all).await.is_err() {
        connections.shutdown().await;
    }
}

/// Every request marks its connection as at work, until the last of its answer is sent.
fn marked(router: axum::Router, place: &Place) -> axum::Router {
    let busy = place.marker();
    router.layer(axum::middleware::from_fn(
        move |request: axum::extract::Request, next: axum::middleware::Next| {
            let busy = busy();
            async move {
                next.run(request)
                    .await
                    .map(|body| axum::body::Body::new(Held { body, _busy: busy }))
            }
        },
    ))
}

/// A body whose connection is at work until it has been sent.
struct Held {
    body: axum::body::Body,
    _busy: Busy,
}

impl hyper::body::Body for Held {
    type Data = axum::body::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        hyper::body::Body::size_hint(&self.body)
    }
}

async fn serve(stream: UnixStream, router: axum::Router, mut stop: watch::Receiver<bool>) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_DEADLINE)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let stopped = async { drop(stop.wait_for(|stop| *stop).await) };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "control connection");
    }
}
