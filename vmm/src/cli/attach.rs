//! `vmm console`.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::Args;

use super::control::Target;
use super::terminal::{self, RawMode, Typed};
use super::{CliError, Outcome};
use crate::api::Client;
use crate::api::client::ClientError;

/// How long a guest that reads nothing is waited for between two tries.
const AFTER_NOTHING: Duration = Duration::from_millis(100);

/// Attaches to a VM's console: what it has said lately, what it says, and what is typed. Ctrl-A x leaves, and the VM
/// runs on.
#[derive(Debug, Args)]
pub(super) struct Console {
    #[command(flatten)]
    target: Target,
    /// Print what is kept of it, and no more
    #[arg(long)]
    no_follow: bool,
}

impl Console {
    pub(super) async fn run(self) -> Result<Outcome, CliError> {
        let client = self.target.client()?;
        let mut console = client.console(None, !self.no_follow).await?;
        let raw = if self.no_follow {
            None
        } else {
            RawMode::enter().map_err(CliError::io("make the terminal raw"))?
        };
        let typed = match &raw {
            _ if self.no_follow => None,
            // A terminal that belongs to another job is left alone.
            None if io::stdin().is_terminal() => None,
            raw => Some(terminal::read_stdin(raw.is_some()).map_err(CliError::io("read standard input"))?),
        };
        if raw.is_some() {
            eprint!("[attached to {}; Ctrl-A x leaves]\r\n", self.target.name());
        }
        let typing = tokio::spawn(async move {
            match typed {
                Some(typed) => type_in(client, typed).await,
                None => std::future::pending().await,
            }
        });
        tokio::pin!(typing);
        let result = loop {
            tokio::select! {
                piece = console.next() => match piece {
                    Ok(Some(bytes)) => {
                        if let Err(error) = show(&bytes) {
                            break error;
                        }
                    }
                    Ok(None) => break Ok(Outcome::Done),
                    // The VM's process ended: so does its console.
                    Err(ClientError::Http { .. }) if !self.no_follow => break Ok(Outcome::Done),
                    Err(error) => break Err(error.into()),
                },
                left = &mut typing => match left {
                    Ok(result) => break result.map(|()| Outcome::Done),
                    Err(_) => break Err(CliError::Said("what is typed cannot be sent any more".into())),
                },
            }
        };
        drop(raw);
        result
    }
}

/// Shows output; `Err` holds how the command ends when it cannot be shown.
fn show(bytes: &[u8]) -> Result<(), Result<Outcome, CliError>> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Ok(Outcome::Done)),
        Err(error) => Err(Err(CliError::io("write to standard output")(error))),
    }
}

/// Sends what is typed until the user leaves. The end of a pipe is not the end of the console.
async fn type_in(client: Client, mut typed: tokio::sync::mpsc::Receiver<Typed>) -> Result<(), CliError> {
    while let Some(input) = typed.recv().await {
        let Typed::Bytes(bytes) = input else { return Ok(()) };
        let mut rest = hyper::body::Bytes::from(bytes);
        while !rest.is_empty() {
            let taken = client.type_in(rest.clone()).await?;
            rest = rest.slice(taken.min(rest.len())..);
            if taken == 0 {
                tokio::time::sleep(AFTER_NOTHING).await;
            }
        }
    }
    std::future::pending().await
}
