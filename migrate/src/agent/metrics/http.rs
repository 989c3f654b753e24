//! `GET /metrics`: plain HTTP/1.1, for whoever reaches the port.
//!
//! Invariants: one answer a connection; at most [`Limits::open`] connections, of which the oldest gives way; each has
//! [`Limits::all`] in all and [`Limits::headers`] for its headers. Who is slow, or sends what is no HTTP, keeps nobody else
//! out: an honest scrape takes milliseconds.

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
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::super::{ACCEPT_AGAIN, AgentError, Inner};
use crate::openmetrics;

/// How many connections there may be, and how long one may take.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// The most at once.
    open: usize,
    /// How long the headers of a request may take.
    headers: Duration,
    /// How long one may take in all.
    all: Duration,
}

const LIMITS: Limits = Limits {
    open: 16,
    headers: Duration::from_secs(5),
    all: Duration::from_secs(15),
};
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
    let stop = inner.stop.clone();
    serve_within(LIMITS, listener, stop, move || told(inner.clone())).await;
}

/// The text; none when it could not be told.
async fn told(inner: Arc<Inner>) -> Option<String> {
    let agent = inner.clone();
    let _turn = inner.metrics.scraping.lock().await;
    let text = tokio::task::spawn_blocking(move || agent.metrics.text(&agent)).await;
    text.ok()?.ok()
}

async fn serve_within<T>(
    limits: Limits,
    listener: TcpListener,
    mut stop: watch::Receiver<bool>,
    tell: impl Fn() -> T + Clone + Send + Sync + 'static,
) where
    T: Future<Output = Option<String>> + Send + 'static,
{
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
        if open.len() >= limits.open
            && let Some(oldest) = open.pop_front()
        {
            tracing::debug!("a scrape was dropped: {} newer ones are open", limits.open);
            oldest.abort();
        }
        let one = one(stream, limits.headers, tell.clone());
        open.push_back(tasks.spawn(async move {
            match tokio::time::timeout(limits.all, one).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%peer, %error, "a scrape ended"),
                Err(_) => tracing::debug!(%peer, "a scrape took too long"),
            }
        }));
    }
}

async fn one<T: Future<Output = Option<String>>>(
    stream: TcpStream,
    headers: Duration,
    tell: impl Fn() -> T + Clone,
) -> hyper::Result<()> {
    let answer = service_fn(move |request| {
        let tell = tell.clone();
        async move { Ok::<_, Infallible>(answer(&request, tell).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(headers)
        .keep_alive(false)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), answer)
        .await
}

async fn answer<T: Future<Output = Option<String>>>(
    request: &Request<Incoming>,
    tell: impl Fn() -> T,
) -> Response<Full<Bytes>> {
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
    let Some(text) = tell().await else {
        tracing::error!("the metrics could not be told");
        return said(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the metrics could not be told: see the agent's log\n".into(),
        );
    };
    let mut response = said(StatusCode::OK, text);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(openmetrics::CONTENT_TYPE));
    response
}

fn said(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Longer than anything here takes on a slow machine.
    const PATIENCE: Duration = Duration::from_secs(60);
    const EVER: Duration = Duration::from_secs(3600);
    const HALF: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: ";
    const WHOLE: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n";

    /// A server that tells `text`; it ends with what is returned.
    async fn served(limits: Limits, text: Option<&'static str>) -> (SocketAddr, watch::Sender<bool>) {
        let (listener, at) = listen("127.0.0.1:0").await.unwrap();
        let (end, stop) = watch::channel(false);
        let tell = move || async move { text.map(str::to_owned) };
        tokio::spawn(serve_within(limits, listener, stop, tell));
        (at, end)
    }

    async fn connected(at: SocketAddr, says: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(says).await.unwrap();
        stream
    }

    /// What is answered, until the server closes.
    async fn rest(stream: &mut TcpStream) -> String {
        let mut answer = Vec::new();
        let reading = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        match reading.expect("the server closes") {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn of_too_many_the_oldest_gives_way_and_no_other() {
        let limits = Limits {
            open: 3,
            headers: EVER,
            all: EVER,
        };
        let (at, _end) = served(limits, Some("told")).await;
        let mut slow = VecDeque::new();
        for says in [b"", HALF, b"", HALF, b"", HALF] as [&[u8]; 6] {
            slow.push_back(connected(at, says).await);
            if slow.len() > limits.open {
                assert_eq!(rest(&mut slow.pop_front().unwrap()).await, "");
            }
        }
        // The others were waited for, however long it took.
        for mut stream in slow {
            let more = b"a\r\n\r\n";
            stream.write_all(more).await.unwrap();
            let answer = rest(&mut stream).await;
            assert!(answer.starts_with("HTTP/1.1 "), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn who_says_too_little_runs_out_of_time() {
        let soon = Duration::from_millis(10);
        for (headers, all) in [(soon, EVER), (EVER, soon)] {
            let limits = Limits {
                open: 3,
                headers,
                all,
            };
            let (at, _end) = served(limits, Some("told")).await;
            assert_eq!(rest(&mut connected(at, HALF).await).await, "", "{limits:?}");
            assert_eq!(rest(&mut connected(at, b"").await).await, "", "{limits:?}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_told_is_said() {
        let (at, end) = served(LIMITS, None).await;
        let answer = rest(&mut connected(at, WHOLE).await).await;
        assert!(answer.starts_with("HTTP/1.1 500 "), "{answer:?}");
        let mut open = connected(at, HALF).await;
        end.send_replace(true);
        assert_eq!(rest(&mut open).await, "");
    }
}
