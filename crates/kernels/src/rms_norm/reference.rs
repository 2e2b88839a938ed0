//! The norm, plainly, with sums in F64.

/// Normalises the rows of `x`, whose width is the weight's.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let d = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks(d) {
        let mean = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / d as f64;
        let root = (mean + f64::from(eps)).sqrt();
        out.extend(row.iter().zip(weight).map(|(&x, &w)| (f64::from(x) / root * f64::from(w)) as f32));
    }
    out
}
