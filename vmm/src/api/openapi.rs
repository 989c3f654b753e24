//! The OpenAPI document of the control API.

use axum::Json;
use utoipa::OpenApi;

use super::fault::FaultMessage;
use super::resources::{balloon, console, devices, machine, metrics, replication, snapshot};

/// The document.
#[derive(Debug, OpenApi)]
#[openapi(
    info(
        title = "vmm control API",
        description = "HTTP/1.1 and JSON over a Unix socket, one socket a VM. Resources tagged `firecracker` have the \
                       paths, verbs and fields of Firecracker's public API."
    ),
    paths(
        machine::info, machine::version, machine::config, machine::machine, machine::put_machine,
        machine::patch_machine, machine::put_boot_source, machine::act, machine::patch_vm, machine::put_logger,
        machine::put_metrics, metrics::read, devices::put_drive, devices::put_network, devices::put_entropy,
        devices::put_vsock, balloon::put, balloon::get, balloon::patch, balloon::statistics,
        balloon::patch_statistics,
        snapshot::create, snapshot::load, replication::status, replication::checkpoints,
        replication::take_checkpoint, replication::protection, replication::put_protection,
        replication::delete_protection, replication::stop, console::read, console::write, answer
    ),
    components(schemas(FaultMessage)),
    tags(
        (name = "firecracker", description = "in Firecracker's shape"),
        (name = "understudy", description = "own resources")
    )
)]
pub struct Document;

/// The document as JSON.
#[must_use]
pub fn document() -> serde_json::Value {
    // A document of names and schemas always has a JSON form.
    serde_json::to_value(Document::openapi()).unwrap_or_default()
}

#[utoipa::path(get, path = "/openapi.json", tag = "understudy",
    responses((status = 200, description = "this document", content_type = "application/json")))]
pub(super) async fn answer() -> Json<serde_json::Value> {
    Json(document())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn every_route_is_in_the_document_and_the_other_way_round() {
        let document = super::document();
        let described: BTreeSet<String> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, verbs)| {
                verbs
                    .as_object()
                    .unwrap()
                    .keys()
                    .map(move |verb| format!("{} {path}", verb.to_uppercase()))
            })
            .collect();
        let routed: BTreeSet<String> = super::super::routes::all()
            .map(|(method, path)| format!("{method} {path}"))
            .collect();
        assert_eq!(described, routed);
    }

    #[test]
    fn every_schema_that_is_named_is_there() {
        fn names(value: &serde_json::Value, found: &mut BTreeSet<String>) {
            match value {
                serde_json::Value::Object(map) => {
                    if let Some(name) = map.get("$ref").and_then(|name| name.as_str()) {
                        found.insert(name.trim_start_matches("#/components/schemas/").to_owned());
                    }
                    map.values().for_each(|value| names(value, found));
                }
                serde_json::Value::Array(list) => list.iter().for_each(|value| names(value, found)),
                _ => {}
            }
        }
        let document = super::document();
        let mut named = BTreeSet::new();
        names(&document, &mut named);
        let schemas = document["components"]["schemas"].as_object().unwrap();
        let missing: Vec<_> = named.iter().filter(|name| !schemas.contains_key(*name)).collect();
        assert!(named.len() > 10 && missing.is_empty(), "{missing:?} of {named:?}");
    }
}
