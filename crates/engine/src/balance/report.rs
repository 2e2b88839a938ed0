//! What balancing did and cost.

use serde::{Deserialize, Serialize};

use super::{Decision, LoadStats};

/// Records that are kept of each kind; counts go on.
const MAX_RECORDS: usize = 1_000;

/// What balancing did, and what it cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BalanceReport {
    /// Intervals that ended and were looked at.
    pub intervals: u64,
    /// Of them those that changed nothing.
    pub quiet_intervals: u64,
    /// The least p-value of those.
    pub least_quiet_p_value: Option<f64>,
    /// Bytes of weights that were sent.
    pub moved_bytes: u64,
    /// Time that was lost to it, seconds, as the caller says.
    pub paid_s: f64,
    /// The latest 1,000 decisions, in order.
    pub decisions: Vec<DecisionRecord>,
    /// The latest 1,000 quiet intervals, in order.
    pub quiet: Vec<QuietInterval>,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecisionRecord {
    /// Steps observed until then.
    pub step: u64,
    /// Epoch of the new placement.
    pub epoch: u64,
    /// Intervals whose load showed it.
    pub intervals: usize,
    /// Layers that changed.
    pub layers: usize,
    /// Experts that were sent.
    pub moves: usize,
    /// Probability of moving by chance, corrected for all that was looked at.
    pub p_value: f64,
    /// Load before.
    pub before: LoadStats,
    /// The same load under the new placement.
    pub predicted: LoadStats,
    /// Load of the first whole interval under the new placement; absent until then.
    pub measured: Option<LoadStats>,
    /// What it cost; absent until the caller has said so.
    pub paid: Option<Paid>,
}

/// The cost of a decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Paid {
    /// Bytes of weights that were sent.
    pub bytes: u64,
    /// Time that was lost to it, seconds.
    pub seconds: f64,
}

/// An interval after which nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuietInterval {
    /// Steps observed until then.
    pub step: u64,
    /// The least p-value over layers and horizons, corrected for all that was looked at. Below the setting's significance
    /// where a load is uneven beyond doubt and no placement gains enough.
    pub p_value: f64,
    /// Max/mean of the interval, averaged over layers.
    pub max_over_mean: f64,
}

impl BalanceReport {
    pub(super) fn quiet(&mut self, interval: QuietInterval) {
        self.intervals += 1;
        self.quiet_intervals += 1;
        let least = self.least_quiet_p_value.map_or(interval.p_value, |least| least.min(interval.p_value));
        self.least_quiet_p_value = Some(least);
        push(&mut self.quiet, interval);
    }

    pub(super) fn decided(&mut self, step: u64, intervals: usize, decision: &Decision) {
        self.intervals += 1;
        let record = DecisionRecord {
            step,
            epoch: decision.placement.epoch,
            intervals,
            layers: decision.gains.len(),
            moves: decision.moves.len(),
            p_value: decision.p_value,
            before: decision.before,
            predicted: decision.after,
            measured: None,
            paid: None,
        };
        push(&mut self.decisions, record);
    }

    /// An interval ended in which the placement of this epoch ruled.
    pub(super) fn measured(&mut self, epoch: u64, stats: LoadStats) {
        if let Some(last) = self.decisions.last_mut().filter(|last| last.epoch == epoch && last.measured.is_none()) {
            last.measured = Some(stats);
        }
    }

    pub(super) fn paid(&mut self, paid: Paid) {
        self.moved_bytes += paid.bytes;
        self.paid_s += paid.seconds;
        if let Some(last) = self.decisions.last_mut() {
            last.paid = Some(paid);
        }
    }
}

fn push<T>(records: &mut Vec<T>, record: T) {
    if records.len() == MAX_RECORDS {
        records.remove(0);
    }
    records.push(record);
}
