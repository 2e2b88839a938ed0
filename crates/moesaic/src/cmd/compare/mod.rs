//! `moesaic compare`: the same model under several plans, on local ranks, side by side.

mod prompts;
mod run;

use std::fs;
use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use moesaic_plan::{PlanFile, Setting, Strategy};
use moesaic_planner::report::{ClusterFacts, Comparison, ModelFacts, WorkloadFacts};
use moesaic_spec::Workload;

use self::run::{Reference, Run};
use crate::args::CompareArgs;
use crate::folder::OpenModel;
use crate::plans;

/// What is asked when nothing is said.
const DEFAULT_WORKLOAD: &str = "chat-small";

pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    let given = args.plan.iter().map(|path| plans::read(path)).collect::<Result<Vec<PlanFile>>>()?;
    let first = given.first();
    let model_args = first.map_or(Ok(args.model.clone()), |file| plans::model_of(file, &args.model))?;
    let model = OpenModel::open(&model_args)?;
    let model_name = plans::model_name(&model_args);
    let workload_name = args.workload.as_deref().or(first.map(|file| file.workload.as_str()));
    let workload_name = workload_name.unwrap_or(DEFAULT_WORKLOAD);
    let workload = plans::workload(workload_name)?;
    let cluster = plans::cluster(first.map_or(&args.cluster, |file| &file.cluster))?;
    let files = match given.is_empty() {
        true => strategies(args, &model, &model_name, (workload_name, &workload))?,
        false => given,
    };
    check_alike(args, &files, &model_name)?;
    let requests = prompts::requests(&model, &workload)?;
    let run = Run { args, model: &model, cluster: &cluster, workload: &workload, requests: &requests };

    let mut comparison = Comparison::new(
        ModelFacts::of(&model.name, &model.spec),
        ClusterFacts::of(&cluster),
        WorkloadFacts::of(&workload),
    );
    if !args.quiet {
        eprintln!("{:<11} {:>4} rank   {} requests, for reference", "one", 1, requests.len());
    }
    let reference: Reference = run.reference()?;
    for file in &files {
        let report = run.plan(file, &reference).with_context(|| format!("plan {}", file.name))?;
        if !args.quiet {
            let sameness = match report.sameness {
                Some(sameness) if sameness.bit_identical() => "every bit as one rank".to_string(),
                Some(sameness) => {
                    format!("{} of {} tokens as one rank", sameness.tokens - sameness.differing_tokens, sameness.tokens)
                }
                None => String::new(),
            };
            let tpot = report.performance.tpot_ms.mean;
            eprintln!("{:<11} {:>4} ranks  TPOT {tpot:.3} ms  {sameness}", file.name, file.ranks);
        }
        comparison.strategies.push(report);
    }
    comparison.notes.push(
        "Latency of a small model is mostly launches and message latency, which no bandwidth shortens: a larger model shifts \
         the balance between strategies."
            .into(),
    );
    writeln!(stdout(), "{}", comparison.to_text())?;
    write_files(args, &comparison, &files, &reference)
}

/// The strategies that were asked for, as plans.
fn strategies(
    args: &CompareArgs,
    model: &OpenModel,
    model_name: &str,
    (workload_name, workload): (&str, &Workload),
) -> Result<Vec<PlanFile>> {
    let wanted: Vec<Strategy> = match args.strategy.is_empty() {
        true => Strategy::ALL.to_vec(),
        false => args.strategy.iter().map(|&strategy| strategy.into()).collect(),
    };
    let setting = Setting {
        model_name,
        model: &model.spec,
        cluster_name: &args.cluster,
        workload_name,
        workload,
        ranks: args.ranks,
    };
    wanted.into_iter().map(|strategy| Ok(PlanFile::preset(strategy, &setting)?)).collect()
}

/// Plans are compared on one model and one cluster.
fn check_alike(args: &CompareArgs, files: &[PlanFile], model_name: &str) -> Result<()> {
    for (file, path) in files.iter().zip(&args.plan) {
        ensure!(
            file.model == model_name,
            "{}: the plan is for model {}, but {model_name} is compared; name the plan's model, or change `model`",
            path.display(),
            file.model
        );
        ensure!(
            file.cluster == files[0].cluster,
            "{}: cluster is {}, but {} is for {}; plans are compared on one cluster",
            path.display(),
            file.cluster,
            args.plan[0].display(),
            files[0].cluster
        );
    }
    Ok(())
}

fn write_files(args: &CompareArgs, comparison: &Comparison, files: &[PlanFile], reference: &Reference) -> Result<()> {
    let folder = &args.output;
    let write = |name: &str, text: &str| -> Result<PathBuf> {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        }
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        Ok(path)
    };
    let page = write("report.html", &comparison.to_html())?;
    write("report.md", &comparison.to_markdown())?;
    write("report.json", &comparison.to_json())?;
    if let Some(trace) = &reference.trace {
        write("routing-trace.json", &trace.to_json())?;
    }
    for file in files {
        write(&format!("plans/{}.yaml", plans::slug(&file.name)), &file.to_yaml())?;
    }
    if !args.quiet {
        eprintln!("written   {} (beside it report.md, report.json, plans/ and routing-trace.json)", page.display());
        if let Some(trace) = &args.trace {
            eprintln!("          {}", trace.display());
        }
    }
    Ok(())
}
