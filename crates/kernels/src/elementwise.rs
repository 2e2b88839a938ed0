//! Arithmetic that is the same on every path.
//!
//! The functions here are plain Rust. [`multi_isa!`] compiles a loop over them once for each instruction set; none uses a
//! fused multiply-add (which the portable path lacks) and every sum runs in [`LANES`] partial sums that one fixed tree
//! joins, so the compiler may use vectors of any width and the bits stay the same.

use half::bf16;
use moesaic_device::Tensor;
use moesaic_spec::DType;

use crate::KernelError;

/// Partial sums of every reduction: one vector of 512 bits, two of 256, four of 128.
pub(crate) const LANES: usize = 16;

/// An element type of activations.
pub(crate) trait Element: Copy + Send + Sync {
    /// Widens; exact.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
    /// A tensor's elements.
    fn of(tensor: &Tensor) -> &[Self];
    /// A tensor's elements, to write.
    fn of_mut(tensor: &mut Tensor) -> &mut [Self];
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
    fn of(tensor: &Tensor) -> &[f32] {
        tensor.f32()
    }
    fn of_mut(tensor: &mut Tensor) -> &mut [f32] {
        tensor.f32_mut()
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// Written without a branch, so that it vectorises; NaN stays NaN.
    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let quiet = bits >> 16 | 0x40;
        bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
    }
    fn of(tensor: &Tensor) -> &[bf16] {
        tensor.bf16()
    }
    fn of_mut(tensor: &mut Tensor) -> &mut [bf16] {
        tensor.bf16_mut()
    }
}

/// Checks that a tensor's type is one that activations have.
pub(crate) fn check_activation(op: &'static str, what: &'static str, dtype: DType) -> Result<(), KernelError> {
    let ok = matches!(dtype, DType::F32 | DType::BF16);
    crate::contract::require(ok, op, what, || "F32 or BF16".into(), || dtype.to_string())
}

/// Joins the partial sums: 16 → 8 → 4 → 2 → 1.
#[inline(always)]
pub(crate) fn join(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
        n /= 2;
    }
    lanes[0]
}

/// `Σ map(x)` in the fixed order.
#[inline(always)]
pub(crate) fn sum_by<X: Element>(x: &[X], map: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += map(chunk[i].to_f32());
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += map(x.to_f32());
    }
    join(lanes)
}

/// The largest; NaN is passed over, and nothing gives minus infinity.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = if x > *lane { x } else { *lane };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// `e^x` within two units in the last place; 0 below -87.3 (where results would be subnormal), infinity above 88.7.
///
/// Range reduction and polynomial are those of Cephes `expf` (S. Moshier), rounding to the nearest integer is by adding and
/// subtracting 1.5 * 2^23.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.722_83;
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has so few bits that its product with any exponent is exact.
    const LN2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
    let clamped = if x > HIGH { HIGH } else { x };
    let clamped = if clamped < LOW { LOW } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2[0] - n * LN2[1];
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // 2^n in two factors, since 2^128 is no float.
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = exponent >> 1;
    let scale = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    let result = p * scale(half) * scale(exponent.wrapping_sub(half));
    let result = if x < LOW { 0.0 } else { result };
    let result = if x > HIGH { f32::INFINITY } else { result };
    if x.is_nan() { x } else { result }
}

/// Declares `fn name(isa, …)` that runs `inner(…)` as compiled for that instruction set. `inner` must be
/// `#[inline(always)]`.
macro_rules! multi_isa {
    ($(#[$doc:meta])* fn $name:ident $(<$($g:ident: $bound:path),+>)? ($($arg:ident: $ty:ty),+ $(,)?) $(-> $ret:ty)? = $inner:ident) => {
        $(#[$doc])*
        fn $name $(<$($g: $bound),+>)? (isa: moesaic_device::Isa, $($arg: $ty),+) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),+) $(-> $ret)? {
                    $inner($($arg),+)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<$($g: $bound),+>)? ($($arg: $ty),+) $(-> $ret)? {
                    $inner($($arg),+)
                }
                if isa >= moesaic_device::Isa::Avx512 {
                    // SAFETY: a context has no instruction set that its machine lacks, and this one includes AVX-512.
                    return unsafe { avx512($($arg),+) };
                }
                if isa >= moesaic_device::Isa::Avx2 {
                    // SAFETY: as above, with AVX2.
                    return unsafe { avx2($($arg),+) };
                }
            }
            let _ = isa;
            $inner($($arg),+)
        }
    };
}
pub(crate) use multi_isa;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_of_the_last_place() {
        let mut worst = 0f64;
        for i in -87_300..88_700 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(88.72).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounds_as_half_does() {
        let mut bits = 1u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            let x = f32::from_bits(bits);
            let (ours, theirs) = (<bf16 as Element>::from_f32(x), bf16::from_f32(x));
            assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{x:e}: {ours} {theirs}");
        }
        for x in [f32::MAX, f32::MIN, f32::INFINITY, 1.003_906_2, 1.011_718_8, f32::from_bits(0x7f80_0001)] {
            let (ours, theirs) = (<bf16 as Element>::from_f32(x), bf16::from_f32(x));
            assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{x:e}");
        }
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for len in 0..70 {
            let x: Vec<f32> = (0..len).map(|i| (i * 7 % 31) as f32 - 9.0).collect();
            assert_eq!(sum_by(&x, |x| x), x.iter().sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
