//! What a validation found, as text and JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::ops::OpOutcome;
use super::outcome::{Outcome, Ranking, cross_validate, predict};
use super::score::{Pair, Score};
use super::{ops, page};
use crate::PlannerError;
use crate::calibration::case::Skipped;
use crate::calibration::served::ServedFile;

/// Predictions beside measurements.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Validation {
    /// Where the served models come from, in words.
    pub served_from: String,
    /// Served models, row by row.
    pub served: Vec<Outcome>,
    /// Where the ops come from, in words.
    pub ops_from: String,
    /// Ops, row by row.
    pub ops: Vec<OpOutcome>,
    /// Rows that were passed over, and columns, by file.
    pub passed_over: Vec<PassedOver>,
}

/// What was not used of a file.
#[derive(Clone, Debug, Serialize)]
pub struct PassedOver {
    /// The file.
    pub file: String,
    /// Rows, each with the reason.
    pub rows: Vec<Skipped>,
    /// Columns that mean nothing here.
    pub columns: Vec<String>,
}

/// Errors of some rows, by a name.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Which rows.
    pub name: String,
    /// Their errors.
    pub score: Score,
}

impl Validation {
    /// The published measurements of served models, each predicted without itself.
    pub fn cross_validated() -> Validation {
        Validation {
            served_from: "published rows, each predicted by four fifths that it is not in".into(),
            served: cross_validate(),
            ..Validation::default()
        }
    }

    /// Adds a file of served models; `origin` is its path.
    ///
    /// # Errors
    /// [`PlannerError::Table`]: the file cannot be read; [`PlannerError::NothingToValidate`]: all its rows are passed over.
    pub fn add_served(&mut self, text: &str, origin: &str) -> Result<(), PlannerError> {
        let file = ServedFile::parse(text, origin)?;
        let (served, skipped) = predict(&file.rows);
        self.served_from = origin.to_owned();
        self.pass_over(origin, served.len(), skipped, file.unknown_columns)?;
        self.served = served;
        Ok(())
    }

    /// Adds a file of ops; `origin` is its path.
    ///
    /// # Errors
    /// As [`Validation::add_served`].
    pub fn add_ops(&mut self, text: &str, origin: &str) -> Result<(), PlannerError> {
        let file = ops::OpsFile::predict(text, origin)?;
        self.ops_from = origin.to_owned();
        self.pass_over(origin, file.outcomes.len(), file.skipped, file.unknown_columns)?;
        self.ops = file.outcomes;
        Ok(())
    }

    fn pass_over(
        &mut self,
        file: &str,
        used: usize,
        rows: Vec<Skipped>,
        columns: Vec<String>,
    ) -> Result<(), PlannerError> {
        match rows.first() {
            Some(first) if used == 0 => Err(PlannerError::NothingToValidate {
                file: file.to_owned(),
                rows: rows.len(),
                line: first.line,
                why: first.why.clone(),
            }),
            _ => {
                self.passed_over.push(PassedOver { file: file.to_owned(), rows, columns });
                Ok(())
            }
        }
    }

    /// Errors of the time per output token (`tpot`) or to the first, by all, mode, system, backend and model.
    pub fn served_lines(&self, tpot: bool) -> Vec<Line> {
        let pair = |outcome: &Outcome| if tpot { outcome.tpot } else { outcome.ttft };
        let keys: [fn(&Outcome) -> String; 5] = [
            |_| "all".into(),
            |outcome| outcome.mode.into(),
            |outcome| outcome.system.clone(),
            |outcome| outcome.backend.clone(),
            |outcome| outcome.model.clone(),
        ];
        let pairs = |key: fn(&Outcome) -> String| {
            lines(self.served.iter().filter_map(|outcome| Some((key(outcome), pair(outcome)?))))
        };
        keys.into_iter().flat_map(pairs).collect()
    }

    /// Errors of ops, by all, op, GPU and framework.
    pub fn op_lines(&self) -> Vec<Line> {
        let keys: [fn(&OpOutcome) -> String; 4] = [
            |_| "all".into(),
            |outcome| outcome.op.clone(),
            |outcome| outcome.gpu.clone(),
            |outcome| outcome.framework.clone(),
        ];
        let pairs = |key: fn(&OpOutcome) -> String| lines(self.ops.iter().map(|outcome| (key(outcome), outcome.time)));
        keys.into_iter().flat_map(pairs).collect()
    }

    /// What choosing a deployment by these predictions loses.
    pub fn ranking(&self) -> Option<Ranking> {
        Ranking::of(&self.served)
    }

    /// Predictions that are faster than physics.
    pub fn below_physics(&self) -> usize {
        self.ops.iter().filter(|outcome| outcome.time.predicted.value < outcome.bound * (1.0 - 1e-9)).count()
    }

    /// Everything, row by row and summed up.
    pub fn to_json(&self) -> String {
        let summary = serde_json::json!({
            "tpot": self.served_lines(true),
            "ttft": self.served_lines(false),
            "ranking": self.ranking(),
            "ops": self.op_lines(),
            "predictions_below_physics": self.below_physics(),
            "rows": self,
        });
        serde_json::to_string_pretty(&summary).expect("numbers and text") + "\n"
    }

    /// A page with parity plots.
    pub fn to_html(&self) -> String {
        page::render(self)
    }

    /// Tables for a terminal.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        if !self.served.is_empty() {
            let _ = writeln!(text, "served models: {}\n", self.served_from);
            text += &table("time per output token", &self.served_lines(true));
            text += &table("time to first token", &self.served_lines(false));
        }
        if let Some(ranking) = self.ranking() {
            let _ = writeln!(text, "{}\n", said(&ranking));
        }
        if !self.ops.is_empty() {
            let _ = writeln!(text, "ops: {}\n", self.ops_from);
            text += &table("time of an op", &self.op_lines());
            let _ = writeln!(text, "predictions faster than physics: {}\n", self.below_physics());
        }
        for over in &self.passed_over {
            let _ = write!(text, "{}", passed_over(over));
        }
        text
    }
}

/// The ranking in a sentence.
pub(super) fn said(ranking: &Ranking) -> String {
    let Ranking { groups, mean_loss, worst_loss, within_3_percent } = ranking;
    format!(
        "choosing among deployments of one model, system and shape of requests ({groups} groups): loses {:.1} % of the best \
         measured throughput in the mean, {:.1} % at most; at most 3 % in {:.0} % of the groups",
        100.0 * mean_loss,
        100.0 * worst_loss,
        100.0 * within_3_percent
    )
}

/// Reasons with the rows that they are of; one line for each reason.
pub(super) fn reasons(rows: &[Skipped]) -> Vec<(&str, Vec<usize>)> {
    let mut reasons: Vec<(&str, Vec<usize>)> = Vec::new();
    for row in rows {
        match reasons.iter_mut().find(|(why, _)| *why == row.why) {
            Some((_, lines)) => lines.push(row.line),
            None => reasons.push((&row.why, vec![row.line])),
        }
    }
    reasons
}

fn passed_over(over: &PassedOver) -> String {
    let mut text = String::new();
    if !over.columns.is_empty() {
        let _ = writeln!(text, "{}: columns passed over: {}", over.file, over.columns.join(", "));
    }
    if !over.rows.is_empty() {
        let _ = writeln!(text, "{}: {} rows passed over", over.file, over.rows.len());
    }
    for (why, lines) in reasons(&over.rows) {
        let few: Vec<String> = lines.iter().take(5).map(usize::to_string).collect();
        let more = if lines.len() > few.len() { ", …" } else { "" };
        let _ = writeln!(text, "  {:>5}  {why} (line {}{more})", lines.len(), few.join(", "));
    }
    text
}

fn lines(pairs: impl Iterator<Item = (String, Pair)>) -> Vec<Line> {
    let mut by_name: BTreeMap<String, Vec<Pair>> = BTreeMap::new();
    pairs.for_each(|(name, pair)| by_name.entry(name).or_default().push(pair));
    let line = |(name, pairs): (String, Vec<Pair>)| Some(Line { name, score: Score::of(&pairs)? });
    by_name.into_iter().filter_map(line).collect()
}

fn table(title: &str, lines: &[Line]) -> String {
    let mut text = format!("{title:34}  {:>5} {:>8} {:>8} {:>8} {:>9}\n", "rows", "median", "mean", "p90", "in 90 %");
    for Line { name, score } in lines {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let _ = writeln!(
            text,
            "{name:34}  {:>5} {:>8} {:>8} {:>8} {:>9}",
            score.rows,
            percent(score.median),
            percent(score.mean),
            percent(score.p90),
            percent(score.inside)
        );
    }
    text + "\n"
}
