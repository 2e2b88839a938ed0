//! One rank: the device, the weights, the cache; executes the batches that the scheduler makes.

use std::collections::{BTreeMap, HashMap};

use moesaic_device::Ctx;
use moesaic_kernels::paged::{PagedBatch, PagedSeq};
use moesaic_kernels::sampler::{SampleRequest, Sampled, SamplingParams, sample};
use moesaic_model::{KvCache, StepInput, Transformer};
use moesaic_sched::{Execute, ScheduledSeq, SeqId, StepBatch, StepOutput};

use crate::EngineError;

/// Executes steps.
pub struct Rank {
    ctx: Ctx,
    transformer: Transformer,
    kv: KvCache,
    sequences: HashMap<SeqId, Sequence>,
    /// What the last step sampled, in the order of its output.
    sampled: Vec<Sampled>,
    /// Logits by sequence and position, when they are kept.
    logits: Option<BTreeMap<(SeqId, usize), Vec<f32>>>,
}

/// What sampling needs to know of a sequence.
struct Sequence {
    params: SamplingParams,
    prompt: Vec<u32>,
    generated: Vec<u32>,
}

impl Rank {
    pub(crate) fn new(ctx: Ctx, transformer: Transformer, kv: KvCache, keep_logits: bool) -> Rank {
        let logits = keep_logits.then(BTreeMap::new);
        Rank { ctx, transformer, kv, sequences: HashMap::new(), sampled: Vec::new(), logits }
    }

    /// The model.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// The device, for its log and its arena.
    pub fn ctx(&self) -> &Ctx {
        &self.ctx
    }

    pub(crate) fn open(&mut self, id: SeqId, params: SamplingParams, prompt: Vec<u32>) {
        self.sequences.insert(id, Sequence { params, prompt, generated: Vec::new() });
    }

    pub(crate) fn close(&mut self, id: SeqId) {
        self.sequences.remove(&id);
    }

    pub(crate) fn push(&mut self, id: SeqId, token: u32) {
        self.sequences.get_mut(&id).expect("an open sequence").generated.push(token);
    }

    pub(crate) fn take_sampled(&mut self) -> Vec<Sampled> {
        std::mem::take(&mut self.sampled)
    }

    /// The kept logits of a sequence by position, and an end to keeping them.
    pub fn take_logits(&mut self, id: SeqId) -> BTreeMap<usize, Vec<f32>> {
        let Some(logits) = &mut self.logits else { return BTreeMap::new() };
        let (of_id, others) = std::mem::take(logits).into_iter().partition(|&((seq, _), _)| seq == id);
        *logits = others;
        let of_id: BTreeMap<(SeqId, usize), Vec<f32>> = of_id;
        of_id.into_iter().map(|((_, position), row)| (position, row)).collect()
    }

    fn sample_request<'a>(&'a self, seq: &ScheduledSeq) -> SampleRequest<'a> {
        let sequence = &self.sequences[&seq.id];
        assert_eq!(seq.num_generated, sequence.generated.len(), "the scheduler and the rank count the same tokens");
        SampleRequest { params: &sequence.params, prompt: &sequence.prompt, generated: &sequence.generated }
    }
}

impl Execute for Rank {
    type Error = EngineError;

    fn execute(&mut self, step: &StepBatch) -> Result<StepOutput, EngineError> {
        let mut token_ids = Vec::with_capacity(step.num_tokens());
        let mut logit_rows = Vec::new();
        let mut seqs = Vec::with_capacity(step.seqs.len());
        for seq in &step.seqs {
            let (row0, num_rows) = (token_ids.len(), seq.token_ids.len());
            token_ids.extend_from_slice(&seq.token_ids);
            if self.logits.is_some() {
                logit_rows.extend(row0..row0 + num_rows);
            } else if seq.samples {
                logit_rows.push(row0 + num_rows - 1);
            }
            let block_table = seq.block_table.iter().map(|block| block.0).collect();
            seqs.push(PagedSeq { row0, num_rows, context_len: seq.start + num_rows, block_table });
        }
        let batch = PagedBatch::new(self.kv.block_size, seqs)?;
        let input = StepInput { token_ids: &token_ids, batch, logit_rows: &logit_rows };
        let mut logits = self.transformer.forward(&self.ctx, &input, &mut self.kv)?;

        if let Some(kept) = &mut self.logits {
            let vocab_size = logits.dims()[1];
            let mut rows = logits.f32().chunks(vocab_size);
            for seq in &step.seqs {
                for position in seq.start..seq.start + seq.token_ids.len() {
                    let row = rows.next().expect("a row for every token");
                    kept.insert((seq.id, position), row.to_vec());
                }
            }
            let last_rows: Vec<usize> = input
                .batch
                .seqs()
                .iter()
                .zip(&step.seqs)
                .filter(|(_, scheduled)| scheduled.samples)
                .map(|(paged, _)| paged.row0 + paged.num_rows - 1)
                .collect();
            logits = moesaic_kernels::gather_rows::gather_rows(&self.ctx, &logits, &last_rows)?;
        }

        let sampling: Vec<&ScheduledSeq> = step.seqs.iter().filter(|seq| seq.samples).collect();
        let requests: Vec<SampleRequest> = sampling.iter().map(|seq| self.sample_request(seq)).collect();
        let sampled = sample(&self.ctx, &logits, &requests)?;
        let output = StepOutput { sampled: sampling.iter().zip(&sampled).map(|(seq, s)| (seq.id, s.token)).collect() };
        self.sampled = sampled;
        Ok(output)
    }
}
