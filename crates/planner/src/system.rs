//! From iterations to what users see: nothing more, or what a serving program that was measured makes of them.

use crate::PlannerError;
use crate::calibration::case::Case;
use crate::calibration::{Calibration, Target};
use crate::cost::Stack;
use crate::estimate::Estimate;
use crate::iteration::{Iteration, Iterations, Layout};
use crate::serving::{Requests, Serving};

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum System {
    /// A program whose deployments were measured; the one that prices of kernels are of.
    Measured,
    /// One of which nothing was measured: what users see is what iterations take, and a system adds uncertainty only.
    Unmeasured {
        /// Standard deviation of the natural logarithm of the time to first token.
        ttft_sd: f64,
        /// The same of the time per output token.
        tpot_sd: f64,
    },
}

impl System {
    /// An unmeasured system, as it is judged: a factor of 1.2 for a token and 1.4 for the first one in nine of ten cases.
    pub const UNMEASURED: System = System::Unmeasured { ttft_sd: 0.2, tpot_sd: 0.11 };

    /// The system of a stack: measured, where a program that serves was.
    pub fn of(stack: Stack) -> System {
        match stack {
            Stack::Trtllm | Stack::Vllm | Stack::Sglang => System::Measured,
            _ => System::UNMEASURED,
        }
    }

    /// What users see of a steady state; `kv_tokens` is what the KV cache of one group holds.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn seen(
        self,
        iterations: &mut Iterations,
        layout: &Layout,
        requests: &Requests,
        kv_tokens: f64,
        serving: &Serving,
    ) -> Result<Seen, PlannerError> {
        match self {
            System::Unmeasured { ttft_sd, tpot_sd } => Ok(Seen::unmeasured(serving, ttft_sd, tpot_sd)),
            System::Measured => {
                Ok(Seen::measured(&Case::of_plan(iterations, layout, requests, kv_tokens, serving)?, serving))
            }
        }
    }
}

/// What users see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// Time to first token, seconds.
    pub ttft: Estimate,
    /// Time per output token after the first, seconds.
    pub tpot: Estimate,
}

/// Standard deviation of the natural logarithm of a step, because prices are not exact.
fn price_sd(serving: &Serving) -> f64 {
    serving.mean(|iteration: &Iteration| iteration.deviation / iteration.seconds)
}

impl Seen {
    /// What iterations take, with what prices may be off and such standard deviations of a whole system.
    pub fn unmeasured(serving: &Serving, ttft_sd: f64, tpot_sd: f64) -> Seen {
        let own = price_sd(serving);
        Seen {
            ttft: Estimate::new(serving.ttft, ttft_sd.hypot(own)),
            tpot: Estimate::new(serving.tpot, tpot_sd.hypot(own)),
        }
    }

    /// What measurements say of a deployment.
    fn measured(case: &Case, serving: &Serving) -> Seen {
        let of = |target: Target| {
            let estimate = Calibration::published().predict(case, target).at_least(target.least(case));
            // What prices of measured GPUs err is among what the measurements show.
            if case.on_measured_system() { estimate } else { estimate.widened(price_sd(serving)) }
        };
        Seen { ttft: of(Target::Ttft), tpot: of(Target::Tpot) }
    }

    /// After a change that nobody measured: what the program adds to its iterations stays, and what it saves, it saves again.
    pub fn changed(&self, before: &Serving, after: &Serving) -> Seen {
        let of = |seen: &Estimate, before: f64, after: f64| {
            let added = (seen.value - before).max(0.0);
            seen.times((after + added) / (before + added))
        };
        Seen { ttft: of(&self.ttft, before.ttft, after.ttft), tpot: of(&self.tpot, before.tpot, after.tpot) }
    }

    /// Output tokens per second: those of the steady state, by how much longer a request takes than there (Little's law).
    pub fn throughput(&self, serving: &Serving, requests: &Requests) -> f64 {
        let request = |ttft: f64, tpot: f64| ttft + (requests.output - 1.0).max(0.0) * tpot;
        serving.throughput * request(serving.ttft, serving.tpot) / request(self.ttft.value, self.tpot.value)
    }

    /// By how much longer steps take than iterations.
    pub fn pace(&self, serving: &Serving) -> f64 {
        self.tpot.value / serving.tpot
    }
}
