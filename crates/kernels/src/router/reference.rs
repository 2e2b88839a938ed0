//! Routing, plainly: sort everything, in F64.

use moesaic_spec::{Router, Scoring};

/// The chosen experts of one row of logits and their weights, best first.
pub fn route(logits: &[f32], router: &Router, top_k: usize, bias: Option<&[f32]>) -> Vec<(usize, f64)> {
    let e = logits.len();
    let logits: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    let scores: Vec<f64> = match router.scoring {
        Scoring::Softmax => {
            let max = logits.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
            logits.iter().map(|x| (x - max).exp() / sum).collect()
        }
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
    };
    let biased: Vec<f64> = (0..e).map(|i| scores[i] + bias.map_or(0.0, |bias| f64::from(bias[i]))).collect();
    let descending =
        |order: &mut Vec<usize>, by: &[f64]| order.sort_by(|&a, &b| by[b].total_cmp(&by[a]).then(a.cmp(&b)));

    let size = e / router.n_group;
    let worth: Vec<f64> = biased
        .chunks(size)
        .map(|group| {
            let mut group = group.to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            group.iter().take(2).sum()
        })
        .collect();
    let mut groups: Vec<usize> = (0..router.n_group).collect();
    descending(&mut groups, &worth);
    groups.truncate(router.topk_group);

    let mut experts: Vec<usize> = (0..e).filter(|i| groups.contains(&(i / size))).collect();
    descending(&mut experts, &biased);
    experts.truncate(top_k);
    let sum: f64 = if router.norm_topk_prob { experts.iter().map(|&i| scores[i]).sum::<f64>() + 1e-20 } else { 1.0 };
    experts.iter().map(|&i| (i, scores[i] / sum * f64::from(router.routed_scaling_factor))).collect()
}
