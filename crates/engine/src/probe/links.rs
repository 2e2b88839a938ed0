//! How long ranks take to exchange on this machine.
//!
//! Each rank is a thread with an end of its own. As [`Transport::Process`] they talk over the sockets and the shared memory
//! that processes use, though they are not; as [`Transport::InProcess`] a message is moved, so its size costs nothing.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use moesaic_comm::collective::{AllReduceArgs, all_reduce};
use moesaic_comm::process::{Join, join};
use moesaic_comm::{Communicator, Message, in_process};
use moesaic_device::{Arena, Ctx, Tensor, available_memory};
use moesaic_plan::{AllReduce, MessageKind, Rank as RankId, Tag};
use moesaic_spec::{Bytes, DType};

use super::MEMORY_SHARE;
use super::settle::{Effort, Timing, median, timed};
use crate::EngineError;

/// How ranks reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Threads of one process.
    InProcess,
    /// Processes of one machine.
    Process,
}

/// Longest wait of a rank for another: a machine that is busy is slow, not dead.
const DEADLINE: Duration = Duration::from_secs(60);
/// Messages of one size that may be under way at a time, sent or received and not yet given back.
const UNDER_WAY: u64 = 4;

/// Half a round trip of a message of so many bytes between two ranks.
///
/// # Errors
/// [`EngineError::TooLarge`]: messages take more memory than there is. [`EngineError`]: the ranks cannot meet, or one fails.
pub fn measure_send_receive(transport: Transport, bytes: usize, effort: &Effort) -> Result<Timing, EngineError> {
    let trip = |comm: &dyn Communicator, round: u64, peer: u32| -> Result<(), EngineError> {
        let mut tensor = Tensor::empty(comm.exchange(), &[bytes], DType::U8)?;
        // One byte: that the rest is written is the price of the op before.
        tensor.bytes_mut()[0] = 1;
        comm.send(RankId(peer), tag(round), Message { header: Vec::new(), tensors: vec![tensor] })?;
        Ok(())
    };
    let ask = |comm: &dyn Communicator, round: u64| {
        trip(comm, round, 1)?;
        comm.receive(RankId(1), tag(round))?;
        Ok(())
    };
    let answer = |comm: &dyn Communicator, round: u64| {
        comm.receive(RankId(0), tag(round))?;
        trip(comm, round, 0)
    };
    let both = |comm: &dyn Communicator, round: u64| match comm.rank().0 {
        0 => ask(comm, round),
        _ => answer(comm, round),
    };
    let timing =
        together(transport, 2, UNDER_WAY * bytes as u64, effort, |_| Ok(()), |(), comm, round| both(comm, round))?;
    Ok(Timing { seconds: timing.seconds / 2.0, ..timing })
}

/// The sum over so many ranks of buffers of so many bytes, BF16.
///
/// # Errors
/// As of [`measure_send_receive`].
pub fn measure_all_reduce(
    transport: Transport,
    ranks: usize,
    bytes: usize,
    effort: &Effort,
) -> Result<Timing, EngineError> {
    let group: Vec<RankId> = (0..ranks as u32).map(RankId).collect();
    let node_of = vec![0; ranks];
    let start = |rank: u32| -> Result<(Ctx, Tensor), EngineError> {
        let ctx = Ctx::cpu(1, 2 * bytes + (1 << 20))?;
        let mut x = ctx.empty(&[bytes / DType::BF16.size_bytes()], DType::BF16)?;
        // Small and different: sums of sums stay finite for as long as it takes.
        x.bytes_mut().chunks_exact_mut(2).for_each(|x| x.copy_from_slice(&[rank as u8 + 1, 0x01]));
        Ok((ctx, x))
    };
    let sum = |(ctx, x): &mut (Ctx, Tensor), comm: &dyn Communicator, round: u64| {
        let args = AllReduceArgs { tag: tag(round), group: &group, node_of: &node_of, algorithm: AllReduce::Flat };
        Ok(all_reduce(ctx, comm, args, x)?)
    };
    // A rank sends to all others and gets from all others.
    let exchange = UNDER_WAY * ranks as u64 * bytes as u64;
    together(transport, ranks, exchange, effort, start, sum)
}

/// Runs rounds of `each` on all ranks, until rank 0 has seen enough of them; its times count. `start` makes what a rank keeps.
fn together<S>(
    transport: Transport,
    ranks: usize,
    exchange_bytes: u64,
    effort: &Effort,
    start: impl Fn(u32) -> Result<S, EngineError> + Sync,
    each: impl Fn(&mut S, &dyn Communicator, u64) -> Result<(), EngineError> + Sync,
) -> Result<Timing, EngineError> {
    // Rounds of ranks overlap by one, and arenas have pages and lines.
    let exchange = Bytes(exchange_bytes + (8 << 20));
    let needed = Bytes(2 * ranks as u64 * exchange.0);
    let available = available_memory().map_or(u64::MAX, |bytes| (bytes.0 as f64 * MEMORY_SHARE) as u64);
    if needed.0 > available {
        return Err(EngineError::TooLarge { needed, available: Bytes(available) });
    }
    let ends = world(transport, ranks, exchange)?;
    std::thread::scope(|scope| {
        let (start, each) = (&start, &each);
        let mut ends = ends.into_iter();
        let first = ends.next().expect("rank 0");
        let others: Vec<_> = ends
            .map(|comm| {
                scope.spawn(move || -> Result<(), EngineError> {
                    let comm = &*comm;
                    let mut state = start(comm.rank().0)?;
                    let mut round = 0;
                    // Rank 0 tells before each round whether it is the last.
                    loop {
                        let is_last = comm.receive(RankId(0), go(round))?.header == [1];
                        comm.send(RankId(0), ready(round), Message { header: Vec::new(), tensors: Vec::new() })?;
                        each(&mut state, comm, round)?;
                        if is_last {
                            return Ok(());
                        }
                        round += 1;
                    }
                })
            })
            .collect();
        let lead = || -> Result<Timing, EngineError> {
            let comm = &*first;
            let mut state = start(0)?;
            let mut round = 0;
            let mut once = |is_last: bool| -> Result<f64, EngineError> {
                for &rank in &others_of(ranks) {
                    comm.send(rank, go(round), Message { header: vec![u32::from(is_last)], tensors: Vec::new() })?;
                }
                // All are there: nobody is waited for that has something else to do.
                comm.receive_all(&others_of(ranks), ready(round))?;
                let seconds = timed(|| each(&mut state, comm, round))?;
                round += 1;
                Ok(seconds)
            };
            let timing = median(effort, || once(false))?;
            once(true)?;
            Ok(timing)
        };
        let timing = lead();
        if let Err(error) = &timing {
            first.abort(&error.to_string());
        }
        let ended: Vec<Result<(), EngineError>> =
            others.into_iter().map(|other| other.join().expect("a rank does not panic")).collect();
        ended.into_iter().collect::<Result<Vec<()>, _>>()?;
        timing
    })
}

/// All ends of a world.
fn world(transport: Transport, ranks: usize, exchange: Bytes) -> Result<Vec<Box<dyn Communicator>>, EngineError> {
    if transport == Transport::InProcess {
        let arenas = (0..ranks).map(|_| Arena::host("exchange", exchange)).collect::<Result<Vec<_>, _>>()?;
        let ends = in_process::world(arenas, DEADLINE).into_iter();
        return Ok(ends.map(|end| Box::new(end) as Box<dyn Communicator>).collect());
    }
    let system = |what: &str| {
        let what = what.to_owned();
        move |why| EngineError::System { what, why }
    };
    let folder = tempfile::tempdir().map_err(system("making the folder where ranks meet"))?;
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o700)).map_err(system("closing that folder"))?;
    let end = |rank: usize| {
        let dir = folder.path();
        let rank = RankId(rank as u32);
        let session = u64::from(std::process::id());
        let settings = Join { dir, rank, world_size: ranks, session, deadline: DEADLINE, exchange_bytes: exchange };
        Ok(Box::new(join(settings)?) as Box<dyn Communicator>)
    };
    std::thread::scope(|scope| {
        let end = &end;
        let joining: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || end(rank))).collect();
        joining.into_iter().map(|end| end.join().expect("joining does not panic")).collect()
    })
}

fn tag(round: u64) -> Tag {
    Tag { step: round, layer: 0, micro_batch: 0, kind: MessageKind::Hidden, round: 0 }
}

/// Before a round: whether it is the last.
fn go(round: u64) -> Tag {
    Tag { kind: MessageKind::Rows, ..tag(round) }
}

/// The answer to it.
fn ready(round: u64) -> Tag {
    Tag { kind: MessageKind::Answer, ..tag(round) }
}

/// All but rank 0.
fn others_of(ranks: usize) -> Vec<RankId> {
    (1..ranks as u32).map(RankId).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_transports_exchange_and_sum() {
        for transport in [Transport::InProcess, Transport::Process] {
            for bytes in [1 << 10, 1 << 20] {
                let message = measure_send_receive(transport, bytes, &Effort::least()).unwrap();
                let sum = measure_all_reduce(transport, 4, bytes, &Effort::least()).unwrap();
                assert!(message.seconds > 0.0 && sum.seconds > 0.0, "{transport:?} {message:?} {sum:?}");
            }
        }
    }

    #[test]
    fn a_message_without_memory_is_refused() {
        let error = measure_send_receive(Transport::InProcess, 1 << 50, &Effort::least()).unwrap_err();
        assert!(matches!(error, EngineError::TooLarge { .. }), "{error}");
    }
}
