//! What a search found, with its reasons: as data, JSON, text for a terminal, and one HTML page that needs nothing else.

mod html;
mod text;

use moesaic_plan::plan::{Interval, Prediction as Expected};
use moesaic_plan::{PlanFile, Strategy};
use moesaic_spec::Workload;
use serde::{Deserialize, Serialize};

use super::format::{number, percent, seconds};
use super::{ClusterFacts, ModelFacts, WorkloadFacts};
use crate::PlannerError;
use crate::calibration::Calibration;
use crate::estimate::Estimate;
use crate::predict::{Prediction, Predictor};
use crate::search::file::{Limits, Names, plan_file};
use crate::search::pools::{Pair, Workers};
use crate::search::{Counts, Found, Goals, Podium, Point, Regret, Search, by_tpot, by_ttft, regret};
use crate::serving::Requests;

/// Version of the format.
pub const VERSION: u32 = 1;

/// A search's result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Planning {
    /// [`VERSION`].
    pub version: u32,
    /// What is to be served.
    pub model: ModelFacts,
    /// On what.
    pub cluster: ClusterFacts,
    /// For whom.
    pub workload: WorkloadFacts,
    /// GPUs that may be used, from and to.
    pub gpus: (usize, usize),
    /// What a plan must reach.
    pub goals: Goals,
    /// GPUs that may fail meanwhile.
    pub tolerate_failures: usize,
    /// Most output tokens per second and GPU within the goals.
    pub best: Proposal,
    /// The best of other ranks.
    pub runner_up: Option<Proposal>,
    /// What trusting the prediction costs if the runner-up is the better one.
    pub regret: Option<Regret>,
    /// By time per output token: what nothing beats in that and throughput.
    pub frontier: Vec<Proposal>,
    /// By time to first token: what nothing beats in that and throughput.
    pub ttft_frontier: Vec<Proposal>,
    /// Each strategy's best, and why it is not the best of all.
    pub strategies: Vec<Verdict>,
    /// The best of prompts and answers on GPUs of their own, where that was looked for and something keeps the goals.
    pub pools: Option<Pools>,
    /// How much was searched.
    pub counts: Counts,
    /// What all figures assume.
    pub assumptions: Vec<String>,
}

/// A plan with what is expected of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// The plan of one copy.
    pub plan: PlanFile,
    /// Times that it runs side by side; users are shared out.
    pub copies: usize,
    /// Of all copies together; GPUs include those that are left over.
    pub prediction: Prediction,
    /// What limits it, in a sentence.
    pub binds: String,
}

/// Workers that read and workers that answer, told by iterations alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pools {
    /// The plan of one worker that reads.
    pub prefill: PlanFile,
    /// How many of them.
    pub prefill_workers: usize,
    /// The plan of one worker that answers.
    pub decode: PlanFile,
    /// How many of them.
    pub decode_workers: usize,
    /// GPUs that are paid for.
    pub gpus: usize,
    /// Requests at a time, of all.
    pub concurrency: f64,
    /// Time to first token, seconds.
    pub ttft_s: Estimate,
    /// Time per output token after the first, seconds.
    pub tpot_s: Estimate,
    /// Output tokens per second of all.
    pub tokens_per_s: Estimate,
    /// The same for each GPU.
    pub tokens_per_s_gpu: Estimate,
    /// How much more that is than of ranks that do both, told by iterations alone, too: 0.1 is 10 % more. Absent where such ranks
    /// keep the goals with what a program adds only.
    pub gain: Option<f64>,
}

/// A strategy's best.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Its name.
    pub strategy: String,
    /// Its best plan within the goals, or the one that comes nearest to them; absent where none fits.
    pub proposal: Option<Proposal>,
    /// Why it is not the best of all, in a sentence.
    pub why: String,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq)]
pub enum NoPlan {
    /// Nothing fits.
    Nothing,
    /// Something fits, but nothing keeps the goals: what comes nearest.
    Goals(Box<Proposal>),
}

/// What plans are made of beside the search.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// What plan files call model, cluster and workload.
    pub names: Names<'a>,
    /// The workload.
    pub workload: &'a Workload,
    /// Rows of each frontier at most.
    pub top: usize,
}

impl Planning {
    /// Searches, and says what it finds.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be traced.
    pub fn new(
        search: &Search,
        predictor: &mut Predictor,
        setting: &Setting,
        assumptions: Vec<String>,
        with_pools: bool,
    ) -> Result<Result<Planning, NoPlan>, PlannerError> {
        let found = search.run_seen(predictor)?;
        let mut propose = |point: &Point| Proposal::new(point, search, predictor, setting, &assumptions);
        let Some(first) = found.best() else {
            return Ok(Err(match found.nearest(&search.goals) {
                None => NoPlan::Nothing,
                Some(near) => NoPlan::Goals(Box::new(propose(near)?)),
            }));
        };
        let best = propose(first)?;
        let runner_up = found.runner_up().map(&mut propose).transpose()?;
        let rate = |proposal: &Proposal| proposal.prediction.tokens_per_s_gpu;
        let shared = Calibration::published().shared(search.space.model);
        let regret = runner_up.as_ref().map(|second| regret(&rate(&best), &rate(second), shared));
        let mut of = |points: Vec<&Point>| {
            thinned(points, setting.top).into_iter().map(&mut propose).collect::<Result<Vec<_>, PlannerError>>()
        };
        let frontier = of(by_tpot(&found.frontier))?;
        let ttft_frontier = of(by_ttft(&found.frontier))?;
        let strategies = verdicts(&found, search, &best, &mut propose)?;
        let pair = if with_pools { search.best_pair(&mut predictor.iterations)? } else { None };
        let pools = match pair {
            Some(pair) => {
                let together = search.run(&mut predictor.iterations)?.best().map(|point| point.merit().throughput);
                Some(Pools::new(&pair, together, search, setting))
            }
            None => None,
        };
        let mut assumptions = assumptions;
        if with_pools && pools.is_none() {
            assumptions.push(
                "No split of the GPUs into those that read and those that answer fits and keeps the goals.".to_owned(),
            );
        }
        Ok(Ok(Planning {
            version: VERSION,
            model: ModelFacts::of(setting.names.model, search.space.model),
            cluster: ClusterFacts::of(search.space.cluster),
            workload: WorkloadFacts::of(setting.workload),
            gpus: (*search.space.gpus.start(), *search.space.gpus.end()),
            goals: search.goals,
            tolerate_failures: search.space.tolerate_failures,
            best,
            runner_up,
            regret,
            frontier,
            ttft_frontier,
            strategies,
            pools,
            counts: found.counts,
            assumptions,
        }))
    }

    /// Everything, on one line.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("reports have string keys only") + "\n"
    }

    /// For a terminal of 100 columns.
    pub fn to_text(&self) -> String {
        text::render(self)
    }

    /// A page with tables and plots that needs no other file, no network and no script.
    pub fn to_html(&self) -> String {
        html::render(self)
    }

    pub(crate) fn title(&self) -> String {
        format!("{} on {}: the best plan", self.model.name, self.cluster.name)
    }
}

impl Pools {
    fn new(pair: &Pair, together: Option<f64>, search: &Search, setting: &Setting) -> Pools {
        let answering = pair.concurrency / pair.decode.count as f64 / pair.decode.layout.dp as f64;
        let plan = |workers: &Workers, max_num_seqs: f64| {
            let limits = Limits {
                max_model_len: search.longest as usize,
                max_num_seqs: max_num_seqs.ceil() as usize,
                max_num_batched_tokens: search.requests.step_tokens as usize,
                utilization: search.utilization,
            };
            plan_file(&workers.layout, search.space.model, &setting.names, &limits)
        };
        let tokens_per_s = Estimate::new(pair.throughput, pair.seen.tpot.sd());
        Pools {
            prefill: plan(&pair.prefill, 1.0),
            prefill_workers: pair.prefill.count,
            decode: plan(&pair.decode, answering),
            decode_workers: pair.decode.count,
            gpus: pair.gpus,
            concurrency: pair.concurrency,
            ttft_s: pair.seen.ttft,
            tpot_s: pair.seen.tpot,
            tokens_per_s,
            tokens_per_s_gpu: tokens_per_s.times(1.0 / pair.gpus as f64),
            gain: together.map(|together| pair.rate() / together - 1.0),
        }
    }
}

/// First, last, and what lies evenly between.
fn thinned<T>(all: Vec<T>, most: usize) -> Vec<T> {
    let (count, most) = (all.len(), most.max(1));
    if count <= most {
        return all;
    }
    let wanted: Vec<usize> = (0..most).map(|idx| idx * (count - 1) / (most - 1).max(1)).collect();
    all.into_iter().enumerate().filter(|(idx, _)| wanted.contains(idx)).map(|(_, item)| item).collect()
}

impl Proposal {
    fn new(
        point: &Point,
        search: &Search,
        predictor: &mut Predictor,
        setting: &Setting,
        assumptions: &[String],
    ) -> Result<Proposal, PlannerError> {
        let copies = point.shape.copies as f64;
        let requests = Requests { concurrency: point.concurrency / copies, ..search.requests };
        let one = predictor.predict(&point.layout, &requests)?;
        let limits = Limits {
            max_model_len: search.longest as usize,
            max_num_seqs: (requests.concurrency / point.layout.dp as f64).ceil() as usize,
            max_num_batched_tokens: search.requests.step_tokens as usize,
            utilization: search.utilization,
        };
        let mut plan = plan_file(&point.layout, search.space.model, &setting.names, &limits);
        plan.prediction = Some(expected(&one, assumptions));
        // What is left over is paid for, too.
        let gpus = point.shape.gpus as f64;
        let paid = gpus / (copies * point.shape.ranks() as f64);
        let all = Prediction {
            gpus: point.shape.gpus,
            concurrency: point.concurrency,
            tokens_per_s: one.tokens_per_s.times(copies),
            tokens_per_s_gpu: one.tokens_per_s.times(copies / gpus),
            usd_per_million: one.usd_per_million.map(|usd| usd * paid),
            ..one
        };
        Ok(Proposal { plan, copies: point.shape.copies, binds: binds(&all), prediction: all })
    }

    /// Its name, and how often it runs.
    pub fn name(&self) -> String {
        if self.copies > 1 { format!("{} × {}", self.copies, self.plan.name) } else { self.plan.name.clone() }
    }

    /// Shares of the time: computing, communication that nothing hides, waiting for the rest.
    pub(crate) fn shares(&self) -> [f64; 3] {
        let computing = self.prediction.gpu_utilization.min(1.0);
        let exposed: f64 = self.prediction.communication.iter().map(|share| share.exposed).sum();
        let exposed = exposed.min(1.0 - computing);
        [computing, exposed, 1.0 - computing - exposed]
    }

    /// Communication that computing hides, as a share of the time.
    pub(crate) fn hidden(&self) -> f64 {
        self.prediction.communication.iter().map(|share| (share.total - share.exposed).max(0.0)).sum()
    }
}

/// The section of the plan file, to four digits.
fn expected(prediction: &Prediction, assumptions: &[String]) -> Expected {
    let interval = |estimate: &Estimate, factor: f64| {
        let [value, low, high] = [estimate.value, estimate.low, estimate.high].map(|figure| rounded(factor * figure));
        Interval { value, low, high }
    };
    let fullest = prediction.expert_memory.map_or(0.0, |memory| memory.total()).max(prediction.memory.total());
    Expected {
        concurrency: prediction.concurrency,
        ttft_ms: interval(&prediction.ttft_s, 1e3),
        tpot_ms: interval(&prediction.tpot_s, 1e3),
        tokens_per_s: interval(&prediction.tokens_per_s, 1.0),
        memory_gib: rounded(fullest / (1u64 << 30) as f64),
        assumptions: assumptions.to_vec(),
    }
}

fn rounded(figure: f64) -> f64 {
    format!("{figure:.3e}").parse().expect("a number as it was written")
}

/// What limits a plan.
fn binds(prediction: &Prediction) -> String {
    let exposed: f64 = prediction.communication.iter().map(|share| share.exposed).sum();
    let (mfu, mbu) = (prediction.mfu, prediction.mbu);
    let used = format!("{} % of the peak, {} % of the memory's bandwidth", percent_of(mfu), percent_of(mbu));
    let main = if exposed > 0.4 {
        format!("communication that nothing hides takes {} % of the time", percent_of(exposed))
    } else if prediction.gpu_utilization < 0.5 {
        format!("GPUs wait {} % of the time", percent_of(1.0 - prediction.gpu_utilization))
    } else if mbu > mfu {
        "weights and cache come from memory".to_owned()
    } else {
        "arithmetic".to_owned()
    };
    let uneven = match prediction.imbalance {
        imbalance if imbalance > 1.2 => {
            format!("; the fullest rank has {} times the mean rows", number(imbalance))
        }
        _ => String::new(),
    };
    format!("{main} ({used}){uneven}")
}

fn percent_of(share: f64) -> String {
    format!("{:.0}", 100.0 * share)
}

fn verdicts(
    found: &Found,
    search: &Search,
    best: &Proposal,
    propose: &mut impl FnMut(&Point) -> Result<Proposal, PlannerError>,
) -> Result<Vec<Verdict>, PlannerError> {
    let rate = |proposal: &Proposal| proposal.prediction.tokens_per_s_gpu.value;
    let verdict = |(strategy, podium): &(Strategy, Podium)| {
        let named = |proposal, why| Ok(Verdict { strategy: strategy.name().to_owned(), proposal, why });
        if let Some(first) = &podium.first {
            let own = propose(first)?;
            let behind = 1.0 - rate(&own) / rate(best);
            let why = match own.plan == best.plan {
                true => "the best".to_owned(),
                false => format!("{} % fewer tokens: {}", percent(rounded(behind)), own.binds),
            };
            return named(Some(own), why);
        }
        if let Some(near) = &podium.nearest {
            let (near, goals) = (propose(near)?, &search.goals);
            let missed = |name: &str, goal: Option<f64>, got: f64| {
                goal.filter(|&goal| got > goal).map(|goal| format!("{name} {} for {}", seconds(got), seconds(goal)))
            };
            let Prediction { ttft_s, tpot_s, .. } = &near.prediction;
            let missed = [missed("TTFT", goals.ttft, ttft_s.value), missed("TPOT", goals.tpot, tpot_s.value)];
            let missed: Vec<String> = missed.into_iter().flatten().collect();
            return named(Some(near), format!("keeps no goal: {} at best", missed.join(", ")));
        }
        let failing = search.space.tolerate_failures > 0;
        named(
            None,
            match podium.too_large {
                0 if failing => "tolerates no such failures on these GPUs, or not within the goals".to_owned(),
                0 => "not possible with this model and number of GPUs".to_owned(),
                _ if failing => "does not fit with what failures need held twice, or not within the goals".to_owned(),
                _ => "does not fit: a rank would hold more than its GPU".to_owned(),
            },
        )
    };
    found.strategies.iter().map(verdict).collect()
}
