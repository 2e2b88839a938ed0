//! What `plan`, `simulate` and `explain` price by: whose kernels, and how experts are loaded.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use moesaic_plan::eplb::RoutingTrace;
use moesaic_planner::load::{ExpertLoad, LoadModel};
use moesaic_planner::predict::Pricing;
use moesaic_spec::{Cluster, ModelSpec};

use crate::args::PricingArgs;
use crate::{plans, tables};

impl PricingArgs {
    /// By whose measurements; of a folder without a cluster file, those of `cluster`.
    pub(crate) fn open(&self, cluster: &Cluster) -> Result<Pricing> {
        Ok(match &self.tables {
            Some(dir) => Pricing::Own(tables::open(dir, cluster)?),
            None => Pricing::Published(self.backend.into()),
        })
    }

    /// How the experts of a model are loaded; `None` for a model without experts.
    pub(crate) fn load(&self, model: &ModelSpec) -> Result<Option<Arc<ExpertLoad>>> {
        let Some(moe) = model.layers.iter().find_map(|ffn| ffn.as_moe()) else { return Ok(None) };
        let routing = &self.routing[..];
        let (name, exponent) = routing.split_once(':').map_or((routing, None), |(name, value)| (name, Some(value)));
        let exponent = || {
            let number = exponent.and_then(|value| value.parse::<f64>().ok());
            number.with_context(|| {
                format!("--routing is {routing}; a law has its exponent, as in zipf:0.6 or power-law:1.2")
            })
        };
        let law = match name {
            "uniform" => LoadModel::Uniform,
            "zipf" => LoadModel::Zipf(exponent()?),
            "power-law" => LoadModel::PowerLaw(exponent()?),
            _ => return Ok(Some(traced(routing, moe.num_experts)?.into())),
        };
        Ok(Some(ExpertLoad::new(law, moe.num_experts, moe.top_k).context("--routing")?.into()))
    }

    /// Whether some experts are more popular than others.
    pub(crate) fn uneven(&self) -> bool {
        self.routing != "uniform"
    }
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
