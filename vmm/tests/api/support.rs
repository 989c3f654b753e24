//! A served instance in a folder of its own.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm::api::client::ClientError;
use vmm::api::instance::Identity;
use vmm::api::server::Socket;
use vmm::api::{Client, Instance, Server};
use vmm::config::{BootSourceConfig, MachineSettings, VmConfig};

/// Longer than anything here takes on a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct World {
    dir: tempfile::TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        let kvm = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        kvm.expect("these tests run real guests and need a usable /dev/kvm");
        let dir = tempfile::tempdir().unwrap();
        guest_images::write_all(dir.path()).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// An instance that waits to be configured.
    pub(crate) fn serve(&self, name: &str) -> Served {
        let identity = Identity {
            name: segment::VmId::new(name).unwrap(),
            store: self.path(&format!("store-{name}")),
            store_budget: None,
            generation: None,
            trust: migrate::transport::IdentityArgs {
                insecure_plaintext: true,
                ..Default::default()
            },
            second_copy: false,
            keys: Default::default(),
            vsock: self.path(&format!("{name}.vsock")),
        };
        let socket = Socket::bind(&self.path(&format!("{name}.sock"))).unwrap();
        let instance = Instance::new(identity, VmConfig::default(), None);
        let client = Client::new(socket.path());
        let server = Server::start(socket, Arc::clone(&instance)).unwrap();
        Served {
            instance,
            server,
            client,
        }
    }

    /// A ticker that runs.
    pub(crate) async fn running(&self, name: &str) -> Served {
        let served = self.serve(name);
        served.configure(&self.path("ticker.elf"), "period_ms=5").await;
        served
            .client
            .put("/actions", &serde_json::json!({"action_type": "InstanceStart"}))
            .await
            .unwrap();
        served
    }
}

pub(crate) struct Served {
    pub(crate) instance: Arc<Instance>,
    pub(crate) server: Server,
    pub(crate) client: Client,
}

impl Served {
    pub(crate) async fn configure(&self, kernel: &Path, cmdline: &str) {
        let source = BootSourceConfig {
            kernel_image_path: kernel.to_owned(),
            initrd_path: None,
            boot_args: Some(cmdline.into()),
        };
        self.client.put("/boot-source", &source).await.unwrap();
        let machine = MachineSettings {
            mem_size_mib: 32,
            ..Default::default()
        };
        self.client.put("/machine-config", &machine).await.unwrap();
    }

    pub(crate) async fn end(self) {
        self.client
            .put("/stop", &serde_json::json!({"drain_ms": 0}))
            .await
            .unwrap();
        let socket = self.server.path().to_owned();
        self.server.shut_down().await;
        assert!(!socket.exists(), "the socket was left behind");
    }

    /// Waits until the console has said `text`; returns all it has said.
    pub(crate) async fn says(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut console = self.client.console(None, true).await.unwrap();
        let mut said = String::new();
        while !said.contains(text) {
            let piece = tokio::time::timeout_at(deadline.into(), console.next()).await;
            match piece {
                Ok(Ok(Some(bytes))) => said.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} before {text:?}: {said}"),
            }
        }
        said
    }
}

/// The status and message of a refusal.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> (u16, String) {
    match answer {
        Err(ClientError::Refused { status, message }) => (status.as_u16(), message),
        other => panic!("expected a refusal, not {other:?}"),
    }
}

/// Sends bytes and reads what comes back until the server closes the connection; a request among them has to ask for
/// that.
pub(crate) fn raw(socket: &Path, bytes: &[u8]) -> String {
    exchange(socket, bytes, false)
}

/// The same, but the server sees that nothing more will come.
pub(crate) fn raw_and_no_more(socket: &Path, bytes: &[u8]) -> String {
    exchange(socket, bytes, true)
}

fn exchange(socket: &Path, bytes: &[u8], no_more: bool) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The server may refuse before it has read all.
    let _ = stream.write_all(bytes);
    if no_more {
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}
