//! Elementary functions with one definition for every instruction set.

/// Steps of `e^x = 2^n * e^r`: `n` is `x * LOG2_E` rounded to nearest even by adding and taking away `ROUND`, and `r` is
/// what is left after taking away `n * ln 2` in two pieces.
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
pub(crate) const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
pub(crate) const LN2_HIGH: f32 = 0.693_359_4; // nine bits, so that n times it is exact
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;

/// `e^r` on `|r| <= ln 2 / 2`, highest power first. The two last are 1, so `e^0` is exactly 1; the others are a
/// least-maximum fit of the relative error (3e-9 before rounding).
pub(crate) const EXP_POLY: [f32; 7] =
    [0.001_381_453_9, 0.008_368_745, 0.041_668_39, 0.166_665_21, 0.499_999_94, 1.0, 1.0];

/// Below this the result is 0: the next ones would not be normal numbers.
pub(crate) const EXP_MIN: f32 = -87.0;
/// From here on the result is infinite (a little early: `f32::MAX` is `e^88.72`).
pub(crate) const EXP_MAX: f32 = 88.0;

/// `e^x` within 1.5 units in the last place; 0 below -87, infinite from 88 on; NaN stays NaN. The same operations in the
/// same order as `Lanes::exp`, so vector code and scalar code agree bit for bit.
#[inline(always)]
pub fn exp_f32(x: f32) -> f32 {
    if x < EXP_MIN {
        return 0.0;
    }
    if x >= EXP_MAX {
        return f32::INFINITY;
    }
    exp_in_range(x)
}

/// `e^x` for `x` clamped to ±87, without a branch, so that loops over it become vector code. NaN counts as -87.
#[inline(always)]
pub(crate) fn exp_clamped(x: f32) -> f32 {
    let x = if x > -EXP_MIN { -EXP_MIN } else { x };
    exp_in_range(if x > EXP_MIN { x } else { EXP_MIN })
}

#[inline(always)]
fn exp_in_range(x: f32) -> f32 {
    let t = x.mul_add(LOG2_E, ROUND);
    let n = t - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut e = EXP_POLY[0];
    for c in &EXP_POLY[1..] {
        e = e.mul_add(r, *c);
    }
    // The low bits of `t` are n; in the exponent's place, with the bias, they are 2^n.
    e * f32::from_bits((t.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// To BF16 and back, to nearest even.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        let mut worst = 0.0f64;
        for i in 0..200_000 {
            let x = -86.9 + i as f32 * (174.5 / 200_000.0);
            let truth = (x as f64).exp();
            worst = worst.max(((exp_f32(x) as f64 - truth) / truth).abs());
        }
        assert!(worst < 1.5 * f32::EPSILON as f64, "{worst:e}");
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(f32::MIN), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
    }

    #[test]
    fn rounding_to_bf16_is_half_s() {
        for bits in (0..0x7f80_0000u32).step_by(7919) {
            let x = f32::from_bits(bits);
            assert_eq!(round_bf16(x), half::bf16::from_f32(x).to_f32());
            assert_eq!(round_bf16(-x), half::bf16::from_f32(-x).to_f32());
        }
    }
}
