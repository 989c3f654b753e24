//! `scripts/torture`: failovers and cut links, again and again, with real processes.

use std::process::ExitCode;

fn main() -> ExitCode {
    understudy_tests::torture::main()
}
