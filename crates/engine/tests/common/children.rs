//! Ranks that are processes: the test binary, started again for its one test `child`, which is a rank of a golden model.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use moesaic_engine::{Engine, EngineConfig, EngineError, Launch, RankLink, Ranks, launch_plan, serve_rank};
use moesaic_plan::{PlanFile, Rank};

use super::GoldenModel;
use super::plans::Subject;

/// Folder, rank and the name of the golden, divided by line ends.
const ROLE: &str = "MOESAIC_ENGINE_TEST_ROLE";

/// What the test `child` of a file does: nothing when it is run as a test.
pub(crate) fn be_a_rank() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let fields: Vec<&str> = role.lines().collect();
    let [folder, rank, golden] = fields[..] else { panic!("a role of three lines: {role}") };
    let link = RankLink::connect(Path::new(folder), rank.parse().unwrap()).unwrap();
    let model = GoldenModel::open(golden);
    // Its leader is told of errors.
    let _ = serve_rank(link, &model.without_capacity(), &Launch::Checkpoint(&model.checkpoint));
}

/// Processes that were started, and where they met.
#[derive(Default)]
pub(crate) struct Started {
    pids: RefCell<Vec<u32>>,
    folder: RefCell<PathBuf>,
}

impl Started {
    /// Starts a rank, as [`Ranks::Processes`] wants it.
    pub(crate) fn spawn(&self, rank: Rank, folder: &Path, golden: &str) -> std::io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", "child", "--test-threads=1"]);
        command.env(ROLE, format!("{}\n{rank}\n{golden}", folder.display()));
        self.note(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?, folder)
    }

    /// Takes note of a process.
    pub(crate) fn note(&self, child: Child, folder: &Path) -> std::io::Result<Child> {
        self.pids.borrow_mut().push(child.id());
        *self.folder.borrow_mut() = folder.to_path_buf();
        Ok(child)
    }

    /// Sends a signal to a rank.
    pub(crate) fn signal(&self, rank: usize, signal: &str) {
        let pid = self.pids.borrow()[rank].to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Whether no process is there any more, and no folder.
    pub(crate) fn assert_nothing_is_left(&self) {
        for pid in self.pids.borrow().iter() {
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is still there");
        }
        assert!(!self.folder.borrow().exists(), "{:?} is still there", self.folder.borrow());
    }
}

/// A plan on processes.
pub(crate) fn processes(
    subject: &Subject,
    file: PlanFile,
    config: &EngineConfig,
    started: &Started,
) -> Result<Engine, EngineError> {
    let spawn = |rank, folder: &Path| started.spawn(rank, folder, subject.name);
    launch_plan(subject.spec, subject.weights, &subject.plan(file), config, Ranks::Processes(&spawn), |_| ())
}

/// The sentence of the error that ends a run within `most`.
pub(crate) fn last_words(engine: &mut Engine, most: Duration) -> String {
    let start = Instant::now();
    let error = loop {
        assert!(!engine.is_idle(), "the run ended well");
        if let Err(error) = engine.step() {
            break error.to_string();
        }
    };
    assert!(start.elapsed() < most, "after {:?}: {error}", start.elapsed());
    let again = engine.step().unwrap_err().to_string();
    assert_eq!(again, format!("the ranks have ended: {error}"));
    error
}
