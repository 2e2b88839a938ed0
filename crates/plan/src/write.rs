//! Plan files as text: every section with a comment that says what it means, and every key that says something.

use std::fmt::Write;

use moesaic_spec::yaml::scalar;

use crate::plan::{ExplicitLayer, InitialPlacement, Interval};
use crate::read::{ALL_REDUCES, OVERLAPS, POOLS, PRECISIONS, ROUTES, name_of};
use crate::{PlanFile, Rank};

impl PlanFile {
    /// The file, with comments. [`PlanFile::from_yaml`] reads it back as this plan.
    pub fn to_yaml(&self) -> String {
        let mut text = String::new();
        // A String takes all that is written to it.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, w: &mut String) -> std::fmt::Result {
        writeln!(
            w,
            "# A plan: how a model is spread over ranks, and what they exchange. docs/plan-file.md explains every key."
        )?;
        writeln!(w, "version: {}", self.version)?;
        writeln!(w, "name: {}", scalar(&self.name))?;
        writeln!(
            w,
            "model: {} # a preset, a folder, or tiny-moe for the model inside the binary",
            scalar(&self.model)
        )?;
        writeln!(w, "cluster: {} # a preset or a file", scalar(&self.cluster))?;
        writeln!(w, "workload: {} # a preset or a file", scalar(&self.workload))?;
        self.write_mesh(w)?;
        self.write_attention(w)?;
        self.write_moe(w)?;
        self.write_step(w)?;
        self.write_watchers(w)?;
        self.write_memory(w)?;
        self.write_prediction(w)
    }

    fn write_mesh(&self, w: &mut String) -> std::fmt::Result {
        let mesh = self.mesh;
        writeln!(w, "\n# World size: pp × tp × dp, and with an expert pool of its own pp × (tp × dp + ep).")?;
        writeln!(w, "ranks: {}", self.ranks)?;
        writeln!(w, "mesh:")?;
        writeln!(
            w,
            "  tp: {} # ranks that share the heads of attention (and, with ep 1, every expert's width)",
            mesh.tp
        )?;
        writeln!(w, "  pp: {} # pipeline stages", mesh.pp)?;
        writeln!(w, "  dp: {} # groups of tp ranks, in each stage, with requests of their own", mesh.dp)?;
        writeln!(w, "  ep: {} # ranks, in each stage, that whole experts are spread over", mesh.ep)?;
        if let Some(layers) = &self.stage_layers {
            writeln!(w, "stage_layers: {layers:?} # decoder layers of each stage")?;
        }
        Ok(())
    }

    fn write_attention(&self, w: &mut String) -> std::fmt::Result {
        let attention = &self.attention;
        if attention.heads.is_none() && attention.replication.is_none() {
            return Ok(());
        }
        writeln!(w, "\n# Everything but routed experts.")?;
        writeln!(w, "attention:")?;
        if let Some(heads) = &attention.heads {
            writeln!(w, "  heads: {heads:?} # query heads of each of the tp ranks")?;
        }
        if let Some(replication) = attention.replication {
            writeln!(
                w,
                "  replication: {replication} # times that attention's weights are held, on neighbouring ranks"
            )?;
        }
        Ok(())
    }

    fn write_moe(&self, w: &mut String) -> std::fmt::Result {
        let moe = &self.moe;
        writeln!(w, "\n# Routed experts.")?;
        writeln!(w, "moe:")?;
        let pool = name_of(moe.pool, &POOLS);
        writeln!(
            w,
            "  pool: {pool} # shared: on the ranks of attention; separate: on ep ranks of their own after those"
        )?;
        if let Some(max) = moe.max_experts_per_rank {
            writeln!(w, "  max_experts_per_rank: {max} # of one layer; 1 when absent")?;
        }
        writeln!(w, "  redundant_experts: {} # replicas of a layer beyond one each", moe.redundant_experts)?;
        match &moe.placement {
            InitialPlacement::Linear => writeln!(w, "  placement: linear # in order"),
            InitialPlacement::Trace(file) => {
                writeln!(w, "  placement:\n    trace: {} # by the loads of this routing trace", scalar(file))
            }
            InitialPlacement::Explicit(layers) if layers.is_empty() => writeln!(w, "  placement: {{explicit: []}}"),
            InitialPlacement::Explicit(layers) => {
                writeln!(
                    w,
                    "  placement:\n    explicit: # by layer, for each expert its ranks; other layers are in order"
                )?;
                layers.iter().try_for_each(|layer| write_layer(w, layer))
            }
        }
    }

    fn write_step(&self, w: &mut String) -> std::fmt::Result {
        writeln!(w, "\n# How a step runs.")?;
        writeln!(w, "micro_batches: {} # parts that a step's requests are split into, 1 to 4", self.micro_batches)?;
        let overlap = name_of(self.overlap, &OVERLAPS);
        writeln!(
            w,
            "overlap: {overlap} # none, micro_batches, or arrivals (experts begin with the tokens of their node)"
        )?;
        if let Some(all_reduce) = self.all_reduce {
            let all_reduce = name_of(all_reduce, &ALL_REDUCES);
            writeln!(w, "all_reduce: {all_reduce} # flat, or hierarchical (inside nodes, between them, inside again)")?;
        }
        writeln!(w, "\n# Tokens to experts and back.")?;
        writeln!(w, "exchange:")?;
        let precision = name_of(self.exchange.precision, &PRECISIONS);
        writeln!(w, "  precision: {precision} # full (exact), int8 or fp8 (a factor for 128 values)")?;
        let route = name_of(self.exchange.route, &ROUTES);
        writeln!(w, "  route: {route} # direct, or two_level (once to each node, and on from there)")
    }

    fn write_watchers(&self, w: &mut String) -> std::fmt::Result {
        if let Some(balance) = &self.balance {
            writeln!(w, "\n# When experts move.")?;
            writeln!(w, "balance:")?;
            writeln!(w, "  interval: {} # steps between looks at the load", balance.interval)?;
            writeln!(w, "  threshold: {:?} # least gain in max/mean load that is worth a move", balance.threshold)?;
            writeln!(
                w,
                "  significance: {:?} # greatest probability of moving because of noise",
                balance.significance
            )?;
            if let Some(bytes) = balance.bytes_per_step {
                writeln!(w, "  bytes_per_step: {bytes} # bytes of weights that a rank sends in one step")?;
            }
        }
        if let Some(synchronize) = &self.synchronize {
            writeln!(w, "\n# When micro-batches are chosen anew, so that the two pools keep step.")?;
            writeln!(w, "synchronize:")?;
            writeln!(w, "  interval: {} # steps between choices", synchronize.interval)?;
            writeln!(
                w,
                "  threshold: {:?} # difference between the pools' times that is left alone",
                synchronize.threshold
            )?;
        }
        Ok(())
    }

    fn write_memory(&self, w: &mut String) -> std::fmt::Result {
        let memory = &self.memory;
        if *memory == Default::default() {
            return Ok(());
        }
        writeln!(w, "\n# Limits of one rank's memory.")?;
        writeln!(w, "memory:")?;
        if let Some(len) = memory.max_model_len {
            writeln!(w, "  max_model_len: {len} # longest sequence, tokens")?;
        }
        if let Some(seqs) = memory.max_num_seqs {
            writeln!(w, "  max_num_seqs: {seqs} # sequences of one group at a time")?;
        }
        if let Some(tokens) = memory.max_num_batched_tokens {
            writeln!(w, "  max_num_batched_tokens: {tokens} # tokens of one group in one step")?;
        }
        if let Some(share) = memory.utilization {
            writeln!(w, "  utilization: {share:?} # share of the GPU's memory that may be used; 0.9 when absent")?;
        }
        Ok(())
    }

    fn write_prediction(&self, w: &mut String) -> std::fmt::Result {
        let Some(prediction) = &self.prediction else { return Ok(()) };
        writeln!(
            w,
            "\n# What was expected when the plan was made; nothing that runs looks at it. 9 in 10 lie from low to high."
        )?;
        writeln!(w, "prediction:")?;
        writeln!(w, "  concurrency: {:?} # requests at a time, over all groups", prediction.concurrency)?;
        let figures = [
            ("ttft_ms", prediction.ttft_ms, "time to first token"),
            ("tpot_ms", prediction.tpot_ms, "time per output token after the first"),
            ("tokens_per_s", prediction.tokens_per_s, "output tokens per second of all users"),
        ];
        for (key, Interval { value, low, high }, meaning) in figures {
            writeln!(w, "  {key}: {{value: {value:?}, low: {low:?}, high: {high:?}}} # {meaning}")?;
        }
        writeln!(w, "  memory_gib: {:?} # of the fullest rank", prediction.memory_gib)?;
        if prediction.assumptions.is_empty() {
            return Ok(());
        }
        writeln!(w, "  assumptions:")?;
        prediction.assumptions.iter().try_for_each(|sentence| writeln!(w, "    - {}", scalar(sentence)))
    }
}

/// One layer of an explicit placement, on one line.
fn write_layer(w: &mut String, layer: &ExplicitLayer) -> std::fmt::Result {
    let ranks_of = |ranks: &Vec<Rank>| {
        let ranks: Vec<String> = ranks.iter().map(Rank::to_string).collect();
        format!("[{}]", ranks.join(", "))
    };
    let experts: Vec<String> = layer.experts.iter().map(ranks_of).collect();
    writeln!(w, "      - {{layer: {}, experts: [{}]}}", layer.layer, experts.join(", "))
}
