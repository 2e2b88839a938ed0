//! What `simulate` and `explain` predict: a plan with its model, cluster, workload and the load of its experts.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use moesaic_plan::eplb::RoutingTrace;
use moesaic_plan::footprint::DEFAULT_BATCHED_TOKENS;
use moesaic_plan::{Plan, PlanFile};
use moesaic_planner::iteration::Layout;
use moesaic_planner::load::{ExpertLoad, LoadModel};
use moesaic_planner::memory::DEFAULT_UTILIZATION;
use moesaic_planner::predict::Predictor;
use moesaic_planner::tables::OwnTables;
use moesaic_spec::{Arrival, Cluster, ModelSpec, Workload};

use crate::args::PredictArgs;
use crate::{plans, tables};

/// A plan, checked, and what it serves.
pub(crate) struct Predicted {
    pub(crate) plan: Plan,
    pub(crate) model: ModelSpec,
    pub(crate) cluster: Cluster,
    pub(crate) workload: Workload,
    pub(crate) layout: Layout,
    pub(crate) load: Option<Arc<ExpertLoad>>,
    pub(crate) tables: Option<OwnTables>,
}

impl Predicted {
    /// Of a plan file, with what flags say otherwise.
    pub(crate) fn open(path: &Path, model: ModelSpec, mut file: PlanFile, args: &PredictArgs) -> Result<Predicted> {
        if let Some(cluster) = &args.cluster {
            file.cluster.clone_from(cluster);
        }
        if let Some(workload) = &args.workload {
            file.workload.clone_from(workload);
        }
        let cluster = plans::cluster(&file.cluster).with_context(|| path.display().to_string())?;
        let mut workload = plans::workload(&file.workload).with_context(|| path.display().to_string())?;
        if let Some(concurrency) = args.concurrency {
            ensure!(concurrency > 0, "--concurrency is 0; at least 1 is right");
            workload.arrival = Arrival::Closed { concurrency };
        }
        let plan = plans::resolve(file, &model, &cluster).with_context(|| path.display().to_string())?;
        let layout = Layout::of(&plan.file, &cluster);
        let load = load(&args.routing, &model)?;
        let tables = args.tables.as_deref().map(|dir| tables::open(dir, &cluster)).transpose()?;
        Ok(Predicted { plan, model, cluster, workload, layout, load, tables })
    }

    /// Share of a GPU's memory that may be used.
    pub(crate) fn utilization(&self) -> f64 {
        self.plan.file.memory.utilization.unwrap_or(DEFAULT_UTILIZATION)
    }

    /// Tokens of a step of one group.
    pub(crate) fn step_tokens(&self) -> usize {
        self.plan.file.memory.max_num_batched_tokens.unwrap_or(DEFAULT_BATCHED_TOKENS)
    }

    /// Predicts it.
    pub(crate) fn predictor(&self) -> Predictor<'_> {
        let load = self.load.clone();
        let predictor = match &self.tables {
            Some(tables) => Predictor::by_tables(tables, &self.model, &self.cluster, load),
            None => Predictor::new(&self.model, &self.cluster, load),
        };
        Predictor { utilization: self.utilization(), ..predictor }
    }
}

/// `uniform`, `zipf:0.6`, `power-law:1.2`, or a routing trace's file; `None` for a model without experts.
fn load(routing: &str, model: &ModelSpec) -> Result<Option<Arc<ExpertLoad>>> {
    let Some(moe) = model.layers.iter().find_map(|ffn| ffn.as_moe()) else { return Ok(None) };
    let (name, exponent) = routing.split_once(':').map_or((routing, None), |(name, value)| (name, Some(value)));
    let exponent = || {
        let number = exponent.and_then(|value| value.parse::<f64>().ok());
        number
            .with_context(|| format!("--routing is {routing}; a law has its exponent, as in zipf:0.6 or power-law:1.2"))
    };
    let law = match name {
        "uniform" => LoadModel::Uniform,
        "zipf" => LoadModel::Zipf(exponent()?),
        "power-law" => LoadModel::PowerLaw(exponent()?),
        _ => return Ok(Some(traced(routing, moe.num_experts)?.into())),
    };
    Ok(Some(ExpertLoad::new(law, moe.num_experts, moe.top_k)?.into()))
}

fn traced(path: &str, num_experts: usize) -> Result<ExpertLoad> {
    if !Path::new(path).exists() {
        bail!("--routing is {path}; uniform, zipf:S, power-law:A or the file of a routing trace is right");
    }
    let trace = RoutingTrace::from_json(&plans::text(Path::new(path))?).context(path.to_owned())?;
    ensure!(
        trace.num_experts == num_experts,
        "{path}: the trace has {} experts, and the model {num_experts}",
        trace.num_experts
    );
    Ok(ExpertLoad::traced(&trace)?)
}
