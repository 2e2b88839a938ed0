//! A model whose KV cache can be checked.
//!
//! Each slot of each block holds a digest of the whole history up to its token, the tenant included, made from the digest
//! that the *cache* holds one position earlier, as attention would. The token that is sampled is a function of the last
//! digest alone. So a block that is shared, kept or written wrongly shows twice: in the comparison with the true history
//! after each step, and in what the sequence says.

use std::collections::{BTreeMap, BTreeSet};

use moesaic_sched::{
    BlockId, Execute, FinishReason, SchedError, ScheduledSeq, SeqId, SeqRequest, StepBatch, StepOutput,
};

/// Small, so that stop tokens are met and prompts that share a beginning also share what follows it.
pub(crate) const VOCAB: u32 = 12;

/// The finaliser of SplitMix64 over both.
fn mix(digest: u64, value: u64) -> u64 {
    let mut x = digest.rotate_left(17) ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn digest_before_first(cache_salt: u64) -> u64 {
    mix(1, cache_salt)
}

fn sample(digest: u64) -> u32 {
    (digest % u64::from(VOCAB)) as u32
}

/// What a request says when it has the machine to itself: no scheduler, no blocks.
pub(crate) fn alone(request: &SeqRequest, max_model_len: usize) -> (Vec<u32>, FinishReason) {
    let mut generated = Vec::new();
    let mut digest = digest_before_first(request.cache_salt);
    digest = request.prompt.iter().fold(digest, |digest, &token| mix(digest, token.into()));
    loop {
        let token = sample(digest);
        generated.push(token);
        if request.stop_token_ids.contains(&token) {
            return (generated, FinishReason::Stop { token });
        }
        if generated.len() == request.max_tokens || request.prompt.len() + generated.len() == max_model_len {
            return (generated, FinishReason::Length);
        }
        digest = mix(digest, token.into());
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    position: usize,
    digest: u64,
}

struct History {
    cache_salt: u64,
    num_prompt_tokens: usize,
    tokens: Vec<u32>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FakeError {
    /// The step was told to fail.
    Failed,
    Sched(SchedError),
}

impl From<SchedError> for FakeError {
    fn from(error: SchedError) -> Self {
        Self::Sched(error)
    }
}

pub(crate) struct FakeModel {
    block_size: usize,
    slots: Vec<Vec<Option<Slot>>>, // [num_blocks][block_size]
    histories: BTreeMap<SeqId, History>,
    /// The next step writes rubbish into the slots it was to fill, and fails.
    pub(crate) fail_next: bool,
}

impl FakeModel {
    pub(crate) fn new(num_blocks: usize, block_size: usize) -> Self {
        let slots = vec![vec![None; block_size]; num_blocks];
        Self { block_size, slots, histories: BTreeMap::new(), fail_next: false }
    }

    /// What the model should see of this sequence from now on.
    pub(crate) fn expect(&mut self, request: &SeqRequest) {
        let history = History {
            cache_salt: request.cache_salt,
            num_prompt_tokens: request.prompt.len(),
            tokens: request.prompt.clone(),
        };
        self.histories.insert(request.id, history);
    }

    fn slot(&mut self, seq: &ScheduledSeq, position: usize) -> &mut Option<Slot> {
        let block = seq.block_table[position / self.block_size];
        &mut self.slots[block.0 as usize][position % self.block_size]
    }

    /// What a batch says about a sequence, against what is known of it.
    fn check_shape(&self, seq: &ScheduledSeq) {
        let history = &self.histories[&seq.id];
        let end = seq.start + seq.token_ids.len();
        assert!(!seq.token_ids.is_empty(), "{seq:?} has nothing to run");
        assert_eq!(seq.token_ids, history.tokens[seq.start..end], "{seq:?} runs other tokens than its own");
        assert_eq!(seq.block_table.len(), end.div_ceil(self.block_size), "{seq:?}: its table covers something else");
        assert_eq!(seq.samples, end == history.tokens.len(), "{seq:?} samples at the wrong place");
        assert_eq!(seq.num_generated, history.tokens.len() - history.num_prompt_tokens, "{seq:?} miscounts");
    }

    /// No block that one sequence writes is in the table of another, or twice in its own.
    fn check_written_blocks(&self, batch: &StepBatch) {
        for writer in &batch.seqs {
            let distinct: BTreeSet<BlockId> = writer.block_table.iter().copied().collect();
            assert_eq!(distinct.len(), writer.block_table.len(), "{writer:?} has a block twice");
            for block in &writer.block_table[writer.start / self.block_size..] {
                let holders = batch.seqs.iter().filter(|seq| seq.block_table.contains(block)).count();
                assert_eq!(holders, 1, "{block:?} is written by {writer:?} and held by another");
            }
        }
    }

    fn write(&mut self, seq: &ScheduledSeq) {
        let mut digest = match seq.start.checked_sub(1) {
            None => digest_before_first(self.histories[&seq.id].cache_salt),
            Some(before) => self.slot(seq, before).expect("a slot is written before it is read").digest,
        };
        for (position, &token) in (seq.start..).zip(&seq.token_ids) {
            digest = mix(digest, token.into());
            *self.slot(seq, position) = Some(Slot { position, digest });
        }
    }

    /// Every position that the sequence can read is its own history.
    fn check_reads(&mut self, seq: &ScheduledSeq) -> u64 {
        let history = &self.histories[&seq.id];
        let mut digest = digest_before_first(history.cache_salt);
        let tokens = history.tokens[..seq.start + seq.token_ids.len()].to_vec();
        for (position, token) in tokens.into_iter().enumerate() {
            digest = mix(digest, token.into());
            let read = *self.slot(seq, position);
            assert_eq!(read, Some(Slot { position, digest }), "{seq:?} reads another history at {position}");
        }
        digest
    }
}

impl Execute for FakeModel {
    type Error = FakeError;

    fn execute(&mut self, batches: &[StepBatch]) -> Result<Vec<StepOutput>, FakeError> {
        let [batch] = batches else { panic!("one group, {} batches", batches.len()) };
        batch.seqs.iter().for_each(|seq| self.check_shape(seq));
        self.check_written_blocks(batch);
        if std::mem::take(&mut self.fail_next) {
            for seq in &batch.seqs {
                for position in seq.start..seq.start + seq.token_ids.len() {
                    *self.slot(seq, position) = Some(Slot { position: usize::MAX, digest: 0 });
                }
            }
            return Err(FakeError::Failed);
        }
        // All write, then all read: whoever writes over another's slot is caught in the same step.
        batch.seqs.iter().for_each(|seq| self.write(seq));
        let mut sampled = Vec::new();
        for seq in &batch.seqs {
            let digest = self.check_reads(seq);
            if seq.samples {
                let token = sample(digest);
                self.histories.get_mut(&seq.id).expect("its shape was checked").tokens.push(token);
                sampled.push((seq.id, token));
            }
        }
        sampled.reverse(); // the order of the output means nothing
        Ok(vec![StepOutput { sampled }])
    }
}
