//! Configure, start, pause, resume, checkpoint, protect, stop.

use std::time::Duration;

use serde_json::{Value, json};
use vmm::api::resources::machine::InstanceInfo;
use vmm::api::resources::replication::StoredCheckpoint;
use vmm::session::{CheckpointReport, Protection, SessionStatus};

use crate::support::{World, raw, refused};

async fn state(served: &crate::support::Served) -> String {
    let info: InstanceInfo = served.client.get("/").await.unwrap();
    info.state
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_from_its_configuration_to_its_end() {
    let world = World::new();
    let vm = world.serve("a");
    assert_eq!(state(&vm).await, "Not started");
    assert_eq!(refused(vm.client.get::<SessionStatus>("/status").await).0, 400);
    let version: Value = vm.client.get("/version").await.unwrap();
    assert_eq!(version["firecracker_version"], env!("CARGO_PKG_VERSION"));

    vm.configure(&world.path("ticker.elf"), "period_ms=5").await;
    vm.client
        .patch("/machine-config", &json!({"mem_size_mib": 48}))
        .await
        .unwrap();
    let config: Value = vm.client.get("/vm/config").await.unwrap();
    assert_eq!(config["machine-config"]["mem_size_mib"], 48);
    assert_eq!(config["boot-source"]["boot_args"], "period_ms=5");
    assert_eq!((&config["name"], &config["drives"]), (&json!("a"), &json!([])));

    let start = json!({"action_type": "InstanceStart"});
    vm.client.put("/actions", &start).await.unwrap();
    assert_eq!(state(&vm).await, "Running");
    vm.says("tick 3").await;
    // What is set before the start cannot be set after it.
    for (path, body) in [
        ("/actions", start),
        (
            "/boot-source",
            json!({"kernel_image_path": world.path("ticker.elf")}),
        ),
        ("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 64})),
        ("/snapshot/load", json!({"snapshot_path": "/nonexistent"})),
    ] {
        let (status, message) = refused(vm.client.put(path, &body).await);
        assert!(
            status == 400 && message.contains("not "),
            "{path}: {status} {message}"
        );
    }

    vm.client.patch("/vm", &json!({"state": "Paused"})).await.unwrap();
    assert_eq!(state(&vm).await, "Paused");
    let session = vm.instance.session().unwrap();
    let end = session.vm().outbox().end();
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert_eq!(session.vm().outbox().end(), end, "a paused guest spoke");
    vm.client
        .patch("/vm", &json!({"state": "Resumed"}))
        .await
        .unwrap();

    let full: CheckpointReport = vm
        .client
        .post("/checkpoints", &json!({"label": "one"}))
        .await
        .unwrap();
    let delta: CheckpointReport = vm.client.post("/checkpoints", &json!({})).await.unwrap();
    assert_eq!((full.kind.as_str(), delta.kind.as_str()), ("full", "delta"));
    let list: Vec<StoredCheckpoint> = vm.client.get("/checkpoints").await.unwrap();
    let [first, second] = list.as_slice() else {
        panic!("{list:?}")
    };
    assert_eq!(
        (first.name.as_str(), first.label.as_deref()),
        (full.name.as_str(), Some("one"))
    );
    assert_eq!(second.parent.as_deref(), Some(full.name.as_str()));
    let status: SessionStatus = vm.client.get("/status").await.unwrap();
    assert_eq!((status.state.as_str(), status.checkpoints), ("running", 2));

    let mut quit = vm.instance.watch_quit();
    vm.end().await;
    assert!(*quit.wait_for(|quit| *quit).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_can_be_mended() {
    let world = World::new();
    let vm = world.serve("a");
    let start = json!({"action_type": "InstanceStart"});
    let (_, message) = refused(vm.client.put("/actions", &start).await);
    assert!(message.contains("no kernel"), "{message}");
    let missing = json!({"kernel_image_path": "/nonexistent"});
    let (_, message) = refused(vm.client.put("/boot-source", &missing).await);
    assert!(message.contains("/nonexistent"), "{message}");

    std::fs::write(
        world.path("none.elf"),
        "no kernel at all, and long enough for a header to be read from it. Really.",
    )
    .unwrap();
    vm.configure(&world.path("none.elf"), "").await;
    let (_, message) = refused(vm.client.put("/actions", &start).await);
    assert!(
        message.contains("none.elf") && message.contains("PVH"),
        "{message}"
    );
    assert_eq!(state(&vm).await, "Not started");

    vm.configure(&world.path("ticker.elf"), "period_ms=5").await;
    vm.client.put("/actions", &start).await.unwrap();
    vm.says("tick 1").await;
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_does_not_leave_a_half_made_vm() {
    let world = World::new();
    let vm = world.serve("a");
    vm.configure(&world.path("ticker.elf"), "period_ms=5").await;
    let body = r#"{"action_type": "InstanceStart"}"#;
    let request = format!(
        "PUT /actions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    {
        use std::io::Write;
        let mut stream = std::os::unix::net::UnixStream::connect(vm.client.socket()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        // As soon as it has begun, the asker is gone.
        let deadline = std::time::Instant::now() + crate::support::PATIENCE;
        while vm.instance.configure(|_| Ok(())).is_ok() {
            assert!(std::time::Instant::now() < deadline, "the start did not begin");
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
    }
    let mut sessions = vm.instance.watch_session();
    let started = tokio::time::timeout(crate::support::PATIENCE, sessions.wait_for(Option::is_some)).await;
    started.expect("the start went on without its asker").unwrap();
    vm.says("tick 1").await;
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn protection_that_cannot_be_had_leaves_the_vm_as_it_was() {
    let world = World::new();
    let vm = world.serve("a");
    assert_eq!(refused(vm.client.get::<Protection>("/protection").await).0, 404);
    let wanted = json!({"holders": ["127.0.0.1:1"], "every_ms": 50, "ack_quorum": 1});
    vm.client.put("/protection", &wanted).await.unwrap();
    let protection: Protection = vm.client.get("/protection").await.unwrap();
    assert_eq!(
        (protection.holders.as_slice(), protection.every_ms),
        (["127.0.0.1:1".to_owned()].as_slice(), 50)
    );
    vm.client.delete("/protection").await.unwrap();

    vm.configure(&world.path("ticker.elf"), "period_ms=5").await;
    vm.client
        .put("/actions", &json!({"action_type": "InstanceStart"}))
        .await
        .unwrap();
    let (status, message) = refused(vm.client.put("/protection", &wanted).await);
    assert!(status == 400 && message.contains("127.0.0.1:1"), "{message}");
    let (_, message) = refused(vm.client.put("/protection", &json!({"holders": []})).await);
    assert!(message.contains("1 to"), "{message}");
    assert_eq!(refused(vm.client.get::<Protection>("/protection").await).0, 404);
    vm.client.delete("/protection").await.unwrap();
    vm.says("tick 5").await;
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_flushed_as_lines() {
    let world = World::new();
    let vm = world.serve("a");
    let flush = json!({"action_type": "FlushMetrics"});
    assert!(
        refused(vm.client.put("/actions", &flush).await)
            .1
            .contains("/metrics")
    );
    vm.client
        .put("/metrics", &json!({"metrics_path": world.path("metrics")}))
        .await
        .unwrap();
    let (_, message) = refused(vm.client.put("/actions", &flush).await);
    assert!(message.contains("not been started"), "{message}");
    vm.configure(&world.path("ticker.elf"), "period_ms=5").await;
    vm.client
        .put("/actions", &json!({"action_type": "InstanceStart"}))
        .await
        .unwrap();
    vm.client.put("/actions", &flush).await.unwrap();
    vm.client.put("/actions", &flush).await.unwrap();
    let text = std::fs::read_to_string(world.path("metrics")).unwrap();
    let lines: Vec<SessionStatus> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!((lines.len(), lines[0].name.as_str()), (2, "a"));
    let keys = json!({"action_type": "SendCtrlAltDel"});
    assert!(
        refused(vm.client.put("/actions", &keys).await)
            .1
            .contains("not supported")
    );
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_is_read_from_anywhere_and_typed_into() {
    let world = World::new();
    let vm = world.running("a").await;
    let text = vm.says("tick 9").await;
    // From a position on: the same bytes as in the whole.
    let mut part = vm.client.console(Some(5), false).await.unwrap();
    assert_eq!(part.position, 5);
    let piece = part.next().await.unwrap().unwrap();
    let shorter = piece.len().min(text.len() - 5);
    assert_eq!(&piece[..shorter], &text.as_bytes()[5..5 + shorter]);
    // Past the end: nothing, and no wait.
    let mut none = vm.client.console(Some(u64::MAX), false).await.unwrap();
    assert_eq!(none.next().await.unwrap(), None);
    // The ticker reads nothing: its serial port takes a FIFO full, and the rest is given back.
    let taken = vm.client.type_in(vec![b'x'; 1000].into()).await.unwrap();
    assert!((1..1000).contains(&taken), "{taken}");

    let mut following = vm.client.console(Some(u64::MAX), true).await.unwrap();
    let next = tokio::time::timeout(crate::support::PATIENCE, following.next())
        .await
        .unwrap()
        .unwrap();
    assert!(next.is_some(), "a console that is followed goes on");
    let bad = raw(
        vm.client.socket(),
        b"GET /console?from=yes HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    );
    assert!(
        bad.starts_with("HTTP/1.1 400") && bad.contains("fault_message"),
        "{bad}"
    );
    vm.end().await;
    while following.next().await.is_ok_and(|piece| piece.is_some()) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_the_console_never_fill_the_socket() {
    let world = World::new();
    let vm = world.running("a").await;
    let mut readers = Vec::new();
    let message = loop {
        match vm.client.console(None, true).await {
            Ok(reader) => readers.push(reader),
            other => break refused(other),
        }
        assert!(readers.len() < 1000, "there is no bound");
    };
    assert!(message.0 == 503 && message.1.contains("readers"), "{message:?}");
    vm.client.get::<SessionStatus>("/status").await.unwrap();
    drop(readers);
    // Their places come back.
    let deadline = std::time::Instant::now() + crate::support::PATIENCE;
    let mut reader = loop {
        match vm.client.console(None, true).await {
            Ok(reader) => break reader,
            Err(_) => assert!(
                std::time::Instant::now() < deadline,
                "a place of a reader that is gone stays taken"
            ),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    // By this one: the others' places come back one by one.
    let mut said = String::new();
    while !said.contains("tick 5") {
        let piece = tokio::time::timeout_at(deadline.into(), reader.next()).await;
        let bytes = piece.unwrap().unwrap().unwrap();
        said.push_str(&String::from_utf8_lossy(&bytes));
    }
    vm.end().await;
}
