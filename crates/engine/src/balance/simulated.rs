//! Routing as models do it: tokens of a sequence stay with its topic, topics prefer some experts, sequences come and go.

use moesaic_plan::ExpertId;

use super::LoadCounters;

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub(super) struct Rng(pub(super) u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// In `[0, 1)`.
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }
}

#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) layers: usize,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    /// Sequences at a time, one token each a step.
    pub(super) batch: usize,
}

/// Topic `t` likes the quarter of the experts that begins at `t` four times as much: neighbours, so that in a placement in
/// order one topic fills one rank. There are as many topics as experts; with level popularity all experts are equal.
pub(super) struct Traffic {
    shape: Shape,
    /// `[layers, topics, E]`, sums.
    cumulative: Vec<Vec<Vec<f64>>>,
    sequences: Vec<Sequence>,
    next_sequence: u64,
    rng: Rng,
}

struct Sequence {
    number: u64,
    topic: usize,
    tokens_left: usize,
}

/// Probability that a token changes its sequence's topic.
const NEW_TOPIC: f64 = 0.01;

impl Traffic {
    pub(super) fn new(shape: Shape, popularity: &[f64], seed: u64) -> Self {
        let mut traffic = Traffic {
            shape,
            cumulative: Vec::new(),
            sequences: Vec::new(),
            next_sequence: 0,
            rng: Rng(seed.wrapping_mul(0x1234_5678_9abc_def1)),
        };
        traffic.set_popularity(popularity);
        for _ in 0..shape.batch {
            let sequence = traffic.new_sequence();
            traffic.sequences.push(sequence);
        }
        traffic
    }

    /// From now on experts are so popular, apart from topics.
    pub(super) fn set_popularity(&mut self, popularity: &[f64]) {
        let Shape { layers, experts, .. } = self.shape;
        let weight = |layer: usize, topic: usize, expert: usize| {
            let liked = (expert + experts - (topic * 3 + layer) % experts) % experts < experts / 4;
            popularity[expert] * if liked { 4.0 } else { 1.0 }
        };
        let sums = |layer, topic| {
            let mut sum = 0.0;
            (0..experts).map(|expert| (sum += weight(layer, topic, expert), sum).1).collect()
        };
        self.cumulative = (0..layers).map(|layer| (0..experts).map(|topic| sums(layer, topic)).collect()).collect();
    }

    fn new_sequence(&mut self) -> Sequence {
        self.next_sequence += 1;
        let topic = self.rng.below(self.shape.experts);
        Sequence { number: self.next_sequence, topic, tokens_left: 20 + self.rng.below(400) }
    }

    /// One token of each sequence.
    pub(super) fn step(&mut self, counters: &mut LoadCounters) {
        let Shape { layers, top_k, .. } = self.shape;
        for idx in 0..self.sequences.len() {
            if self.sequences[idx].tokens_left == 0 {
                self.sequences[idx] = self.new_sequence();
            }
            if self.rng.unit() < NEW_TOPIC {
                self.sequences[idx].topic = self.rng.below(self.shape.experts);
            }
            self.sequences[idx].tokens_left -= 1;
            let Sequence { number, topic, .. } = self.sequences[idx];
            for layer in 0..layers {
                let mut chosen = [usize::MAX; 16];
                for k in 0..top_k {
                    let sums = &self.cumulative[layer][topic];
                    let expert = loop {
                        let at = self.rng.unit() * sums[sums.len() - 1];
                        let expert = sums.partition_point(|&sum| sum <= at).min(sums.len() - 1);
                        if !chosen[..k].contains(&expert) {
                            break expert;
                        }
                    };
                    chosen[k] = expert;
                    counters.count(layer, number, ExpertId(expert as u32));
                }
            }
        }
    }
}
