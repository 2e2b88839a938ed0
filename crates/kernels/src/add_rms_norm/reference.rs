//! The pair, plainly.

/// `residual += delta`, and the norm of the sum.
pub fn add_rms_norm(residual: &mut [f32], delta: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    crate::add::reference::add(residual, delta);
    crate::rms_norm::reference::rms_norm(residual, weight, eps)
}
