//! `moesaic compare`: the same model under several plans, on local ranks, side by side.

mod candidates;
mod files;
mod priced;
mod prompts;
mod run;

use std::io::{Write, stderr, stdout};

use anyhow::{Context, Result};
use moesaic_planner::report::{ClusterFacts, Comparison, ModelFacts, WorkloadFacts};

use self::candidates::Candidates;
use self::files::Files;
use self::run::Run;
use crate::args::CompareArgs;

pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    // All that may be wrong is found before anything runs.
    let Candidates { model, cluster, workload, plans, notes } = Candidates::of(args)?;
    let files = Files::new(args, &plans)?;
    let requests = prompts::requests(&model, &workload)?;
    let run = Run { args, model: &model, cluster: &cluster, workload: &workload, requests: &requests };

    let mut comparison = Comparison::new(
        ModelFacts::of(&model.name, &model.spec),
        ClusterFacts::of(&cluster),
        WorkloadFacts::of(&workload),
    );
    let names = plans.iter().map(|plan| plan.file.name.chars().count()).max().unwrap_or(0).max("one rank".len());
    let head = |name: &str, ranks: usize| match ranks {
        1 => format!("{name:<names$}    1 rank   "),
        _ => format!("{name:<names$}  {ranks:>3} ranks  "),
    };
    let told = |_: &_| format!("{} requests, for reference", requests.len());
    let reference = progress(args, &head("one rank", 1), || run.reference(), told)?;
    for (idx, plan) in plans.iter().enumerate() {
        let traced = || run.plan(plan, &reference, files.trace(idx)?);
        let report = progress(args, &head(&plan.file.name, plan.world_size()), traced, |report| report.summary())
            .with_context(|| format!("plan {}", plan.file.name))?;
        comparison.strategies.push(report);
    }
    comparison.notes = notes;
    comparison.notes.push(
        "All of this holds for this model, cluster and workload; with others another strategy may be ahead.".into(),
    );
    let differs = |report: &moesaic_planner::report::StrategyReport| {
        report.sameness.is_some_and(|same| same.differing_tokens > 0) && report.exchange_error.is_none()
    };
    if run.dtype() != moesaic_spec::DType::F32 && comparison.strategies.iter().any(differs) {
        comparison.notes.push(
            "Where heads or widths are cut, ranks round their parts of a sum to BF16, and the parts are added up in another \
             order than on one rank. --dtype float32 compares the same without rounding to BF16."
                .into(),
        );
    }
    writeln!(stdout(), "{}", comparison.to_text())?;
    files.write(&comparison, &plans, reference.trace.as_ref())
}

/// A line of progress that begins before something is done and ends with what came of it.
fn progress<T>(
    args: &CompareArgs,
    head: &str,
    work: impl FnOnce() -> Result<T>,
    tail: impl FnOnce(&T) -> String,
) -> Result<T> {
    if args.quiet {
        return work();
    }
    eprint!("{head}");
    stderr().flush()?;
    let result = work();
    match &result {
        Ok(done) => eprintln!("{}", tail(done)),
        Err(_) => eprintln!(),
    }
    result
}
