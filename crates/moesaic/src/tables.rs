//! Folders of tables, as `profile` writes them and predictions read them.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, ensure};
use moesaic_planner::cost::LeftOut;
use moesaic_planner::profile::TABLES;
use moesaic_planner::tables::{OwnTables, TableFile};
use moesaic_spec::Cluster;

use crate::plans;

/// The file beside tables that says what machine they are of.
pub(crate) const CLUSTER: &str = "cluster.yaml";

/// The tables of a folder: of the machine that its cluster file describes; of `cluster`, where it has none.
pub(crate) fn open(dir: &Path, cluster: &Cluster) -> Result<OwnTables> {
    let files = read(dir)?;
    let names = || TABLES.iter().map(|table| format!("{table}.csv")).collect::<Vec<_>>().join(", ");
    ensure!(
        !files.is_empty(),
        "--tables is {}, which has no table; a folder with some of {} is right, as moesaic profile MODEL --output writes it",
        dir.display(),
        names()
    );
    let machine = match dir.join(CLUSTER).exists() {
        true => machine(dir)?,
        false => cluster.clone(),
    };
    ensure!(
        machine.gpu.name == cluster.gpu.name,
        "--tables is {0}, which measured {1}, but the cluster is of {2}; --cluster {0}/{CLUSTER}, or one of {1}, is right",
        dir.display(),
        machine.gpu.name,
        cluster.gpu.name
    );
    Ok(OwnTables::read(&machine, &files)?)
}

/// The tables of a folder with a cluster file.
pub(crate) fn of_machine(dir: &Path) -> Result<OwnTables> {
    open(dir, &machine(dir)?)
}

/// The machine that a folder's cluster file describes.
fn machine(dir: &Path) -> Result<Cluster> {
    plans::cluster(&dir.join(CLUSTER).display().to_string())
}

/// How well each table is met by its own rows, each left out in turn.
pub(crate) fn left_out(tables: &OwnTables) -> String {
    let mut text = format!("{:<14}{:>6}  error of a row left out: median, nine tenths\n", "op", "rows");
    for (op, LeftOut { rows, median, p90 }) in tables.leave_one_out() {
        let _ = writeln!(text, "{op:<14}{rows:>6}  {:>31.1} % {:>9.1} %", 100.0 * median, 100.0 * p90);
    }
    text
}

/// All tables that are there.
pub(crate) fn read(dir: &Path) -> Result<Vec<TableFile>> {
    ensure!(dir.is_dir(), "{}: is no folder", dir.display());
    let mut files = Vec::new();
    for &op in TABLES {
        let path = dir.join(format!("{op}.csv"));
        if path.exists() {
            files.push(TableFile { op, text: plans::text(&path)?, path: path.display().to_string() });
        }
    }
    Ok(files)
}
