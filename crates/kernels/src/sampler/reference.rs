//! Sampling, plainly: sort the whole vocabulary, in F64.

use super::SampleRequest;

/// Logits after bias and penalties.
pub fn penalized(logits: &[f32], request: &SampleRequest<'_>) -> Vec<f64> {
    let SampleRequest { params, prompt, generated } = *request;
    let mut x: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for &(token, bias) in &params.logit_bias {
        x[token as usize] += f64::from(bias);
    }
    for (token, x) in x.iter_mut().enumerate() {
        let count = generated.iter().filter(|&&seen| seen as usize == token).count();
        let penalty = f64::from(params.repetition_penalty);
        if count > 0 || prompt.contains(&(token as u32)) {
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
        *x -= f64::from(params.frequency_penalty) * count as f64;
        if count > 0 {
            *x -= f64::from(params.presence_penalty);
        }
    }
    x
}

/// Softmax.
pub fn probabilities(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    logits.iter().map(|x| (x - max).exp() / sum).collect()
}

/// The distribution that a token is drawn from: tokens with their probabilities, likeliest first.
pub fn distribution(logits: &[f32], request: &SampleRequest<'_>) -> Vec<(u32, f64)> {
    let params = request.params;
    let x = penalized(logits, request);
    let mut order: Vec<u32> = (0..x.len() as u32).collect();
    order.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]).then(a.cmp(&b)));
    if params.is_greedy() {
        return vec![(order[0], 1.0)];
    }
    let p = probabilities(&x.iter().map(|x| x / f64::from(params.temperature)).collect::<Vec<f64>>());
    let mut kept: Vec<(u32, f64)> = order.into_iter().map(|token| (token, p[token as usize])).collect();
    let max = kept[0].1;
    kept.retain(|&(_, p)| p >= f64::from(params.min_p) * max);
    if params.top_k > 0 {
        kept.truncate(params.top_k);
    }
    let total: f64 = kept.iter().map(|&(_, p)| p).sum();
    let mut before = 0.0;
    if params.top_p < 1.0 {
        kept.retain(|&(_, p)| {
            let keep = before < f64::from(params.top_p) * total;
            before += p;
            keep
        });
    }
    let total: f64 = kept.iter().map(|&(_, p)| p).sum();
    kept.iter().map(|&(token, p)| (token, p / total)).collect()
}

/// The token at `u` of the cumulated distribution, in order of id if nothing limits it and otherwise of probability.
pub fn draw(logits: &[f32], request: &SampleRequest<'_>, u: f64) -> u32 {
    let mut kept = distribution(logits, request);
    let params = request.params;
    if (params.top_k == 0 || params.top_k >= logits.len()) && params.top_p >= 1.0 {
        kept.sort_by_key(|&(token, _)| token);
    }
    let mut sum = 0.0;
    for &(token, p) in &kept {
        sum += p;
        if sum > u {
            return token;
        }
    }
    kept[kept.len() - 1].0
}
