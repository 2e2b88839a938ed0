//! What a program that serves adds to iterations: steps take longer, and requests are late.

use super::{Simulated, Simulation};
use crate::PlannerError;
use crate::predict::Predictor;
use crate::serving::{self, Requests};
use crate::system::System;

/// How a system that serves differs from its iterations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pace {
    /// Seconds of a step, by those of its iteration.
    pub(super) factor: f64,
    /// Seconds from a question until the scheduler knows of it.
    pub(super) delay: f64,
    /// Standard deviation of the natural logarithm of the time to first token.
    pub(super) ttft_sd: f64,
    /// The same of the time per output token.
    pub(super) tpot_sd: f64,
}

impl Pace {
    /// Steps take what iterations take.
    const BARE: Pace = Pace { factor: 1.0, delay: 0.0, ttft_sd: 0.0, tpot_sd: 0.0 };

    /// What [`System`] makes of the workload's mean request in steady state. Where a program was measured, `run` simulates the
    /// workload: to know how many requests there are at a time where they come at a rate, and which time to first token comes
    /// from the scheduler alone. What measurements show beyond that is the program's own.
    pub(super) fn of(
        predictor: &mut Predictor,
        simulation: &Simulation,
        kv_tokens: f64,
        mut run: impl FnMut(&mut Predictor, Pace) -> Result<Simulated, PlannerError>,
    ) -> Result<Pace, PlannerError> {
        let Simulation { layout, workload, limits, .. } = *simulation;
        let step_tokens = limits.max_num_batched_tokens as f64;
        let requests = match (Requests::of(workload, step_tokens), predictor.system) {
            (Some(requests), _) => requests,
            (None, System::Unmeasured { .. }) => Requests::at(workload, step_tokens, 1.0),
            (None, System::Measured) => {
                let shown = run(predictor, Pace::BARE)?;
                // Little's law.
                let at_a_time = shown.requests_per_s * shown.e2e_s.mean;
                Requests::at(workload, step_tokens, at_a_time.max(1.0))
            }
        };
        let serving = serving::aggregated(&mut predictor.iterations, layout, &requests, kv_tokens)?;
        let seen = predictor.system.seen(&mut predictor.iterations, layout, &requests, kv_tokens, &serving)?;
        let pace = Pace { factor: seen.pace(&serving), delay: 0.0, ttft_sd: seen.ttft.sd(), tpot_sd: seen.tpot.sd() };
        Ok(match predictor.system {
            System::Unmeasured { .. } => pace,
            System::Measured => {
                let scheduled = run(predictor, pace)?.ttft_s.mean;
                Pace { delay: (seen.ttft.value - scheduled).max(0.0), ..pace }
            }
        })
    }
}
