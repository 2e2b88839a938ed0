//! The loop: schedule, execute, commit, publish.

use std::collections::BTreeMap;

use moesaic_plan::eplb::RoutingTrace;
use moesaic_sched::{FinishReason, SchedStats, Scheduler, SeqId, SeqRequest, drive_groups};
use moesaic_spec::ModelSpec;

use crate::adapt::Adaptation;
use crate::executor::Executor;
use crate::record::StepRecord;
use crate::{EngineError, MemoryLedger, Rank, SamplingParams};

/// One prompt and how to go on from it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How the next token is drawn.
    pub sampling: SamplingParams,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Ids that end the answer (the model's own end-of-text among them, unless it is to be ignored).
    pub stop_token_ids: Vec<u32>,
}

/// One token of one answer.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// Whose.
    pub id: SeqId,
    /// Which.
    pub token: u32,
    /// Its log-probability under the model, before penalties and temperature.
    pub logprob: f32,
    /// The likeliest tokens with theirs, as many as were asked for.
    pub top_logprobs: Vec<(u32, f32)>,
    /// Set with the last token.
    pub finish: Option<FinishReason>,
}

/// What one step did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// A token for each sequence that got one, in order of arrival within each data-parallel group.
    pub events: Vec<TokenEvent>,
    /// Prompt tokens that were run.
    pub num_prefill_tokens: usize,
    /// Sequences that went on by one token.
    pub num_decode_tokens: usize,
}

/// A scheduler for each data-parallel group, and the ranks that they drive.
pub struct Engine {
    schedulers: Vec<Scheduler>,
    executor: Executor,
    ledger: MemoryLedger,
    spec: ModelSpec,
    next_id: u64,
    /// Group and tokens (prompt and longest answer) of every sequence that is not over.
    open: BTreeMap<SeqId, (usize, usize)>,
}

impl Engine {
    pub(crate) fn new(schedulers: Vec<Scheduler>, executor: Executor, ledger: MemoryLedger, spec: ModelSpec) -> Engine {
        Engine { schedulers, executor, ledger, spec, next_id: 0, open: BTreeMap::new() }
    }

    /// Who got how much memory; of all ranks together.
    pub fn ledger(&self) -> &MemoryLedger {
        &self.ledger
    }

    /// The model.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Running and waiting sequences, blocks, cache hits, of all groups together.
    pub fn stats(&self) -> SchedStats {
        self.schedulers.iter().map(Scheduler::stats).sum()
    }

    /// The rank, where there is only one.
    pub fn single_rank(&mut self) -> Option<&mut Rank> {
        self.executor.single_rank()
    }

    /// What the last step did on all ranks.
    pub fn last_step(&self) -> &StepRecord {
        self.executor.record()
    }

    /// What moves experts and chooses micro-batches.
    pub fn adaptation(&mut self) -> &mut Adaptation {
        &mut self.executor.adaptation
    }

    /// Which experts the same tokens chose so far, if that is recorded.
    pub fn routing_trace(&self) -> Option<&RoutingTrace> {
        self.executor.trace.as_ref()
    }

    /// Kept logits of a sequence by position; they are given away.
    pub fn take_logits(&mut self, id: SeqId) -> BTreeMap<usize, Vec<f32>> {
        self.executor.take_logits(id)
    }

    /// Queues a request with the group that has the least to do. It is refused at once if it can never run.
    pub fn add(&mut self, request: Request) -> Result<SeqId, EngineError> {
        let vocab_size = self.spec.vocab_size;
        if let Some(&id) = request.prompt.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(EngineError::Invalid {
                field: "prompt",
                value: format!("token id {id}"),
                right: format!("ids below the model's vocab_size {vocab_size} are right"),
            });
        }
        request.sampling.validate()?;
        let id = SeqId(self.next_id);
        let group = self.least_loaded();
        self.schedulers[group].add(SeqRequest {
            id,
            prompt: request.prompt.clone(),
            max_tokens: request.max_tokens,
            stop_token_ids: request.stop_token_ids,
            cache_salt: 0,
        })?;
        self.next_id += 1;
        self.open.insert(id, (group, request.prompt.len() + request.max_tokens));
        self.executor.open(id, group, request.sampling, request.prompt);
        Ok(id)
    }

    /// The group whose open sequences cost least at their longest.
    fn least_loaded(&self) -> usize {
        let lens: Vec<usize> = self.open.values().map(|&(_, tokens)| tokens).collect();
        let mut load = vec![0.0; self.schedulers.len()];
        for (&(group, _), cost) in self.open.values().zip(self.executor.adaptation.costs(&lens)) {
            load[group] += cost;
        }
        (0..load.len()).min_by(|&a, &b| load[a].total_cmp(&load[b])).expect("at least one group")
    }

    /// Ends a request early and gives back what it held.
    pub fn abort(&mut self, id: SeqId) {
        let Some(&(group, _)) = self.open.get(&id) else { return };
        if self.schedulers[group].abort(id) {
            self.close(id);
        }
    }

    fn close(&mut self, id: SeqId) {
        self.open.remove(&id);
        self.executor.close(id);
    }

    /// Whether nothing is running or waiting.
    pub fn is_idle(&self) -> bool {
        self.schedulers.iter().all(Scheduler::is_idle)
    }

    /// Runs one step.
    pub fn step(&mut self) -> Result<Step, EngineError> {
        let mut step = Step::default();
        for driven in drive_groups(&mut self.schedulers, &mut self.executor)? {
            let num_tokens = driven.batch.num_tokens();
            let decodes = driven.batch.seqs.iter().filter(|seq| seq.samples && seq.token_ids.len() == 1);
            let num_decode_tokens = decodes.count();
            step.num_decode_tokens += num_decode_tokens;
            step.num_prefill_tokens += num_tokens - num_decode_tokens;
            for update in driven.updates {
                let sampled = self.executor.sampled(update.id);
                match update.finish {
                    None => self.executor.push(update.id, update.token),
                    Some(_) => self.close(update.id),
                }
                step.events.push(TokenEvent {
                    id: update.id,
                    token: update.token,
                    logprob: sampled.logprob,
                    top_logprobs: sampled.top,
                    finish: update.finish,
                });
            }
        }
        Ok(step)
    }
}
