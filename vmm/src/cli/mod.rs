//! The command line.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | done; of `run` and `restore`: the guest ended by itself or was stopped |
//! | 1 | an error, said on standard error |
//! | 2 | a command line that makes no sense |
//! | 3 | of `run` and `restore`: fenced, another host may run the VM now |
//! | 4 | of `run` and `restore`: the guest cannot go on (a triple fault, a CPU state KVM refuses) |

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use migrate::keyfile::KeyFileError;
use segment::{FormatError, NameError};

use crate::api::client::ClientError;
use crate::api::fault::Fault;
use crate::api::server::SocketError;
use crate::config::ConfigError;
use crate::session::{SessionError, chain};
use rundir::PlaceError;

mod attach;
mod control;
mod detach;
mod devices;
mod frames;
mod global;
mod host;
mod inspect;
mod logging;
mod options;
mod picture;
mod ps;
mod restore;
mod run;
pub mod rundir;
mod size;
mod terminal;

/// The status of a `run` whose VM was fenced.
pub const FENCED: u8 = 3;
/// The status of a `run` whose guest cannot go on.
pub const GUEST_FAILED: u8 = 4;

/// Virtual machines that a standby host can take over.
#[derive(Debug, Parser)]
#[command(
    name = "vmm",
    version,
    about = "Runs virtual machines whose checkpoints can be restored on another host",
    after_help = "Exit status: 0 done (of run and restore: the guest ended or was stopped), 1 an error, 2 a command \
                  line that makes no sense, 3 fenced (another host may run the VM now), 4 the guest cannot go on.\n\
                  Environment: UNDERSTUDY_RUN_DIR (as --run-dir), UNDERSTUDY_LOG or RUST_LOG (what is logged, like \
                  debug or vmm=trace).",
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a new VM
    Run(Box<run::Run>),
    /// Run a VM from a checkpoint
    Restore(Box<restore::Restore>),
    /// List the VMs of this host
    Ps(ps::Ps),
    /// Make a VM stand still
    Pause(control::Pause),
    /// Let a VM go on
    Resume(control::Resume),
    /// End a VM
    Stop(control::Stop),
    /// Take a checkpoint of a VM
    Checkpoint(control::Checkpoint),
    Balloon(control::Balloon),
    /// Attach to a VM's console
    Console(attach::Console),
    /// Show all that is known of a VM or of a segment file
    Inspect(inspect::Inspect),
    /// Print the OpenAPI document of the control API
    Openapi,
    /// Print a completion script
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
}

/// Why a command failed. `vmm` prints it with its causes.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    #[error(transparent)]
    Session(Box<SessionError>),
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("read the segment {path:?}")]
    Segment {
        path: PathBuf,
        #[source]
        source: FormatError,
    },
    #[error("make a picture of {what:?}")]
    Picture {
        what: PathBuf,
        #[source]
        source: picture::PictureError,
    },
    #[error("print the answer as JSON")]
    Json(#[from] serde_json::Error),
    /// In words that need no cause.
    #[error("{0}")]
    Said(String),
}

impl From<SessionError> for CliError {
    fn from(error: SessionError) -> Self {
        Self::Session(Box::new(error))
    }
}

impl From<Fault> for CliError {
    fn from(fault: Fault) -> Self {
        Self::Said(fault.message)
    }
}

impl CliError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// How a command that did not fail went.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Done,
    /// The guest ended by itself.
    Ended,
    Fenced(String),
    GuestFailed(String),
    /// It failed, and has said so.
    Failed,
}

/// Does what the command line asks for.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are such "errors" too: clap knows where they go and what status they have.
        Err(error) => error.exit(),
    };
    match cli.command.run() {
        Ok(Outcome::Done | Outcome::Ended) => ExitCode::SUCCESS,
        Ok(Outcome::Failed) => ExitCode::FAILURE,
        Ok(Outcome::Fenced(why)) => {
            eprintln!("error: fenced: {why}. It can never go on here");
            ExitCode::from(FENCED)
        }
        Ok(Outcome::GuestFailed(why)) => {
            eprintln!("error: the guest cannot go on: {why}");
            ExitCode::from(GUEST_FAILED)
        }
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

impl Command {
    fn run(self) -> Result<Outcome, CliError> {
        match self {
            Self::Run(run) => run.run(),
            Self::Restore(restore) => restore.run(),
            Self::Ps(ps) => on_runtime(ps.run()),
            Self::Pause(pause) => on_runtime(pause.run()),
            Self::Resume(resume) => on_runtime(resume.run()),
            Self::Stop(stop) => on_runtime(stop.run()),
            Self::Checkpoint(checkpoint) => on_runtime(checkpoint.run()),
            Self::Balloon(balloon) => on_runtime(balloon.run()),
            Self::Console(console) => on_runtime(console.run()),
            Self::Inspect(inspect) => on_runtime(inspect.run()),
            Self::Openapi => print_json(&crate::api::openapi::document()),
            Self::Completions { shell } => {
                use clap::CommandFactory;
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "vmm", &mut script);
                print(&script)
            }
        }
    }
}

/// Runs a command's future; what it leaves behind (a thread that waits for the keyboard) holds nothing up.
fn on_runtime(work: impl Future<Output = Result<Outcome, CliError>>) -> Result<Outcome, CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("start the threads that serve requests"))?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}

fn print_json(value: &impl serde::Serialize) -> Result<Outcome, CliError> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    print(&text)
}

/// To standard output. A reader that has seen enough (`vmm ps | head`) is no error.
fn print(text: &[u8]) -> Result<Outcome, CliError> {
    use std::io::Write;
    match io::stdout().write_all(text).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(CliError::io("write to standard output")(error))
        }
        Ok(()) | Err(_) => Ok(Outcome::Done),
    }
}

/// Whether `text` could only be meant as a path.
fn looks_like_a_path(text: &OsStr) -> bool {
    text.as_encoded_bytes().contains(&b'/') || std::path::Path::new(text).is_file()
}
