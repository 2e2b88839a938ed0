//! The sum, plainly.

/// `residual += delta`.
pub fn add(residual: &mut [f32], delta: &[f32]) {
    for i in 0..residual.len() {
        residual[i] += delta[i];
    }
}
