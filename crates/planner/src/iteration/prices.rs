//! Prices of ops that are asked for again: layouts differ in who does what, and much less in what is done.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};

use super::Cost;
use crate::cost::{CostModel, Op, Stack};

/// Costs of ops, each worked out once.
pub(super) struct Prices {
    costs: CostModel,
    known: HashMap<Same, Cost>,
}

impl Prices {
    pub(super) fn new(costs: CostModel) -> Prices {
        Prices { costs, known: HashMap::new() }
    }

    pub(super) fn stack(&self) -> Stack {
        self.costs.stack()
    }

    pub(super) fn of(&mut self, op: &Op) -> Cost {
        *self.known.entry(Same(*op)).or_insert_with(|| Cost::of_op(op, self.costs.price(op)))
    }

    /// Of all of some ops, one after the other.
    pub(super) fn of_all(&mut self, ops: impl IntoIterator<Item = Op>) -> Cost {
        ops.into_iter().map(|op| self.of(&op)).fold(Cost::default(), Cost::plus)
    }
}

/// An op as a key. None of its numbers is a NaN, so that it equals itself.
struct Same(Op);

impl PartialEq for Same {
    fn eq(&self, other: &Same) -> bool {
        self.0 == other.0
    }
}

impl Eq for Same {}

impl Hash for Same {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Few ops that differ have as many operations and as many bytes.
        (self.0.flops().to_bits(), self.0.bytes().to_bits()).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{Precision, Stack};

    #[test]
    fn a_price_is_worked_out_once_and_is_the_models() {
        let gpu = moesaic_spec::cluster_preset("dgx-h100").unwrap().gpu;
        let costs = CostModel::new(&gpu, Stack::Sglang);
        let mut prices = Prices::new(costs.clone());
        let gemm = |m: f64, n: f64| Op::Gemm { m, n, k: 64.0, weights: Precision::Bf16 };
        // As many operations and bytes, and another price.
        for op in [gemm(16.0, 1024.0), gemm(1024.0, 16.0), gemm(16.0, 1024.0)] {
            assert_eq!(prices.of(&op), Cost::of_op(&op, costs.price(&op)));
        }
        assert_eq!(prices.known.len(), 2);
        let both = prices.of_all([gemm(16.0, 1024.0), gemm(1024.0, 16.0)]);
        assert_eq!(both.seconds, prices.of(&gemm(16.0, 1024.0)).seconds + prices.of(&gemm(1024.0, 16.0)).seconds);
    }
}
