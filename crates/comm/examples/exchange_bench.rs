//! How fast ranks exchange on this machine, beside a copy in memory.
//!
//! `cargo run --release -p moesaic-comm --example exchange_bench`. Both ranks are threads of this process, each with its own
//! end; for `process` they talk over real sockets and shared memory. `latency` is half a round trip of a message of 64
//! bytes; `messages/s` counts such messages one way, `GB/s` the payload of messages of 8 MiB one way, both with the time in
//! which the receiver takes them. Threads only pass on who owns the memory, so their GB/s would say nothing.
//! `memcpy` copies 512 MiB once, which no cache holds; messages of 8 MiB may stay in one, and can come out above it.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use moesaic_comm::process::{Join, join};
use moesaic_comm::{CommError, Communicator, Message, in_process};
use moesaic_device::{Arena, Tensor};
use moesaic_plan::{MessageKind, Rank, Tag};
use moesaic_spec::{Bytes, DType};

const NUM_SMALL: u32 = 10_000;
const NUM_LARGE: u32 = 64;
const LARGE_BYTES: usize = 8 << 20;
const EXCHANGE: Bytes = Bytes(256 << 20);
const DEADLINE: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("{:<12} {:>12} {:>14} {:>10}", "", "latency", "messages/s", "GB/s");
    println!("{:<12} {:>12} {:>14} {:>10.2}", "memcpy", "", "", memcpy()?);

    let exchanges = vec![Arena::host("exchange", EXCHANGE)?, Arena::host("exchange", EXCHANGE)?];
    report("in_process", in_process::world(exchanges, DEADLINE))?;

    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700))?;
    let settings = |rank| Join {
        dir: folder.path(),
        rank: Rank(rank),
        world_size: 2,
        session: u64::from(std::process::id()),
        deadline: DEADLINE,
        exchange_bytes: EXCHANGE,
    };
    let ends = std::thread::scope(|scope| {
        let other = scope.spawn(|| join(settings(1)));
        Ok::<_, CommError>(vec![join(settings(0))?, other.join().expect("joining does not panic")?])
    })?;
    report("process", ends)?;
    Ok(())
}

/// GB/s of copies from and to memory that no cache holds.
fn memcpy() -> Result<f64, CommError> {
    let arena = Arena::host("copy", Bytes(2 * u64::from(NUM_LARGE) * LARGE_BYTES as u64))?;
    let tensor = || Tensor::empty(&arena, &[NUM_LARGE as usize * LARGE_BYTES], DType::U8);
    let (mut from, mut to) = (tensor()?, tensor()?);
    from.bytes_mut().fill(1);
    to.bytes_mut().fill(2);
    let start = Instant::now();
    to.bytes_mut().copy_from_slice(std::hint::black_box(from.bytes()));
    std::hint::black_box(to.bytes());
    Ok((NUM_LARGE as usize * LARGE_BYTES) as f64 / start.elapsed().as_secs_f64() / 1e9)
}

fn report(name: &str, ends: Vec<impl Communicator + 'static>) -> Result<(), CommError> {
    let [a, b]: [_; 2] = ends.try_into().unwrap_or_else(|_| panic!("two ends"));
    let answers = std::thread::spawn(move || (0..2).try_for_each(|step| answer(&b, step)));
    // The first time touches memory that the system has to find.
    ask(&a, 0)?;
    let [latency, small, large] = ask(&a, 1)?;
    answers.join().expect("answering does not panic")?;
    let gb_s = LARGE_BYTES as f64 / large / 1e9;
    let gb_s = if name == "in_process" { "moved".to_owned() } else { format!("{gb_s:.2}") };
    println!("{name:<12} {:>9.1} us {:>14.0} {gb_s:>10}", latency * 1e6, 1.0 / small);
    Ok(())
}

/// Seconds of: half a round trip, a small message one way, a large one.
fn ask(comm: &impl Communicator, step: u64) -> Result<[f64; 3], CommError> {
    let peer = Rank(1);
    let start = Instant::now();
    for i in 0..NUM_SMALL {
        comm.send(peer, tag(step, MessageKind::Dispatch, i), message(comm, 64)?)?;
        comm.receive(peer, tag(step, MessageKind::Answer, i))?;
    }
    let latency = start.elapsed().as_secs_f64() / f64::from(2 * NUM_SMALL);

    let start = Instant::now();
    for i in 0..NUM_SMALL {
        comm.send(peer, tag(step, MessageKind::Rows, i), message(comm, 64)?)?;
    }
    comm.receive(peer, tag(step, MessageKind::Rows, NUM_SMALL))?;
    let small = start.elapsed().as_secs_f64() / f64::from(NUM_SMALL);

    let start = Instant::now();
    for i in 0..NUM_LARGE {
        comm.send(peer, tag(step, MessageKind::Weights, i), message(comm, LARGE_BYTES)?)?;
        // No more under way than the arena has room for.
        if i % 8 == 7 {
            comm.receive(peer, tag(step, MessageKind::Weights, NUM_LARGE + i))?;
        }
    }
    Ok([latency, small, start.elapsed().as_secs_f64() / f64::from(NUM_LARGE)])
}

/// The other side of [`ask`].
fn answer(comm: &impl Communicator, step: u64) -> Result<(), CommError> {
    let peer = Rank(0);
    for i in 0..NUM_SMALL {
        comm.receive(peer, tag(step, MessageKind::Dispatch, i))?;
        comm.send(peer, tag(step, MessageKind::Answer, i), message(comm, 64)?)?;
    }
    for i in 0..NUM_SMALL {
        comm.receive(peer, tag(step, MessageKind::Rows, i))?;
    }
    comm.send(peer, tag(step, MessageKind::Rows, NUM_SMALL), message(comm, 0)?)?;
    for i in 0..NUM_LARGE {
        comm.receive(peer, tag(step, MessageKind::Weights, i))?;
        if i % 8 == 7 {
            comm.send(peer, tag(step, MessageKind::Weights, NUM_LARGE + i), message(comm, 0)?)?;
        }
    }
    Ok(())
}

fn message(comm: &impl Communicator, bytes: usize) -> Result<Message, CommError> {
    let tensors = vec![Tensor::empty(comm.exchange(), &[bytes], DType::U8)?];
    Ok(Message { header: Vec::new(), tensors })
}

fn tag(step: u64, kind: MessageKind, micro_batch: u32) -> Tag {
    Tag { step, layer: 0, micro_batch, kind, round: 0 }
}
