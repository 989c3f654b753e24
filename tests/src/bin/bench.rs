//! `scripts/bench`: the rows of MEASURE.md, beside what this machine would allow.

use std::process::ExitCode;

use clap::Parser;
use understudy_tests::bench::{self, Options};

/// Measures Understudy with real guests, and this machine's own limits beside it.
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    match bench::run(&Arguments::parse().options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
