//! The command line's entry.

fn main() -> std::process::ExitCode {
    hindsight_cli::main()
}
