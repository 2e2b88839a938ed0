//! Ranks that are threads of this process.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moesaic_device::DeviceError;
use moesaic_plan::Rank as RankId;

use super::failures::Failures;
use crate::wire::{StepCommand, StepReply};
use crate::{EngineError, Rank};

/// Stack of a rank's thread: kernels keep blocks of a product there.
const STACK_BYTES: usize = 4 << 20;

type Reply = (RankId, Result<StepReply, EngineError>);

/// The threads.
pub(crate) struct Threads {
    commands: Vec<SyncSender<StepCommand>>,
    replies: Receiver<Reply>,
    workers: Vec<JoinHandle<()>>,
    /// How long a step may take beyond what a wait between ranks may.
    deadline: Duration,
    /// A rank has not replied; it may hang.
    is_late: bool,
}

impl Threads {
    /// Starts one thread for each rank, in order.
    pub(crate) fn start(ranks: Vec<Rank>, deadline: Duration) -> Result<Threads, EngineError> {
        let (reply, replies) = channel();
        let (num_ranks, mut commands, mut workers) = (ranks.len(), Vec::new(), Vec::new());
        for rank in ranks {
            let (command, inbox) = sync_channel(1);
            let (id, reply) = (rank.comm.rank(), reply.clone());
            let worker = std::thread::Builder::new()
                .name(format!("rank-{id}"))
                .stack_size(STACK_BYTES)
                .spawn(move || work(rank, &inbox, &reply))
                .map_err(|why| DeviceError::Threads { refused: id.idx() + 1, asked: num_ranks, why })?;
            commands.push(command);
            workers.push(worker);
        }
        Ok(Threads { commands, replies, workers, deadline, is_late: false })
    }

    pub(crate) fn step(&mut self, commands: Vec<StepCommand>) -> Result<Vec<StepReply>, EngineError> {
        let num_ranks = self.commands.len();
        for (rank, (inbox, command)) in self.commands.iter().zip(commands).enumerate() {
            inbox.send(command).map_err(|_| EngineError::Ended { why: format!("rank {rank}'s thread is gone") })?;
        }
        let mut replies: Vec<Option<StepReply>> = (0..num_ranks).map(|_| None).collect();
        let mut failures = Failures::default();
        let mut silent: BTreeSet<RankId> = (0..num_ranks as u32).map(RankId).collect();
        let mut until = Instant::now() + self.deadline;
        while !silent.is_empty() && !failures.explain(&silent) {
            match self.replies.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((rank, reply)) => {
                    silent.remove(&rank);
                    match reply {
                        Ok(reply) => replies[rank.idx()] = Some(reply),
                        Err(error) => until = failures.push(rank, error, until),
                    }
                }
                Err(_) => break,
            }
        }
        self.is_late = !silent.is_empty();
        failures.check(&silent, self.deadline)?;
        Ok(replies.into_iter().map(|reply| reply.expect("every rank has replied")).collect())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.commands.clear();
        for worker in self.workers.drain(..) {
            // A rank that hangs is left behind: it must not keep the program from ending.
            if !self.is_late || worker.is_finished() {
                // A panic of a rank was its reply.
                let _ = worker.join();
            }
        }
    }
}

fn work(mut rank: Rank, inbox: &Receiver<StepCommand>, replies: &Sender<Reply>) {
    let id = rank.comm.rank();
    while let Ok(command) = inbox.recv() {
        let result = catch_unwind(AssertUnwindSafe(|| rank.step(command)));
        let result = result.unwrap_or_else(|panic| Err(EngineError::Panicked { rank: id, what: text_of(&*panic) }));
        let failure = result.as_ref().err().map(ToString::to_string);
        if let Some(why) = &failure {
            rank.comm.abort(why);
        }
        if replies.send((id, result)).is_err() || failure.is_some() {
            return;
        }
    }
}

pub(super) fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
