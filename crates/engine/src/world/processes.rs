//! Ranks that are processes of this machine. Each has a control connection to the leader beside those to other ranks: over
//! it come the setup (JSON, once), then commands, and back go replies (postcard, a length before each).

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use moesaic_plan::Rank as RankId;
use moesaic_spec::ModelSpec;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::failures::Failures;
use super::threads::text_of;
use crate::EngineError;
use crate::launch::{Launch, RankSetup, build_process_rank};
use crate::wire::{StepCommand, StepReply};

/// Larger than any honest command or reply (kept logits of a long prompt are the largest).
const MAX_FRAME_BYTES: usize = 1 << 30;
/// The leader's socket in the rendezvous folder.
const CONTROL: &str = "control.sock";
/// How long an ended process is waited for before it is killed.
const PATIENCE: Duration = Duration::from_millis(500);

/// Starts the process of a rank, which then calls [`serve_rank`] with the same folder.
pub type RankProcess<'a> = dyn Fn(RankId, &Path) -> std::io::Result<Child> + 'a;

/// What a rank answers.
#[derive(Serialize, Deserialize)]
enum Answer {
    Ready,
    Reply(Box<StepReply>),
    Failed { severity: u8, awaited: Option<RankId>, what: String },
}

/// The processes, as the leader holds them.
pub(crate) struct Processes {
    children: Vec<Child>,
    streams: Vec<UnixStream>,
    answers: Receiver<(RankId, Result<Answer, String>)>,
    deadline: Duration,
}

impl Processes {
    /// Starts all ranks and gives each its setup.
    pub(crate) fn start(
        setups: &[RankSetup],
        spawn: &RankProcess,
        deadline: Duration,
    ) -> Result<Processes, EngineError> {
        let system = |what: &str, why: std::io::Error| EngineError::System { what: what.to_string(), why };
        let mut builder = tempfile::Builder::new();
        // Where nobody else can meet; whatever the umask says.
        builder.prefix("moesaic-").permissions(Permissions::from_mode(0o700));
        let folder = builder.tempdir().map_err(|e| system("a folder for sockets", e))?;
        let listener = UnixListener::bind(folder.path().join(CONTROL)).map_err(|e| system("the control socket", e))?;
        listener.set_nonblocking(true).map_err(|e| system("the control socket", e))?;
        let (answer, answers) = channel();
        let mut world = Processes { children: Vec::new(), streams: Vec::new(), answers, deadline };
        for rank in 0..setups.len() as u32 {
            let child = spawn(RankId(rank), folder.path());
            world.children.push(child.map_err(|e| system(&format!("the process of rank {rank}"), e))?);
        }
        let until = Instant::now() + deadline;
        let mut streams: Vec<Option<UnixStream>> = setups.iter().map(|_| None).collect();
        while streams.iter().any(Option::is_none) {
            match listener.accept() {
                Ok((mut stream, _)) => {
                    stream.set_nonblocking(false).map_err(|e| system("a control connection", e))?;
                    stream.set_read_timeout(Some(deadline)).map_err(|e| system("a control connection", e))?;
                    let rank: RankId = receive(&mut stream).map_err(|e| system("a rank's first words", e))?;
                    let place = streams.get_mut(rank.idx()).filter(|place| place.is_none());
                    let place = place.ok_or_else(|| EngineError::Ended { why: format!("rank {rank} came twice") })?;
                    stream.set_read_timeout(None).map_err(|e| system("a control connection", e))?;
                    // A rank that is stopped reads nothing.
                    stream.set_write_timeout(Some(deadline)).map_err(|e| system("a control connection", e))?;
                    *place = Some(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let late = RankId(streams.iter().position(Option::is_none).expect("one is missing") as u32);
                    if let Some((rank, status)) = world.ended() {
                        return Err(EngineError::Died { rank, status: status.to_string() });
                    }
                    if Instant::now() > until {
                        return Err(EngineError::Stalled { rank: late, seconds: deadline.as_secs_f64() });
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(system("the control socket", error)),
            }
        }
        world.streams = streams.into_iter().flatten().collect();
        for (rank, (stream, setup)) in world.streams.iter_mut().zip(setups).enumerate() {
            let json = serde_json::to_vec(setup).expect("a setup is plain data");
            send_bytes(stream, &json).map_err(|e| system(&format!("the setup of rank {rank}"), e))?;
            let mut reading = stream.try_clone().map_err(|e| system("a control connection", e))?;
            let (rank, answer) = (RankId(rank as u32), answer.clone());
            std::thread::spawn(move || {
                loop {
                    let got = receive(&mut reading).map_err(|why| why.to_string());
                    let ended = got.is_err();
                    if answer.send((rank, got)).is_err() || ended {
                        return;
                    }
                }
            });
        }
        // Loading takes as long as it takes; a process that ends meanwhile is noticed.
        world.collect(Duration::from_secs(3600))?;
        // All have met. A leader that is killed from here on leaves nothing behind.
        folder.close().map_err(|e| system("the folder for sockets", e))?;
        Ok(world)
    }

    pub(crate) fn step(&mut self, commands: Vec<StepCommand>) -> Result<Vec<StepReply>, EngineError> {
        for (rank, command) in commands.iter().enumerate() {
            if let Err(why) = send(&mut self.streams[rank], command) {
                let rank = RankId(rank as u32);
                return Err(self.lost(rank, &why.to_string()));
            }
        }
        let replies = self.collect(self.deadline)?.into_iter().map(|answer| match answer {
            Answer::Reply(reply) => Ok(*reply),
            _ => Err(EngineError::Ended { why: "a rank answered what was not asked".into() }),
        });
        replies.collect()
    }

    /// One answer of each rank.
    fn collect(&mut self, deadline: Duration) -> Result<Vec<Answer>, EngineError> {
        let num_ranks = self.streams.len();
        let mut answers: Vec<Option<Answer>> = (0..num_ranks).map(|_| None).collect();
        let mut failures = Failures::default();
        let mut silent: BTreeSet<RankId> = (0..num_ranks as u32).map(RankId).collect();
        let mut until = Instant::now() + deadline;
        while !silent.is_empty() && !failures.explain(&silent) {
            let Ok((rank, answer)) = self.answers.recv_timeout(until.saturating_duration_since(Instant::now())) else {
                break;
            };
            let is_first = silent.remove(&rank);
            match answer {
                Ok(Answer::Failed { severity, awaited, what }) => {
                    until = failures.push(rank, EngineError::Remote { severity, awaited, what }, until);
                }
                Ok(answer) => answers[rank.idx()] = Some(answer),
                // It has said why it ends, or has done its part.
                Err(_) if !is_first => {}
                Err(why) => until = failures.push(rank, self.lost(rank, &why), until),
            }
        }
        failures.check(&silent, deadline)?;
        Ok(answers.into_iter().flatten().collect())
    }

    /// The first process that has ended.
    fn ended(&mut self) -> Option<(RankId, ExitStatus)> {
        let mut children = self.children.iter_mut().enumerate();
        children.find_map(|(rank, child)| Some((RankId(rank as u32), child.try_wait().ok()??)))
    }

    fn lost(&mut self, rank: RankId, why: &str) -> EngineError {
        // Its connection closes a moment before the process is over.
        let until = Instant::now() + PATIENCE;
        loop {
            match self.children[rank.idx()].try_wait() {
                Ok(Some(status)) => return EngineError::Died { rank, status: status.to_string() },
                Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(2)),
                _ => return EngineError::Died { rank, status: format!("its connection ended: {why}") },
            }
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        // Ranks end when their control connection does.
        for stream in self.streams.drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        let until = Instant::now() + PATIENCE;
        for child in &mut self.children {
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(2));
            }
            // One that does not end, or was stopped, is ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A rank's end of the control connection.
pub struct RankLink {
    rank: RankId,
    folder: PathBuf,
    stream: UnixStream,
}

impl RankLink {
    /// Connects to the leader that waits in `folder`.
    pub fn connect(folder: &Path, rank: u32) -> Result<RankLink, EngineError> {
        let system = |why| EngineError::System { what: format!("the control connection of rank {rank}"), why };
        let mut stream = UnixStream::connect(folder.join(CONTROL)).map_err(system)?;
        send(&mut stream, &RankId(rank)).map_err(system)?;
        Ok(RankLink { rank: RankId(rank), folder: folder.to_path_buf(), stream })
    }
}

/// Is a rank until the leader ends it.
pub fn serve_rank(mut link: RankLink, spec: &ModelSpec, weights: &Launch) -> Result<(), EngineError> {
    let rank = link.rank;
    let system = |why| EngineError::System { what: format!("the control connection of rank {rank}"), why };
    let setup = receive_bytes(&mut link.stream).map_err(system)?;
    let setup: RankSetup = serde_json::from_slice(&setup).map_err(|why| system(std::io::Error::other(why)))?;
    let mut this = match build_process_rank(spec, weights, &setup, &link.folder) {
        Ok(this) => this,
        Err(error) => {
            send(&mut link.stream, &failure(&error)).map_err(system)?;
            return Err(error);
        }
    };
    send(&mut link.stream, &Answer::Ready).map_err(system)?;
    loop {
        let command: StepCommand = match receive(&mut link.stream) {
            Ok(command) => command,
            // The leader is done.
            Err(why) if why.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(why) => return Err(system(why)),
        };
        let result = catch_unwind(AssertUnwindSafe(|| this.step(command)));
        let result = result.unwrap_or_else(|panic| Err(EngineError::Panicked { rank, what: text_of(&*panic) }));
        match result {
            Ok(reply) => send(&mut link.stream, &Answer::Reply(Box::new(reply))).map_err(system)?,
            Err(error) => {
                this.comm.abort(&error.to_string());
                send(&mut link.stream, &failure(&error)).map_err(system)?;
                return Err(error);
            }
        }
    }
}

fn failure(error: &EngineError) -> Answer {
    Answer::Failed { severity: error.severity(), awaited: error.awaited(), what: error.to_string() }
}

fn send<T: Serialize>(stream: &mut UnixStream, value: &T) -> std::io::Result<()> {
    send_bytes(stream, &postcard::to_stdvec(value).map_err(std::io::Error::other)?)
}

fn receive<T: DeserializeOwned>(stream: &mut UnixStream) -> std::io::Result<T> {
    postcard::from_bytes(&receive_bytes(stream)?).map_err(std::io::Error::other)
}

fn send_bytes(stream: &mut UnixStream, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(&(bytes.len() as u64).to_le_bytes())?;
    stream.write_all(bytes)
}

fn receive_bytes(stream: &mut UnixStream) -> std::io::Result<Vec<u8>> {
    let mut len = [0; 8];
    stream.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len) as usize;
    if len > MAX_FRAME_BYTES {
        return Err(std::io::Error::other(format!("a frame of {len} bytes; at most {MAX_FRAME_BYTES} are right")));
    }
    let mut bytes = Vec::new();
    // Memory grows with what comes, not with what was announced.
    let got = stream.take(len as u64).read_to_end(&mut bytes)?;
    if got < len { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
}
