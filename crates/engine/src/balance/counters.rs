//! How often each expert was chosen.

use moesaic_plan::ExpertId;
use serde::{Deserialize, Serialize};

/// Sequences are spread over so many streams, each counted apart. More streams need fewer sequences to tell load from
/// noise, and more memory.
pub const STREAMS: usize = 32;

/// The stream of a sequence, by its number.
pub fn stream_of(sequence: u64) -> usize {
    (sequence % STREAMS as u64) as usize
}

/// Tokens by layer, stream and logical expert: `[layers, STREAMS, E]`, four bytes each.
///
/// One token says little about the next of its sequence, and sequences say nothing about one another; that is why they are
/// counted apart. Each rank counts the tokens that it routes, and the sums over ranks are what [`Balancer`](super::Balancer)
/// wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadCounters {
    num_layers: usize,
    num_experts: usize,
    counts: Vec<u32>,
}

impl LoadCounters {
    /// All zero.
    pub fn new(num_layers: usize, num_experts: usize) -> Self {
        LoadCounters { num_layers, num_experts, counts: vec![0; num_layers * STREAMS * num_experts] }
    }

    /// A token of a sequence chose an expert.
    pub fn count(&mut self, layer: usize, sequence: u64, expert: ExpertId) {
        assert!(expert.idx() < self.num_experts, "expert {expert} of {}", self.num_experts);
        let idx = self.start(layer, stream_of(sequence)) + expert.idx();
        self.counts[idx] = self.counts[idx].saturating_add(1);
    }

    /// Adds what others counted.
    pub fn add_all(&mut self, other: &LoadCounters) {
        assert_eq!((self.num_layers, self.num_experts), (other.num_layers, other.num_experts), "shape of counters");
        self.counts.iter_mut().zip(&other.counts).for_each(|(own, n)| *own = own.saturating_add(*n));
    }

    /// All zero again.
    pub fn clear(&mut self) {
        self.counts.fill(0);
    }

    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// Tokens that chose each expert of a layer. `[E]`
    pub fn loads(&self, layer: usize) -> Vec<f64> {
        self.sum(layer, |_| true)
    }

    /// The same for one stream. `[E]`
    pub(super) fn stream_loads(&self, layer: usize, stream: usize) -> Vec<f64> {
        self.sum(layer, |other| other == stream)
    }

    /// The same for every other of the streams that saw anything, and for the rest. `2 * [E]`
    pub(super) fn halves(&self, layer: usize) -> [Vec<f64>; 2] {
        let seen = |stream| self.row(layer, stream).iter().any(|&n| n > 0);
        let order: Vec<usize> = (0..STREAMS).filter(|&stream| seen(stream)).collect();
        let half =
            |parity| self.sum(layer, |stream| order.binary_search(&stream).is_ok_and(|place| place % 2 == parity));
        [half(0), half(1)]
    }

    fn sum(&self, layer: usize, wanted: impl Fn(usize) -> bool) -> Vec<f64> {
        let mut sums = vec![0.0; self.num_experts];
        for stream in (0..STREAMS).filter(|&stream| wanted(stream)) {
            sums.iter_mut().zip(self.row(layer, stream)).for_each(|(sum, &n)| *sum += f64::from(n));
        }
        sums
    }

    fn row(&self, layer: usize, stream: usize) -> &[u32] {
        let start = self.start(layer, stream);
        &self.counts[start..start + self.num_experts]
    }

    fn start(&self, layer: usize, stream: usize) -> usize {
        assert!(layer < self.num_layers, "layer {layer} of {}", self.num_layers);
        (layer * STREAMS + stream) * self.num_experts
    }
}
