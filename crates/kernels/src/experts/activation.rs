//! Activations of MLPs, the same operations in the same order whatever computes them, so that vectors of any width and
//! scalars agree to the bit. NaN stays NaN: it is divided by whatever its exponential is.

use crate::math::exp_clamped;

/// `x / (1 + e^-x)`. Within 4 ulp of the exact value for |x| < 80.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp_clamped(-x))
}

/// `x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, written as `x / (1 + e^-2u)`.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let u = SQRT_2_OVER_PI * (x * x * x).mul_add(0.044_715, x);
    x / (1.0 + exp_clamped(-2.0 * u))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_match_their_formulas_in_f64() {
        for i in -20_000..=20_000 {
            let x = i as f32 / 1000.0;
            let wide = f64::from(x);
            let exact = wide / (1.0 + (-wide).exp());
            assert!((f64::from(silu(x)) - exact).abs() <= 1e-6 * exact.abs(), "silu({x})");
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            let exact = 0.5 * wide * (1.0 + inner.tanh());
            // Where 1 + tanh cancels, the formula that is compared with is itself inexact.
            assert!((f64::from(gelu_tanh(x)) - exact).abs() <= 1e-5 * exact.abs() + 1e-14, "gelu({x})");
        }
        assert!(silu(f32::NAN).is_nan() && gelu_tanh(f32::NAN).is_nan());
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
    }
}
