//! `moesaic explain` and `moesaic diff`: plans in words.

use std::io::{Write, stdout};
use std::path::Path;

use anyhow::{Context, Result, ensure};
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
    let cluster = plans::cluster(&file.cluster)?;
    let plan = plans::resolve(file, &spec, &cluster).with_context(|| args.plan.display().to_string())?;
    write!(stdout(), "{}", explain(&plan, &spec))?;
    for &rank in &args.schedule {
        let last = plan.world_size() - 1;
        ensure!((rank as usize) <= last, "--schedule is {rank}; ranks 0 to {last} are right");
        write!(stdout(), "\n{}", plan.schedule(&spec, Rank(rank), plan.file.micro_batches))?;
    }
    Ok(())
}

pub(crate) fn diff(a: &Path, b: &Path) -> Result<()> {
    for line in moesaic_plan::diff(&plans::read(a)?, &plans::read(b)?) {
        writeln!(stdout(), "{line}")?;
    }
    Ok(())
}
