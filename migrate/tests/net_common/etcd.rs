//! A real etcd of three members on loopback.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use migrate::registry::{EtcdAddr, RegistryAddr};
use rustix::process::{Pid, Signal, kill_process};

/// Its members; ended when dropped.
pub struct Etcd {
    members: Vec<Member>,
    _dir: tempfile::TempDir,
    /// Given to every member.
    more: Vec<String>,
}

struct Member {
    name: String,
    data: PathBuf,
    client: String,
    peer: String,
    child: Option<Child>,
}

fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

impl Etcd {
    /// Starts so many members, and waits until they have a leader.
    pub fn start(count: usize) -> Self {
        Self::with(count, &[])
    }

    pub fn with(count: usize, more: &[String]) -> Self {
        // In memory where that is: what is tested is not the disk.
        let shm = std::path::Path::new("/dev/shm");
        let dir = match shm.is_dir() {
            true => tempfile::tempdir_in(shm),
            false => tempfile::tempdir(),
        };
        let dir = dir.unwrap();
        let members = (0..count).map(|i| Member {
            name: format!("m{i}"),
            data: dir.path().join(format!("m{i}")),
            client: free_port(),
            peer: free_port(),
            child: None,
        });
        let members = members.collect();
        let mut etcd = Self {
            members,
            _dir: dir,
            more: more.to_vec(),
        };
        for i in 0..count {
            etcd.run(i);
        }
        etcd.wait_for_leader();
        etcd
    }

    fn scheme(&self) -> &'static str {
        if self.more.iter().any(|a| a.contains("cert-file")) {
            "https"
        } else {
            "http"
        }
    }

    /// Starts a member that does not run.
    pub fn run(&mut self, i: usize) {
        let cluster: Vec<_> = self
            .members
            .iter()
            .map(|m| format!("{}=http://{}", m.name, m.peer))
            .collect();
        let scheme = self.scheme();
        let member = &self.members[i];
        let child = Command::new("etcd")
            .args(["--name", &member.name, "--data-dir"])
            .arg(&member.data)
            .args(["--listen-client-urls", &format!("{scheme}://{}", member.client)])
            .args([
                "--advertise-client-urls",
                &format!("{scheme}://{}", member.client),
            ])
            .args(["--listen-peer-urls", &format!("http://{}", member.peer)])
            .args([
                "--initial-advertise-peer-urls",
                &format!("http://{}", member.peer),
            ])
            .args(["--initial-cluster", &cluster.join(",")])
            .args([
                "--heartbeat-interval",
                "100",
                "--election-timeout",
                "1000",
                "--log-level",
                "error",
            ])
            .args(&self.more)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed (Debian: etcd-server; scripts/test installs it)");
        self.members[i].child = Some(child);
    }

    /// Waits until a transaction goes through.
    pub fn wait_for_leader(&self) {
        let start = Instant::now();
        while self.leader().is_none() {
            assert!(start.elapsed() < Duration::from_secs(60), "etcd found no leader");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// `etcdctl`'s answer, as JSON; null when it says something else.
    pub fn ctl(&self, i: usize, args: &[&str]) -> Option<serde_json::Value> {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args([
                "--endpoints",
                &self.members[i].client,
                "--command-timeout",
                "2s",
                "-w",
                "json",
            ])
            .args(args)
            .stderr(Stdio::null())
            .output()
            .expect("etcdctl is installed (Debian: etcd-client; scripts/test installs it)");
        output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    fn runs(&self, i: usize) -> bool {
        self.members[i].child.is_some()
    }

    /// Who leads, when all that run agree.
    pub fn leader(&self) -> Option<usize> {
        if self.scheme() == "https" {
            // Asked by name and password or certificate: the tests themselves wait.
            return Some(0);
        }
        let mut found = None;
        for i in (0..self.members.len()).filter(|i| self.runs(*i)) {
            let status = self.ctl(i, &["endpoint", "status"])?;
            let status = &status[0]["Status"];
            let (leader, own) = (
                status["leader"].as_u64()?,
                status["header"]["member_id"].as_u64()?,
            );
            if leader == 0 {
                return None;
            }
            if leader == own {
                found = Some(i);
            }
        }
        found
    }

    /// Below its own prefix, so that one etcd serves many registries.
    pub fn addr(&self, prefix: &str) -> EtcdAddr {
        EtcdAddr {
            endpoints: self.members.iter().map(|m| m.client.clone()).collect(),
            prefix: prefix.to_owned(),
        }
    }

    pub fn registry_addr(&self, prefix: &str) -> RegistryAddr {
        RegistryAddr::Etcd(self.addr(prefix))
    }

    pub fn client(&self, i: usize) -> &str {
        &self.members[i].client
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self, i: usize) {
        if let Some(mut child) = self.members[i].child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Puts a member's data back from a copy, and starts it.
    pub fn restore(&mut self, i: usize, copy: &std::path::Path) {
        let member = &self.members[i];
        std::fs::remove_dir_all(&member.data).unwrap();
        let restored = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["snapshot", "restore"])
            .arg(copy)
            .args(["--name", &member.name, "--data-dir"])
            .arg(&member.data)
            .args([
                "--initial-cluster",
                &format!("{}=http://{}", member.name, member.peer),
            ])
            .args([
                "--initial-advertise-peer-urls",
                &format!("http://{}", member.peer),
            ])
            .output()
            .unwrap();
        assert!(
            restored.status.success(),
            "{}",
            String::from_utf8_lossy(&restored.stderr)
        );
        self.run(i);
    }

    /// Where a member's data is.
    pub fn data(&self, i: usize) -> &std::path::Path {
        &self.members[i].data
    }

    /// SIGSTOP or SIGCONT.
    pub fn signal(&self, i: usize, signal: Signal) {
        let child = self.members[i].child.as_ref().unwrap();
        kill_process(Pid::from_child(child), signal).unwrap();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            if let Some(mut child) = member.child.take() {
                // It may have ended already. (SIGKILL ends a stopped one too.)
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
