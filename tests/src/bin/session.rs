//! Records a session at a whole Debian's console: `session DIRECTORY [OPTION...]`, with options of
//! `hindsight record`. The console goes to standard output.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use hindsight_tests::debian::Debian;
use hindsight_tests::whole::Whole;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((directory, options)) = arguments.split_first() else {
        eprintln!("usage: session DIRECTORY [OPTION...]");
        return ExitCode::from(2);
    };
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let debian = Debian::from_env();
    let worked = Whole::new(&debian, "debian").record(Path::new(directory), "session", &options);
    let ran = worked.end.ran;
    eprint!("{}", ran.stderr);
    if std::io::stdout().write_all(&ran.stdout).is_err() {
        return ExitCode::from(5);
    }
    if let Some(failure) = worked.failure {
        eprintln!("session: {failure}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
