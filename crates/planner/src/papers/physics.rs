//! What bytes and operations allow at best: closed forms on peak figures, with their arithmetic in a line.
//!
//! Nothing here is shared with the prices of ops: weights that are touched and the KV cache are streamed once at full
//! bandwidth, operations run at the peak, messages and waiting cost nothing.

use moesaic_spec::{Cluster, ModelSpec, PartName};

use super::claim::plain;
use super::claim::unit;
use super::lab::{Bound, Case, Phase};
use crate::cost::touched;
use crate::iteration::{ExpertLayout, Formats};
use crate::report::format::{number, rate};

/// The bounds of a case.
pub struct Physics<'a> {
    cluster: &'a Cluster,
    case: &'a Case,
    gpus: f64,
    /// Operations of a step, all ranks together.
    flops: f64,
    peak: f64,
    /// Bytes that one rank streams in a step, with what they are, for each kind of rank.
    streams: Vec<(f64, String)>,
    /// Weights once, and the cache.
    least_bytes: f64,
}

impl<'a> Physics<'a> {
    /// Of a case.
    pub fn of(model: &ModelSpec, cluster: &'a Cluster, formats: Formats, case: &'a Case) -> Physics<'a> {
        let layout = &case.layout;
        let counts = model.counts();
        let params = |wanted: &[PartName]| -> f64 {
            let of = counts.parts.iter().filter(|part| wanted.contains(&part.name));
            of.map(|part| part.params as f64).sum()
        };
        let routed = params(&[PartName::RoutedExperts]) * formats.experts.bytes();
        let embedding = params(&[PartName::Embedding]);
        let others =
            (counts.params_total as f64 - params(&[PartName::RoutedExperts]) - embedding) * formats.dense.bytes();
        let (top_k, experts) = model
            .layers
            .iter()
            .find_map(|ffn| ffn.as_moe())
            .map_or((0.0, 1.0), |moe| (moe.top_k as f64, moe.num_experts as f64));
        let decode = case.phase == Phase::Decode;
        let cached = if decode { case.seqs * case.context } else { 0.0 };
        let kv = cached * counts.kv.values_per_token_layer as f64 * model.layers.len() as f64 * formats.kv.bytes();
        let attention_ranks = (layout.pp * layout.tp * layout.dp) as f64;
        // Each group reads its own copy of what is not an expert.
        let own = kv / attention_ranks + others / (layout.pp * layout.tp) as f64;
        let (meeting, holders) = match layout.experts {
            ExpertLayout::Cut | ExpertLayout::Summed { .. } => (case.tokens() / layout.dp as f64, layout.tp),
            ExpertLayout::Placed { ep } | ExpertLayout::Pool { ep } => (case.tokens(), ep),
        };
        let read = routed * touched(meeting, top_k, experts) / experts / (layout.pp * holders) as f64;
        let gb = |bytes: f64| unit::GB.show(bytes);
        let of_kv = if kv > 0.0 { format!("KV {} + ", gb(kv / attention_ranks)) } else { String::new() };
        let streams = match layout.experts {
            ExpertLayout::Pool { .. } => vec![
                (own, format!("{of_kv}weights {}", gb(own - kv / attention_ranks))),
                (read, format!("experts {}", gb(read))),
            ],
            _ => vec![(own + read, format!("{of_kv}weights {}", gb(own + read - kv / attention_ranks)))],
        };
        let flops = match case.phase {
            Phase::Decode => case.seqs * counts.flops.decode(case.context as usize),
            Phase::Prefill => {
                // Logits of the last token only.
                let head = 2.0 * (model.hidden_size * model.vocab_size) as f64;
                let mean = counts.flops.prefill((case.context / 2.0) as usize) - head;
                case.seqs * (case.context * mean + head)
            }
        };
        let peak = formats.dense.peak(&cluster.gpu).max(formats.experts.peak(&cluster.gpu));
        Physics { cluster, case, gpus: layout.ranks() as f64, flops, peak, streams, least_bytes: routed + others + kv }
    }

    /// Seconds of a step.
    pub fn step(&self) -> Bound {
        let bandwidth = self.cluster.gpu.memory_bandwidth;
        let (bytes, what) = self.streams.iter().max_by(|a, b| a.0.total_cmp(&b.0)).expect("ranks");
        let (streaming, computing) = (bytes / bandwidth, self.flops / (self.gpus * self.peak));
        if streaming >= computing {
            Bound::limit(streaming, format!("({what}) / {}", rate(bandwidth)))
        } else {
            Bound::limit(computing, format!("{} / {}", self.operations(), self.speed()))
        }
    }

    fn operations(&self) -> String {
        operations(self.flops)
    }

    fn speed(&self) -> String {
        format!("({} × {}/s)", plain(self.gpus), operations(self.peak))
    }

    /// Tokens per second, divided by so many.
    pub fn tokens_per_s(&self, by: f64) -> Bound {
        let step = self.step();
        let tokens = self.case.tokens() / by;
        Bound::limit(tokens / step.value, format!("{} tokens / ({})", plain(tokens), step.arithmetic))
    }

    /// Model FLOPs utilization.
    pub fn mfu(&self) -> Bound {
        let step = self.step();
        let most = self.flops / (step.value * self.gpus * self.peak);
        Bound::limit(most, format!("{} / {} / ({})", self.operations(), self.speed(), step.arithmetic))
    }

    /// Joules of a token: operations at the energy that they take at the peak, and boards that idle for as long as a step
    /// takes at least; `None` where nobody says what a board draws.
    pub fn energy(&self) -> Option<Bound> {
        let power = self.cluster.gpu.power?;
        let tokens = self.case.tokens();
        let of_flops = self.flops / tokens * (power.max_w - power.idle_w) / self.peak;
        let idle = power.idle_w * self.gpus * self.step().value / tokens;
        let pue = self.cluster.energy.pue;
        let arithmetic = format!(
            "({} × {} W / {}/s + {} GPUs × {} W idle × {} / {} tokens) × PUE {pue}",
            operations(self.flops / tokens),
            plain(power.max_w - power.idle_w),
            operations(self.peak),
            plain(self.gpus),
            plain(power.idle_w),
            unit::MS.show(self.step().value),
            plain(tokens)
        );
        Some(Bound::limit((of_flops + idle) * pue, arithmetic))
    }

    /// Bytes of the fullest GPU: everything once, evenly.
    pub fn memory(&self) -> Bound {
        let each = self.least_bytes / self.gpus;
        let arithmetic =
            format!("{} of weights and cache / {} GPUs", unit::GB.show(self.least_bytes), plain(self.gpus));
        Bound::limit(each, arithmetic)
    }
}

/// `3.23 GFLOP`.
fn operations(flops: f64) -> String {
    const UNITS: [(f64, &str); 4] = [(1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")];
    let (unit, name) = UNITS.into_iter().find(|(unit, _)| flops >= *unit).unwrap_or((1e6, "M"));
    format!("{} {name}FLOP", number(flops / unit))
}
