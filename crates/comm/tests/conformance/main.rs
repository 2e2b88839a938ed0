//! One suite for all communicators: each test of `suite` runs over every transport. What only processes can do, such as
//! being killed, is in `children`.

mod children;
mod suite;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use moesaic_comm::process::{Join, join};
use moesaic_comm::{Communicator, Message, in_process};
use moesaic_device::{Arena, Tensor};
use moesaic_plan::{MessageKind, Rank, Tag};
use moesaic_spec::{Bytes, DType};
use tempfile::TempDir;

/// Long enough for a machine that does much else.
const LONG: Duration = Duration::from_secs(30);

type Ends = Vec<Box<dyn Communicator>>;

/// How ranks are connected.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Transport {
    InProcess,
    /// With ends that are threads of the test, over real sockets and shared memory.
    Process,
}

impl Transport {
    /// All ends of a world.
    fn world(self, n: usize, deadline: Duration) -> Ends {
        match self {
            Transport::InProcess => {
                let exchanges = (0..n).map(|_| Arena::host("exchange", Bytes(64 << 20)).unwrap()).collect();
                let world = in_process::world(exchanges, deadline);
                world.into_iter().map(|end| Box::new(end) as Box<dyn Communicator>).collect()
            }
            Transport::Process => {
                let folder = meeting_folder();
                let start = |rank: usize| {
                    let dir = folder.path();
                    move || -> Box<dyn Communicator> {
                        let rank = Rank(rank as u32);
                        let exchange_bytes = Bytes(64 << 20);
                        let settings = Join { dir, rank, world_size: n, session: 11, deadline: LONG, exchange_bytes };
                        let mut end = join(settings).unwrap();
                        end.set_deadline(deadline);
                        Box::new(end)
                    }
                };
                std::thread::scope(|scope| {
                    let threads: Vec<_> = (0..n).map(|rank| scope.spawn(start(rank))).collect();
                    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
                })
            }
        }
    }
}

fn meeting_folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    folder
}

/// What each rank makes of `work`, every rank in a thread.
fn on_all<T: Send>(ends: Ends, work: impl Fn(&dyn Communicator) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = ends.into_iter().map(|end| scope.spawn(move || work(&*end))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn tag(layer: u32) -> Tag {
    Tag { step: 9, layer, micro_batch: 0, kind: MessageKind::Dispatch, round: 0 }
}

fn words(words: &[u32]) -> Message {
    Message { header: words.to_vec(), tensors: Vec::new() }
}

/// Bytes that say from whom, to whom and which.
fn pattern(seed: usize, len: usize) -> impl Iterator<Item = u8> {
    (0..len).map(move |i| (i * 31 + i / 251 + seed * 17) as u8)
}

fn tensor(arena: &Arena, dims: &[usize], seed: usize) -> Tensor {
    let mut tensor = Tensor::empty(arena, dims, DType::U8).unwrap();
    let len = tensor.size_bytes();
    tensor.bytes_mut().iter_mut().zip(pattern(seed, len)).for_each(|(to, from)| *to = from);
    tensor
}

fn assert_is(tensor: &Tensor, dims: &[usize], seed: usize) {
    assert_eq!(tensor.dims(), dims);
    assert!(tensor.bytes().iter().copied().eq(pattern(seed, tensor.size_bytes())), "{dims:?} with seed {seed}");
}

/// The sentence of an error, which came within `most`.
fn sentence<T>(most: Duration, work: impl FnOnce() -> Result<T, moesaic_comm::CommError>) -> String {
    let start = Instant::now();
    let error = work().err().expect("an error").to_string();
    assert!(start.elapsed() < most, "after {:?}: {error}", start.elapsed());
    error
}
