//! The questions that claims ask of the planner, for one model on one cluster.

use std::sync::Arc;

use moesaic_plan::Collective;
use moesaic_spec::{Cluster, DType, ModelSpec};
use serde::Serialize;

use super::claim::Better;
use super::physics::Physics;
use crate::PlannerError;
use crate::cost::{CostModel, Precision, Stack};
use crate::estimate::Estimate;
use crate::iteration::dag::Slot;
use crate::iteration::{Batch, Formats, Iteration, Iterations, Layout};
use crate::load::{ExpertLoad, LoadModel};
use crate::network::{Library, Network};
use crate::predict::{Basis, Prediction};
use crate::report::format::percent;
use crate::serving::{Requests, Serving};
use crate::system::Seen;

/// What one step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Every sequence gets one more token.
    Decode,
    /// Prompts are read.
    Prefill,
}

/// A deployment at work.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// How the model is spread.
    pub layout: Layout,
    /// Sequences, over all data-parallel groups.
    pub seqs: f64,
    /// Tokens of each in the cache, or of each prompt.
    pub context: f64,
    /// What it does.
    pub phase: Phase,
}

impl Case {
    /// Decoding.
    pub fn decode(layout: &Layout, seqs: f64, context: f64) -> Case {
        Case { layout: layout.clone(), seqs, context, phase: Phase::Decode }
    }

    /// Reading prompts.
    pub fn prefill(layout: &Layout, seqs: f64, context: f64) -> Case {
        Case { layout: layout.clone(), seqs, context, phase: Phase::Prefill }
    }

    /// Tokens that a step gains or reads.
    pub fn tokens(&self) -> f64 {
        match self.phase {
            Phase::Decode => self.seqs,
            Phase::Prefill => self.seqs * self.context,
        }
    }

    fn batch(&self) -> Batch {
        let seqs = self.seqs / self.layout.dp as f64;
        match self.phase {
            Phase::Decode => Batch::decode(seqs, self.context),
            Phase::Prefill => Batch::prefill(seqs, self.context),
        }
    }
}

/// What a claim is a figure of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// Seconds of a step: the time per output token while decoding.
    Step,
    /// Tokens per second of all sequences.
    TokensPerS,
    /// The same for each GPU.
    TokensPerSGpu,
    /// Share of the time in which a GPU (with attention) computes.
    Utilization,
    /// Model FLOPs utilization.
    Mfu,
    /// Share of the time that communication takes, hidden or not.
    Communication,
    /// The same of one class.
    CommunicationOf(Collective),
    /// Share of the time in which a GPU does nothing but communicate or wait.
    Exposed,
    /// Joules of a token.
    Energy,
    /// Bytes of the fullest GPU.
    Memory,
}

/// The best that bytes and operations allow.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bound {
    /// In SI units.
    pub value: f64,
    /// How it is worked out.
    pub arithmetic: String,
    /// Nothing can be better; otherwise it says what two deployments would have at their own bounds.
    pub limits: bool,
}

impl Bound {
    /// Nothing can be better.
    pub fn limit(value: f64, arithmetic: impl Into<String>) -> Bound {
        Bound { value, arithmetic: arithmetic.into(), limits: true }
    }
}

/// What is predicted under one reading of a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// What the text leaves open, and is assumed here; empty where nothing is.
    pub assuming: String,
    /// The prediction.
    pub estimate: Estimate,
    /// What physics allows.
    pub bound: Option<Bound>,
    /// Where the time goes.
    pub binds: String,
    /// Whether it fits in the GPUs' memory; what does not is no way to hold.
    pub fits: bool,
}

impl Answer {
    /// From a closed form.
    pub fn known(assuming: impl Into<String>, estimate: Estimate) -> Answer {
        Answer { assuming: assuming.into(), estimate, bound: None, binds: String::new(), fits: true }
    }

    /// A number that has no spread: a count, or what a sum gives.
    pub fn exact(assuming: impl Into<String>, value: f64) -> Answer {
        Answer::known(assuming, Estimate { value, low: value, high: value })
    }

    /// With a bound.
    #[must_use]
    pub fn bounded(self, bound: Bound) -> Answer {
        Answer { bound: Some(bound), ..self }
    }

    /// No end of an interval is beyond what physics allows.
    pub(super) fn within_physics(mut self, better: Better) -> Answer {
        if let Some(limit) = self.bound.as_ref().filter(|bound| bound.limits).map(|bound| bound.value) {
            let Estimate { low, high, .. } = self.estimate;
            self.estimate = match better {
                Better::Less => Estimate { low: low.max(limit), high: high.max(limit), ..self.estimate },
                Better::More => Estimate { low: low.min(limit), high: high.min(limit), ..self.estimate },
            };
        }
        self
    }
}

/// Standard deviation of the logarithm that a whole system adds to its parts: a judgement, schedulers and frameworks cost
/// served models a factor of 1.3 either way in nine of ten cases.
const SYSTEM_SD: f64 = 0.15;

/// How much of their errors two predictions on the same hardware share: a judgement.
const SHARED_ERROR: f64 = 0.5;

/// One model on one cluster.
pub struct Lab<'a> {
    iterations: Iterations<'a>,
    network: Network,
}

impl<'a> Lab<'a> {
    /// Routers choose evenly.
    ///
    /// # Errors
    /// [`PlannerError::Load`]: the model's experts are none.
    pub fn new(model: &'a ModelSpec, cluster: &'a Cluster) -> Result<Lab<'a>, PlannerError> {
        let moe = model.layers.iter().find_map(|ffn| ffn.as_moe());
        let even = |moe: &moesaic_spec::Moe| ExpertLoad::new(LoadModel::Uniform, moe.num_experts, moe.top_k);
        let load = moe.map(even).transpose()?.map(Arc::new);
        let network = Network::new(cluster, Library::Nccl);
        let costs = CostModel::new(&cluster.gpu, Stack::default());
        Ok(Lab { iterations: Iterations::new(model, cluster, formats(model), costs, network.clone(), load), network })
    }

    /// Prices of iterations.
    pub fn iterations(&mut self) -> &mut Iterations<'a> {
        &mut self.iterations
    }

    /// Prices of communication.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The model.
    pub fn model(&self) -> &'a ModelSpec {
        self.iterations.model()
    }

    /// The cluster.
    pub fn cluster(&self) -> &'a Cluster {
        self.iterations.cluster()
    }

    /// All figures of a case that does the same step again and again, and the step.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn predict(&mut self, case: &Case) -> Result<(Prediction, Iteration), PlannerError> {
        let batch = case.batch();
        let step = self.iterations.price(&case.layout, &batch)?;
        let footprint = self.iterations.footprint(&case.layout, batch.rows())?;
        let requests = Requests {
            input: case.context,
            output: 0.0,
            concurrency: case.seqs,
            prefix_hit: 0.0,
            step_tokens: batch.rows(),
            common_rhythm: true,
        };
        let serving = Serving {
            ttft: step.seconds,
            tpot: step.seconds,
            longest_itl: step.seconds,
            throughput: case.tokens() / step.seconds,
            running: case.seqs,
            decode: step,
            mixed: step,
            mixed_share: 0.0,
        };
        let prediction = Prediction::new(&Basis {
            layout: &case.layout,
            cluster: self.cluster(),
            formats: self.iterations.formats(),
            requests: &requests,
            footprint: &footprint,
            serving: &serving,
            seen: &Seen::unmeasured(&serving, SYSTEM_SD, SYSTEM_SD),
        });
        Ok((prediction, step))
    }

    /// A figure of a case.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn ask(&mut self, figure: Figure, case: &Case, assuming: impl Into<String>) -> Result<Answer, PlannerError> {
        let (prediction, step) = self.predict(case)?;
        let physics = Physics::of(self.model(), self.cluster(), self.iterations.formats(), case);
        let bound = match figure {
            Figure::Step => Some(physics.step()),
            Figure::TokensPerS => Some(physics.tokens_per_s(1.0)),
            Figure::TokensPerSGpu => Some(physics.tokens_per_s(case.layout.ranks() as f64)),
            Figure::Utilization => Some(Bound::limit(1.0, "all of the time")),
            Figure::Mfu => Some(physics.mfu()),
            Figure::Energy => physics.energy(),
            Figure::Memory => Some(physics.memory()),
            Figure::Communication | Figure::CommunicationOf(_) | Figure::Exposed => None,
        };
        let memory = fullest(&prediction);
        let room = prediction.gpu_memory;
        let mut binds = binding(&step);
        // Memory itself is no reason to refuse a figure of memory.
        let fits = memory <= room || figure == Figure::Memory;
        if !fits {
            let [memory, room] = [memory, room].map(|bytes| super::claim::unit::GB.show(bytes));
            binds = format!("does not fit ({memory} of {room}); {binds}");
        }
        Ok(Answer { assuming: assuming.into(), estimate: value(figure, &prediction, memory), bound, binds, fits })
    }

    /// How many times a figure is another's; `both` says what is assumed of both.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn ratio(
        &mut self,
        figure: Figure,
        [of, to]: [&Case; 2],
        assuming: impl Into<String>,
    ) -> Result<Answer, PlannerError> {
        let [of, to] = [self.ask(figure, of, "")?, self.ask(figure, to, "")?];
        let sd = ln_sd(&of.estimate).hypot(ln_sd(&to.estimate)) * (1.0 - SHARED_ERROR).sqrt();
        let estimate = Estimate::new(of.estimate.value / to.estimate.value, sd);
        let bound = of.bound.zip(to.bound).map(|(of, to)| Bound {
            value: of.value / to.value,
            arithmetic: format!("both at their bounds: ({}) by ({})", of.arithmetic, to.arithmetic),
            limits: false,
        });
        let binds = format!("{}; of the other: {}", of.binds, to.binds);
        Ok(Answer { assuming: assuming.into(), estimate, bound, binds, fits: of.fits && to.fits })
    }
}

impl Answer {
    /// From "how many times" to "how much more".
    #[must_use]
    pub fn more(self) -> Answer {
        self.map(|ratio| ratio - 1.0)
    }

    /// From "how many times" to "how much less".
    #[must_use]
    pub fn less(self) -> Answer {
        self.map(|ratio| 1.0 - ratio)
    }

    fn map(self, f: impl Fn(f64) -> f64) -> Answer {
        let [value, a, b] = [self.estimate.value, self.estimate.low, self.estimate.high].map(&f);
        let bound = self.bound.map(|bound| Bound { value: f(bound.value), ..bound });
        Answer { estimate: Estimate { value, low: a.min(b), high: a.max(b) }, bound, ..self }
    }
}

/// What the texts' types mean for weights and cache.
pub fn formats(model: &ModelSpec) -> Formats {
    let precision = if model.dtype == DType::F8E4M3 { Precision::Fp8 } else { Precision::Bf16 };
    Formats { dense: precision, experts: precision, kv: precision }
}

/// Bytes of the fullest rank.
fn fullest(prediction: &Prediction) -> f64 {
    prediction.expert_memory.iter().map(crate::memory::Memory::total).fold(prediction.memory.total(), f64::max)
}

fn value(figure: Figure, prediction: &Prediction, memory: f64) -> Estimate {
    let sd = ln_sd(&prediction.tpot_s);
    let communication = |class: Option<Collective>| -> f64 {
        let of = prediction.communication.iter().filter(|share| class.is_none_or(|class| share.class == class));
        of.map(|share| share.total).sum()
    };
    match figure {
        Figure::Step => prediction.tpot_s,
        Figure::TokensPerS => prediction.tokens_per_s,
        Figure::TokensPerSGpu => prediction.tokens_per_s_gpu,
        Figure::Utilization => share(prediction.gpu_utilization, sd),
        Figure::Mfu => Estimate::new(prediction.mfu, sd),
        Figure::Communication => share(communication(None), sd),
        Figure::CommunicationOf(class) => share(communication(Some(class)), sd),
        Figure::Exposed => share(1.0 - prediction.gpu_utilization, sd),
        Figure::Energy => Estimate::new(prediction.energy_j.map_or(f64::NAN, |energy| energy.total), sd),
        Figure::Memory => Estimate { value: memory, low: memory, high: memory },
    }
}

/// A share of the time whose part is wrong by so much against the rest.
fn share(value: f64, sd: f64) -> Estimate {
    let odds = Estimate::new(1.0, sd);
    let at = |odds: f64| odds * value / (odds * value + (1.0 - value));
    if value < 1.0 { Estimate { value, low: at(odds.low), high: at(odds.high) } } else { Estimate::new(value, sd) }
}

/// Standard deviation of an estimate's logarithm.
fn ln_sd(estimate: &Estimate) -> f64 {
    if estimate.low > 0.0 { estimate.sd() } else { 0.0 }
}

/// What most of a step's time goes to.
fn binding(step: &Iteration) -> String {
    let of = |slots: &[Slot]| slots.iter().map(|&slot| step.slots[slot]).sum::<f64>();
    let parts = [
        ("attention", of(&[Slot::Attention])),
        ("experts", of(&[Slot::Experts, Slot::Combine, Slot::Route, Slot::SharedExpert])),
        ("dense MLPs", of(&[Slot::Mlp])),
        ("logits", of(&[Slot::Head, Slot::Sample, Slot::Embed])),
        ("all-reduce", step.communication(Collective::AllReduce)),
        ("all-to-all", step.communication(Collective::AllToAll)),
        ("gathering rows", step.communication(Collective::AllGather)),
        ("sends between stages", step.communication(Collective::SendReceive)),
    ];
    let all: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
    let (name, seconds) = parts.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("parts");
    format!("{name} is {}% of a GPU's work", percent((seconds / all * 100.0).round() / 100.0))
}
