//! What has no experts: from the embedding to the head, and the partial results that ranks add up.

use moesaic_comm::collective::{self, AllReduceArgs, GatherArgs};
use moesaic_comm::{CommError, Message};
use moesaic_device::{Amount, Tensor};
use moesaic_kernels::add::add;
use moesaic_kernels::add_rms_norm::add_rms_norm;
use moesaic_kernels::gather_rows::{gather_rows, gather_rows_into};
use moesaic_kernels::rms_norm::rms_norm;
use moesaic_plan::{AllReduce, MessageKind, Peers, Rank, Tag};
use moesaic_spec::DType;

use super::{Step, Surroundings};
use crate::ModelError;
use crate::kv_cache::LayerCache;
use crate::layers::{AttentionStep, FeedForward};
use crate::transformer::AttentionLayer;

impl<'a> Step<'a> {
    pub(super) fn embed(&mut self, mb: usize) -> Result<(), ModelError> {
        let embedding = self.transformer.embedding.as_ref().expect("the first stage embeds");
        let flow = &mut self.flows[mb];
        flow.residual = Some(embedding.embed(self.around.ctx, &flow.input.token_ids)?);
        Ok(())
    }

    /// What was pending goes into the residual stream; its norm.
    pub(super) fn normed(&mut self, mb: usize, weight: &Tensor) -> Result<Tensor, ModelError> {
        let (eps, dtype) = (self.transformer.spec().rms_norm_eps, self.transformer.compute_dtype());
        let ctx = self.around.ctx;
        let flow = &mut self.flows[mb];
        let residual = flow.residual.as_mut().expect("a residual stream");
        Ok(match flow.delta.take() {
            None => rms_norm(ctx, residual, weight, eps, dtype)?,
            Some(delta) => add_rms_norm(ctx, residual, &delta, weight, eps, dtype)?,
        })
    }

    pub(super) fn receive_hidden(&mut self, layer: u32, mb: usize, from: Rank) -> Result<(), ModelError> {
        // The stage before has sent it under its own last layer.
        let tag = self.tag(layer - 1, mb, MessageKind::Hidden);
        let dims = [self.flows[mb].input.token_ids.len(), self.transformer.spec().hidden_size];
        let residual = self.receive_tensor(from, tag, &dims, DType::F32)?;
        self.flows[mb].residual = Some(residual);
        Ok(())
    }

    pub(super) fn send_hidden(&mut self, layer: u32, mb: usize, to: Rank) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, MessageKind::Hidden);
        let Surroundings { ctx, comm, .. } = self.around;
        let flow = &mut self.flows[mb];
        let mut residual = flow.residual.take().expect("a residual stream");
        if let Some(delta) = flow.delta.take() {
            add(ctx, &mut residual, &delta)?;
        }
        let rows: Vec<(u32, u32)> = (0..residual.dims()[0] as u32).map(|row| (0, row)).collect();
        let copy = gather_rows_into(ctx, comm.exchange(), &[&residual], &rows)?;
        collective::send(ctx, comm, to, tag, Message { header: Vec::new(), tensors: vec![copy] })?;
        Ok(())
    }

    pub(super) fn attention(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let half = self.half(layer);
        let x = self.normed(mb, &half.input_norm)?;
        let ctx = self.around.ctx;
        let (cache, step) = self.cache(layer, mb);
        let attended = match (&half.attention, cache) {
            (AttentionLayer::Gqa(gqa), LayerCache::Gqa(kv)) => gqa.forward(ctx, &x, kv, step)?,
            (AttentionLayer::Mla(mla), LayerCache::Mla(latent)) => mla.forward(ctx, &x, latent, step)?,
            _ => unreachable!("the cache was made for this model"),
        };
        self.flows[mb].delta = Some(attended);
        Ok(())
    }

    /// A layer's pages, and what attention over them needs to know.
    fn cache(&mut self, layer: u32, mb: usize) -> (&mut LayerCache, AttentionStep<'_>) {
        let out_dtype = self.transformer.compute_dtype();
        let rope = self.transformer.rope.as_deref().expect("a rank with attention");
        let cache = &mut self.kv.layers[layer as usize - self.transformer.shard.layers.start];
        (cache, AttentionStep { batch: &self.flows[mb].input.batch, rope, out_dtype })
    }

    pub(super) fn project(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let half = self.half(layer);
        let AttentionLayer::Gqa(gqa) = &half.attention else { unreachable!("MLA has no norm over all heads") };
        let x = self.normed(mb, &half.input_norm)?;
        self.flows[mb].projected = Some(gqa.project(self.around.ctx, &x)?);
        Ok(())
    }

    pub(super) fn attend(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let AttentionLayer::Gqa(gqa) = &self.half(layer).attention else { unreachable!("as in project") };
        let projected = self.flows[mb].projected.take().expect("projected");
        let ctx = self.around.ctx;
        let (LayerCache::Gqa(kv), step) = self.cache(layer, mb) else { unreachable!("the cache is the model's") };
        self.flows[mb].delta = Some(gqa.attend(ctx, projected, kv, step)?);
        Ok(())
    }

    pub(super) fn all_reduce(
        &mut self,
        (layer, mb): (u32, usize),
        of: MessageKind,
        group: &Peers,
        algorithm: AllReduce,
    ) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, of);
        let Surroundings { ctx, comm, plan, .. } = self.around;
        let flow = &mut self.flows[mb];
        let partial = match of {
            MessageKind::QkNorm => flow.projected.as_mut().and_then(|projected| projected.norm_sums.as_mut()),
            _ => flow.delta.as_mut(),
        };
        let partial = partial.expect("a partial result");
        collective::all_reduce(ctx, comm, AllReduceArgs { tag, group, node_of: &plan.node_of, algorithm }, partial)?;
        Ok(())
    }

    pub(super) fn mlp(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let Some(FeedForward::Dense(weights)) = self.layer(layer).feed_forward.as_deref() else {
            unreachable!("the schedule follows the model")
        };
        let x = self.normed(mb, &self.half(layer).post_attention_norm)?;
        let out_dtype = self.transformer.compute_dtype();
        self.flows[mb].delta = Some(crate::layers::ffn::dense(self.around.ctx, &x, weights, out_dtype)?);
        Ok(())
    }

    pub(super) fn head(&mut self, mb: usize) -> Result<(), ModelError> {
        let norm = self.transformer.final_norm.as_ref().expect("the last stage has the head");
        if self.flows[mb].input.logit_rows.is_empty() {
            return Ok(());
        }
        let x = self.normed(mb, norm)?;
        let ctx = self.around.ctx;
        let x = gather_rows(ctx, &x, &self.flows[mb].input.logit_rows)?;
        let embedding = self.transformer.embedding.as_ref().expect("the last stage has the head");
        self.flows[mb].logits = Some(embedding.logits(ctx, &x)?);
        Ok(())
    }

    pub(super) fn gather_logits(&mut self, layer: u32, mb: usize, group: &Peers) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, MessageKind::Logits);
        let Surroundings { ctx, comm, .. } = self.around;
        let Some(part) = self.flows[mb].logits.take() else { return Ok(()) };
        let vocab = self.transformer.spec().vocab_size;
        let sizes: Vec<usize> =
            (0..group.len()).map(|idx| moesaic_plan::Slice { idx, count: group.len() }.range(vocab, 1).len()).collect();
        let args = GatherArgs { tag, group, sizes: &sizes };
        self.flows[mb].logits = collective::gather_to_first(ctx, comm, args, &part)?;
        Ok(())
    }

    fn receive_tensor(&self, from: Rank, tag: Tag, dims: &[usize], dtype: DType) -> Result<Tensor, ModelError> {
        let Surroundings { ctx, comm, .. } = self.around;
        if ctx.is_meta() {
            let tensor = Tensor::empty(comm.exchange(), dims, dtype)?;
            collective::received(ctx, from, tag, Amount::exact(tensor.size_bytes() as u64));
            return Ok(tensor);
        }
        let mut message = collective::receive_all(ctx, comm, &[from], tag)?.remove(0);
        match message.tensors.pop() {
            Some(tensor) if tensor.dims() == dims && tensor.dtype() == dtype && message.tensors.is_empty() => {
                Ok(tensor)
            }
            got => Err(CommError::Malformed {
                rank: comm.rank(),
                peer: from,
                tag,
                got: format!("{:?}", got.map(|tensor| (tensor.dims().to_vec(), tensor.dtype()))),
                expected: format!("{:?}", (dims, dtype)),
            }
            .into()),
        }
    }
}
