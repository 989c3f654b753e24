//! `GET /metrics`: plain HTTP/1.1, for whoever reaches the port.
//!
//! Invariants: one answer a connection; at most [`MAX_OPEN`] connections, of which the oldest gives way; each has
//! [`DEADLINE`] in all and [`HEADER_DEADLINE`] for its headers. Who is slow, or sends what is no HTTP, keeps nobody else out:
//! an honest scrape takes milliseconds.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use super::super::{ACCEPT_AGAIN, AgentError, Inner};
use crate::openmetrics;

/// The most connections at once.
const MAX_OPEN: usize = 16;
/// How long the headers of a request may take.
const HEADER_DEADLINE: Duration = Duration::from_secs(5);
/// How long a connection may take in all.
const DEADLINE: Duration = Duration::from_secs(15);
/// The most bytes of a request's line and headers. hyper takes no less than 8 KiB.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// The most headers.
const MAX_HEADERS: usize = 64;
const PATH: &str = "/metrics";

/// Opens the port; where it is.
///
/// # Errors
/// [`AgentError::Metrics`].
pub(in crate::agent) async fn listen(wanted: &str) -> Result<(TcpListener, SocketAddr), AgentError> {
    let failed = |source| AgentError::Metrics {
        listen: wanted.to_owned(),
        source,
    };
    let listener = TcpListener::bind(wanted).await.map_err(failed)?;
    let at = listener.local_addr().map_err(failed)?;
    Ok((listener, at))
}

/// Serves until the agent stops.
pub(in crate::agent) async fn serve(inner: Arc<Inner>, listener: TcpListener) {
    let mut stop = inner.stop.clone();
    // Ended when they are dropped.
    let (mut tasks, mut open) = (JoinSet::new(), VecDeque::<AbortHandle>::new());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.changed() => return,
        };
        while tasks.try_join_next().is_some() {}
        open.retain(|task| !task.is_finished());
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept a scrape");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        if open.len() >= MAX_OPEN
            && let Some(oldest) = open.pop_front()
        {
            tracing::debug!("a scrape was dropped: {MAX_OPEN} newer ones are open");
            oldest.abort();
        }
        let inner = inner.clone();
        open.push_back(tasks.spawn(async move {
            match tokio::time::timeout(DEADLINE, one(inner, stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%peer, %error, "a scrape ended"),
                Err(_) => tracing::debug!(%peer, "a scrape took too long"),
            }
        }));
    }
}

async fn one(inner: Arc<Inner>, stream: TcpStream) -> hyper::Result<()> {
    let answer = service_fn(move |request| {
        let inner = inner.clone();
        async move { Ok::<_, Infallible>(answer(inner, &request).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_DEADLINE)
        .keep_alive(false)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), answer)
        .await
}

async fn answer(inner: Arc<Inner>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if request.uri().path() != PATH {
        return said(StatusCode::NOT_FOUND, format!("only {PATH} is here\n"));
    }
    if request.method() != Method::GET {
        let mut response = said(
            StatusCode::METHOD_NOT_ALLOWED,
            format!("only GET of {PATH} is possible\n"),
        );
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    let agent = inner.clone();
    let _turn = inner.metrics.scraping.lock().await;
    let text = tokio::task::spawn_blocking(move || agent.metrics.text(&agent)).await;
    match text {
        Ok(Ok(text)) => {
            let mut response = said(StatusCode::OK, text);
            response
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static(openmetrics::CONTENT_TYPE));
            response
        }
        Ok(Err(_)) | Err(_) => {
            tracing::error!("the metrics could not be told");
            said(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the metrics could not be told: see the agent's log\n".into(),
            )
        }
    }
}

fn said(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}
