//! A client of the control API, for the command line and for tests.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::fault::FaultMessage;
use super::resources::console::{POSITION_HEADER, Typed};
use super::server::MAX_SOCKET_PATH_BYTES;

/// How long an answer may take, unless said otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);
/// The longest answer that is read whole.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Why a request was not answered, or with a no.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("connect to the VM's control socket {socket:?}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("talk to the VM at {socket:?}")]
    Http {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It takes too long.
    #[error("the VM at {socket:?} did not answer {method} {path} within {} s", deadline.as_secs())]
    Deadline {
        /// The socket.
        socket: PathBuf,
        /// The request's verb.
        method: Method,
        /// The request's path.
        path: String,
        /// How long was waited.
        deadline: Duration,
    },
    /// It said no.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// What the VM said.
        message: String,
    },
    /// The answer is not of the form that was expected.
    #[error("the VM at {socket:?} answered {path} in a form this version does not know")]
    Form {
        /// The socket.
        socket: PathBuf,
        /// The request's path.
        path: String,
        /// What does not fit.
        #[source]
        source: serde_json::Error,
    },
}

impl ClientError {
    /// Whether there is no process that listens on the socket.
    #[must_use]
    pub fn nobody_there(&self) -> bool {
        match self {
            Self::Connect { source, .. } => {
                matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                )
            }
            Self::Http { .. } | Self::Deadline { .. } | Self::Refused { .. } | Self::Form { .. } => false,
        }
    }
}

/// A client of one VM. Each request has a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    deadline: Duration,
}

impl Client {
    /// A client of the VM that listens on `socket`.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            deadline: DEFAULT_DEADLINE,
        }
    }

    /// The same, with another bound on the time to an answer.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Gets a resource.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.parsed(Method::GET, path, Bytes::new()).await
    }

    /// Sends JSON and reads JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.parsed(Method::POST, path, self.json(path, body)?).await
    }

    /// Sends JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put(&self, path: &str, body: &impl Serialize) -> Result<(), ClientError> {
        self.answer(Method::PUT, path, self.json(path, body)?)
            .await
            .map(drop)
    }

    /// Sends JSON, and reads what came of it as JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put_for<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.parsed(Method::PUT, path, self.json(path, body)?).await
    }

    /// Sends a change as JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn patch(&self, path: &str, body: &impl Serialize) -> Result<(), ClientError> {
        self.answer(Method::PATCH, path, self.json(path, body)?)
            .await
            .map(drop)
    }

    /// Takes a resource away.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.answer(Method::DELETE, path, Bytes::new()).await.map(drop)
    }

    /// Types into the console; returns how many bytes the guest took.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn type_in(&self, bytes: Bytes) -> Result<usize, ClientError> {
        let typed: Typed = self.parsed(Method::POST, "/console", bytes).await?;
        Ok(typed.taken)
    }

    /// Reads the console, from `from` or from the oldest that is kept.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn console(&self, from: Option<u64>, follow: bool) -> Result<Console, ClientError> {
        let from = from.map_or(String::new(), |from| format!("&from={from}"));
        let path = format!("/console?follow={follow}{from}");
        let response = self.checked(Method::GET, &path, Bytes::new()).await?;
        let position = response
            .headers()
            .get(POSITION_HEADER)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Console {
            socket: self.socket.clone(),
            position: position.unwrap_or(0),
            body: response.into_body(),
        })
    }

    fn json(&self, path: &str, body: &impl Serialize) -> Result<Bytes, ClientError> {
        serde_json::to_vec(body)
            .map(Bytes::from)
            .map_err(|source| self.form(path, source))
    }

    fn form(&self, path: &str, source: serde_json::Error) -> ClientError {
        ClientError::Form {
            socket: self.socket.clone(),
            path: path.to_owned(),
            source,
        }
    }

    fn http(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Http {
            socket: self.socket.clone(),
            source: source.into(),
        }
    }

    async fn parsed<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let answer = self.answer(method, path, body).await?;
        serde_json::from_slice(&answer).map_err(|source| self.form(path, source))
    }

    async fn answer(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let deadline = self.deadline;
        let whole = async {
            let response = self.request(method.clone(), path, body).await?;
            self.whole(response).await
        };
        tokio::time::timeout(deadline, whole)
            .await
            .map_err(|_| self.late(method.clone(), path))?
    }

    fn late(&self, method: Method, path: &str) -> ClientError {
        ClientError::Deadline {
            socket: self.socket.clone(),
            method,
            path: path.to_owned(),
            deadline: self.deadline,
        }
    }

    /// The body of an answer that says yes.
    async fn whole(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let status = response.status();
        let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER_BYTES);
        let bytes = body.collect().await.map_err(|error| self.http(error))?.to_bytes();
        if status.is_success() {
            return Ok(bytes);
        }
        let message = match serde_json::from_slice::<FaultMessage>(&bytes) {
            Ok(fault) => fault.fault_message,
            Err(_) => format!("the VM answered {status}"),
        };
        Err(ClientError::Refused { status, message })
    }

    async fn checked(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let request = self.request(method.clone(), path, body);
        let response = tokio::time::timeout(self.deadline, request)
            .await
            .map_err(|_| self.late(method, path))??;
        if response.status().is_success() {
            return Ok(response);
        }
        match self.whole(response).await {
            Err(error) => Err(error),
            Ok(_) => Err(self.http("an answer that is neither yes nor no")),
        }
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = connect(&self.socket)
            .await
            .map_err(|source| ClientError::Connect {
                socket: self.socket.clone(),
                source,
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.http(error))?;
        // Its errors are the request's too.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .body(Full::new(body));
        let request = request.map_err(|error| self.http(error))?;
        sender
            .send_request(request)
            .await
            .map_err(|error| self.http(error))
    }
}

async fn connect(socket: &Path) -> io::Result<UnixStream> {
    if socket.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        let why =
            format!("the path is longer than the {MAX_SOCKET_PATH_BYTES} bytes a Unix socket's may have");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    UnixStream::connect(socket).await
}

/// A console that is being read.
#[derive(Debug)]
pub struct Console {
    socket: PathBuf,
    /// The position of the first byte.
    pub position: u64,
    body: Incoming,
}

impl Console {
    /// The next bytes, or `None` when there will be no more.
    ///
    /// # Errors
    /// [`ClientError::Http`] when the VM's process is gone.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
                Some(Err(error)) => {
                    return Err(ClientError::Http {
                        socket: self.socket.clone(),
                        source: error.into(),
                    });
                }
            }
        }
    }
}
