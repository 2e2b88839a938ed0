//! `moesaic simulate`: the scheduler on a virtual clock.

use std::fs;
use std::io::{Write, stdout};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use moesaic_planner::report::{ClusterFacts, ModelFacts, SimulationReport, workload_line};
use moesaic_planner::serving::Requests;
use moesaic_planner::simulate::{Goals, Limits, Simulation, trials};
use moesaic_spec::{Arrival, Workload};

use crate::args::SimulateArgs;
use crate::folder::named_spec;
use crate::plans;
use crate::predicted::Predicted;

pub(crate) fn run(args: &SimulateArgs) -> Result<()> {
    let file = plans::read(&args.plan)?;
    let spec = match &args.model {
        Some(model) => named_spec(Some(model))?.1,
        None => plans::spec_of(&file).with_context(|| args.plan.display().to_string())?,
    };
    let predicted = Predicted::open(&args.plan, spec, file, &args.predict)?;
    let report = report(args, &predicted)?;
    let json = || Ok::<_, anyhow::Error>(serde_json::to_string_pretty(&report)? + "\n");
    match args.json.as_deref() {
        Some(path) if path == Path::new("-") => write!(stdout(), "{}", json()?)?,
        other => {
            if let Some(path) = other {
                fs::write(path, json()?).with_context(|| path.display().to_string())?;
            }
            write!(stdout(), "{}", report.text())?;
        }
    }
    if let Some(folder) = &args.output {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let page = folder.join("simulation.html");
        fs::write(&page, report.html()).with_context(|| page.display().to_string())?;
        eprintln!("{}", page.display());
    }
    Ok(())
}

fn report(args: &SimulateArgs, predicted: &Predicted) -> Result<SimulationReport> {
    let Predicted { plan, model, cluster, layout, .. } = predicted;
    let workload = workload(args, &predicted.workload)?;
    ensure!((1..=1000).contains(&args.trials), "--trials is {}; 1 to 1000 is right", args.trials);
    let simulation = Simulation {
        layout,
        workload: &workload,
        limits: Limits::of(&plan.file, &workload),
        goals: args.goodput.as_deref().map_or(Ok(Goals::default()), goals)?,
        stragglers: predicted.load.is_some().then_some(workload.seed),
    };
    let mut predictor = predicted.predictor();
    let (simulated, summary) = trials(&mut predictor, &simulation, args.trials)?;
    let closed_form = match Requests::of(&workload, predicted.step_tokens() as f64) {
        Some(requests) => Some(predictor.predict(layout, &requests)?),
        None => None,
    };
    Ok(SimulationReport {
        plan: plan.file.name.clone(),
        spread: plans::describe(&plan.file),
        model: ModelFacts::of(&plan.file.model, model),
        cluster: ClusterFacts::of(cluster),
        workload: workload_line(&workload),
        routing: if predicted.load.is_some() { args.predict.pricing.routing.clone() } else { "none".to_owned() },
        simulated,
        trials: (args.trials > 1).then_some(summary),
        closed_form,
    })
}

/// The plan's workload, with what flags say otherwise.
fn workload(args: &SimulateArgs, named: &Workload) -> Result<Workload> {
    let mut workload = named.clone();
    if let Some(rate) = args.rate {
        ensure!(rate.is_finite() && rate > 0.0, "--rate is {rate}; requests per second above 0 are right");
        workload.arrival = Arrival::Poisson { requests_per_s: rate };
    }
    if let Some(requests) = args.requests {
        let most = (1usize << 28) / workload.longest();
        ensure!((1..=most).contains(&requests), "--requests is {requests}; 1 to {most} is right for this workload");
        workload.num_requests = requests;
    }
    if let Some(seed) = args.seed {
        workload.seed = seed;
    }
    Ok(workload)
}

/// `ttft:1s,tpot:30ms,e2e:20s`.
fn goals(text: &str) -> Result<Goals> {
    let mut goals = Goals::default();
    for part in text.split(',') {
        let wrong =
            || format!("--goodput has {part:?}; ttft, tpot or e2e with a time is right, as in ttft:1s,tpot:30ms");
        let (name, time) = part.split_once(':').with_context(wrong)?;
        let limit = match name.trim() {
            "ttft" => &mut goals.ttft_s,
            "tpot" => &mut goals.tpot_s,
            "e2e" => &mut goals.e2e_s,
            _ => bail!(wrong()),
        };
        *limit = Some(seconds(time.trim()).with_context(wrong)?);
    }
    Ok(goals)
}

/// `1s`, `30ms`, `500us`.
fn seconds(text: &str) -> Option<f64> {
    let units = [("ms", 1e-3), ("us", 1e-6), ("µs", 1e-6), ("s", 1.0)];
    let (number, unit) = units.iter().find_map(|&(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    let value: f64 = number.trim().parse().ok()?;
    (value.is_finite() && value > 0.0).then_some(value * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_have_names_and_units() {
        let goals_of = |text: &str| goals(text).map_err(|error| error.to_string());
        let expected = Goals { ttft_s: Some(1.5), tpot_s: Some(0.03), e2e_s: None };
        assert_eq!(goals_of("ttft:1.5s, tpot:30ms"), Ok(expected));
        assert_eq!(goals_of("e2e:500us").unwrap().e2e_s, Some(5e-4));
        for wrong in ["", "ttft", "ttft:1", "itl:1s", "tpot:-3ms", "tpot:nans"] {
            assert!(goals_of(wrong).unwrap_err().starts_with("--goodput has"), "{wrong}");
        }
    }
}
