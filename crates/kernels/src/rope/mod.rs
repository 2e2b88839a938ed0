//! Rotary position embedding: the table of angles, and the rotation.

mod qkv;
mod sums;

pub use qkv::{QkNormWeights, QkvLayout, QkvPost, rope_and_store};
pub(crate) use qkv::{check_weight, rms_norm, weight_f32};
pub use sums::qk_sums;

use moesaic_spec::{Rope, RopeScaling};

use crate::contract::{KernelError, require};

/// cos and sin of every position and frequency, F32 rounded from F64.
pub struct RopeTable {
    /// `[max_positions, 2, half]`: the cosines of a position, then its sines.
    table: Vec<f32>,
    half: usize,
    max_positions: usize,
    interleaved: bool,
}

impl RopeTable {
    /// Angles for `rotary_dim` (even) columns and positions below `max_positions`; cos and sin carry YaRN's attention
    /// factor.
    pub fn new(rope: &Rope, rotary_dim: usize, max_positions: usize) -> Result<RopeTable, KernelError> {
        let meta = RopeTable::meta(rope, rotary_dim, max_positions)?;
        let (frequencies, factor) = (frequencies(rope, rotary_dim), rope.cos_sin_factor());
        let mut table = Vec::with_capacity(max_positions * rotary_dim);
        for position in 0..max_positions {
            let angles = || frequencies.iter().map(|f| f * position as f64);
            table.extend(angles().map(|a| (a.cos() * factor) as f32));
            table.extend(angles().map(|a| (a.sin() * factor) as f32));
        }
        Ok(RopeTable { table, ..meta })
    }

    /// The table without its angles, for ops on `Meta`.
    pub fn meta(rope: &Rope, rotary_dim: usize, max_positions: usize) -> Result<RopeTable, KernelError> {
        let even = rotary_dim > 0 && rotary_dim.is_multiple_of(2);
        require(even, "rope", "rotary_dim", || "positive and even".into(), || rotary_dim.to_string())?;
        Ok(RopeTable { table: Vec::new(), half: rotary_dim / 2, max_positions, interleaved: rope.interleaved })
    }

    /// Columns that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    /// Positions are below this.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Memory that one position takes in a table with angles.
    pub fn position_bytes(&self) -> moesaic_spec::Bytes {
        moesaic_spec::Bytes((2 * self.half * size_of::<f32>()) as u64)
    }

    /// Refuses positions beyond the table.
    pub(crate) fn check(&self, op: &'static str, positions: &[u32]) -> Result<(), KernelError> {
        let highest = positions.iter().copied().max().unwrap_or(0) as usize;
        let expected = || format!("below {}", self.max_positions);
        require(highest < self.max_positions || positions.is_empty(), op, "position", expected, || highest.to_string())
    }

    /// Rotates the first `rotary_dim` of `x` in place: pair `(a, b)` becomes `(a cos - b sin, b cos + a sin)`; each
    /// product is rounded.
    #[inline(always)]
    pub(crate) fn rotate(&self, x: &mut [f32], position: u32) {
        let half = self.half;
        let (cos, sin) = self.table[position as usize * 2 * half..][..2 * half].split_at(half);
        if self.interleaved {
            for ((pair, c), s) in x[..2 * half].chunks_exact_mut(2).zip(cos).zip(sin) {
                let (a, b) = (pair[0], pair[1]);
                pair[0] = a * c - b * s;
                pair[1] = b * c + a * s;
            }
        } else {
            let (low, high) = x[..2 * half].split_at_mut(half);
            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
    }
}

/// Radians a position, of each pair of columns. YaRN as in arXiv 2309.00071, section 3.2, with the conventions of
/// `_compute_yarn_parameters` in transformers.
fn frequencies(rope: &Rope, dim: usize) -> Vec<f64> {
    let plain = (0..dim / 2).map(|i| rope.theta.powf(-((2 * i) as f64) / dim as f64));
    match rope.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } => {
            // The (fractional) pair that turns this often within the original context.
            let pair_of = |rotations: f64| {
                let wavelengths = original as f64 / (rotations * std::f64::consts::TAU);
                dim as f64 * wavelengths.ln() / (2.0 * rope.theta.ln())
            };
            let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
            if low == high {
                high += 0.001; // the ramp has no width otherwise
            }
            let blend = |(i, f): (usize, f64)| {
                let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f / factor * interpolated + f * (1.0 - interpolated)
            };
            plain.enumerate().map(blend).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, scaling: RopeScaling) -> Rope {
        Rope { theta, interleaved: false, scaling }
    }

    fn deepseek(mscale: f64, mscale_all_dim: f64, truncate: bool) -> RopeScaling {
        RopeScaling::Yarn {
            factor: 40.0,
            original_max_position_embeddings: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale,
            mscale_all_dim,
            attention_factor: None,
            truncate,
        }
    }

    /// Values of `ROPE_INIT_FUNCTIONS["yarn"]` of transformers 5 for these settings (computed there in F32).
    #[test]
    fn yarn_is_that_of_transformers() {
        let pairs = [0, 9, 11, 14, 16, 20, 22, 23, 31];
        let cases = [
            (
                deepseek(1.0, 1.0, true),
                [
                    1.0,
                    7.498_942e-2,
                    3.900_693e-2,
                    1.244_796e-2,
                    5.5e-3,
                    7.905_694e-4,
                    1.778_279e-4,
                    3.333_803e-5,
                    3.333_803e-6,
                ],
                1.0,
            ),
            (
                deepseek(0.707, 1.2, false),
                [
                    1.0,
                    7.498_942e-2,
                    4.036_758e-2,
                    1.270_314e-2,
                    5.524_063e-3,
                    7.226_382e-4,
                    1.183_876e-4,
                    3.333_803e-5,
                    3.333_803e-6,
                ],
                0.873_940_457_618_512_1,
            ),
        ];
        for (scaling, expected, factor) in cases {
            let rope = rope(10_000.0, scaling);
            let got = frequencies(&rope, 64);
            for (pair, expected) in pairs.into_iter().zip(expected) {
                assert!((got[pair] / expected - 1.0).abs() < 2e-6, "pair {pair}: {} for {expected}", got[pair]);
            }
            assert!((rope.cos_sin_factor() - factor).abs() < 1e-12);
        }
        let plain = rope(10_000.0, deepseek(0.0, 0.0, true));
        assert!((plain.cos_sin_factor() - 1.368_887_945_411_393_6).abs() < 1e-12);
        let linear = rope(10_000.0, RopeScaling::Linear { factor: 4.0 });
        assert_eq!(frequencies(&linear, 4), [0.25, 0.0025]);
    }

    #[test]
    fn both_pair_styles_turn_the_same_pairs() {
        let halves = RopeTable::new(&rope(10_000.0, RopeScaling::None), 6, 20).unwrap();
        let interleaved =
            RopeTable::new(&Rope { interleaved: true, ..rope(10_000.0, RopeScaling::None) }, 6, 20).unwrap();
        let x = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        let order = [0, 3, 1, 4, 2, 5, 6];
        let (mut a, mut b) = (x, order.map(|i| x[i]));
        halves.rotate(&mut a, 17);
        interleaved.rotate(&mut b, 17);
        assert_eq!(order.map(|i| a[i]), b);
        assert_eq!(a[6], 7.0);
        let expected = |p: f64, f: f64| (1.0 * (p * f).cos() - 4.0 * (p * f).sin()) as f32;
        assert!((a[0] - expected(17.0, 1.0)).abs() < 1e-6);
    }
}
