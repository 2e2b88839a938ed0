//! Learns how far measurements of served models reach, and says how well those that were held out are met by what was learned
//! without them.
//!
//! Large deployments, which nothing is fitted to, come last: physics alone, and calibrated.
//!
//! `cargo run --release -p moesaic-planner --example fit_served -- [--fit]`: with `--fit` writes `served-physics.json` and
//! `fit-served.json` in `bench/results/published`, as is due when prices have changed.

use std::path::Path;

use moesaic_fit::random;
use moesaic_planner::calibration::case::{Case, cases};
use moesaic_planner::calibration::served::ServedFile;
use moesaic_planner::calibration::{self, Calibration, Learned, Target};
use moesaic_planner::estimate::Estimate;

fn main() {
    let cases = calibration::published();
    let fits = std::env::args().any(|arg| arg == "--fit");
    let known = calibration::learned();
    let learned = if fits { Learned::learn(&cases, &known) } else { known };
    let by_row = |idx: usize| (random::uniform(7, idx as u64) * 5.0) as usize;
    let all: Vec<&Case> = cases.iter().collect();
    let same = calibration::same_measurements(&all);
    let by_measurement: Vec<usize> = same.iter().map(|&group| by_row(group)).collect();
    let by_model: Vec<usize> =
        cases.iter().map(|case| cases.iter().position(|c| c.params == case.params).unwrap()).collect();
    let rows: Vec<usize> = (0..cases.len()).map(by_row).collect();
    for (name, folds) in [("row", rows), ("measurement", by_measurement), ("model", by_model)] {
        report(name, &cases, &folds, &learned);
    }
    large();
    if fits {
        let asked: Vec<String> =
            cases.iter().map(|case| serde_json::to_string(&case.asked()).expect("numbers")).collect();
        write("served-physics.json", &format!("[\n{}\n]\n", asked.join(",\n")));
        write("fit-served.json", &(serde_json::to_string_pretty(&learned).expect("numbers") + "\n"));
    }
}

fn write(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/results/published").join(name);
    std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn report(name: &str, cases: &[Case], folds: &[usize], learned: &Learned) {
    let mut kinds: Vec<usize> = folds.to_vec();
    kinds.sort_unstable();
    kinds.dedup();
    let mut errors = [(Vec::new(), 0), (Vec::new(), 0)];
    for fold in kinds {
        let of = |inside: bool| -> Vec<Case> {
            cases.iter().zip(folds).filter(|(_, f)| (**f == fold) == inside).map(|(case, _)| case.clone()).collect()
        };
        let known = of(false);
        // Scales and widths are learned anew, too.
        let calibration = Calibration::new(&known, &Learned::learn(&known, learned));
        for case in of(true) {
            for (target, (errors, inside)) in Target::ALL.into_iter().zip(&mut errors) {
                let Some(measured) = target.measured(&case) else { continue };
                let estimate = calibration.predict(&case, target);
                errors.push((estimate.value / measured - 1.0).abs());
                *inside += usize::from((estimate.low..=estimate.high).contains(&measured));
            }
        }
    }
    for (target, (errors, inside)) in Target::ALL.into_iter().zip(&mut errors) {
        errors.sort_by(f64::total_cmp);
        let (median, p90) = (errors[errors.len() / 2], errors[errors.len() * 9 / 10]);
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        let coverage = *inside as f64 / errors.len() as f64;
        println!("{name:12} {target:?} median {median:.3} mean {mean:.3} p90 {p90:.3} inside {coverage:.3}");
    }
}

/// Published deployments on many nodes.
fn large() {
    let text = include_str!("../../../bench/results/published/large.csv");
    let file = ServedFile::parse(text, "large.csv").expect("our own file");
    for case in cases(&file.rows) {
        let case = case.unwrap_or_else(|skipped| panic!("line {}: {}", skipped.line, skipped.why));
        let Estimate { value, low, high } = Calibration::published().predict(&case, Target::Tpot);
        let [measured, physics, value, low, high] =
            [case.row.tpot_s.expect("a time per token"), case.physics.tpot, value, low, high].map(|s| s * 1e3);
        let id = &case.row.id;
        println!("{id:12} TPOT {measured:.1} ms, physics {physics:.1}, calibrated {value:.1} ({low:.1} to {high:.1})");
    }
}
