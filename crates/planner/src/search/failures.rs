//! A plan that has lost GPUs and goes on.

use moesaic_plan::uneven_heads;
use moesaic_spec::ModelSpec;

use crate::iteration::{ExpertLayout, Layout};

/// What is left of a layout when so many GPUs fail at the worst places: all of one stage and one group, or all of one pool.
/// Where there are several stages, each is taken to have lost as many, which is more than can happen.
///
/// The layout must have been made to tolerate as many ([`Space`](super::Space)).
pub(super) fn after(model: &ModelSpec, layout: &Layout, failures: usize) -> Vec<Layout> {
    let heads = model.attention.num_heads();
    let experts = model.layers.iter().find_map(|ffn| ffn.as_moe()).map_or(0, |moe| moe.num_experts);
    // With heads split, the rest of the group has those of the lost ranks, too; otherwise their requests go to other groups.
    let attention = |layout: &Layout| match layout.tp {
        1 => Layout { dp: layout.dp - failures, ..layout.clone() },
        tp => Layout { tp: tp - failures, heads: Some(uneven_heads(heads, tp - failures)), ..layout.clone() },
    };
    // Every rank holds as many experts as before; those of the lost ranks are gone.
    let left = |ep: usize| {
        let physical = experts + layout.redundant_experts;
        let lost = failures * physical.div_ceil(ep);
        (ep - failures, physical.saturating_sub(lost).saturating_sub(experts))
    };
    match layout.experts {
        // A group whose experts are cut cannot go on without a rank.
        ExpertLayout::Cut | ExpertLayout::Summed { .. } => vec![Layout { dp: layout.dp - failures, ..layout.clone() }],
        ExpertLayout::Placed { ep } => {
            let (ep, redundant_experts) = left(ep);
            vec![Layout { experts: ExpertLayout::Placed { ep }, redundant_experts, ..attention(layout) }]
        }
        ExpertLayout::Pool { ep } => {
            let (ep, redundant_experts) = left(ep);
            let pool = Layout { experts: ExpertLayout::Pool { ep }, redundant_experts, ..layout.clone() };
            vec![attention(layout), pool]
        }
    }
}
