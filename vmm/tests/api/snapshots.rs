//! `/snapshot/create` and `/snapshot/load`.

use serde_json::json;
use vmm::api::resources::replication::StoredCheckpoint;
use vmm::session::SessionStatus;

use crate::support::{World, refused};

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_loaded_into_another_vm_and_goes_on() {
    let world = World::new();
    let vm = world.running("a").await;
    vm.says("tick 5").await;
    vm.client.patch("/vm", &json!({"state": "Paused"})).await.unwrap();
    std::fs::write(world.path("full"), "something that was there before").unwrap();
    let full = json!({"snapshot_type": "Full", "snapshot_path": world.path("full"), "mem_file_path": world.path("mem")});
    vm.client.put("/snapshot/create", &full).await.unwrap();
    let diff = json!({"snapshot_type": "Diff", "snapshot_path": world.path("diff"), "mem_file_path": world.path("mem2")});
    vm.client.put("/snapshot/create", &diff).await.unwrap();
    // Nothing but the files that were asked for.
    let mut left: Vec<_> = std::fs::read_dir(world.path(""))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(
        left,
        [
            "a.sock",
            "churn.elf",
            "diff",
            "full",
            "mem",
            "mem2",
            "store-a",
            "ticker.elf"
        ]
    );
    vm.end().await;

    let copy = world.serve("copy");
    for (request, part) in [
        (json!({"snapshot_path": world.path("diff")}), "Diff snapshot"),
        (json!({"snapshot_path": world.path("nonexistent")}), "nonexistent"),
        (
            json!({"snapshot_path": world.path("ticker.elf")}),
            "not a segment",
        ),
        (
            json!({"snapshot_path": world.path("full"), "mem_file_path": world.path("mem2")}),
            "belongs to",
        ),
        (
            json!({"snapshot_path": world.path("full"), "mem_file_path": world.path("ticker.elf")}),
            "not written by",
        ),
        (
            json!({"snapshot_path": world.path("full"), "mem_file_path": world.path("nonexistent")}),
            "memory file",
        ),
        (
            json!({"snapshot_path": world.path("full"), "mem_backend": {"backend_type": "Uffd", "backend_path": "/x"}}),
            "Uffd",
        ),
        (
            json!({"snapshot_path": world.path("full"), "network_overrides": [{"iface_id": "eth0"}]}),
            "host_dev_name",
        ),
        (
            json!({"snapshot_path": world.path("full"),
                   "network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap0"}]}),
            "net:eth0",
        ),
        (
            json!({"snapshot_path": world.path("full"), "resume": true}),
            "resume",
        ),
    ] {
        let (status, message) = refused(copy.client.put("/snapshot/load", &request).await);
        assert!(status == 400 && message.contains(part), "{request}: {message}");
    }
    let load = json!({"snapshot_path": world.path("full"), "mem_file_path": world.path("mem"),
                      "enable_diff_snapshots": true, "resume_vm": false, "network_overrides": []});
    copy.client.put("/snapshot/load", &load).await.unwrap();
    let status: SessionStatus = copy.client.get("/status").await.unwrap();
    assert_eq!(
        (status.state.as_str(), status.restored_from.as_deref()),
        ("paused", Some("a/1/1"))
    );
    let config: serde_json::Value = copy.client.get("/machine-config").await.unwrap();
    assert_eq!(config["mem_size_mib"], 32);
    copy.client
        .patch("/vm", &json!({"state": "Resumed"}))
        .await
        .unwrap();
    let text = copy.says("\n").await;
    assert!(!text.contains("ticker up"), "it began anew: {text}");
    copy.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_cannot_be_written_disturbs_nothing() {
    let world = World::new();
    let vm = world.serve("a");
    let body = json!({"snapshot_path": world.path("full"), "mem_file_path": world.path("mem")});
    assert!(
        refused(vm.client.put("/snapshot/create", &body).await)
            .1
            .contains("not been started")
    );
    let source = json!({"snapshot_path": world.path("full")});
    vm.configure(&world.path("ticker.elf"), "period_ms=5").await;
    assert!(
        refused(vm.client.put("/snapshot/load", &source).await)
            .1
            .contains("after configuring")
    );
    vm.client
        .put("/actions", &json!({"action_type": "InstanceStart"}))
        .await
        .unwrap();
    for (path, taken) in [
        (world.text("no/such/folder"), 0),
        (world.text(""), 0),
        ("..".into(), 0),
        // Only the attempt to write it shows that it cannot be.
        ("/proc/full".into(), 1),
    ] {
        let (status, message) = refused(
            vm.client
                .put("/snapshot/create", &json!({"snapshot_path": path}))
                .await,
        );
        assert!(status == 400 && !message.is_empty(), "{path}: {message}");
        let stored: Vec<StoredCheckpoint> = vm.client.get("/checkpoints").await.unwrap();
        assert_eq!(stored.len(), taken, "{path}: {stored:?}");
    }
    vm.client.put("/snapshot/create", &source).await.unwrap();
    vm.says("tick 5").await;
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_snapshot_is_refused_and_another_can_be_loaded() {
    let world = World::new();
    let vm = world.running("a").await;
    vm.client
        .put("/snapshot/create", &json!({"snapshot_path": world.path("full")}))
        .await
        .unwrap();
    vm.end().await;
    let good = std::fs::read(world.path("full")).unwrap();
    let copy = world.serve("copy");
    // In the header, the records, the last frame; and cut short.
    for at in [3, 40, 300, good.len() / 2, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        std::fs::write(world.path("damaged"), &bytes).unwrap();
        let load = json!({"snapshot_path": world.path("damaged"), "resume_vm": true});
        let (status, message) = refused(copy.client.put("/snapshot/load", &load).await);
        assert!(status == 400 && !message.is_empty(), "byte {at}: {message}");
    }
    std::fs::write(world.path("cut"), &good[..good.len() - 1]).unwrap();
    let (_, message) = refused(
        copy.client
            .put("/snapshot/load", &json!({"snapshot_path": world.path("cut")}))
            .await,
    );
    assert!(message.contains("bytes"), "{message}");
    copy.client
        .put(
            "/snapshot/load",
            &json!({"snapshot_path": world.path("full"), "resume_vm": true}),
        )
        .await
        .unwrap();
    copy.says("tick").await;
    copy.end().await;
}
