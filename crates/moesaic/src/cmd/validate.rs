//! `moesaic validate`: the planner's predictions beside what others measured.

use std::fs;
use std::io::{Write, stdout};
use std::path::Path;

use anyhow::{Context, Result};
use moesaic_planner::validate::Validation;

use crate::args::ValidateArgs;
use crate::tables;

pub(crate) fn run(args: &ValidateArgs) -> Result<()> {
    if let Some(dir) = &args.tables {
        write!(stdout(), "{}", tables::left_out(&tables::of_machine(dir)?))?;
        return Ok(());
    }
    let mut validation = match (&args.e2e, &args.ops) {
        (None, None) => Validation::cross_validated(),
        _ => Validation::default(),
    };
    if let Some(path) = &args.e2e {
        validation.add_served(&read(path)?, &path.display().to_string())?;
    }
    if let Some(path) = &args.ops {
        validation.add_ops(&read(path)?, &path.display().to_string())?;
    }
    if let Some(path) = &args.json {
        write(path, &validation.to_json())?;
    }
    if let Some(folder) = &args.output {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        write(&folder.join("validation.json"), &validation.to_json())?;
        write(&folder.join("validation.html"), &validation.to_html())?;
    }
    write!(stdout(), "{}", validation.to_text())?;
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
