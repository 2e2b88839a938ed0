//! Served models, predicted: row by row, and as a choice between deployments.

use std::collections::BTreeMap;

use moesaic_fit::random;
use serde::Serialize;

use super::score::Pair;
use crate::calibration::case::{Case, Skipped, cases};
use crate::calibration::served::{Deployment, Served};
use crate::calibration::{self, Calibration, Target};

/// One row, and what was predicted of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// Line of its file.
    pub line: usize,
    /// Its name there.
    pub id: String,
    /// Name of the model on the hub.
    pub model: String,
    /// Name of the system.
    pub system: String,
    /// The program.
    pub backend: String,
    /// `agg` or `disagg`.
    pub mode: &'static str,
    /// Tokens of a prompt.
    pub input: f64,
    /// Tokens of an answer.
    pub output: f64,
    /// Requests at a time.
    pub concurrency: f64,
    /// GPUs in all, where the row says so.
    pub gpus: Option<usize>,
    /// Time to first token, seconds.
    pub ttft: Option<Pair>,
    /// Time per output token, seconds.
    pub tpot: Option<Pair>,
}

/// Parts of the rows that are predicted without each other.
const PARTS: f64 = 5.0;
const SEED: u64 = 7;

/// Predicts rows by all published measurements.
pub fn predict(rows: &[Served]) -> (Vec<Outcome>, Vec<Skipped>) {
    let (mut outcomes, mut skipped) = (Vec::new(), Vec::new());
    for case in cases(rows) {
        match case {
            Ok(case) => outcomes.push(Outcome::of(&case, Calibration::published())),
            Err(row) => skipped.push(row),
        }
    }
    (outcomes, skipped)
}

/// Predicts the published measurements, each by four fifths that it is not in. Rows of one measurement are in the same fifth.
pub fn cross_validate() -> Vec<Outcome> {
    let (cases, learned) = (calibration::known(), calibration::learned());
    let all: Vec<&Case> = cases.iter().collect();
    let part = |measurement: &usize| (random::uniform(SEED, *measurement as u64) * PARTS) as usize;
    let parts: Vec<usize> = calibration::same_measurements(&all).iter().map(part).collect();
    let mut outcomes = Vec::new();
    for held_out in 0..PARTS as usize {
        let known: Vec<Case> =
            cases.iter().zip(&parts).filter(|(_, part)| **part != held_out).map(|(case, _)| case.clone()).collect();
        let calibration = Calibration::new(&known, &learned);
        let asked = cases.iter().zip(&parts).filter(|(_, part)| **part == held_out);
        outcomes.extend(asked.map(|(case, _)| Outcome::of(case, &calibration)));
    }
    outcomes.sort_by_key(|outcome| outcome.line);
    outcomes
}

impl Outcome {
    fn of(case: &Case, calibration: &Calibration) -> Outcome {
        let pair = |target: Target| {
            Some(Pair { measured: target.measured(case)?, predicted: calibration.predict(case, target) })
        };
        let row = &case.row;
        let (mode, gpus) = match row.deployment {
            Deployment::Aggregated(worker) => ("agg", Some(worker.ranks())),
            Deployment::Disaggregated { prefill, decode, workers } => {
                let all = |(of_prefill, of_decode)| prefill.ranks() * of_prefill + decode.ranks() * of_decode;
                ("disagg", workers.map(all))
            }
        };
        Outcome {
            line: row.line,
            id: row.id.clone(),
            model: row.model.clone(),
            system: row.system.clone(),
            backend: row.backend.clone(),
            mode,
            input: row.input,
            output: row.output,
            concurrency: row.concurrency,
            gpus,
            ttft: pair(Target::Ttft),
            tpot: pair(Target::Tpot),
        }
    }

    /// Output tokens per second and GPU: measured and predicted.
    fn throughput(&self) -> Option<(f64, f64)> {
        let (ttft, tpot, gpus) = (self.ttft?, self.tpot?, self.gpus?);
        let rate =
            |ttft: f64, tpot: f64| self.concurrency * self.output / (ttft + (self.output - 1.0) * tpot) / gpus as f64;
        Some((rate(ttft.measured, tpot.measured), rate(ttft.predicted.value, tpot.predicted.value)))
    }
}

/// What choosing by predictions loses, over groups of deployments.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ranking {
    /// Groups of at least two deployments.
    pub groups: usize,
    /// Throughput that the choice loses to the best measured, in the mean.
    pub mean_loss: f64,
    /// The most that it loses.
    pub worst_loss: f64,
    /// Share of the groups where it loses at most 3 %.
    pub within_3_percent: f64,
}

impl Ranking {
    /// Among rows of one model, system and shape of requests, who has the most output tokens per second and GPU? `None` without
    /// a group.
    pub fn of(outcomes: &[Outcome]) -> Option<Ranking> {
        let mut groups: BTreeMap<_, Vec<(f64, f64)>> = BTreeMap::new();
        for outcome in outcomes {
            let Some(throughput) = outcome.throughput() else { continue };
            let key = (&outcome.model, &outcome.system, outcome.input as u64, outcome.output as u64);
            groups.entry(key).or_default().push(throughput);
        }
        let loss = |group: &Vec<(f64, f64)>| {
            let best = group.iter().map(|(measured, _)| *measured).fold(0.0, f64::max);
            let (chosen, _) = group.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("a group has members");
            1.0 - chosen / best
        };
        let losses: Vec<f64> = groups.values().filter(|group| group.len() > 1).map(loss).collect();
        (!losses.is_empty()).then(|| Ranking {
            groups: losses.len(),
            mean_loss: losses.iter().sum::<f64>() / losses.len() as f64,
            worst_loss: losses.iter().copied().fold(0.0, f64::max),
            within_3_percent: losses.iter().filter(|loss| **loss <= 0.03).count() as f64 / losses.len() as f64,
        })
    }
}
