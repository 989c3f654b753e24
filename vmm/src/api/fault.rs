//! Answers that say no, in Firecracker's shape, and request bodies that are checked before they are believed.

use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::MAX_BODY_BYTES;
use crate::config::ConfigError;
use crate::session::{SessionError, chain};

/// How long a client may take to send a body of at most [`MAX_BODY_BYTES`].
const BODY_DEADLINE: Duration = Duration::from_secs(10);

/// The body of every answer that says no.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FaultMessage {
    /// What failed, on what, why.
    pub fault_message: String,
}

/// A request that was not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The HTTP status.
    pub status: StatusCode,
    /// What failed, on what, why.
    pub message: String,
}

impl Fault {
    /// The request cannot be carried out: status 400, as Firecracker's.
    pub fn bad(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
        }
    }

    /// The resource is not there now.
    pub fn absent(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            message: message.into(),
        }
    }

    /// Too many at once.
    pub fn busy(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            message: message.into(),
        }
    }

    fn too_long() -> Self {
        let message =
            format!("the request's body is longer than the {MAX_BODY_BYTES} bytes that are allowed");
        Self {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            message,
        }
    }
}

impl From<SessionError> for Fault {
    fn from(error: SessionError) -> Self {
        Self::bad(chain(&error))
    }
}

impl From<ConfigError> for Fault {
    fn from(error: ConfigError) -> Self {
        Self::bad(chain(&error))
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        (
            self.status,
            Json(FaultMessage {
                fault_message: self.message,
            }),
        )
            .into_response()
    }
}

/// The raw body of a request, within [`MAX_BODY_BYTES`] and within its deadline.
#[derive(Debug)]
pub struct Raw(pub Bytes);

impl<S: Sync> FromRequest<S> for Raw {
    type Rejection = Fault;

    async fn from_request(request: Request, _: &S) -> Result<Self, Fault> {
        // Said in advance, it is refused before it is sent.
        let announced = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > MAX_BODY_BYTES as u64) {
            return Err(Fault::too_long());
        }
        let body = axum::body::to_bytes(request.into_body(), MAX_BODY_BYTES);
        match tokio::time::timeout(BODY_DEADLINE, body).await {
            Ok(Ok(bytes)) => Ok(Self(bytes)),
            Ok(Err(error)) if is_too_long(&error) => Err(Fault::too_long()),
            Ok(Err(error)) => Err(Fault::bad(format!(
                "the request's body cannot be read: {}",
                chain(&error)
            ))),
            Err(_) => Err(Fault {
                status: StatusCode::REQUEST_TIMEOUT,
                message: format!(
                    "the request's body did not arrive within {} s",
                    BODY_DEADLINE.as_secs()
                ),
            }),
        }
    }
}

fn is_too_long(error: &axum::Error) -> bool {
    let mut next = Some(error as &(dyn std::error::Error + 'static));
    while let Some(error) = next {
        if error.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        next = error.source();
    }
    false
}

/// A JSON body. The content type is not asked for: `curl -d` and Firecracker's clients send many.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, state: &S) -> Result<Self, Fault> {
        let Raw(bytes) = Raw::from_request(request, state).await?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| {
            Fault::bad(format!(
                "An error occurred when deserializing the json body of a request: {error}."
            ))
        })
    }
}
