//! The same workload with other seeds.

use moesaic_spec::Workload;
use serde::{Deserialize, Serialize};

use super::{Simulated, Simulation, pace, room, run};
use crate::PlannerError;
use crate::estimate::Estimate;
use crate::predict::Predictor;

/// What varies between trials, and how far prices may be off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trials {
    /// How many.
    pub trials: usize,
    /// Mean time to first token, seconds.
    pub ttft_s: Estimate,
    /// Mean time per output token, seconds.
    pub tpot_s: Estimate,
    /// 99th percentile of the time between tokens, seconds.
    pub itl_p99_s: Estimate,
    /// Output tokens per second of all users.
    pub tokens_per_s: Estimate,
    /// Requests per second that meet all goals; absent without goals.
    pub goodput: Option<Estimate>,
}

/// Runs so many trials: the first as asked, the others with the seeds after its own. Intervals hold what differs between
/// them, what prices may be off, and what a whole system adds.
///
/// # Errors
/// Those of [`simulate`](super::simulate()).
pub fn trials(
    predictor: &mut Predictor,
    simulation: &Simulation,
    trials: usize,
) -> Result<(Simulated, Trials), PlannerError> {
    let kv_tokens = room(predictor, simulation)?;
    // Seeds differ in when requests come, and not in who serves.
    let pace = pace(predictor, simulation, kv_tokens)?;
    let mut simulate = |simulation: &Simulation| run(predictor, simulation, kv_tokens, pace, &mut |_| ());
    let mut all = vec![simulate(simulation)?];
    for trial in 1..trials.max(1) as u64 {
        let seed = simulation.workload.seed.wrapping_add(trial);
        let workload = Workload { seed, ..simulation.workload.clone() };
        let stragglers = simulation.stragglers.map(|seed| seed.wrapping_add(trial));
        all.push(simulate(&Simulation { workload: &workload, stragglers, ..*simulation })?);
    }
    let Simulated { ttft_sd, tpot_sd, .. } = all[0];
    let of = |sd: f64, of: &dyn Fn(&Simulated) -> f64| {
        let values: Vec<f64> = all.iter().map(of).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance =
            values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() - 1).max(1) as f64;
        let between = if mean > 0.0 { variance / (mean * mean) } else { 0.0 };
        Estimate::new(mean, (between + sd * sd).sqrt())
    };
    let summary = Trials {
        trials: all.len(),
        ttft_s: of(ttft_sd, &|one| one.ttft_s.mean),
        tpot_s: of(tpot_sd, &|one| one.tpot_s.mean),
        itl_p99_s: of(tpot_sd, &|one| one.itl_s.p99),
        tokens_per_s: of(tpot_sd, &|one| one.tokens_per_s),
        goodput: all[0].goodput.map(|_| of(tpot_sd, &|one| one.goodput.map_or(0.0, |goodput| goodput.requests_per_s))),
    };
    Ok((all.swap_remove(0), summary))
}
