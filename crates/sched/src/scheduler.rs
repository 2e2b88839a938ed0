//! The policy: who runs, who waits, who gives way.
//!
//! Running and waiting sequences are one line in order of arrival, cut at some place: whoever runs came before whoever
//! waits. Sequences enter the running part at its end and are preempted from its end, so the order needs no sorting and
//! no priority, and two facts follow that the rest leans on. The oldest sequence is the first of `running`, is never
//! preempted, and advances in every step. And at most one sequence is part-way through its prefill, the last: whoever
//! is not given all its tokens has used up the budget.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::block_manager::BlockManager;
use crate::sequence::Sequence;
use crate::{SchedError, ScheduledSeq, SchedulerConfig, SeqId, SeqRequest, SeqUpdate, StepBatch, StepOutput};

/// What the scheduler is doing, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedStats {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait, preempted ones included.
    pub waiting: usize,
    /// Blocks that nobody refers to, cached ones included.
    pub free_blocks: usize,
    /// Of these, blocks that still hold a prefix.
    pub cached_free_blocks: usize,
    /// Blocks that sequences refer to.
    pub used_blocks: usize,
    /// Preemptions since the start.
    pub preemptions: u64,
    /// Prompt tokens that were looked up in the prefix cache since the start. A sequence counts once, when it first
    /// runs: finding its own blocks again after a preemption is no merit of the cache.
    pub prefix_cache_queries: u64,
    /// Of these, tokens that were found.
    pub prefix_cache_hits: u64,
}

impl std::iter::Sum for SchedStats {
    fn sum<I: Iterator<Item = SchedStats>>(stats: I) -> SchedStats {
        stats.fold(SchedStats::default(), |a, b| SchedStats {
            running: a.running + b.running,
            waiting: a.waiting + b.waiting,
            free_blocks: a.free_blocks + b.free_blocks,
            cached_free_blocks: a.cached_free_blocks + b.cached_free_blocks,
            used_blocks: a.used_blocks + b.used_blocks,
            preemptions: a.preemptions + b.preemptions,
            prefix_cache_queries: a.prefix_cache_queries + b.prefix_cache_queries,
            prefix_cache_hits: a.prefix_cache_hits + b.prefix_cache_hits,
        })
    }
}

/// Decides before each step which tokens run in it. See the crate's documentation for an example.
///
/// The round is [`schedule`](Self::schedule), execute, [`commit`](Self::commit); [`drive_step`](crate::drive_step) is
/// one. Requests may be added and aborted at any point of it.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    blocks: BlockManager,
    /// In order of arrival.
    running: Vec<Sequence>,
    /// In order of arrival; all of them later than those that run.
    waiting: VecDeque<Sequence>,
    /// The ids of both.
    ids: HashSet<SeqId>,
    num_arrivals: u64,
    num_steps: u64,
    /// The step that was scheduled and is neither committed nor rolled back.
    in_flight: Option<u64>,
    preemptions: u64,
    prefix_cache_queries: u64,
    prefix_cache_hits: u64,
}

impl Scheduler {
    /// A scheduler with no sequences and an empty cache.
    ///
    /// # Errors
    /// [`SchedError::InvalidConfig`], see [`SchedulerConfig::validate`].
    pub fn new(config: SchedulerConfig) -> Result<Self, SchedError> {
        config.validate()?;
        Ok(Self {
            blocks: BlockManager::new(config.num_blocks, config.block_size, config.enable_prefix_caching),
            config,
            running: Vec::new(),
            waiting: VecDeque::new(),
            ids: HashSet::new(),
            num_arrivals: 0,
            num_steps: 0,
            in_flight: None,
            preemptions: 0,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
        })
    }

    /// The limits it was made with.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Puts a request at the end of the queue.
    ///
    /// # Errors
    /// `EmptyPrompt`, `NoTokensAsked`, `PromptTooLong`, `NeverFits`: the request can never run. `DuplicateId`: its id is
    /// taken. `QueueFull`: not now.
    pub fn add(&mut self, request: SeqRequest) -> Result<(), SchedError> {
        let SchedulerConfig { max_model_len, max_num_waiting, num_blocks, .. } = self.config;
        let (id, prompt_tokens) = (request.id, request.prompt.len());
        if prompt_tokens == 0 {
            return Err(SchedError::EmptyPrompt { id });
        }
        if request.max_tokens == 0 {
            return Err(SchedError::NoTokensAsked { id });
        }
        if prompt_tokens >= max_model_len {
            return Err(SchedError::PromptTooLong { id, prompt_tokens, max_model_len });
        }
        let seq = Sequence::new(request, self.num_arrivals, max_model_len);
        let blocks_needed = self.blocks.blocks_for(seq.max_kv_tokens());
        if blocks_needed > num_blocks {
            return Err(SchedError::NeverFits { id, num_tokens: seq.max_len, blocks_needed, num_blocks });
        }
        if self.ids.contains(&id) {
            return Err(SchedError::DuplicateId { id });
        }
        if self.waiting.len() >= max_num_waiting {
            return Err(SchedError::QueueFull { num_waiting: self.waiting.len(), max_num_waiting });
        }
        self.num_arrivals += 1;
        self.ids.insert(id);
        self.waiting.push_back(seq);
        Ok(())
    }

    /// Forgets a sequence and frees its blocks; false when there is none of this id. Also what a caller does when it
    /// ends a sequence for a reason of its own, such as a stop string. The executor still yields the token of a step in
    /// flight; it goes nowhere.
    pub fn abort(&mut self, id: SeqId) -> bool {
        if !self.ids.remove(&id) {
            return false;
        }
        if let Some(idx) = self.running.iter().position(|seq| seq.id == id) {
            // The step in flight may still write these blocks. Nobody else gets them before the next `schedule`, which
            // comes after it.
            let mut seq = self.running.remove(idx);
            self.blocks.release_all(&mut seq);
        } else {
            self.waiting.retain(|seq| seq.id != id);
        }
        true
    }

    /// Whether there is nothing to do: no sequence runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// The numbers of this moment.
    pub fn stats(&self) -> SchedStats {
        let free_blocks = self.blocks.num_available();
        SchedStats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            free_blocks,
            cached_free_blocks: self.blocks.num_evictable(),
            used_blocks: self.config.num_blocks - free_blocks,
            preemptions: self.preemptions,
            prefix_cache_queries: self.prefix_cache_queries,
            prefix_cache_hits: self.prefix_cache_hits,
        }
    }

    /// Chooses the tokens of the next step. The batch is empty only when the scheduler is idle; any other batch must be
    /// given to [`commit`](Self::commit) or [`rollback`](Self::rollback) before the next call.
    ///
    /// # Panics
    /// When a step is in flight.
    pub fn schedule(&mut self) -> StepBatch {
        assert_eq!(self.in_flight, None, "the step in flight must be committed or rolled back first");
        let mut budget = self.config.max_num_batched_tokens;
        let preempted = self.schedule_running(&mut budget);
        // Whoever was just preempted does not come back here: it would need all that it gave, and some of that is taken.
        self.admit_waiting(&mut budget);

        let step = self.num_steps;
        let seqs: Vec<_> = self.running.iter().map(|seq| self.scheduled(seq)).collect();
        if seqs.is_empty() {
            assert!(self.waiting.is_empty(), "the oldest sequence fits alone, and nothing runs beside it");
        } else {
            self.in_flight = Some(step);
            self.num_steps += 1;
        }
        StepBatch { step, seqs, preempted }
    }

    /// Gives every running sequence its tokens and the blocks for them, the oldest first. Where blocks are missing, the
    /// latest sequence gives way; the result names those that did.
    fn schedule_running(&mut self, budget: &mut usize) -> Vec<SeqId> {
        let mut preempted = Vec::new();
        let mut idx = 0;
        while idx < self.running.len() {
            let seq = &self.running[idx];
            let num_tokens = seq.num_uncomputed().min(*budget);
            assert!(num_tokens > 0, "sequence {} runs and gets no token", seq.id);
            let num_blocks = self.blocks.blocks_for(seq.num_computed + num_tokens);
            let num_missing = num_blocks.saturating_sub(seq.block_table.len());

            while idx < self.running.len() && self.blocks.num_available() < num_missing {
                preempted.push(self.preempt_latest());
            }
            let Some(seq) = self.running.get_mut(idx) else { break }; // it was itself the latest
            seq.block_table.extend((0..num_missing).map(|_| self.blocks.allocate()));
            seq.num_scheduled = num_tokens;
            *budget -= num_tokens;
            idx += 1;
        }
        preempted
    }

    /// The last that runs becomes the first that waits, with all its tokens to compute again.
    fn preempt_latest(&mut self) -> SeqId {
        let mut seq = self.running.pop().expect("there is a sequence to preempt");
        assert!(!self.running.is_empty(), "sequence {} runs alone and was found to fit when it was added", seq.id);
        self.blocks.release_all(&mut seq);
        seq.was_preempted = true;
        self.preemptions += 1;
        let id = seq.id;
        self.waiting.push_front(seq);
        id
    }

    /// Lets waiting sequences in while seats, tokens and blocks last. Strictly in order: a small request behind a large
    /// one waits with it, or the large one might wait for ever.
    fn admit_waiting(&mut self, budget: &mut usize) {
        // A sequence enters with the blocks of all its known tokens, and only if one more is left for each sequence
        // that may grow, itself included. Otherwise the next block that an older one needs would throw it out again,
        // its prefill in vain.
        let may_grow = |blocks: &BlockManager, seq: &Sequence, num_held: usize| {
            usize::from(blocks.blocks_for(seq.max_kv_tokens()) > num_held)
        };
        let mut headroom: usize =
            self.running.iter().map(|seq| may_grow(&self.blocks, seq, seq.block_table.len())).sum();

        while self.running.len() < self.config.max_num_seqs && *budget > 0 {
            let Some(seq) = self.waiting.front() else { break };
            // It needs one block of its own at least. Asked first because the lookup walks the whole prompt.
            if self.blocks.num_available() < headroom + 1 {
                break;
            }
            let hit = self.blocks.lookup(seq);
            let num_hit_tokens = hit.len() * self.config.block_size;
            let num_uncomputed = seq.tokens.len() - num_hit_tokens;
            if num_uncomputed > *budget && !self.config.enable_chunked_prefill {
                break;
            }
            let num_held = self.blocks.blocks_for(seq.tokens.len());
            let num_new = num_held - hit.len();
            let grows = may_grow(&self.blocks, seq, num_held);
            let num_taken = num_new + self.blocks.num_evictable_among(&hit);
            if self.blocks.num_available() < num_taken + headroom + grows {
                break;
            }

            let mut seq = self.waiting.pop_front().expect("it was just looked at");
            if !seq.was_preempted && self.config.enable_prefix_caching {
                self.prefix_cache_queries += seq.tokens.len() as u64;
                self.prefix_cache_hits += num_hit_tokens as u64;
            }
            // First all that is shared, so that none of it is evicted for the new ones.
            hit.iter().for_each(|&block| self.blocks.share(block));
            seq.num_cached_blocks = hit.len();
            seq.num_computed = num_hit_tokens;
            seq.block_table = hit;
            seq.block_table.extend((0..num_new).map(|_| self.blocks.allocate()));
            seq.num_scheduled = num_uncomputed.min(*budget);
            *budget -= seq.num_scheduled;
            headroom += grows;
            self.running.push(seq);
        }
    }

    fn scheduled(&self, seq: &Sequence) -> ScheduledSeq {
        let end = seq.num_computed + seq.num_scheduled;
        ScheduledSeq {
            id: seq.id,
            token_ids: seq.tokens[seq.num_computed..end].to_vec(),
            start: seq.num_computed,
            block_table: seq.block_table[..self.blocks.blocks_for(end)].to_vec(),
            samples: seq.samples(),
            num_generated: seq.num_generated(),
        }
    }

    /// Takes in what the step in flight has computed: its KV counts from now on, and the sampled tokens are appended.
    /// Returns the tokens gained, in order of arrival. Tokens of sequences that were aborted meanwhile are dropped.
    ///
    /// # Errors
    /// `NotInFlight`: this batch is not the one scheduled last. `WrongSamples`: a token is missing, or one came that was
    /// not due. The step is then still in flight.
    pub fn commit(&mut self, batch: &StepBatch, output: &StepOutput) -> Result<Vec<SeqUpdate>, SchedError> {
        let step = batch.step;
        if batch.seqs.is_empty() && self.in_flight.is_none() && output.sampled.is_empty() {
            return Ok(Vec::new()); // the empty batch of an idle scheduler
        }
        if batch.seqs.is_empty() || self.in_flight != Some(step) {
            return Err(SchedError::NotInFlight { step, in_flight: self.in_flight });
        }
        let mut expected: Vec<_> = batch.seqs.iter().filter(|seq| seq.samples).map(|seq| seq.id).collect();
        let mut got: Vec<_> = output.sampled.iter().map(|&(id, _)| id).collect();
        expected.sort_unstable();
        got.sort_unstable();
        if got != expected {
            return Err(SchedError::WrongSamples { step, expected, got });
        }
        let sampled: HashMap<SeqId, u32> = output.sampled.iter().copied().collect();

        self.in_flight = None;
        let mut updates = Vec::with_capacity(sampled.len());
        let Self { running, blocks, ids, .. } = self;
        running.retain_mut(|seq| {
            let samples = seq.samples();
            seq.num_computed += std::mem::take(&mut seq.num_scheduled);
            blocks.cache_full_blocks(seq);
            if !samples {
                return true;
            }
            let token = sampled[&seq.id];
            seq.tokens.push(token);
            let finish = seq.finish_reason();
            updates.push(SeqUpdate { id: seq.id, token, finish });
            if finish.is_some() {
                blocks.release_all(seq);
                ids.remove(&seq.id);
            }
            finish.is_none()
        });
        Ok(updates)
    }

    /// Declares that the step in flight has failed: nothing of it counts, and the next batch holds its tokens again.
    /// Whatever it may have written lies in blocks that only its own sequences hold, at positions that are written again
    /// before they are read.
    ///
    /// # Errors
    /// `NotInFlight`: this batch is not the one scheduled last.
    pub fn rollback(&mut self, batch: &StepBatch) -> Result<(), SchedError> {
        if self.in_flight != Some(batch.step) {
            return Err(SchedError::NotInFlight { step: batch.step, in_flight: self.in_flight });
        }
        self.in_flight = None;
        self.running.iter_mut().for_each(|seq| seq.num_scheduled = 0);
        Ok(())
    }

    /// Asserts every invariant: the order of the line, its limits, what each sequence holds, and every block's state.
    /// For tests: it walks all sequences and all blocks.
    ///
    /// # Panics
    /// When one does not hold, with the values.
    pub fn check_integrity(&self) {
        let SchedulerConfig { max_num_seqs, max_num_waiting, max_num_batched_tokens, block_size, .. } = self.config;
        let line = || self.running.iter().chain(&self.waiting);
        assert!(line().is_sorted_by(|a, b| a.arrival < b.arrival), "the line is out of order: {self:?}");
        assert!(line().all(|seq| self.ids.contains(&seq.id)), "an id in the line is not known");
        assert_eq!(line().count(), self.ids.len(), "an id is known and not in the line");
        assert!(self.running.len() <= max_num_seqs, "{} sequences run", self.running.len());
        assert!(
            self.waiting.len() <= max_num_waiting.saturating_add(max_num_seqs),
            "{} sequences wait",
            self.waiting.len()
        );

        for seq in &self.waiting {
            assert!(seq.block_table.is_empty(), "sequence {} waits and holds blocks", seq.id);
            assert_eq!((seq.num_computed, seq.num_scheduled, seq.num_cached_blocks), (0, 0, 0), "sequence {}", seq.id);
        }
        for seq in &self.running {
            let num_tokens = seq.num_computed + seq.num_scheduled;
            let num_held = seq.block_table.len();
            assert!(seq.tokens.len() < seq.max_len, "sequence {} runs beyond its end", seq.id);
            assert!(seq.num_uncomputed() > 0, "sequence {} runs and has nothing to compute", seq.id);
            assert!(num_tokens <= seq.tokens.len(), "sequence {} runs tokens that it has not", seq.id);
            assert!(num_held >= self.blocks.blocks_for(num_tokens), "sequence {} lacks blocks", seq.id);
            assert!(num_held <= self.blocks.blocks_for(seq.max_kv_tokens()), "sequence {} hoards blocks", seq.id);
            assert!(seq.num_cached_blocks * block_size <= seq.num_computed, "sequence {} shares too early", seq.id);
        }
        let num_scheduled: usize = self.running.iter().map(|seq| seq.num_scheduled).sum();
        assert!(num_scheduled <= max_num_batched_tokens, "{num_scheduled} tokens are scheduled");
        if self.in_flight.is_none() {
            assert_eq!(num_scheduled, 0, "tokens are scheduled and no step is in flight");
        } else if let Some((_, but_last)) = self.running.split_last() {
            assert!(but_last.iter().all(Sequence::samples), "a prefill before the last was cut: {self:?}");
        }
        self.blocks.check_integrity(line());
    }
}
