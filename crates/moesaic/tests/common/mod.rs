//! Running the real binary, and small checkpoints to run it on.

#![allow(dead_code, reason = "no test file uses all of it")]

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Only a program that hangs takes as long; nothing here needs more than a second of CPU.
const HANG: Duration = Duration::from_secs(60);

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Of a run that went well, standard output.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.stdout
    }

    /// The same as JSON.
    #[track_caller]
    pub(crate) fn json(self) -> serde_json::Value {
        let stdout = self.ok();
        serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"))
    }

    /// Of a run that was refused: exit code 2, nothing on standard output, and one sentence that has all the parts.
    #[track_caller]
    pub(crate) fn refused(self, parts: &[&str]) -> String {
        assert_eq!(self.code, Some(2), "{self:#?}");
        assert_eq!(self.stdout, "", "{self:#?}");
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "one sentence: {self:#?}");
        assert!(self.stderr.trim_end().ends_with(errors[0]), "the error is the last line: {self:#?}");
        for part in parts {
            assert!(errors[0].contains(part), "no {part:?} in {:?}", errors[0]);
        }
        for panic in ["panicked", "RUST_BACKTRACE", "overflow"] {
            assert!(!self.stderr.contains(panic), "{self:#?}");
        }
        errors[0].to_string()
    }
}

/// The binary under test, with two threads and nothing from the environment that could change it.
fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moesaic"));
    command.env_remove("MOESAIC_ISA").env("MOESAIC_NUM_THREADS", "2").stdin(Stdio::null());
    command
}

/// Runs the binary; standard input is empty.
pub(crate) fn moesaic<S: AsRef<OsStr>>(args: &[S]) -> Ran {
    let mut command = command();
    command.args(args);
    wait(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// Runs the binary on this standard input.
pub(crate) fn moesaic_with_stdin<S: AsRef<OsStr>>(args: &[S], stdin: &str) -> Ran {
    let mut command = command();
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It may end without reading.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    wait(child)
}

/// Runs the binary with so much address space; what asks for more memory fails.
pub(crate) fn moesaic_within<S: AsRef<OsStr>>(address_space_kib: u64, args: &[S]) -> Ran {
    let mut command = Command::new("sh");
    command.env_remove("MOESAIC_ISA").env("MOESAIC_NUM_THREADS", "2").stdin(Stdio::null());
    command.arg("-c").arg(format!("ulimit -v {address_space_kib} && exec \"$0\" \"$@\""));
    command.arg(env!("CARGO_BIN_EXE_moesaic")).args(args);
    wait(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

fn wait(mut child: Child) -> Ran {
    fn reader(mut stream: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            String::from_utf8(bytes).expect("output is UTF-8")
        })
    }
    let (stdout, stderr) = (reader(child.stdout.take().unwrap()), reader(child.stderr.take().unwrap()));
    let status = wait_status(&mut child);
    Ran { code: status.code(), stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

fn wait_status(child: &mut Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if start.elapsed() > HANG {
            child.kill().unwrap();
            panic!("the program hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A folder that is gone after the test.
pub(crate) fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// The folder of one of the goldens.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

/// A path as an argument.
pub(crate) fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Copies the files of a folder.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
