//! What runs the scheduler's batches: prices and a virtual clock.

use moesaic_plan::Collective;
use moesaic_sched::{Execute, StepBatch, StepOutput};
use moesaic_spec::SplitMix64;

use crate::PlannerError;
use crate::iteration::{Batch, Cost, Iteration, Iterations, Resolved};

/// Classes of communication that an iteration has.
pub(super) const CLASSES: [Collective; 4] =
    [Collective::AllReduce, Collective::AllToAll, Collective::SendReceive, Collective::AllGather];

/// Steps take what their iterations cost, and every token is 0.
pub(super) struct Priced<'p, 'm> {
    pub(super) iterations: &'p mut Iterations<'m>,
    pub(super) resolved: Resolved<'p>,
    /// Where the load of the fullest rank is drawn from; without, it is the mean.
    pub(super) stragglers: Option<SplitMix64>,
    /// Seconds of a step, by those of its iteration.
    pub(super) pace: f64,
    pub(super) clock: Clock,
}

/// Time, and what it was spent on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Clock {
    /// Seconds since the start.
    pub(super) now: f64,
    /// Seconds of all steps.
    pub(super) busy: f64,
    /// Seconds in which a rank with attention computes.
    pub(super) computing: f64,
    /// Seconds of communication by class.
    pub(super) classes: [f64; CLASSES.len()],
    /// Spent by a rank with attention, and of an expert pool.
    pub(super) spent: [Cost; 2],
    /// Greatest load of a rank with experts over the mean, times seconds.
    pub(super) imbalance: f64,
    pub(super) steps: u64,
    pub(super) steps_with_prefill: u64,
    /// Rows of the group that the last step waited for.
    pub(super) last: Batch,
}

impl Clock {
    fn pass(&mut self, iteration: &Iteration, pace: f64, batch: Batch) {
        self.now += pace * iteration.seconds;
        self.busy += pace * iteration.seconds;
        // Where a step takes longer than its iteration, GPUs wait; where it is shorter, all of it is.
        let shorter = pace.min(1.0);
        self.computing += shorter * iteration.computing;
        for (sum, class) in self.classes.iter_mut().zip(CLASSES) {
            *sum += shorter * iteration.communication(class);
        }
        self.spent[0] = self.spent[0].plus(iteration.attention_rank);
        self.spent[1] = self.spent[1].plus(iteration.expert_rank);
        self.imbalance += iteration.imbalance * pace * iteration.seconds;
        self.steps += 1;
        self.steps_with_prefill += u64::from(batch.prefill_tokens > 0.0);
        self.last = batch;
    }
}

impl Priced<'_, '_> {
    /// The batch of the group that all wait for: whose attention takes longest.
    fn fullest(&mut self, batches: &[StepBatch]) -> Batch {
        let mut fullest = Batch::default();
        let (mut longest, mut rows) = (-1.0, 0.0);
        for batch in batches.iter().filter(|batch| !batch.seqs.is_empty()).map(batch_of) {
            rows += batch.rows();
            let seconds = if batches.len() == 1 { 0.0 } else { self.iterations.attention_s(&self.resolved, &batch) };
            if seconds > longest {
                (longest, fullest) = (seconds, batch);
            }
        }
        fullest.shortfall = fullest.rows() - rows / batches.len() as f64;
        fullest
    }
}

/// What a group's scheduler has chosen, in sums.
pub(super) fn batch_of(batch: &StepBatch) -> Batch {
    let mut sums = Batch::default();
    for seq in &batch.seqs {
        if seq.samples && seq.token_ids.len() == 1 {
            sums.decodes += 1.0;
            sums.context += (seq.start + 1) as f64;
        } else {
            sums.prefills += 1.0;
            sums.prefill_tokens += seq.token_ids.len() as f64;
            sums.prefill_context += seq.start as f64;
            sums.finished_prefills += f64::from(u8::from(seq.samples));
        }
    }
    sums.context /= sums.decodes.max(1.0);
    sums.prefill_context /= sums.prefills.max(1.0);
    sums
}

impl Execute for Priced<'_, '_> {
    type Error = PlannerError;

    fn execute(&mut self, batches: &[StepBatch]) -> Result<Vec<StepOutput>, PlannerError> {
        let batch = self.fullest(batches);
        let deviations = self.stragglers.as_mut().map_or(0.0, normal);
        let iteration = self.iterations.price_straggling(&self.resolved, &batch, deviations);
        self.clock.pass(&iteration, self.pace, batch);
        let output = |batch: &StepBatch| {
            let sampled = batch.seqs.iter().filter(|seq| seq.samples).map(|seq| (seq.id, 0)).collect();
            StepOutput { sampled }
        };
        Ok(batches.iter().map(output).collect())
    }
}

/// A number of the standard normal distribution (Box and Muller, 1958).
fn normal(random: &mut SplitMix64) -> f64 {
    let (radius, angle) = (1.0 - random.uniform(), random.uniform());
    (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_mean_0_and_deviation_1() {
        let mut random = SplitMix64(1);
        let draws: Vec<f64> = (0..20_000).map(|_| normal(&mut random)).collect();
        let mean = draws.iter().sum::<f64>() / 20_000.0;
        let variance = draws.iter().map(|draw| draw * draw).sum::<f64>() / 20_000.0;
        // Four standard errors.
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04, "{mean} {variance}");
    }
}
