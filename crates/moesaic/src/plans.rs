//! Plan files, clusters and workloads as a user names them: a preset, or a file.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use moesaic_plan::eplb::RoutingTrace;
use moesaic_plan::plan::{ExchangePrecision, ExchangeRoute, InitialPlacement, Mesh, Pool};
use moesaic_plan::{Plan, PlanFile};
use moesaic_spec::{Cluster, ModelSpec, Workload, cluster_preset, workload_preset};

use crate::args::ModelArgs;
use crate::folder::named_spec;

/// A description larger than this is not one.
const MAX_BYTES: u64 = 64 << 20;
/// What plan files call the model inside the binary.
pub(crate) const EMBEDDED: &str = "tiny-moe";

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
    Ok(named_spec(Some(Path::new(&file.model)))?.1)
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

/// A plan in a few words, for the heads of tables.
pub(crate) fn describe(file: &PlanFile) -> String {
    let Mesh { tp, pp, dp, ep } = file.mesh;
    let axes: Vec<String> = [("tp", tp), ("pp", pp), ("dp", dp)]
        .into_iter()
        .filter(|&(_, size)| size > 1)
        .map(|(name, size)| format!("{name} {size}"))
        .collect();
    let axes = if axes.is_empty() { "attention on one rank".to_string() } else { axes.join(" × ") };
    let experts = match (file.moe.pool, ep) {
        (Pool::Separate, _) => format!("experts on {ep} more"),
        (Pool::Shared, 1) => String::new(),
        (Pool::Shared, _) => format!("experts over {ep}"),
    };
    let replicas = file.moe.redundant_experts;
    let precision = match file.exchange.precision {
        ExchangePrecision::Full => "",
        ExchangePrecision::Int8 => "INT8 exchange",
        ExchangePrecision::Fp8 => "FP8 exchange",
    };
    let said = [
        axes,
        experts,
        if replicas > 0 { format!("{replicas} replicas") } else { String::new() },
        if file.micro_batches > 1 { format!("{} micro-batches", file.micro_batches) } else { String::new() },
        precision.to_string(),
        if file.exchange.route == ExchangeRoute::TwoLevel { "two levels".to_string() } else { String::new() },
        if file.balance.is_some() { "balanced".to_string() } else { String::new() },
        if file.synchronize.is_some() { "synchronized".to_string() } else { String::new() },
    ];
    said.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
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

/// Whether a name is that of a file and not of a preset.
pub(crate) fn is_file(name: &str) -> bool {
    name.ends_with(".yaml") || name.ends_with(".yml") || name.contains('/')
}

/// A file of the size that descriptions have.
pub(crate) fn text(path: &Path) -> Result<String> {
    let metadata = fs::metadata(path).with_context(|| path.display().to_string())?;
    ensure!(!metadata.is_dir(), "{}: is a folder; a YAML file is right", path.display());
    ensure!(
        metadata.is_file() && metadata.len() <= MAX_BYTES,
        "{}: is not a file of at most {MAX_BYTES} bytes",
        path.display()
    );
    fs::read_to_string(path).with_context(|| path.display().to_string())
}
