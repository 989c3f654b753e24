//! The guest's console: what it says as a stream, what is typed as requests.
//!
//! A stream begins at a position (bytes since the VM was made in this process) or at the oldest byte that is kept,
//! and follows. The guest never waits for a reader; one that is too slow finds a note in the stream that says how
//! much it missed.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa::ToSchema;

use crate::api::fault::{Fault, FaultMessage, Raw};
use crate::api::instance::Instance;
use crate::outbox::{Outbox, Output};

type App = State<Arc<Instance>>;

/// The most streams at once in this process. Fewer than there can be connections: a socket full of readers can
/// still be told to stop.
pub const MAX_STREAMS: usize = 24;
/// The position of the stream's first byte, in an answer's header.
pub const POSITION_HEADER: &str = "understudy-console-position";
/// How long a stream waits for output before it looks whether its reader is still there.
const TURN: Duration = Duration::from_millis(250);
/// How long a request to type waits for a guest that does not read.
const TYPING_DEADLINE: Duration = Duration::from_secs(2);
/// How often it looks whether the guest has read.
const TYPING_TURN: Duration = Duration::from_millis(2);

static STREAMS: AtomicUsize = AtomicUsize::new(0);

/// Which part of the console.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::api) struct Part {
    from: Option<u64>,
    follow: Option<bool>,
}

/// How much was typed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Typed {
    /// Bytes that the guest's serial port took; the rest was not typed.
    pub taken: usize,
}

#[utoipa::path(get, path = "/console", tag = "understudy",
    params(("from" = Option<u64>, Query, description = "the first position; the oldest that is kept when left out"),
           ("follow" = Option<bool>, Query, description = "go on with what the guest says (true by default)")),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>),
              (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn read(
    State(app): App,
    query: Result<Query<Part>, QueryRejection>,
) -> Result<Response, Fault> {
    let Query(Part { from, follow }) = query.map_err(|error| Fault::bad(error.body_text()))?;
    let outbox = app.started()?.vm().outbox().clone();
    let place = Place::take()?;
    let start = outbox.start();
    let from = from.unwrap_or(start);
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (
            header::HeaderName::from_static(POSITION_HEADER),
            from.clamp(start, outbox.end().max(start)).to_string(),
        ),
    ];
    let (to, body) = mpsc::channel(4);
    let follow = follow.unwrap_or(true);
    // The outbox is waited for by blocking, so each stream has a thread.
    std::thread::Builder::new()
        .name("console".into())
        .spawn(move || stream(&outbox, from, follow, &to, place))
        .map_err(|error| Fault::busy(format!("start a thread for the console: {error}")))?;
    Ok((headers, axum::body::Body::new(Stream(body))).into_response())
}

fn stream(outbox: &Outbox, from: u64, follow: bool, to: &mpsc::Sender<Bytes>, _place: Place) {
    let mut position = from;
    while !to.is_closed() {
        let wait = if follow { TURN } else { Duration::ZERO };
        let Output {
            bytes,
            lost,
            next,
            closed,
        } = outbox.read(position, wait);
        // A position before the oldest kept byte at the start is no loss of this reader's.
        if lost > 0 && position != from {
            let note =
                format!("\r\n[vmm: {lost} bytes of output came too fast for this reader and are lost]\r\n");
            if to.blocking_send(note.into()).is_err() {
                return;
            }
        }
        position = next;
        let empty = bytes.is_empty();
        if !empty && to.blocking_send(bytes.into()).is_err() {
            return;
        }
        if !follow || (closed && empty) {
            return;
        }
    }
}

/// One of [`MAX_STREAMS`].
struct Place;

impl Place {
    fn take() -> Result<Self, Fault> {
        if STREAMS.fetch_add(1, Ordering::Relaxed) < MAX_STREAMS {
            return Ok(Self);
        }
        STREAMS.fetch_sub(1, Ordering::Relaxed);
        Err(Fault::busy(format!(
            "{MAX_STREAMS} readers are attached to the console already: leave one of them"
        )))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        STREAMS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body that ends when its sender does.
struct Stream(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Stream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0
            .poll_recv(context)
            .map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

#[utoipa::path(post, path = "/console", tag = "understudy",
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = Typed), (status = 400, body = FaultMessage)))]
pub(in crate::api) async fn write(State(app): App, Raw(bytes): Raw) -> Result<Json<Typed>, Fault> {
    let session = app.started()?;
    let deadline = Instant::now() + TYPING_DEADLINE;
    let mut taken = 0;
    loop {
        taken += session.vm().input(&bytes[taken..]);
        if taken == bytes.len() || Instant::now() >= deadline {
            return Ok(Json(Typed { taken }));
        }
        tokio::time::sleep(TYPING_TURN).await;
    }
}
