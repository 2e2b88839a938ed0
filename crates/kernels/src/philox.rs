//! Philox4x32-10, a counter-based random number generator (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*,
//! SC 2011): a number is a pure function of a key and a counter, so a draw depends on nothing that was drawn before or
//! beside it.

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
/// Golden ratio and sqrt(3) - 1: what the key advances by each round.
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// Four random words for a counter under a key.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        let (high_a, low_a) = ((a >> 32) as u32, a as u32);
        let (high_b, low_b) = ((b >> 32) as u32, b as u32);
        c = [high_b ^ c[1] ^ k[0], low_b, high_a ^ c[3] ^ k[1], low_a];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

/// The `index`-th number of the stream `seed`, uniform in `[0, 1)` with 53 random bits.
pub fn uniform(seed: u64, index: u64) -> f64 {
    let words = philox4x32([index as u32, (index >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(words[0]) << 32 | u64::from(words[1])) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors that the authors publish with their library (Random123, `kat_vectors`).
    #[test]
    fn known_answers() {
        let ones = u32::MAX;
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let n = 20_000;
        let mut bins = [0u32; 20];
        for index in 0..n {
            let u = uniform(7, index);
            assert!((0.0..1.0).contains(&u));
            bins[(u * 20.0) as usize] += 1;
        }
        let expected = n as f64 / 20.0;
        let chi2: f64 = bins.iter().map(|&b| (f64::from(b) - expected).powi(2) / expected).sum();
        // 19 degrees of freedom: 43.8 is passed once in a thousand seeds; this seed is fixed.
        assert!(chi2 < 43.8, "{chi2}");
        assert_ne!(uniform(7, 0), uniform(8, 0));
        assert_ne!(uniform(7, 0), uniform(7 | 1 << 32, 0));
        assert_ne!(uniform(7, 1), uniform(7, 1 | 1 << 32));
    }
}
