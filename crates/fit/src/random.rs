//! Random numbers by their place in a sequence.

/// The `place`-th number of a seed's sequence, uniform in `[0, 1)`. Source: Steele, Lea and Flood, "Fast splittable
/// pseudorandom number generators", 2014 (SplitMix64).
pub fn uniform(seed: u64, place: u64) -> f64 {
    // The seed is mixed first, so that the sequences of neighbouring seeds are not one sequence, shifted.
    let bits = mix(mix(seed).wrapping_add((place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_uniform_and_independent() {
        let n = 10_000;
        let x: Vec<f64> = (0..n).map(|place| uniform(7, place)).collect();
        let mean = x.iter().sum::<f64>() / n as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        // Five standard deviations of a sample of this size.
        assert!((mean - 0.5).abs() < 5.0 * (1.0_f64 / 12.0 / n as f64).sqrt(), "{mean}");
        assert!((variance - 1.0 / 12.0).abs() < 0.004, "{variance}");
        for lag in 1..5 {
            let product = x.windows(lag + 1).map(|w| (w[0] - 0.5) * (w[lag] - 0.5)).sum::<f64>() / n as f64;
            assert!(product.abs() < 0.005, "lag {lag}: {product}");
        }
        assert!((0..100).all(|place| uniform(7, place) != uniform(8, place)));
    }
}
