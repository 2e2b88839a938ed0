//! What binds a plan, and what would help: the same plan with one thing changed, predicted anew.

mod change;
mod text;

use std::sync::Arc;

use moesaic_spec::{Cluster, ModelSpec};
use serde::{Deserialize, Serialize};

pub use change::Change;

use crate::PlannerError;
use crate::iteration::dag::Slot;
use crate::iteration::{Iteration, Layout};
use crate::load::ExpertLoad;
use crate::predict::{Prediction, Predictor, Pricing};
use crate::serving::{Requests, Serving};
use crate::system::{Seen, System};

/// A plan and what it serves.
#[derive(Clone, Debug)]
pub struct Given<'a> {
    /// The model.
    pub model: &'a ModelSpec,
    /// On what.
    pub cluster: Cluster,
    /// How it is spread.
    pub layout: Layout,
    /// What is asked.
    pub requests: Requests,
    /// How unevenly experts are loaded.
    pub load: Option<Arc<ExpertLoad>>,
    /// Share of a GPU's memory that may be used.
    pub utilization: f64,
    /// By whose measurements ops and links are priced.
    pub pricing: Pricing,
    /// Who serves.
    pub system: System,
}

impl Given<'_> {
    fn predict(&self) -> Result<(Serving, Prediction), PlannerError> {
        let predictor = Predictor::new(self.model, &self.cluster, self.pricing.clone(), self.load.clone());
        let mut predictor = Predictor { utilization: self.utilization, system: self.system, ..predictor };
        predictor.predict_serving(&self.layout, &self.requests)
    }
}

/// A part of an iteration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// Which.
    pub name: String,
    /// Seconds of it, by the iteration's. What overlaps counts twice, so all may be more than 1.
    pub share: f64,
    /// What would make it shorter, most of all.
    pub bound: Option<Bound>,
}

/// What a part waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Arithmetic.
    Compute,
    /// Memory traffic.
    Memory,
    /// Starting kernels, and links' latency.
    Latency,
    /// Links inside nodes.
    IntraNode,
    /// Links between nodes.
    InterNode,
}

/// What changes with one thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WhatIf {
    /// What is changed.
    pub change: Change,
    /// Users at a time.
    pub concurrency: f64,
    /// GPUs.
    pub gpus: usize,
    /// Time to first token, seconds.
    pub ttft_s: f64,
    /// Time per output token, seconds.
    pub tpot_s: f64,
    /// Output tokens per second.
    pub tokens_per_s: f64,
    /// Time per output token against the plan as it is: -0.1 is 10 % less.
    pub tpot_gain: f64,
    /// Output tokens per second against the plan as it is: 0.1 is 10 % more.
    pub throughput_gain: f64,
}

/// What binds a plan, and what would help.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explained {
    /// As it is.
    pub prediction: Prediction,
    /// Seconds of a step, as users see it, by those of its iteration: what the program adds, or saves.
    pub pace: f64,
    /// Seconds of an iteration without prompts.
    pub decode_s: f64,
    /// Seconds of one that reads prompts, too.
    pub mixed_s: f64,
    /// Share of iterations that read prompts.
    pub mixed_share: f64,
    /// Of an iteration in the mean: parts, the longest first.
    pub parts: Vec<Share>,
    /// Share of an iteration in which a rank with attention does not compute.
    pub exposed: f64,
    /// Share of the time per token that is waited for the fullest rank, by the prediction with even experts.
    pub straggler: f64,
    /// Changes by what they bring, the most throughput first.
    pub what_ifs: Vec<WhatIf>,
}

/// Least share of an iteration that is listed.
const LISTED: f64 = 0.002;

/// Parts as people know them, and what they are made of.
const PARTS: [(&str, &[Slot]); 10] = [
    ("attention", &[Slot::Attention]),
    ("routed experts", &[Slot::Experts]),
    ("shared experts", &[Slot::SharedExpert]),
    ("dense MLPs", &[Slot::Mlp]),
    ("router and combine", &[Slot::Route, Slot::Combine]),
    ("embedding, head, sampling", &[Slot::Embed, Slot::Head, Slot::Sample]),
    ("exchange of rows (all-to-all)", &[Slot::Dispatch, Slot::Relay, Slot::Answer]),
    ("sums (all-reduce)", &[Slot::SumNorm, Slot::SumAttention, Slot::SumMlp]),
    ("gathers (all-gather)", &[Slot::AllGather, Slot::GatherLogits]),
    ("to the next stage (send)", &[Slot::Hidden]),
];

/// Looks at a plan from all sides.
///
/// # Errors
/// [`PlannerError`]: the plan as it is does not fit, or the model cannot be spread like this. Changes that do not fit are left
/// out.
pub fn explain(given: &Given) -> Result<Explained, PlannerError> {
    let (serving, prediction) = given.predict()?;
    let seen = Seen { ttft: prediction.ttft_s, tpot: prediction.tpot_s };
    // Nobody measured what is changed, so its effect is told from what iterations take.
    let bare = Given { system: System::UNMEASURED, ..given.clone() };
    let mut what_ifs = Vec::new();
    let mut faster = Vec::new();
    for change in Change::ALL {
        let Some(changed) = change.applied(&bare) else { continue };
        let (changed_serving, after) = match changed.predict() {
            Ok(predicted) => predicted,
            // Half of the memory per user, say: no help, and no reason to say nothing of the rest.
            Err(PlannerError::DoesNotFit { .. }) => continue,
            Err(other) => return Err(other),
        };
        if let Some(bound) = change.lifts() {
            faster.push((bound, changed_serving));
        }
        let changed_seen = seen.changed(&serving, &changed_serving);
        let tokens_per_s = changed_seen.throughput(&changed_serving, &changed.requests);
        what_ifs.push(WhatIf {
            change,
            concurrency: changed.requests.concurrency,
            gpus: after.gpus,
            ttft_s: changed_seen.ttft.value,
            tpot_s: changed_seen.tpot.value,
            tokens_per_s,
            tpot_gain: changed_seen.tpot.value / seen.tpot.value - 1.0,
            throughput_gain: tokens_per_s / prediction.tokens_per_s.value - 1.0,
        });
    }
    what_ifs.sort_by(|a, b| b.throughput_gain.total_cmp(&a.throughput_gain));
    let even = Given { load: None, ..bare }.predict()?.0;
    let seconds = serving.iteration_s();
    Ok(Explained {
        pace: seen.pace(&serving),
        decode_s: serving.decode.seconds,
        mixed_s: serving.mixed.seconds,
        mixed_share: serving.mixed_share,
        parts: parts(&serving, &faster),
        exposed: serving.mean(Iteration::exposed) / seconds,
        straggler: (1.0 - even.tpot / serving.tpot).max(0.0),
        what_ifs,
        prediction,
    })
}

/// Each part with its share, and with the change that makes it shortest.
fn parts(serving: &Serving, faster: &[(Bound, Serving)]) -> Vec<Share> {
    let of = |serving: &Serving, slots: &[Slot]| {
        // At the plan's own share of prompts, or a change of the batch would count as one of the part.
        let sum = |iteration: &Iteration| slots.iter().map(|&slot| iteration.slots[slot]).sum::<f64>();
        (1.0 - serving.mixed_share) * sum(&serving.decode) + serving.mixed_share * sum(&serving.mixed)
    };
    let part = |(name, slots): (&str, &[Slot])| {
        let own = of(serving, slots);
        let gains = faster.iter().map(|(bound, after)| {
            let kept = Serving { mixed_share: serving.mixed_share, ..*after };
            (*bound, 1.0 - of(&kept, slots) / own)
        });
        let most = gains.max_by(|a, b| a.1.total_cmp(&b.1)).filter(|&(_, gain)| gain > 0.02);
        Share { name: name.to_owned(), share: own / serving.iteration_s(), bound: most.map(|(bound, _)| bound) }
    };
    let mut parts: Vec<Share> = PARTS.into_iter().map(part).filter(|part| part.share > LISTED).collect();
    parts.sort_by(|a, b| b.share.total_cmp(&a.share));
    parts
}
