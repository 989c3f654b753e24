//! Which path and verb leads where: one table, which the router is made from and the OpenAPI document is held to.

use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::routing::{MethodRouter, delete, get, patch, post, put};

use super::fault::Fault;
use super::instance::Instance;
use super::resources::{balloon, console, devices, machine, metrics, replication, snapshot};

/// Verb, path, and what answers.
type Route = (Method, &'static str, MethodRouter<Arc<Instance>>);

/// Every route there is.
fn table() -> Vec<Route> {
    vec![
        (Method::GET, "/", get(machine::info)),
        (Method::GET, "/version", get(machine::version)),
        (Method::GET, "/vm/config", get(machine::config)),
        (Method::GET, "/machine-config", get(machine::machine)),
        (Method::PUT, "/machine-config", put(machine::put_machine)),
        (Method::PATCH, "/machine-config", patch(machine::patch_machine)),
        (Method::PUT, "/boot-source", put(machine::put_boot_source)),
        (Method::PUT, "/drives/{drive_id}", put(devices::put_drive)),
        (
            Method::PUT,
            "/network-interfaces/{iface_id}",
            put(devices::put_network),
        ),
        (Method::PUT, "/entropy", put(devices::put_entropy)),
        (Method::PUT, "/vsock", put(devices::put_vsock)),
        (Method::PUT, "/balloon", put(balloon::put)),
        (Method::GET, "/balloon", get(balloon::get)),
        (Method::PATCH, "/balloon", patch(balloon::patch)),
        (Method::GET, "/balloon/statistics", get(balloon::statistics)),
        (
            Method::PATCH,
            "/balloon/statistics",
            patch(balloon::patch_statistics),
        ),
        (Method::PUT, "/actions", put(machine::act)),
        (Method::PATCH, "/vm", patch(machine::patch_vm)),
        (Method::PUT, "/logger", put(machine::put_logger)),
        (Method::PUT, "/metrics", put(machine::put_metrics)),
        (Method::GET, "/metrics", get(metrics::read)),
        (Method::PUT, "/snapshot/create", put(snapshot::create)),
        (Method::PUT, "/snapshot/load", put(snapshot::load)),
        (Method::GET, "/status", get(replication::status)),
        (Method::GET, "/checkpoints", get(replication::checkpoints)),
        (Method::POST, "/checkpoints", post(replication::take_checkpoint)),
        (Method::GET, "/protection", get(replication::protection)),
        (Method::PUT, "/protection", put(replication::put_protection)),
        (
            Method::DELETE,
            "/protection",
            delete(replication::delete_protection),
        ),
        (Method::PUT, "/stop", put(replication::stop)),
        (Method::GET, "/console", get(console::read)),
        (Method::POST, "/console", post(console::write)),
        (Method::GET, "/openapi.json", get(super::openapi::answer)),
    ]
}

/// Verb and path of every route.
pub fn all() -> impl Iterator<Item = (Method, &'static str)> {
    table().into_iter().map(|(method, path, _)| (method, path))
}

/// First path segments of Firecracker's resources that are not here.
const ABSENT: [&str; 9] = [
    "drives",
    "network-interfaces",
    "vsock",
    "entropy",
    "balloon",
    "mmds",
    "cpu-config",
    "serial",
    "pmem",
];

/// What answers requests to `instance`.
pub fn router(instance: Arc<Instance>) -> Router {
    let router = table()
        .into_iter()
        .fold(Router::new(), |router, (_, path, answer)| {
            router.route(path, answer)
        });
    router
        .fallback(nowhere)
        .method_not_allowed_fallback(nowhere)
        .with_state(instance)
}

async fn nowhere(method: Method, uri: Uri) -> Fault {
    let path = uri.path();
    let resource = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    if ABSENT.contains(&resource) || path.starts_with("/hotplug") {
        return Fault::bad(format!(
            "{method} {path} is not supported by this version ({})",
            crate::PRODUCER
        ));
    }
    // Firecracker's words.
    Fault::bad(format!("Invalid request method and/or path: {method} {path}."))
}
