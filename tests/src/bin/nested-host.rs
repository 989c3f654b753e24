//! `scripts/nested-host`: a command in an emulated machine with a complete KVM.

use std::process::ExitCode;

use clap::Parser;
use understudy_tests::nested::{self, Options};

fn main() -> ExitCode {
    match nested::run(&Options::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(nested::FAILED)
        }
    }
}
