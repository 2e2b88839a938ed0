//! FP8 E4M3 (OCP, finite only): one sign, four exponent bits with bias 7, three of mantissa; 0x7f and 0xff are NaN.
//!
//! Every value is exact in BF16. In a tile of 512 bytes, the 16 pairs of `k` of BF16's tile are grouped by two into lines
//! of 64 bytes; a line holds, for each group of four `n`, eight bytes of the first pair and eight of the second. So the
//! byte interleaving instructions of AVX-512 (which work within 128 bits) turn one line into two BF16 lines.

/// Where `n` (`lane`, below 16) and `k` (below 32) are in a tile.
pub(crate) const fn offset_in_tile(lane: usize, k: usize) -> usize {
    let pair = k / 2;
    (pair / 2) * 64 + (lane / 4) * 16 + (pair % 2) * 8 + (lane % 4) * 2 + k % 2
}

/// BF16 bits of the magnitudes 0..=0x7f.
#[cfg(target_arch = "x86_64")]
pub(crate) const MAGNITUDES: [u16; 128] = {
    let mut table = [0u16; 128];
    let mut code = 0;
    while code < 128 {
        table[code] = to_bf16(code as u8);
        code += 1;
    }
    table
};

/// High and low bytes of [`MAGNITUDES`], for byte permutations.
#[cfg(target_arch = "x86_64")]
pub(crate) const MAGNITUDE_BYTES: [[u8; 128]; 2] = {
    let mut bytes = [[0; 128]; 2];
    let mut code = 0;
    while code < 128 {
        bytes[0][code] = (MAGNITUDES[code] >> 8) as u8;
        bytes[1][code] = MAGNITUDES[code] as u8;
        code += 1;
    }
    bytes
};

/// Decodes a tile of 512 codes to one of BF16.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn decode_tile(codes: &[u8], out: &mut [u16]) {
    for (codes, out) in codes.chunks_exact(64).zip(out.chunks_exact_mut(64)) {
        let mut linear = [0u16; 64];
        for (out, &code) in linear.iter_mut().zip(codes) {
            *out = to_bf16(code);
        }
        for group in 0..4 {
            out[group * 8..group * 8 + 8].copy_from_slice(&linear[group * 16..group * 16 + 8]);
            out[32 + group * 8..32 + group * 8 + 8].copy_from_slice(&linear[group * 16 + 8..group * 16 + 16]);
        }
    }
}

/// The BF16 bits of an E4M3 code. Without branches or tables, so that loops over codes become vector instructions.
#[inline(always)]
pub const fn to_bf16(code: u8) -> u16 {
    let magnitude = (code & 0x7f) as i32;
    // 2^(exponent - 7) × 1.mantissa: F32's bias is 127.
    let normal = ((magnitude << 20) + (120 << 23)) as u32;
    let subnormal = (magnitude as f32 * (1.0 / 512.0)).to_bits();
    let bits = if magnitude < 8 { subnormal } else { normal };
    let bits = if magnitude == 0x7f { 0x7fc0_0000 } else { bits };
    (bits >> 16) as u16 | ((code & 0x80) as u16) << 8
}

/// The value of an E4M3 code.
#[inline(always)]
pub const fn to_f32(code: u8) -> f32 {
    f32::from_bits((to_bf16(code) as u32) << 16)
}

/// Greatest finite value.
pub const MAX: f32 = 448.0;

/// The nearest code, ties to the even one; beyond ±448 that of ±448, infinities too; NaN stays NaN. Without branches, so
/// that loops become vector instructions.
#[inline(always)]
pub fn from_f32(value: f32) -> u8 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // Three bits of mantissa stay of 23; the carry of rounding moves on into the exponent.
    let rounded = magnitude.wrapping_add(0x7_ffff + (magnitude >> 20 & 1)) >> 20;
    let normal = rounded.wrapping_sub(120 << 3);
    // Below 2^-6 values are multiples of 2^-9, which is the last place of a sum with 2^14: the addition rounds.
    let shift = (1u32 << 14) as f32;
    let subnormal = (f32::from_bits(magnitude) + shift).to_bits().wrapping_sub(shift.to_bits());
    let code = if magnitude < (121 << 23) { subnormal } else { normal };
    let code = if magnitude >= MAX.to_bits() { 0x7e } else { code };
    let code = if magnitude > 0x7f80_0000 { 0x7f } else { code };
    code as u8 | (bits >> 24) as u8 & 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_value() {
        for code in 0..=255u8 {
            let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
            let (exponent, mantissa) = (i32::from((code >> 3) & 15), f64::from(code & 7));
            let value = match exponent {
                0 => sign * mantissa / 8.0 * 2f64.powi(-6),
                _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
            };
            if code & 0x7f == 0x7f {
                assert!(to_f32(code).is_nan());
            } else {
                assert_eq!(f64::from(to_f32(code)), value, "{code:#x}");
            }
        }
    }

    #[test]
    fn a_tile_has_a_place_for_every_element() {
        let mut seen = [false; 512];
        for lane in 0..16 {
            for k in 0..32 {
                assert!(!std::mem::replace(&mut seen[offset_in_tile(lane, k)], true));
            }
        }
    }

    #[test]
    fn every_code_comes_back_and_every_midpoint_goes_to_the_even_one() {
        for code in 0..=255u8 {
            let back = from_f32(to_f32(code));
            assert_eq!(back, code, "{code:#x}");
        }
        for sign in [1.0, -1.0] {
            let coded = |x: f32| from_f32(sign * x);
            let expected = |code: u8| if sign < 0.0 { code | 0x80 } else { code };
            for low in 0..0x7e {
                // Exact: neighbours differ in the last of four bits.
                let middle = (to_f32(low) + to_f32(low + 1)) / 2.0;
                assert_eq!(coded(middle), expected(low + low % 2), "{middle}");
                assert_eq!(coded(middle.next_up()), expected(low + 1), "above {middle}");
                assert_eq!(coded(middle.next_down()), expected(low), "below {middle}");
            }
            for large in [448.0, 448.0f32.next_up(), 464.0, 480.0, 1e9, f32::MAX, f32::INFINITY] {
                assert_eq!(coded(large), expected(0x7e), "{large}");
            }
            for small in [0.0, f32::from_bits(1), f32::MIN_POSITIVE, 2f32.powi(-10)] {
                assert_eq!(coded(small), expected(0), "{small:e}");
            }
            assert_eq!(coded(f32::NAN) & 0x7f, 0x7f);
        }
    }

    #[test]
    fn any_value_gets_a_nearest_code() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            let got = from_f32(value);
            if value.is_nan() {
                assert_eq!(got & 0x7f, 0x7f);
                continue;
            }
            let clamped = f64::from(value.clamp(-MAX, MAX));
            let distance = |code: u8| (f64::from(to_f32(code)) - clamped).abs();
            let finite = (0..=255u8).filter(|code| code & 0x7f != 0x7f);
            let best = finite.map(distance).fold(f64::INFINITY, f64::min);
            assert_eq!(distance(got), best, "{value:e}: {got:#x}");
        }
    }
}
