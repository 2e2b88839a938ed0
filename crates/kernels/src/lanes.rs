//! Sixteen F32 lanes, the same on every instruction set.
//!
//! A kernel that is written over [`Lanes`] fixes the order of its sums in units of sixteen, so plain Rust, AVX2 and
//! AVX-512 give the same bits. Kernels are `#[inline(always)]` and generic; a wrapper with `#[target_feature]` makes the
//! instance for one instruction set (see [`dispatch`]).

use crate::math::{self, EXP_MAX, EXP_MIN, EXP_POLY, LN2_HIGH, LN2_LOW, LOG2_E, ROUND};

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// Sixteen F32 values.
///
/// # Safety
/// Of every method: the CPU has the instruction set of the implementation, and pointers are valid for the lanes that the
/// method names (no alignment is asked for).
pub(crate) trait Lanes: Copy {
    unsafe fn splat(x: f32) -> Self;
    /// 16 values.
    unsafe fn load(from: *const f32) -> Self;
    /// The first `n <= 16` values, then zeros.
    unsafe fn load_part(from: *const f32, n: usize) -> Self;
    /// Eight values from each.
    unsafe fn load_halves(low: *const f32, high: *const f32) -> Self;
    /// 16 pairs of BF16: the first of each pair, the second of each pair.
    unsafe fn load_pairs(from: *const u32) -> (Self, Self);
    /// The first `n <= 16` pairs, then zeros.
    unsafe fn load_pairs_part(from: *const u32, n: usize) -> (Self, Self);
    /// Eight pairs of BF16 from each pointer.
    unsafe fn load_pairs_halves(low: *const u32, high: *const u32) -> (Self, Self);
    /// 16 values.
    unsafe fn store(self, to: *mut f32);
    /// The upper 16 bits of the first `n <= 16` values: BF16, where they are rounded already.
    unsafe fn store_upper_part(self, to: *mut u16, n: usize);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self * a + b`, rounded once.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// The greater one; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// Lanes `from .. to` as they are, minus infinity elsewhere.
    unsafe fn keep(self, from: usize, to: usize) -> Self;
    /// Lanes of `self` where `x >= limit` or `x` is NaN, zeros elsewhere.
    unsafe fn zero_below(self, x: Self, limit: f32) -> Self;
    /// `2^n` where `self` is `n + ROUND`.
    unsafe fn exp2_of_rounded(self) -> Self;
    /// To BF16 and back, to nearest even.
    unsafe fn round_bf16(self) -> Self;

    /// `e^x` for `x < 88`; see [`math::exp_f32`].
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the caller's promise (trait).
        unsafe {
            let t = self.fma(Self::splat(LOG2_E), Self::splat(ROUND));
            let n = t.sub(Self::splat(ROUND));
            let r = n.fma(Self::splat(-LN2_LOW), n.fma(Self::splat(-LN2_HIGH), self));
            let mut e = Self::splat(EXP_POLY[0]);
            for c in &EXP_POLY[1..] {
                e = e.fma(r, Self::splat(*c));
            }
            e.mul(t.exp2_of_rounded()).zero_below(self, EXP_MIN)
        }
    }

    /// The lanes as an array.
    #[inline(always)]
    unsafe fn to_array(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has 16 elements.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes
    }

    /// The greatest lane (none may be NaN for the result to mean anything).
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        // SAFETY: the caller's promise (trait).
        tree(unsafe { self.to_array() }, |a, b| if a > b { a } else { b })
    }
}

const _: () = assert!(EXP_MAX <= 88.0 && EXP_MIN >= -87.0);

/// Folds lanes in one fixed order: halves, quarters, …
#[inline(always)]
pub(crate) fn tree(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
    }
    lanes[0]
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Plain([f32; LANES]);

impl Plain {
    #[inline(always)]
    fn zip(self, other: Plain, f: impl Fn(f32, f32) -> f32) -> Plain {
        Plain(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }

    #[inline(always)]
    fn pairs(pairs: [u32; LANES]) -> (Plain, Plain) {
        (Plain(pairs.map(|p| f32::from_bits(p << 16))), Plain(pairs.map(|p| f32::from_bits(p & 0xffff_0000))))
    }
}

impl Lanes for Plain {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Plain {
        Plain([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Plain {
        // SAFETY: 16 values are readable (trait).
        Plain(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, n: usize) -> Plain {
        // SAFETY: `n` values are readable (trait).
        Plain(std::array::from_fn(|i| if i < n { unsafe { from.add(i).read_unaligned() } } else { 0.0 }))
    }
    #[inline(always)]
    unsafe fn load_halves(low: *const f32, high: *const f32) -> Plain {
        // SAFETY: eight values are readable from each (trait).
        Plain(std::array::from_fn(|i| unsafe {
            if i < 8 { low.add(i).read_unaligned() } else { high.add(i - 8).read_unaligned() }
        }))
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u32) -> (Plain, Plain) {
        // SAFETY: 16 pairs are readable (trait).
        Plain::pairs(unsafe { from.cast::<[u32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_pairs_part(from: *const u32, n: usize) -> (Plain, Plain) {
        // SAFETY: `n` pairs are readable (trait).
        Plain::pairs(std::array::from_fn(|i| if i < n { unsafe { from.add(i).read_unaligned() } } else { 0 }))
    }
    #[inline(always)]
    unsafe fn load_pairs_halves(low: *const u32, high: *const u32) -> (Plain, Plain) {
        // SAFETY: eight pairs are readable from each (trait).
        Plain::pairs(std::array::from_fn(|i| unsafe {
            if i < 8 { low.add(i).read_unaligned() } else { high.add(i - 8).read_unaligned() }
        }))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 values are writable (trait).
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_upper_part(self, to: *mut u16, n: usize) {
        for (i, x) in self.0.iter().enumerate().take(n) {
            // SAFETY: `n` values are writable (trait).
            unsafe { to.add(i).write_unaligned((x.to_bits() >> 16) as u16) }
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Plain) -> Plain {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Plain) -> Plain {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Plain) -> Plain {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, other: Plain) -> Plain {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(self, a: Plain, b: Plain) -> Plain {
        Plain(std::array::from_fn(|i| self.0[i].mul_add(a.0[i], b.0[i])))
    }
    #[inline(always)]
    unsafe fn max(self, other: Plain) -> Plain {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn keep(self, from: usize, to: usize) -> Plain {
        Plain(std::array::from_fn(|i| if (from..to).contains(&i) { self.0[i] } else { f32::NEG_INFINITY }))
    }
    #[inline(always)]
    unsafe fn zero_below(self, x: Plain, limit: f32) -> Plain {
        self.zip(x, |e, x| if x < limit { 0.0 } else { e })
    }
    #[inline(always)]
    unsafe fn exp2_of_rounded(self) -> Plain {
        Plain(self.0.map(|t| f32::from_bits((t.to_bits() << 23).wrapping_add(0x3f80_0000))))
    }
    #[inline(always)]
    unsafe fn round_bf16(self) -> Plain {
        Plain(self.0.map(math::round_bf16))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes};

    /// Two AVX2 registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    /// One AVX-512 register.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    /// 0 … 15, to make masks from.
    static INDEX: [i32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

    /// Every use below sits in a method of [`Lanes`], whose caller promises the instruction set and the pointers.
    macro_rules! promised {
        ($($body:tt)*) => {
            // SAFETY: the CPU has the instructions and the pointers are valid (trait `Lanes`).
            unsafe { $($body)* }
        };
    }

    impl Avx2 {
        #[inline(always)]
        unsafe fn pairs(low: __m256i, high: __m256i) -> (Avx2, Avx2) {
            promised! {
                let upper = _mm256_set1_epi32(0xffff_0000u32 as i32);
                (
                    Avx2(
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
                    ),
                    Avx2(
                        _mm256_castsi256_ps(_mm256_and_si256(low, upper)),
                        _mm256_castsi256_ps(_mm256_and_si256(high, upper)),
                    ),
                )
            }
        }

        /// All ones in lanes `i < n` of the eight that start at `first`.
        #[inline(always)]
        unsafe fn below(first: usize, n: usize) -> __m256i {
            promised! {
                let index = _mm256_loadu_si256(INDEX.as_ptr().add(first).cast());
                _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), index)
            }
        }
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Avx2 {
            promised! { Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Avx2 {
            promised! { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_part(from: *const f32, n: usize) -> Avx2 {
            promised! {
                Avx2(
                    _mm256_maskload_ps(from, Avx2::below(0, n)),
                    _mm256_maskload_ps(from.wrapping_add(8), Avx2::below(8, n)),
                )
            }
        }
        #[inline(always)]
        unsafe fn load_halves(low: *const f32, high: *const f32) -> Avx2 {
            promised! { Avx2(_mm256_loadu_ps(low), _mm256_loadu_ps(high)) }
        }
        #[inline(always)]
        unsafe fn load_pairs(from: *const u32) -> (Avx2, Avx2) {
            promised! { Avx2::pairs(_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())) }
        }
        #[inline(always)]
        unsafe fn load_pairs_part(from: *const u32, n: usize) -> (Avx2, Avx2) {
            promised! {
                Avx2::pairs(
                    _mm256_maskload_epi32(from.cast(), Avx2::below(0, n)),
                    _mm256_maskload_epi32(from.wrapping_add(8).cast(), Avx2::below(8, n)),
                )
            }
        }
        #[inline(always)]
        unsafe fn load_pairs_halves(low: *const u32, high: *const u32) -> (Avx2, Avx2) {
            promised! { Avx2::pairs(_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(high.cast())) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            promised! {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn store_upper_part(self, to: *mut u16, n: usize) {
            promised! {
                let low = _mm256_srli_epi32::<16>(_mm256_castps_si256(self.0));
                let high = _mm256_srli_epi32::<16>(_mm256_castps_si256(self.1));
                // Packing works within 128-bit halves; the permutation puts the quarters in order.
                let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
                if n == LANES {
                    _mm256_storeu_si256(to.cast(), packed);
                } else {
                    let mut values = [0u16; LANES];
                    _mm256_storeu_si256(values.as_mut_ptr().cast(), packed);
                    std::ptr::copy_nonoverlapping(values.as_ptr(), to, n);
                }
            }
        }
        #[inline(always)]
        unsafe fn add(self, other: Avx2) -> Avx2 {
            promised! { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Avx2) -> Avx2 {
            promised! { Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Avx2) -> Avx2 {
            promised! { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn div(self, other: Avx2) -> Avx2 {
            promised! { Avx2(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn fma(self, a: Avx2, b: Avx2) -> Avx2 {
            promised! { Avx2(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Avx2) -> Avx2 {
            promised! { Avx2(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }
        #[inline(always)]
        unsafe fn keep(self, from: usize, to: usize) -> Avx2 {
            promised! {
                let none = _mm256_set1_ps(f32::NEG_INFINITY);
                let low = _mm256_andnot_si256(Avx2::below(0, from), Avx2::below(0, to));
                let high = _mm256_andnot_si256(Avx2::below(8, from), Avx2::below(8, to));
                Avx2(
                    _mm256_blendv_ps(none, self.0, _mm256_castsi256_ps(low)),
                    _mm256_blendv_ps(none, self.1, _mm256_castsi256_ps(high)),
                )
            }
        }
        #[inline(always)]
        unsafe fn zero_below(self, x: Avx2, limit: f32) -> Avx2 {
            promised! {
                let limit = _mm256_set1_ps(limit);
                Avx2(
                    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, limit), self.0),
                    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.1, limit), self.1),
                )
            }
        }
        #[inline(always)]
        unsafe fn exp2_of_rounded(self) -> Avx2 {
            promised! {
                let one = _mm256_set1_epi32(0x3f80_0000);
                let shift = |t| _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
                Avx2(
                    _mm256_castsi256_ps(_mm256_add_epi32(shift(self.0), one)),
                    _mm256_castsi256_ps(_mm256_add_epi32(shift(self.1), one)),
                )
            }
        }
        #[inline(always)]
        unsafe fn round_bf16(self) -> Avx2 {
            promised! {
                let round = |x| {
                    let bits = _mm256_castps_si256(x);
                    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                    let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                    _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(0xffff_0000u32 as i32)))
                };
                Avx2(round(self.0), round(self.1))
            }
        }
    }

    impl Avx512 {
        #[inline(always)]
        unsafe fn pairs(pairs: __m512i) -> (Avx512, Avx512) {
            promised! {
                let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
                (
                    Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))),
                    Avx512(_mm512_castsi512_ps(_mm512_and_si512(pairs, upper))),
                )
            }
        }

        /// Ones in lanes `i < n`.
        #[inline(always)]
        fn below(n: usize) -> __mmask16 {
            ((1u32 << n) - 1) as __mmask16
        }
    }

    impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Avx512 {
            promised! { Avx512(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Avx512 {
            promised! { Avx512(_mm512_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn load_part(from: *const f32, n: usize) -> Avx512 {
            promised! { Avx512(_mm512_maskz_loadu_ps(Avx512::below(n), from)) }
        }
        #[inline(always)]
        unsafe fn load_halves(low: *const f32, high: *const f32) -> Avx512 {
            promised! {
                let low = _mm512_castps256_ps512(_mm256_loadu_ps(low));
                Avx512(_mm512_insertf32x8::<1>(low, _mm256_loadu_ps(high)))
            }
        }
        #[inline(always)]
        unsafe fn load_pairs(from: *const u32) -> (Avx512, Avx512) {
            promised! { Avx512::pairs(_mm512_loadu_si512(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_pairs_part(from: *const u32, n: usize) -> (Avx512, Avx512) {
            promised! { Avx512::pairs(_mm512_maskz_loadu_epi32(Avx512::below(n), from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_pairs_halves(low: *const u32, high: *const u32) -> (Avx512, Avx512) {
            promised! {
                let low = _mm512_castsi256_si512(_mm256_loadu_si256(low.cast()));
                Avx512::pairs(_mm512_inserti64x4::<1>(low, _mm256_loadu_si256(high.cast())))
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            promised! { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn store_upper_part(self, to: *mut u16, n: usize) {
            promised! {
                let upper = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.0));
                _mm512_mask_cvtepi32_storeu_epi16(to.cast(), Avx512::below(n), upper)
            }
        }
        #[inline(always)]
        unsafe fn add(self, other: Avx512) -> Avx512 {
            promised! { Avx512(_mm512_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Avx512) -> Avx512 {
            promised! { Avx512(_mm512_sub_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Avx512) -> Avx512 {
            promised! { Avx512(_mm512_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn div(self, other: Avx512) -> Avx512 {
            promised! { Avx512(_mm512_div_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn fma(self, a: Avx512, b: Avx512) -> Avx512 {
            promised! { Avx512(_mm512_fmadd_ps(self.0, a.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Avx512) -> Avx512 {
            promised! { Avx512(_mm512_max_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn keep(self, from: usize, to: usize) -> Avx512 {
            promised! {
                let lanes = Avx512::below(to) & !Avx512::below(from);
                Avx512(_mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), lanes, self.0))
            }
        }
        #[inline(always)]
        unsafe fn zero_below(self, x: Avx512, limit: f32) -> Avx512 {
            promised! {
                let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, _mm512_set1_ps(limit));
                Avx512(_mm512_maskz_mov_ps(kept, self.0))
            }
        }
        #[inline(always)]
        unsafe fn exp2_of_rounded(self) -> Avx512 {
            promised! {
                let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
                Avx512(_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f80_0000))))
            }
        }
        #[inline(always)]
        unsafe fn round_bf16(self) -> Avx512 {
            promised! {
                let bits = _mm512_castps_si512(self.0);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                Avx512(_mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(0xffff_0000u32 as i32))))
            }
        }
        #[inline(always)]
        unsafe fn reduce_max(self) -> f32 {
            promised! { _mm512_reduce_max_ps(self.0) }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use moesaic_device::Isa;

    use super::*;

    /// Everything that a vector can do, over awkward values, as bits.
    #[inline(always)]
    unsafe fn probe<L: Lanes>(a: &[f32; 16], b: &[f32; 16]) -> Vec<u32> {
        // SAFETY: the caller has the instruction set; every pointer is to 16 elements.
        unsafe {
            let (x, y) = (L::load(a.as_ptr()), L::load(b.as_ptr()));
            let pairs = a.as_ptr().cast::<u32>();
            let mut out = vec![];
            let mut see = |v: L| out.extend(v.to_array().map(f32::to_bits));
            for n in [0, 1, 7, 8, 11, 16] {
                see(L::load_part(a.as_ptr(), n));
                see(L::load_pairs_part(pairs, n).0);
                see(L::load_pairs_part(pairs, n).1);
                see(x.keep(n / 2, n));
                let mut upper = [0u16; 16];
                x.store_upper_part(upper.as_mut_ptr(), n);
                see(L::load(upper.map(f32::from).as_ptr()));
            }
            let halves = L::load_halves(b.as_ptr().add(8), a.as_ptr());
            for v in [halves, x.add(y), x.sub(y), x.mul(y), x.div(y), x.fma(y, halves), x.max(y), x.round_bf16()] {
                see(v);
            }
            see(x.keep(0, 16).exp());
            see(L::load_pairs_halves(pairs.add(8), pairs).1);
            see(L::load_pairs(pairs).0);
            see(L::splat(x.reduce_max()));
            out
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn probe_avx2(a: &[f32; 16], b: &[f32; 16]) -> Vec<u32> {
        // SAFETY: this function's features.
        unsafe { probe::<Avx2>(a, b) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn probe_avx512(a: &[f32; 16], b: &[f32; 16]) -> Vec<u32> {
        // SAFETY: this function's features.
        unsafe { probe::<Avx512>(a, b) }
    }

    #[test]
    fn all_instruction_sets_agree_bit_for_bit() {
        for seed in 0..200u32 {
            let value = |i: u32| ((seed * 31 + i).wrapping_mul(2_654_435_761) % 2001) as f32 / 11.0 - 100.0;
            let a: [f32; 16] = std::array::from_fn(|i| value(i as u32).min(87.5));
            let b: [f32; 16] = std::array::from_fn(|i| value(i as u32 + 77));
            // SAFETY: plain Rust runs anywhere; the others are asked for first.
            unsafe {
                let plain = probe::<Plain>(&a, &b);
                if Isa::detect() >= Isa::Avx2 {
                    assert_eq!(plain, probe_avx2(&a, &b));
                }
                if Isa::detect() >= Isa::Avx512 {
                    assert_eq!(plain, probe_avx512(&a, &b));
                }
                let exp = Plain(a).exp().to_array();
                assert!((0..16).all(|i| exp[i] == crate::math::exp_f32(a[i])));
            }
        }
    }
}
