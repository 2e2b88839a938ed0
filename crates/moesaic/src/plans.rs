//! Plan files, clusters and workloads as a user names them: a preset, or a file.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use moesaic_plan::eplb::RoutingTrace;
use moesaic_plan::plan::{InitialPlacement, Mesh, Pool};
use moesaic_plan::{Plan, PlanFile};
use moesaic_spec::{Cluster, ModelSpec, Workload, cluster_preset, workload_preset};

use crate::args::ModelArgs;
use crate::folder::named_spec;

/// A description larger than this is not one.
const MAX_BYTES: u64 = 64 << 20;
/// What plan files call the model inside the binary.
const EMBEDDED: &str = "tiny-moe";

/// What a plan file calls the model of these flags.
pub(crate) fn model_name(args: &ModelArgs) -> String {
    args.model().map_or(EMBEDDED.to_string(), |path| path.display().to_string())
}

/// Reads a plan file.
pub(crate) fn read(path: &Path) -> Result<PlanFile> {
    Ok(PlanFile::from_yaml(&text(path)?, &path.display().to_string())?)
}

/// The description of the model that a plan file names.
pub(crate) fn spec_of(file: &PlanFile) -> Result<ModelSpec> {
    let name = (file.model != EMBEDDED).then(|| Path::new(&file.model));
    Ok(named_spec(name)?.1)
}

/// These flags with the model that a plan file names. One that was named beside the file must be the same.
pub(crate) fn model_of(file: &PlanFile, args: &ModelArgs) -> Result<ModelArgs> {
    ensure!(
        args.model().is_none() || model_name(args) == file.model,
        "the plan is for model {}, but {} was named; leave MODEL out, or change `model` in the plan",
        file.model,
        model_name(args)
    );
    Ok(args.clone().with_model((file.model != EMBEDDED).then(|| file.model.clone().into())))
}

/// A plan's name as that of a file: `TP=8, PP=2` is `tp-8-pp-2`.
pub(crate) fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

/// A plan in a few words, for the heads of tables.
pub(crate) fn describe(file: &PlanFile) -> String {
    let Mesh { tp, pp, dp, ep } = file.mesh;
    let axis = |name: &str, size: usize| (size > 1).then(|| format!("{name} {size}"));
    let axes: Vec<String> =
        [axis("tp", tp), axis("pp", pp), axis("dp", dp), axis("ep", ep)].into_iter().flatten().collect();
    let pool = if file.moe.pool == Pool::Separate { ", experts on ranks of their own" } else { "" };
    let micro_batches = match file.micro_batches {
        1 => String::new(),
        n => format!(", {n} micro-batches"),
    };
    format!("{}{pool}{micro_batches}", axes.join(" × "))
}

/// A plan whose experts are placed, by a routing trace if the file asks for one.
pub(crate) fn resolve(file: PlanFile, model: &ModelSpec, cluster: &Cluster) -> Result<Plan> {
    let trace = match &file.moe.placement {
        InitialPlacement::Trace(path) => Some((path.clone(), text(Path::new(path))?)),
        _ => None,
    };
    let plan = Plan::new(file, model, cluster)?;
    match trace {
        None => Ok(plan),
        Some((path, text)) => {
            let placement = RoutingTrace::from_json(&text).and_then(|trace| plan.placement_for(&trace));
            Ok(plan.with_placement(placement.context(path)?)?)
        }
    }
}

/// A preset's cluster, or a file's.
pub(crate) fn cluster(name: &str) -> Result<Cluster> {
    match is_file(name) {
        true => Ok(Cluster::from_yaml(&text(Path::new(name))?, name)?),
        false => Ok(cluster_preset(name)?),
    }
}

/// A preset's workload, or a file's.
pub(crate) fn workload(name: &str) -> Result<Workload> {
    match is_file(name) {
        true => Ok(Workload::from_yaml(&text(Path::new(name))?, name)?),
        false => Ok(workload_preset(name)?),
    }
}

fn is_file(name: &str) -> bool {
    name.ends_with(".yaml") || name.ends_with(".yml") || name.contains('/')
}

fn text(path: &Path) -> Result<String> {
    let metadata = fs::metadata(path).with_context(|| path.display().to_string())?;
    ensure!(
        metadata.is_file() && metadata.len() <= MAX_BYTES,
        "{}: is not a file of at most {MAX_BYTES} bytes",
        path.display()
    );
    fs::read_to_string(path).with_context(|| path.display().to_string())
}
