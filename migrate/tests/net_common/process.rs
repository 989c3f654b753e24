//! The real `standby` binary as a process.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// A running `standby serve`; killed when dropped.
pub struct Served {
    pub child: Child,
    pub address: String,
}

pub fn standby(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_standby"))
        .arg("--insecure-plaintext")
        .args(args)
        .env_remove("STANDBY_AGENT")
        .output()
        .unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Served {
    /// Starts it and waits until it listens.
    pub fn start(data: &Path, name: &str, listen: &str, more: &[&str]) -> Self {
        Self::start_in(data, name, listen, more, &[])
    }

    /// The same, with something in its environment.
    pub fn start_in(
        data: &Path,
        name: &str,
        listen: &str,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_standby"));
        command
            .args([
                "serve",
                "--insecure-plaintext",
                "--name",
                name,
                "--listen",
                listen,
                "--data",
            ])
            .arg(data)
            .args(more);
        command
            .envs(environment.iter().copied())
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped())
            .stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .strip_prefix("listening on ")
            .expect("it listens")
            .to_owned();
        Self { child, address }
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and waits for its end.
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
