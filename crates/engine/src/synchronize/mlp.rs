//! A small multilayer perceptron, `features → 32 → 32 → 1` with ReLU, and its training by Adam.
//!
//! It learns `y(x)` for standardised `x` and `y`; what they stand for is the caller's affair. The loss of a sample is Huber's,
//! `r² / 2` for `|r| ≤ 1` and `|r| - 1/2` beyond, so that a step that the machine interrupted does not bend the rest. Same
//! seed and samples, same weights, bit by bit: sums have a fixed order, and no thread takes part.

use moesaic_kernels::philox;

use super::features::NUM_FEATURES as IN;

/// Width of both hidden layers.
const H: usize = 32;
/// Where each part begins in the flat vector of weights: `W1 [IN, H]`, `b1 [H]`, `W2 [H, H]`, `b2 [H]`, `w3 [H]`, `b3`.
const B1: usize = IN * H;
const W2: usize = B1 + H;
const B2: usize = W2 + H * H;
const W3: usize = B2 + H;
const B3: usize = W3 + H;
const NUM_WEIGHTS: usize = B3 + 1;

/// Samples of one update.
const MINIBATCH: usize = 16;
/// Most passes over the samples.
const MAX_EPOCHS: usize = 40;
/// Passes without a better result on the validation samples that end training.
const PATIENCE: usize = 8;
/// Adam's step at the start; it falls linearly to a twentieth.
const LEARNING_RATE: f64 = 6e-3;

/// One sample: standardised features, and the standardised value that they have.
pub(super) type Sample = ([f64; IN], f64);

/// The network.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Mlp {
    weights: Vec<f64>,
}

/// What a forward pass leaves for the backward one.
struct Trace {
    first: [f64; H],
    second: [f64; H],
    output: f64,
}

impl Mlp {
    /// Weights after He et al. (2015): uniform, with the variance `2 / inputs`.
    pub(super) fn new(seed: u64) -> Self {
        let mut weights = vec![0.0; NUM_WEIGHTS];
        let parts = [(0..B1, IN), (W2..B2, H), (W3..B3, H)];
        for (range, inputs) in parts {
            let bound = (6.0 / inputs as f64).sqrt();
            for idx in range {
                weights[idx] = (2.0 * philox::uniform(seed, idx as u64) - 1.0) * bound;
            }
        }
        Mlp { weights }
    }

    pub(super) fn predict(&self, x: &[f64; IN]) -> f64 {
        self.forward(x).output
    }

    /// Trains on some samples until it gets no better on others, and keeps what was best there.
    pub(super) fn train(&mut self, samples: &[Sample], validation: &[Sample], seed: u64) {
        let mut adam = Adam::new();
        let mut order: Vec<usize> = (0..samples.len()).collect();
        let mut gradient = vec![0.0; NUM_WEIGHTS];
        let mut best = (self.loss(validation), self.weights.clone());
        let mut waited = 0;
        let mut draws = 0;
        for epoch in 0..MAX_EPOCHS {
            for idx in (1..order.len()).rev() {
                let other = (philox::uniform(!seed, draws) * (idx + 1) as f64) as usize;
                draws += 1;
                order.swap(idx, other);
            }
            let rate = LEARNING_RATE * (1.0 - 0.95 * epoch as f64 / MAX_EPOCHS as f64);
            for minibatch in order.chunks(MINIBATCH) {
                gradient.fill(0.0);
                for &idx in minibatch {
                    let (x, y) = &samples[idx];
                    self.backward(x, *y, 1.0 / minibatch.len() as f64, &mut gradient);
                }
                adam.update(&mut self.weights, &gradient, rate);
            }
            let loss = self.loss(validation);
            waited += 1;
            if loss < best.0 {
                best = (loss, self.weights.clone());
                waited = 0;
            }
            if waited == PATIENCE {
                break;
            }
        }
        self.weights = best.1;
    }

    /// Mean loss.
    fn loss(&self, samples: &[Sample]) -> f64 {
        let huber = |r: f64| if r.abs() <= 1.0 { r * r / 2.0 } else { r.abs() - 0.5 };
        samples.iter().map(|(x, y)| huber(self.predict(x) - y)).sum::<f64>() / samples.len().max(1) as f64
    }

    fn forward(&self, x: &[f64; IN]) -> Trace {
        let first = self.layer(0, B1, x);
        let second = self.layer(W2, B2, &first);
        let w3 = &self.weights[W3..B3];
        let output = self.weights[B3] + w3.iter().zip(&second).map(|(w, h)| w * h).sum::<f64>();
        Trace { first, second, output }
    }

    /// `relu(xᵀ W + b)`. The weights of an input lie together, so that the inner loop runs over outputs.
    fn layer(&self, weights: usize, biases: usize, x: &[f64]) -> [f64; H] {
        let mut y: [f64; H] = self.weights[biases..biases + H].try_into().expect("H biases");
        // Half of the inputs of the second layer are zero, after ReLU.
        for (row, &x) in self.weights[weights..biases].chunks_exact(H).zip(x).filter(|(_, x)| **x != 0.0) {
            y.iter_mut().zip(row).for_each(|(y, w)| *y += w * x);
        }
        y.map(|y| y.max(0.0))
    }

    /// Adds `scale` times the gradient of one sample's loss.
    fn backward(&self, x: &[f64; IN], y: f64, scale: f64, gradient: &mut [f64]) {
        let Trace { first, second, output } = self.forward(x);
        let d_output = (output - y).clamp(-1.0, 1.0) * scale;
        gradient[B3] += d_output;
        let mut d_second = [0.0; H];
        for j in 0..H {
            gradient[W3 + j] += d_output * second[j];
            d_second[j] = if second[j] > 0.0 { d_output * self.weights[W3 + j] } else { 0.0 };
            gradient[B2 + j] += d_second[j];
        }
        let mut d_first = [0.0; H];
        for i in (0..H).filter(|&i| first[i] > 0.0) {
            let row = W2 + i * H..W2 + (i + 1) * H;
            d_first[i] = self.weights[row.clone()].iter().zip(&d_second).map(|(w, d)| w * d).sum();
            gradient[row].iter_mut().zip(&d_second).for_each(|(g, d)| *g += d * first[i]);
        }
        gradient[B1..W2].iter_mut().zip(&d_first).for_each(|(g, d)| *g += d);
        for (row, x) in gradient[..B1].chunks_exact_mut(H).zip(x) {
            row.iter_mut().zip(&d_first).for_each(|(g, d)| *g += d * x);
        }
    }
}

/// Adam (Kingma and Ba, 2015), with the constants of the paper.
struct Adam {
    first: Vec<f64>,
    second: Vec<f64>,
    /// β₁ and β₂ to the power of the updates.
    powers: (f64, f64),
}

impl Adam {
    const BETA: (f64, f64) = (0.9, 0.999);
    const EPSILON: f64 = 1e-8;

    fn new() -> Self {
        Adam { first: vec![0.0; NUM_WEIGHTS], second: vec![0.0; NUM_WEIGHTS], powers: (1.0, 1.0) }
    }

    fn update(&mut self, weights: &mut [f64], gradient: &[f64], rate: f64) {
        let (b1, b2) = Self::BETA;
        self.powers = (self.powers.0 * b1, self.powers.1 * b2);
        let (first_bias, second_bias) = (1.0 - self.powers.0, 1.0 - self.powers.1);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(moments) {
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            *w -= rate * (*m / first_bias) / ((*v / second_bias).sqrt() + Self::EPSILON);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(n: usize, f: impl Fn(&[f64; IN]) -> f64) -> Vec<Sample> {
        let x = |s: usize| std::array::from_fn(|i| 3.0 * philox::uniform(99, (s * IN + i) as u64) - 1.5);
        (0..n).map(|s| (x(s), f(&x(s)))).collect()
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        // Residuals on both sides of Huber's corner.
        let samples = samples(12, |x| 2.0 * x[0] - x[1] * x[2]);
        let net = Mlp::new(5);
        let mut gradient = vec![0.0; NUM_WEIGHTS];
        samples.iter().for_each(|(x, y)| net.backward(x, *y, 1.0 / samples.len() as f64, &mut gradient));
        let far = samples.iter().filter(|(x, y)| (net.predict(x) - y).abs() > 1.0).count();
        assert!((1..samples.len()).contains(&far), "{far}");
        let scale = gradient.iter().map(|g| g.abs()).fold(0.0, f64::max);
        let step = 1e-6;
        for (idx, exact) in gradient.iter().enumerate() {
            let at = |change: f64| {
                let mut moved = net.clone();
                moved.weights[idx] += change;
                moved.loss(&samples)
            };
            let slope = (at(step) - at(-step)) / (2.0 * step);
            // Rounding of the loss by the step is 1e-10; a kink of ReLU inside the step would be far more.
            assert!((slope - exact).abs() < 1e-7 * scale.max(1.0), "weight {idx}: {slope}, {exact}");
        }
    }

    #[test]
    fn it_learns_what_no_line_can() {
        let f = |x: &[f64; IN]| (x[0].max(0.2) * x[1]).sin() + 0.5 * x[2].abs();
        let all = samples(1_200, f);
        let (train, rest) = all.split_at(900);
        let (validation, test) = rest.split_at(100);
        let mut net = Mlp::new(1);
        let before = net.loss(test);
        net.train(train, validation, 1);
        let after = net.loss(test);
        assert!(after < 0.02 && after < before / 20.0, "{before} became {after}");
        let mut again = Mlp::new(1);
        again.train(train, validation, 1);
        assert_eq!(net, again);
    }
}
