//! Activations of MLPs, the same operations in the same order whatever computes them: an exponential made of fused
//! multiply-adds, so that vectors of any width and scalars agree to the bit.

/// `x / (1 + e^-x)`. Within 4 ulp of the exact value for |x| < 80.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, written as `x / (1 + e^-2u)`.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let u = SQRT_2_OVER_PI * (x * x * x).mul_add(0.044_715, x);
    x / (1.0 + exp(-2.0 * u))
}

/// `e^x` for `x` clamped to ±87, where it is finite and normal; within 2 ulp. NaN counts as a bound: callers divide by the
/// result a value that carries it.
///
/// `x = n ln 2 + r` with |r| ≤ ln 2 / 2 (Cody and Waite's two-part subtraction), `e^r` by its Taylor series to the seventh
/// power (relative error below 2⁻²⁸), `2ⁿ` by the exponent bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// Adding it leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0; // 1.5 × 2^23
    const LN2_HIGH: f32 = 0.693_359_4; // 355 / 512: products with |n| < 2^15 are exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > 87.0 { 87.0 } else { x };
    let x = if x > -87.0 { x } else { -87.0 };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p: f32 = 1.0 / 5040.0;
    p = p.mul_add(r, 1.0 / 720.0);
    p = p.mul_add(r, 1.0 / 120.0);
    p = p.mul_add(r, 1.0 / 24.0);
    p = p.mul_add(r, 1.0 / 6.0);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(exponent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in -87_000..=87_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) is off by {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
    }

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
