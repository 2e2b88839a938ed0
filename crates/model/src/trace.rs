//! What a step will do, without doing it: the forward pass on `Meta`.

use moesaic_device::{Arena, Ctx, OpCall};
use moesaic_kernels::gather_rows::gather_rows;
use moesaic_kernels::paged::{PagedBatch, PagedSeq};
use moesaic_kernels::sampler::{SampleRequest, SamplingParams, sample};
use moesaic_spec::{Bytes, ModelSpec};

use crate::load::LoadDType;
use crate::{KvCache, ModelError, StepInput, Transformer, WeightSource};

/// The shape of one sequence's part in a step.
#[derive(Clone, Copy, Debug)]
pub struct SeqShape {
    /// Tokens in this step.
    pub num_tokens: usize,
    /// Tokens in the cache after it.
    pub context_len: usize,
    /// Whether its last row's logits are wanted.
    pub samples: bool,
}

/// What the `Meta` run of a step reports.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Every op in order.
    pub calls: Vec<OpCall>,
    /// Size of the activation arena that the step needs.
    pub activation_peak: Bytes,
}

/// A model without data: its weights are counted, and any step can be traced.
pub struct MetaModel {
    transformer: Transformer,
    /// Memory of the weights as kernels want them.
    pub weight_bytes: Bytes,
}

impl MetaModel {
    /// Builds the model as it would be loaded.
    pub fn new(spec: &ModelSpec, dtype: LoadDType, max_model_len: usize) -> Result<MetaModel, ModelError> {
        let weights = Arena::meta("weight");
        let transformer = Transformer::load(&WeightSource::meta(spec, dtype, &weights), max_model_len)?;
        Ok(MetaModel { transformer, weight_bytes: weights.peak() })
    }

    /// The transformer.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// Runs one step on `Meta`, sampling included; `all_logits` asks for the logits of every row.
    pub fn trace(&self, shape: &[SeqShape], block_size: usize, all_logits: bool) -> Result<Trace, ModelError> {
        let ctx = Ctx::meta();
        self.run(&ctx, shape, block_size, all_logits)?;
        Ok(Trace { calls: ctx.take_log(), activation_peak: ctx.arena().peak() })
    }

    /// Size at which an activation arena has room for this step and for every other that asks for the same tensors or
    /// smaller ones ([`Arena::sufficient`]). Ops are not counted, so the step may be larger than any machine's.
    pub fn activation_bound(
        &self,
        shape: &[SeqShape],
        block_size: usize,
        all_logits: bool,
    ) -> Result<Bytes, ModelError> {
        let ctx = Ctx::meta();
        ctx.stop_log();
        self.run(&ctx, shape, block_size, all_logits)?;
        Ok(ctx.arena().sufficient())
    }

    fn run(&self, ctx: &Ctx, shape: &[SeqShape], block_size: usize, all_logits: bool) -> Result<(), ModelError> {
        let mut num_blocks = 0;
        let mut row0 = 0;
        let mut sampled_rows = Vec::new();
        let seqs = shape
            .iter()
            .map(|seq| {
                let blocks = seq.context_len.div_ceil(block_size);
                let block_table = (num_blocks..num_blocks + blocks).map(|block| block as u32).collect();
                num_blocks += blocks;
                row0 += seq.num_tokens;
                if seq.samples {
                    sampled_rows.push(row0 - 1);
                }
                PagedSeq {
                    row0: row0 - seq.num_tokens,
                    num_rows: seq.num_tokens,
                    context_len: seq.context_len,
                    block_table,
                }
            })
            .collect();
        let (spec, dtype) = (self.transformer.spec(), self.transformer.compute_dtype());
        let (attention, num_layers) = (&spec.attention, spec.layers.len());
        let mut kv = KvCache::new(&Arena::meta("kv"), attention, num_layers, dtype, num_blocks, block_size)?;
        let all_rows: Vec<usize> = (0..row0).collect();
        let input = StepInput {
            token_ids: &vec![0; row0],
            batch: PagedBatch::new(block_size, seqs)?,
            logit_rows: if all_logits { &all_rows } else { &sampled_rows },
        };
        let mut logits = self.transformer.forward(ctx, &input, &mut kv)?;
        if all_logits {
            logits = gather_rows(ctx, &logits, &sampled_rows)?;
        }
        let params = SamplingParams::default();
        let request = SampleRequest { params: &params, prompt: &[], generated: &[] };
        sample(ctx, &logits, &vec![request; sampled_rows.len()])?;
        Ok(())
    }
}
