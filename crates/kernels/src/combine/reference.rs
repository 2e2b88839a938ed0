//! The weighted sum, plainly. The order of the additions is part of the contract, so this one is in F32 too.

/// `base + Σ weight * answer`, slot by slot, before the rounding to the output's type.
pub fn combine(y: &[f32], d: usize, row_of: &[i32], weights: &[f32], a: usize, base: Option<&[f32]>) -> Vec<f32> {
    let mut out = Vec::new();
    for t in 0..row_of.len() / a {
        for i in 0..d {
            let mut sum = base.map_or(0.0, |base| base[t * d + i]);
            for pair in t * a..(t + 1) * a {
                if row_of[pair] >= 0 {
                    sum += weights[pair] * y[row_of[pair] as usize * d + i];
                }
            }
            out.push(sum);
        }
    }
    out
}
