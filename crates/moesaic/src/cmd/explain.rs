//! `moesaic explain` and `moesaic diff`: plans in words.

use std::io::{Write, stdout};
use std::path::Path;

use anyhow::{Context, Result, bail};
use moesaic_plan::{Rank, explain};
use moesaic_planner::PlannerError;
use moesaic_planner::serving::Requests;
use moesaic_planner::whatif::{self, Given};

use crate::args::ExplainArgs;
use crate::folder::named_spec;
use crate::plans;
use crate::predicted::Predicted;

pub(crate) fn run(args: &ExplainArgs) -> Result<()> {
    let file = plans::read(&args.plan)?;
    let spec = match &args.model {
        Some(model) => named_spec(Some(model))?.1,
        None => plans::spec_of(&file).with_context(|| args.plan.display().to_string())?,
    };
    let predicted = Predicted::open(&args.plan, spec, file, &args.predict)?;
    let (plan, spec) = (&predicted.plan, &predicted.model);
    let last = plan.world_size() - 1;
    if let Some(rank) = args.schedule.iter().find(|&&rank| rank as usize > last) {
        bail!("--schedule is {rank}; ranks 0 to {last} are right");
    }
    write!(stdout(), "{}", explain(plan, spec))?;
    write!(stdout(), "\n{}", prediction(&predicted)?)?;
    for &rank in &args.schedule {
        write!(stdout(), "\n{}", plan.schedule(spec, Rank(rank), plan.file.micro_batches))?;
    }
    Ok(())
}

/// What to expect, what binds and what would help.
fn prediction(predicted: &Predicted) -> Result<String> {
    let Some(requests) = Requests::of(&predicted.workload, predicted.step_tokens() as f64) else {
        return Ok(format!(
            "no prediction: the requests of {} come at a rate, and how many are there at a time follows from the plan; \
             --concurrency says it, and moesaic simulate finds it\n",
            predicted.workload.name
        ));
    };
    let given = Given {
        model: &predicted.model,
        cluster: predicted.cluster.clone(),
        layout: predicted.layout.clone(),
        requests,
        load: predicted.load.clone(),
        utilization: predicted.utilization(),
        pricing: predicted.pricing.clone(),
        system: predicted.predictor().system,
    };
    match whatif::explain(&given) {
        Ok(explained) => Ok(explained.to_string()),
        Err(error @ PlannerError::DoesNotFit { .. }) => Ok(format!("no prediction: the workload {error}\n")),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn diff(a: &Path, b: &Path) -> Result<()> {
    let differences = moesaic_plan::diff(&plans::read(a)?, &plans::read(b)?);
    if differences.is_empty() {
        writeln!(stdout(), "the plans say the same")?;
    }
    for line in differences {
        writeln!(stdout(), "{line}")?;
    }
    Ok(())
}
