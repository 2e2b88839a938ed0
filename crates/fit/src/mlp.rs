//! A small multilayer perceptron, `features → 32 → 32 → 1` with ReLU, and its training by Adam.
//!
//! It learns `y(x)` for standardised `x` and `y`; what they stand for is the caller's affair. The loss of a sample is Huber's,
//! `r² / 2` for `|r| ≤ 1` and `|r| - 1/2` beyond, so that a step that the machine interrupted does not bend the rest. Same
//! random numbers and samples, same weights, bit by bit: sums have a fixed order, and no thread takes part.

use serde::{Deserialize, Serialize};

/// Width of both hidden layers.
const H: usize = 32;

/// One sample: standardised features `[inputs]`, and the standardised value that they have.
pub type Sample = (Vec<f64>, f64);

/// How a network is trained. The default suits some hundred to a few thousand samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Training {
    /// Samples of one update.
    pub minibatch: usize,
    /// Most passes over the samples.
    pub max_epochs: usize,
    /// Passes without a better result on the validation samples that end training.
    pub patience: usize,
    /// Adam's step at the start; it falls linearly to a twentieth.
    pub learning_rate: f64,
}

impl Default for Training {
    fn default() -> Self {
        Training { minibatch: 16, max_epochs: 40, patience: 8, learning_rate: 6e-3 }
    }
}

/// The network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mlp {
    inputs: usize,
    /// One after another: `W1 [inputs, H]`, `b1 [H]`, `W2 [H, H]`, `b2 [H]`, `w3 [H]`, `b3`.
    weights: Vec<f64>,
}

/// Where each part begins in the vector of weights, after `W1`.
struct Places {
    b1: usize,
    w2: usize,
    b2: usize,
    w3: usize,
    b3: usize,
}

/// What a forward pass leaves for the backward one.
struct Trace {
    first: [f64; H],
    second: [f64; H],
    output: f64,
}

impl Mlp {
    /// Weights after He et al. (2015): uniform, with the variance `2 / inputs`. `uniform` gives the random number of a place,
    /// in `[0, 1)`.
    pub fn new(inputs: usize, uniform: impl Fn(u64) -> f64) -> Self {
        let Places { b1, w2, b2, w3, b3 } = places(inputs);
        let mut weights = vec![0.0; b3 + 1];
        for (range, inputs) in [(0..b1, inputs), (w2..b2, H), (w3..b3, H)] {
            let bound = (6.0 / inputs as f64).sqrt();
            for idx in range {
                weights[idx] = (2.0 * uniform(idx as u64) - 1.0) * bound;
            }
        }
        Mlp { inputs, weights }
    }

    /// The value at `x [inputs]`.
    pub fn predict(&self, x: &[f64]) -> f64 {
        self.forward(x).output
    }

    /// Trains on some samples until it gets no better on others, and keeps what was best there. `uniform` gives the random
    /// numbers that the samples are shuffled by.
    pub fn train(
        &mut self,
        samples: &[Sample],
        validation: &[Sample],
        training: &Training,
        uniform: impl Fn(u64) -> f64,
    ) {
        let Training { minibatch, max_epochs, patience, learning_rate } = *training;
        let mut adam = Adam::new(self.weights.len());
        let mut order: Vec<usize> = (0..samples.len()).collect();
        let mut gradient = vec![0.0; self.weights.len()];
        let mut best = (self.loss(validation), self.weights.clone());
        let mut waited = 0;
        let mut draws = 0;
        for epoch in 0..max_epochs {
            for idx in (1..order.len()).rev() {
                let other = (uniform(draws) * (idx + 1) as f64) as usize;
                draws += 1;
                order.swap(idx, other);
            }
            let rate = learning_rate * (1.0 - 0.95 * epoch as f64 / max_epochs as f64);
            for minibatch in order.chunks(minibatch) {
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
            if waited == patience {
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

    fn forward(&self, x: &[f64]) -> Trace {
        assert_eq!(x.len(), self.inputs, "features of a network");
        let Places { b1, w2, b2, w3, b3 } = places(self.inputs);
        let first = self.layer(0, b1, x);
        let second = self.layer(w2, b2, &first);
        let w3 = &self.weights[w3..b3];
        let output = self.weights[b3] + w3.iter().zip(&second).map(|(w, h)| w * h).sum::<f64>();
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
    fn backward(&self, x: &[f64], y: f64, scale: f64, gradient: &mut [f64]) {
        let Places { b1, w2, b2, w3, b3 } = places(self.inputs);
        let Trace { first, second, output } = self.forward(x);
        let d_output = (output - y).clamp(-1.0, 1.0) * scale;
        gradient[b3] += d_output;
        let mut d_second = [0.0; H];
        for j in 0..H {
            gradient[w3 + j] += d_output * second[j];
            d_second[j] = if second[j] > 0.0 { d_output * self.weights[w3 + j] } else { 0.0 };
            gradient[b2 + j] += d_second[j];
        }
        let mut d_first = [0.0; H];
        for i in (0..H).filter(|&i| first[i] > 0.0) {
            let row = w2 + i * H..w2 + (i + 1) * H;
            d_first[i] = self.weights[row.clone()].iter().zip(&d_second).map(|(w, d)| w * d).sum();
            gradient[row].iter_mut().zip(&d_second).for_each(|(g, d)| *g += d * first[i]);
        }
        gradient[b1..w2].iter_mut().zip(&d_first).for_each(|(g, d)| *g += d);
        for (row, x) in gradient[..b1].chunks_exact_mut(H).zip(x) {
            row.iter_mut().zip(&d_first).for_each(|(g, d)| *g += d * x);
        }
    }
}

fn places(inputs: usize) -> Places {
    let b1 = inputs * H;
    let w2 = b1 + H;
    let b2 = w2 + H * H;
    let w3 = b2 + H;
    Places { b1, w2, b2, w3, b3: w3 + H }
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

    fn new(num_weights: usize) -> Self {
        Adam { first: vec![0.0; num_weights], second: vec![0.0; num_weights], powers: (1.0, 1.0) }
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
    use crate::random::uniform;

    const IN: usize = 6;

    fn samples(n: usize, f: impl Fn(&[f64]) -> f64) -> Vec<Sample> {
        let x = |s: usize| (0..IN).map(|i| 3.0 * uniform(99, (s * IN + i) as u64) - 1.5).collect::<Vec<f64>>();
        (0..n).map(|s| (x(s), f(&x(s)))).collect()
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        // Residuals on both sides of Huber's corner.
        let samples = samples(12, |x| 2.0 * x[0] - x[1] * x[2]);
        let net = Mlp::new(IN, |place| uniform(5, place));
        let mut gradient = vec![0.0; net.weights.len()];
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
        let f = |x: &[f64]| (x[0].max(0.2) * x[1]).sin() + 0.5 * x[2].abs();
        let all = samples(1_200, f);
        let (train, rest) = all.split_at(900);
        let (validation, test) = rest.split_at(100);
        let mut net = Mlp::new(IN, |place| uniform(1, place));
        let before = net.loss(test);
        net.train(train, validation, &Training::default(), |place| uniform(2, place));
        let after = net.loss(test);
        assert!(after < 0.02 && after < before / 20.0, "{before} became {after}");
        let mut again = Mlp::new(IN, |place| uniform(1, place));
        again.train(train, validation, &Training::default(), |place| uniform(2, place));
        assert!(net == again);
        let kept = serde_json::to_string(&net).unwrap();
        let kept: Mlp = serde_json::from_str(&kept).unwrap();
        // The reader of JSON may miss the last digit.
        assert!(test.iter().all(|(x, _)| (kept.predict(x) - net.predict(x)).abs() < 1e-12));
    }
}
