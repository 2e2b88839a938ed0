//! What physics alone says of a served row: the row as a layout and requests, and their closed-form steady state.

use std::collections::HashMap;

use moesaic_plan::plan::{ExchangePrecision, Overlap};
use moesaic_spec::{Cluster, HubModel, ModelSpec, cluster_preset, preset_by_hub_name};
use serde::{Deserialize, Serialize};

use super::served::{Deployment, Served, Worker};
use crate::PlannerError;
use crate::cost::{CostModel, Precision, Stack};
use crate::iteration::{Batch, Cost, ExpertLayout, Formats, Iteration, Iterations, Layout};
use crate::memory::DEFAULT_UTILIZATION;
use crate::network::{Library, Network};
use crate::serving::{self, Pool, Requests, Serving};

/// Systems by the names that files have, and the clusters that they are.
const SYSTEMS: [(&str, &str); 3] = [("h100_sxm", "dgx-h100"), ("h200_sxm", "hgx-h200"), ("h800_sxm", "hgx-h800")];

/// Tokens of one step at most: what the backends take when nobody says otherwise.
const STEP_TOKENS: f64 = 8192.0;

/// A row that can be predicted.
#[derive(Clone, Debug)]
pub struct Case {
    /// What was measured.
    pub row: Served,
    /// The program.
    pub stack: Stack,
    /// Parameters of the model: those that one token meets, and all.
    pub params: (f64, f64),
    /// Types of weights and cache.
    pub formats: Formats,
    /// What physics says.
    pub physics: Physics,
}

/// What physics says of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Physics {
    /// Time to first token, seconds.
    pub ttft: f64,
    /// Time per output token, seconds.
    pub tpot: f64,
    /// One iteration that only answers, seconds.
    pub decode: f64,
    /// All iterations that read one prompt alone, seconds.
    pub prefill: f64,
    /// What the mean request waits more where all of a group ask at once, seconds.
    pub burst: f64,
    /// The part of `ttft` until the KV cache has room, seconds.
    pub crowd: f64,
    /// Requests that the KV cache holds, over those that are asked for; at most 1.
    pub fitting: f64,
    /// What no program beats: [`Physics::tpot`] at least, by the peak and the bandwidth, seconds.
    pub least_tpot: f64,
    /// The same of [`Physics::ttft`], seconds.
    pub least_ttft: f64,
}

/// A case without its row: what takes long to find out, and changes with prices only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    params: (f64, f64),
    formats: Formats,
    physics: Physics,
}

impl Case {
    /// What can be kept of it.
    pub fn asked(&self) -> Asked {
        Asked { params: self.params, formats: self.formats, physics: self.physics }
    }

    /// Again from what was kept. `None` for a row whose backend nobody knows.
    pub fn again(row: Served, asked: &Asked) -> Option<Case> {
        let Asked { params, formats, physics } = *asked;
        Some(Case { stack: Stack::of(&row.backend)?, row, params, formats, physics })
    }
}

/// Why a row is passed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Line of its file.
    pub line: usize,
    /// In words.
    pub why: String,
}

/// A row's names, resolved.
struct Resolved {
    stack: Stack,
    hub: HubModel,
    formats: Formats,
    cluster: &'static str,
    gpus: usize,
}

/// Asks physics about each row.
///
/// # Errors
/// In the place of a row: why it is passed over (a model, system, backend or type that nobody knows, or a model that cannot be
/// spread like this).
pub fn cases(rows: &[Served]) -> Vec<Result<Case, Skipped>> {
    let resolved: Vec<Result<Resolved, String>> = rows.iter().map(Resolved::of).collect();
    let mut models: HashMap<&str, ModelSpec> = HashMap::new();
    let mut clusters: HashMap<(&str, usize), Cluster> = HashMap::new();
    for found in resolved.iter().flatten() {
        let (name, gpus) = (found.cluster, found.gpus);
        models.entry(found.hub.preset.name).or_insert_with(|| found.hub.spec().expect("presets are tested"));
        let grown = || cluster_preset(name).and_then(|cluster| cluster.with_gpus(gpus)).expect("a preset, grown");
        clusters.entry((name, gpus)).or_insert_with(grown);
    }
    let mut all: HashMap<(Stack, &str, Formats, &str, usize), Iterations> = HashMap::new();
    let ask = |(row, found): (&Served, Result<Resolved, String>)| {
        let Resolved { stack, hub, formats, cluster, gpus } = found?;
        let preset = hub.preset.name;
        let iterations = all.entry((stack, preset, formats, cluster, gpus)).or_insert_with(|| {
            let cluster = &clusters[&(cluster, gpus)];
            let network = Network::new(cluster, Library::Custom);
            Iterations::new(&models[preset], cluster, formats, CostModel::new(&cluster.gpu, stack), network, None)
        });
        let physics = of_row(iterations, row).map_err(|error| error.to_string())?;
        Ok(Case { row: row.clone(), stack, params: iterations.params(), formats, physics })
    };
    let with_line =
        |(row, result): (&Served, Result<Case, String>)| result.map_err(|why| Skipped { line: row.line, why });
    let answers: Vec<_> = rows.iter().zip(resolved).map(ask).collect();
    rows.iter().zip(answers).map(with_line).collect()
}

impl Resolved {
    fn of(row: &Served) -> Result<Resolved, String> {
        let serves = |stack: &Stack| matches!(stack, Stack::Trtllm | Stack::Vllm | Stack::Sglang);
        let stack = Stack::of(&row.backend).filter(serves);
        let stack = stack.ok_or_else(|| format!("backend {:?} is not known; trtllm, vllm, sglang are", row.backend))?;
        let system = SYSTEMS.iter().find(|(name, _)| *name == row.system);
        let (_, cluster) = system.ok_or_else(|| {
            format!("system {:?} is not known; {} are", row.system, SYSTEMS.map(|(name, _)| name).join(", "))
        })?;
        let hub = preset_by_hub_name(&row.model).map_err(|error| error.to_string())?;
        let own = Formats::of(&hub.spec().map_err(|error| error.to_string())?);
        let dense = match weights(&row.dense)? {
            // Four bits are for experts where there are any.
            Some(Precision::F4 | Precision::Int4) | None => own.dense,
            Some(said) => said,
        };
        let experts = weights(&row.experts)?.unwrap_or(own.experts);
        let ranks = match row.deployment {
            Deployment::Aggregated(worker) => worker.ranks(),
            Deployment::Disaggregated { prefill, decode, .. } => prefill.ranks().max(decode.ranks()),
        };
        let gpus = ranks.next_multiple_of(8);
        if gpus > 1024 {
            return Err(format!("a worker of {ranks} GPUs; up to 1,024 are right"));
        }
        Ok(Resolved { stack, hub, formats: Formats { dense, experts, ..own }, cluster, gpus })
    }
}

/// The type that a row names; `None` where it leaves it to the model.
fn weights(name: &str) -> Result<Option<Precision>, String> {
    Ok(Some(match name {
        "" => return Ok(None),
        "float16" | "bfloat16" | "bf16" | "fp16" => Precision::Bf16,
        "fp8" | "fp8_static" => Precision::Fp8,
        "fp8_block" => Precision::Fp8Block,
        "nvfp4" | "mxfp4" | "w4a16_mxfp4" | "fp4" => Precision::F4,
        "int4_wo" | "int4" | "w4afp8" => Precision::Int4,
        _ => {
            return Err(format!(
                "type of weights {name:?} is not known; bfloat16, fp8, fp8_block, nvfp4, mxfp4, int4_wo are"
            ));
        }
    }))
}

/// How one worker spreads the model. With one attention group, backends sum the answers of whole experts instead of sending
/// rows.
fn layout(worker: Worker, model: &ModelSpec, gpus_per_node: usize) -> Layout {
    let Worker { tp, pp, dp, ep } = worker;
    let experts = match (model.num_moe_layers() > 0, dp) {
        (true, 1) if ep > 1 => ExpertLayout::Summed { ep: ep.min(tp) },
        (true, 2..) => ExpertLayout::Placed { ep: tp * dp },
        _ => ExpertLayout::Cut,
    };
    // Over several nodes, exchange is hidden behind the other half of the batch: DeepSeek's own system, SGLang's two-batch overlap.
    let halves = experts.exchanges() && worker.ranks() > gpus_per_node;
    Layout {
        tp,
        pp,
        dp,
        experts,
        micro_batches: if halves { 2 } else { pp },
        overlap: if halves { Overlap::MicroBatches } else { Overlap::None },
        precision: ExchangePrecision::Full,
        ..Layout::single(gpus_per_node)
    }
}

/// A layout's sizes.
fn worker(layout: &Layout) -> Worker {
    Worker { tp: layout.tp, pp: layout.pp, dp: layout.dp, ep: layout.expert_ranks() }
}

/// Which ranks serve.
#[derive(Clone, Copy, Debug)]
pub enum Spread<'l> {
    /// The same ranks read and answer.
    Aggregated(&'l Layout),
    /// Some read, some answer.
    Disaggregated {
        /// They read.
        prefill: Pool<'l>,
        /// They answer.
        decode: Pool<'l>,
    },
}

impl Physics {
    /// Of requests that are served like this.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn of(iterations: &mut Iterations, spread: Spread, requests: &Requests) -> Result<Physics, PlannerError> {
        let cluster = iterations.cluster();
        let tokens = requests.input + requests.output;
        let answers = match spread {
            Spread::Aggregated(layout) => layout,
            Spread::Disaggregated { decode, .. } => decode.layout,
        };
        let footprint = iterations.footprint(answers, requests.step_tokens)?;
        let budget = cluster.gpu.memory.0 as f64 * DEFAULT_UTILIZATION;
        // Who was measured did serve, so at least one request fits.
        let room = footprint.kv_tokens(budget).unwrap_or(tokens).max(tokens);
        match spread {
            Spread::Aggregated(layout) => {
                let serving = serving::aggregated(iterations, layout, requests, room)?;
                Physics::of_serving(iterations, layout, requests, room, &serving)
            }
            Spread::Disaggregated { prefill, decode } => {
                let transfer = serving::transfer_s(iterations, decode.layout, requests)?;
                let serving = serving::disaggregated(iterations, prefill, decode, requests, transfer)?;
                let groups = |pool: Pool| pool.workers * pool.layout.dp as f64;
                let reading = Reading::of(iterations, prefill.layout, requests)?;
                Ok(reading.physics(iterations, requests, room, &serving, [groups(prefill), groups(decode)]))
            }
        }
    }

    /// Of a steady state of ranks that read and answer; `kv_tokens` is what the KV cache of one group holds.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn of_serving(
        iterations: &mut Iterations,
        layout: &Layout,
        requests: &Requests,
        kv_tokens: f64,
        serving: &Serving,
    ) -> Result<Physics, PlannerError> {
        let reading = Reading::of(iterations, layout, requests)?;
        let groups = layout.dp as f64;
        let waiting = (requests.concurrency / serving.running - 1.0).max(0.0);
        let physics = reading.physics(iterations, requests, kv_tokens, serving, [groups; 2]);
        Ok(Physics { crowd: waiting * requests.output * serving.tpot, ..physics })
    }
}

/// One prompt, read alone.
struct Reading {
    iteration: Iteration,
    steps: f64,
}

impl Reading {
    fn of(iterations: &mut Iterations, layout: &Layout, requests: &Requests) -> Result<Reading, PlannerError> {
        let chunk = requests.input.min(requests.step_tokens);
        let iteration = iterations.price(layout, &Batch::prefill(1.0, chunk))?;
        Ok(Reading { iteration, steps: (requests.input / chunk).ceil() })
    }

    /// With the groups that read and that answer.
    fn physics(
        &self,
        iterations: &Iterations,
        requests: &Requests,
        kv_tokens: f64,
        serving: &Serving,
        [readers, answerers]: [f64; 2],
    ) -> Physics {
        let (gpu, formats) = (&iterations.cluster().gpu, iterations.formats());
        let peak = formats.experts.peak(gpu).max(formats.dense.peak(gpu));
        let least = |iteration: &Iteration| {
            let of = |cost: &Cost| (cost.flops / peak).max(cost.bytes / gpu.memory_bandwidth);
            of(&iteration.attention_rank).max(of(&iteration.expert_rank)).min(iteration.seconds)
        };
        let prefill = self.steps * self.iteration.seconds;
        let tokens = requests.input + requests.output;
        Physics {
            ttft: serving.ttft,
            crowd: 0.0,
            tpot: serving.tpot,
            decode: serving.decode.seconds,
            prefill,
            burst: prefill * requests.concurrency / readers / 2.0,
            fitting: (kv_tokens / tokens * answerers / requests.concurrency).min(1.0),
            least_tpot: least(&serving.decode),
            least_ttft: self.steps * least(&self.iteration) * (1.0 - requests.prefix_hit),
        }
    }
}

fn of_row(iterations: &mut Iterations, row: &Served) -> Result<Physics, PlannerError> {
    let requests = Requests {
        input: row.input,
        output: row.output,
        concurrency: row.concurrency,
        prefix_hit: 0.0,
        step_tokens: STEP_TOKENS,
        // They ask at once, with equal lengths.
        common_rhythm: true,
    };
    let (cluster, model) = (iterations.cluster(), iterations.model());
    let layout = |worker| layout(worker, model, cluster.gpus_per_node);
    match row.deployment {
        Deployment::Aggregated(worker) => Physics::of(iterations, Spread::Aggregated(&layout(worker)), &requests),
        Deployment::Disaggregated { prefill, decode, workers } => {
            let (of_prefill, of_decode) = workers.unwrap_or((1, 1));
            let (reads, answers) = (layout(prefill), layout(decode));
            let prefill = Pool { layout: &reads, workers: of_prefill as f64 };
            let decode = Pool { layout: &answers, workers: of_decode as f64 };
            Physics::of(iterations, Spread::Disaggregated { prefill, decode }, &requests)
        }
    }
}

impl Case {
    /// A plan that was never measured, as what the calibration asks: ranks that read and answer, on the stack that prices are
    /// of; with its steady state, and what the KV cache of one group holds.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn of_plan(
        iterations: &mut Iterations,
        layout: &Layout,
        requests: &Requests,
        kv_tokens: f64,
        serving: &Serving,
    ) -> Result<Case, PlannerError> {
        let physics = Physics::of_serving(iterations, layout, requests, kv_tokens, serving)?;
        let cluster = &iterations.cluster().name;
        let system = SYSTEMS.iter().find(|(_, name)| cluster.starts_with(name)).map_or("", |(system, _)| system);
        Ok(Case {
            row: Served {
                line: 0,
                id: String::new(),
                source: String::new(),
                backend: String::new(),
                version: String::new(),
                model: String::new(),
                system: system.to_owned(),
                dense: String::new(),
                experts: String::new(),
                deployment: Deployment::Aggregated(worker(layout)),
                input: requests.input,
                output: requests.output,
                concurrency: requests.concurrency,
                ttft_s: None,
                tpot_s: None,
            },
            stack: iterations.stack(),
            params: iterations.params(),
            formats: iterations.formats(),
            physics,
        })
    }

    /// Whether GPUs of its kind were measured.
    pub fn on_measured_system(&self) -> bool {
        !self.row.system.is_empty()
    }
}
