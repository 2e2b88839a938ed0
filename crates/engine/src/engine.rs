//! The loop: schedule, execute, commit, publish.

use std::collections::HashMap;

use moesaic_sched::{FinishReason, SchedStats, Scheduler, SeqId, SeqRequest, drive_step};

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
    /// A token for each sequence that got one, in order of arrival.
    pub events: Vec<TokenEvent>,
    /// Prompt tokens that were run.
    pub num_prefill_tokens: usize,
    /// Sequences that went on by one token.
    pub num_decode_tokens: usize,
}

/// A scheduler and the rank that it drives.
pub struct Engine {
    scheduler: Scheduler,
    rank: Rank,
    ledger: MemoryLedger,
    next_id: u64,
}

impl Engine {
    pub(crate) fn new(scheduler: Scheduler, rank: Rank, ledger: MemoryLedger) -> Engine {
        Engine { scheduler, rank, ledger, next_id: 0 }
    }

    /// Who got how much memory.
    pub fn ledger(&self) -> &MemoryLedger {
        &self.ledger
    }

    /// Running and waiting sequences, blocks, cache hits.
    pub fn stats(&self) -> SchedStats {
        self.scheduler.stats()
    }

    /// The rank.
    pub fn rank(&mut self) -> &mut Rank {
        &mut self.rank
    }

    /// Queues a request. It is refused at once if it can never run.
    pub fn add(&mut self, request: Request) -> Result<SeqId, EngineError> {
        let vocab_size = self.rank.transformer().spec().vocab_size;
        if let Some(&id) = request.prompt.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(EngineError::Invalid {
                field: "prompt",
                value: format!("token id {id}"),
                right: format!("ids below the model's vocab_size {vocab_size} are right"),
            });
        }
        request.sampling.validate()?;
        let id = SeqId(self.next_id);
        self.scheduler.add(SeqRequest {
            id,
            prompt: request.prompt.clone(),
            max_tokens: request.max_tokens,
            stop_token_ids: request.stop_token_ids,
            cache_salt: 0,
        })?;
        self.next_id += 1;
        self.rank.open(id, request.sampling, request.prompt);
        Ok(id)
    }

    /// Ends a request early and gives back what it held.
    pub fn abort(&mut self, id: SeqId) {
        if self.scheduler.abort(id) {
            self.rank.close(id);
        }
    }

    /// Whether nothing is running or waiting.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Runs one step.
    pub fn step(&mut self) -> Result<Step, EngineError> {
        let driven = drive_step(&mut self.scheduler, &mut self.rank)?;
        let sampled = self.rank.take_sampled();
        let sampling = driven.batch.seqs.iter().filter(|seq| seq.samples);
        let mut by_id: HashMap<SeqId, _> = sampling.map(|seq| seq.id).zip(sampled).collect();
        let num_tokens = driven.batch.num_tokens();
        let num_decode_tokens = driven.batch.seqs.iter().filter(|seq| seq.samples && seq.token_ids.len() == 1).count();
        let mut events = Vec::with_capacity(driven.updates.len());
        for update in driven.updates {
            let sampled = by_id.remove(&update.id).expect("every update was sampled");
            match update.finish {
                None => self.rank.push(update.id, update.token),
                Some(_) => self.rank.close(update.id),
            }
            events.push(TokenEvent {
                id: update.id,
                token: update.token,
                logprob: sampled.logprob,
                top_logprobs: sampled.top,
                finish: update.finish,
            });
        }
        Ok(Step { events, num_prefill_tokens: num_tokens - num_decode_tokens, num_decode_tokens })
    }
}
