//! What is not allowed, and the socket itself.

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};
use vmm::api::MAX_BODY_BYTES;
use vmm::api::server::{MAX_SOCKET_PATH_BYTES, Socket, SocketError};

use crate::support::{World, raw, raw_and_no_more, refused};

fn fault(answer: &str, status: &str) -> String {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(
        head.to_ascii_lowercase()
            .contains("content-type: application/json"),
        "{head}"
    );
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
    body["fault_message"].as_str().unwrap().to_owned()
}

fn put(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_right_is_said_in_firecrackers_shape() {
    let world = World::new();
    let vm = world.serve("a");
    let socket = vm.client.socket().to_owned();
    let outcome = tokio::task::spawn_blocking(move || {
        let machine = |body: &str| fault(&raw(&socket, &put("/machine-config", body)), "400");
        for (body, part) in [
            ("", "EOF"),
            ("{", "EOF"),
            ("[]", "expected struct"),
            ("null", "invalid type"),
            (r#"{"vcpu_count": 1}"#, "missing field `mem_size_mib`"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 64, "ht_enabled": false}"#, "unknown field `ht_enabled`"),
            (r#"{"vcpu_count": -1, "mem_size_mib": 64}"#, "invalid value"),
            (r#"{"vcpu_count": "1", "mem_size_mib": 64}"#, "invalid type"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 64} x"#, "trailing"),
            (r#"{"vcpu_count": 1, "vcpu_count": 2, "mem_size_mib": 64}"#, "duplicate field"),
            (r#"{"vcpu_count": 33, "mem_size_mib": 64}"#, "1 to 32"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 64, "smt": true}"#, "smt"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "T2"}"#, "cpu_template"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "2M"}"#, "huge_pages"),
        ] {
            let message = machine(body);
            assert!(message.contains(part), "{body}: {message}");
        }
        assert!(machine(&format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000))).len() < 1000);
        let action = fault(&raw(&socket, &put("/actions", r#"{"action_type": "Dance"}"#)), "400");
        assert!(action.contains("unknown variant `Dance`"), "{action}");

        for path in [
            "/mmds",
            "/mmds/config",
            "/cpu-config",
            "/serial",
            "/pmem/p0",
            "/hotplug/memory",
        ] {
            let message = fault(&raw(&socket, &put(path, "{}")), "400");
            assert!(message.contains(path) && message.contains("not supported"), "{message}");
        }
        for path in ["/nowhere", "/vm/confi", "/status", "/machine-config/", "//", "/%2e%2e/actions"] {
            let message = fault(&raw(&socket, &put(path, "{}")), "400");
            assert!(message.contains("Invalid request method and/or path"), "{path}: {message}");
        }

        // One byte more than is allowed; said in advance, found out on the way, and in chunks.
        let long = format!("\"{}\"", "x".repeat(MAX_BODY_BYTES - 1));
        assert!(fault(&raw(&socket, &put("/machine-config", &long)), "413").contains("65536"));
        let chunked = format!(
            "PUT /machine-config HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
             {:x}\r\n{long}\r\n0\r\n\r\n",
            long.len()
        );
        assert!(fault(&raw(&socket, chunked.as_bytes()), "413").contains("65536"));
        let longest = format!("\"{}\"", "x".repeat(MAX_BODY_BYTES - 2));
        assert!(fault(&raw(&socket, &put("/machine-config", &longest)), "400").contains("invalid type"));
    })
    .await;
    outcome.unwrap();
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_and_crowds_do_not_stop_the_server() {
    let world = World::new();
    let vm = world.serve("a");
    let socket = vm.client.socket().to_owned();
    let noise = tokio::task::spawn_blocking(move || {
        let headers: String = (0..1000).map(|n| format!("X-{n}: y\r\n")).collect();
        for bytes in [
            Vec::new(),
            vec![0; 4096],
            vec![0xff; 200_000],
            b"GET".to_vec(),
            b"GET / HTTP/1.1\r\n".to_vec(),
            b"GET / HTTP/9.9\r\n\r\n".to_vec(),
            b"PUT /actions HTTP/1.1\r\nContent-Length: -5\r\n\r\n".to_vec(),
            b"PUT /actions HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n".to_vec(),
            format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(200_000)).into_bytes(),
            format!("GET / HTTP/1.1\r\n{headers}\r\n").into_bytes(),
            format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(200_000)).into_bytes(),
        ] {
            let answer = raw_and_no_more(&socket, &bytes);
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
        }
    });
    noise.await.unwrap();
    let crowd: Vec<_> = (0..300)
        .map(|_| {
            let client = vm.client.clone();
            tokio::spawn(async move { client.get::<Value>("/").await })
        })
        .collect();
    for one in crowd {
        assert_eq!(one.await.unwrap().unwrap()["state"], "Not started");
    }
    vm.end().await;
}

#[tokio::test]
async fn the_socket_is_private_and_its_name_is_respected() {
    let world = World::new();
    let vm = world.serve("a");
    let path = vm.client.socket().to_owned();
    let mode = std::fs::symlink_metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    assert!(matches!(Socket::bind(&path), Err(SocketError::InUse { .. })));
    vm.end().await;

    // Left by a process that is gone: nobody answers.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let socket = Socket::bind(&path).unwrap();
    // Its name was given to another meanwhile, whose socket stays.
    std::fs::remove_file(&path).unwrap();
    let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(socket);
    assert!(path.exists(), "another's socket was removed");
    drop(other);

    let file = world.path("ticker.elf");
    assert!(matches!(Socket::bind(&file), Err(SocketError::NotASocket { .. })));
    assert!(file.is_file());
    let long = world.path(&"a".repeat(MAX_SOCKET_PATH_BYTES));
    let error = Socket::bind(&long).unwrap_err().to_string();
    assert!(error.contains("107") && error.contains("--run-dir"), "{error}");
}

#[tokio::test]
async fn nobody_there_is_told_from_trouble() {
    let world = World::new();
    let client = vmm::api::Client::new(world.path("none.sock"));
    assert!(client.get::<Value>("/").await.unwrap_err().nobody_there());
    let vm = world.serve("a");
    let (status, _) = refused(vm.client.put("/stop", &json!({"drain_ms": 600_001})).await);
    assert_eq!(status, 400);
    vm.end().await;
}
