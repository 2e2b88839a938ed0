//! What routers chose, counted as the leader wants it.

use moesaic_model::Choices;
use moesaic_plan::ExpertId;
use moesaic_plan::eplb::RoutingTrace;
use moesaic_spec::{Ffn, ModelSpec};

use crate::wire::{MicroBatchCommand, StepReply};

/// Experts of a layer at most.
pub(crate) fn num_experts(spec: &ModelSpec) -> usize {
    spec.layers.iter().filter_map(Ffn::as_moe).map(|moe| moe.num_experts).max().unwrap_or(0)
}

/// Nothing recorded yet.
pub(crate) fn empty_trace(model: &str, spec: &ModelSpec) -> Option<RoutingTrace> {
    let moe = spec.layers.iter().find_map(Ffn::as_moe)?;
    let routed: Vec<bool> = spec.layers.iter().map(|ffn| ffn.as_moe().is_some()).collect();
    Some(RoutingTrace::new(model, moe.num_experts, moe.top_k, &routed))
}

/// Adds a step's choices to its reply: by layer and expert, and where `loads` and `trace` are there, to these.
pub(crate) fn count(choices: &[Choices], commands: &[MicroBatchCommand], spec: &ModelSpec, reply: &mut StepReply) {
    for Choices { layer, micro_batch, first_row, expert_of } in choices {
        let moe = spec.layers[*layer as usize].as_moe().expect("a layer with a router");
        let counts = reply.expert_counts.entry(*layer).or_insert_with(|| vec![0; moe.num_experts]);
        let mut sequence_of = commands[*micro_batch as usize]
            .seqs
            .iter()
            .flat_map(|seq| seq.token_ids.iter().map(|_| seq.id))
            .skip(*first_row);
        for chosen in expert_of.chunks(moe.top_k) {
            let sequence = sequence_of.next().expect("a sequence for every row");
            let kept = chosen.iter().filter(|&&expert| expert >= 0).map(|&expert| ExpertId(expert as u32));
            let mut num_kept = 0;
            for expert in kept.clone() {
                counts[expert.idx()] += 1;
                num_kept += 1;
                if let Some(loads) = &mut reply.loads {
                    loads.count(*layer as usize, sequence, expert);
                }
            }
            reply.dropped += (chosen.len() - num_kept) as u64;
            if let Some(trace) = reply.trace.as_mut().filter(|_| num_kept == chosen.len()) {
                trace.record(*layer as usize, &kept.collect::<Vec<_>>());
            }
        }
    }
}
