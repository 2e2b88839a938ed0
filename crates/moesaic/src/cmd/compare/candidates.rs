//! What is compared: the plans that were given, or the strategies, checked against one model and one cluster.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use moesaic_plan::{Plan, PlanFile, Setting, Strategy};
use moesaic_spec::{Cluster, Workload};

use crate::args::{CompareArgs, ModelArgs};
use crate::folder::OpenModel;
use crate::plans;

/// Cluster and requests where nobody names others.
const DEFAULT_CLUSTER: &str = "a100-4x4";
const DEFAULT_WORKLOAD: &str = "chat-small";
/// Ranks where nobody says otherwise and the cluster has as many.
const DEFAULT_RANKS: usize = 16;

/// Plans that can be followed, and what they are for.
pub(super) struct Candidates {
    pub model: OpenModel,
    pub cluster: Cluster,
    pub workload: Workload,
    pub plans: Vec<Arc<Plan>>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

impl Candidates {
    pub(super) fn of(args: &CompareArgs) -> Result<Candidates> {
        if args.plan.is_empty() { of_strategies(args) } else { of_files(args) }
    }
}

/// The strategies that were asked for, or all that this model and number of ranks allow.
fn of_strategies(args: &CompareArgs) -> Result<Candidates> {
    let model = OpenModel::open(&args.model)?;
    let cluster_name = args.cluster.as_deref().unwrap_or(DEFAULT_CLUSTER);
    let workload_name = args.workload.as_deref().unwrap_or(DEFAULT_WORKLOAD);
    let (cluster, workload) = (plans::cluster(cluster_name)?, plans::workload(workload_name)?);
    let setting = Setting {
        model_name: &plans::model_name(&args.model),
        model: &model.spec,
        cluster_name,
        workload_name,
        workload: &workload,
        ranks: args.ranks.unwrap_or(DEFAULT_RANKS.min(cluster.num_gpus())),
    };
    let checked = |strategy: Strategy| -> Result<Plan> {
        let file = PlanFile::preset(strategy, &setting)?;
        let name = file.name.clone();
        plans::resolve(file, &model.spec, &cluster).with_context(|| format!("plan {name}"))
    };
    let (mut found, mut notes, mut first_refusal) = (Vec::<Arc<Plan>>::new(), Vec::new(), None);
    let wanted: Vec<Strategy> = args.strategy.iter().map(|&strategy| strategy.into()).collect();
    for &strategy in if wanted.is_empty() { &Strategy::ALL[..] } else { &wanted } {
        match checked(strategy) {
            Ok(plan) => match found.iter().find(|other| other.file == plan.file) {
                None => found.push(Arc::new(plan)),
                Some(same) => {
                    notes.push(format!("Strategy {} is left out: here it is {}.", strategy.name(), same.file.name));
                }
            },
            // Who names a strategy wants to know why it cannot be.
            Err(refusal) if !wanted.is_empty() => return Err(refusal),
            Err(refusal) => {
                notes.push(format!("Strategy {} is left out: {refusal:#}.", strategy.name()));
                first_refusal.get_or_insert(refusal);
            }
        }
    }
    match first_refusal.filter(|_| found.is_empty()) {
        Some(refusal) => Err(refusal),
        None => Ok(Candidates { cluster, workload, plans: found, notes, model }),
    }
}

/// The plans that were given: all for one model, one cluster and one workload.
fn of_files(args: &CompareArgs) -> Result<Candidates> {
    let mut files = args.plan.iter().map(|path| plans::read(path)).collect::<Result<Vec<PlanFile>>>()?;
    let same = |key: &str, of: fn(&PlanFile) -> &str| -> Result<String> {
        let first = of(&files[0]);
        for (file, path) in files.iter().zip(&args.plan) {
            ensure!(
                of(file) == first,
                "{}: {key} is {}, but {} is for {first}; plans are compared on one {key}",
                path.display(),
                of(file),
                args.plan[0].display(),
            );
        }
        Ok(first.to_string())
    };
    same("model", |file| &file.model)?;
    let first = || args.plan[0].display().to_string();
    let cluster = plans::cluster(&same("cluster", |file| &file.cluster)?).with_context(first)?;
    let workload = match &args.workload {
        Some(name) => plans::workload(name)?,
        None => plans::workload(&same("workload", |file| &file.workload)?).with_context(first)?,
    };
    let model_args: ModelArgs = plans::model_of(&files[0], &args.model).with_context(first)?;
    let model = OpenModel::open(&model_args).with_context(first)?;
    name_apart(&mut files, &args.plan);
    let resolve = |(file, path): (PlanFile, &PathBuf)| -> Result<Arc<Plan>> {
        let longest = workload.longest();
        if let Some(len) = file.memory.max_model_len.filter(|&len| len < longest) {
            bail!(
                "{}: memory.max_model_len is {len}, but workload {} has sequences of {longest} tokens; write \
                 `max_model_len: {longest}` or more",
                path.display(),
                workload.name
            );
        }
        let plan = plans::resolve(file, &model.spec, &cluster);
        Ok(Arc::new(plan.with_context(|| path.display().to_string())?))
    };
    let plans = files.into_iter().zip(&args.plan).map(resolve).collect::<Result<Vec<_>>>()?;
    Ok(Candidates { cluster, workload, plans, notes: Vec::new(), model })
}

/// Names that several files have are told apart by the names of the files, or by their paths.
fn name_apart(files: &mut [PlanFile], paths: &[PathBuf]) {
    let shared = |files: &[PlanFile]| -> Vec<bool> {
        let named = |name: &str| files.iter().filter(|file| file.name == name).count();
        files.iter().map(|file| named(&file.name) > 1).collect()
    };
    let stem = |path: &Path| path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    for name_of in [&stem as &dyn Fn(&Path) -> String, &|path: &Path| path.display().to_string()] {
        let shared = shared(files);
        for ((file, path), _) in files.iter_mut().zip(paths).zip(shared).filter(|(_, shared)| *shared) {
            file.name = name_of(path);
        }
    }
}
