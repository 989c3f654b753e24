//! `on-host N COMMAND..`: from one emulated host, a command on another.

use std::process::ExitCode;

use clap::Parser;
use understudy_tests::nested::{self, remote};

/// Runs COMMAND on another host of `nested-host --hosts N`; its streams and exit status are this program's.
#[derive(Parser)]
#[command(name = "on-host", max_term_width = 100)]
struct Arguments {
    /// Serves the other hosts at this address (each host's init does)
    #[arg(long, value_name = "ADDRESS", exclusive = true)]
    serve: Option<String>,
    /// Stops that host as if its power had failed
    #[arg(long, conflicts_with = "command")]
    crash: bool,
    /// The number of the host, from 1
    #[arg(required_unless_present = "serve", value_name = "HOST")]
    host: Option<u8>,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match (arguments.serve, arguments.host, arguments.crash) {
        (Some(address), ..) => remote::serve(&address).map(|()| 0),
        (None, Some(host), true) => remote::crash(host).map(|()| 0),
        (None, Some(host), false) => remote::run_on(host, &arguments.command),
        (None, None, _) => Ok(2),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("on-host: {error:#}");
            ExitCode::from(nested::FAILED)
        }
    }
}
