//! The distribution of the fullest of several ranks.
//!
//! Each rank's rows have a mean and a variance. Were ranks independent, the distribution functions would multiply; they are
//! not quite, because all rows together are a fixed number. For normal variables that takes exactly the deviation of the
//! mean rank out of the maximum: the expectation stays (when each variance is what it would be without the constraint),
//! and the variance is smaller by that of the mean.

/// Rows of ranks that are alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct Class {
    /// How many ranks.
    pub(super) ranks: f64,
    /// Expected rows for each token.
    pub(super) mean: f64,
    /// Variance for each token, were other ranks' rows free.
    pub(super) variance: f64,
}

/// Steps that a distribution is looked at in.
const STEPS: usize = 160;
/// Beyond so many standard deviations nothing happens.
const FAR: f64 = 6.0;
/// Means from which on counts are normal.
const NORMAL: f64 = 64.0;

/// Rows of the fullest rank for a number of tokens: values with their probabilities.
pub(super) fn fullest(classes: &[Class], tokens: f64) -> Vec<(f64, f64)> {
    if classes.iter().map(|class| class.ranks).sum::<f64>() == 1.0 {
        return vec![(classes[0].mean * tokens, 1.0)];
    }
    let counts: Vec<Count> = classes.iter().map(|class| Count::new(class, tokens)).collect();
    let greatest = |of: &dyn Fn(&Count) -> f64| counts.iter().map(of).fold(0.0, f64::max);
    let least = greatest(&|count| (count.mean - FAR * count.sd).floor());
    // The tail of a small count is longer than that of a normal one.
    let most = greatest(&|count| (count.mean + FAR * count.sd + FAR).ceil());
    let step = ((most - least) / STEPS as f64).max(1.0);
    let steps = ((most - least) / step).ceil() as usize + 1;
    let mut below = vec![1.0; steps];
    for count in &counts {
        count.multiply_below(&mut below, least, step);
    }
    let mut values = Vec::with_capacity(steps);
    let mut before = 0.0;
    for (idx, &below) in below.iter().enumerate() {
        // A step's mass lies in its middle; of counts, on them.
        let value = least + idx as f64 * step - (step - 1.0) / 2.0;
        if below > before {
            values.push((value, below - before));
        }
        before = below;
    }
    without_the_mean(&mut values, classes, tokens);
    values
}

/// Takes the deviation of the mean rank out.
fn without_the_mean(values: &mut [(f64, f64)], classes: &[Class], tokens: f64) {
    let total: f64 = values.iter().map(|&(_, mass)| mass).sum();
    let mean = values.iter().map(|&(value, mass)| value * mass).sum::<f64>() / total;
    let variance = values.iter().map(|&(value, mass)| (value - mean).powi(2) * mass).sum::<f64>() / total;
    let ranks: f64 = classes.iter().map(|class| class.ranks).sum();
    let of_mean = classes.iter().map(|class| class.ranks * class.variance).sum::<f64>() * tokens / (ranks * ranks);
    let narrow = if variance > 0.0 { ((variance - of_mean) / variance).max(0.0).sqrt() } else { 0.0 };
    let mean_rows = classes.iter().map(|class| class.ranks * class.mean).sum::<f64>() * tokens / ranks;
    for (value, mass) in values {
        // The fullest rank has at least the mean, and at most all.
        *value = (mean + (*value - mean) * narrow).clamp(mean_rows, mean_rows * ranks);
        *mass /= total;
    }
}

/// Rows of one rank.
struct Count {
    ranks: f64,
    mean: f64,
    sd: f64,
}

impl Count {
    fn new(class: &Class, tokens: f64) -> Self {
        Count { ranks: class.ranks, mean: class.mean * tokens, sd: (class.variance * tokens).sqrt() }
    }

    /// Multiplies by the probability that none of the ranks has more than `least`, `least + step`, …
    fn multiply_below(&self, below: &mut [f64], least: f64, step: f64) {
        if self.mean > NORMAL || self.sd < 1e-6 {
            for (idx, below) in below.iter_mut().enumerate() {
                let at = least + idx as f64 * step + 0.5;
                let deviations = (at - self.mean) / self.sd.max(1e-9);
                if deviations < FAR {
                    *below *= normal_below(deviations).powf(self.ranks);
                }
            }
            return;
        }
        // A binomial of the same mean and variance, whose number of trials need not be whole; Poisson's when they are alike.
        let hit = (1.0 - self.sd * self.sd / self.mean).max(1e-9);
        let trials = self.mean / hit;
        let mut mass = (trials * (-hit).ln_1p()).exp();
        let (mut sum, mut count) = (mass, 0.0);
        for (idx, below) in below.iter_mut().enumerate() {
            let at = least + idx as f64 * step;
            while count < at.floor() {
                mass *= ((trials - count) / (count + 1.0) * hit / (1.0 - hit)).max(0.0);
                sum += mass;
                count += 1.0;
            }
            *below *= sum.min(1.0).powf(self.ranks);
        }
    }
}

/// Distribution function of the normal distribution. Source: Abramowitz and Stegun, 26.2.17; error below 1e-7.
fn normal_below(deviations: f64) -> f64 {
    let at = 1.0 / (1.0 + 0.231_641_9 * deviations.abs());
    let series = at
        * (0.319_381_530 + at * (-0.356_563_782 + at * (1.781_477_937 + at * (-1.821_255_978 + at * 1.330_274_429))));
    let above = (-deviations * deviations / 2.0).exp() / std::f64::consts::TAU.sqrt() * series;
    if deviations > 0.0 { 1.0 - above } else { above }
}
