//! `scripts/demo`: a guest survives the death of its host.

use std::process::ExitCode;

use clap::Parser;
use understudy_tests::demo::{self, Options};

/// Shows a running guest survive the death of its host, with real agents and real KVM on this machine.
#[derive(Parser)]
#[command(name = "demo")]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    match demo::tell(&Arguments::parse().options) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
