//! The MPI launcher, for ranks on several machines.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::env;

/// A launcher of MPI programs.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Mpi {
    /// Where it is.
    pub launcher: PathBuf,
    /// The line in which it says what it is; `None` when it did not answer in time.
    pub version: Option<String>,
}

/// A broken installation may wait for a network that is not there.
const DEADLINE: Duration = Duration::from_secs(2);

pub(super) fn find() -> Option<Mpi> {
    let folders = env::program_folders();
    let mut candidates = ["mpirun", "mpiexec"].into_iter().flat_map(|name| folders.iter().map(move |f| f.join(name)));
    let launcher = candidates.find(|path| path.is_file())?;
    let version = version_line(&launcher, DEADLINE);
    Some(Mpi { launcher, version })
}

/// The first line with a digit in it of what `--version` prints: Open MPI's first, MPICH's second.
fn version_line(program: &Path, deadline: Duration) -> Option<String> {
    let until = Instant::now() + deadline;
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let stdout = child.stdout.take().expect("stdout was piped");
    let (send, receive) = mpsc::channel();
    // A thread, because a pipe cannot be read with a deadline; it ends when the pipe closes.
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        // Nobody listens any more after the deadline.
        let _ = send.send(lines.find(|line| line.chars().any(|c| c.is_ascii_digit())));
    });
    let line = receive.recv_timeout(until.saturating_duration_since(Instant::now())).ok().flatten();
    // It has said what we want, or had its time; a process that ended already cannot be killed, which is no error.
    let _ = child.kill();
    let _ = child.wait();
    line.map(|line| line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(script: &str) -> (tempfile::TempDir, PathBuf) {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mpirun");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (folder, path)
    }

    #[test]
    fn both_kinds_say_their_version() {
        let (_open, open) = program("echo 'mpirun (Open MPI) 5.0.7'; echo; echo 'Report bugs'");
        assert_eq!(version_line(&open, DEADLINE).unwrap(), "mpirun (Open MPI) 5.0.7");
        let (_mpich, mpich) = program("echo 'HYDRA build details:'; echo '    Version:      4.3.0'");
        assert_eq!(version_line(&mpich, DEADLINE).unwrap(), "Version:      4.3.0");
    }

    #[test]
    fn a_launcher_that_hangs_is_not_waited_for() {
        let (_folder, path) = program("exec sleep 30");
        let start = Instant::now();
        assert_eq!(version_line(&path, Duration::from_millis(50)), None);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
