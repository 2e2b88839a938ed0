//! From popularity to probabilities.

use super::LoadModel;

/// Popularity of each expert, in any unit. `[E]`
pub(super) fn popularity(model: LoadModel, experts: usize) -> Vec<f64> {
    let most = experts as f64;
    let of = |idx: usize| match model {
        LoadModel::Uniform => 1.0,
        LoadModel::Zipf(s) => (idx as f64 + 1.0).powf(-s),
        LoadModel::PowerLaw(alpha) => {
            // The quantile in the middle of the idx-th part of the distribution.
            let from_top = (idx as f64 + 0.5) / most;
            let power = 1.0 - alpha;
            if power.abs() < 1e-9 {
                most.powf(1.0 - from_top)
            } else {
                (1.0 + (1.0 - from_top) * (most.powf(power) - 1.0)).powf(1.0 / power)
            }
        }
    };
    (0..experts).map(of).collect()
}

/// Probability that a token's `top_k` different experts contain each one: in proportion to popularity, except that none is
/// above 1. `[E]`
pub(super) fn chosen(popularity: &[f64], top_k: usize) -> Vec<f64> {
    let mut order: Vec<usize> = (0..popularity.len()).collect();
    order.sort_by(|&a, &b| popularity[b].total_cmp(&popularity[a]));
    let mut chosen = vec![0.0; popularity.len()];
    let (mut rest, mut left) = (popularity.iter().sum::<f64>(), top_k as f64);
    for (place, &expert) in order.iter().enumerate() {
        // Where nothing is popular, the others share alike.
        let among = (popularity.len() - place) as f64;
        let share = if rest > 0.0 { left * popularity[expert] / rest } else { left / among };
        chosen[expert] = share.clamp(0.0, 1.0);
        // Only who takes all changes what the others get; the rest are in proportion as they stand.
        if share > 1.0 || rest <= 0.0 {
            rest -= popularity[expert];
            left -= chosen[expert];
        }
    }
    chosen
}
