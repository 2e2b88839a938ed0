//! What a comparison leaves on disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use moesaic_plan::Plan;
use moesaic_plan::eplb::RoutingTrace;
use moesaic_planner::report::Comparison;

use crate::args::CompareArgs;

/// Where everything goes.
pub(super) struct Files<'a> {
    args: &'a CompareArgs,
    /// By plan.
    stems: Vec<String>,
}

impl<'a> Files<'a> {
    /// Makes the folder.
    pub(super) fn new(args: &'a CompareArgs, plans: &[Arc<Plan>]) -> Result<Files<'a>> {
        let folder = args.output.join("plans");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let mut stems: Vec<String> = Vec::new();
        for plan in plans {
            let stem = stem(&plan.file.name);
            let numbered = (2..).map(|number| format!("{stem}-{number}"));
            let free = std::iter::once(stem.clone()).chain(numbered).find(|stem| !stems.contains(stem));
            stems.push(free.expect("numbers do not end"));
        }
        let files = Files { args, stems };
        // Found out now, not after minutes.
        (0..plans.len()).try_for_each(|idx| files.trace(idx).map(drop))?;
        Ok(files)
    }

    /// An empty file for the timeline of a plan, if one was asked for.
    pub(super) fn trace(&self, idx: usize) -> Result<Option<File>> {
        let create = |path: PathBuf| File::create(&path).with_context(|| path.display().to_string());
        self.trace_path(idx).map(create).transpose()
    }

    /// One file for each plan, beside the one that was named.
    fn trace_path(&self, idx: usize) -> Option<PathBuf> {
        let path = self.args.trace.as_ref()?;
        Some(match self.stems.len() {
            1 => path.clone(),
            _ => path.with_extension(format!("{}.json", self.stems[idx])),
        })
    }

    pub(super) fn write(
        &self,
        comparison: &Comparison,
        plans: &[Arc<Plan>],
        routing: Option<&RoutingTrace>,
    ) -> Result<()> {
        let folder = &self.args.output;
        write(&folder.join("report.html"), &comparison.to_html())?;
        write(&folder.join("report.md"), &comparison.to_markdown())?;
        write(&folder.join("report.json"), &comparison.to_json())?;
        if let Some(routing) = routing {
            write(&folder.join("routing-trace.json"), &routing.to_json())?;
        }
        for (plan, stem) in plans.iter().zip(&self.stems) {
            write(&folder.join("plans").join(format!("{stem}.yaml")), &plan.file.to_yaml())?;
        }
        if self.args.quiet {
            return Ok(());
        }
        let beside = if routing.is_some() {
            "report.md, report.json, plans/, routing-trace.json"
        } else {
            "report.md, report.json, plans/"
        };
        eprintln!("written   {} (beside it {beside})", folder.join("report.html").display());
        let traces = (0..self.stems.len()).filter_map(|idx| self.trace_path(idx));
        traces.for_each(|trace| eprintln!("          {} (for ui.perfetto.dev or chrome://tracing)", trace.display()));
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())
}

/// A plan's name as the name of a file that needs no quotes: `TP=8, PP=2` is `tp8-pp2`.
fn stem(name: &str) -> String {
    let mut stem = String::new();
    for character in name.chars().filter(|&character| character != '=') {
        match character {
            'a'..='z' | '0'..='9' | '+' | '_' => stem.push(character),
            'A'..='Z' => stem.push(character.to_ascii_lowercase()),
            _ if stem.ends_with('-') || stem.is_empty() => {}
            _ => stem.push('-'),
        }
    }
    let stem = stem.trim_end_matches('-');
    if stem.is_empty() { "plan".to_string() } else { stem.chars().take(100).collect() }
}

#[cfg(test)]
mod tests {
    use super::stem;

    #[test]
    fn names_of_plans_become_names_of_files() {
        let cases = [
            ("TP=8, PP=2", "tp8-pp2"),
            ("MA 12+4", "ma-12+4"),
            ("../../etc/passwd", "etc-passwd"),
            ("größer", "gr-er"),
            ("…", "plan"),
        ];
        for (name, expected) in cases {
            assert_eq!(stem(name), expected);
        }
    }
}
