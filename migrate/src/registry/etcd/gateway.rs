//! etcd's JSON gateway: HTTP/1.1 on kept connections, one member after the other until one answers.
//!
//! Every question has a deadline at each member, so that one that hangs costs that long once: the member that answered
//! last is asked first. What an answer says of the cluster's history is checked against what was seen before.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::access::Access;
use crate::registry::RegistryError;
use crate::registry::addr::EtcdAddr;
use crate::registry::seen::{Seen, Stamp};

/// How long one member may take, connecting included.
const ATTEMPT: Duration = Duration::from_secs(2);
/// The most bytes of one answer: a page of records in base64.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// The most connections that are kept to one member.
const MAX_IDLE: usize = 8;

/// Why etcd did not do it.
#[derive(Debug)]
pub(super) enum GatewayError {
    /// No member answered in time.
    Away(String),
    /// There is no such thing (a lease).
    NotFound,
    /// It is there already (a lease).
    Exists,
    /// As the registry says it.
    Registry(RegistryError),
}

/// An answer.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) body: Value,
    pub(super) stamp: Stamp,
}

#[derive(Debug)]
struct Member {
    address: String,
    // Connections nobody uses now; held to take or put one.
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// The members of one etcd.
pub(super) struct Gateway {
    address: String,
    members: Vec<Member>,
    access: Access,
    /// Answered last.
    current: AtomicUsize,
    // What authentication gave; replaced when it is over.
    token: Mutex<Option<String>>,
    pub(super) seen: Seen,
}

/// Why one try failed.
enum Tried {
    /// This member, not the question: another may answer.
    Member(String),
    /// The token is over.
    Token,
    Answered(GatewayError),
}

impl Gateway {
    pub(super) fn new(addr: &EtcdAddr, access: Access) -> Self {
        let member = |address: &String| Member {
            address: address.clone(),
            idle: Mutex::default(),
        };
        Self {
            address: addr.to_string(),
            members: addr.endpoints.iter().map(member).collect(),
            access,
            current: AtomicUsize::new(0),
            token: Mutex::new(None),
            seen: Seen::default(),
        }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The member to ask first.
    pub(super) fn preferred(&self) -> usize {
        self.current.load(Ordering::Relaxed) % self.members.len()
    }

    /// The members, the one to ask first before the others.
    pub(super) fn order(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, all) = (self.preferred(), self.members.len());
        (0..all).map(move |i| (first + i) % all)
    }

    /// Asks any member about keys: the answer is checked not to be from the past.
    pub(super) async fn keys(&self, path: &str, body: &Value) -> Result<Said, GatewayError> {
        let mut failures = Vec::new();
        for member in self.order() {
            match self.at(member, path, body, true).await {
                Err(GatewayError::Away(why)) => failures.push(why),
                other => return other,
            }
        }
        Err(GatewayError::Away(failures.join("; ")))
    }

    /// Asks any member about leases, whose answers do not say where they stand among the keys.
    pub(super) async fn leases(&self, path: &str, body: &Value) -> Result<Said, GatewayError> {
        let mut failures = Vec::new();
        for member in self.order() {
            match self.at(member, path, body, false).await {
                Err(GatewayError::Away(why)) => failures.push(why),
                other => return other,
            }
        }
        Err(GatewayError::Away(failures.join("; ")))
    }

    /// Asks one member.
    pub(super) async fn at(
        &self,
        member: usize,
        path: &str,
        body: &Value,
        ordered: bool,
    ) -> Result<Said, GatewayError> {
        let floor = self.seen.floor();
        let body = match self.try_at(member, path, body).await {
            Ok(body) => body,
            Err(Tried::Member(why)) => {
                let address = &self.members[member].address;
                return Err(GatewayError::Away(format!("{address}: {why}")));
            }
            Err(Tried::Token) => {
                return Err(self.denied("it does not take its own token".into()));
            }
            Err(Tried::Answered(error)) => return Err(error),
        };
        self.current.store(member, Ordering::Relaxed);
        // Of a stream, one answer is wrapped.
        let body = match body {
            Value::Object(mut map) if map.contains_key("result") => map.remove("result").unwrap_or_default(),
            other => other,
        };
        let stamp = stamp(&body["header"]).ok_or_else(|| self.odd("an answer without a header"))?;
        if ordered {
            self.seen
                .note(&self.address, floor, stamp)
                .map_err(GatewayError::Registry)?;
        } else if floor.is_some_and(|floor| floor.registry != stamp.registry) {
            let floor = floor.map(|f| Stamp {
                revision: 0,
                term: 0,
                ..f
            });
            self.seen
                .note(&self.address, floor, stamp)
                .map_err(GatewayError::Registry)?;
        }
        Ok(Said { body, stamp })
    }

    async fn try_at(&self, member: usize, path: &str, body: &Value) -> Result<Value, Tried> {
        let mut fresh = false;
        loop {
            let token = self.token(member).await?;
            match self.exchange(member, path, body, token.as_deref()).await {
                // Tokens run out, and do not outlive a member's restart: once more with another.
                Err(Tried::Token) if !fresh => {
                    fresh = true;
                    *self.token.lock().unwrap_or_else(PoisonError::into_inner) = None;
                }
                other => return other,
            }
        }
    }

    async fn token(&self, member: usize) -> Result<Option<String>, Tried> {
        let Some((user, password)) = &self.access.login else {
            return Ok(None);
        };
        let known = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if known.is_some() {
            return Ok(known);
        }
        let login = json!({ "name": user, "password": password });
        let answer = match self.exchange(member, "auth/authenticate", &login, None).await {
            // An etcd without authentication takes everyone.
            Err(Tried::Answered(GatewayError::Registry(RegistryError::Denied { why, .. })))
                if why.contains("not enabled") =>
            {
                return Ok(None);
            }
            other => other?,
        };
        let token = answer["token"].as_str().map(str::to_owned);
        token.clone_into(&mut self.token.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(token)
    }

    /// One question on one connection.
    async fn exchange(
        &self,
        member: usize,
        path: &str,
        body: &Value,
        token: Option<&str>,
    ) -> Result<Value, Tried> {
        let answered = tokio::time::timeout(ATTEMPT, async {
            let (response, connection) = self.send(member, path, body, token).await?;
            let status = response.status();
            let collected = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
                .collect()
                .await;
            let bytes = collected.map_err(|e| Tried::Member(e.to_string()))?.to_bytes();
            self.keep(member, connection);
            Ok((status, bytes))
        });
        let (status, bytes) = match answered.await {
            Ok(answered) => answered?,
            Err(_) => return Err(Tried::Member(format!("no answer within {} s", ATTEMPT.as_secs()))),
        };
        let value: Value = serde_json::from_slice(&bytes)
            .map_err(|e| Tried::Member(format!("it answered no JSON ({status}): {e}")))?;
        match &value["error"] {
            Value::Null if status == StatusCode::OK => Ok(value),
            error => Err(self.failed(status, error, &value)),
        }
    }

    /// Sends a question; the answer's body is still to be read.
    async fn send(
        &self,
        member: usize,
        path: &str,
        body: &Value,
        token: Option<&str>,
    ) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), Tried> {
        let failed = |e: &dyn std::error::Error| Tried::Member(crate::transport::in_full(e));
        let bytes = Bytes::from(body.to_string());
        loop {
            let kept = {
                let idle = &self.members[member].idle;
                idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
            };
            let old = kept.is_some();
            let mut connection = match kept {
                Some(kept) => kept,
                None => self.connect(member).await.map_err(|e| failed(&e))?,
            };
            let mut request = Request::builder()
                .method(Method::POST)
                .uri(format!("/v3/{path}"))
                .header(HOST, &self.members[member].address)
                .header(CONTENT_TYPE, "application/json");
            if let Some(token) = token {
                request = request.header(AUTHORIZATION, token);
            }
            let request = request.body(Full::new(bytes.clone())).map_err(|e| failed(&e))?;
            let sent = match connection.ready().await {
                Ok(()) => connection.send_request(request).await,
                Err(e) => Err(e),
            };
            match sent {
                Ok(response) => return Ok((response, connection)),
                // A kept one may have died unseen. Every question may be repeated.
                Err(_) if old => {}
                Err(e) => return Err(failed(&e)),
            }
        }
    }

    async fn connect(&self, member: usize) -> io::Result<SendRequest<Full<Bytes>>> {
        let address = &self.members[member].address;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        match &self.access.tls {
            None => begin(stream).await,
            Some(tls) => {
                let host = address
                    .rsplit_once(':')
                    .map_or(address.as_str(), |(host, _)| host);
                let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                let name = ServerName::try_from(host).map_err(io::Error::other)?;
                begin(TlsConnector::from(Arc::clone(tls)).connect(name, stream).await?).await
            }
        }
    }

    fn keep(&self, member: usize, connection: SendRequest<Full<Bytes>>) {
        let mut idle = self.members[member]
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE && !connection.is_closed() {
            idle.push(connection);
        }
    }

    /// Begins a stream of answers at a member.
    pub(super) async fn stream(
        &self,
        member: usize,
        path: &str,
        body: &Value,
    ) -> Result<Incoming, GatewayError> {
        let begun = tokio::time::timeout(ATTEMPT, async {
            let token = self.token(member).await?;
            // The connection ends with the body; it is not kept.
            self.send(member, path, body, token.as_deref()).await
        });
        let away = |why: String| GatewayError::Away(format!("{}: {why}", self.members[member].address));
        match begun.await {
            Ok(Ok((response, _))) if response.status() == StatusCode::OK => Ok(response.into_body()),
            Ok(Ok((response, _))) => {
                *self.token.lock().unwrap_or_else(PoisonError::into_inner) = None;
                Err(away(response.status().to_string()))
            }
            Ok(Err(Tried::Member(why))) => Err(away(why)),
            Ok(Err(Tried::Token)) => Err(away("it does not take its own token".into())),
            Ok(Err(Tried::Answered(error))) => Err(error),
            Err(_) => Err(away(format!("no answer within {} s", ATTEMPT.as_secs()))),
        }
    }

    fn denied(&self, why: String) -> GatewayError {
        GatewayError::Registry(RegistryError::Denied {
            address: self.address.clone(),
            why,
        })
    }

    pub(super) fn odd(&self, what: &str) -> GatewayError {
        GatewayError::Registry(RegistryError::Storage {
            why: format!("etcd at {} gave {what}: is it another service?", self.address),
        })
    }

    /// By the gRPC status codes that the gateway passes on.
    fn failed(&self, status: StatusCode, error: &Value, value: &Value) -> Tried {
        let message = error
            .as_str()
            .or_else(|| error["message"].as_str())
            .unwrap_or_default();
        let message = message.trim_start_matches("etcdserver: ");
        let code = value["code"].as_i64().or_else(|| error["grpc_code"].as_i64());
        let says = |part: &str| message.contains(part);
        match code {
            Some(5) if says("lease not found") => Tried::Answered(GatewayError::NotFound),
            Some(9) if says("lease already exists") => Tried::Answered(GatewayError::Exists),
            Some(16) => Tried::Token,
            Some(7) => Tried::Answered(self.denied(message.to_owned())),
            Some(3 | 9) if says("auth") || says("user") => Tried::Answered(self.denied(message.to_owned())),
            Some(8) => Tried::Answered(GatewayError::Registry(RegistryError::Storage {
                why: format!("etcd at {}: {message}", self.address),
            })),
            Some(3 | 9 | 11) => Tried::Answered(GatewayError::Registry(RegistryError::Invalid {
                why: format!("etcd at {} does not take it: {message}", self.address),
            })),
            // No leader, the leader changed, too slow; and what we do not know: another member may do it.
            Some(_) | None => Tried::Member(format!("{message} ({status})")),
        }
    }
}

async fn begin<S>(stream: S) -> io::Result<SendRequest<Full<Bytes>>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    // Ends when the sender is dropped, or the other end hangs up.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to etcd ended");
        }
    });
    Ok(sender)
}

/// Numbers of 64 bits are text in etcd's JSON.
pub(super) fn number(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => number.as_u64(),
        _ => None,
    }
}

fn stamp(header: &Value) -> Option<Stamp> {
    Some(Stamp {
        registry: number(&header["cluster_id"])?,
        revision: number(&header["revision"]).unwrap_or(0),
        term: number(&header["raft_term"]).unwrap_or(0),
    })
}

/// A header's revision and cluster, of a stream's answer.
pub(super) fn stamp_of(body: &Value) -> Option<Stamp> {
    stamp(&body["header"])
}
