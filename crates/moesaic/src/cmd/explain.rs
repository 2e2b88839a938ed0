//! `moesaic explain` and `moesaic diff`: plans in words.

use std::io::{Write, stdout};
use std::path::Path;

use anyhow::{Context, Result, bail};
use moesaic_plan::{Rank, explain};

use crate::args::ExplainArgs;
use crate::folder::named_spec;
use crate::plans;

pub(crate) fn run(args: &ExplainArgs) -> Result<()> {
    let file = plans::read(&args.plan)?;
    let spec = match &args.model {
        Some(model) => named_spec(Some(model))?.1,
        None => plans::spec_of(&file).with_context(|| args.plan.display().to_string())?,
    };
    let cluster = plans::cluster(&file.cluster).with_context(|| args.plan.display().to_string())?;
    let plan = plans::resolve(file, &spec, &cluster).with_context(|| args.plan.display().to_string())?;
    let last = plan.world_size() - 1;
    if let Some(rank) = args.schedule.iter().find(|&&rank| rank as usize > last) {
        bail!("--schedule is {rank}; ranks 0 to {last} are right");
    }
    write!(stdout(), "{}", explain(&plan, &spec))?;
    for &rank in &args.schedule {
        write!(stdout(), "\n{}", plan.schedule(&spec, Rank(rank), plan.file.micro_batches))?;
    }
    Ok(())
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
