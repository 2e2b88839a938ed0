//! `moesaic reproduce`: the papers' figures, claimed, predicted and possible.

use std::fs;
use std::io::{Write, stdout};
use std::path::Path;

use anyhow::{Context, Result};
use moesaic_planner::papers::{NAMES, Paper, markdown, reproduce, text};

use crate::args::ReproduceArgs;

pub(crate) fn run(args: &ReproduceArgs) -> Result<()> {
    let names: Vec<&str> = match args.papers.as_slice() {
        [] => NAMES.to_vec(),
        // Each once, in the order of their numbers.
        some => {
            let mut names: Vec<&str> = some.iter().map(String::as_str).collect();
            names.sort_unstable();
            names.dedup();
            names
        }
    };
    let papers: Vec<Paper> = names.into_iter().map(reproduce).collect::<Result<_, _>>()?;
    write_document(&args.output, &papers)?;
    if let Some(path) = &args.json {
        write_file(path, &(serde_json::to_string_pretty(&papers)? + "\n"))?;
    }
    write!(stdout(), "{}", text(&papers))?;
    writeln!(stdout(), "written to {}", args.output.display())?;
    Ok(())
}

/// The document, and its plots in a folder of its name beside it.
fn write_document(path: &Path, papers: &[Paper]) -> Result<()> {
    let plots = path.with_extension("");
    let folder = plots.file_name().with_context(|| format!("--output is {}; it must be a file", path.display()))?;
    let document = markdown(papers, &folder.to_string_lossy());
    fs::create_dir_all(&plots).with_context(|| format!("cannot create the folder {}", plots.display()))?;
    for paper in papers {
        for plot in &paper.plots {
            write_file(&plots.join(format!("{}.svg", plot.name)), &plot.svg())?;
        }
        for bars in &paper.bars {
            write_file(&plots.join(format!("{}.svg", bars.name)), &bars.svg())?;
        }
    }
    write_file(path, &document)
}

fn write_file(path: &Path, contents: &str) -> Result<()> {
    fs::write(path, contents).with_context(|| format!("cannot write {}", path.display()))
}
