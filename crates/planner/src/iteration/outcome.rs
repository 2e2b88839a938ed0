//! What the price of an iteration says.

use moesaic_plan::Collective;

use super::Cost;
use super::dag::{Durations, Slot};

/// What an iteration takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Iteration {
    /// Seconds until each sequence of the batch has its next token, in steady state.
    pub seconds: f64,
    /// Standard deviation of that.
    pub deviation: f64,
    /// Seconds of one rank by slot of the graph, all layers and micro-batches together.
    pub slots: Durations,
    /// Spent by a rank with attention (and, where they share ranks, its experts).
    pub attention_rank: Cost,
    /// Spent by a rank of an expert pool.
    pub expert_rank: Cost,
    /// Seconds for which the compute lane of a rank with attention works.
    pub computing: f64,
    /// Greatest load of a rank with experts over the mean.
    pub imbalance: f64,
    /// Parts that the step was cut into.
    pub micro_batches: usize,
}

impl Iteration {
    /// Seconds of communication of a class, on a rank with attention.
    pub fn communication(&self, class: Collective) -> f64 {
        let slots: &[Slot] = match class {
            Collective::AllReduce => &[Slot::SumNorm, Slot::SumAttention, Slot::SumMlp],
            Collective::AllToAll => &[Slot::Dispatch, Slot::Relay, Slot::Answer, Slot::AnswerNear],
            Collective::SendReceive => &[Slot::Hidden],
            Collective::AllGather => &[Slot::AllGather, Slot::GatherLogits],
            Collective::Broadcast => &[],
        };
        slots.iter().map(|&slot| self.slots[slot]).sum()
    }

    /// Seconds in which a rank with attention does not compute: communication that nothing hides, and waiting.
    pub fn exposed(&self) -> f64 {
        (self.seconds - self.computing).max(0.0)
    }
}
