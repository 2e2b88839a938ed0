//! What `simulate` and `explain` predict: a plan with its model, cluster, workload and the load of its experts.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use moesaic_plan::footprint::DEFAULT_BATCHED_TOKENS;
use moesaic_plan::{Plan, PlanFile};
use moesaic_planner::iteration::Layout;
use moesaic_planner::load::ExpertLoad;
use moesaic_planner::memory::DEFAULT_UTILIZATION;
use moesaic_planner::predict::{Predictor, Pricing};
use moesaic_spec::{Arrival, Cluster, ModelSpec, Workload};

use crate::args::PredictArgs;
use crate::plans;

/// A plan, checked, and what it serves.
pub(crate) struct Predicted {
    pub(crate) plan: Plan,
    pub(crate) model: ModelSpec,
    pub(crate) cluster: Cluster,
    pub(crate) workload: Workload,
    pub(crate) layout: Layout,
    pub(crate) load: Option<Arc<ExpertLoad>>,
    pub(crate) pricing: Pricing,
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
        let (load, pricing) = (args.pricing.load(&model)?, args.pricing.open(&cluster)?);
        Ok(Predicted { plan, model, cluster, workload, layout, load, pricing })
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
        let predictor = Predictor::new(&self.model, &self.cluster, self.pricing.clone(), self.load.clone());
        Predictor { utilization: self.utilization(), ..predictor }
    }
}
