//! The papers as a document.

use std::fmt::Write;

use super::Paper;
use super::check::Check;
use super::claim::Finding;
use super::lab::Answer;
use crate::report::markdown::cell;

const HEAD: &str = "# The papers' figures\n\n\
    Written by `moesaic reproduce`; do not edit it, run the command again.\n\n\
    Every figure of the five texts that the project comes from, as *claimed*, as *predicted* on the hardware that the text \
    describes (in brackets the interval that nine of ten such systems would be in), as *bound by physics* (the best that \
    bytes and operations allow on peak figures, with its arithmetic), and a verdict:\n\n\
    - **holds**: the claim lies in the interval, however the text is read;\n\
    - **holds if**: it does so under one reading, or at the nearest place that a search found;\n\
    - **not expected**: physics allows it, but not the prediction, and the search found no place for it;\n\
    - **cannot hold**: bytes and operations forbid it however the text is read;\n\
    - **out of reach**: it is no matter of time, bytes or joules.\n\n\
    A bound in brackets is no limit: it is what two deployments would have if both were at their own bounds. Nothing here was \
    tuned towards a claim.\n";

/// The document; plots are beside it in the folder `plots`.
pub fn markdown(papers: &[Paper], plots: &str) -> String {
    let mut out = HEAD.to_owned();
    summary(&mut out, papers);
    for paper in papers {
        let _ = write!(out, "\n## {}: {}\n\nHardware: {}.\n\n", paper.name, paper.title, cell(&paper.hardware));
        for assumption in &paper.assumptions {
            let _ = writeln!(out, "- {}", cell(assumption));
        }
        for (name, title) in paper
            .plots
            .iter()
            .map(|plot| (plot.name, plot.title))
            .chain(paper.bars.iter().map(|bars| (bars.name, bars.title)))
        {
            let _ = write!(out, "\n![{}]({plots}/{name}.svg)\n", cell(title));
        }
        out += "\n| where | what | claimed | predicted | bound by physics | verdict |\n|---|---|---:|---|---|---|\n";
        paper.findings.iter().for_each(|finding| finding_row(&mut out, finding));
        out += "\nIts figures against each other:\n\n| where | the text says | from its other figures | agree | what it means |\n\
                |---|---|---|---|---|\n";
        paper.checks.iter().for_each(|check| check_row(&mut out, check));
    }
    out
}

/// How many verdicts of each kind.
fn summary(out: &mut String, papers: &[Paper]) {
    const WORDS: [&str; 5] = ["holds", "holds if", "not expected", "cannot hold", "out of reach"];
    let _ = write!(out, "\n| paper | {} | figures that disagree with others |\n|---|", WORDS.join(" | "));
    *out += &"---:|".repeat(WORDS.len() + 1);
    *out += "\n";
    for paper in papers {
        let _ = write!(out, "| {} |", paper.name);
        for word in WORDS {
            let count = paper.findings.iter().filter(|finding| finding.verdict.word() == word).count();
            let _ = write!(out, " {count} |");
        }
        let wrong = paper.checks.iter().filter(|check| !check.agrees).count();
        let _ = writeln!(out, " {wrong} of {} |", paper.checks.len());
    }
}

fn finding_row(out: &mut String, finding: &Finding) {
    let lines = |show: &dyn Fn(&Answer) -> String| -> String {
        let lines: Vec<String> = finding.answers.iter().map(show).collect();
        if lines.is_empty() { "–".to_owned() } else { lines.join("<br>") }
    };
    let predictions = lines(&|answer| {
        let assuming = if answer.assuming.is_empty() { String::new() } else { format!(": {}", cell(&answer.assuming)) };
        predicted(finding, answer) + &assuming
    });
    let bounds = lines(&|answer| {
        let (value, arithmetic) = bound(finding, answer);
        if arithmetic.is_empty() { value } else { format!("{value} = {}", cell(&arithmetic)) }
    });
    let _ = writeln!(
        out,
        "| {} | {} | {} | {predictions} | {bounds} | {} |",
        finding.at,
        cell(&finding.what),
        cell(&finding.stated.show()),
        cell(&finding.verdict.sentence())
    );
}

fn check_row(out: &mut String, check: &Check) {
    let agree = if check.agrees { "yes" } else { "**no**" };
    let _ = writeln!(
        out,
        "| {} | {} | {} | {agree} | {} |",
        check.at,
        cell(&check.says),
        cell(&check.follows),
        cell(check.meaning)
    );
}

/// The prediction with its interval, where it has one.
pub(super) fn predicted(finding: &Finding, answer: &Answer) -> String {
    let unit = finding.stated.unit;
    let [value, low, high] =
        [answer.estimate.value, answer.estimate.low, answer.estimate.high].map(|value| unit.show(value));
    if low == high { value } else { format!("{value} ({low} – {high})") }
}

/// The bound and its arithmetic.
pub(super) fn bound(finding: &Finding, answer: &Answer) -> (String, String) {
    match &answer.bound {
        None => ("–".to_owned(), String::new()),
        Some(bound) => {
            let value = finding.stated.unit.show(bound.value);
            (if bound.limits { value } else { format!("({value})") }, bound.arithmetic.clone())
        }
    }
}
