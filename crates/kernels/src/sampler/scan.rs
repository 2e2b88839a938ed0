//! Passes over one row of logits. Sums of exponentials are in F64 in a fixed order, so they are the same on every path.

use moesaic_device::Isa;

use crate::elementwise::{self, LANES, exp, multi_isa};

/// The unnormalised probability of a logit: `exp((x - max) / temperature)`, or 0 where that is below `min`.
#[derive(Clone, Copy)]
pub(super) struct Weight {
    pub(super) max: f32,
    pub(super) temperature: f32,
    pub(super) min: f32,
}

impl Weight {
    /// The likeliest token weighs 1.
    #[inline(always)]
    pub(super) fn of(self, x: f32) -> f32 {
        let weight = exp((x - self.max) / self.temperature);
        if weight < self.min { 0.0 } else { weight }
    }
}

/// The largest.
pub(super) fn max(isa: Isa, x: &[f32]) -> f32 {
    max_of(isa, x)
}

/// The first of the largest.
pub(super) fn argmax(isa: Isa, x: &[f32]) -> usize {
    let max = max_of(isa, x);
    x.iter().position(|&x| x == max).expect("a maximum is among the numbers")
}

/// Where the first NaN or infinity is.
pub(super) fn first_non_finite(isa: Isa, x: &[f32]) -> Option<usize> {
    if all_finite(isa, x) { None } else { x.iter().position(|x| !x.is_finite()) }
}

/// How many are larger than `limit`.
pub(super) fn count_above(isa: Isa, x: &[f32], limit: f32) -> usize {
    count(isa, x, limit) as usize
}

/// The sum of all weights.
pub(super) fn total(isa: Isa, x: &[f32], weight: Weight) -> f64 {
    sum(isa, x, weight)
}

/// The `n` largest (or all), largest first, ties in order of index.
pub(super) fn best(isa: Isa, x: &[f32], n: usize) -> Vec<u32> {
    const BLOCK: usize = 256;
    let n = n.min(x.len());
    if n == 0 {
        return Vec::new();
    }
    let order = |a: &u32, b: &u32| x[*b as usize].total_cmp(&x[*a as usize]).then(a.cmp(b));
    // Candidates, cut back to the best n whenever they are twice as many; from then on only numbers above the n-th
    // matter (an equal one comes later, so it loses).
    let limit = (2 * n).max(n + 64);
    let (mut found, mut bar) = (Vec::with_capacity(limit), f32::NEG_INFINITY);
    for (block, numbers) in x.chunks(BLOCK).enumerate() {
        if found.len() >= n && max_of(isa, numbers) <= bar {
            continue;
        }
        for (i, &number) in numbers.iter().enumerate() {
            if number > bar {
                found.push((block * BLOCK + i) as u32);
                if found.len() == limit {
                    found.select_nth_unstable_by(n - 1, order);
                    found.truncate(n);
                    bar = x[found[n - 1] as usize];
                }
            }
        }
    }
    found.sort_unstable_by(order);
    found.truncate(n);
    found
}

multi_isa! { fn max_of(x: &[f32]) -> f32 = max_lanes }
multi_isa! { fn all_finite(x: &[f32]) -> bool = all_finite_lanes }
multi_isa! { fn count(x: &[f32], limit: f32) -> u32 = count_lanes }
multi_isa! { fn sum(x: &[f32], weight: Weight) -> f64 = sum_lanes }

#[inline(always)]
fn max_lanes(x: &[f32]) -> f32 {
    elementwise::max(x)
}

#[inline(always)]
fn all_finite_lanes(x: &[f32]) -> bool {
    x.iter().fold(true, |all, x| all & x.is_finite())
}

#[inline(always)]
fn count_lanes(x: &[f32], limit: f32) -> u32 {
    x.iter().fold(0, |n, &x| n + u32::from(x > limit))
}

#[inline(always)]
fn sum_lanes(x: &[f32], weight: Weight) -> f64 {
    let mut sums = [0f64; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            sums[i] += f64::from(weight.of(chunk[i]));
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(weight.of(x));
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn the_best_are_those_of_a_sort() {
        for len in [1, 2, 63, 300, 5000] {
            // Rounded, so that most numbers are tied.
            for x in [random(1, len), random(2, len).iter().map(|x| x.round() + 0.0).collect()] {
                let mut sorted: Vec<u32> = (0..len as u32).collect();
                sorted.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]).then(a.cmp(&b)));
                for n in [0, 1, 2, 5, 64, 299, 5000, usize::MAX / 4] {
                    assert_eq!(best(Isa::detect(), &x, n), sorted[..n.min(len)], "{n} of {len}");
                }
                assert_eq!(argmax(Isa::detect(), &x), sorted[0] as usize);
            }
        }
    }
}
