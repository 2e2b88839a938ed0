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
}
