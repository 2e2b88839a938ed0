//! `moesaic compare`: the same model under several plans, on local ranks, side by side.

mod prompts;
mod run;

use std::fs;
use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use moesaic_plan::{PlanFile, Setting, Strategy};
use moesaic_planner::report::{ClusterFacts, Comparison, ModelFacts, WorkloadFacts};
use moesaic_spec::{Cluster, Workload};

use self::run::{Reference, Run};
use crate::args::CompareArgs;
use crate::folder::OpenModel;
use crate::plans;

pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    let model = OpenModel::open(&args.model)?;
    let model_name = plans::model_name(&args.model);
    let workload = plans::workload(&args.workload)?;
    let (cluster, files) = match args.plan.is_empty() {
        true => {
            let cluster = plans::cluster(&args.cluster)?;
            let files = strategies(args, &model, &model_name, &workload)?;
            (cluster, files)
        }
        false => given(args)?,
    };
    let requests = prompts::requests(&model, &workload)?;
    let run = Run { args, model: &model, cluster: &cluster, workload: &workload, requests: &requests };

    let mut comparison = Comparison::new(
        ModelFacts::of(&model.name, &model.spec),
        ClusterFacts::of(&cluster),
        WorkloadFacts::of(&workload),
    );
    if !args.quiet {
        eprintln!("one rank  {} requests, for reference", requests.len());
    }
    let reference: Reference = run.reference()?;
    for file in &files {
        if !args.quiet {
            eprintln!("{:<9} {} ranks", file.name, file.ranks);
        }
        let report = run.plan(file, &reference).with_context(|| format!("plan {}", file.name))?;
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
fn strategies(args: &CompareArgs, model: &OpenModel, model_name: &str, workload: &Workload) -> Result<Vec<PlanFile>> {
    let wanted: Vec<Strategy> = match args.strategy.is_empty() {
        true => Strategy::ALL.to_vec(),
        false => args.strategy.iter().map(|&strategy| strategy.into()).collect(),
    };
    let setting = Setting {
        model_name,
        model: &model.spec,
        cluster_name: &args.cluster,
        workload_name: &args.workload,
        workload,
        ranks: args.ranks,
    };
    wanted.into_iter().map(|strategy| Ok(PlanFile::preset(strategy, &setting)?)).collect()
}

/// The plans that were given, all for one cluster.
fn given(args: &CompareArgs) -> Result<(Cluster, Vec<PlanFile>)> {
    let files = args.plan.iter().map(|path| plans::read(path)).collect::<Result<Vec<PlanFile>>>()?;
    let first = &files[0];
    for (file, path) in files.iter().zip(&args.plan) {
        ensure!(
            file.cluster == first.cluster,
            "{}: cluster is {}, but {} is for {}; plans are compared on one cluster",
            path.display(),
            file.cluster,
            args.plan[0].display(),
            first.cluster
        );
    }
    Ok((plans::cluster(&first.cluster)?, files))
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
        write(&format!("plans/{}.yaml", file.name.replace('/', "-")), &file.to_yaml())?;
    }
    if !args.quiet {
        eprintln!("written   {} (beside it report.md, report.json, plans/ and routing-trace.json)", page.display());
        if let Some(trace) = &args.trace {
            eprintln!("          {}", trace.display());
        }
    }
    Ok(())
}
