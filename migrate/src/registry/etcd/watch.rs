//! Hears of changes: one stream of etcd's watch, begun again at another member when it ends or falls silent for long.
//!
//! What is heard is a hint; a record is read anew before anything follows from it. So a stream that hangs costs time and
//! nothing else, and the time is bounded by [`RENEW`].

use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use segment::VmId;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Inner;
use super::gateway::{number, stamp_of};
use super::keys::{base64, end_of, kv_of};
use crate::registry::request::Changed;

/// How long one stream is listened to before it is begun anew: the member may hang, or be cut off from the others.
const RENEW: Duration = Duration::from_secs(10);
/// How long until it is tried again when no member answers.
const AGAIN: Duration = Duration::from_millis(300);
/// The most bytes of one message.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Listens until it is aborted.
pub(super) async fn run(inner: Arc<Inner>) {
    // From where to go on; 0: from now.
    let mut from = 0;
    let mut member = inner.gateway.preferred();
    loop {
        let heard = listen(&inner, member, &mut from).await;
        let next = inner.gateway.order().find(|m| *m != member).unwrap_or(member);
        match heard {
            Ok(()) => member = inner.gateway.preferred(),
            Err(why) => {
                tracing::debug!(%why, "the watch at etcd ended");
                member = next;
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// One stream; returns when it is time for another.
async fn listen(inner: &Inner, member: usize, from: &mut u64) -> Result<(), String> {
    let folder = inner.keys.folder("state");
    let ask = json!({ "create_request": {
        "key": base64(&folder), "range_end": base64(end_of(&folder)), "start_revision": from.to_string(),
    }});
    let mut body = inner
        .gateway
        .stream(member, "watch", &ask)
        .await
        .map_err(|e| format!("{e:?}"))?;
    let end = Instant::now() + RENEW;
    let mut buffer = Vec::new();
    loop {
        let Ok(message) = tokio::time::timeout_at(end, next(&mut body, &mut buffer)).await else {
            return Ok(());
        };
        let result = &message?["result"];
        if result["canceled"].as_bool() == Some(true) {
            if let Some(compacted) = number(&result["compact_revision"]) {
                inner.log.reset(compacted);
                *from = compacted;
            }
            return Err(format!("it was cancelled: {}", result["cancel_reason"]));
        }
        let stamp = stamp_of(result).ok_or("an answer without a header")?;
        if let Some(floor) = inner.gateway.seen.floor()
            && floor.registry != stamp.registry
        {
            return Err("another cluster answers".into());
        }
        if *from == 0 {
            // Nothing is known from before.
            inner.log.reset(stamp.revision);
            *from = stamp.revision + 1;
        }
        for event in result["events"].as_array().into_iter().flatten() {
            let kv = kv_of(&event["kv"]).ok_or("an event that is none")?;
            if let Some(changed) = changed(inner, &kv.key) {
                inner.log.push(kv.revision, changed);
            }
            *from = (*from).max(kv.revision + 1);
        }
    }
}

fn changed(inner: &Inner, key: &str) -> Option<Changed> {
    let under = |folder: &str| key.strip_prefix(&inner.keys.folder(folder)).map(str::to_owned);
    if let Some(id) = under("state/vm").or_else(|| under("state/owner")) {
        return VmId::new(&id).ok().map(|vm| Changed::Vm { vm });
    }
    let name = under("state/node").or_else(|| under("state/alive"))?;
    Some(Changed::Node { name })
}

/// The next message: one line of JSON.
async fn next(body: &mut Incoming, buffer: &mut Vec<u8>) -> Result<Value, String> {
    loop {
        if let Some(at) = buffer.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = buffer.drain(..=at).collect();
            return serde_json::from_slice(&line).map_err(|e| e.to_string());
        }
        if buffer.len() > MAX_MESSAGE_BYTES {
            return Err("a message without an end".into());
        }
        let frame = match body.frame().await {
            Some(frame) => frame.map_err(|e| e.to_string())?,
            None => return Err("closed".into()),
        };
        if let Ok(data) = frame.into_data() {
            buffer.extend_from_slice(&data);
        }
    }
}
