//! A real S3-compatible server on loopback: moto, in a Python environment that `scripts/test` makes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long it may take to come up: Python on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The server; ended when dropped. What is in it is in its memory.
#[derive(Debug)]
pub struct S3 {
    child: Option<Child>,
    port: u16,
}

/// The keys of a user.
#[derive(Debug, Clone)]
pub struct Keys {
    /// aws_access_key_id
    pub id: String,
    /// aws_secret_access_key
    pub secret: String,
}

impl Keys {
    /// Some that any server accepts that checks none.
    #[must_use]
    pub fn any() -> Self {
        Self {
            id: "test".into(),
            secret: "test".into(),
        }
    }

    /// Writes them to a file, as the AWS tools have it.
    pub fn write(&self, path: &Path) {
        let (id, secret) = (&self.id, &self.secret);
        let text = format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n");
        std::fs::write(path, text).unwrap();
    }
}

/// Where the server's program is: named by MOTO_SERVER, made by `scripts/test`, or in the path.
fn program() -> PathBuf {
    if let Some(named) = std::env::var_os("MOTO_SERVER") {
        return named.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
        PathBuf::from,
    );
    let made = target.join("moto/bin/moto_server");
    match made.is_file() {
        true => made,
        false => "moto_server".into(),
    }
}

impl S3 {
    /// Starts one on a port of the system's choice, and waits until it answers.
    #[must_use]
    pub fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let mut server = Self { child: None, port };
        server.again();
        server
    }

    /// Starts it again where it was, empty.
    pub fn again(&mut self) {
        let child = Command::new(program())
            .args(["-H", "127.0.0.1", "-p", &self.port.to_string()])
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect(
                "moto's server is installed (PyPI: moto[s3], flask, flask-cors; scripts/test installs it)",
            );
        self.child = Some(child);
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(start.elapsed() < PATIENCE, "moto's server did not come up");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// SIGKILL, and waits for its end.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Its endpoint.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Makes a bucket.
    pub fn make_bucket(&self, name: &str) {
        self.ask("PUT", &format!("/{name}"), "s3", "");
    }

    /// A user that may do nothing.
    #[must_use]
    pub fn user(&self, name: &str) -> Keys {
        self.iam(&format!("Action=CreateUser&UserName={name}"));
        let made = self.iam(&format!("Action=CreateAccessKey&UserName={name}"));
        let of = |tag: &str| {
            let (_, rest) = made.split_once(&format!("<{tag}>")).unwrap();
            rest.split_once('<').unwrap().0.to_owned()
        };
        Keys {
            id: of("AccessKeyId"),
            secret: of("SecretAccessKey"),
        }
    }

    /// Lets a user do everything with every bucket. It checks nothing after that until it is told to again.
    pub fn allow(&self, user: &str) {
        self.ask("POST", "/moto-api/reset-auth", "s3", "inf");
        let policy = "%7B%22Version%22%3A%222012-10-17%22%2C%22Statement%22%3A%5B%7B%22Effect%22%3A%22Allow%22%2C%22Action%22\
                      %3A%22s3%3A*%22%2C%22Resource%22%3A%22*%22%7D%5D%7D";
        self.iam(&format!(
            "Action=PutUserPolicy&UserName={user}&PolicyName=all&PolicyDocument={policy}"
        ));
    }

    /// From now on it checks who asks, and whether they may.
    pub fn check(&self) {
        self.ask("POST", "/moto-api/reset-auth", "s3", "0");
    }

    fn iam(&self, body: &str) -> String {
        self.ask("POST", "/", "iam", &format!("{body}&Version=2010-05-08"))
    }

    /// One request, not signed; the answer's body.
    fn ask(&self, method: &str, path: &str, service: &str, body: &str) -> String {
        let kind = match service {
            "iam" => "application/x-www-form-urlencoded",
            _ => "application/octet-stream",
        };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\nContent-Type: {kind}\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/{service}/aws4_request, \
             SignedHeaders=host, Signature=0\r\nContent-Length: {}\r\n\r\n{body}",
            self.port,
            body.len()
        );
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{method} {path}: {answer}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.stop();
    }
}
