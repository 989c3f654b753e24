//! The agent of a standby host, and the command line that talks to it. What it does is in `migrate::agent`.

use std::io::IsTerminal;
use std::process::ExitCode;

use migrate::agent::cli::Cli;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::from_process();
    let usual = if cli.serves() { "info" } else { "warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(usual));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .init();
    cli.run()
}
