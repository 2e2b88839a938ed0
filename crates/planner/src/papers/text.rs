//! The papers as a compact table for the terminal.

use std::fmt::Write;

use super::Paper;
use super::claim::Finding;
use super::markdown::{bound, predicted};

/// One line a claim, and the contradictions.
pub fn text(papers: &[Paper]) -> String {
    let mut out = String::new();
    for paper in papers {
        let _ = writeln!(out, "{} {} on {}", paper.name, paper.title, paper.hardware);
        let rows: Vec<[String; 5]> = paper.findings.iter().map(row).collect();
        let widths: Vec<usize> =
            (0..4).map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
        for row in rows {
            out += " ";
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(out, " {cell}{}", " ".repeat(width - cell.chars().count()));
            }
            let _ = writeln!(out, "  {}", row[4]);
        }
        let wrong = paper.checks.iter().filter(|check| !check.agrees);
        let _ = writeln!(
            out,
            "  of {} figures held against each other, {} do not agree:",
            paper.checks.len(),
            wrong.clone().count()
        );
        for check in wrong {
            let _ = writeln!(out, "    {}: {}; {}", check.at, check.says, check.follows);
        }
        out += "\n";
    }
    out
}

/// What, claimed, predicted, bound, verdict; of several readings the first.
fn row(finding: &Finding) -> [String; 5] {
    let first = finding.answers.first();
    let of =
        |show: fn(&Finding, &super::lab::Answer) -> String| first.map_or("-".into(), |answer| show(finding, answer));
    [
        finding.what.clone(),
        finding.stated.show(),
        of(predicted),
        of(|finding, answer| bound(finding, answer).0),
        finding.verdict.word().to_owned(),
    ]
}
