//! How processes find each other: each listens on a socket in one folder and connects to those of all lower ranks.
//!
//! Both ends of a connection say who they are, of which world and session, and hand over the file of their shared memory;
//! each checks what the other says. Who comes with something else is sent away, and named if the world is not complete
//! in time.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use moesaic_device::SharedMap;
use moesaic_plan::Rank;
use moesaic_spec::Bytes;

use super::frame::{Fields, MAGIC};
use super::socket::{self, READABLE, WRITABLE};
use super::{Join, MAX_WORLD_SIZE};
use crate::CommError;

/// Of frames and of this greeting.
const VERSION: u32 = 1;
const HELLO_BYTES: usize = 40;

/// A peer as it is after both greeted.
pub(super) struct Greeted {
    pub(super) rank: Rank,
    pub(super) stream: UnixStream,
    pub(super) shared: SharedMap,
}

/// What is given to every peer.
pub(super) struct Own<'a> {
    /// Its file.
    pub(super) file: &'a File,
    /// Its size.
    pub(super) shared_bytes: Bytes,
}

/// Connects with everybody. The result is in the order of ranks, this one left out.
pub(super) fn meet(join: &Join<'_>, own: Own<'_>) -> Result<Vec<Greeted>, CommError> {
    let refused = |why: String| CommError::Join { rank: join.rank, dir: join.dir.to_path_buf(), why };
    check_folder(join).map_err(refused)?;
    let meeting = Meeting { join, own, until: Instant::now() + join.deadline };
    // Listening before connecting, so that nobody waits for a rank that waits for another.
    let listener = meeting.listen().map_err(refused)?;
    let mut greeted = Vec::with_capacity(join.world_size - 1);
    for rank in 0..join.rank.0 {
        greeted.push(meeting.connect(Rank(rank)).map_err(refused)?);
    }
    if let Some(listener) = listener {
        greeted.extend(meeting.accept(&listener).map_err(refused)?);
    }
    greeted.sort_by_key(|peer| peer.rank);
    Ok(greeted)
}

fn check_folder(join: &Join<'_>) -> Result<(), String> {
    assert!(join.rank.idx() < join.world_size, "rank {} of {}", join.rank, join.world_size);
    if join.world_size > MAX_WORLD_SIZE {
        return Err(format!("world size is {}, expected at most {MAX_WORLD_SIZE}", join.world_size));
    }
    let folder = join.dir.metadata().map_err(|why| why.to_string())?;
    let mode = folder.mode() & 0o777;
    if !folder.is_dir() {
        Err("it is not a folder".to_owned())
    } else if mode & 0o077 != 0 {
        Err(format!("its mode is {mode:04o}, expected 0700, so that nobody else can meet there"))
    } else {
        Ok(())
    }
}

/// A rank's socket, which has no name any more when this is dropped.
struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody else may have tidied up the folder.
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Meeting<'a> {
    join: &'a Join<'a>,
    own: Own<'a>,
    until: Instant,
}

impl Meeting<'_> {
    fn path(&self, rank: Rank) -> PathBuf {
        self.join.dir.join(format!("rank-{rank}.sock"))
    }

    fn too_late(&self, what: String) -> String {
        format!("{what} within {:.1} s", self.join.deadline.as_secs_f64())
    }

    /// `None` for the last rank, to which nobody connects.
    fn listen(&self) -> Result<Option<Listener>, String> {
        if self.join.rank.idx() + 1 == self.join.world_size {
            return Ok(None);
        }
        let path = self.path(self.join.rank);
        let named = |why: io::Error| format!("{}: {why}", path.display());
        if path.symlink_metadata().as_ref().is_ok_and(is_socket) {
            return Err(format!("{} is there already; each launch needs a new folder", path.display()));
        }
        let socket = UnixListener::bind(&path).map_err(named)?;
        socket.set_nonblocking(true).map_err(named)?;
        Ok(Some(Listener { socket, path }))
    }

    fn connect(&self, rank: Rank) -> Result<Greeted, String> {
        let path = self.path(rank);
        // A rank that is not there yet is looked for again, seldom enough to cost nothing.
        let mut pause = Duration::from_millis(1);
        let stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(why) if matches!(why.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {}
                Err(why) => return Err(format!("{}: {why}", path.display())),
            }
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.too_late(format!("rank {rank} did not come")));
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        let failed = |why: io::Error| match why.kind() {
            ErrorKind::TimedOut => self.too_late(format!("rank {rank} did not answer")),
            ErrorKind::UnexpectedEof => format!("rank {rank} sent this rank away"),
            _ => format!("rank {rank}: {why}"),
        };
        stream.set_nonblocking(true).map_err(failed)?;
        self.greet(&stream, rank).map_err(failed)?;
        let (hello, file) = self.receive_hello(&stream).map_err(failed)?;
        let hello = hello.check(self.join, Some(rank)).map_err(|why| format!("rank {rank}: {why}"))?;
        self.finish(hello, stream, file)
    }

    /// Waits for all higher ranks.
    fn accept(&self, listener: &Listener) -> Result<Vec<Greeted>, String> {
        let mut greeted: Vec<Greeted> = Vec::new();
        let mut sent_away = None;
        let num_expected = self.join.world_size - 1 - self.join.rank.idx();
        while greeted.len() < num_expected {
            match self.accept_one(listener, &greeted) {
                Ok(Ok(peer)) => greeted.push(peer),
                Ok(Err(why)) => sent_away = Some(why),
                Err(why) if why.kind() == ErrorKind::TimedOut => {
                    let is_missing = |rank: &u32| greeted.iter().all(|peer| peer.rank.0 != *rank);
                    let first = (self.join.rank.0 + 1..).find(is_missing).expect("one is missing");
                    let also = sent_away.map_or(String::new(), |why| format!("; a connection was sent away: {why}"));
                    return Err(self.too_late(format!("rank {first} did not come")) + &also);
                }
                Err(why) => return Err(why.to_string()),
            }
        }
        Ok(greeted)
    }

    /// The next connection: a peer, or why it was sent away.
    fn accept_one(&self, listener: &Listener, others: &[Greeted]) -> io::Result<Result<Greeted, String>> {
        socket::wait_until(&listener.socket, READABLE, self.until)?;
        let stream = match listener.socket.accept() {
            Ok((stream, _)) => stream,
            // Gone again.
            Err(why) if why.kind() == ErrorKind::WouldBlock => return Ok(Err("it was gone at once".to_owned())),
            Err(why) => return Err(why),
        };
        stream.set_nonblocking(true)?;
        let (hello, file) = match self.receive_hello(&stream) {
            Ok(hello) => hello,
            Err(why) if why.kind() == ErrorKind::TimedOut => return Err(why),
            Err(why) => return Ok(Err(why.to_string())),
        };
        let from = Rank(hello.from);
        let checked = hello.check(self.join, None).and_then(|hello| {
            let is_new = others.iter().all(|peer| peer.rank != from);
            if is_new { Ok(hello) } else { Err(format!("rank {from} is here already")) }
        });
        // Who speaks this language hears who answers, and can say for itself what does not fit.
        if hello.magic == MAGIC
            && let Err(why) = self.greet(&stream, from)
        {
            return Ok(Err(why.to_string()));
        }
        Ok(checked.and_then(|hello| self.finish(hello, stream, file)))
    }

    fn greet(&self, stream: &UnixStream, to: Rank) -> io::Result<()> {
        let join = self.join;
        let mut hello = Vec::with_capacity(HELLO_BYTES);
        for word in [MAGIC, VERSION, join.world_size as u32, join.rank.0, to.0, 0] {
            hello.extend(word.to_le_bytes());
        }
        hello.extend(join.session.to_le_bytes());
        hello.extend(self.own.shared_bytes.0.to_le_bytes());
        socket::wait_until(stream, WRITABLE, self.until)?;
        socket::send_with_file(stream, &hello, self.own.file)
    }

    fn receive_hello(&self, stream: &UnixStream) -> io::Result<(Hello, Option<File>)> {
        let mut bytes = [0; HELLO_BYTES];
        let (mut filled, mut file) = (0, None);
        while filled < HELLO_BYTES {
            socket::wait_until(stream, READABLE, self.until)?;
            let (received, came) = socket::receive_with_file(stream, &mut bytes[filled..])?;
            if received == 0 {
                return Err(io::Error::new(ErrorKind::UnexpectedEof, "it closed the connection before it greeted"));
            }
            filled += received;
            file = file.or(came);
        }
        let mut fields = Fields(&bytes);
        let [magic, version, world_size, from, to, _] = std::array::from_fn(|_| fields.u32());
        let hello = Hello { magic, version, world_size, from, to, session: fields.u64(), shared_bytes: fields.u64() };
        Ok((hello, file))
    }

    fn finish(&self, hello: Hello, stream: UnixStream, file: Option<File>) -> Result<Greeted, String> {
        let rank = Rank(hello.from);
        let file = file.ok_or_else(|| format!("rank {rank} gave no file of its shared memory"))?;
        let shared = SharedMap::open(&file, Bytes(hello.shared_bytes)).map_err(|why| format!("rank {rank}: {why}"))?;
        Ok(Greeted { rank, stream, shared })
    }
}

/// What a peer says first.
#[derive(Clone, Copy)]
struct Hello {
    magic: u32,
    version: u32,
    world_size: u32,
    from: u32,
    to: u32,
    session: u64,
    shared_bytes: u64,
}

impl Hello {
    /// Whether it fits; `from` is who must have said it, any higher rank if `None`.
    fn check(self, join: &Join<'_>, from: Option<Rank>) -> Result<Hello, String> {
        let Hello { magic, version, world_size, from: is, to, session, .. } = self;
        if magic != MAGIC {
            return Err(format!("it greets with {magic:#010x}, expected {MAGIC:#010x}"));
        }
        if version != VERSION {
            return Err(format!("its version is {version}, expected {VERSION}"));
        }
        if world_size as usize != join.world_size {
            return Err(format!("its world size is {world_size}, expected {}", join.world_size));
        }
        // Not printed: who knows it may join.
        if session != join.session {
            return Err("it is of another session".to_owned());
        }
        if to != join.rank.0 {
            return Err(format!("it looks for rank {to}, this is rank {}", join.rank));
        }
        match from {
            Some(Rank(from)) if is != from => Err(format!("it is rank {is}, expected {from}")),
            None if is <= join.rank.0 || is >= world_size => {
                Err(format!("it is rank {is}, expected {} to {}", join.rank.0 + 1, world_size - 1))
            }
            _ => Ok(self),
        }
    }
}

fn is_socket(metadata: &Metadata) -> bool {
    metadata.file_type().is_socket()
}
