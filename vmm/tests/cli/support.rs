//! A place of its own for each test: guests, a run folder, a state folder, and the real binary.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `look` finds something.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "waited {} s for {what}",
            PATIENCE.as_secs()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) struct World {
    dir: tempfile::TempDir,
}

/// What a finished command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Said {
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// It worked, and this is what it printed.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code(), 0, "{self:?}");
        self.stdout
    }

    /// It failed with one line that begins with `error:` and has every one of `parts` in it.
    #[track_caller]
    pub(crate) fn refused(self, parts: &[&str]) {
        assert_eq!(self.code(), 1, "{self:?}");
        assert!(self.stderr.starts_with("error: "), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is not in {:?}", self.stderr);
        }
    }
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

    pub(crate) fn ticker(&self) -> String {
        self.text("ticker.elf")
    }

    pub(crate) fn churn(&self) -> String {
        self.text("churn.elf")
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .current_dir(self.dir.path())
            .env("UNDERSTUDY_RUN_DIR", self.run_dir())
            .env("XDG_STATE_HOME", self.path("state"))
            .env_remove("UNDERSTUDY_LOG")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// Runs `vmm` to its end.
    #[track_caller]
    pub(crate) fn vmm(&self, args: &[&str]) -> Said {
        self.start(args).finish()
    }

    /// Starts `vmm`.
    pub(crate) fn start(&self, args: &[&str]) -> Running {
        let mut command = self.command(env!("CARGO_BIN_EXE_vmm"));
        command.args(args);
        Running::new(command)
    }

    /// A guest in the background.
    #[track_caller]
    pub(crate) fn detached(&self, name: &str, cmdline: &str) {
        let kernel = self.ticker();
        self.vmm(&[
            "run",
            "--name",
            name,
            "--kernel",
            &kernel,
            "--memory",
            "32M",
            "--cmdline",
            cmdline,
            "--detach",
        ])
        .ok();
    }

    /// `vmm ps` of one VM.
    pub(crate) fn row(&self, name: &str) -> Option<serde_json::Value> {
        let rows: serde_json::Value = serde_json::from_str(&self.vmm(&["ps", "--json"]).ok()).unwrap();
        rows.as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == name)
            .cloned()
    }

    /// What is kept of a VM's console.
    #[track_caller]
    pub(crate) fn console(&self, name: &str) -> String {
        self.vmm(&["console", name, "--no-follow"]).ok()
    }

    /// The highest N of the `tick N` lines a VM has said.
    pub(crate) fn ticks(&self, name: &str) -> Option<u64> {
        last_tick(&self.console(name))
    }
}

/// The highest N of the `tick N` lines; a last line that is not complete does not count.
pub(crate) fn last_tick(text: &str) -> Option<u64> {
    let whole = text.rsplit_once('\n')?.0;
    whole
        .lines()
        .filter_map(|line| line.trim().strip_prefix("tick ")?.parse().ok())
        .max()
}

impl Drop for World {
    /// No VM outlives its test.
    fn drop(&mut self) {
        let Ok(output) = self
            .command(env!("CARGO_BIN_EXE_vmm"))
            .args(["ps", "--json"])
            .output()
        else {
            return;
        };
        let Ok(rows) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else {
            return;
        };
        for row in rows.as_array().into_iter().flatten() {
            if let Some(pid) = row["status"]["pid"].as_u64() {
                kill(pid, "KILL");
            }
        }
    }
}

/// Sends a signal.
pub(crate) fn kill(pid: u64, signal: &str) {
    Command::new("sh")
        .arg("-c")
        .arg(format!("kill -{signal} {pid}"))
        .status()
        .unwrap();
}

type Text = Arc<Mutex<Vec<u8>>>;

/// A process that runs; killed if the test ends before it.
pub(crate) struct Running {
    child: Child,
    stdout: Text,
    stderr: Text,
    readers: Vec<std::thread::JoinHandle<()>>,
}

fn collect(mut from: impl Read + Send + 'static, to: &Text) -> std::thread::JoinHandle<()> {
    let to = Arc::clone(to);
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut piece) {
            to.lock().unwrap().extend_from_slice(&piece[..count]);
        }
    })
}

impl Running {
    pub(crate) fn new(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdout, stderr) = (Text::default(), Text::default());
        let readers = vec![
            collect(child.stdout.take().unwrap(), &stdout),
            collect(child.stderr.take().unwrap(), &stderr),
        ];
        Self {
            child,
            stdout,
            stderr,
            readers,
        }
    }

    pub(crate) fn pid(&self) -> u64 {
        self.child.id().into()
    }

    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.lock().unwrap()).into_owned()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().unwrap()).into_owned()
    }

    /// Waits until it has said `text`.
    #[track_caller]
    pub(crate) fn says(&mut self, text: &str) {
        wait_for(&format!("{text:?}"), || {
            if self.stdout().contains(text) {
                return Some(());
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                // Its last words may still be on their way.
                std::thread::sleep(Duration::from_millis(50));
                let (out, err) = (self.stdout(), self.stderr());
                assert!(
                    out.contains(text),
                    "it ended ({status}) before it said {text:?}: {out}\n{err}"
                );
            }
            None
        });
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(bytes).unwrap();
        stdin.flush().unwrap();
    }

    pub(crate) fn signal(&self, signal: &str) {
        kill(self.pid(), signal);
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Said {
        let status = wait_for("the end of a command", || self.child.try_wait().unwrap());
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        Said {
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Ended already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
