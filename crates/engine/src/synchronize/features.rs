//! What a pool's time is predicted from.

use serde::{Deserialize, Serialize};

/// Number of [`Features`].
pub(super) const NUM_FEATURES: usize = 6;

/// A micro-batch, as far as time depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Features {
    /// Tokens that are computed.
    pub tokens: f64,
    /// Sequences that they belong to.
    pub sequences: f64,
    /// Sum of the sequences' context lengths, tokens.
    pub context_sum: f64,
    /// The longest of them, tokens.
    pub context_max: f64,
    /// Experts of a layer that get at least one token, averaged over layers.
    pub active_experts: f64,
    /// Parts that the step is cut into, of which this is one.
    pub micro_batches: f64,
}

impl Features {
    /// One of `parts` equal parts of a whole step.
    ///
    /// Of `E` experts, `E (1 - qᵀ)` are expected to be active with `T` tokens, where `q` is the chance that a token passes an
    /// expert by; a part of the tokens therefore has `E (1 - (1 - A / E)^(1 / parts))` of the whole's `A`.
    pub fn part(&self, parts: usize, num_experts: usize) -> Features {
        let (m, experts) = (parts as f64, num_experts as f64);
        let idle = (1.0 - self.active_experts / experts).clamp(0.0, 1.0);
        Features {
            tokens: self.tokens / m,
            sequences: self.sequences / m,
            context_sum: self.context_sum / m,
            context_max: self.context_max,
            active_experts: experts * (1.0 - idle.powf(1.0 / m)),
            micro_batches: m,
        }
    }

    /// Times are sums of powers of these, so a logarithm brings them near to a plane.
    pub(super) fn logarithms(&self) -> [f64; NUM_FEATURES] {
        let Features { tokens, sequences, context_sum, context_max, active_experts, micro_batches } = *self;
        [tokens, sequences, context_sum, context_max, active_experts, micro_batches].map(|v| v.max(0.0).ln_1p())
    }
}
