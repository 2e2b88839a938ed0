//! Training in closed form: time of a step, tokens per second, MFU, memory by part, and the pipeline's bubble.
//!
//! The forward pass is priced as an iteration that reads prompts, with logits for every token. The backward pass takes twice
//! its time, because each product has two gradients of its size; with checkpointing activations are computed again, which is
//! one forward pass more. Gradients are summed over data-parallel groups once a step, nothing hides that.

use moesaic_spec::{Attention, ModelSpec};
use serde::{Deserialize, Serialize};

use crate::PlannerError;
use crate::iteration::dag::Slot;
use crate::iteration::{Batch, ExpertLayout, Iterations, Layout};
use crate::memory::Footprint;
use crate::network::{Algorithm, Group, Network};

/// What data-parallel groups share out instead of holding it each. Source: Rajbhandari and others, "ZeRO: Memory
/// Optimizations Toward Training Trillion Parameter Models", 2020.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Zero {
    /// Nothing.
    #[default]
    Off,
    /// Optimizer states (stage 1).
    Optimizer,
    /// Gradients, too (stage 2).
    Gradients,
    /// Weights, too (stage 3).
    Weights,
}

/// How a model is trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Sequences of a step, over all data-parallel groups.
    pub seqs: f64,
    /// Tokens of each.
    pub tokens: f64,
    /// Micro-batches that a group's share of them is cut into; gradients are summed up over them.
    pub micro_batches: usize,
    /// Only the input of each layer is kept for the backward pass.
    pub checkpointing: bool,
    /// Bytes of a parameter's gradient.
    pub gradient_bytes: f64,
    /// Bytes of a parameter's optimizer states. AdamW in mixed precision: two moments and a master copy in F32, 12; without
    /// the copy 8.
    pub optimizer_bytes: f64,
    /// What groups share out.
    pub zero: Zero,
}

impl Training {
    /// Mixed precision with AdamW: gradients in 16 bits, 12 bytes of states for each parameter.
    pub fn adamw(seqs: f64, tokens: f64, micro_batches: usize, checkpointing: bool) -> Training {
        Training {
            seqs,
            tokens,
            micro_batches,
            checkpointing,
            gradient_bytes: 2.0,
            optimizer_bytes: 12.0,
            zero: Zero::Off,
        }
    }
}

/// Memory of one rank by part, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainingMemory {
    /// Weights.
    pub weights: f64,
    /// Gradients.
    pub gradients: f64,
    /// Optimizer states.
    pub optimizer: f64,
    /// What is kept for the backward pass.
    pub activations: f64,
    /// Rows on their way between ranks.
    pub exchange: f64,
}

impl TrainingMemory {
    /// All parts.
    pub fn total(&self) -> f64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.exchange
    }
}

/// A training step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingStep {
    /// Seconds from weights to weights.
    pub seconds: f64,
    /// Standard deviation of that.
    pub deviation: f64,
    /// Tokens per second.
    pub tokens_per_s: f64,
    /// Model FLOPs utilization: operations of one forward and one backward pass by what the peak would do; what is computed
    /// again does not count.
    pub mfu: f64,
    /// Share of the pipeline's time in which a stage has nothing to do.
    pub bubble: f64,
    /// Seconds of the sum of gradients.
    pub gradient_sync_s: f64,
    /// A rank with attention.
    pub memory: TrainingMemory,
    /// A rank of an expert pool.
    pub expert_memory: Option<TrainingMemory>,
}

/// Forward is 1, backward is 2.
const PASSES: f64 = 3.0;

/// A step of a layout; `network` is the cluster's.
///
/// # Errors
/// [`PlannerError`]: the model cannot be spread like this.
pub fn step(
    iterations: &mut Iterations,
    network: &Network,
    layout: &Layout,
    training: &Training,
) -> Result<TrainingStep, PlannerError> {
    let (model, cluster, formats) = (iterations.model(), iterations.cluster(), iterations.formats());
    let micro_batches = training.micro_batches.max(1) as f64;
    let prompts = training.seqs / layout.dp as f64 / micro_batches;
    let rows = prompts * training.tokens;
    let batch = Batch {
        prefill_tokens: rows,
        prefills: prompts,
        // Every token has a target, and so logits.
        finished_prefills: rows,
        ..Batch::default()
    };
    // Stages have their micro-batches one by one; without stages a micro-batch may be cut again to overlap.
    let stages = layout.pp as f64;
    let in_one = if layout.pp > 1 { 1 } else { layout.micro_batches };
    let one = iterations.price(&Layout { micro_batches: in_one, ..layout.clone() }, &batch)?;
    // Losses are computed where the logits are: nobody gathers or samples.
    let forward = (one.seconds - one.slots[Slot::GatherLogits] - one.slots[Slot::Sample]) / stages;
    let passes = PASSES + f64::from(u8::from(training.checkpointing));
    let turns = micro_batches + stages - 1.0;
    let computing = turns * forward * passes;

    let footprint = iterations.footprint(layout, rows)?;
    let stored = (formats.dense.bytes(), formats.experts.bytes());
    let gradient_sync_s = gradient_sync(network, layout, &footprint, training, stored);
    let seconds = computing + gradient_sync_s;
    let tokens = training.seqs * training.tokens;
    let flops = PASSES * model.counts().flops.prefill((training.tokens / 2.0) as usize) * tokens;
    let peak = formats.dense.peak(&cluster.gpu) * layout.ranks() as f64;
    let in_flight = rows * stages.min(micro_batches);
    let memory = |of: &crate::memory::Memory, activations: f64| {
        let shares = |from: Zero| if training.zero >= from { layout.dp as f64 } else { 1.0 };
        let params = params_of(of, stored);
        TrainingMemory {
            weights: (of.attention_weights + of.expert_weights) / shares(Zero::Weights),
            gradients: params * training.gradient_bytes / shares(Zero::Gradients),
            optimizer: params * training.optimizer_bytes / shares(Zero::Optimizer),
            activations,
            exchange: of.exchange,
        }
    };
    let kept = Kept::of(model, layout, training.checkpointing);
    Ok(TrainingStep {
        seconds,
        deviation: one.deviation / one.seconds * seconds,
        tokens_per_s: tokens / seconds,
        mfu: flops / peak / seconds,
        bubble: bubble(layout.pp, training.micro_batches),
        gradient_sync_s,
        memory: memory(&footprint.attention_rank, kept.attention_rank(in_flight, rows)),
        expert_memory: footprint.expert_rank.as_ref().map(|pool| memory(pool, kept.expert_rank(in_flight, rows))),
    })
}

/// Share of a pipeline's time that its stages idle: `(p - 1) / (m + p - 1)`. Source: Huang and others, "GPipe", 2019.
pub fn bubble(stages: usize, micro_batches: usize) -> f64 {
    let (stages, micro_batches) = (stages.max(1) as f64, micro_batches.max(1) as f64);
    (stages - 1.0) / (micro_batches + stages - 1.0)
}

fn params_of(memory: &crate::memory::Memory, (dense, experts): (f64, f64)) -> f64 {
    memory.attention_weights / dense + memory.expert_weights / experts
}

/// Each rank sums the gradients of what other groups have, too.
fn gradient_sync(
    network: &Network,
    layout: &Layout,
    footprint: &Footprint,
    training: &Training,
    stored: (f64, f64),
) -> f64 {
    let of = &footprint.attention_rank;
    // Placed experts are there once: their ranks see the rows of all groups.
    let shared = match layout.experts {
        ExpertLayout::Placed { .. } | ExpertLayout::Pool { .. } => of.attention_weights / stored.0,
        ExpertLayout::Cut | ExpertLayout::Summed { .. } => params_of(of, stored),
    };
    let per_node = (layout.gpus_per_node / layout.tp).clamp(1, layout.dp.max(1));
    let group = Group { ranks: layout.dp, ranks_per_node: per_node };
    network.all_reduce(shared * training.gradient_bytes, group, Algorithm::Best).seconds
}

/// Bytes that one token leaves for the backward pass, in 16 bits, with fused attention that keeps no scores. Source of the
/// list: Korthikanti and others, "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4, with
/// routed experts in place of the MLP.
struct Kept {
    /// Outside of the experts, in the layers of one stage.
    attention: f64,
    /// Inside the experts, by rank with experts.
    experts: f64,
    /// Of one layer alone: what is computed again at a time; zero without checkpointing.
    again: (f64, f64),
    /// Whether experts share ranks with attention.
    shared: bool,
    /// Groups by ranks with experts: how many groups' tokens each of these has, if their experts are alike.
    groups_per_expert_rank: f64,
}

impl Kept {
    fn of(model: &ModelSpec, layout: &Layout, checkpointing: bool) -> Kept {
        const BYTES: f64 = 2.0;
        let hidden = model.hidden_size as f64;
        let (queries, cached) = match &model.attention {
            Attention::Gqa(gqa) => {
                ((gqa.num_heads * gqa.head_dim) as f64, 2.0 * (gqa.num_kv_heads * gqa.head_dim) as f64)
            }
            Attention::Mla(mla) => {
                let heads = mla.num_heads as f64;
                (heads * mla.qk_head_dim() as f64, heads * (mla.qk_head_dim() + mla.v_head_dim) as f64)
            }
        };
        // Two norms' inputs and outputs whole; queries, keys, values and what attention gives, by heads.
        let attention = BYTES * (4.0 * hidden + (2.0 * queries + cached) / layout.tp as f64);
        let moe = model.layers.iter().find_map(|ffn| ffn.as_moe());
        let of_experts = moe.map_or(0.0, |moe| {
            // Input, what is between the products (before and after the activation), answer, for each expert of a token.
            let inner = moe.activation.matrices() as f64 * moe.intermediate_size as f64;
            BYTES * moe.top_k as f64 * (2.0 * hidden + inner / layout.expert_cut() as f64)
        });
        let groups_per_expert_rank = match layout.experts {
            ExpertLayout::Pool { ep } | ExpertLayout::Placed { ep } => layout.dp as f64 / ep as f64,
            ExpertLayout::Cut | ExpertLayout::Summed { .. } => 1.0,
        };
        let shared = !matches!(layout.experts, ExpertLayout::Pool { .. });
        let (dense, moe_layers) = layout.fullest_stage(model);
        let layers = (dense + moe_layers) as f64;
        let inputs = BYTES * hidden;
        if checkpointing {
            let (attention, again) = (layers * inputs, (attention, of_experts));
            Kept { attention, experts: 0.0, again, shared, groups_per_expert_rank }
        } else {
            let (attention, experts) = (layers * attention, moe_layers as f64 * of_experts);
            Kept { attention, experts, again: (0.0, 0.0), shared, groups_per_expert_rank }
        }
    }

    /// A rank with attention (and, where they share ranks, its experts), with so many rows of its group in flight, `rows` of
    /// them in one micro-batch.
    fn attention_rank(&self, in_flight: f64, rows: f64) -> f64 {
        let own = self.attention * in_flight + self.again.0 * rows;
        if self.shared { own + self.expert_rank(in_flight, rows) } else { own }
    }

    fn expert_rank(&self, in_flight: f64, rows: f64) -> f64 {
        (self.experts * in_flight + self.again.1 * rows) * self.groups_per_expert_rank
    }
}

#[cfg(test)]
mod tests {
    use moesaic_spec::{Cluster, cluster_preset, preset};

    use super::*;
    use crate::cost::{CostModel, Stack};
    use crate::network::Library;

    fn layout(tp: usize, pp: usize, dp: usize) -> Layout {
        Layout { tp, pp, dp, ..Layout::single(8) }
    }

    fn of(cluster: &Cluster, layout: &Layout, training: &Training) -> TrainingStep {
        let model = preset("mixtral-8x7b").unwrap().spec().unwrap();
        let bf16 = crate::cost::Precision::Bf16;
        let formats = crate::iteration::Formats { dense: bf16, experts: bf16, kv: bf16 };
        let network = Network::new(cluster, Library::Nccl);
        let costs = CostModel::new(&cluster.gpu, Stack::default());
        let mut iterations = Iterations::new(&model, cluster, formats, costs, network.clone(), None);
        step(&mut iterations, &network, layout, training).unwrap()
    }

    fn cluster() -> Cluster {
        cluster_preset("dgx-h100-x4").unwrap()
    }

    #[test]
    fn a_step_takes_no_less_than_its_operations() {
        let plain = of(&cluster(), &layout(8, 1, 4), &Training::adamw(256.0, 4096.0, 8, false));
        assert!(plain.mfu > 0.1 && plain.mfu < 0.83, "the GPU's own share of its peak is the limit: {plain:?}");
        assert!((plain.tokens_per_s * plain.seconds - 256.0 * 4096.0).abs() < 1.0);
        let again = of(&cluster(), &layout(8, 1, 4), &Training::adamw(256.0, 4096.0, 8, true));
        let extra = (again.seconds - again.gradient_sync_s) / (plain.seconds - plain.gradient_sync_s);
        assert!((extra - 4.0 / 3.0).abs() < 1e-9, "one forward pass more: {extra}");
        assert!(again.memory.activations < 0.5 * plain.memory.activations);
        assert_eq!(again.memory.optimizer, plain.memory.optimizer);
    }

    #[test]
    fn bubbles_shrink_with_micro_batches() {
        assert_eq!(bubble(1, 1), 0.0);
        assert_eq!(bubble(4, 1), 0.75);
        assert!((bubble(2, 8) - 1.0 / 9.0).abs() < 1e-12);
        let with =
            |micro_batches| of(&cluster(), &layout(8, 4, 1), &Training::adamw(256.0, 4096.0, micro_batches, true));
        assert!(with(32).tokens_per_s > with(4).tokens_per_s);
    }

    #[test]
    fn states_are_counted_by_parameter_and_shared_out() {
        let training = Training::adamw(64.0, 4096.0, 8, true);
        let off = of(&cluster(), &layout(8, 1, 4), &training).memory;
        // BF16 weights and gradients, 12 bytes of AdamW for each parameter.
        assert!(
            (off.gradients - off.weights).abs() < 1.0 && (off.optimizer - 6.0 * off.weights).abs() < 1.0,
            "{off:?}"
        );
        // 46.7 B parameters over 8 ranks, and the rest of the embedding, which each has whole.
        let whole = 46.7e9 * 2.0 / 8.0 + 7.0 / 8.0 * 32_000.0 * 4096.0 * 2.0;
        assert!((off.weights - whole).abs() < 0.02e9, "{off:?}");
        let all = of(&cluster(), &layout(8, 1, 4), &Training { zero: Zero::Weights, ..training }).memory;
        for (shared, whole) in
            [(all.weights, off.weights), (all.gradients, off.gradients), (all.optimizer, off.optimizer)]
        {
            assert!((4.0 * shared - whole).abs() < 1.0);
        }
        let first = of(&cluster(), &layout(8, 1, 4), &Training { zero: Zero::Optimizer, ..training }).memory;
        assert!(first.optimizer < off.optimizer && first.gradients == off.gradients);
    }

    #[test]
    fn one_group_has_no_gradients_to_sum() {
        let training = Training::adamw(64.0, 4096.0, 8, false);
        assert_eq!(of(&cluster(), &layout(8, 1, 1), &training).gradient_sync_s, 0.0);
        let four = of(&cluster(), &layout(8, 1, 4), &training).gradient_sync_s;
        // Twice three quarters of 11.7 GB over each GPU's own 50 GB/s.
        assert!(four > 0.75 * 11.7e9 / 50e9, "{four}");
    }

    #[test]
    fn faster_hardware_is_never_slower() {
        let training = Training::adamw(256.0, 4096.0, 8, false);
        let slow = of(&cluster(), &layout(8, 1, 4), &training);
        let mut cluster = cluster();
        cluster.gpu.peak_flops.bf16 *= 2.0;
        cluster.gpu.memory_bandwidth *= 2.0;
        assert!(of(&cluster, &layout(8, 1, 4), &training).seconds <= slow.seconds);
    }
}
