//! Running the `hindsight` program on Debian's kernel, as a user would.
//!
//! Needs a KVM that can record. `scripts/test` gives these tests one, and says by the environment
//! where things are: `HINDSIGHT_BIN`, `HINDSIGHT_KERNEL`, `HINDSIGHT_IMAGES`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// What a run of the program came to.
#[derive(Debug)]
pub struct Ran {
    /// Exit code; -1 for a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// From the output of a finished process. A panic of ours is never all right.
    pub fn new(output: Output) -> Ran {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !stderr.contains("panicked at"),
            "hindsight panicked:\n{stderr}"
        );
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr,
        }
    }

    /// Asserts the exit code.
    #[track_caller]
    pub fn expect(self, code: i32) -> Ran {
        assert_eq!(
            self.code,
            code,
            "stderr:\n{}\nstdout:\n{}",
            self.stderr,
            self.text()
        );
        self
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard output as one JSON value.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}\n{}", self.text(), self.stderr))
    }
}

/// The program and the guests.
#[derive(Clone, Debug)]
pub struct Debian {
    binary: PathBuf,
    kernel: PathBuf,
    images: PathBuf,
}

impl Debian {
    /// As the environment says.
    pub fn from_env() -> Debian {
        let path =
            |name: &str| {
                PathBuf::from(std::env::var_os(name).unwrap_or_else(|| {
                    panic!("{name} is not set; run these tests with scripts/test")
                }))
            };
        Debian {
            binary: path("HINDSIGHT_BIN"),
            kernel: path("HINDSIGHT_KERNEL"),
            images: path("HINDSIGHT_IMAGES"),
        }
    }

    /// The same with another kernel.
    pub fn with_kernel(&self, kernel: &Path) -> Debian {
        Debian {
            kernel: kernel.into(),
            ..self.clone()
        }
    }

    /// Path of a guest image.
    pub fn image(&self, name: &str) -> PathBuf {
        self.images.join(format!("{name}.cpio"))
    }

    /// The kernel.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The program with arguments, streams piped.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs it to its end.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        Ran::new(self.command(arguments).output().expect("hindsight starts"))
    }

    /// A recording of `image` to come, in `directory`.
    pub fn recording(&self, directory: &Path, image: &str, more: &[&str]) -> Command {
        let mut command = self.command(&["record", "-o"]);
        command.arg(directory).arg("--kernel").arg(&self.kernel);
        command.arg("--initrd").arg(self.image(image)).args(more);
        command
    }

    /// Records `image`, with `typed` on standard input.
    pub fn record(&self, directory: &Path, image: &str, more: &[&str], typed: &[u8]) -> Ran {
        let mut command = self.recording(directory, image, more);
        let mut child = command
            .stdin(Stdio::piped())
            .spawn()
            .expect("hindsight starts");
        type_into(&mut child, typed);
        Ran::new(child.wait_with_output().expect("hindsight ends"))
    }

    /// Replays a recording.
    pub fn replay(&self, directory: &Path, more: &[&str]) -> Ran {
        let mut command = self.command(&["replay"]);
        Ran::new(
            command
                .arg(directory)
                .args(more)
                .output()
                .expect("hindsight starts"),
        )
    }

    /// Inspects a recording.
    pub fn inspect(&self, directory: &Path, more: &[&str]) -> Ran {
        let mut command = self.command(&["inspect"]);
        Ran::new(
            command
                .arg(directory)
                .args(more)
                .output()
                .expect("hindsight starts"),
        )
    }
}

/// Types into a running guest and closes the stream.
pub fn type_into(child: &mut Child, typed: &[u8]) {
    let mut stdin = child.stdin.take().expect("standard input is piped");
    // A guest that ended before it read everything is the test's business, not ours.
    let _ = stdin.write_all(typed);
}

/// Copies a recording.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory can be made");
    for entry in std::fs::read_dir(from).expect("the recording is there") {
        let entry = entry.expect("the directory can be read");
        let kind = entry.file_type().expect("it is there");
        // A recorder that was killed leaves the socket that it listened at.
        if !kind.is_file() && !kind.is_symlink() {
            continue;
        }
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("files can be copied");
    }
}
