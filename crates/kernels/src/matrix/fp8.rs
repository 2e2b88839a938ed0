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
pub(crate) const MAGNITUDES: [u16; 128] = {
    let mut table = [0u16; 128];
    let mut code = 0;
    while code < 128 {
        table[code] = magnitude(code as u16);
        code += 1;
    }
    table
};

const fn magnitude(code: u16) -> u16 {
    let (exponent, mantissa) = (code >> 3, code & 7);
    if code == 0x7f {
        0x7fc0
    } else if exponent > 0 {
        // 2^(exponent - 7): BF16's bias is 127.
        ((exponent + 120) << 7) | (mantissa << 4)
    } else if mantissa == 0 {
        0
    } else {
        // mantissa × 2^-9: its leading one becomes the implicit bit.
        let top = 15 - mantissa.leading_zeros() as u16;
        ((127 - 9 + top) << 7) | ((mantissa << (7 - top)) & 0x7f)
    }
}

/// The BF16 bits of an E4M3 code.
pub fn to_bf16(code: u8) -> u16 {
    MAGNITUDES[usize::from(code & 0x7f)] | (u16::from(code & 0x80) << 8)
}

/// The value of an E4M3 code.
pub fn to_f32(code: u8) -> f32 {
    f32::from_bits(u32::from(to_bf16(code)) << 16)
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
