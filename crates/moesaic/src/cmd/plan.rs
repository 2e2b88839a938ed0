//! `moesaic plan`: the best plan, what else nothing beats, and why.

use std::fs;
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use moesaic_planner::memory::DEFAULT_UTILIZATION;
use moesaic_planner::predict::Predictor;
use moesaic_planner::report::planning::{NoPlan, Planning, Proposal, Setting};
use moesaic_planner::search::file::Names;
use moesaic_planner::search::{Goals, Search, Space};
use moesaic_planner::serving::Requests;
use moesaic_planner::system::System;
use moesaic_spec::{Cluster, Workload};

use crate::args::PlanArgs;
use crate::folder::named_spec;
use crate::plans;

/// Tokens of one iteration of a group at most: what serving engines take on GPUs of 80 GB and more.
const STEP_TOKENS: usize = 8192;
/// Searches that take longer say so.
const PATIENCE: Duration = Duration::from_secs(1);
/// GPUs up to which the fewest that would fit are looked for.
const MOST_GPUS: usize = 4096;

pub(crate) fn run(args: &PlanArgs) -> Result<()> {
    let (model_name, model) = named_spec(Some(&args.model))?;
    let workload = plans::workload(&args.workload)?;
    let longest = workload.longest();
    ensure!(
        longest <= model.max_position_embeddings,
        "workload {} has sequences of {longest} tokens, but {model_name} has a context of {}; a workload of shorter ones is \
         right",
        args.workload,
        model.max_position_embeddings
    );
    let cluster = plans::cluster(&args.cluster)?;
    let (least, most) = args.gpus.unwrap_or((cluster.num_gpus(), cluster.num_gpus()));
    let (cluster, cluster_name) = grown(&cluster, &args.cluster, most)?;
    ensure!(
        args.tolerate_failures < most,
        "--tolerate-failures is {}; fewer than the {most} GPUs is right",
        args.tolerate_failures
    );
    // The folder is found wanting now, not after the search.
    let folder = args.output.join("plans");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;

    let search = Search {
        space: Space {
            model: &model,
            cluster: &cluster,
            gpus: least..=most,
            compress: !args.exact_exchange,
            uneven: args.pricing.uneven(),
            tolerate_failures: args.tolerate_failures,
        },
        requests: Requests::at(&workload, STEP_TOKENS as f64, 1.0),
        longest: longest as f64,
        goals: Goals { ttft: args.ttft, tpot: args.tpot },
        concurrencies: (!args.concurrency.is_empty())
            .then(|| args.concurrency.iter().map(|&concurrency| f64::from(concurrency)).collect()),
        utilization: DEFAULT_UTILIZATION,
        prune: true,
    };
    let names = Names { model: &model_name, cluster: &cluster_name, workload: &args.workload };
    let setting = Setting { names, workload: &workload, top: usize::from(args.top) };
    let mut predictor = Predictor::new(&model, &cluster, args.pricing.open(&cluster)?, args.pricing.load(&model)?);
    let assumptions = assumptions(args, &workload, predictor.system);
    let working = patiently(format!("searching plans of {model_name} on up to {most} GPUs …"));
    let planning = Planning::new(&search, &mut predictor, &setting, assumptions, args.disaggregate)?;
    drop(working);
    match planning {
        Ok(planning) => write(args, &planning),
        Err(NoPlan::Goals(near)) => bail!("{}", unreached(args, &near)),
        Err(NoPlan::Nothing) => bail!("{}", too_large(args, &search, &mut predictor, &model_name)?),
    }
}

/// The cluster with as many GPUs, and how plan files name it.
fn grown(cluster: &Cluster, name: &str, gpus: usize) -> Result<(Cluster, String)> {
    if gpus <= cluster.num_gpus() {
        return Ok((cluster.clone(), name.to_owned()));
    }
    ensure!(
        !plans::is_file(name),
        "--gpus is {gpus}, but {name} has {} GPUs; write `nodes: {}` there, or ask for fewer",
        cluster.num_gpus(),
        gpus.div_ceil(cluster.gpus_per_node)
    );
    let grown = cluster.with_gpus(gpus).context("--gpus")?;
    let name = grown.name.clone();
    Ok((grown, name))
}

/// Says on standard error what takes long, if it does; until what it returns is dropped.
fn patiently(what: String) -> mpsc::Sender<()> {
    let (working, done) = mpsc::channel();
    std::thread::spawn(move || {
        if done.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{what}");
        }
    });
    working
}

fn assumptions(args: &PlanArgs, workload: &Workload, system: System) -> Vec<String> {
    let Requests { input, output, prefix_hit, .. } = Requests::at(workload, 0.0, 1.0);
    let prefix = match prefix_hit {
        0.0 => "no prefix cached".to_owned(),
        share => format!("{:.0} % of prompts cached", 100.0 * share),
    };
    let load = match &args.pricing.routing[..] {
        "uniform" => "All experts are equally popular; the fullest rank has what chance gives it.".to_owned(),
        routing => format!("Experts are loaded unevenly ({routing})."),
    };
    let intervals = match system {
        System::Measured => "Intervals hold 9 of 10 measured deployments that were held out.",
        System::Unmeasured { .. } => {
            "Intervals hold 9 of 10 systems, if prices of parts err independently and systems add what parts do not show."
        }
    };
    let system = match system {
        System::Measured => format!(
            "{} serves: its kernels, and what it was measured to add to them.",
            args.pricing.backend.to_possible_value().expect("no value is hidden").get_name()
        ),
        System::Unmeasured { .. } => {
            "Users see what iterations take; a program that serves adds its own time.".to_owned()
        }
    };
    let (prices, cache) = match &args.pricing.tables {
        Some(dir) => (
            format!("Ops and links are priced from the tables in {}, as this program runs them.", dir.display()),
            "keys and values are in the type that the model computes in",
        ),
        None => ("Ops and links are priced from published measurements.".to_owned(), "keys and values are in 16 bits"),
    };
    vec![
        format!(
            "Prompts of {input} tokens and answers of {output}, in the mean, and {prefix}; of a workload only lengths and \
             prefixes count."
        ),
        "Users ask the next question when the last one is answered.".to_owned(),
        format!("Prompts are read beside answers, {STEP_TOKENS} tokens of a group in one iteration at most."),
        load,
        prices,
        system,
        format!("{:.0} % of a GPU's memory may be used; {cache}.", 100.0 * DEFAULT_UTILIZATION),
        intervals.to_owned(),
    ]
}

fn write(args: &PlanArgs, planning: &Planning) -> Result<()> {
    let save = |path: PathBuf, text: &str| fs::write(&path, text).with_context(|| path.display().to_string());
    save(args.output.join("report.html"), &planning.to_html())?;
    save(args.output.join("report.json"), &planning.to_json())?;
    save(args.output.join("plans/best.yaml"), &planning.best.plan.to_yaml())?;
    for (idx, proposal) in planning.frontier.iter().enumerate() {
        save(args.output.join(format!("plans/frontier-{}.yaml", idx + 1)), &proposal.plan.to_yaml())?;
    }
    for verdict in &planning.strategies {
        if let Some(proposal) = &verdict.proposal {
            let name = verdict.strategy.replace('+', "-");
            save(args.output.join(format!("plans/{name}.yaml")), &proposal.plan.to_yaml())?;
        }
    }
    if let Some(pools) = &planning.pools {
        save(args.output.join("plans/prefill.yaml"), &pools.prefill.to_yaml())?;
        save(args.output.join("plans/decode.yaml"), &pools.decode.to_yaml())?;
    }
    match args.json {
        true => write!(stdout(), "{}", planning.to_json())?,
        false => {
            write!(stdout(), "{}", planning.to_text())?;
            let page = args.output.join("report.html");
            writeln!(stdout(), "written    {} (beside it report.json, plans/)", page.display())?;
        }
    }
    Ok(())
}

/// Something fits, but is too slow.
fn unreached(args: &PlanArgs, near: &Proposal) -> String {
    let missed = |flag: &str, goal: Option<f64>, got: f64| {
        goal.filter(|&goal| got > goal).map(|goal| format!("{flag} is {}, it has {}", time(goal), time(got)))
    };
    let prediction = &near.prediction;
    let missed: Vec<String> =
        [missed("--ttft", args.ttft, prediction.ttft_s.value), missed("--tpot", args.tpot, prediction.tpot_s.value)]
            .into_iter()
            .flatten()
            .collect();
    let failures = match args.tolerate_failures {
        0 => String::new(),
        failures => format!(" with {failures} GPUs failing"),
    };
    format!(
        "no plan keeps the goals{failures}; {} comes nearest: {}; a longer time, more or faster GPUs would be right",
        near.name(),
        missed.join("; ")
    )
}

/// As the flags take it.
fn time(seconds: f64) -> String {
    match seconds {
        1.0.. => format!("{seconds:.2}s"),
        1e-3.. => format!("{:.1}ms", 1e3 * seconds),
        _ => format!("{:.0}us", 1e6 * seconds),
    }
}

/// Nothing fits: how many GPUs it would take.
fn too_large(args: &PlanArgs, search: &Search, predictor: &mut Predictor, model: &str) -> Result<String> {
    let (cluster, most) = (search.space.cluster, search.space.gpus.end());
    let what = format!(
        "{model} with sequences of {} tokens does not fit on {most} × {} of {}",
        search.longest, cluster.gpu.name, cluster.gpu.memory
    );
    let failing = Search { space: Space { tolerate_failures: 0, ..search.space.clone() }, ..search.clone() };
    if args.tolerate_failures > 0 && failing.fewest_gpus(&mut predictor.iterations, *most)?.is_some() {
        return Ok(format!(
            "--tolerate-failures is {}, but no plan on {most} GPUs goes on with as many fewer; more GPUs or fewer failures \
             would be right",
            args.tolerate_failures
        ));
    }
    if !args.concurrency.is_empty()
        && search.fewest_gpus(&mut predictor.iterations, *most)?.is_some_and(|few| few <= *most)
    {
        let asked: Vec<String> = args.concurrency.iter().map(u32::to_string).collect();
        return Ok(format!(
            "--concurrency is {}, but every plan that fits has more data-parallel groups than that; more would be right",
            asked.join(",")
        ));
    }
    Ok(match search.fewest_gpus(&mut predictor.iterations, MOST_GPUS)? {
        Some(gpus) => format!("{what}; --gpus {gpus} is the fewest on which it fits"),
        None => {
            format!("{what}, nor on any number up to {MOST_GPUS}; a smaller model or shorter sequences would be right")
        }
    })
}
