//! `vmm run --api-sock`, configured by requests in the form Firecracker's documentation shows them: what `curl` puts
//! on the wire, byte by byte.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::support::{PATIENCE, World, wait_for};

/// What `curl --unix-socket SOCKET -i -X METHOD http://localhost/PATH -H 'Accept: application/json'
/// -H 'Content-Type: application/json' -d BODY` sends; returns status and body of the answer.
fn curl(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/7.88.1\r\nAccept: application/json\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    let head = String::from_utf8(answer).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head
        .lines()
        .find_map(|line| {
            line.to_ascii_lowercase()
                .strip_prefix("content-length: ")?
                .trim()
                .parse()
                .ok()
        })
        .unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (status, String::from_utf8(body).unwrap())
}

#[test]
fn getting_started_as_in_firecrackers_documentation() {
    let world = World::new();
    let socket = world.path("firecracker.socket");
    let vm = world.start(&["run", "--api-sock", socket.to_str().unwrap()]);
    wait_for("the socket", || UnixStream::connect(&socket).ok());

    // docs/getting-started.md, with this guest's kernel and arguments.
    let logger = format!(
        "{{\n        \"log_path\": \"{}\",\n        \"level\": \"Debug\",\n        \"show_level\": true,\n        \
         \"show_log_origin\": true\n    }}",
        world.text("firecracker.log")
    );
    assert_eq!(curl(&socket, "PUT", "/logger", &logger), (204, String::new()));
    let boot = format!(
        "{{\n        \"kernel_image_path\": \"{}\",\n        \"boot_args\": \"period_ms=5\"\n    }}",
        world.ticker()
    );
    assert_eq!(curl(&socket, "PUT", "/boot-source", &boot), (204, String::new()));
    let rootfs = "{\n        \"drive_id\": \"rootfs\",\n        \"path_on_host\": \"./ubuntu.ext4\",\n        \
                  \"is_root_device\": true,\n        \"is_read_only\": false\n    }";
    let (status, answer) = curl(&socket, "PUT", "/drives/rootfs", rootfs);
    assert_eq!(status, 400);
    let fault: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert!(
        fault["fault_message"].as_str().unwrap().contains("./ubuntu.ext4"),
        "{fault}"
    );
    let machine = "{\"vcpu_count\": 1, \"mem_size_mib\": 64, \"track_dirty_pages\": true}";
    assert_eq!(
        curl(&socket, "PUT", "/machine-config", machine),
        (204, String::new())
    );
    assert_eq!(vm.stdout(), "", "the guest ran before it was started");
    let start = "{\n        \"action_type\": \"InstanceStart\"\n    }";
    assert_eq!(curl(&socket, "PUT", "/actions", start), (204, String::new()));

    let mut vm = vm;
    vm.says("tick 5");
    // docs/snapshotting/snapshot-support.md
    assert_eq!(
        curl(
            &socket,
            "PATCH",
            "/vm",
            "{\n            \"state\": \"Paused\"\n    }"
        ),
        (204, String::new())
    );
    let (file, memory) = (world.text("snapshot_file"), world.text("mem_file"));
    // What is no file is not replaced by one.
    let pipe = world.text("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    for body in [
        format!("{{\"snapshot_path\": \"{pipe}\", \"mem_file_path\": \"{memory}\"}}"),
        format!("{{\"snapshot_path\": \"{file}\", \"mem_file_path\": \"{pipe}\"}}"),
    ] {
        let (status, said) = curl(&socket, "PUT", "/snapshot/create", &body);
        assert!(
            status == 400 && said.contains("no regular file"),
            "{status} {said}"
        );
    }
    let snapshot = format!(
        "{{\n            \"snapshot_type\": \"Full\",\n            \"snapshot_path\": \"{file}\",\n            \
         \"mem_file_path\": \"{memory}\"\n    }}"
    );
    assert_eq!(
        curl(&socket, "PUT", "/snapshot/create", &snapshot),
        (204, String::new())
    );
    // Ours beside Firecracker's: it tells how it went.
    let (status, report) = curl(&socket, "PUT", "/stop", "{}");
    assert_eq!(status, 200);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["problems"], serde_json::json!([]));
    assert_eq!(vm.finish().code(), 0);
    assert!(!socket.exists(), "the socket was left behind");

    let socket = world.path("second.socket");
    let mut second = world.start(&["run", "--api-sock", socket.to_str().unwrap()]);
    wait_for("the socket", || UnixStream::connect(&socket).ok());
    let load = format!(
        "{{\n            \"snapshot_path\": \"{file}\",\n            \"mem_backend\": {{\n                \
         \"backend_path\": \"{memory}\",\n                \"backend_type\": \"File\"\n            }},\n            \
         \"track_dirty_pages\": true,\n            \"resume_vm\": true\n    }}"
    );
    assert_eq!(
        curl(&socket, "PUT", "/snapshot/load", &load),
        (204, String::new())
    );
    second.says("tick 20");
    assert!(
        !second.stdout().contains("tick 0\r"),
        "it began anew: {}",
        second.stdout()
    );
    second.signal("TERM");
    assert_eq!(second.finish().code(), 0);
    // A VM whose name nobody chose leaves nothing that nobody could ask for.
    let stores = std::fs::read_dir(world.path("state/understudy/vms"))
        .unwrap()
        .count();
    assert_eq!(
        (stores, std::fs::read_dir(world.run_dir()).unwrap().count()),
        (0, 0)
    );
}

#[test]
fn a_configured_vm_waits_until_it_is_told() {
    let world = World::new();
    let config = world.text("config.json");
    let text = serde_json::json!({
        "name": "web",
        "boot-source": {"kernel_image_path": world.ticker(), "boot_args": "period_ms=5"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        "drives": [], "network-interfaces": [], "vsock": null,
        "store": {"path": world.text("own-store"), "budget_bytes": 1 << 30},
    });
    std::fs::write(&config, text.to_string()).unwrap();
    let said = world
        .vmm(&[
            "run",
            "--config",
            &config,
            "--memory",
            "32M",
            "--no-start",
            "--detach",
        ])
        .ok();
    assert!(said.starts_with("web: not started"), "{said}");
    assert_eq!(world.row("web").unwrap()["state"], "not started");
    world
        .vmm(&["checkpoint", "web"])
        .refused(&["has not been started"]);
    assert_eq!(world.vmm(&["inspect", "web"]).ok(), "web: not started\n");
    world.vmm(&["resume", "web"]).ok();
    wait_for("the guest to tick", || world.ticks("web"));
    let status = world.row("web").unwrap()["status"].clone();
    // What the command line says goes before the file.
    assert_eq!(status["memory_mib"], 32);
    assert_eq!(status["store_budget"], 1 << 30);
    assert!(world.path("own-store/segments").is_dir());
}
