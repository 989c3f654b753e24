//! The monitor's command line; see `vmm::cli`.

fn main() -> std::process::ExitCode {
    vmm::cli::main()
}
